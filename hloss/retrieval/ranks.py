"""Ranks of the matches of each query, and Recall@K."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import check_finite, exact_products

BLOCK = 1024  # rows and columns of the float32 blocks: large enough for the product, small enough for the cache
TIE = 1e-13  # of the largest squared norm (1 for cosines)
METRICS = ("cosine", "euclidean")


def recall_at_k(
    embeddings: Tensor, labels: Tensor, k: Sequence[int] = (1, 10, 100, 1000), metric: str = "cosine"
) -> dict[int, float]:
    """Recall@K, all-vs-rest: the fraction of queries with a match among their K nearest others, for each K.

    Args as `first_match_ranks`. Queries without any match (classes of one image) are left out of the fraction.
    """
    return recall_fractions(first_match_ranks(embeddings, labels, metric), k)


@torch.no_grad()
def first_match_ranks(embeddings: Tensor, labels: Tensor, metric: str = "cosine") -> Tensor:
    """Rank of the first image of the query's class among all others, for each image; int64 of shape (n,), 0 = no match.

    embeddings (n, d) floating, labels (n,) integers. The query itself is never in its ranking; 1 is the best rank.
    Each similarity is computed once, for both its ends, and nothing of the size of all pairs is stored.
    """
    embeddings, labels = checked_embeddings(embeddings, labels)
    labels, order = labels.sort(stable=True)  # matches stand in one window of columns
    space = SimilaritySpace(embeddings[order], metric)
    best = _best_matches(space, labels)
    low, high = space.doubt(best)
    rivals = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    blocks = space.vectors.new_empty(2, BLOCK * BLOCK)  # once: memory that is new to the process costs time
    with exact_products(embeddings.device):
        for rows, columns in _upper_blocks(len(labels)):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            similarity, reached = blocks[:, : shape[0] * shape[1]].view(2, *shape)
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
    ranks = torch.empty_like(rivals)
    ranks[order] = torch.where(best.isfinite(), rivals + 1, 0)
    return ranks.cpu()


class SimilaritySpace:
    """The similarity of all pairs of embeddings: their cosine, or minus half their squared Euclidean distance."""

    def __init__(self, embeddings: Tensor, metric: str) -> None:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}, known are {', '.join(METRICS)}")
        self.embeddings, self.metric = embeddings, metric
        self.centre = embeddings.mean(0, dtype=torch.float64) if metric == "euclidean" else None
        working = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        self.vectors = torch.empty(embeddings.shape, dtype=working, device=embeddings.device)
        for rows in torch.arange(len(embeddings), device=embeddings.device).split(BLOCK):
            self.vectors[rows] = self.exact_vectors(rows).to(working)
        self.half_squares = self.vectors.square().sum(1) / 2
        largest = 1.0 if metric == "cosine" else max(2 * self.half_squares.max().item(), 1e-300)
        self.tie = TIE * largest
        # Seven standard deviations of the error of a float32 product of unit vectors; float64 products are exact here.
        rounding = 2 * (embeddings.shape[1] ** 0.5 + 2) * torch.finfo(torch.float32).eps
        self.slack = rounding * largest if working == torch.float32 else 0.0

    def exact_vectors(self, rows: Tensor | slice) -> Tensor:
        """Float64 vectors whose products (and squares) are the similarity: (len(rows), d)."""
        vectors = self.embeddings[rows].double()
        return F.normalize(vectors) if self.centre is None else vectors - self.centre

    def exact(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """Float64 similarity (rows, columns)."""
        return self.products(self.exact_vectors(rows), self.exact_vectors(columns))

    def approximate(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Nearness (rows, columns) in the working precision, within `slack` of the exact one, into `out`."""
        torch.mm(self.vectors[rows], self.vectors[columns].T, out=out)
        if self.metric == "euclidean":
            out.sub_(self.half_squares[rows, None]).sub_(self.half_squares[columns])

    def products(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Nearness of vectors made by `exact_vectors`."""
        similarity = queries @ gallery.T
        if self.metric == "euclidean":
            similarity -= queries.square().sum(1, keepdim=True) / 2 + gallery.square().sum(1) / 2
        return similarity

    def doubt(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Approximate similarity below the first is surely less than `best`, from the second on surely is not."""
        edge = best - self.tie
        working = self.vectors.dtype
        return (edge - self.slack).to(working), (edge + self.slack).to(working)


def _best_matches(space: SimilaritySpace, labels: Tensor) -> Tensor:
    """Float64 similarity of each image's nearest match; infinite where there is none. Labels are sorted."""
    n = len(labels)
    best = torch.empty(n, dtype=torch.float64, device=labels.device)
    start = torch.searchsorted(labels, labels).tolist()
    stop = torch.searchsorted(labels, labels, right=True).tolist()
    top = 0
    while top < n:
        # As many rows as fit with the window of their classes' columns.
        bottom = min(top + BLOCK // 4, n)
        window = slice(start[top], stop[bottom - 1])
        similarity = space.exact(slice(top, bottom), window)
        similarity.masked_fill_(labels[top:bottom, None] != labels[window], -torch.inf)
        rows = torch.arange(bottom - top, device=labels.device)
        similarity[rows, rows + top - window.start] = -torch.inf
        best[top:bottom] = similarity.amax(1)
        top = bottom
    return best.masked_fill(best == -torch.inf, torch.inf)


def _upper_blocks(n: int) -> Iterator[tuple[slice, slice]]:
    blocks = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    return ((rows, columns) for i, rows in enumerate(blocks) for columns in blocks[i:])


def _count(similarity: Tensor, threshold: Tensor, dim: int, reached: Tensor) -> Tensor:
    """How many of the others (along `dim`) are at least as near as each query's threshold, int64."""
    # Counted as floats, exact up to 2^24: several times as fast as to count booleans.
    return torch.ge(similarity, threshold.unsqueeze(dim), out=reached).sum(dim).long()


def _count_again(space: SimilaritySpace, best: Tensor, queries: Tensor, others: slice, doubtful: Tensor) -> Tensor:
    """How many of the doubtful others are as near as the best match by float64; doubtful is (queries, others)."""
    columns = doubtful.any(0).nonzero().flatten()
    nearer = space.exact(queries, columns + others.start) >= best[queries, None] - space.tie
    return (nearer & doubtful[:, columns]).sum(1)


def match_ranks(similarity: Tensor, match: Tensor, ignored: Tensor, tie: float) -> Tensor:
    """Ranks of each query's matches, rising, padded with 0: int64 (queries, largest number of matches, at least 1).

    similarity float64, match and ignored (left out of the ranking) boolean, all (queries, gallery). A match's rank is
    its place among the matches plus the number of rivals at least as near.
    """
    n_matches = match.sum(1, keepdim=True)
    width = max(int(n_matches.max()), 1)
    falling = similarity.masked_fill(~match, -torch.inf).topk(width).values
    place = torch.arange(1, width + 1, device=similarity.device)
    there = place <= n_matches
    rising = (falling.masked_fill(~there, torch.inf) - tie).sort(1).values  # those not there last, reached by no rival
    reached = torch.searchsorted(rising, similarity.masked_fill(match | ignored, -torch.inf), right=True)
    rivals = torch.zeros(len(similarity), width + 1, dtype=torch.int64, device=similarity.device)
    rivals.scatter_add_(1, reached, rivals.new_ones(1).expand_as(reached))
    at_least_as_near = rivals.flip(1).cumsum(1).flip(1)[:, 1:]  # by match, the least near first
    nearest_first = at_least_as_near.gather(1, (n_matches - place).clamp(min=0))
    return (place + nearest_first) * there


def match_scores(ranks: Tensor) -> dict[str, Tensor]:
    """Per query, from the ranks of its matches as `match_ranks` gives them: the first rank and the float64 scores."""
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
    matched = ranks[ranks > 0]
    return {at: (matched <= at).double().mean().item() for at in k}


def checked_embeddings(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if embeddings.ndim != 2 or not embeddings.is_floating_point() or len(embeddings) == 0:
        raise ValueError(
            f"embeddings must be floating of shape (n, d), n > 0, got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    labels = torch.as_tensor(labels, device=embeddings.device)
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({len(embeddings)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    check_finite(embeddings)
    return embeddings.detach(), labels
