"""Exact ranks of each query's first match (`first_match_ranks`) or all matches (`match_ranks`), and Recall@K.

Similarity is the cosine (`metric="cosine"`), or minus half the squared Euclidean distance of the embeddings as they are
(`metric="euclidean"`). A tie counts against the query: a rival as similar as the match precedes it.

Ranks are those of float64 similarities. Similarities within `TIE`, far above their rounding error, are equal. Float32
products decide where they differ by more than their error; the few closer pairs are computed again in float64.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import check_embeddings, check_finite, check_labels, exact_products, one_of

BLOCK = 1024  # Rows and columns of a block on a CPU: large enough for the product, small enough for the cache.
STRIP = 2**27  # Pairs of a strip on these devices: large enough that launching kernels takes no time.
STRIP_DEVICES = ("cuda",)
TIE = 1e-13  # Relative to the largest squared norm (1 for cosines).
METRICS = ("cosine", "euclidean")
Strips = list[tuple[slice, slice]]  # Rows, and the columns of their classes.


def recall_at_k(
    embeddings: Tensor, labels: Tensor, k: Sequence[int] = (1, 10, 100, 1000), metric: str = "cosine"
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
    return recall_fractions(first_match_ranks(embeddings, labels, metric), k)


@torch.no_grad()
def first_match_ranks(embeddings: Tensor, labels: Tensor, metric: str = "cosine") -> Tensor:
    """Return the rank of the first match of each image among all other images; arguments as for `recall_at_k`.

    Memory is O(n d). The number of synchronisations with a GPU does not depend on n.

    Returns:
        Int64 (n,) on the CPU; 1 is the best rank, 0 means that there is no match.
    """
    embeddings, labels = checked_embeddings(embeddings, labels)
    labels, order = labels.sort(stable=True)  # Matches lie in one window of columns.
    space = SimilaritySpace(embeddings[order], metric)
    with exact_products(embeddings.device):
        if embeddings.device.type in STRIP_DEVICES:
            strips = _strips(labels, _strip_height(len(labels)))
            best = _best_matches(space, labels, strips)
            rivals = _rivals_by_strips(space, labels, best, strips)
        else:
            best = _best_matches(space, labels, _strips(labels, BLOCK // 4))
            rivals = _rivals_by_blocks(space, labels, best)
    ranks = torch.empty_like(rivals)
    ranks[order] = torch.where(best.isfinite(), rivals + 1, 0)
    return ranks.cpu()


class SimilaritySpace:
    """The similarity of all pairs of embeddings: their cosine, or minus half their squared Euclidean distance."""

    def __init__(self, embeddings: Tensor, metric: str) -> None:
        self.embeddings, self.metric = embeddings, one_of("metric", metric, METRICS)
        self.centre = embeddings.mean(0, dtype=torch.float64) if metric == "euclidean" else None
        working = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        self.vectors = torch.empty(embeddings.shape, dtype=working, device=embeddings.device)
        on_gpu = embeddings.device.type in STRIP_DEVICES
        for rows in _slices(len(embeddings), _strip_height(4 * embeddings.shape[1]) if on_gpu else BLOCK):
            self.vectors[rows] = self.exact_vectors(rows).to(working)
        self.half_squares = self.vectors.square().sum(1) / 2
        largest = 1.0 if metric == "cosine" else max(2 * self.half_squares.max().item(), 1e-300)
        self.tie = TIE * largest
        # Seven standard deviations of the error of a float32 product of unit vectors; float64 products need none.
        rounding = 2 * (embeddings.shape[1] ** 0.5 + 2) * torch.finfo(torch.float32).eps
        self.slack = rounding * largest if working == torch.float32 else 0.0

    def exact_vectors(self, rows: Tensor | slice) -> Tensor:
        """Return float64 vectors (rows, d) for `products`."""
        vectors = self.embeddings[rows].double()
        return F.normalize(vectors) if self.centre is None else vectors - self.centre

    def exact(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """Return the float64 similarity (rows, columns)."""
        return self.products(self.exact_vectors(rows), self.exact_vectors(columns))

    def approximate(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Write the similarity (rows, columns) in the working precision, within `slack` of the exact one, to `out`."""
        torch.mm(self.vectors[rows], self.vectors[columns].T, out=out)
        if self.metric == "euclidean":
            out.sub_(self.half_squares[rows, None]).sub_(self.half_squares[columns])

    def products(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Return the similarity of vectors from `exact_vectors`."""
        similarity = queries @ gallery.T
        if self.metric == "euclidean":
            similarity -= queries.square().sum(1, keepdim=True) / 2 + gallery.square().sum(1) / 2
        return similarity

    def doubt(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds between which an approximate similarity may be less than `best` or not."""
        edge = best - self.tie
        working = self.vectors.dtype
        return (edge - self.slack).to(working), (edge + self.slack).to(working)


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _strip_height(columns: int) -> int:
    """Return the rows of a strip of `columns`, a multiple of the tiles of a matrix product if there are several."""
    height = max(STRIP // columns, 1)
    return height - height % 128 if height > 128 else height


def _strips(labels: Tensor, height: int) -> Strips:
    """Return slices of `height` rows, each with the window of columns of its classes. Labels are sorted."""
    rows = _slices(len(labels), height)
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


def _rivals_by_strips(space: SimilaritySpace, labels: Tensor, best: Tensor, strips: Strips) -> Tensor:
    """Count the rivals at least as similar as the best match, by strips of rows and the columns from there on.

    Nothing is read from the device until all strips are counted. Queries with uncertain pairs are then counted again.
    """
    n, height = len(labels), strips[0][0].stop
    low, high = space.doubt(best)
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
            count[rows] += _count(similarity, threshold[rows], 1, reached)
            count[rows.stop :] += _count(similarity[:, len(similarity) :], threshold[rows.stop :], 0, reached)
    gallery = space.exact_vectors(slice(None))
    for queries in (sure != possible).nonzero().flatten().split(max(height // 8, 1)):
        similar = space.products(space.exact_vectors(queries), gallery) >= best[queries, None] - space.tie
        sure[queries] = (similar & (labels[queries, None] != labels)).sum(1)
    return sure


def _rivals_by_blocks(space: SimilaritySpace, labels: Tensor, best: Tensor) -> Tensor:
    """Count the rivals at least as similar as the best match, by square blocks that stay in the cache."""
    low, high = space.doubt(best)
    rivals = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    similarities, reached = space.vectors.new_empty(2, BLOCK * BLOCK)  # New memory takes time.
    for rows, columns in combinations_with_replacement(_slices(len(labels), BLOCK), 2):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        similarity = similarities[: shape[0] * shape[1]].view(shape)
        space.approximate(rows, columns, similarity)
        if labels[columns.start] <= labels[rows.stop - 1]:
            similarity.masked_fill_(labels[rows, None] == labels[columns], -torch.inf)
        for dim, queries, others in ((1, rows, columns), (0, columns, rows)):
            if dim == 1 or rows != columns:
                beaten_by = _count(similarity, high[queries], dim, reached)
                unsure = (beaten_by != _count(similarity, low[queries], dim, reached)).nonzero().flatten()
                rivals[queries] += beaten_by
                if len(unsure):
                    near = similarity.index_select(1 - dim, unsure).movedim(dim, 1)
                    unsure += queries.start
                    doubtful = (near >= low[unsure, None]) & (near < high[unsure, None])
                    rivals[unsure] += _count_again(space, best, unsure, others, doubtful)
    return rivals


def _count(similarity: Tensor, threshold: Tensor, dim: int, memory: Tensor) -> Tensor:
    """Count the similarities along `dim` that reach each query's threshold, int64."""
    # Floats count exactly up to 2^24, several times as fast as booleans.
    reached = memory[: similarity.numel()].view(similarity.shape)
    torch.ge(similarity, threshold.unsqueeze(dim), out=reached)
    return reached.sum(dim, dtype=torch.float32 if memory.dtype == torch.float16 else None).long()


def _count_again(space: SimilaritySpace, best: Tensor, queries: Tensor, others: slice, doubtful: Tensor) -> Tensor:
    """Count in float64 the doubtful others, a mask (queries, others), that are as similar as the best match."""
    columns = doubtful.any(0).nonzero().flatten()
    nearer = space.exact(queries, columns + others.start) >= best[queries, None] - space.tie
    return (nearer & doubtful[:, columns]).sum(1)


def match_ranks(similarity: Tensor, match: Tensor, ignored: Tensor, tie: float, lanes: int = 1) -> Tensor:
    """Return the increasing ranks of each query's matches, padded with 0.

    A match's rank is its place among the matches plus the number of rivals at least as similar.

    Args:
        similarity: float64 (queries, gallery).
        match: boolean (queries, gallery).
        ignored: boolean (queries, gallery): images left out of the ranking.
        tie: similarities closer than this are equal.
        lanes: most copies of each counter; several reduce collisions of additions on a GPU.

    Returns:
        Int64 (queries, largest number of matches, at least 1).
    """
    n_matches = match.sum(1, keepdim=True)
    width = max(int(n_matches.max()), 1)
    columns = match.view(torch.uint8).topk(width, sorted=False).indices  # The matches, then others.
    there = match.gather(1, columns)
    rising = (similarity.gather(1, columns).masked_fill(~there, torch.inf) - tie).sort(1).values
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


def recall_fractions(ranks: Tensor, k: Sequence[int]) -> dict[int, float]:
    """Return Recall@K by K of the queries with a match, from the ranks of their first matches (0: none)."""
    matched = ranks[ranks > 0]
    return {at: (matched <= at).double().mean().item() for at in k}


def checked_embeddings(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return detached embeddings, and labels on their device; raise ValueError for wrong shapes, dtypes and values."""
    check_embeddings("embeddings", embeddings)
    if not len(embeddings):
        raise ValueError("embeddings must have at least one row: got none")
    labels = torch.as_tensor(labels, device=embeddings.device)
    check_labels("labels", labels, len(embeddings))
    check_finite(embeddings)
    return embeddings.detach(), labels
