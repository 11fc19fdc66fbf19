"""All pairs of a batch in dense form, (n, m): their masks, similarities and distances, with gradients.

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


def squared_between(y: Tensor, z: Tensor) -> Tensor:
    """Return |y_i - z_j|^2 from the products of all rows."""
    squares = y.square().sum(1, keepdim=True) + z.square().sum(1)
    return torch.sub(squares, y @ z.T, alpha=2).clamp(min=0)


def root(squared: Tensor) -> Tensor:
    """Return distances from their squares. The gradient at 0, where none exists, is 0."""
    zero = squared <= 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


class DensePairs:
    """The positive and negative pairs of a batch as masks (n, m); the diagonal of one batch is neither."""

    _normalized: Callable[[Tensor], Tensor] = staticmethod(F.normalize)
    _squared_within = staticmethod(squared_within)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
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

    def counts(self) -> list[Tensor]:
        """Return the number of positive pairs and, where it does not follow from it, of negative ones: scalars."""
        masks = [self.positive, self.negative] if self.batch.is_matrix else [self.positive]
        return [mask.sum(dtype=torch.float64) for mask in masks]

    def set_counts(self, n_positive: float, n_negative: float | None = None) -> None:
        """Set the numbers of positive and negative entries from those of `counts`."""
        n, m = self.batch.shape
        self.n_positive = int(n_positive)
        others = n * m - self.n_positive - self.batch.within * n
        self.n_negative = others if n_negative is None else int(n_negative)

    def similarities(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return <y_i, y_j> of the L2-normalised embeddings y, in their dtype also under autocast."""
        rows, columns = self._sides(dtype, normalize=True)
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ (rows if columns is None else columns).T

    def squared_distances(self, normalize: bool) -> Tensor:
        """Return |y_i - y_j|^2 in float64; in float32 the differences of products would lose their digits."""
        rows, columns = self._sides(torch.float64, normalize)
        return self._squared_within(rows) if columns is None else squared_between(rows, columns)

    def each(self, mask: Tensor) -> Tensor:
        """Return a mask with one entry for each pair: those i < j within one batch."""
        return mask.triu(1) if self.batch.within else mask

    def listed(self, matrix: Tensor, mask: Tensor, n: int) -> Tensor:
        """Return the n entries of a matrix where the mask is true, row by row."""
        return matrix[mask]

    def lifted_hinges(self, by_row: Tensor, by_column: Tensor, distance: Tensor) -> Tensor:
        """Return max(0, log(exp by_row_i + exp by_column_j) + D_ij) of the positive pairs, and 0 for any others."""
        i, j = self.each(self.positive).nonzero(as_tuple=True)
        return F.relu(torch.logaddexp(by_row[i], by_column[j]) + distance[i, j])

    def _sides(self, dtype: torch.dtype | None, normalize: bool) -> tuple[Tensor, Tensor | None]:
        given = (self.batch.embeddings, self.batch.references)
        sides = [full_precision(x).to(dtype) for x in given if x is not None]
        sides = [self._normalized(x) for x in sides] if normalize else sides
        return sides[0], None if self.batch.within else sides[1]
