"""Losses that a GPU has computed and the host has not read, so that no iteration waits for the GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Check = tuple[Tensor, Callable[[list[int]], None]]  # numbers on the device, and a function that refuses bad ones


@dataclass(frozen=True)
class UnreadLoss:
    """The loss of one iteration.

    Attributes:
        iteration: its number, from 1.
        batch: its images, as `Batches.current`.
        loss: scalar on the device.
        checks: of the embeddings, which the loss postponed.
    """

    iteration: int
    batch: list[int]
    loss: Tensor
    checks: list[Check]


class UnreadLosses:
    """The losses since the last reading.

    Args:
        every: number of losses after which they must be read, at least 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._unread: list[UnreadLoss] = []

    def add(self, loss: UnreadLoss) -> None:
        self._unread.append(loss)

    @property
    def is_full(self) -> bool:
        """Whether the losses must be read now."""
        return len(self._unread) >= self.every

    def read(self) -> Iterator[tuple[UnreadLoss, float, list[list[int]]]]:
        """Each loss since the last reading, its value and the numbers of its checks; one read from the device each."""
        unread, self._unread = self._unread, []
        values = _read([loss.loss for loss in unread])
        numbers = iter(_read([check for loss in unread for check, _ in loss.checks]))
        for loss, value in zip(unread, values, strict=True):
            yield loss, value, [next(numbers) for _ in loss.checks]


def _read(tensors: list[Tensor]) -> list:
    return torch.stack(tensors).tolist() if tensors else []
