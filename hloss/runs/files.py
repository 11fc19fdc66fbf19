"""Files of a run: paths, atomic writes, locks."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from hloss.runs.errors import LockedError

NETWORK_FILE = "network.pt"  # the trained network's state dict, in the run's folder


def project_path(folder: str) -> Path:
    """A relative folder from the project's root, also when the kernel runs in `notebooks/`."""
    here = Path.cwd()
    return Path(folder) if Path(folder).is_absolute() else (here.parent if here.name == "notebooks" else here) / folder


def file_sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a run folder; None while there is none."""
    file = Path(folder) / "result.json"
    return json.loads(file.read_text()) if file.exists() else None


def atomic_write(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: `write` gets a temporary path, which is renamed when it is complete."""
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        with open(part, "rb") as opened:
            os.fsync(opened.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)  # on a full disk half a file is in the way of the next attempt
        raise


def atomic_save(file: Path, state: dict[str, Any]) -> None:
    """Save a state completely or not at all. OSError if it cannot be written."""
    try:
        atomic_write(file, lambda part: torch.save(state, part))
    except RuntimeError as error:  # so torch.save reports a full disk
        raise OSError(f"{file} could not be written ({error})") from error


@contextmanager
def file_lock(
    path: Path, activity: str, patience_seconds: float = 0.0, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on a file or a directory; the system releases it when the process ends.

    Args:
        path: a directory, or a file, which is created if it does not exist and stays.
        activity: what the holder of the lock does ("is working in FOLDER"), for the messages to other processes.
        patience_seconds: how long to wait for a lock that another process holds.
        on_wait: called once with a message if there is anything to wait for.

    Raises:
        LockedError: another process still holds the lock.
    """
    flags = os.O_RDONLY if Path(path).is_dir() else os.O_RDWR | os.O_CREAT
    lock = os.open(path, flags, 0o666)
    try:
        _acquire(lock, f"another process {activity}", patience_seconds, on_wait)
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, message: str, patience_seconds: float, on_wait: Callable[[str], None] | None) -> None:
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockedError(f"{message}; wait for it or end it") from None
        if on_wait:
            on_wait(f"{message}; waiting for at most {patience_seconds:.0f} s")
            on_wait = None
        time.sleep(0.2)


def run_lock(folder: Path, patience_seconds: float = 10.0) -> AbstractContextManager[None]:
    """Hold the lock on a run's folder. LockedError if another process holds it for longer than `patience_seconds`."""
    return file_lock(folder / ".lock", f"is working in {folder}", patience_seconds)
