"""Cross-batch memory (Wang et al., CVPR 2020, https://arxiv.org/abs/1912.06798): pairs with earlier batches."""

from typing import Any

import torch
from torch import Tensor, nn


class MemoryLoss(nn.Module):
    """A loss over the pairs within a batch, and the pairs of the batch with the embeddings of earlier batches.

    Pairs of two earlier embeddings are left out; every other pair counts once. For losses with anchors (triplets,
    lifted structure), the anchors are the embeddings of the batch. Earlier embeddings are stored as constants and get
    no gradient. `state_dict()` contains them, so a resumed run continues with the same memory.

    Args:
        loss: called as `loss(embeddings, matrix of pairs, reference embeddings)`, and without a memory as
            `loss(embeddings, labels)`.
        batches: number of earlier batches kept, at least 1.
        start: number of batches at the start whose loss uses no memory, at least 0. Their embeddings are stored, too.
    """

    def __init__(self, loss: nn.Module, batches: int, start: int) -> None:
        super().__init__()
        self.loss, self.batches, self.start = loss, batches, start
        self.seen = 0  # number of batches so far
        self.embeddings: list[Tensor] = []  # of the earlier batches, the oldest first
        self.labels: list[Tensor] = []

    @property
    def metric(self) -> str:
        """Metric that the loss trains."""
        return getattr(self.loss, "metric", "cosine")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of embeddings (n, d) with labels (n,), and add them to the memory."""
        if self.embeddings and self.seen >= self.start:
            references, column_labels = (  # A loaded memory is on the CPU.
                torch.cat([own, *(earlier.to(own.device) for earlier in kept)])
                for own, kept in ((embeddings, self.embeddings), (labels, self.labels))
            )
            matrix = pairs_of_batch(labels, column_labels, getattr(self.loss, "has_anchors", False))
            loss = self.loss(embeddings, matrix, references)
        else:
            loss = self.loss(embeddings, labels)
        self.seen += 1
        self.embeddings = [*self.embeddings, embeddings.detach()][-self.batches :]
        self.labels = [*self.labels, labels][-self.batches :]
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        """Return the memory, for `state_dict()`."""
        return {"seen": self.seen, "embeddings": self.embeddings, "labels": self.labels}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the memory."""
        self.seen, self.embeddings, self.labels = state["seen"], state["embeddings"], state["labels"]


def pairs_of_batch(labels: Tensor, column_labels: Tensor, both_orders: bool) -> Tensor:
    """Return the pairs of a batch (rows) with the batch and earlier embeddings (columns), as an int8 matrix.

    Args:
        labels: integer labels of the batch (n,).
        column_labels: integer labels of the columns (m,); the first n are `labels`.
        both_orders: whether to keep both (i, j) and (j, i) of the batch; if False, only (i, j) with i < j is kept.

    Returns:
        (n, m): +1 for equal labels, -1 for different labels, 0 for pairs that are left out, such as (i, i).
    """
    matrix = torch.where(labels[:, None] == column_labels, 1, -1).to(torch.int8)
    return matrix.fill_diagonal_(0) if both_orders else matrix.triu(1)


def takes_references(loss: nn.Module) -> bool:
    """Whether a loss accepts a matrix of pairs with reference embeddings."""
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) // 2
    try:
        loss(embeddings, pairs_of_batch(labels, labels, False), embeddings)
    except (TypeError, ValueError):
        return False
    return True
