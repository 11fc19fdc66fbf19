"""Temporary changes of torch's global settings, and the peak memory of this process."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use `number` CPU threads within a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_dtype(precision: str) -> Iterator[None]:
    """Set torch's default dtype within a `with` block: float64 for precision "64-true", else no change.

    Fabric converts the outputs of a network to the default dtype, and the loss has the dtype of the embeddings.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "64-true" else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: GPU memory that torch allocated if `device` is a GPU, else memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the peak of the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
