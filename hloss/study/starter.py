"""A process that imports the modules of runs once per study, and is forked for each run.

`workflow/scripts/run_notebook.py` is its client: it sends its command and forwards signals.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hloss
from hloss.runs.provenance import code_sha256
from hloss.study.jupyter_kernels import NOTEBOOK_IMPORTS
from hloss.study.processes import prepare

ADDRESS = "HLOSS_STARTER"  # variable of the environment that holds the path of the socket
MODULES = (*NOTEBOOK_IMPORTS, "hloss.study.notebooks", "hloss.study.tuning", "ipykernel.kernelapp")
ACCEPTED = b"y"  # the first answer to a client; the second is the exit status, as one byte
REQUEST_SECONDS = 10  # time that a client has to send its command
STOP_SECONDS = 30  # time that a process has to end after its client has ended


@contextlib.contextmanager
def starter() -> Iterator[None]:
    """Run the process until the end of the context, and name its socket in the environment.

    Does nothing except on Linux: libraries of macOS do not work after a fork.
    """
    if sys.platform != "linux":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hloss-", dir="/tmp") as folder:  # the path of a socket must be short
        address = f"{folder}/starter"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()  # clients wait until the imports are complete
            number = listener.fileno()
            command = [sys.executable, "-m", __name__, str(number), str(time.time())]
            process = subprocess.Popen(command, pass_fds=[number], start_new_session=True, preexec_fn=prepare)
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            process.kill()
            process.wait()


def main(number: int, started: float) -> None:
    """Import the modules, then serve clients without end; in a process of a client, carry out its script.

    Args:
        number: descriptor of the socket that clients connect to.
        started: time of the start, in seconds of `time.time`.
    """
    for module in MODULES:
        import_module(module)
    code_sha256()  # is cached; each run records it
    gc.freeze()  # the garbage collector of forked processes does not write to the memory of these modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the processes that attend to clients
    with socket.socket(fileno=number) as listener:
        connection = listener.accept()[0]
        while os.fork():
            connection.close()
            connection = listener.accept()[0]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    script = _attend(connection, started)
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def _attend(connection: socket.socket, started: float) -> str:
    """Fork a process for a client, forward signals and send the exit status; return its script in that process."""
    connection.settimeout(REQUEST_SECONDS)
    request, streams = _receive(connection)
    if _is_changed(started):
        os._exit(0)  # without an answer, the client carries out its command itself
    connection.send(ACCEPTED)
    connection.settimeout(None)
    if process := os.fork():
        for stream in streams:
            os.close(stream)
        _follow(connection, process)
    connection.close()
    return _become(request, streams)


def _follow(connection: socket.socket, process: int) -> NoReturn:
    """Forward signals to a process until it ends, and send its exit status; end it if the client ends."""
    changed, wake = os.pipe()  # readable after SIGCHLD; kernels of Linux before 5.3 lack pidfd_open
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while (status := _exit_status(process)) is None:
        ready = select.select([changed, connection.fileno()], [], [])[0]
        if changed in ready:
            os.read(changed, 1)
            continue
        number = b""
        with contextlib.suppress(ConnectionResetError):
            number = connection.recv(1)
        if not number:  # the client has ended
            _end(process)
        os.kill(process, number[0])
    with contextlib.suppress(OSError):  # the client has ended
        connection.send(bytes([status if status >= 0 else 128 - status]))  # as a shell reports a signal
    os._exit(0)


def _exit_status(process: int) -> int | None:
    """Exit status of a process, negative after a signal; None while it runs."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _end(process: int) -> NoReturn:
    """Send a process SIGTERM, and SIGKILL if it still runs after `STOP_SECONDS`."""
    os.kill(process, signal.SIGTERM)
    last = time.monotonic() + STOP_SECONDS
    while _exit_status(process) is None:
        if time.monotonic() > last:
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(0.1)
    os._exit(0)


def _is_changed(started: float) -> bool:
    """Whether a module has changed: a run must not record the hash of code that it does not execute."""
    return any(file.stat().st_ctime > started for file in Path(hloss.__file__).parent.rglob("*.py"))


def _receive(connection: socket.socket) -> tuple[list[Any], list[int]]:
    """Arguments, environment and folder of a client, and its standard streams."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(size))), streams


def _become(request: list[Any], streams: list[int]) -> str:
    """Take over arguments, environment, folder and streams of a client; return its script."""
    sys.argv, environment, folder = request
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return sys.argv[0]


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
