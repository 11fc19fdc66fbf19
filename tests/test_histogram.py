"""The histogram loss against the authors' layer, against the printed equations, and its invariants."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hloss import HistogramLoss, pair_histograms

GOLDEN = np.load(Path(__file__).parent / "golden" / "authors_layer.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files})
KERNELS = [("triangular", None), ("gaussian", 1.5), ("epanechnikov", 2.0), ("uniform", 0.7)]
VARIANTS = [
    {},
    {"kernel": "gaussian", "bandwidth": 2.0},
    {"order_cost": "linear", "margin": 0.1},
    {"order_cost": "softplus", "margin": 0.2, "alpha": 3.0, "kernel": "uniform", "bandwidth": 1.3},
    {"margin": 0.2, "n_bins": 50, "kernel": "epanechnikov", "bandwidth": 1.0},
    {"density": "beta"},
]


def batch(n=24, d=6, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=dtype), torch.randint(classes, (n,), generator=generator)


def pairs_by_sign(similarity, sign):
    """The similarities of the positive and of the negative pairs i < j, one by one."""
    n = len(similarity)
    found = {1: [], -1: [], 0: []}
    for i in range(n):
        for j in range(i + 1, n):
            found[int(sign[i, j])].append(similarity[i, j])
    return found[1], found[-1]


def oracle(positive, negative, n_bins, margin=0.0, order_cost="step", alpha=1.0):
    """Equations 2, 4 and 6 written out, for lists of similarities: one term per pair, node and pair of nodes."""
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

    h_positive, h_negative = histogram(positive), histogram(negative)
    costs = torch.tensor([[cost(t, u) for u in nodes] for t in nodes], dtype=torch.float64)
    return (h_negative[:, None] * costs * h_positive[None, :]).sum()


def signs(labels):
    return torch.where(labels[:, None] == labels, 1, -1)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_the_authors_layer(case):
    golden = {key: GOLDEN[f"{case}/{key}"] for key in ("embeddings", "labels", "loss", "margin", "alpha")}
    order_cost, density, n_bins = case.split("-")
    options = {
        "n_bins": int(n_bins),
        "order_cost": order_cost,
        "density": density,
        "margin": float(golden["margin"]),
        "alpha": float(golden["alpha"]),
    }
    embeddings = torch.tensor(golden["embeddings"], requires_grad=True)
    labels = torch.tensor(golden["labels"]).long()
    loss = HistogramLoss(**options, normalize=False)(embeddings, labels)
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=1e-12)
    by_similarity = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    by_similarity[*np.triu_indices(len(labels), 1)] = torch.tensor(GOLDEN[f"{case}/by_similarity"])
    expected = (by_similarity + by_similarity.T) @ embeddings.detach()
    tolerance = 1e-7 if density == "beta" else 1e-9
    assert (embeddings.grad - expected).abs().max() <= tolerance * expected.abs().max()
    densities = pair_histograms(embeddings, labels, **options, normalize=False)
    np.testing.assert_allclose(densities.positive, GOLDEN[f"{case}/positive"], atol=1e-12)
    np.testing.assert_allclose(densities.negative, GOLDEN[f"{case}/negative"], atol=1e-12)


@pytest.mark.parametrize(
    "options",
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
def test_value_and_gradient_equal_the_printed_equations(options):
    embeddings, labels = batch(n=14, classes=3)
    embeddings.requires_grad_()
    loss = HistogramLoss(**options)(embeddings, labels)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    expected = oracle(*pairs_by_sign(unit @ unit.T, signs(labels)), **options)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradient_equals_finite_differences(options):
    embeddings, labels = batch(n=12, d=4, classes=3, seed=3)
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: HistogramLoss(**options)(e, labels), embeddings, eps=1e-8, atol=1e-5)


def test_the_package_needs_torch_alone():
    modules = [
        "pandas",
        "pyarrow",
        "pydantic",
        "lightning_fabric",
        "matplotlib",
        "scipy",
        "torchvision",
        "yaml",
        "data_prep",
    ]
    code = f"import sys, hloss; print([m for m in {modules} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
