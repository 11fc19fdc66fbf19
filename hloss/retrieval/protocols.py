"""The evaluation protocols by name: who queries whom, what is left out; their Recall@K and average precision.

All-vs-rest (CUB-200-2011, Online Products), the single-shot and the 767/700 protocol of CUHK03, single and multiple
queries of Market-1501. Similarity, ties and exactness are those of `hloss.retrieval.ranks`. A query without any match
is reported, never counted as right or wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import exact_products
from hloss.retrieval.ranks import SimilaritySpace, checked_embeddings, match_ranks, match_scores, recall_fractions

ROLES = ("both", "query", "gallery", "junk", "distractor", "pool")  # what an image is for, where a protocol asks
PAIRS, GPU_PAIRS = 2**22, 2**25  # held at once in float64
GPU_LANES = 32  # of the counters of `match_ranks`
DRAWS = 100  # of the single-shot protocols


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
    embeddings, labels = checked_embeddings(embeddings, labels)
    rows = _Rows(protocol, SimilaritySpace(embeddings, metric), labels, tuple(k), cameras, roles, seed)
    with torch.no_grad(), exact_products(embeddings.device):
        return PROTOCOLS[protocol](rows)


@dataclass(frozen=True)
class _Rows:
    """The rows of a split and what a protocol asks about them."""

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
            raise ValueError(f"protocol {self.protocol!r} needs cameras, one integer per embedding")
        cameras = torch.as_tensor(self.given_cameras, device=self.labels.device)
        if cameras.shape != self.labels.shape or cameras.is_floating_point():
            raise ValueError(
                f"cameras must be integers of shape ({len(self.labels)},), got {cameras.dtype} {tuple(cameras.shape)}"
            )
        return cameras

    @cached_property
    def role_codes(self) -> Tensor:
        """The place in `ROLES` of each row's role."""
        if self.given_roles is None:
            raise ValueError(f"protocol {self.protocol!r} needs roles, one of {', '.join(ROLES)} per embedding")
        if len(self.given_roles) != len(self.labels) or not set(self.given_roles) <= set(ROLES):
            raise ValueError(
                f"roles must be {len(self.labels)} of {', '.join(ROLES)}, "
                f"got {len(self.given_roles)} of {', '.join(sorted(set(self.given_roles)))}"
            )
        code = {role: i for i, role in enumerate(ROLES)}
        return torch.tensor([code[role] for role in self.given_roles])

    def of_role(self, *roles: str) -> Tensor:
        """Indices of the rows of these roles."""
        wanted = torch.tensor([ROLES.index(role) for role in roles])
        found = torch.isin(self.role_codes, wanted).nonzero().flatten()
        if not len(found):
            raise ValueError(f"protocol {self.protocol!r} needs rows of role {' or '.join(roles)}, there are none")
        return found.to(self.labels.device)


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
    members, sizes = vectors[pooled.nonzero()[:, 1]], pooled.sum(1)  # query after query
    mean, largest = (torch.segment_reduce(members, by, lengths=sizes, unsafe=True) for by in ("mean", "max"))
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
    space: SimilaritySpace,
    queries: Tensor,
    gallery: Tensor,
    match_and_ignored: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """`match_scores` of query vectors against gallery vectors, by blocks of queries."""
    pairs, lanes = (GPU_PAIRS, GPU_LANES) if queries.is_cuda else (PAIRS, 1)
    blocks = torch.arange(len(queries), device=queries.device).split(max(pairs // len(gallery), 1))
    parts = []
    for block in blocks:
        similarity = space.products(queries[block], gallery)
        ranks = match_ranks(similarity, *match_and_ignored(block), space.tie, lanes)
        parts.append(match_scores(ranks))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _measured(rows: _Rows, queries: Tensor, scores: dict[str, Tensor]) -> Retrieval:
    ranks = scores.pop("first")
    metrics = {f"recall@{at}": value for at, value in recall_fractions(ranks, rows.k).items()}
    metrics |= {name: score[ranks > 0].mean().item() for name, score in scores.items()}
    return Retrieval(rows.protocol, ranks, queries.cpu(), metrics, len(ranks), int((ranks == 0).sum()))


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
    measured = _measured(rows, torch.cat(query_index), {"first": torch.cat(ranks).cpu()})
    means = torch.cat(expected).mean(0).tolist()
    measured.metrics.update({f"expected_recall@{at}": value for at, value in zip(rows.k, means, strict=True)})
    return measured


class _SingleShot:
    """Queries of view a against one image per identity of view b."""

    def __init__(self, rows: _Rows, a: int, b: int) -> None:
        self.queries, self.query_label, self.query_size = self._sorted(rows, a)
        self.gallery, self.gallery_label, self.gallery_size = self._sorted(rows, b)
        self.similarity = rows.space.exact(self.queries, self.gallery)
        self.tie = rows.space.tie
        self.same = self.query_label[:, None] == self.gallery_label  # by identity of either view
        self.pairs = GPU_PAIRS if self.same.is_cuda else PAIRS

    @staticmethod
    def _sorted(rows: _Rows, view: int) -> tuple[Tensor, Tensor, Tensor]:
        """The view's images by identity, and the identities with their numbers of images."""
        images = (rows.cameras == view).nonzero().flatten()
        images = images[rows.labels[images].argsort(stable=True)]
        return images, *rows.labels[images].unique_consecutive(return_counts=True)

    def drawings(self, seed: int) -> tuple[Tensor, Tensor]:
        """Ranks of the matches, and the queries, of `DRAWS` drawings one after the other."""
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.cat([self.query_size, self.gallery_size])
        uniform = torch.rand(DRAWS, len(sizes), generator=generator, dtype=torch.float64).to(sizes.device)
        drawn = (uniform * sizes).long().split([len(self.query_size), len(self.gallery_size)], dim=1)
        queries, gallery = drawn[0] + _starts(self.query_size), drawn[1] + _starts(self.gallery_size)
        at_once = max(self.pairs // self.same.numel(), 1)
        ranks = [self._ranks(*block) for block in zip(queries.split(at_once), gallery.split(at_once), strict=True)]
        return torch.cat(ranks).flatten(), self.queries[queries].flatten()

    def _ranks(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Ranks of the matches, given a query and a gallery image of each identity: (drawings, query identities)."""
        similarity = self.similarity[queries[:, :, None], gallery[:, None]]
        best = similarity.masked_fill(~self.same, -torch.inf).amax(2, keepdim=True)
        rivals = ((similarity >= best - self.tie) & ~self.same).sum(2)
        return torch.where(self.same.any(1), rivals + 1, 0)

    def expected_cmc(self, k: tuple[int, ...]) -> Tensor:
        """The probability of a rank <= K over all drawings, for each identity with a match: float64 (identities, K).

        Given the query and its match, each other identity stands before the match with the share of its images that do,
        independently of the others: their number is Poisson-binomial, computed by convolution up to the largest K.
        """
        query_identity, gallery_identity = _runs(self.query_size), _runs(self.gallery_size)
        cases = self.same[query_identity][:, gallery_identity].nonzero()  # query and match, query after query
        parts = []
        for query, match in (block.unbind(1) for block in cases.split(max(self.pairs // len(self.gallery), 1))):
            similarity = self.similarity[query]
            ahead = similarity >= similarity.gather(1, match[:, None]) - self.tie
            share = similarity.new_zeros(len(query), len(self.gallery_size))
            share.index_add_(1, gallery_identity, ahead.double()).div_(self.gallery_size)
            share.scatter_(1, gallery_identity[match, None], 0)
            parts.append(_at_most(share, [at - 1 for at in k]))
        cmc = torch.cat(parts).cpu()
        n_cases = self.query_size * (self.same * self.gallery_size).sum(1)
        means = [of_identity.mean(0) for of_identity in cmc.split(n_cases.tolist()) if len(of_identity)]
        return torch.stack(means) if means else cmc


def _starts(sizes: Tensor) -> Tensor:
    """Where each run of the given sizes starts."""
    return sizes.cumsum(0) - sizes


def _runs(sizes: Tensor) -> Tensor:
    """The number of the run that each position lies in, of runs of the given sizes."""
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)


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
