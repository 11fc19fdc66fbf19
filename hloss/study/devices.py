"""GPUs of this machine, and locks that give each GPU to one run at a time."""

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
    """Names of the GPUs that a study may use: those in CUDA_VISIBLE_DEVICES, or all of the machine if it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]


@contextmanager
def own_devices(count: int) -> Iterator[list[str]]:
    """Wait for GPUs, lock them, and set CUDA_VISIBLE_DEVICES to them.

    The lock files belong to the user and are shared by all clones on this machine. A lock ends with its process.

    Args:
        count: number of GPUs; at most as many as the machine has are locked.

    Yields:
        Names of the locked GPUs.
    """
    devices = visible_devices()
    count = min(count, len(devices))
    with contextlib.ExitStack() as held:
        while len(mine := _lock_free(devices, count, held)) < count:
            held.close()  # keep none while waiting: two runs could wait for each other's devices forever
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
