"""Losses that the host reads from a GPU every few iterations, so that no iteration waits for the GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# numbers on the device, and a function that raises an error for invalid ones
Check = tuple[Tensor, Callable[[list[int]], None]]


@dataclass(frozen=True)
class UnreadLoss:
    """The loss of one iteration.

    Attributes:
        iteration: the number of the iteration, from 1.
        batch: indices of the images of the batch, as in `Batches.current`.
        loss: a scalar on the device.
        checks: the postponed checks of the embeddings.
    """

    iteration: int
    batch: list[int]
    loss: Tensor
    checks: list[Check]


class UnreadLosses:
    """The losses that have not been read yet.

    Args:
        every: largest number of unread losses, at least 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._unread: list[UnreadLoss] = []

    def add(self, loss: UnreadLoss) -> None:
        """Add the loss of the next iteration.

        Args:
            loss: the loss.
        """
        self._unread.append(loss)

    @property
    def is_full(self) -> bool:
        """Whether there are `every` unread losses, so that they must be read now."""
        return len(self._unread) >= self.every

    def read(self) -> Iterator[tuple[UnreadLoss, float, list[list[int]]]]:
        """Read all unread losses, in the order of their iterations.

        Yields:
            The loss, its value, and the numbers of each of its checks.
        """
        unread, self._unread = self._unread, []
        values = _read([loss.loss for loss in unread])
        numbers = iter(_read([check for loss in unread for check, _ in loss.checks]))
        for loss, value in zip(unread, values, strict=True):
            yield loss, value, [next(numbers) for _ in loss.checks]


def _read(tensors: list[Tensor]) -> list:
    """Copy tensors of one shape to the host at once."""
    return torch.stack(tensors).tolist() if tensors else []
