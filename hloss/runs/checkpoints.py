"""What keeps a run alive: the hold on its folder, its status, its checkpoints, and the signals that ask it to stop.

A run's folder belongs to one process at a time. `status.json` says how it stands, for whoever started it: papermill's
exit code does not. A checkpoint is written beside the last two and renamed, so that at every moment a whole one is
there; what cannot be read, or was made by other settings, code or data, is passed over, and said so.
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
from hloss.runs.files import atomic_write

STATES = ("running", "stopped", "failed", "complete")
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def write_status(folder: Path, state: str, iteration: int, message: str = "", retry: bool = False) -> None:
    """Replace `status.json`. `retry`: started again, the run continues. `running` of a folder that nobody holds means
    that its process was killed."""
    status = {"state": state, "iteration": iteration, "message": message, "retry": retry}
    with suppress(OSError):  # a full disk must not hide what is to be said
        atomic_write(folder / "status.json", lambda part: part.write_text(json.dumps(status) + "\n"))


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status of a run folder; None while there is none."""
    file = Path(folder) / "status.json"
    return json.loads(file.read_text()) if file.exists() else None


def atomic_save(file: Path, state: dict[str, Any]) -> None:
    """Write a state whole or not at all. OSError if it cannot be written."""
    try:
        atomic_write(file, lambda part: torch.save(state, part))
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{file} could not be written ({error})") from error


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint and keep the one before. OSError if it cannot be written: then nothing has changed."""
    new = folder / "checkpoint.new.pt"
    atomic_save(new, checkpoint)
    with suppress(FileNotFoundError):
        (folder / CURRENT).replace(folder / PREVIOUS)
    new.replace(folder / CURRENT)


def load_checkpoint(folder: Path, identity: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint of this run, on the CPU; None if there is none. Tells `report` what it passes over.

    identity: what the checkpoint must hold under the same keys: the settings, code and data it was made by.
    """
    files = [folder / name for name in (CURRENT, PREVIOUS) if (folder / name).exists()]
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a truncated or foreign file makes torch say
            report(f"{file.name} cannot be read and is passed over ({type(error).__name__})")
            continue
        if not isinstance(checkpoint, dict):
            report(f"{file.name} is no checkpoint of a run and is passed over")
        elif other := [key for key, value in identity.items() if checkpoint.get(key) != value]:
            report(f"{file.name} is of another run ({', '.join(other)} differ) and is passed over")
        else:
            return checkpoint
    if files:
        report("no checkpoint can be used: training begins anew")
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, whole or half-written, and the state of an attempt that failed."""
    for file in [*folder.glob("checkpoint*.pt"), *folder.glob(".checkpoint*.part"), *folder.glob("failed.pt")]:
        file.unlink()


class StopSignals:
    """SIGTERM and SIGINT while a run is at work: noted, so that the loop can finish its iteration and save.

    Outside the loop there is nothing to finish: the first process of a run raises RunStopped at once, others end where
    they are. Used as a context. Only a program's main thread can take signals; elsewhere this does nothing.
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
        """From here on a signal waits for the loop to look at `received`."""
        _set_handlers(dict.fromkeys(self._before, self._note))

    def outside_loop(self) -> None:
        """From here on stop at once; and now, if a signal came too late for the loop."""
        _set_handlers(dict.fromkeys(self._before, self._outside))
        if self.received:
            raise RunStopped(stopped_by(self.received))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise RunStopped(stopped_by(signal.Signals(number).name))


def _set_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stopped_by(name: str) -> str:
    """What to say of a run that a signal stopped."""
    return f"stopped by {name}; start it again and it continues"


@contextmanager
def forward_signals(child: Popen[str]) -> Iterator[None]:
    """While another process does the work, it gets the SIGTERM that this one is sent, by SIGTERM or SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {s: signal.signal(s, lambda number, frame: child.terminate()) for s in numbers}
    try:
        yield
    finally:
        _set_handlers(before)
