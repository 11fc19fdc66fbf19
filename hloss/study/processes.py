"""Processes that end with their parent, and commands that are interrupted before they are killed."""

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
    """Send this process SIGTERM when its parent has ended, and end it half a minute later if it still runs."""
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

    SIGINT and SIGTERM are passed on once, as a SIGINT to the command's process group; when the command has ended, this
    program exits. On Linux the command does not outlive this process.
    """
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=prepare)
    interrupted = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal interrupted
        if not interrupted:
            print(f"{'stopping':>8}  checkpoints are kept; this takes up to half a minute", flush=True)
            os.killpg(process.pid, signal.SIGINT)
        interrupted = True

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
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
    if interrupted:
        sys.exit("stopped; the same command continues")
    return status


def prepare() -> None:
    """In the new process, before the command: the default SIGINT handler, and SIGKILL when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
