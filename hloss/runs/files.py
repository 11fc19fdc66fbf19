"""Paths, hashes, results, atomic writes and locks of files."""

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from hloss.runs.errors import DamagedError, LockedError

NETWORK_FILE = "network.pt"  # in the run's folder: the state dict of the trained network


def project_path(folder: str) -> Path:
    """Resolve a path relative to the project's root.

    The root is the working directory, or its parent if the working directory is `notebooks/`, as in a
    Jupyter kernel.

    Args:
        folder: a relative or absolute path.

    Returns:
        An absolute path; absolute paths are returned unchanged.
    """
    here = Path.cwd()
    return Path(folder) if Path(folder).is_absolute() else (here.parent if here.name == "notebooks" else here) / folder


def file_sha256(file: Path) -> str:
    """SHA-256 hash of a file's bytes, as 64 hex digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_result(folder: Path) -> dict[str, Any] | None:
    """Content of `result.json` in a run's folder; None if the file does not exist.

    Raises:
        DamagedError: the file is not the result of a run.
    """
    file = Path(folder) / "result.json"
    if not file.exists():
        return None
    with reading_of_run(file):
        result = json.loads(file.read_text())
        if not isinstance(result, dict) or not {"config", "run_id"} <= set(result):
            raise ValueError("it has no settings or no run id")
    return result


@contextmanager
def reading_of_run(file: Path) -> Iterator[None]:
    """Raise DamagedError, with the file and the remedy, if reading a file of a complete run fails in a `with` block.

    Args:
        file: a file in the run's folder.

    Raises:
        DamagedError: the file is missing or damaged.
    """
    try:
        yield
    except (OSError, EOFError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        if isinstance(error, FileNotFoundError):
            fault = "missing"
        else:
            fault = f"damaged ({' '.join(str(error).split()) or type(error).__name__})"
        raise DamagedError(
            f"{file} is {fault}; delete the folder {file.parent} and start the run, or its study, again"
        ) from None


def non_finite(value: Any, name: str = "") -> str:
    """Find a number that is NaN or infinite in nested mappings and lists.

    Args:
        value: a mapping with text keys, a list, a number or any other value.
        name: name of the value.

    Returns:
        The first such number as "NAME=VALUE", such as "metrics.map=nan"; "" if there is none.
    """
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{name}={value}"
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return next(filter(None, (non_finite(item, f"{name}.{key}".lstrip(".")) for key, item in items)), "")
    return ""


def atomic_write(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    Args:
        file: the file to write or replace.
        write: function that writes a file; called with a temporary path in the same folder, which is then renamed to
            `file`. If the function raises an error, the temporary file is removed and `file` stays unchanged.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        with open(part, "rb") as opened:
            os.fsync(opened.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)  # Free the space: on a full disk an incomplete file blocks the next attempt.
        raise


def atomic_save(file: Path, state: dict[str, Any]) -> None:
    """Save a state with `torch.save`, completely or not at all.

    Args:
        file: the file to write or replace.
        state: tensors and plain values.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; `file` stays unchanged.
    """
    try:
        atomic_write(file, lambda part: torch.save(state, part))
    except RuntimeError as error:  # torch.save raises it on a full disk.
        raise OSError(
            f"{file} cannot be written: {error}; check the free disk space and the permissions of the folder"
        ) from error


@contextmanager
def file_lock(
    path: Path, activity: str, patience_seconds: float = 0.0, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Lock a file or a directory exclusively within a `with` block.

    The operating system releases the lock when the process ends, however it ends.

    Args:
        path: a directory, or a file. A missing file is created and is not removed afterwards.
        activity: what the process does while it has the lock, such as "is working in FOLDER"; part of the messages of
            other processes.
        patience_seconds: time to wait for a lock that another process has, in seconds.
        on_wait: called once with a message if this process has to wait.

    Raises:
        LockedError: another process still has the lock after `patience_seconds`.
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
                raise LockedError(f"{message}; wait until it ends, or end it") from None
        if on_wait:
            on_wait(f"{message}; waiting for at most {patience_seconds:.0f} s")
            on_wait = None
        time.sleep(0.2)


def run_lock(folder: Path, patience_seconds: float = 10.0) -> AbstractContextManager[None]:
    """Lock a run's folder within a `with` block.

    Args:
        folder: the run's folder.
        patience_seconds: time to wait for a lock that another process has, in seconds.

    Raises:
        LockedError: another process still has the lock after `patience_seconds`.
    """
    return file_lock(folder / ".lock", f"is working in {folder}", patience_seconds)
