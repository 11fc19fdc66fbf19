"""Exact ranks of each query's first match (`first_match_ranks`) or all matches (`match_ranks`), and Recall@K.

A match of a query is another image of its class. A rival of a match is an image that does not match and is at least as
similar to the query. The rank counts the rivals, so a tie counts against the query.

Similarities are those of `hloss.retrieval.similarity`, in float64. Float32 products are used where they suffice for the
comparison. Pairs whose similarities differ by less than the float32 error are computed again in float64.
"""

from collections.abc import Callable, Iterable
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from hloss.numerics import exact_products, whole_number
from hloss.retrieval.cuda_ranks import rivals_by_strips, strip_height
from hloss.retrieval.similarity import SimilaritySpace, checked_set, count_reaching, slices

BLOCK = 1024  # Rows and columns of a block on a CPU: large enough for the product, small enough for the cache.
STRIP_DEVICES = ("cuda",)
Strips = list[tuple[slice, slice]]  # Rows, and the columns of their classes.


def recall_at_k(
    embeddings: Tensor, labels: Tensor, k: Iterable[int] = (1, 10, 100, 1000), metric: str = "cosine"
) -> dict[int, float]:
    """Return Recall@K, the fraction of images with a match among their K most similar other images, for each K.

    Args:
        embeddings: floating-point (n, d), n > 0.
        labels: integer class labels (n,). Images without a match do not count.
        k: the values of K.
        metric: "cosine", or "euclidean" without normalisation.

    Raises:
        ValueError: a shape, dtype, metric or K is wrong, or an embedding is NaN, infinite or, for the cosine, zero.

    Example:
        >>> recall_at_k(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]), k=(1, 2))
        {1: 1.0, 2: 1.0}
    """
    k = checked_k(k)
    return recall_fractions(first_match_ranks(embeddings, labels, metric), k)


@torch.no_grad()
def first_match_ranks(embeddings: Tensor, labels: Tensor, metric: str = "cosine") -> Tensor:
    """Return the rank of each image's first match among all other images, 0 if it has none: int64 (n,) on the CPU.

    Arguments as for `recall_at_k`. Memory is O(n d). The number of synchronisations with a GPU does not depend on n.
    """
    embeddings, labels = checked_set(embeddings, labels, metric)
    labels, order = labels.sort(stable=True)  # After sorting, the matches of a row are adjacent columns.
    space = SimilaritySpace(embeddings[order], metric)
    with exact_products(embeddings.device):
        by_strips = embeddings.device.type in STRIP_DEVICES
        strips = _strips(labels, strip_height(len(labels)) if by_strips else BLOCK // 4)
        edge = space.edge(_best_matches(space, labels, strips), space.squares)
        rivals = rivals_by_strips(space, labels, edge, strips) if by_strips else _rivals_by_blocks(space, labels, edge)
    ranks = torch.empty_like(rivals)
    ranks[order] = torch.where(edge.isfinite(), rivals + 1, 0)
    return ranks.cpu()


def _strips(labels: Tensor, height: int) -> Strips:
    """Return slices of `height` rows, each with the slice of columns that contains its classes. Labels are sorted."""
    rows = slices(len(labels), height)
    last = torch.cat([labels[height - 1 :: height], labels[-1:]])[: len(rows)]
    start = torch.searchsorted(labels, labels[::height].contiguous())
    stop = torch.searchsorted(labels, last, right=True)
    windows = torch.stack([start, stop], dim=1).tolist()
    return [(strip, slice(*window)) for strip, window in zip(rows, windows, strict=True)]


def _best_matches(space: SimilaritySpace, labels: Tensor, strips: Strips) -> Tensor:
    """Return the float64 similarity of each image's nearest match, infinity if it has none."""
    parts = []
    for rows, window in strips:
        vectors = space.exact_vectors(window)
        queries = slice(rows.start - window.start, rows.stop - window.start)
        similarity = space.products(vectors[queries], vectors)
        similarity.masked_fill_(labels[rows, None] != labels[window], -torch.inf)
        similarity.diagonal(queries.start).fill_(-torch.inf)  # The query itself.
        parts.append(similarity.amax(1))
    best = torch.cat(parts)
    return best.masked_fill(best == -torch.inf, torch.inf)


def _rivals_by_blocks(space: SimilaritySpace, labels: Tensor, edge: Tensor) -> Tensor:
    """Count the rivals of each image: the images of other classes whose similarity is at least its `edge`.

    The blocks are square and stay in the cache.
    """
    low, high = space.doubt(edge)
    rivals = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    similarities, reached = space.vectors.new_empty(2, BLOCK * BLOCK)  # Memory for all blocks.
    for rows, columns in combinations_with_replacement(slices(len(labels), BLOCK), 2):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        similarity = similarities[: shape[0] * shape[1]].view(shape)
        space.approximate(rows, columns, similarity)
        if labels[columns.start] <= labels[rows.stop - 1]:
            similarity.masked_fill_(labels[rows, None] == labels[columns], -torch.inf)
        for dim, queries, others in ((1, rows, columns), (0, columns, rows)):
            if dim == 1 or rows != columns:
                beaten_by = count_reaching(similarity, high[queries], dim, reached)
                unsure = (beaten_by != count_reaching(similarity, low[queries], dim, reached)).nonzero().flatten()
                rivals[queries] += beaten_by
                if len(unsure):
                    near = similarity.index_select(1 - dim, unsure).movedim(dim, 1)
                    unsure += queries.start
                    doubtful = (near >= low[unsure, None]) & (near < high[unsure, None])
                    rivals[unsure] += _count_again(space, edge, unsure, others, doubtful)
    return rivals


def _count_again(space: SimilaritySpace, edge: Tensor, queries: Tensor, others: slice, doubtful: Tensor) -> Tensor:
    """Count again, in float64, for which of the doubtful pairs the similarity is at least the query's edge.

    `doubtful` is a mask (queries, others).
    """
    columns = doubtful.any(0).nonzero().flatten()
    nearer = space.exact(queries, columns + others.start) >= edge[queries, None]
    return (nearer & doubtful[:, columns]).sum(1)


def match_ranks(
    similarity: Tensor, match: Tensor, ignored: Tensor, edge: Callable[[Tensor], Tensor], lanes: int = 1
) -> Tensor:
    """Return the ranks of the matches of each query in increasing order, padded with 0.

    The rank of a match is its position among the matches of the query, plus the number of its rivals.

    Args:
        similarity: float64 (queries, gallery).
        match: mask of the matches (queries, gallery).
        ignored: mask of the images that are not ranked (queries, gallery).
        edge: called with similarities (queries, any); returns the smallest similarities that are a tie with them.
        lanes: largest number of copies of each counter; several copies reduce collisions of additions on a GPU.

    Returns:
        Int64 (queries, width), where width is the largest number of matches of a query, at least 1.
    """
    n_matches = match.sum(1, keepdim=True)
    width = max(int(n_matches.max()), 1)
    columns = match.view(torch.uint8).topk(width, sorted=False).indices  # First the matches, then other images.
    there = match.gather(1, columns)
    rising = edge(similarity.gather(1, columns).masked_fill(~there, torch.inf)).sort(1).values
    at_least_as_similar = _counted_above(rising, similarity.masked_fill(match | ignored, -torch.inf), lanes)
    place = torch.arange(1, width + 1, device=similarity.device)
    most_similar_first = at_least_as_similar.gather(1, (n_matches - place).clamp(min=0))
    return (place + most_similar_first) * (place <= n_matches)


def _counted_above(rising: Tensor, values: Tensor, lanes: int) -> Tensor:
    """Count for each threshold (rows, width), increasing in each row, the values (rows, n) of at least this size."""
    rows, width = rising.shape
    interval = torch.searchsorted(rising, values, right=True)
    lanes = max(min(lanes, values.shape[1] // (width + 1)), 1)
    counts = interval.new_zeros(rows, lanes, width + 1)
    if lanes > 1:
        interval += (width + 1) * (torch.arange(values.shape[1], device=values.device) % lanes)
    counts.view(rows, -1).scatter_add_(1, interval, interval.new_ones(1).expand_as(interval))
    return counts.sum(1).flip(1).cumsum(1).flip(1)[:, 1:]


def match_scores(ranks: Tensor) -> dict[str, Tensor]:
    """Return the rank of the first match and the float64 scores of each query, given the result of `match_ranks`."""
    there = ranks > 0
    n_matches = there.sum(1).clamp(min=1)
    place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device, dtype=torch.float64)
    precision = place / ranks.clamp(min=1) * there
    before = ((place - 1) / (ranks - 1).clamp(min=1)).masked_fill(ranks == 1, 1.0) * there
    among_r = ranks <= n_matches[:, None]
    return {
        "first": ranks[:, 0],
        "map": precision.sum(1) / n_matches,
        "map_trapezoid": (precision + before).sum(1) / (2 * n_matches),
        "r_precision": (there & among_r).sum(1) / n_matches.double(),
        "map@r": (precision * among_r).sum(1) / n_matches,
    }


def checked_k(k: Iterable[int]) -> tuple[int, ...]:
    """Return the values of K; raise ValueError unless they are whole numbers of at least 1."""
    return tuple(whole_number("k", at, 1) for at in (k if isinstance(k, Iterable) else [k]))


def recall_fractions(ranks: Tensor, k: Iterable[int]) -> dict[int, float]:
    """Return Recall@K for each K, over the queries with a match.

    `ranks` contains the rank of the first match of each query, or 0 for a query without a match.
    """
    matched = ranks[ranks > 0]
    return {at: (matched <= at).double().mean().item() for at in k}
