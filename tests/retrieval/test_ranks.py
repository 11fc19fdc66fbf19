"""Ranks of the matches against brute force, by blocks as on a CPU and by strips as on a GPU."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hloss.retrieval import cuda_ranks, ranks
from hloss.retrieval.ranks import first_match_ranks, match_ranks, recall_at_k
from hloss.retrieval.similarity import METRICS, TIE
from tests.retrieval.oracles import exact_ranks, first_match_oracle, first_ranks_of, gallery_with_ties, ranks_of

both_ways = pytest.mark.parametrize("way", ["blocks", "strips"])


def ranks_by(way, rows, embeddings, labels, metric="cosine"):
    """First-match ranks by blocks or strips of so many rows, on the CPU."""
    devices = ("cpu",) if way == "strips" else ()
    strips = mock.patch.object(cuda_ranks, "STRIP", rows * len(labels))
    with strips, mock.patch.multiple(ranks, BLOCK=rows, STRIP_DEVICES=devices):
        return first_match_ranks(embeddings, labels, metric)


@settings(max_examples=40)
@given(n=st.integers(1, 40), seed=st.integers(0, 10_000), classes=st.integers(1, 25), rows=st.integers(1, 50))
def test_first_match_ranks_with_ties_and_singletons(n, seed, classes, rows):
    embeddings, labels = gallery_with_ties(n, seed, classes)
    for metric in METRICS:
        expected = first_match_oracle(embeddings, labels, metric)
        assert first_match_ranks(embeddings, labels, metric).tolist() == expected
        assert ranks_by("strips", rows, embeddings.float(), labels, metric).tolist() == expected


def test_recall_counts_the_queries_that_have_a_match():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1, 2])
    assert first_match_ranks(embeddings, labels).tolist() == [2, 3, 2, 2, 0]
    assert recall_at_k(embeddings, labels, k=(1, 2, 3)) == {1: 0.0, 2: 0.75, 3: 1.0}


@both_ways
def test_equal_embeddings_count_against_the_query(way):
    embeddings = torch.ones(9, 4)
    assert ranks_by(way, 4, embeddings, torch.arange(9) // 3).tolist() == [7] * 9


@both_ways
@pytest.mark.parametrize("rows", [16, 1024])
@pytest.mark.parametrize(("metric", "scaled"), [("cosine", False), ("cosine", True), ("euclidean", False)])
def test_copies_under_other_labels_tie_wherever_their_blocks_are(way, rows, metric, scaled):
    """Copies of a query's best match stand before it, although other products computed their similarities."""
    generator = torch.Generator().manual_seed(0)
    n, distinct = (400, 130) if rows == 16 else (2500, 800)
    images = torch.randn(distinct, 67, generator=generator)
    copies, labels = torch.randint(distinct, (2, n), generator=generator)
    labels %= n // 4
    embeddings = images[copies] * (2.0 ** (torch.arange(n) % 7)[:, None] if scaled else 1)
    expected = exact_ranks(images, labels, metric, copies)
    assert torch.equal(ranks_by(way, rows, embeddings, labels, metric), expected)


@both_ways
@pytest.mark.parametrize("metric", METRICS)
def test_rounding_decides_nothing_among_nearly_equal_embeddings(way, metric):
    """Of a collapsed network: many similarities differ by less than the error of float32 products."""
    generator = torch.Generator().manual_seed(0)
    embeddings = 1 + 1e-3 * torch.randn(300, 24, generator=generator)
    labels = torch.randint(60, (300,), generator=generator)
    expected = exact_ranks(embeddings, labels, metric)
    assert torch.equal(ranks_by(way, 64, embeddings, labels, metric), expected)
    plain = F.normalize(embeddings)
    assert metric == "euclidean" or (first_ranks_of(plain @ plain.T, labels) != expected).sum() > 10


@both_ways
@pytest.mark.parametrize("sizes", [[500, 300, 200, 1], [5] * 200, [1] * 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_and_small_classes_in_any_order_and_precision(way, sizes, dtype):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    labels = 5 - 3 * labels[torch.randperm(len(labels), generator=generator)]
    embeddings = torch.randn(len(labels), 9, generator=generator).to(dtype)
    for metric in METRICS:
        expected = exact_ranks(embeddings, labels, metric)
        for rows in (128, 1024):
            assert torch.equal(ranks_by(way, rows, embeddings, labels, metric), expected)


def test_recall_equals_faiss():
    faiss = pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(800, (3000,), generator=generator)
    embeddings = torch.randn(800, 64, generator=generator)[labels] + torch.randn(3000, 64, generator=generator)
    embeddings = F.normalize(embeddings)
    index = faiss.IndexFlatIP(64)
    index.add(embeddings.numpy())
    nearest = torch.from_numpy(index.search(embeddings.numpy(), 101)[1])
    itself = nearest == torch.arange(3000)[:, None]
    assert itself.any(1).all()
    others = nearest[~itself].view(3000, 100)
    hit = (labels[others] == labels[:, None]).cumsum(1) > 0
    matched = first_match_ranks(embeddings, labels) > 0
    recall = recall_at_k(embeddings, labels, (1, 10, 100))
    assert 0.2 < recall[1] < recall[100] < 1
    for at, value in recall.items():
        assert value == pytest.approx(hit[matched, at - 1].double().mean().item(), abs=1 / 3000)


@pytest.mark.parametrize("lanes", [1, 3, 32, 1000])
def test_ranks_of_all_matches_are_those_of_a_sort(lanes):
    """Similarities on a coarse grid, so that most are tied; some queries have no match, some no rival."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(12, (40, 150), generator=generator).double() / 12
    kind = torch.randint(10, similarity.shape, generator=generator)  # 0: match, 1: ignored
    kind[0], kind[1], kind[2] = 5, kind[1].clamp(max=1), 1
    kind[1, 20:] = 1
    found = match_ranks(similarity, kind == 0, kind == 1, lambda s: s - TIE, lanes)
    for i, row in enumerate(found.tolist()):
        expected = ranks_of(similarity[i], kind[i] == 0, kind[i] == 1)
        assert row == expected + [0] * (found.shape[1] - len(expected))
