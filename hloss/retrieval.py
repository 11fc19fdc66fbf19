"""Retrieval on embeddings: the rank of each query's first match, Recall@K, and the evaluation protocols by name.

Nearness is the cosine (`metric="cosine"`), or the Euclidean distance of the raw embeddings (`metric="euclidean"`:
lifted structure's own evaluation). Ties count against the query: a rival exactly as near as the match stands before it.
A query without any match has rank 0 and is reported, never counted as right or wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


@dataclass(frozen=True)
class Retrieval:
    """What a protocol measured. Metrics are fractions in [0, 1], means over the queries that have a match.

    `ranks[i]` is the 1-based rank of the first match of query `query_index[i]` (an index into the embeddings given),
    0 where the gallery holds no match.
    """

    protocol: str
    ranks: Tensor
    query_index: Tensor
    metrics: dict[str, float]
    n_queries: int
    n_unmatched: int


def recall_at_k(
    embeddings: Tensor, labels: Tensor, k: tuple[int, ...] = (1, 10, 100, 1000), metric: str = "cosine"
) -> dict[int, float]:
    """Recall@K, all-vs-rest: the fraction of queries with a match among their K nearest others, for each K.

    Args as `first_match_ranks`. Queries without any match (classes of one image) are left out of the fraction.
    """
    return _recall(first_match_ranks(embeddings, labels, metric), k)


def first_match_ranks(embeddings: Tensor, labels: Tensor, metric: str = "cosine") -> Tensor:
    """Rank of the first image of the query's class among all others, for each image; int64 of shape (n,), 0 = no match.

    embeddings (n, d) floating, labels (n,) integers. The query itself is never in its ranking; 1 is the best rank.
    """
    embeddings, labels = _checked(embeddings, labels)
    nearness = _nearness(embeddings, metric)
    ranks = torch.empty(len(labels), dtype=torch.int64)
    for rows in torch.arange(len(labels)).split(BLOCK):
        similarity = nearness(rows)
        same = labels[rows, None] == labels
        match = same.clone()
        match[torch.arange(len(rows)), rows] = False
        best = similarity.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        rivals = ((similarity >= best) & ~same).sum(1)
        ranks[rows] = torch.where(match.any(1), rivals + 1, 0)
    return ranks


def evaluate(
    protocol: str, embeddings: Tensor, labels: Tensor, k: tuple[int, ...] = (1, 2, 4, 8, 16, 32), metric: str = "cosine"
) -> Retrieval:
    """Measure retrieval by a named protocol (`PROTOCOLS`)."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}, known are {', '.join(PROTOCOLS)}")
    ranks = first_match_ranks(embeddings, labels, metric)
    recall = {f"recall@{at}": value for at, value in _recall(ranks, k).items()}
    return Retrieval(protocol, ranks, torch.arange(len(ranks)), recall, len(ranks), int((ranks == 0).sum()))


PROTOCOLS = ("all-vs-rest",)
METRICS = ("cosine", "euclidean")


def _recall(ranks: Tensor, k: tuple[int, ...]) -> dict[int, float]:
    matched = ranks[ranks > 0]
    return {at: (matched <= at).double().mean().item() for at in k}


def _nearness(embeddings: Tensor, metric: str) -> Callable[[Tensor], Tensor]:
    """The function from row indices to their (rows, n) matrix of nearness to all embeddings, larger is nearer."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}, known are {', '.join(METRICS)}")
    if metric == "cosine":
        embeddings = F.normalize(embeddings)
        return lambda rows: embeddings[rows] @ embeddings.T
    half_squares = embeddings.square().sum(1) / 2
    return lambda rows: embeddings[rows] @ embeddings.T - half_squares  # falls with the distance, row by row


def _checked(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating of shape (n, d), got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    labels = torch.as_tensor(labels, device=embeddings.device)
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({len(embeddings)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if not embeddings.isfinite().all():
        rows = (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()
        raise ValueError(f"embeddings must be finite, rows {rows[:10]} ({len(rows)} in all) hold NaN or infinity")
    return embeddings.detach(), labels
