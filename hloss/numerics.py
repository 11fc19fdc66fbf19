"""Matrix products at full precision and checks of embeddings, for losses and retrieval. Nothing to read before."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LONGEST = (1 + 1e-4) ** 0.5  # the largest norm of an embedding taken as it is, 1 and some rounding


class NotFiniteError(ValueError):
    """Embeddings or a loss are NaN or infinite, mostly because of a learning rate too high."""


def full_precision(embeddings: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 unchanged."""
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """A context in which matrix products keep their dtype's precision: no autocast, no TF32, no bf16."""
    matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends = [b for b in matmuls if b is not None and hasattr(b, "fp32_precision")]
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
    """ValueError unless embeddings are floating of shape (n, d)."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating of shape (n, d), got {embeddings.dtype} {tuple(embeddings.shape)}")


def check_labels(labels: Tensor, n: int) -> None:
    """ValueError unless labels are integers of shape (n,)."""
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({n},), got {labels.dtype} {tuple(labels.shape)}")


def check_finite(embeddings: Tensor) -> None:
    """NotFiniteError, naming the rows, if embeddings (n, d) hold NaN or infinity. One read from the device."""
    if not math.isfinite(embeddings.detach().sum().item()):  # also if finite numbers overflow in the sum
        refuse_not_finite("embeddings", ~embeddings.isfinite().all(1))


def refuse_not_finite(name: str, mask: Tensor) -> None:
    """NotFiniteError that names the rows of a mask (n,), if there are any."""
    n, rows = int(mask.sum()), rows_where(mask)
    if n:
        more = f" and {n - len(rows)} more" if n > len(rows) else ""
        raise NotFiniteError(f"{name} rows {rows}{more} hold NaN or infinity")


def checked_norms(name: str, embeddings: Tensor, normalize: bool) -> Tensor | None:
    """The norms (n, 1) of checked embeddings; None if they are not to be divided by their norms.

    ValueError for NaN, infinite and zero rows; without `normalize`, for rows longer than 1. One read from the device.
    """
    check_embeddings(name, embeddings)
    norms = torch.linalg.vector_norm(full_precision(embeddings.detach()), dim=1, keepdim=True)
    if len(norms):
        shortest, longest = torch.stack(norms.aminmax()).tolist()  # NaN spreads
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
    """The first ten rows where a mask (n,) is true."""
    return mask.nonzero().flatten()[:10].tolist()
