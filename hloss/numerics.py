"""What losses and retrieval share: exact matrix products, checks of embeddings, norms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LONGEST = (1 + 1e-4) ** 0.5  # norm of an embedding that is not to be normalised


class NotFiniteError(ValueError):
    """Embeddings or a loss that are NaN or infinite: mostly a learning rate too high."""


def check_finite(embeddings: Tensor) -> None:
    """NotFiniteError, naming the rows, if embeddings (n, d) hold NaN or infinity."""
    if not embeddings.isfinite().all():
        rows = (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()
        raise NotFiniteError(f"embeddings must be finite, rows {rows[:10]} ({len(rows)} in all) hold NaN or infinity")


def full_precision(embeddings: Tensor) -> Tensor:
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in their own precision: no autocast, no TF32 or bf16 inside, restored after."""
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


def checked_norms(name: str, embeddings: Tensor, normalize: bool) -> Tensor | None:
    """The norms (n, 1) to divide by, None if the embeddings are to be taken as they are."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating of shape (n, d), got {embeddings.dtype} {tuple(embeddings.shape)}")
    norms = torch.linalg.vector_norm(full_precision(embeddings.detach()), dim=1, keepdim=True)
    if len(norms):
        shortest, longest = torch.stack(norms.aminmax()).tolist()  # NaN spreads
        if not (0 < shortest <= longest < math.inf if normalize else longest <= LONGEST):
            _refuse_rows(name, norms[:, 0])
    return norms if normalize else None


def _refuse_rows(name: str, norms: Tensor) -> None:
    endless, zero = rows_where(~norms.isfinite()), rows_where(norms == 0)
    if endless:
        raise NotFiniteError(f"{name} rows {endless} hold NaN or infinity")
    if zero:
        raise ValueError(f"{name} rows {zero} are zero and have no direction")
    raise ValueError(
        f"{name} rows {rows_where(norms > LONGEST)} are longer than 1 (up to {norms.max().item():.6g}): similarities "
        "leave [-1, 1]; normalise them or set normalize=True"
    )


def rows_where(mask: Tensor) -> list[int]:
    """The first ten rows of a mask."""
    return mask.nonzero().flatten()[:10].tolist()
