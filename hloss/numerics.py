"""Full-precision matrix products, and checks of arguments, for losses, samplers and retrieval.

A check of a setting returns its value, or raises a ValueError with the name of the setting and the value.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LONGEST = (1 + 1e-4) ** 0.5  # Largest norm of an embedding that is not normalised: 1 plus rounding errors.
USUAL = 2.0**-30, 2.0**30  # Between these norms, squares of numbers that matter neither overflow nor lose digits.


class NotFiniteError(ValueError):
    """Embeddings or a loss contain NaN or infinity, often because the learning rate is too high."""


def full_precision(embeddings: Tensor) -> Tensor:
    """Convert half precision to float32; return float32 and float64 unchanged."""
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products on `device` in their full dtype within this context: no autocast, TF32 or bfloat16."""
    matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends: list[Any] = [matmul for matmul in matmuls if hasattr(matmul, "fp32_precision")]
    with ExitStack() as at_exit, torch.autocast(device.type, enabled=False):
        for backend in backends:
            at_exit.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        if not backends:  # torch before 2.9
            at_exit.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """Check that `value` is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}: got {value!r}")
    return value


def whole_number(name: str, value: Any, least: int) -> int:
    """Check that `value` is an integer, of any library, of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}: got {value!r}")
    return int(value)


def number(name: str, value: Any, least: float = -math.inf, above: float = -math.inf) -> float:
    """Check that `value` is a finite number of at least `least` and above `above`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and least <= value > above):
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{bound}: got {value!r}")
    return float(value)


def switch(name: str, value: bool) -> bool:
    """Check that `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False: got {value!r}")
    return value


def check_embeddings(name: str, embeddings: Tensor) -> None:
    """Raise ValueError unless embeddings are a floating-point tensor of shape (n, d)."""
    if not isinstance(embeddings, Tensor):
        raise ValueError(f"{name} must be a tensor: got {type(embeddings).__name__}; convert it by torch.as_tensor")
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating-point (n, d): got {embeddings.dtype} {tuple(embeddings.shape)}")


def integers(name: str, values: Any) -> Tensor:
    """Return integers as a tensor, unsigned ones as int64: they lack operators, and -1 is 255 to uint8."""
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be integers: got {type(values).__name__} ({error})") from None
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers: got {values.dtype}; convert them by .long()")
    return values if values.dtype.is_signed else values.long()


def checked_labels(name: str, labels: Any, n: int) -> Tensor:
    """Return labels as integers of shape (n,); raise ValueError if they are none."""
    labels = integers(name, labels)
    if labels.shape != (n,):
        raise ValueError(f"{name} must be integers of shape ({n},): got {labels.dtype} {tuple(labels.shape)}")
    return labels


def row_norms(embeddings: Tensor) -> Tensor:
    """Return the norms (n, 1) of embeddings (n, d), at least in float32, without a gradient."""
    return torch.linalg.vector_norm(full_precision(embeddings.detach()), dim=1, keepdim=True)


Prepare = Callable[[str, Tensor, float, float], Tensor]  # Name, embeddings, smallest and largest norm.


def to_normalize(name: str, embeddings: Tensor, shortest: float, longest: float) -> Tensor:
    """Return embeddings (n, d) that can be normalised: rows beyond `USUAL` are divided by their largest number.

    Raise ValueError with the rows that are NaN, infinite or zero, or whose norm is not a finite number of their dtype.
    """
    if USUAL[0] <= shortest and longest <= USUAL[1]:
        return embeddings
    refuse_not_finite(name, ~embeddings.isfinite().all(1))
    embeddings = full_precision(embeddings)
    largest = embeddings.detach().abs().amax(1, keepdim=True)
    refuse_rows(name, largest[:, 0] == 0, "are zero and have no direction")
    norms = row_norms(embeddings / largest) * largest
    refuse_rows(name, norms[:, 0].isinf(), f"have norms above {torch.finfo(norms.dtype).max:.2g}")
    return embeddings / largest.where((norms < USUAL[0]) | (norms > USUAL[1]), 1)


def to_use_raw(name: str, embeddings: Tensor, shortest: float, longest: float) -> Tensor:
    """Return embeddings whose squared distances have a finite sum; raise ValueError with the rows if they have none."""
    most = torch.finfo(full_precision(embeddings[:0]).dtype).max ** 0.5 * 2.0**-20
    return _no_longer(name, embeddings, longest, most, f"have norms above {most:.2g}: squared distances can overflow")


def to_use_as_units(name: str, embeddings: Tensor, shortest: float, longest: float) -> Tensor:
    """Return embeddings whose similarities lie in [-1, 1]; raise ValueError with the rows if they do not."""
    remedy = "similarities leave [-1, 1]; normalise them or set normalize=True"
    return _no_longer(name, embeddings, longest, LONGEST, f"are longer than 1 (up to {longest:.6g}): {remedy}")


def _no_longer(name: str, embeddings: Tensor, longest: float, most: float, reason: str) -> Tensor:
    if not longest <= most:
        refuse_not_finite(name, ~embeddings.isfinite().all(1))
        refuse_rows(name, ~(row_norms(embeddings)[:, 0] <= most), reason)
    return embeddings


def refuse_not_finite(name: str, mask: Tensor) -> None:
    """Raise NotFiniteError with the rows where a mask (n,) is true, if there are any."""
    refuse_rows(name, mask, "hold NaN or infinity", NotFiniteError)


def refuse_rows(name: str, mask: Tensor, reason: str, error: type[ValueError] = ValueError) -> None:
    """Raise an error with the first ten rows where a mask (n,) is true, if there are any."""
    rows = mask.nonzero().flatten().tolist()
    if rows:
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        raise error(f"{name} rows {rows[:10]}{more} {reason}")
