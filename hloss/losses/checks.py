"""Deferred checks of a loss on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class DeferredChecks:
    """Checks that the device computes and the host has not read yet."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.pending: list[tuple[Tensor, Callable[[list[int]], None]]] = []

    def add(self, values: Tensor, verify: Callable[[list[int]], None]) -> None:
        """Add values for `verify`; read all pending checks after every `every` additions."""
        self.pending.append((values, verify))
        if len(self.pending) >= self.every:
            self.raise_if_bad()

    def raise_if_bad(self) -> None:
        """Read all pending checks at once and raise the error of the earliest that failed."""
        pending, self.pending = self.pending, []
        if pending:
            for values, (_, verify) in zip(torch.stack([v for v, _ in pending]).tolist(), pending, strict=True):
                verify(values)


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

    Example:
        with deferred_checks() as checks:
            for images, labels in batches:
                loss(network(images), labels).backward()
                optimizer.step()
            checks.raise_if_bad()
    """
    checks = DeferredChecks(every)
    token = _deferred.set(checks)
    try:
        yield checks
        checks.raise_if_bad()
    finally:
        _deferred.reset(token)


def verify_or_defer(values: Tensor, verify: Callable[[list[int]], None]) -> None:
    """Call `verify` with the numbers in `values`: now, or later within `deferred_checks`."""
    checks = _deferred.get()
    if checks is None:
        verify(values.tolist())
    else:
        checks.add(values, verify)
