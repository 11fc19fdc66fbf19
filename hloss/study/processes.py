"""Processes that end with their parent, and commands that receive SIGINT before they are killed."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """When the parent of this process ends, send this process SIGTERM, and exit 30 seconds later if it still runs."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def call(command: list[str], meanwhile: Callable[[], object], errors: Path) -> int:
    """Run a command and call `meanwhile` every second until it ends.

    The first SIGINT or SIGTERM is forwarded as SIGINT to the command's process group. On Linux the command is killed if
    this process ends.

    Args:
        command: program and arguments.
        meanwhile: called every second, and once after the end.
        errors: file that gets the standard error of the command.

    Returns:
        Exit status of the command.

    Raises:
        SystemExit: after the end of the command, if a signal was forwarded.
    """
    with open(errors, "ab") as stderr:
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=prepare, stderr=stderr)
    interrupted = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal interrupted
        if not interrupted:
            print(f"{'stopping':>8}  runs save their checkpoints, for up to 30 seconds", flush=True)
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
    """Set up a new process before its command: default SIGINT handler, SIGKILL when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
