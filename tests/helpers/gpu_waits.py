"""Count synchronisations of the host with the GPU."""

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def counted_waits() -> Iterator[list[str]]:
    """After the block, the list has one message per synchronisation of the host with the GPU."""
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # torch warns that this mode is a prototype
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]
