"""Batches, settings and the authors' values that several tests of the histogram loss share."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "authors_layer.npz")
GOLDEN_CASES = sorted({name.split("/")[0] for name in GOLDEN.files})
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


def signs(labels):
    """The matrix of pairs that labels stand for."""
    return torch.where(labels[:, None] == labels, 1, -1)


def check_against_golden(case, loss_function):
    """Compare a loss, called as `loss_function(embeddings, labels, **settings)`, with the authors' layer.

    Returns the embeddings, labels and settings of the case.
    """
    embeddings, labels, value, margin, alpha, slopes = (
        torch.tensor(GOLDEN[f"{case}/{key}"])
        for key in ("embeddings", "labels", "loss", "margin", "alpha", "by_similarity")
    )
    order_cost, density, n_bins = case.split("-")
    settings = {
        "n_bins": int(n_bins),
        "order_cost": order_cost,
        "density": density,
        "margin": margin.item(),
        "alpha": alpha.item(),
        "normalize": False,
    }
    embeddings, labels = embeddings.requires_grad_(), labels.long()
    loss = loss_function(embeddings, labels, **settings)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert abs(loss - value) <= 1e-12
    by_similarity = torch.zeros(len(labels), len(labels), dtype=torch.float64)
    by_similarity[*torch.triu_indices(len(labels), len(labels), 1)] = slopes
    expected = (by_similarity + by_similarity.T) @ embeddings.detach()
    tolerance = 1e-7 if density == "beta" else 1e-9
    assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()
    return embeddings.detach(), labels, settings
