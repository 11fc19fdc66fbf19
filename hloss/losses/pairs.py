"""Blocks of the pairs of a batch, with the group of each pair: positive, negative or ignored."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hloss.losses.batch import Batch
from hloss.numerics import exact_products, refuse_rows, whole_number

NEGATIVE, POSITIVE, IGNORED = 0, 1, 2  # The group of a pair.
ROWS, COLUMNS = 256, 1024  # Largest block of pairs on a CPU: 2^18 pairs fit into its caches.
GPU_ROWS, GPU_COLUMNS = 1024, 4096  # Largest block on a GPU: large enough to occupy it.


class PairBlock(NamedTuple):
    """A block of pairs. `groups` gives the groups of the pairs in a window of columns; all other pairs are negative."""

    rows: slice
    columns: slice
    window: slice  # Relative to the first of the columns.
    groups: Tensor | None  # int8 (rows, window); None if the window is empty.


class Buffers:
    """Memory that the blocks of one pass share, because allocating new memory takes time."""

    def __init__(self) -> None:
        self.taken: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size | tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor that reuses the buffer `name`."""
        n = shape[0] * shape[1]
        if name not in self.taken or len(self.taken[name]) < n:
            self.taken[name] = torch.empty(n, dtype=dtype, device=device)
        return self.taken[name][:n].view(shape)


class LabelPairs:
    """Pairs from class labels. Rows and columns are sorted by label: the positives of a row are adjacent columns."""

    def __init__(self, batch: Batch) -> None:
        rows, self.row_order = batch.labels.sort(stable=True)
        columns, self.column_order = rows, self.row_order
        if batch.reference_labels is not None:
            columns, self.column_order = batch.reference_labels.sort(stable=True)
        self.n_columns, self.within = len(columns), batch.within
        # The positives of row i are the columns from first[i] to last[i] - 1. Within one batch, first[i] = i + 1.
        self.column = torch.arange(1, self.n_columns + 1, device=rows.device, dtype=torch.int32)
        self.last = torch.searchsorted(columns, rows, right=True, out_int32=True)
        self.first = self.column if self.within else torch.searchsorted(columns, rows, out_int32=True)
        self.height = block_rows(rows.device)
        starts = torch.arange(0, len(rows), self.height, device=rows.device)
        ends = (starts + (self.height - 1)).clamp(max=len(rows) - 1)
        self.windows = torch.stack([self.first[starts], self.last[ends]], 1).tolist()  # Synchronises once.

    def blocks(self) -> Iterator[PairBlock]:
        """Yield blocks that contain all pairs. Within one batch, the pairs i >= j of a block are marked as ignored."""
        for rows, columns in _tiles((len(self.last), self.n_columns), self.within, self.last.device):
            left, right = self.windows[rows.start // self.height]
            window = slice(max(rows.start if self.within else left, columns.start), min(right, columns.stop))
            groups = self._groups(rows, window) if window.start < window.stop else None
            yield PairBlock(rows, columns, slice(window.start - columns.start, window.stop - columns.start), groups)

    def _groups(self, rows: slice, window: slice) -> Tensor:
        column = self.column[window]  # Column numbers start at 1.
        groups, before = ((column <= end[rows, None]).view(torch.int8) for end in (self.last, self.first))
        # Columns before first[i] are ignored within one batch, otherwise negative.
        return groups.add_(before, alpha=1 if self.within else -1)


class MatrixPairs:
    """Pairs from a matrix of +1 (positive), -1 (negative) and 0 (ignored)."""

    def __init__(self, batch: Batch) -> None:
        self.matrix, self.within = batch.labels, batch.within
        self.row_order, self.column_order = (torch.arange(n, device=batch.labels.device) for n in batch.shape)

    def blocks(self) -> Iterator[PairBlock]:
        """Yield blocks that contain all pairs. Within one batch, the pairs i >= j of a block are marked as ignored."""
        for rows, columns in _tiles(self.matrix.shape, self.within, self.matrix.device):
            sign = self.matrix[rows, columns]
            if self.within:
                sign = sign.triu(rows.start - columns.start + 1)
            groups = torch.where(sign == 0, IGNORED, (sign > 0).to(torch.int8))
            yield PairBlock(rows, columns, slice(0, groups.shape[1]), groups)


Pairs = LabelPairs | MatrixPairs


def pair_matrix(multi_hot: Tensor, at_least: int = 1) -> Tensor:
    """Return a matrix of pairs for images with several labels: +1 for at least `at_least` common labels, else -1.

    Args:
        multi_hot: (n, labels); 1 if an image has a label, else 0.
        at_least: smallest number of common labels of a positive pair.

    Returns:
        Int8 (n, n). Pass it to a loss instead of labels. Set entries to 0 to ignore pairs.

    Example:
        >>> pair_matrix(torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]]))
        tensor([[ 1,  1, -1],
                [ 1,  1, -1],
                [-1, -1,  1]], dtype=torch.int8)
    """
    whole_number("at_least", at_least, 1)
    multi_hot = torch.as_tensor(multi_hot)
    if multi_hot.ndim != 2:
        raise ValueError(f"multi_hot must have shape (n, labels): got {tuple(multi_hot.shape)}")
    wrong = ((multi_hot != 0) & (multi_hot != 1)).any(1)
    refuse_rows("multi_hot must contain only 0 and 1:", wrong, "contain other numbers")
    with exact_products(multi_hot.device):
        common = multi_hot.float() @ multi_hot.float().T
    return torch.where(common >= at_least, 1, -1).to(torch.int8)


def block_rows(device: torch.device) -> int:
    """Return the number of rows of a block."""
    return GPU_ROWS if device.type == "cuda" else ROWS


def _tiles(shape: tuple[int, ...], within: bool, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of blocks that cover all pairs; within one batch, the pairs i < j."""
    (n, m), height, width = shape, block_rows(device), GPU_COLUMNS if device.type == "cuda" else COLUMNS
    for top in range(0, n, height):
        for left in range(top if within else 0, m, width):
            yield slice(top, min(top + height, n)), slice(left, min(left + width, m))
