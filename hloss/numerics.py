"""Full-precision matrix products, and checks of arguments, for losses, samplers and retrieval."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LONGEST = (1 + 1e-4) ** 0.5  # Largest norm of an embedding that is not normalised: 1 plus rounding errors.


class NotFiniteError(ValueError):
    """Embeddings or a loss contain NaN or infinity, often because the learning rate is too high."""


def full_precision(embeddings: Tensor) -> Tensor:
    """Convert half precision to float32; return float32 and float64 unchanged."""
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products on `device` in their full dtype within this context: no autocast, TF32 or bfloat16."""
    matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends: list[Any] = [b for b in matmuls if hasattr(b, "fp32_precision")]
    if backends:
        before = [b.fp32_precision for b in backends]
        for b in backends:
            b.fp32_precision = "ieee"
    else:  # torch before 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if backends:
            for b, value in zip(backends, before, strict=True):
                b.fp32_precision = value
        else:
            torch.set_float32_matmul_precision(precision)


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value`; raise ValueError unless it is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}: got {value!r}")
    return value


def whole_number(name: str, value: int, least: int) -> int:
    """Return `value`; raise ValueError unless it is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}: got {value!r}")
    return value


def swap_cuda_precision(precision: str) -> str:
    """Set the precision of float32 products on CUDA, "ieee" for exact ones; returns what it was."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        before, matmul.fp32_precision = matmul.fp32_precision, precision
    else:  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else precision)
    return before


def check_embeddings(name: str, embeddings: Tensor) -> None:
    """Raise ValueError unless embeddings are floating-point of shape (n, d)."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating-point (n, d): got {embeddings.dtype} {tuple(embeddings.shape)}")


def check_labels(name: str, labels: Tensor, n: int) -> None:
    """Raise ValueError unless labels are integers of shape (n,)."""
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"{name} must be integers of shape ({n},): got {labels.dtype} {tuple(labels.shape)}")


def check_finite(embeddings: Tensor) -> None:
    """Raise NotFiniteError with the rows of embeddings (n, d) that contain NaN or infinity. Synchronises once."""
    if not math.isfinite(embeddings.detach().sum().item()):  # A sum of finite numbers can overflow, too.
        refuse_not_finite("embeddings", ~embeddings.isfinite().all(1))


def refuse_not_finite(name: str, mask: Tensor) -> None:
    """Raise NotFiniteError with the rows where a mask (n,) is true, if there are any."""
    n, rows = int(mask.sum()), rows_where(mask)
    if n:
        more = f" and {n - len(rows)} more" if n > len(rows) else ""
        raise NotFiniteError(f"{name} rows {rows}{more} hold NaN or infinity")


def checked_norms(name: str, embeddings: Tensor, normalize: bool) -> Tensor | None:
    """Return the norms (n, 1) to divide embeddings by, None without `normalize`. Synchronises once.

    Raises:
        ValueError: a row is NaN, infinite, zero, or, without `normalize`, longer than 1.
    """
    check_embeddings(name, embeddings)
    norms = torch.linalg.vector_norm(full_precision(embeddings.detach()), dim=1, keepdim=True)
    if len(norms):
        shortest, longest = torch.stack(norms.aminmax()).tolist()  # Both are NaN if any norm is.
        if not (0 < shortest <= longest < math.inf if normalize else longest <= LONGEST):
            _refuse_rows(name, norms[:, 0])
    return norms if normalize else None


def _refuse_rows(name: str, norms: Tensor) -> None:
    refuse_not_finite(name, ~norms.isfinite())
    zero = rows_where(norms == 0)
    if zero:
        raise ValueError(f"{name} rows {zero} are zero and have no direction")
    raise ValueError(
        f"{name} rows {rows_where(norms > LONGEST)} are longer than 1 (up to {norms.max().item():.6g}): similarities "
        "leave [-1, 1]; normalise them or set normalize=True"
    )


def rows_where(mask: Tensor) -> list[int]:
    """Return the first ten rows where a mask (n,) is true."""
    return mask.nonzero().flatten()[:10].tolist()
