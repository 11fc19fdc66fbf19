"""Retrieval on a GPU: the ranks and neighbors of the CPU at any global precision, with few synchronisations."""

import pytest
import torch

from hloss.retrieval import cuda_ranks
from hloss.retrieval.neighbors import neighbors
from hloss.retrieval.protocols import PROTOCOLS, evaluate
from hloss.retrieval.ranks import first_match_ranks
from hloss.retrieval.similarity import METRICS
from tests.helpers.gpu_waits import counted_waits
from tests.retrieval.oracles import gallery_with_ties, street, views

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random_classes(n=3000, d=64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(n // 5, (n,), generator=generator)
    centres = torch.randn(n // 5, d, generator=generator)
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def copies(n=3000):
    """Copies of few embeddings under many labels: a query's first match is tied with rivals."""
    embeddings, labels = random_classes(n)
    return embeddings[torch.arange(n) % 700], labels


def collapsed(n=3000):
    """Similarities that differ by less than the error of float32 products."""
    embeddings, labels = random_classes(n)
    return 1 + 1e-3 * embeddings, labels


def large_classes(n=3000):
    embeddings, _ = random_classes(n)
    return embeddings, torch.arange(n) % 3


CASES = [random_classes, copies, collapsed, large_classes, lambda: gallery_with_ties(2000, 0, 700)]
NAMES = ["random", "copies", "collapsed", "large classes", "ties"]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("strip", [2**18, cuda_ranks.STRIP])
def test_ranks_are_those_of_the_cpu(monkeypatch, case, metric, dtype, strip):
    embeddings, labels = case()
    embeddings = embeddings.to(dtype)
    expected = first_match_ranks(embeddings, labels, metric)
    monkeypatch.setattr(cuda_ranks, "STRIP", strip)
    assert torch.equal(first_match_ranks(embeddings.cuda(), labels.cuda(), metric), expected)
    assert torch.equal(first_match_ranks(embeddings.cuda(), labels, metric), expected)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32_and_autocast_change_no_rank(precision):
    embeddings, labels = random_classes()
    expected = first_match_ranks(embeddings, labels)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(first_match_ranks(embeddings.cuda(), labels.cuda()), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def arguments(protocol):
    if protocol == "all-vs-rest":
        return dict(zip(("embeddings", "labels"), copies(), strict=True))
    if protocol.startswith("cuhk03-single-shot"):
        return dict(zip(("embeddings", "labels", "cameras"), views(0, identities=40), strict=True))
    return dict(zip(("embeddings", "labels", "cameras", "roles"), street(1, n=1000), strict=True))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pairs", [None, 2**16])
def test_protocols_measure_what_the_cpu_measures(monkeypatch, protocol, metric, pairs):
    given = arguments(protocol)
    expected = evaluate(protocol, metric=metric, **given)
    if pairs:
        monkeypatch.setattr("hloss.retrieval.protocols.GPU_PAIRS", pairs)
    result = evaluate(protocol, metric=metric, **given | {"embeddings": given["embeddings"].cuda()})
    assert torch.equal(result.ranks, expected.ranks)
    assert torch.equal(result.query_index, expected.query_index)
    assert (result.n_queries, result.n_unmatched) == (expected.n_queries, expected.n_unmatched)
    assert result.metrics == pytest.approx(expected.metrics, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_neighbors_are_those_of_the_cpu(metric, backend):
    if backend == "faiss" and not getattr(pytest.importorskip("faiss"), "get_num_gpus", int)():
        pytest.skip("needs faiss for GPUs")
    embeddings, _ = copies()
    own = torch.arange(0, 3000, 7)
    expected = neighbors(embeddings[own], embeddings, 20, metric, own, backend="torch")
    for device in ("cpu", "cuda"):
        gallery = embeddings.to(device)
        similarity, nearest = neighbors(gallery[own], gallery, 20, metric, own, backend)
        assert torch.equal(nearest, expected[1])
        torch.testing.assert_close(similarity, expected[0], rtol=1e-9, atol=1e-7)


def synchronisations(measure):
    measure()  # the first call may initialise libraries
    with counted_waits() as waits:
        measure()
    return len(waits)


@pytest.mark.parametrize("metric", METRICS)
def test_the_number_of_synchronisations_is_limited_at_any_size(monkeypatch, metric):
    monkeypatch.setattr(cuda_ranks, "STRIP", 2**18)  # several strips
    counts = []
    for n in (600, 6000):
        embeddings, labels = (part.cuda() for part in collapsed(n))
        counts.append(synchronisations(lambda e=embeddings, y=labels: first_match_ranks(e, y, metric)))
    assert max(counts) <= 8


def test_memory_of_the_ranks():
    embeddings, labels = (part.cuda() for part in collapsed(20_000))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first_match_ranks(embeddings, labels)
    assert torch.cuda.max_memory_allocated() - before <= 3 * 2**30
