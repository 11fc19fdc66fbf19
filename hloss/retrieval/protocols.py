"""Evaluation protocols by name. A protocol defines the queries, their galleries, and the metrics that are computed.

`hloss.retrieval.similarity` computes the similarities, and `hloss.retrieval.ranks` defines how ties count. Queries
without a match are counted separately.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import checked_labels, exact_products, one_of
from hloss.retrieval.ranks import checked_k, match_ranks, match_scores, recall_fractions
from hloss.retrieval.similarity import SimilaritySpace, checked_set

ROLES = ("both", "query", "gallery", "junk", "distractor", "pool")  # The use of an image in a protocol.
PAIRS, GPU_PAIRS = 2**22, 2**25  # Number of float64 pairs in a block.
GPU_LANES = 32  # Number of copies of the counters of `match_ranks`.
DRAWS = 100  # Number of random draws of the single-shot protocols.


@dataclass(frozen=True)
class Retrieval:
    """Result of a protocol. Metrics are fractions in [0, 1], means over the queries that have a match.

    `query_index[i]` is the row of the embeddings of query i, and `ranks[i]` is the rank (from 1) of its first match; 0
    means no match. The metrics are `recall@K` (the CMC at K in re-identification) and, except for the single-shot
    protocols,

    - `map`: mean average precision as in scikit-learn. The average precision of a query is the mean over its matches of
      (number of matches up to this one) / (rank of this one);
    - `map_trapezoid`: the same, but each precision is averaged with the precision at the rank just before the match
      (the trapezoid rule of the Oxford buildings benchmark); its values are not comparable with `map`;
    - `r_precision`: the fraction of matches among the R nearest, for a query with R matches;
    - `map@r`: the sum of the precisions at the matches among the R nearest, divided by R (Musgrave et al. 2020).
    """

    protocol: str
    ranks: Tensor
    query_index: Tensor
    metrics: dict[str, float]
    n_queries: int
    n_unmatched: int


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
    """Evaluate retrieval by a named protocol.

    Args:
        protocol: "all-vs-rest": every image queries all others (CUB-200-2011, Online Products).
            "cuhk03-single-shot": the old protocol of CUHK03. In each of 100 random draws, the queries are one image
            per identity of the first view (the lower camera), and the gallery is one image per identity of the
            second view. The metrics are means over the draws; `expected_recall@K` is the exact expectation.
            "cuhk03-single-shot-two-way": the same, plus queries of the second view.
            "cuhk03-767-700": the new protocol of CUHK03. Images of the query's identity and camera are ignored.
            "market1501": as "cuhk03-767-700". Images of role junk are ignored, and distractors never match.
            "query-gallery": as "market1501", but without cameras. A query of role both is not compared with itself.
            "market1501-multi-query": as "market1501", but a query is the mean of the pool images of its identity
            and camera (normalised for the cosine). Metrics `max_...` use the maximum per dimension instead of the mean.
        embeddings: floating-point (n, d).
        labels: integer identities or classes (n,).
        k: the values of K in `recall@K`.
        metric: "cosine", or "euclidean" without normalisation.
        cameras: integers (n,), for all protocols except all-vs-rest and query-gallery. The single-shot protocols need
            exactly two different cameras.
        roles: role of each image, n strings, for all protocols except all-vs-rest and single-shot: "query", "gallery",
            "both", "junk" (ignored), "distractor" (in the gallery, never a match) or "pool" (used only for multiple
            queries).
        seed: seed of the random draws.

    Raises:
        ValueError: an argument is unknown, missing or wrong, or there is no query.

    Example:
        >>> evaluate("all-vs-rest", torch.eye(4), torch.tensor([0, 0, 0, 1])).metrics["recall@4"]
        1.0
    """
    one_of("protocol", protocol, PROTOCOLS)
    k = checked_k(k)
    embeddings, labels = checked_set(embeddings, labels, metric)
    rows = _Rows(protocol, SimilaritySpace(embeddings, metric), labels, k, cameras, roles, seed)
    with torch.no_grad(), exact_products(embeddings.device):
        return PROTOCOLS[protocol](rows)


@dataclass(frozen=True)
class _Rows:
    """The rows of a split, and the arguments of `evaluate`."""

    protocol: str
    space: SimilaritySpace
    labels: Tensor
    k: tuple[int, ...]
    given_cameras: Tensor | None
    given_roles: Sequence[str] | None
    seed: int

    @property
    def cameras(self) -> Tensor:
        if self.given_cameras is None:
            raise ValueError(f"cameras must be given for protocol {self.protocol!r}: got None")
        return checked_labels("cameras", self.given_cameras, len(self.labels)).to(self.labels.device)

    def of_role(self, *roles: str) -> Tensor:
        """Return the indices of the rows with these roles."""
        given = self.given_roles
        if given is None:
            raise ValueError(f"roles must be given for protocol {self.protocol!r}: got None")
        if len(given) != len(self.labels) or not set(given) <= set(ROLES):
            allowed = f"one of {', '.join(ROLES)} for each of {len(self.labels)} rows"
            raise ValueError(f"roles must be {allowed}: got {len(given)} roles, {', '.join(sorted(set(given)))}")
        found = torch.tensor([role in roles for role in given]).nonzero().flatten()
        if not len(found):
            raise ValueError(f"protocol {self.protocol!r} needs rows of role {' or '.join(roles)}: got none")
        return found.to(self.labels.device)


def _all_vs_rest(rows: _Rows) -> Retrieval:
    return _query_gallery(replace(rows, given_roles=["both"] * len(rows.labels)), with_cameras=False)


def _query_gallery(rows: _Rows, with_cameras: bool) -> Retrieval:
    """Rank the gallery without images of the query's identity and camera, or without the query itself."""
    queries = rows.of_role("query", "both")
    vectors = rows.space.exact_vectors(queries)
    # Every image gets a different camera, so that only the query itself is ignored.
    one_each = torch.arange(len(rows.labels), device=rows.labels.device)
    return _without_camera(rows, queries, vectors, rows.cameras if with_cameras else one_each)


def _multi_query(rows: _Rows) -> Retrieval:
    """Query by the mean, and by the maximum, of the pool images of the query's identity and camera."""
    queries, pool = rows.of_role("query", "both"), rows.of_role("pool")
    vectors, cameras = rows.space.exact_vectors(pool), rows.cameras
    pooled = (rows.labels[queries, None] == rows.labels[pool]) & (cameras[queries, None] == cameras[pool])
    if without := (~pooled.any(1)).sum().item():
        raise ValueError(
            f"roles: {without} of {len(queries)} queries have no pool image with the same identity and camera; "
            "prepare the dataset with its images for multiple queries (Market-1501: gt_bbox)"
        )
    members, sizes = vectors[pooled.nonzero()[:, 1]], pooled.sum(1)  # Grouped by query.
    mean, largest = (torch.segment_reduce(members, by, lengths=sizes, unsafe=True) for by in ("mean", "max"))
    if rows.space.metric == "cosine":
        mean, largest = F.normalize(mean), F.normalize(largest)
    measured = _without_camera(rows, queries, mean, cameras)
    of_maximum = _without_camera(rows, queries, largest, cameras).metrics
    measured.metrics.update({f"max_{name}": value for name, value in of_maximum.items()})
    return measured


def _without_camera(rows: _Rows, queries: Tensor, vectors: Tensor, cameras: Tensor) -> Retrieval:
    """Rank the gallery without images of the query's identity and camera, by the given vectors of the queries."""
    labels, space, gallery = rows.labels, rows.space, rows.of_role("gallery", "distractor", "both")
    known = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    known[rows.of_role("gallery", "both")] = True  # A distractor never matches.
    pairs, lanes = (GPU_PAIRS, GPU_LANES) if vectors.is_cuda else (PAIRS, 1)
    gallery_vectors, parts = space.exact_vectors(gallery), []
    for block in torch.arange(len(vectors), device=vectors.device).split(max(pairs // len(gallery), 1)):
        query, of_block = queries[block, None], vectors[block]
        own = (labels[query] == labels[gallery]) & known[gallery]
        seen = own & (cameras[query] == cameras[gallery])
        edge = partial(space.edge, squares=space.squares_of(of_block)[:, None])
        ranks = match_ranks(space.products(of_block, gallery_vectors), own & ~seen, seen, edge, lanes)
        parts.append(match_scores(ranks))
    return _measured(rows, queries, {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]})


def _measured(rows: _Rows, queries: Tensor, scores: dict[str, Tensor]) -> Retrieval:
    ranks = scores.pop("first")
    metrics = {f"recall@{at}": value for at, value in recall_fractions(ranks, rows.k).items()}
    metrics |= {name: score[ranks > 0].mean().item() for name, score in scores.items()}
    return Retrieval(rows.protocol, ranks, queries.cpu(), metrics, len(ranks), int((ranks == 0).sum()))


def _cuhk03_single_shot(rows: _Rows, both_ways: bool) -> Retrieval:
    views = rows.cameras.unique().tolist()
    if len(views) != 2:
        raise ValueError(f"cameras must have exactly two different values for protocol {rows.protocol!r}: got {views}")
    shots = [_SingleShot(rows, a, b) for a, b in ([views, views[::-1]] if both_ways else [views])]
    ranks, query_index = zip(*(shot.drawings(rows.seed) for shot in shots), strict=True)
    measured = _measured(rows, torch.cat(query_index), {"first": torch.cat(ranks).cpu()})
    means = torch.cat([shot.expected_cmc(rows.k) for shot in shots]).mean(0).tolist()
    measured.metrics.update({f"expected_recall@{at}": value for at, value in zip(rows.k, means, strict=True)})
    return measured


class _SingleShot:
    """Queries of view a against one image per identity of view b."""

    def __init__(self, rows: _Rows, a: int, b: int) -> None:
        self.queries, query_label, self.query_identity, self.query_size = self._sorted(rows, a)
        self.gallery, gallery_label, self.gallery_identity, self.gallery_size = self._sorted(rows, b)
        self.similarity = rows.space.exact(self.queries, self.gallery)
        self.edge = rows.space.edge(self.similarity, rows.space.squares[self.queries, None])
        self.same = query_label[:, None] == gallery_label
        self.pairs = GPU_PAIRS if self.same.is_cuda else PAIRS

    @staticmethod
    def _sorted(rows: _Rows, view: int) -> tuple[Tensor, ...]:
        """Return the view's images sorted by identity, the identities, the identity of each image, and their sizes."""
        images = (rows.cameras == view).nonzero().flatten()
        images = images[rows.labels[images].argsort(stable=True)]
        return images, *rows.labels[images].unique_consecutive(return_inverse=True, return_counts=True)

    def drawings(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the rank of the match and the query, for each query of `DRAWS` random draws."""
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.cat([self.query_size, self.gallery_size])
        uniform = torch.rand(DRAWS, len(sizes), generator=generator, dtype=torch.float64).to(sizes.device)
        drawn = (uniform * sizes).long().split([len(self.query_size), len(self.gallery_size)], dim=1)
        sides = zip(drawn, (self.query_size, self.gallery_size), strict=True)
        queries, gallery = (of_side + size.cumsum(0) - size for of_side, size in sides)
        at_once = max(self.pairs // self.same.numel(), 1)
        ranks = [self._ranks(*block) for block in zip(queries.split(at_once), gallery.split(at_once), strict=True)]
        return torch.cat(ranks).flatten(), self.queries[queries].flatten()

    def _ranks(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Return the ranks (draws, query identities) of the matches, for the drawn images of each identity."""
        pairs = queries[:, :, None], gallery[:, None]
        edge = self.edge[pairs].masked_fill(~self.same, -torch.inf).amax(2, keepdim=True)
        rivals = ((self.similarity[pairs] >= edge) & ~self.same).sum(2)
        return torch.where(self.same.any(1), rivals + 1, 0)

    def expected_cmc(self, k: tuple[int, ...]) -> Tensor:
        """Return P(rank <= K) over all draws for each identity with a match, float64 (identities, K).

        Each query image with one of its matches is a case. In a case, every other identity has one random image in the
        gallery. The image precedes the match with the probability p, the share of the identity's images that are at
        least as similar. The number of preceding images is Poisson-binomial; convolution gives its probabilities up to
        the largest K.
        """
        cases = self.same[self.query_identity][:, self.gallery_identity].nonzero()  # Cases, sorted by query.
        parts = []
        for query, match in (block.unbind(1) for block in cases.split(max(self.pairs // len(self.gallery), 1))):
            similarity = self.similarity[query]
            ahead = similarity >= self.edge[query, match, None]
            share = similarity.new_zeros(len(query), len(self.gallery_size))
            share.index_add_(1, self.gallery_identity, ahead.double()).div_(self.gallery_size)
            share.scatter_(1, self.gallery_identity[match, None], 0)
            parts.append(_at_most(share, [at - 1 for at in k]))
        cmc = torch.cat(parts).cpu()
        n_cases = self.query_size * (self.same * self.gallery_size).sum(1)
        means = [of_identity.mean(0) for of_identity in cmc.split(n_cases.tolist()) if len(of_identity)]
        return torch.stack(means) if means else cmc


def _at_most(probability: Tensor, counts: list[int]) -> Tensor:
    """Return P(successes <= count), (cases, counts), of independent trials with `probability` (cases, trials)."""
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
    "cuhk03-single-shot": partial(_cuhk03_single_shot, both_ways=False),
    "cuhk03-single-shot-two-way": partial(_cuhk03_single_shot, both_ways=True),
    "cuhk03-767-700": partial(_query_gallery, with_cameras=True),
    "market1501": partial(_query_gallery, with_cameras=True),
    "query-gallery": partial(_query_gallery, with_cameras=False),
    "market1501-multi-query": _multi_query,
}
