"""The record of pairs: slopes against the gradient of the losses, and the separation against the definitions."""

import pytest
import torch

from hloss.integrations.pml_losses import PMLLoss
from hloss.losses.histogram import pair_histograms, reverse_probability
from hloss.runs.config import LOSSES
from hloss.runs.pair_record import pair_slope_matrix, separation, similarities, slope_record

CASES = [
    ("histogram", {"n_bins": 50}),
    ("histogram", {"n_bins": 50, "kernel": "gaussian", "bandwidth": 2.0}),
    ("histogram", {"n_bins": 50, "order_cost": "softplus", "alpha": 5.0}),
    ("histogram", {"n_bins": 50, "margin": 0.12}),
    ("binomial", {}),
    ("binomial", {"C": 25.0}),
    ("lifted", {}),
    ("lifted", {"normalize": True}),
    ("triplet", {}),
    ("semi-hard-triplet", {}),
    ("contrastive", {}),
    ("contrastive", {"normalize": True}),
    ("quadruplet", {}),
]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    labels = torch.arange(6).repeat_interleave(5)
    return centers[labels] + 0.8 * torch.randn(30, 16, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_slopes_of_the_pairs_give_the_gradient_of_the_loss(name, settings, batch):
    embeddings, labels = batch
    loss = LOSSES[name](**settings)
    if name in ("lifted", "contrastive") and not settings:
        embeddings = embeddings / 6  # so that distances are comparable with the margin
    embeddings = embeddings.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(embeddings, labels), embeddings)
    slopes = pair_slope_matrix(loss, embeddings, labels)
    assert torch.equal(slopes, slopes.T)
    metric = "cosine" if name == "histogram" else loss.metric
    pairs = similarities(embeddings, metric)
    (found,) = torch.autograd.grad((slopes.triu(1) * pairs).sum(), embeddings)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    assert expected.abs().max() > 0


def test_a_pair_without_a_slope_does_not_count(batch):
    labels = torch.tensor([0, 0, 1, 1])
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1], dtype=torch.float64)
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    record = slope_record(LOSSES["histogram"](n_bins=200), embeddings, labels)
    assert record == {"pairs_with_slope": 0.0, "positive_slope": 0.0, "negative_slope": 0.0}
    binomial = slope_record(LOSSES["binomial"](), embeddings, labels)
    assert binomial["pairs_with_slope"] == 1.0
    assert binomial["positive_slope"] < 0 < binomial["negative_slope"]
    contrastive = slope_record(LOSSES["contrastive"](margin=0.95, normalize=True), embeddings, labels)
    assert contrastive["pairs_with_slope"] == pytest.approx(3 / 6)  # both positive pairs, and the nearest negative pair


def test_the_share_of_pairs_with_a_slope_is_that_of_their_matrix(batch):
    loss = LOSSES["histogram"](n_bins=50)
    slopes = pair_slope_matrix(loss, *batch)
    upper = torch.ones_like(slopes, dtype=torch.bool).triu(1)
    record = slope_record(loss, *batch)
    assert record["pairs_with_slope"] == pytest.approx((slopes[upper] != 0).double().mean().item())
    assert 0 < record["pairs_with_slope"] < 1


def test_separation_of_cosines_is_that_of_the_library(batch):
    embeddings, labels = batch
    histograms = pair_histograms(embeddings, labels, n_bins=100)
    found = separation(embeddings, labels, "cosine")
    assert found["overlap"] == pytest.approx(torch.minimum(histograms.positive, histograms.negative).sum().item())
    assert found["reverse"] == pytest.approx(reverse_probability(embeddings, labels))


def test_separation_of_distances_counts_the_reversed_pairs(batch):
    embeddings, labels = batch
    distance = torch.cdist(embeddings, embeddings)
    same = labels[:, None] == labels
    upper = torch.ones_like(same).triu(1)
    positive, negative = distance[same & upper], distance[~same & upper]
    found = separation(embeddings, labels, "euclidean")
    assert found["reverse"] == pytest.approx((negative[:, None] < positive).double().mean().item())
    assert found["reverse"] != pytest.approx(separation(embeddings, labels, "cosine")["reverse"])
    assert 0 < found["overlap"] < 1
    assert separation(torch.eye(4), torch.tensor([0, 0, 1, 1]), "euclidean") == {"overlap": 1.0, "reverse": 0.5}


def test_other_losses_and_batches_without_a_group_have_no_slopes(batch):
    pytest.importorskip("pytorch_metric_learning")
    embeddings, labels = batch
    assert slope_record(PMLLoss("ContrastiveLoss"), embeddings, labels) == {}
    for lone in (torch.zeros(30, dtype=torch.long), torch.arange(30)):
        assert slope_record(LOSSES["histogram"](), embeddings, lone) == {}
        assert separation(embeddings, lone, "cosine") == {}
