"""Ranks, recall and the protocols against a brute force that sorts everything and names each exclusion."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hloss import retrieval
from hloss.retrieval import evaluate, first_match_ranks, recall_at_k


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


def first_match_oracle(embeddings, labels, metric="cosine"):
    """Sort all others by falling similarity, non-matches first among (nearly) equals; look for the first match."""
    ranks = []
    for i, query in enumerate(embeddings):
        similarity = scores(query, embeddings, metric)
        others = [j for j in range(len(labels)) if j != i]
        others.sort(key=lambda j, s=similarity, i=i: (-round(s[j], 9), labels[j] == labels[i]))
        hits = [rank for rank, j in enumerate(others, 1) if labels[j] == labels[i]]
        ranks.append(hits[0] if hits else 0)
    return ranks


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 10_000), classes=st.integers(1, 25))
def test_first_match_ranks_with_ties_and_singletons(n, seed, classes):
    embeddings, labels = gallery_with_ties(n, seed, classes)
    for metric in retrieval.METRICS:
        assert first_match_ranks(embeddings, labels, metric).tolist() == first_match_oracle(embeddings, labels, metric)


def test_recall_counts_the_queries_that_have_a_match():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1, 2])
    assert first_match_ranks(embeddings, labels).tolist() == [2, 3, 2, 2, 0]
    assert recall_at_k(embeddings, labels, k=(1, 2, 3)) == {1: 0.0, 2: 0.75, 3: 1.0}


def test_equal_embeddings_count_against_the_query():
    embeddings = torch.ones(9, 4)
    assert first_match_ranks(embeddings, torch.arange(9) // 3).tolist() == [7] * 9


def test_all_vs_rest_reports_recall_ranks_and_the_unmatched():
    embeddings, labels = gallery_with_ties(60, seed=1, classes=40)
    result = evaluate("all-vs-rest", embeddings, labels, k=(1, 4))
    expected = first_match_oracle(embeddings, labels)
    matched = [rank for rank in expected if rank]
    assert result.ranks.tolist() == expected
    assert result.query_index.tolist() == list(range(60))
    assert (result.n_queries, result.n_unmatched) == (60, expected.count(0))
    assert result.n_unmatched > 0
    assert result.metrics["recall@4"] == pytest.approx(sum(rank <= 4 for rank in matched) / len(matched))


def test_unusable_input_is_refused_by_name():
    embeddings, labels = gallery_with_ties(10, seed=0)
    with pytest.raises(ValueError, match="unknown protocol 'cub', known are all-vs-rest"):
        evaluate("cub", embeddings, labels)
    with pytest.raises(ValueError, match="labels must be integers"):
        first_match_ranks(embeddings, labels[1:])
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        first_match_ranks(embeddings * torch.tensor([[float("nan")], *[[1.0]] * 9]), labels)


def test_the_result_does_not_depend_on_the_block(monkeypatch):
    embeddings, labels = gallery_with_ties(100, seed=3, classes=12)
    expected = first_match_ranks(embeddings, labels)
    monkeypatch.setattr(retrieval, "BLOCK", 16)
    assert torch.equal(first_match_ranks(embeddings, labels), expected)
