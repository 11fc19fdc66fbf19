"""Deferred checks of a loss on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hloss.numerics import whole_number


class DeferredChecks:
    """Checks of loss inputs that the device has computed, and whose results the host has not read yet."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.pending: list[tuple[Tensor, Callable[[list[int]], None]]] = []

    def add(self, values: Tensor, verify: Callable[..., None], inputs: tuple[Any, ...]) -> None:
        """Add a check. When `every` checks are pending, read all of them.

        Args:
            values: numbers on the device, of the same shape for all checks.
            verify: called as `verify(numbers, *inputs)`; raises if the numbers are bad.
            inputs: further arguments of `verify`; tensors are detached from autograd's graph.
        """
        kept = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        self.pending.append((values, lambda numbers: verify(numbers, *kept)))
        if len(self.pending) >= self.every:
            self.raise_if_bad()

    def raise_if_bad(self) -> None:
        """Read all pending checks at once and raise the error of the earliest that failed."""
        pending, self.pending = self.pending, []
        if pending:
            read = torch.stack([values for values, _ in pending]).tolist()
            for numbers, (_, verify) in zip(read, pending, strict=True):
                verify(numbers)


_deferred: ContextVar[DeferredChecks | None] = ContextVar("deferred", default=None)


@contextmanager
def deferred_checks(every: int = 10) -> Iterator[DeferredChecks]:
    """Defer the checks of the fused CUDA loss, so that the host does not wait for the GPU in every iteration.

    A wrong batch raises its error later: after at most `every` losses, at a call of `raise_if_bad()`, or at the end of
    the context. Until then, the loss and gradient of that batch are meaningless. Pending checks keep the embeddings of
    their batches in memory. Other losses (on a CPU, in float64, with the Beta density) are checked at once.

    Args:
        every: number of losses after which their checks are read, at least 1.

    Yields:
        The pending checks, with `raise_if_bad()`.

    Example::

        with deferred_checks() as checks:
            for images, labels in batches:
                loss(network(images), labels).backward()
                optimizer.step()
            checks.raise_if_bad()
    """
    checks = DeferredChecks(whole_number("every", every, 1))
    token = _deferred.set(checks)
    try:
        yield checks
        checks.raise_if_bad()
    finally:
        _deferred.reset(token)


def is_deferred() -> bool:
    """Return whether the call is inside a `deferred_checks` context."""
    return _deferred.get() is not None


def verify_or_defer(values: Tensor, verify: Callable[..., None], *inputs: Any) -> None:
    """Call `verify(numbers, *inputs)` with the numbers in `values`. Within `deferred_checks`, defer the call."""
    checks = _deferred.get()
    if checks is None:
        verify(values.tolist(), *inputs)
    else:
        checks.add(values, verify, inputs)
