"""Processes that end with what started them, and are asked before they are ended."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Send this process SIGTERM when its parent is gone, and end it if it has not ended by itself in half a minute."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def call(command: list[str], meanwhile: Callable[[], object]) -> int:
    """Run a command to its end, calling `meanwhile` every second; returns its exit status.

    SIGINT and SIGTERM are passed on, once, as the SIGINT that a terminal would send to the whole group; this program
    ends, too, when the command has. On Linux the command does not outlive this process.
    """
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=prepare)
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if not asked:
            print(f"{'stopping':>8}  checkpoints are kept; this takes up to half a minute", flush=True)
            os.killpg(process.pid, signal.SIGINT)
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            try:
                status = process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                meanwhile()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    meanwhile()
    if asked:
        sys.exit("stopped; the same command continues")
    return status


def prepare() -> None:
    """In the new process, before the command: SIGINT as a terminal has it, and SIGKILL when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
