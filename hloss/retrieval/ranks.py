"""Exact ranks of each query's first match (`first_match_ranks`) or all matches (`match_ranks`), and Recall@K.

Ranks are those of the float64 similarities of `hloss.retrieval.similarity`. A tie counts against the query: a rival as
similar as the match precedes it. Float32 products decide where they differ by more than their error; the few closer
pairs are computed again in float64.
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
        labels: integer class labels (n,). Images without a match are left out of the fraction.
        k: the values of K.
        metric: "cosine", or "euclidean" for the embeddings as they are.

    Raises:
        ValueError: a shape, dtype or metric is wrong, or an embedding is NaN or infinite.

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
    labels, order = labels.sort(stable=True)  # Matches lie in one window of columns.
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
    """Return slices of `height` rows, each with the window of columns of its classes. Labels are sorted."""
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
    """Count the rivals that reach each image's `edge`, by square blocks that stay in the cache."""
    low, high = space.doubt(edge)
    rivals = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    similarities, reached = space.vectors.new_empty(2, BLOCK * BLOCK)  # New memory takes time.
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
    """Count in float64 the doubtful others, a mask (queries, others), that reach the queries' edges."""
    columns = doubtful.any(0).nonzero().flatten()
    nearer = space.exact(queries, columns + others.start) >= edge[queries, None]
    return (nearer & doubtful[:, columns]).sum(1)


def match_ranks(
    similarity: Tensor, match: Tensor, ignored: Tensor, edge: Callable[[Tensor], Tensor], lanes: int = 1
) -> Tensor:
    """Return the increasing ranks of each query's matches, padded with 0: int64 (queries, most matches, at least 1).

    A match's rank is its place among the matches plus the number of rivals at least as similar. `similarity` (float64),
    `match` and `ignored` (left out of the ranking) are (queries, gallery). `edge` returns the least similarity that is
    equal to each of those given, (queries, any). `lanes` is the most copies of each counter; several reduce collisions
    of additions on a GPU.
    """
    n_matches = match.sum(1, keepdim=True)
    width = max(int(n_matches.max()), 1)
    columns = match.view(torch.uint8).topk(width, sorted=False).indices  # The matches, then others.
    there = match.gather(1, columns)
    rising = edge(similarity.gather(1, columns).masked_fill(~there, torch.inf)).sort(1).values
    at_least_as_similar = _counted_above(rising, similarity.masked_fill(match | ignored, -torch.inf), lanes)
    place = torch.arange(1, width + 1, device=similarity.device)
    most_similar_first = at_least_as_similar.gather(1, (n_matches - place).clamp(min=0))
    return (place + most_similar_first) * (place <= n_matches)


def _counted_above(rising: Tensor, values: Tensor, lanes: int) -> Tensor:
    """Count the values (rows, n) that are at least each of their row's rising thresholds (rows, width), int64."""
    rows, width = rising.shape
    interval = torch.searchsorted(rising, values, right=True)
    lanes = max(min(lanes, values.shape[1] // (width + 1)), 1)
    counts = interval.new_zeros(rows, lanes, width + 1)
    if lanes > 1:
        interval += (width + 1) * (torch.arange(values.shape[1], device=values.device) % lanes)
    counts.view(rows, -1).scatter_add_(1, interval, interval.new_ones(1).expand_as(interval))
    return counts.sum(1).flip(1).cumsum(1).flip(1)[:, 1:]


def match_scores(ranks: Tensor) -> dict[str, Tensor]:
    """Return the first rank and the float64 scores of each query, by name, from `match_ranks`."""
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
    """Return Recall@K by K of the queries with a match, from the ranks of their first matches (0: none)."""
    matched = ranks[ranks > 0]
    return {at: (matched <= at).double().mean().item() for at in k}
