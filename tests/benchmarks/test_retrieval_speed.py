"""Recall@K at the size of Online Products' test set against the plain product by blocks and faiss; some minutes."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from hloss.retrieval.protocols import evaluate
from hloss.retrieval.ranks import first_match_ranks, recall_at_k
from tests.benchmarks.conftest import peak_above_start

K = (1, 10, 100, 1000)
CASE = "60502 x 512, K = 1000"
FLOOR = "full matrix by blocks, once"


@cache
def online_products():
    """Embeddings of as many images and classes, whose Recall@K spread as a trained network's do."""
    generator = torch.Generator().manual_seed(0)
    n, classes, d = 60_502, 11_316, 512
    labels = torch.cat(
        [torch.arange(classes).repeat(2), torch.randint(classes, (n - 2 * classes,), generator=generator)]
    )
    noise = 2 * torch.rand(n, 1, generator=generator) * torch.randn(n, d, generator=generator)
    embeddings = torch.randn(classes, d, generator=generator)[labels] + noise
    return F.normalize(embeddings * torch.arange(1, d + 1) ** -0.5), labels


def full_matrix(embeddings, block):
    blocks = embeddings.split(block)
    similarity = embeddings.new_empty(block, block)
    for rows in blocks:
        for columns in blocks:
            torch.mm(rows, columns.T, out=similarity[: len(rows), : len(columns)])


def faiss_hits(embeddings, labels):
    """Whether each query has a match among its K nearest others, (n, len(K)), by IndexFlatIP with k = 1001."""
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.numpy())
    hits = []
    for rows in torch.arange(len(labels)).split(4096):
        nearest = torch.from_numpy(index.search(embeddings[rows].numpy(), max(K) + 1)[1])
        itself = nearest == rows[:, None]
        match = (labels[nearest] == labels[rows, None]) & ~itself
        place = torch.arange(1, max(K) + 2) - itself.cumsum(1)  # among the others
        hits.append(torch.stack([(match & (place <= at)).any(1) for at in K], dim=1))
    return torch.cat(hits)


def test_recall_against_the_full_matrix_and_faiss(race, record):
    embeddings, labels = online_products()
    found = {}

    def by_faiss():
        found["hits"] = faiss_hits(embeddings, labels)

    sides = {
        FLOOR: lambda: full_matrix(embeddings, 1024),
        "faiss IndexFlatIP, k = 1001": by_faiss,
        "first_match_ranks": lambda: first_match_ranks(embeddings, labels),
    }
    race(CASE, FLOOR, sides, rounds=2)
    ranks = first_match_ranks(embeddings, labels)
    hits = (ranks[:, None] <= torch.tensor(K)) & (ranks > 0)[:, None]
    differ = (hits != found["hits"]).any(1)
    gaps = [deciding_gap(embeddings, labels, int(i), int(ranks[i])) for i in differ.nonzero().flatten()]
    shown = f"{len(gaps)} of {len(ranks)} queries ({100 * len(gaps) / len(ranks):.4f} %)"
    record(
        CASE, "other hits than faiss's", shown, f"deciding similarities differ by at most {max(gaps, default=0):.1e}"
    )
    recalls = ", ".join(f"{100 * value:.1f}" for value in recall_at_k(embeddings, labels, K).values())
    record(CASE, "Recall@1, 10, 100, 1000", f"{recalls} %")
    assert max(gaps, default=0) < 1e-6
    assert len(gaps) <= len(ranks) / 1000


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recall_on_a_gpu_against_the_full_matrix(race):
    embeddings, labels = (part.cuda() for part in online_products())
    sides = {
        FLOOR: lambda: full_matrix(embeddings, 8192),
        "recall_at_k, Euclidean": lambda: recall_at_k(embeddings, labels, K, "euclidean"),
        "every rank and mean average precision": lambda: evaluate("all-vs-rest", embeddings, labels),
        "recall_at_k": lambda: recall_at_k(embeddings, labels, K),
    }
    assert race(f"CUDA, {CASE}", FLOOR, sides, rounds=10).ratio("recall_at_k", FLOOR) <= 1.3


def deciding_gap(embeddings, labels, i, rank):
    """Distance of the first match's similarity from those of the rivals just before and behind it, in float64."""
    similarity = embeddings.double() @ embeddings[i].double()
    same = labels == labels[i]
    rivals = similarity[~same].sort(descending=True).values
    similarity[i] = -torch.inf
    best = similarity[same].max()
    return (rivals[max(rank - 2, 0) : rank] - best).abs().min().item()


def test_memory_of_recall(record):
    grown = peak_above_start("""
import sys
sys.path.insert(0, ".")
from tests.benchmarks.test_retrieval_speed import online_products
from hloss.retrieval.protocols import evaluate
from hloss.retrieval.ranks import first_match_ranks
embeddings, labels = online_products()
import ctypes
ctypes.CDLL("libc.so.6").malloc_trim(0)
# start
first_match_ranks(embeddings, labels)
""")
    record(CASE, "first_match_ranks", f"{grown / 2**20:.0f} MiB", "peak above the embeddings")
    assert grown < 2**30
