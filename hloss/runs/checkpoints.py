"""Status file, checkpoints and signal handling of a run.

`status.json` tells other processes the state of a run, which papermill's exit code does not. A checkpoint is written
beside the last two and then renamed, so that a complete one exists at every moment. A checkpoint that cannot be read,
or was made by other settings, code or data, is skipped, and the report says so.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any

import torch

from hloss.runs.errors import RunStopped
from hloss.runs.files import atomic_save, atomic_write

STATES = ("running", "stopped", "failed", "complete")
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def write_status(folder: Path, state: str, iteration: int, message: str = "", retry: bool = False) -> None:
    """Replace `status.json`.

    Args:
        folder: the run's folder.
        state: one of STATES. "running" in a folder that no process has locked means that its process was killed.
        iteration: the last iteration that is complete.
        message: why the run stopped or failed.
        retry: whether the run would continue if it were started again.
    """
    status = {"state": state, "iteration": iteration, "message": message, "retry": retry}
    with suppress(OSError):  # a full disk must not hide the run's own error
        atomic_write(folder / "status.json", lambda part: part.write_text(json.dumps(status) + "\n"))


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status of a run folder; None while there is none."""
    file = Path(folder) / "status.json"
    return json.loads(file.read_text()) if file.exists() else None


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint and keep the previous one. OSError if it cannot be written; then nothing has changed."""
    new = folder / "checkpoint.new.pt"
    atomic_save(new, checkpoint)
    with suppress(FileNotFoundError):
        (folder / CURRENT).replace(folder / PREVIOUS)
    new.replace(folder / CURRENT)


def load_checkpoint(folder: Path, identity: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest complete checkpoint of this run, on the CPU; None if there is none.

    Args:
        folder: the run's folder.
        identity: settings, code and data of the run, which the checkpoint must hold under the same keys.
        report: called with a line for each checkpoint that is skipped.
    """
    files = [folder / name for name in (CURRENT, PREVIOUS) if (folder / name).exists()]
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises nearly anything on a truncated or foreign file
            report(f"{file.name} cannot be read and is skipped ({type(error).__name__})")
            continue
        if not isinstance(checkpoint, dict):
            report(f"{file.name} is no checkpoint of a run and is skipped")
        elif other := [key for key, value in identity.items() if checkpoint.get(key) != value]:
            report(f"{file.name} is of another run ({', '.join(other)} differ) and is skipped")
        else:
            return checkpoint
    if files:
        report("no checkpoint can be used: training begins anew")
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, complete or not, and the state of an attempt that failed."""
    for file in [*folder.glob("checkpoint*.pt"), *folder.glob(".checkpoint*.part"), *folder.glob("failed.pt")]:
        file.unlink()


def clean_up_complete_run(folder: Path) -> None:
    """Remove what a process leaves that is killed after it wrote its result and before it ended."""
    status = read_status(folder) or {"state": "running", "iteration": 0}
    if status["state"] != "complete":
        remove_checkpoints(folder)
        write_status(folder, "complete", status["iteration"])


class StopSignals:
    """Context that handles SIGTERM and SIGINT during a run.

    Inside the training loop a signal is recorded in `received`, so that the loop can finish its iteration and save.
    Outside the loop the first process of a run raises RunStopped at once, and other processes end. Only a program's
    main thread can receive signals; in another thread this does nothing.
    """

    def __init__(self, first: bool = True) -> None:
        self.received: str | None = None
        self._outside: Any = self._stop if first else signal.SIG_DFL
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._outside) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        _set_handlers(self._before)

    def inside_loop(self) -> None:
        """From here on a signal is recorded in `received`."""
        _set_handlers(dict.fromkeys(self._before, self._record))

    def outside_loop(self) -> None:
        """From here on a signal stops the run at once; so does one that came too late for the loop."""
        _set_handlers(dict.fromkeys(self._before, self._outside))
        if self.received:
            raise RunStopped(stopped_by(self.received))

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise RunStopped(stopped_by(signal.Signals(number).name))


def _set_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stopped_by(name: str) -> str:
    """The message of a run that a signal stopped."""
    return f"stopped by {name}; start it again and it continues"


@contextmanager
def forward_signals(child: Popen[str]) -> Iterator[None]:
    """Terminate a child process when this process receives SIGTERM or SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {s: signal.signal(s, lambda number, frame: child.terminate()) for s in numbers}
    try:
        yield
    finally:
        _set_handlers(before)
