"""Counts of rivals (see `hloss.retrieval.ranks`) on a GPU, in strips so large that launches take little of the time."""

import torch
from torch import Tensor

from hloss.retrieval.similarity import SimilaritySpace, count_reaching

STRIP = 2**27  # Number of pairs in a strip.


def strip_height(columns: int) -> int:
    """Return the number of rows of a strip; above 128 a multiple of 128, so that matrix products use whole tiles."""
    height = max(STRIP // columns, 1)
    return height - height % 128 if height > 128 else height


def rivals_by_strips(space: SimilaritySpace, labels: Tensor, edge: Tensor, strips: list[tuple[slice, slice]]) -> Tensor:
    """Count the rivals of each image: the images of other classes whose similarity is at least its `edge`.

    A strip that begins at row i has only the columns j >= i, because the similarities are symmetric. Results are read
    from the device after all strips. Queries whose count is uncertain because of rounding are then counted again in
    float64.
    """
    n, height = len(labels), strips[0][0].stop
    low, high = space.doubt(edge)
    sure, possible = torch.zeros(2, n, dtype=torch.int64, device=labels.device)
    similarities = space.vectors.new_empty(height * n)
    # Zeros and ones are summed fastest as float16.
    reached = torch.empty(height * n, dtype=torch.float16, device=labels.device)
    for rows, window in strips:
        similarity = similarities[: (rows.stop - rows.start) * (n - rows.start)].view(-1, n - rows.start)
        space.approximate(rows, slice(rows.start, n), similarity)
        own = slice(rows.start, window.stop)
        similarity[:, : own.stop - own.start].masked_fill_(labels[rows, None] == labels[own], -torch.inf)
        for count, threshold in ((sure, high), (possible, low)):
            count[rows] += count_reaching(similarity, threshold[rows], 1, reached)
            count[rows.stop :] += count_reaching(similarity[:, len(similarity) :], threshold[rows.stop :], 0, reached)
    gallery = space.exact_vectors(slice(None))
    for queries in (sure != possible).nonzero().flatten().split(max(height // 8, 1)):
        similar = space.products(space.exact_vectors(queries), gallery) >= edge[queries, None]
        sure[queries] = (similar & (labels[queries, None] != labels)).sum(1)
    return sure
