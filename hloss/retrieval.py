"""Retrieval on embeddings: ranks of the matches, Recall@K, average precision, and the evaluation protocols by name.

Nearness is the cosine (`metric="cosine"`), or the Euclidean distance of the raw embeddings (`metric="euclidean"`:
lifted structure's own evaluation). Ties count against the query: a rival exactly as near as the match stands before it.
A query without any match has rank 0 and is reported, never counted as right or wrong.

Ranks are those of the float64 similarities of the embeddings given, so that rounding decides nothing: similarities
within `TIE` of each other, far above their rounding error, are equal. Where float32 products tell a rival from a
match by more than their own error, they decide; the few pairs nearer than that are computed again in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.histogram import check_finite, exact_products

BLOCK = 1024  # rows and columns of the float32 blocks: large enough for the product, small enough for the cache
PAIRS = 2**22  # pairs held at once in float64
TIE = 1e-13  # of the largest squared norm (1 for cosines)
DRAWS = 100  # of the single-shot protocols
METRICS = ("cosine", "euclidean")


@dataclass(frozen=True)
class Retrieval:
    """What a protocol measured. Metrics are fractions in [0, 1], means over the queries that have a match.

    `ranks[i]` is the 1-based rank of the first match of query `query_index[i]` (an index into the embeddings given),
    0 where the gallery holds no match. The metrics are `recall@K` (for re-identification: the CMC at K) and, but for
    the single-shot protocols,

    - `map`: mean average precision, the mean over matches of (matches up to it) / (its rank), as scikit-learn's;
    - `map_trapezoid`: the same with each precision averaged with the one just before the match (the Oxford buildings'
      trapezoid rule, used by some re-identification code): do not compare it with the other;
    - `r_precision`: the fraction of matches among the R nearest, R the number of the query's matches;
    - `map@r`: the mean over the R nearest of the precision there, where there is a match (Musgrave et al. 2020).
    """

    protocol: str
    ranks: Tensor
    query_index: Tensor
    metrics: dict[str, float]
    n_queries: int
    n_unmatched: int


def recall_at_k(
    embeddings: Tensor, labels: Tensor, k: Sequence[int] = (1, 10, 100, 1000), metric: str = "cosine"
) -> dict[int, float]:
    """Recall@K, all-vs-rest: the fraction of queries with a match among their K nearest others, for each K.

    Args as `first_match_ranks`. Queries without any match (classes of one image) are left out of the fraction.
    """
    return _recall(first_match_ranks(embeddings, labels, metric), k)


@torch.no_grad()
def first_match_ranks(embeddings: Tensor, labels: Tensor, metric: str = "cosine") -> Tensor:
    """Rank of the first image of the query's class among all others, for each image; int64 of shape (n,), 0 = no match.

    embeddings (n, d) floating, labels (n,) integers. The query itself is never in its ranking; 1 is the best rank.
    Each similarity is computed once, for both its ends, and nothing of the size of all pairs is stored.
    """
    embeddings, labels = _checked(embeddings, labels)
    labels, order = labels.sort(stable=True)  # matches stand in one window of columns
    space = _Space(embeddings[order], metric)
    best = _best_matches(space, labels)
    low, high = space.doubt(best)
    rivals = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    blocks = space.vectors.new_empty(2, BLOCK * BLOCK)  # once: memory that is new to the process costs time
    with exact_products(embeddings.device):
        for rows, columns in _upper_blocks(len(labels)):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            nearness, reached = blocks[:, : shape[0] * shape[1]].view(2, *shape)
            space.approximate(rows, columns, nearness)
            if labels[columns.start] <= labels[rows.stop - 1]:
                nearness.masked_fill_(labels[rows, None] == labels[columns], -torch.inf)
            for dim, queries, others in ((1, rows, columns), (0, columns, rows)):
                if dim == 1 or rows != columns:
                    beaten_by = _count(nearness, high[queries], dim, reached)
                    unsure = (beaten_by != _count(nearness, low[queries], dim, reached)).nonzero().flatten()
                    rivals[queries] += beaten_by
                    if len(unsure):
                        near = nearness.index_select(1 - dim, unsure).movedim(dim, 1)
                        unsure += queries.start
                        doubtful = (near >= low[unsure, None]) & (near < high[unsure, None])
                        rivals[unsure] += _count_again(space, best, unsure, others, doubtful)
    ranks = torch.empty_like(rivals)
    ranks[order] = torch.where(best.isfinite(), rivals + 1, 0)
    return ranks.cpu()


def evaluate(
    protocol: str,
    embeddings: Tensor,
    labels: Tensor,
    k: Sequence[int] = (1, 2, 4, 8, 16, 32),
    metric: str = "cosine",
    cameras: Tensor | None = None,
    roles: Sequence[str] | None = None,
    seed: int = 0,
) -> Retrieval:
    """Measure retrieval by a named protocol, on the rows of one split.

    Args:
        protocol: one of `PROTOCOLS`:
            "all-vs-rest": every image queries all others (CUB-200-2011, Online Products, glyphs);
            "cuhk03-single-shot": the old protocol of CUHK03. Of each identity one image of the first view (the lower
            camera) queries a gallery of one image per identity of the second view. The mean over 100 drawings by
            `seed`, and `expected_recall@K`, the exact expectation over all drawings;
            "cuhk03-single-shot-two-way": the same with the second view's queries added;
            "cuhk03-767-700": the new protocol of CUHK03, by roles; images of the query's identity and camera are left
            out of its ranking;
            "market1501": single query, by roles; as before, junk is left out too, distractors are rivals;
            "market1501-multi-query": the query is the mean of the images of role pool of the query's identity and
            camera (normalised before, if the metric is the cosine); metrics `max_...` are for their maximum instead.
        embeddings: (n, d), floating.
        labels: (n,) integers.
        k: the K of `recall@K`.
        metric: "cosine" or "euclidean".
        cameras: (n,) integers; needed by all but all-vs-rest. Single-shot takes exactly two: the views.
        roles: n of query, gallery, both, junk, distractor, pool; needed by the protocols that go by roles.
        seed: of the drawings.

    ValueError for an unknown protocol, missing or unusable cameras and roles, and a protocol without any query.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, known are {', '.join(PROTOCOLS)}")
    embeddings, labels = _checked(embeddings, labels)
    rows = _Rows(protocol, _Space(embeddings, metric), labels, tuple(k), cameras, roles, seed)
    with torch.no_grad(), exact_products(embeddings.device):
        return PROTOCOLS[protocol](rows)


# ------------------------------------------------------------------------------------------------------ nearness


class _Space:
    """The nearness of all pairs of embeddings: their cosine, or minus half their squared Euclidean distance."""

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
        """Float64 vectors whose products (and squares) are the nearness: (len(rows), d)."""
        vectors = self.embeddings[rows].double()
        return F.normalize(vectors) if self.centre is None else vectors - self.centre

    def exact(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """Float64 nearness (rows, columns)."""
        return self.products(self.exact_vectors(rows), self.exact_vectors(columns))

    def approximate(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Nearness (rows, columns) in the working precision, within `slack` of the exact one, into `out`."""
        torch.mm(self.vectors[rows], self.vectors[columns].T, out=out)
        if self.metric == "euclidean":
            out.sub_(self.half_squares[rows, None]).sub_(self.half_squares[columns])

    def products(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Nearness of vectors made by `exact_vectors`."""
        nearness = queries @ gallery.T
        if self.metric == "euclidean":
            nearness -= queries.square().sum(1, keepdim=True) / 2 + gallery.square().sum(1) / 2
        return nearness

    def doubt(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Approximate nearness below the first is surely less than `best`, from the second on surely is not."""
        edge = best - self.tie
        working = self.vectors.dtype
        return (edge - self.slack).to(working), (edge + self.slack).to(working)


def _best_matches(space: _Space, labels: Tensor) -> Tensor:
    """Float64 nearness of each image's nearest match; infinite where there is none. Labels are sorted."""
    n = len(labels)
    best = torch.empty(n, dtype=torch.float64, device=labels.device)
    start = torch.searchsorted(labels, labels).tolist()
    stop = torch.searchsorted(labels, labels, right=True).tolist()
    top = 0
    while top < n:
        # As many rows as fit with the window of their classes' columns.
        bottom = min(top + BLOCK // 4, n)
        window = slice(start[top], stop[bottom - 1])
        nearness = space.exact(slice(top, bottom), window)
        nearness.masked_fill_(labels[top:bottom, None] != labels[window], -torch.inf)
        rows = torch.arange(bottom - top, device=labels.device)
        nearness[rows, rows + top - window.start] = -torch.inf
        best[top:bottom] = nearness.amax(1)
        top = bottom
    return best.masked_fill(best == -torch.inf, torch.inf)


def _upper_blocks(n: int) -> Iterator[tuple[slice, slice]]:
    blocks = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    return ((rows, columns) for i, rows in enumerate(blocks) for columns in blocks[i:])


def _count(nearness: Tensor, threshold: Tensor, dim: int, reached: Tensor) -> Tensor:
    """How many of the others (along `dim`) are at least as near as each query's threshold, int64."""
    # Counted as floats, exact up to 2^24: several times as fast as to count booleans.
    return torch.ge(nearness, threshold.unsqueeze(dim), out=reached).sum(dim).long()


def _count_again(space: _Space, best: Tensor, queries: Tensor, others: slice, doubtful: Tensor) -> Tensor:
    """How many of the doubtful others are as near as the best match by float64; doubtful is (queries, others)."""
    columns = doubtful.any(0).nonzero().flatten()
    nearer = space.exact(queries, columns + others.start) >= best[queries, None] - space.tie
    return (nearer & doubtful[:, columns]).sum(1)


# --------------------------------------------------------------------------------------------- ranks of all matches


def _match_ranks(nearness: Tensor, match: Tensor, ignored: Tensor, tie: float) -> Tensor:
    """Ranks of each query's matches, rising, padded with 0: int64 (queries, largest number of matches, at least 1).

    nearness float64, match and ignored (left out of the ranking) boolean, all (queries, gallery). A match's rank is
    its place among the matches plus the number of rivals at least as near.
    """
    n_matches = match.sum(1, keepdim=True)
    width = max(int(n_matches.max()), 1)
    falling = nearness.masked_fill(~match, -torch.inf).topk(width).values
    place = torch.arange(1, width + 1, device=nearness.device)
    there = place <= n_matches
    rising = (falling.masked_fill(~there, torch.inf) - tie).sort(1).values  # those not there last, reached by no rival
    reached = torch.searchsorted(rising, nearness.masked_fill(match | ignored, -torch.inf), right=True)
    rivals = torch.zeros(len(nearness), width + 1, dtype=torch.int64, device=nearness.device)
    rivals.scatter_add_(1, reached, rivals.new_ones(1).expand_as(reached))
    at_least_as_near = rivals.flip(1).cumsum(1).flip(1)[:, 1:]  # by match, the least near first
    nearest_first = at_least_as_near.gather(1, (n_matches - place).clamp(min=0))
    return (place + nearest_first) * there


def _scores(ranks: Tensor) -> dict[str, Tensor]:
    """Per query, from the ranks of its matches as `_match_ranks` gives them: the first rank and the float64 scores."""
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


# ------------------------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class _Rows:
    """The rows of a split and what a protocol asks about them."""

    protocol: str
    space: _Space
    labels: Tensor
    k: tuple[int, ...]
    given_cameras: Tensor | None
    given_roles: Sequence[str] | None
    seed: int

    @property
    def cameras(self) -> Tensor:
        if self.given_cameras is None:
            raise ValueError(f"protocol {self.protocol!r} needs cameras, one integer per embedding")
        cameras = torch.as_tensor(self.given_cameras, device=self.labels.device)
        if cameras.shape != self.labels.shape or cameras.is_floating_point():
            raise ValueError(
                f"cameras must be integers of shape ({len(self.labels)},), got {cameras.dtype} {tuple(cameras.shape)}"
            )
        return cameras

    def of_role(self, *roles: str) -> Tensor:
        """Indices of the rows of these roles."""
        if self.given_roles is None:
            raise ValueError(f"protocol {self.protocol!r} needs roles, one of {', '.join(ROLES)} per embedding")
        if len(self.given_roles) != len(self.labels) or not set(self.given_roles) <= set(ROLES):
            raise ValueError(
                f"roles must be {len(self.labels)} of {', '.join(ROLES)}, "
                f"got {len(self.given_roles)} of {', '.join(sorted(set(self.given_roles)))}"
            )
        found = [i for i, role in enumerate(self.given_roles) if role in roles]
        if not found:
            raise ValueError(f"protocol {self.protocol!r} needs rows of role {' or '.join(roles)}, there are none")
        return torch.tensor(found, device=self.labels.device)


ROLES = ("both", "query", "gallery", "junk", "distractor", "pool")


def _all_vs_rest(rows: _Rows) -> Retrieval:
    everything = torch.arange(len(rows.labels), device=rows.labels.device)

    def match_and_ignored(queries: Tensor) -> tuple[Tensor, Tensor]:
        itself = queries[:, None] == everything
        return (rows.labels[queries, None] == rows.labels) & ~itself, itself

    vectors = rows.space.exact_vectors(everything)
    return _measured(rows, everything, _scored(rows.space, vectors, vectors, match_and_ignored))


def _other_cameras(rows: _Rows) -> Retrieval:
    """Queries against the gallery, images of the query's identity and camera left out."""
    queries = rows.of_role("query", "both")
    return _measured(rows, queries, _against_other_cameras(rows, queries, rows.space.exact_vectors(queries)))


def _multi_query(rows: _Rows) -> Retrieval:
    """The same with the images of role pool of the query's identity and camera pooled: their mean, their maximum."""
    queries, pool = rows.of_role("query", "both"), rows.of_role("pool")
    vectors, cameras = rows.space.exact_vectors(pool), rows.cameras
    pooled = (rows.labels[queries, None] == rows.labels[pool]) & (cameras[queries, None] == cameras[pool])
    without = (~pooled.any(1)).sum().item()
    if without:
        raise ValueError(
            f"{without} of {len(queries)} queries have no image of role pool of their identity and camera; "
            "prepare the dataset with its images for multiple queries (Market-1501: gt_bbox)"
        )
    mean = torch.stack([vectors[members].mean(0) for members in pooled])
    largest = torch.stack([vectors[members].amax(0) for members in pooled])
    if rows.space.metric == "cosine":
        mean, largest = F.normalize(mean), F.normalize(largest)
    measured = _measured(rows, queries, _against_other_cameras(rows, queries, mean))
    of_maximum = _measured(rows, queries, _against_other_cameras(rows, queries, largest)).metrics
    measured.metrics.update({f"max_{name}": value for name, value in of_maximum.items()})
    return measured


def _against_other_cameras(rows: _Rows, queries: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """`_scored` of the queries, whose vectors are given, against all of the gallery but their own cameras."""
    gallery = rows.of_role("gallery", "distractor", "both")
    known = torch.zeros(len(rows.labels), dtype=torch.bool, device=rows.labels.device)
    known[rows.of_role("gallery", "both")] = True  # a distractor matches nobody, whatever its label
    cameras, labels = rows.cameras, rows.labels

    def match_and_ignored(block: Tensor) -> tuple[Tensor, Tensor]:
        own = (labels[queries[block], None] == labels[gallery]) & known[gallery]
        seen = own & (cameras[queries[block], None] == cameras[gallery])
        return own & ~seen, seen

    return _scored(rows.space, vectors, rows.space.exact_vectors(gallery), match_and_ignored)


def _scored(
    space: _Space,
    queries: Tensor,
    gallery: Tensor,
    match_and_ignored: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """`_scores` of query vectors against gallery vectors, by blocks of queries."""
    blocks = torch.arange(len(queries), device=queries.device).split(max(PAIRS // len(gallery), 1))
    parts = [
        _scores(_match_ranks(space.products(queries[block], gallery), *match_and_ignored(block), space.tie))
        for block in blocks
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _measured(rows: _Rows, queries: Tensor, scores: dict[str, Tensor]) -> Retrieval:
    ranks = scores.pop("first")
    metrics = {f"recall@{at}": value for at, value in _recall(ranks, rows.k).items()}
    metrics |= {name: score[ranks > 0].mean().item() for name, score in scores.items()}
    return Retrieval(rows.protocol, ranks.cpu(), queries.cpu(), metrics, len(ranks), int((ranks == 0).sum()))


def _single_shot(rows: _Rows) -> Retrieval:
    return _one_per_identity_and_view(rows, both_ways=False)


def _single_shot_two_way(rows: _Rows) -> Retrieval:
    return _one_per_identity_and_view(rows, both_ways=True)


def _one_per_identity_and_view(rows: _Rows, both_ways: bool) -> Retrieval:
    views = rows.cameras.unique().tolist()
    if len(views) != 2:
        raise ValueError(f"protocol {rows.protocol!r} needs cameras of exactly two views, got {views}")
    ranks, query_index, expected = [], [], []
    for a, b in [views, views[::-1]] if both_ways else [views]:
        shot = _SingleShot(rows, a, b)
        drawn_ranks, drawn_queries = shot.drawings(rows.seed)
        ranks.append(drawn_ranks)
        query_index.append(drawn_queries)
        expected.append(shot.expected_cmc(rows.k))  # (identities with a match, K)
    measured = _measured(rows, torch.cat(query_index), {"first": torch.cat(ranks)})
    means = torch.cat(expected).mean(0).tolist()
    measured.metrics.update({f"expected_recall@{at}": value for at, value in zip(rows.k, means, strict=True)})
    return measured


class _SingleShot:
    """Queries of view a against one image per identity of view b."""

    def __init__(self, rows: _Rows, a: int, b: int) -> None:
        self.queries, self.query_label, self.query_size = self._sorted(rows, a)
        self.gallery, self.gallery_label, self.gallery_size = self._sorted(rows, b)
        self.nearness = rows.space.exact(self.queries, self.gallery)
        self.tie = rows.space.tie

    @staticmethod
    def _sorted(rows: _Rows, view: int) -> tuple[Tensor, Tensor, Tensor]:
        """The view's images by identity, and the identities with their numbers of images."""
        images = (rows.cameras == view).nonzero().flatten()
        images = images[rows.labels[images].argsort(stable=True)]
        return images, *rows.labels[images].unique_consecutive(return_counts=True)

    def drawings(self, seed: int) -> tuple[Tensor, Tensor]:
        """Ranks of the matches, and the queries, of `DRAWS` drawings one after the other."""
        generator = torch.Generator().manual_seed(seed)
        same = self.query_label[:, None] == self.gallery_label
        ranks, queries = [], []
        for _ in range(DRAWS):
            query, gallery = _draw(self.query_size, generator), _draw(self.gallery_size, generator)
            nearness = self.nearness[query[:, None], gallery]
            best = nearness.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
            rivals = ((nearness >= best - self.tie) & ~same).sum(1)
            ranks.append(torch.where(same.any(1), rivals + 1, 0))
            queries.append(self.queries[query])
        return torch.cat(ranks), torch.cat(queries)

    def expected_cmc(self, k: tuple[int, ...]) -> Tensor:
        """The probability of a rank <= K over all drawings, for each identity with a match: float64 (identities, K).

        Given the query and its match, each other identity stands before the match with the share of its images that do,
        independently of the others: their number is Poisson-binomial, computed by convolution up to the largest K.
        """
        answers = []
        for identity, rows in zip(self.query_label, _runs(self.query_size), strict=True):
            own = (self.gallery_label == identity).nonzero().flatten()
            if len(own):
                columns = _runs(self.gallery_size)[int(own)]
                nearness = self.nearness[rows]
                match = nearness[:, columns, None]  # (queries, matches, 1)
                ahead = (nearness[:, None] >= match - self.tie).double().flatten(0, 1)
                share = self._mean_by_identity(ahead)
                share[:, own] = 0
                answers.append(_at_most(share, [at - 1 for at in k]).mean(0))
        return torch.stack(answers) if answers else torch.full((0, len(k)), torch.nan, dtype=torch.float64)

    def _mean_by_identity(self, values: Tensor) -> Tensor:
        identity = torch.arange(len(self.gallery_size), device=values.device).repeat_interleave(self.gallery_size)
        sums = values.new_zeros(len(values), len(self.gallery_size)).index_add_(1, identity, values)
        return sums / self.gallery_size


def _draw(sizes: Tensor, generator: torch.Generator) -> Tensor:
    """One position of each run of the given sizes."""
    uniform = torch.rand(len(sizes), generator=generator, dtype=torch.float64).to(sizes.device)
    return sizes.cumsum(0) - sizes + (uniform * sizes).long()


def _runs(sizes: Tensor) -> list[slice]:
    stops = sizes.cumsum(0).tolist()
    return [slice(stop - size, stop) for stop, size in zip(stops, sizes.tolist(), strict=True)]


def _at_most(probability: Tensor, counts: list[int]) -> Tensor:
    """P(number of successes <= count) of independent trials, float64 (cases, counts); probability (cases, trials)."""
    trials = probability.shape[1]
    number = probability.new_zeros(len(probability), min(max(counts), trials) + 1)
    number[:, 0] = 1
    for p in probability.T[:, :, None]:
        moved = number[:, :-1] * p
        number *= 1 - p
        number[:, 1:] += moved
    reached = number.cumsum(1)
    return torch.stack([reached[:, c] if c < trials else torch.ones_like(reached[:, 0]) for c in counts], dim=1)


PROTOCOLS: dict[str, Callable[[_Rows], Retrieval]] = {
    "all-vs-rest": _all_vs_rest,
    "cuhk03-single-shot": _single_shot,
    "cuhk03-single-shot-two-way": _single_shot_two_way,
    "cuhk03-767-700": _other_cameras,
    "market1501": _other_cameras,
    "market1501-multi-query": _multi_query,
}


def _recall(ranks: Tensor, k: Sequence[int]) -> dict[int, float]:
    matched = ranks[ranks > 0]
    return {at: (matched <= at).double().mean().item() for at in k}


def _checked(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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
