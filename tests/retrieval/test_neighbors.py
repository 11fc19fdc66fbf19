"""Nearest neighbors against a full sort, through both backends."""

import pytest
import torch

from hloss.retrieval.neighbors import neighbors
from hloss.retrieval.similarity import METRICS
from tests.retrieval.oracles import scores


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_neighbors_are_those_of_a_full_sort(metric, backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    gallery = 3 + torch.randn(700, 9, generator=generator)
    gallery[300:310] = gallery[5]  # equals are ordered by index
    queries = gallery[:400]
    similarity, nearest = neighbors(queries, gallery, 7, metric, own=torch.arange(400), backend=backend)
    for i in (0, 5, 123, 302, 399):
        score = torch.tensor(scores(queries[i].double(), gallery.double(), metric), dtype=torch.float64)
        ranked = sorted((j for j in range(700) if j != i), key=lambda j, s=score: (-round(float(s[j]), 12), j))
        assert nearest[i].tolist() == ranked[:7]
        expected = score[ranked[:7]] if metric == "cosine" else -score[ranked[:7]]
        torch.testing.assert_close(similarity[i], expected, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_the_backends_give_the_same(metric):
    pytest.importorskip("faiss")
    gallery = torch.randn(2000, 33, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    by_faiss, by_torch = (neighbors(gallery[:300], gallery, 50, metric, backend=b) for b in ("faiss", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(by_faiss, by_torch, strict=True))


def test_neighbors_refuse_what_they_cannot_find():
    gallery = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="k must be between 1 and 4, the number of other images in the gallery: got 5"):
        neighbors(gallery, gallery, 5, own=torch.arange(5))
    with pytest.raises(ValueError, match="k must be between 1 and 5, the number of images in the gallery: got 6"):
        neighbors(gallery, gallery, 6)
    with pytest.raises(ValueError, match="backend must be one of faiss, torch: got 'annoy'"):
        neighbors(gallery, gallery, 1, backend="annoy")
    with pytest.raises(ValueError, match="metric must be one of cosine, euclidean: got 'dot'"):
        neighbors(gallery, gallery, 1, metric="dot")
