"""GPUs of this machine, and locks that give each GPU to one run, or to a few small runs, at a time."""

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from hloss.runs.errors import LockedError
from hloss.runs.files import file_lock

SLOTS = 16  # locks per GPU: the most runs that share it
CANNOT_ASK = 255  # exit status
CPU_NAMES = ("x86_64", "AMD64", "aarch64", "arm64")  # devices of results that were not made on a GPU


def visible_devices() -> list[str]:
    """Names of the GPUs that a study may use: those in CUDA_VISIBLE_DEVICES, or all of the machine if it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(usable_gpus())]
    return [name.strip() for name in named.split(",") if name.strip()]


def usable_gpus() -> int:
    """Number of GPUs that torch can use.

    On Linux a forked process asks torch, because a process that has asked cannot fork a kernel that uses CUDA.
    """
    if sys.platform != "linux":
        return _count_gpus()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the other process does not need
        child = os.fork()
    if not child:
        found = CANNOT_ASK
        try:
            found = CANNOT_ASK if torch.cuda._is_in_bad_fork() else _count_gpus()
        finally:
            os._exit(found)
    found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return _count_gpus() if found == CANNOT_ASK else found


def _count_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def own_devices(count: int, runs_per_gpu: int = 1) -> Iterator[list[str]]:
    """Wait for GPUs, lock them or a share of them, and set CUDA_VISIBLE_DEVICES to them.

    The lock files belong to the user and are shared by all clones on this machine. A lock ends with its process.

    Args:
        count: number of GPUs; at most as many as the machine has are locked.
        runs_per_gpu: number of runs that may share each of these GPUs; a divisor of SLOTS.

    Yields:
        Names of the locked GPUs.
    """
    devices = visible_devices() if count else []
    count = min(count, len(devices))
    with contextlib.ExitStack() as held:
        while len(mine := _lock_free(devices, count, runs_per_gpu, held)) < count:
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


def _lock_free(devices: list[str], count: int, runs_per_gpu: int, held: contextlib.ExitStack) -> list[str]:
    """Lock shares of up to `count` GPUs, of the emptiest first; the locks end with `held`."""
    mine: list[str] = []
    size = SLOTS // runs_per_gpu
    for first in range(0, SLOTS, size):
        for device in devices:
            if len(mine) < count and device not in mine and _lock_slots(device, range(first, first + size), held):
                mine.append(device)
    return mine


def _lock_slots(device: str, slots: range, held: contextlib.ExitStack) -> bool:
    """Lock all of these slots of a GPU until the end of `held`, or none of them."""
    with contextlib.ExitStack() as locks, suppress(LockedError):
        for slot in slots:
            file = Path(tempfile.gettempdir()) / f"hloss-{os.getuid()}-gpu-{device}-{slot}.lock"
            locks.enter_context(file_lock(file, f"is using GPU {device}"))
        held.push(locks.pop_all())
        return True
    return False
