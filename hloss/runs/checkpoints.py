"""Status and progress files, checkpoints and signal handling of a run.

Other processes read the state of a run in `status.json`, because papermill's exit code does not show it.
`progress.json` contains the numbers that a run prints.

A new checkpoint is written to a separate file and then renamed; the previous one is kept. A complete checkpoint
therefore exists at all times. Checkpoints that cannot be read, or belong to other settings, code or data, are skipped
and reported.
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
PROGRESS = "progress.json"
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
WORDS = {"config": "settings", "fingerprint": "code or data", "pretrained_sha256": "pretrained weights"}  # in messages


def write_status(folder: Path, state: str, iteration: int, message: str = "", retry: bool = False) -> None:
    """Write `status.json`; errors of the file system are ignored.

    Args:
        folder: the run's folder.
        state: one of STATES. If the state is "running" and no process has locked the folder, the run was killed.
        iteration: the last complete iteration, counted from 1; 0 before the first.
        message: why the run stopped or failed.
        retry: whether a new start may succeed.
    """
    status = {"state": state, "iteration": iteration, "message": message, "retry": retry}
    with suppress(OSError):  # An error of this write must not hide the error of the run.
        atomic_write(folder / "status.json", lambda part: part.write_text(json.dumps(status) + "\n"))


def read_status(folder: Path) -> dict[str, Any] | None:
    """Content of `status.json` in a run's folder; None if the file does not exist."""
    return _read(Path(folder) / "status.json")


def write_progress(folder: Path, **numbers: Any) -> None:
    """Write `progress.json`, which the index page of a study shows; errors of the file system are ignored.

    Args:
        folder: the run's folder.
        **numbers: iteration (the last complete one), iterations (their total number), loss, images_per_second,
            seconds_left, and validations, a list of (iteration, Recall@1).
    """
    with suppress(OSError):
        atomic_write(folder / PROGRESS, lambda part: part.write_text(json.dumps(numbers) + "\n"))


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Content of `progress.json` in a run's folder; None if the file does not exist."""
    return _read(folder / PROGRESS)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint and keep the previous one.

    Args:
        folder: the run's folder.
        checkpoint: tensors and plain values.

    Raises:
        OSError: the checkpoint cannot be written; the existing checkpoints stay unchanged.
    """
    new = folder / "checkpoint.new.pt"
    atomic_save(new, checkpoint)
    with suppress(FileNotFoundError):
        (folder / CURRENT).replace(folder / PREVIOUS)
    new.replace(folder / CURRENT)


def load_checkpoint(folder: Path, identity: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest usable checkpoint of a run.

    Args:
        folder: the run's folder.
        identity: settings and hashes of the run; a checkpoint with other values under these keys is skipped.
        report: called with a line for each checkpoint that is skipped.

    Returns:
        The checkpoint, with tensors on the CPU; None if no checkpoint is usable.
    """
    files = [folder / name for name in (CURRENT, PREVIOUS) if (folder / name).exists()]
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types on a truncated or foreign file.
            report(f"{file.name} is skipped: it cannot be read ({type(error).__name__})")
            continue
        if not isinstance(checkpoint, dict):
            report(f"{file.name} is skipped: it is not a checkpoint of a run")
        elif other := [key for key, value in identity.items() if checkpoint.get(key) != value]:
            report(f"{file.name} is skipped: it was saved with other {', '.join(WORDS.get(key, key) for key in other)}")
        else:
            return checkpoint
    if files:
        report("no checkpoint is usable: training starts from the beginning")
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, complete or not, and the saved state of a failed attempt."""
    for file in [*folder.glob("checkpoint*.pt"), *folder.glob(".checkpoint*.part"), *folder.glob("failed.pt")]:
        file.unlink()


def clean_up_complete_run(folder: Path) -> None:
    """Remove checkpoints of a complete run and set its status to complete.

    Checkpoints remain if the process was killed after it wrote the result and before it removed them.
    """
    status = read_status(folder) or {"state": "running", "iteration": 0}
    if status["state"] != "complete":
        remove_checkpoints(folder)
        write_status(folder, "complete", status["iteration"])


class StopSignals:
    """Context manager that handles SIGTERM and SIGINT during a run.

    Inside the training loop the name of a signal is stored in `received`, so that the loop can finish its iteration and
    save. Outside the loop the first process raises RunStopped at once, and the other processes end. Only the main
    thread of a program can receive signals; in other threads this context manager does nothing.

    Args:
        first: whether this is the first process (rank 0) of the run.
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
        """From now on, store the name of a signal in `received`."""
        _set_handlers(dict.fromkeys(self._before, self._record))

    def outside_loop(self) -> None:
        """From now on, stop the run at once on a signal.

        Raises:
            RunStopped: a signal arrived after the loop last checked `received`.
        """
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
    """Message of a run that the signal `name` stopped."""
    return f"stopped by {name}; start the run again to continue it"


@contextmanager
def forward_signals(child: Popen[str]) -> Iterator[None]:
    """Terminate a child process if this process receives SIGTERM or SIGINT within a `with` block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {s: signal.signal(s, lambda number, frame: child.terminate()) for s in numbers}
    try:
        yield
    finally:
        _set_handlers(before)
