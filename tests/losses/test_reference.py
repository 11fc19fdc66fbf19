"""The reference against the authors' layer and against the printed equations, one term per pair and pair of nodes."""

import math

import numpy as np
import pytest
import torch

from hloss.losses import reference
from tests.losses import oracles
from tests.losses.cases import GOLDEN, GOLDEN_CASES, VARIANTS, batch, check_against_golden, signs


def similarities_by_loop(embeddings, sign):
    """The similarities of the positive and of the negative pairs i < j, one by one."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    found = {1: [], -1: [], 0: []}
    for i in range(len(unit)):
        for j in range(i + 1, len(unit)):
            found[int(sign[i, j])].append(unit[i] @ unit[j])
    return found[1], found[-1]


def loss_by_loop(positive, negative, n_bins, margin=0.0, order_cost="step", alpha=1.0):
    """Equations 2, 4 and 6 written out, for lists of similarities."""
    delta = 2 / n_bins
    nodes = [-1 + r * delta for r in range(n_bins + 1)]

    def histogram(similarities):
        h = [sum(torch.clamp(1 - abs(s - t) / delta, min=0) for s in similarities) / len(similarities) for t in nodes]
        return torch.stack(h)

    def cost(t_negative, t_positive):
        if order_cost == "step":
            return float(t_positive <= t_negative + margin + delta / 4)
        reach = margin - t_positive + t_negative
        return max(0.0, reach) if order_cost == "linear" else math.log(1 + math.exp(alpha * reach))

    costs = torch.tensor([[cost(t, u) for u in nodes] for t in nodes], dtype=torch.float64)
    return (histogram(negative)[:, None] * costs * histogram(positive)[None, :]).sum()


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_value_gradient_and_densities_equal_the_authors_layer(case):
    embeddings, labels, settings = check_against_golden(case, oracles.histogram_loss)
    similarities = reference.pair_similarities(embeddings, labels, normalize=False)
    density = oracles.beta_density if settings["density"] == "beta" else reference.histogram
    for s, name in zip(similarities, ("positive", "negative"), strict=True):
        np.testing.assert_allclose(density(s, settings["n_bins"]), GOLDEN[f"{case}/{name}"], atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_bins": 1},
        {"n_bins": 7},
        {"n_bins": 40},
        {"n_bins": 40, "margin": 0.15},
        {"n_bins": 40, "margin": 3.0},
        {"n_bins": 25, "order_cost": "linear", "margin": 0.3},
        {"n_bins": 25, "order_cost": "softplus", "margin": 0.1, "alpha": 4.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_value_and_gradient_equal_the_printed_equations(settings, ignored):
    embeddings, labels = batch(n=14, classes=3)
    embeddings.requires_grad_()
    matrix = signs(labels)
    left_out = torch.rand(14, 14, generator=torch.Generator().manual_seed(1)) < ignored
    matrix[left_out | left_out.T] = 0
    loss = reference.histogram_loss(embeddings, matrix if ignored else labels, **settings)
    expected = loss_by_loop(*similarities_by_loop(embeddings, matrix), **settings)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "uniform"])
@pytest.mark.parametrize("n_bins", [1, 5, 100])
@pytest.mark.parametrize("bandwidth", [1e-9, 0.7, 40.0])
def test_a_kernel_keeps_the_mass_and_a_narrow_one_keeps_the_node(kernel, n_bins, bandwidth):
    K = oracles.kernel_weights(n_bins, kernel, bandwidth)
    assert K.min() >= 0
    torch.testing.assert_close(K.sum(0), torch.ones(n_bins + 1, dtype=torch.float64))
    assert torch.equal(K, torch.eye(n_bins + 1, dtype=torch.float64)) == (bandwidth < 0.1)


@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "uniform"])
def test_bandwidth_is_the_standard_deviation_of_the_kernel(kernel):
    offset = torch.arange(201) - 100
    variance = oracles.kernel_weights(200, kernel, 6.0)[:, 100] @ offset.double().square()
    assert variance.item() == pytest.approx(6.0**2 + 1 / 12, rel=1e-2)  # a cell of width 1 adds 1/12


def test_equation_2_at_the_ends_and_between_nodes():
    weights = reference.node_weights(torch.tensor([-1.0, -0.75, 0.0, 1.0, 1.0 + 1e-7]), 4)
    expected = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert torch.equal(weights, torch.tensor(expected))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_float32_is_close_to_float64(settings):
    embeddings, labels = batch(n=60, d=8)
    narrow = oracles.histogram_loss(embeddings.float(), labels, **settings)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(oracles.histogram_loss(embeddings, labels, **settings).item(), abs=2e-6)
