"""Files of a run: paths, atomic writes, the run lock."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hloss.runs.errors import RunError


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
    """Write a file so that it is there whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        with open(part, "rb") as opened:
            os.fsync(opened.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)  # on a full disk half a file is in the way of the next attempt
        raise


@contextmanager
def run_lock(folder: Path, patience_seconds: float = 10.0) -> Iterator[None]:
    """Hold a run folder: a second process waits a little, then is refused. The system lets go when a process ends."""
    with open(folder / ".lock", "w") as lock:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"another process is working in {folder}; wait for it or end it") from None
                time.sleep(0.2)
        yield
