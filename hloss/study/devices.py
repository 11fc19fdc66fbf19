"""The GPUs of this machine, one lock file per device: a run holds its own for as long as it lasts."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from hloss.runs.errors import LockedError
from hloss.runs.files import file_lock

CPU_NAMES = ("x86_64", "AMD64", "aarch64", "arm64")  # devices of results that were not made on a GPU


def visible_devices() -> list[str]:
    """Names of the GPUs that a study may use: those of CUDA_VISIBLE_DEVICES, all of the machine if it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]


@contextmanager
def own_devices(count: int) -> Iterator[list[str]]:
    """Hold `count` GPUs (none where the machine has none), waiting for them; the kernel shall see no others.

    The locks are the user's, for all clones on this machine, and end with the process, however it ends.
    """
    devices = visible_devices()
    count = min(count, len(devices))
    with contextlib.ExitStack() as held:
        while len(mine := _lock_free(devices, count, held)) < count:
            held.close()  # all or nothing: two runs that wait for each other's second device would wait for ever
            time.sleep(1)
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        try:
            yield mine
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def _lock_free(devices: list[str], count: int, held: contextlib.ExitStack) -> list[str]:
    """Lock up to `count` free devices; their locks end with `held`."""
    mine: list[str] = []
    for device in devices:
        if len(mine) == count:
            break
        file = Path(tempfile.gettempdir()) / f"hloss-{os.getuid()}-gpu-{device}.lock"
        with suppress(LockedError):
            held.enter_context(file_lock(file, f"is using GPU {device}"))
            mine.append(device)
    return mine
