"""Embeddings with ties, exclusions and unmatched queries, and a brute force that sorts all similarities."""

import itertools

import torch
from torch.nn import functional as F


def gallery_with_ties(n, seed, classes=6):
    """Embeddings of norm 3 or 5 on an integer grid (cosines tie), in float64, some classes with a single image."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[3, 0, 0], [0, 3, 0], [0, 0, 3], [3, 4, 0], [0, 3, 4], [4, 0, 3]], dtype=torch.float64)
    embeddings = corners[torch.randint(len(corners), (n,), generator=generator)]
    embeddings = embeddings * (2 * torch.randint(2, (n, 1), generator=generator) - 1)
    return embeddings, torch.randint(classes, (n,), generator=generator)


def scores(query, embeddings, metric):
    if metric == "cosine":
        return [float(query @ other / query.norm() / other.norm()) for other in embeddings]
    return [-float((query - other).norm()) for other in embeddings]


def ranks_of(similarity, match, ignored):
    """Ranks of the matches in a sorting by falling similarity, rivals first among (nearly) equals."""
    ranked = [j for j in range(len(similarity)) if not ignored[j]]
    ranked.sort(key=lambda j: (-round(float(similarity[j]), 9), bool(match[j])))
    return [rank for rank, j in enumerate(ranked, 1) if match[j]]


def first_match_oracle(embeddings, labels, metric="cosine"):
    ranks = []
    for i, query in enumerate(embeddings):
        itself = torch.arange(len(labels)) == i
        hits = ranks_of(scores(query, embeddings, metric), (labels == labels[i]) & ~itself, itself)
        ranks.append(hits[0] if hits else 0)
    return ranks


def precision_oracle(ranks):
    """The four precisions of one query from the ranks of its matches, each as its definition is printed."""
    n = len(ranks)
    trapezoid, old_recall, old_precision = 0.0, 0.0, 1.0
    for rank in range(1, max(ranks) + 1):  # the Oxford buildings' walk down the ranking
        hits = sum(r <= rank for r in ranks)
        recall, precision = hits / n, hits / rank
        trapezoid += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    return {
        "map": sum(sum(r <= rank for r in ranks) / rank for rank in ranks) / n,
        "map_trapezoid": trapezoid,
        "r_precision": sum(r <= n for r in ranks) / n,
        "map@r": sum(sum(r <= i for r in ranks) / i for i in range(1, n + 1) if i in ranks) / n,
    }


def first_ranks_of(similarity, labels):
    """First-match ranks from the matrix of all similarities."""
    same = labels[:, None] == labels
    match = same & ~torch.eye(len(labels), dtype=torch.bool)
    best = similarity.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
    return torch.where(match.any(1), ((similarity >= best) & ~same).sum(1) + 1, 0)


def exact_ranks(embeddings, labels, metric, copies=None):
    """First-match ranks from float64 similarities of the distinct embeddings, `copies` telling which each image is."""
    x = embeddings.double()
    x = F.normalize(x) if metric == "cosine" else x
    similarity = x @ x.T if metric == "cosine" else -(x[:, None] - x).square().sum(2)
    similarity = (similarity + similarity.T) / 2
    return first_ranks_of(similarity if copies is None else similarity[copies][:, copies], labels)


def street(seed, identities=25, n=250, ties=False):
    """Queries, gallery, junk, distractors and a pool over six cameras; some queries have no match."""
    generator = torch.Generator().manual_seed(seed)
    embeddings, labels = gallery_with_ties(n, seed, identities)
    if not ties:
        embeddings = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    roles = torch.randint(5, (n,), generator=generator)
    cameras = torch.randint(6, (n,), generator=generator)
    pool = embeddings[roles == 0].repeat(2, 1)  # two more images of each query's identity and camera
    embeddings = torch.cat([embeddings, pool + 0.1 * torch.randn(pool.shape, generator=generator).double()])
    labels = torch.cat([labels, labels[roles == 0].repeat(2)])
    cameras = torch.cat([cameras, cameras[roles == 0].repeat(2)])
    names = ["query", "gallery", "gallery", "junk", "distractor"]
    return embeddings, labels, cameras, [names[r] for r in roles] + ["pool"] * len(pool)


def views(seed, identities=12, most=3, missing=True):
    """Up to `most` images per identity and view; one identity lacks the second view, another the first."""
    generator = torch.Generator().manual_seed(seed)
    labels, cameras = [], []
    for identity, view in itertools.product(range(identities), (0, 1)):
        if not (missing and (identity, view) in ((3, 1), (7, 0))):
            count = int(torch.randint(1, most + 1, (1,), generator=generator))
            labels += [identity] * count
            cameras += [view] * count
    embeddings = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64)
    embeddings = embeddings + 2 * torch.randn(identities, 4, generator=generator, dtype=torch.float64)[labels]
    return embeddings, torch.tensor(labels), torch.tensor(cameras)
