"""Deferred checks of a loss on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hloss.numerics import whole_number


class DeferredChecks:
    """Checks that the device computes and the host has not read yet."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.pending: list[tuple[Tensor, Callable[[list[int]], None]]] = []

    def add(self, values: Tensor, verify: Callable[..., None], inputs: tuple[Any, ...]) -> None:
        """Add values for `verify`; read all pending checks after every `every` additions.

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
    """Defer the checks of the fused CUDA loss, so that no iteration waits for the GPU.

    The error of a wrong batch is raised after at most `every` losses, by `raise_if_bad()`, or at the end of the
    context. Until then its loss and gradient are meaningless. Pending checks keep the embeddings of their batches in
    memory. Losses on other paths (CPU, float64, the Beta density) are checked at once.

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
    """Whether checks are deferred here."""
    return _deferred.get() is not None


def verify_or_defer(values: Tensor, verify: Callable[..., None], *inputs: Any) -> None:
    """Call `verify` with the numbers in `values` and the inputs: now, or later within `deferred_checks`."""
    checks = _deferred.get()
    if checks is None:
        verify(values.tolist(), *inputs)
    else:
        checks.add(values, verify, inputs)
