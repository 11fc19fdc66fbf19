"""Embeddings of any scale: ranks, protocols and neighbours are exact, or refuse rows, with the words of the losses."""

import math
from unittest import mock

import numpy as np
import pytest
import torch

from hloss import evaluate, recall_at_k
from hloss.retrieval import cuda_ranks, ranks
from hloss.retrieval.neighbors import neighbors
from hloss.retrieval.ranks import first_match_ranks
from hloss.retrieval.similarity import METRICS


def ranks_by(way, embeddings, labels, metric):
    """First-match ranks by blocks or strips of 16 rows, on the CPU."""
    strips = mock.patch.object(cuda_ranks, "STRIP", 16 * len(labels))
    with strips, mock.patch.multiple(ranks, BLOCK=16, STRIP_DEVICES=("cpu",) if way == "strips" else ()):
        return first_match_ranks(embeddings, labels, metric)


def distances(embeddings):
    """Squared distances, without overflow and without a difference of large numbers."""
    wide = embeddings.numpy().astype(np.longdouble)
    return np.stack([np.square(wide - row).sum(1) for row in wide])


def cosine_distances(embeddings):
    wide = embeddings.numpy().astype(np.longdouble)
    unit = wide / np.sqrt(np.square(wide).sum(1, keepdims=True))
    return 1 - unit @ unit.T


def first_ranks(distance, labels):
    found = []
    for i, row in enumerate(distance):
        same = (labels == labels[i]).numpy()
        same[i] = False
        rivals = (labels != labels[i]).numpy()
        tied = row[same].min() * (1 + 1e-12) if same.any() else 0
        found.append(1 + int((row[rivals] <= tied).sum()) if same.any() else 0)
    return found


def batch(n=60, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), torch.randint(12, (n,), generator=generator)


SCALES = [(torch.float32, e) for e in (-38, -25, -13, -9, 0, 9, 15, 19, 25, 37)]
SCALES += [(torch.float64, e) for e in (-300, -170, -13, 0, 15, 160, 300)]
SCALES += [(torch.bfloat16, e) for e in (-35, -13, 19, 35)]


@pytest.mark.parametrize("way", ["blocks", "strips"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("dtype", "exponent"), SCALES)
def test_ranks_do_not_depend_on_the_scale(way, metric, dtype, exponent):
    plain, labels = batch()
    embeddings = (plain * 10.0**exponent).to(dtype)
    distance = (distances if metric == "euclidean" else cosine_distances)(embeddings.double())
    expected = first_ranks(distance, labels)
    assert ranks_by(way, embeddings, labels, metric).tolist() == expected
    result = evaluate("all-vs-rest", embeddings, labels, metric=metric)
    assert result.ranks.tolist() == expected
    views = evaluate("cuhk03-single-shot", embeddings, labels, metric=metric, cameras=torch.arange(60) % 2)
    unscaled = (plain * 10.0**exponent).to(dtype).double() / 10.0**exponent
    again = evaluate("cuhk03-single-shot", unscaled, labels, metric=metric, cameras=torch.arange(60) % 2)
    assert views.metrics == pytest.approx(again.metrics, abs=1e-12)


@pytest.mark.parametrize("way", ["blocks", "strips"])
@pytest.mark.parametrize("exponents", [[0, -30, 20], [-38, 38], [0, -12]])
def test_cosine_ranks_do_not_depend_on_the_norm_of_a_row(way, exponents):
    plain, labels = batch()
    factors = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)[torch.arange(60) % len(exponents)]
    embeddings = (0.1 * plain * factors[:, None]).float()
    expected = first_ranks(cosine_distances(embeddings.double()), labels)
    assert ranks_by(way, embeddings, labels, "cosine").tolist() == expected


@pytest.mark.parametrize("way", ["blocks", "strips"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e9, 1e15, 1e30])
@pytest.mark.parametrize("n_outliers", [1, 5])
def test_outliers_do_not_change_the_ties_of_others(way, dtype, outlier, n_outliers):
    """A similarity is a tie where it differs by its own rounding error, not by that of the longest row."""
    embeddings, labels = batch()
    embeddings[7 : 7 + n_outliers] *= outlier
    embeddings = embeddings.to(dtype)
    expected = first_ranks(distances(embeddings.double()), labels)
    assert ranks_by(way, embeddings, labels, "euclidean").tolist() == expected
    assert evaluate("all-vs-rest", embeddings, labels, metric="euclidean").ranks.tolist() == expected


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-300, -38, -25, -13, 0, 19, 30, 37, 300])
@pytest.mark.parametrize("outlier", [1.0, 1e6])
def test_neighbours_do_not_depend_on_the_scale(backend, metric, dtype, exponent, outlier):
    if backend == "faiss":
        pytest.importorskip("faiss")
    if dtype == torch.float32 and (abs(exponent) > 38 or (exponent > 30 and outlier > 1)):
        pytest.skip("not a float32")
    embeddings = batch()[0]
    embeddings[7] *= outlier
    embeddings = (embeddings * 10.0**exponent).to(dtype)
    distance = (distances if metric == "euclidean" else cosine_distances)(embeddings.double())
    np.fill_diagonal(distance, np.inf)
    found, index = neighbors(embeddings, embeddings, 4, metric, own=torch.arange(60), backend=backend)
    assert index.tolist() == np.argsort(distance, axis=1, kind="stable")[:, :4].tolist()
    nearest = np.sort(distance, axis=1)[:, :4]
    expected = np.sqrt(nearest) if metric == "euclidean" else 1 - nearest
    np.testing.assert_allclose(found.numpy(), expected.astype(float), rtol=1e-9)


def calls(embeddings, metric):
    labels = torch.arange(len(embeddings)) // 2
    yield lambda: recall_at_k(embeddings, labels, (1,), metric)
    yield lambda: first_match_ranks(embeddings, labels, metric)
    yield lambda: evaluate("all-vs-rest", embeddings, labels, (1,), metric)
    yield lambda: evaluate("cuhk03-single-shot", embeddings, labels, (1,), metric, torch.arange(len(labels)) % 2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_by_row(metric, value):
    embeddings = batch(n=10)[0]
    embeddings[3, 1] = value
    for call in calls(embeddings, metric):
        with pytest.raises(ValueError, match=r"^embeddings rows \[3\] hold NaN or infinity$"):
            call()
    with pytest.raises(ValueError, match=r"^queries rows \[3\] hold NaN or infinity$"):
        neighbors(embeddings, embeddings, 1, metric)
    with pytest.raises(ValueError, match=r"^gallery rows \[3\] hold NaN or infinity$"):
        neighbors(embeddings[:3], embeddings, 1, metric)


def test_zero_rows_have_no_cosine():
    embeddings = batch(n=10)[0]
    embeddings[[2, 4]] = 0
    for call in calls(embeddings, "cosine"):
        with pytest.raises(ValueError, match=r"^embeddings rows \[2, 4\] are zero and have no direction$"):
            call()
    with pytest.raises(ValueError, match=r"^queries rows \[2, 4\] are zero and have no direction$"):
        neighbors(embeddings, embeddings, 1)
    for call in calls(embeddings, "euclidean"):
        call()
    assert neighbors(embeddings * 0, embeddings * 0, 1, "euclidean")[0].tolist() == [[0.0]] * 10
    assert recall_at_k(embeddings * 0, torch.arange(10) // 2, (9,), "euclidean") == {9: 1.0}
