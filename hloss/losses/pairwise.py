"""Masks, similarities and distances of all pairs of a batch, as matrices (n, m) that support autograd.

Within one batch m = n and both orders of each pair are present. `hloss.losses.cuda_forms` has the forms for a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.losses.batch import Batch
from hloss.numerics import full_precision


def squared_within(y: Tensor) -> Tensor:
    """Return |y_i - y_j|^2 from the products of all rows."""
    products = y @ y.T
    squares = products.diagonal()
    return torch.sub(squares[:, None] + squares, products, alpha=2).clamp(min=0)


def root(squared: Tensor) -> Tensor:
    """Return distances from their squares. The square root has no derivative at 0; the gradient there is set to 0."""
    zero = squared <= 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


class DensePairs:
    """Masks (n, m) of the positive and negative pairs of a batch. Within one batch, the diagonal is in neither mask."""

    n_positive: int  # n_positive and n_negative are `counts`, which are read with the checks of the batch.
    n_negative: int
    _normalized: Callable[[Tensor], Tensor] = staticmethod(F.normalize)
    _squared_within = staticmethod(squared_within)

    def __init__(self, batch: Batch) -> None:
        # Within one batch, a mask contains both orders of each pair.
        self.batch, self.orders = batch, 2 if batch.within else 1
        if batch.is_matrix:
            self.positive, self.negative = batch.labels > 0, batch.labels < 0
        else:
            columns = batch.labels if batch.reference_labels is None else batch.reference_labels
            self.positive = batch.labels[:, None] == columns
            self.negative = ~self.positive
        if batch.within:
            self.positive.fill_diagonal_(False)
            if batch.is_matrix:
                self.negative.fill_diagonal_(False)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of positive and of negative entries, float64 scalars."""
        n_positive, (n, m) = self.positive.sum(dtype=torch.float64), self.batch.shape
        if self.batch.is_matrix:
            return n_positive, self.negative.sum(dtype=torch.float64)
        return n_positive, n * m - self.batch.within * n - n_positive

    def similarities(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return <y_i, y_j> of the L2-normalised embeddings y, in `dtype` (None: full precision), without autocast."""
        rows, columns = self._sides(dtype, normalize=True)
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ (rows if columns is None else columns).T

    def squared_distances(self, normalize: bool) -> Tensor:
        """Return |y_i - y_j|^2 in float64, because differences of products lose most digits in float32."""
        rows, columns = self._sides(torch.float64, normalize)
        if columns is None:
            return self._squared_within(rows)
        squares = rows.square().sum(1, keepdim=True) + columns.square().sum(1)
        return torch.sub(squares, rows @ columns.T, alpha=2).clamp(min=0)

    def contrastive_sum(self, squared: Tensor, margin: float) -> Tensor:
        """Return the sum of D^2 over positive and max(0, margin - D)^2 over negative pairs, from D^2 (n, m)."""
        hinge = F.relu(margin - root(squared)).square()
        return (squared * self.positive + hinge * self.negative).sum()

    def each(self, mask: Tensor) -> Tensor:
        """Return a mask that contains each pair once: within one batch, only the pairs i < j."""
        return mask.triu(1) if self.batch.within else mask

    def listed(self, matrix: Tensor, mask: Tensor, n: int) -> Tensor:
        """Return the n entries of a matrix where the mask is true, row by row."""
        return matrix[mask]

    def lifted_hinges(self, by_row: Tensor, by_column: Tensor, distance: Tensor) -> Tensor:
        """Return max(0, log(exp by_row_i + exp by_column_j) + D_ij) of the positive pairs, each pair once.

        The result is a vector here, and a matrix with 0 for all other pairs in `CudaPairs`.
        """
        i, j = self.each(self.positive).nonzero(as_tuple=True)
        return F.relu(torch.logaddexp(by_row[i], by_column[j]) + distance[i, j])

    def _sides(self, dtype: torch.dtype | None, normalize: bool) -> tuple[Tensor, Tensor | None]:
        given = (self.batch.embeddings, self.batch.references)
        sides = [full_precision(x).to(dtype) for x in given if x is not None]
        sides = [self._normalized(x) for x in sides] if normalize else sides
        return sides[0], None if self.batch.within else sides[1]
