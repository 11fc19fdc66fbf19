"""Temporary changes of torch's global settings, and the peak memory of this process."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def gpu_arithmetic(device: torch.device, tf32: str) -> Iterator[None]:
    """Set how a GPU computes a float32 network within a `with` block; nothing changes on a CPU.

    TensorFloat-32 rounds the factors of float32 products to 10 bits of fraction and is several times faster. Losses and
    retrieval never use it. cuDNN is limited to algorithms that return the same bits every time.

    Args:
        device: the device of the run.
        tf32: operations that use TensorFloat-32: "none", "convolutions" (torch's default) or "all" (also matrix
            products).
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    convolutions, products = _float32_settings()
    before = cudnn.deterministic, getattr(*convolutions), getattr(*products)
    cudnn.deterministic = True  # A resumed run must end in the same weights.
    setattr(*convolutions, _tf32_value(tf32 != "none", before[1]))
    setattr(*products, _tf32_value(tf32 == "all", before[2]))
    try:
        yield
    finally:
        cudnn.deterministic = before[0]
        setattr(*convolutions, before[1])
        setattr(*products, before[2])


def _float32_settings() -> tuple[tuple[Any, str], tuple[Any, str]]:
    """Object and attribute of torch's settings for convolutions and for matrix products."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):
        return (cudnn.conv, "fp32_precision"), (products, "fp32_precision")  # type: ignore[attr-defined]
    return (cudnn, "allow_tf32"), (products, "allow_tf32")  # torch before 2.9


def _tf32_value(allowed: bool, like: bool | str) -> bool | str:
    """The value of a torch setting that allows or forbids TensorFloat-32, of the type of its value `like`."""
    return allowed if isinstance(like, bool) else ("tf32" if allowed else "ieee")


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: GPU memory that torch allocated if `device` is a GPU, else memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the peak of the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024  # bytes on macOS, KiB elsewhere
