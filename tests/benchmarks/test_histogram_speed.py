"""The histogram loss, forward and backward, against its floor (the plain product) and its peers; D = 512."""

from functools import partial

import pytest
import torch

from hloss import HistogramLoss
from hloss.losses.checks import deferred_checks
from tests.benchmarks.conftest import peak_above_start

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = "product Y Y' (autograd)"
VARIANTS = {
    "gaussian kernel": {"kernel": "gaussian", "bandwidth": 2.0},
    "linear cost": {"order_cost": "linear", "margin": 0.1},
    "softplus cost": {"order_cost": "softplus", "margin": 0.1, "alpha": 10.0},
    "step cost, margin": {"margin": 0.05},
    "beta density": {"density": "beta"},
}


def batch(n, d=512):
    embeddings = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return torch.nn.functional.normalize(embeddings).requires_grad_(), torch.arange(n, device=DEVICE) // 8


def step(loss, embeddings, labels):
    def run():
        embeddings.grad = None
        loss(embeddings, labels).backward()

    return run


def product(embeddings, labels):
    return (embeddings @ embeddings.T).sum()


def dense(embeddings, labels, n_bins=200):
    """Equations 2-4 as tensors of all pairs by all nodes."""
    embeddings = torch.nn.functional.normalize(embeddings)
    i, j = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    similarity = (embeddings @ embeddings.T)[i, j].clamp(-1, 1)
    nodes = torch.linspace(-1, 1, n_bins + 1, device=labels.device)
    weights = (1 - (similarity[:, None] - nodes).abs() * n_bins / 2).clamp(min=0)
    positive = labels[i] == labels[j]
    return weights[~positive].mean(0) @ weights[positive].mean(0).cumsum(0)


NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.mark.parametrize("n", [64, 256, 1024, 4096, pytest.param(16_384, marks=NEEDS_GPU)])
def test_against_the_product(race, n):
    embeddings, labels = batch(n)
    sides = {FLOOR: product, "HistogramLoss": HistogramLoss()}
    race(f"N = {n}", FLOOR, {name: step(loss, embeddings, labels) for name, loss in sides.items()})


def unchecked(embeddings, labels):
    """The loss of normalised embeddings, whose checks are not read."""
    with deferred_checks() as checks:
        loss = HistogramLoss(normalize=False)(embeddings, labels)
        checks.pending.clear()
    return loss


@NEEDS_GPU
@pytest.mark.parametrize("n", [256, 1024])
def test_deferred_checks_against_the_product(race, n):
    embeddings, labels = batch(n)
    sides = {FLOOR: product, "HistogramLoss, normalised, deferred checks": unchecked}
    race(f"N = {n}", FLOOR, {name: step(loss, embeddings, labels) for name, loss in sides.items()})


@pytest.mark.parametrize("n", [256, 1024])
def test_against_dense_bins(race, n):
    embeddings, labels = batch(n)
    sides = {"dense O(N^2 R)": dense, "HistogramLoss": HistogramLoss()}
    steps = {name: step(loss, embeddings, labels) for name, loss in sides.items()}
    race(f"N = {n}", "HistogramLoss", steps, rounds=5 if n > 256 else 20)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # of that package
@pytest.mark.parametrize("mined", [False, True], ids=["labels", "mined"])
@pytest.mark.parametrize("n", [128, 256, 512])
def test_against_pytorch_metric_learning(race, n, mined):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    from hloss.integrations import pytorch_metric_learning as dropin

    embeddings, labels = batch(n)
    sides = {"pytorch-metric-learning": losses.HistogramLoss(n_bins=200), "drop-in": dropin.HistogramLoss(n_bins=200)}
    if mined:
        pairs = MultiSimilarityMiner()(embeddings, labels)
        sides = {name: partial(loss, indices_tuple=pairs) for name, loss in sides.items()}
    else:
        sides["HistogramLoss"] = HistogramLoss()
    steps = {name: step(loss, embeddings, labels) for name, loss in sides.items()}
    race(f"N = {n}{', mined pairs' if mined else ''}", "drop-in", steps, rounds=5)


@pytest.mark.parametrize("module", ["pytorch_metric_learning.losses", "hloss.integrations.pytorch_metric_learning"])
@pytest.mark.parametrize("n", [128, 256, 512])
def test_memory_against_pytorch_metric_learning(record, n, module):
    pytest.importorskip("pytorch_metric_learning")
    grown = peak_above_start(f"""
import torch
from {module} import HistogramLoss
loss = HistogramLoss(n_bins=200)
warm = torch.randn(16, 512).requires_grad_()
loss(warm, torch.arange(16) // 8).backward()
embeddings = torch.randn({n}, 512).requires_grad_()
labels = torch.arange({n}) // 8
# start
loss(embeddings, labels).backward()
""")
    record(f"N = {n}", module, f"{grown / 2**20:.0f} MiB", "peak above the process before the call")


@pytest.mark.parametrize("n", [1024])
def test_kernels_costs_and_densities(race, n):
    embeddings, labels = batch(n)
    losses = {name: HistogramLoss(**options) for name, options in VARIANTS.items()} | {
        "triangular step": HistogramLoss()
    }
    steps = {name: step(loss, embeddings, labels) for name, loss in losses.items()}
    race(f"N = {n}", "triangular step", steps)


def twice_by_blocks(embeddings, labels):
    def run():
        for _ in range(2):
            for rows in embeddings.detach().split(512):
                rows @ embeddings.detach().T

    return run


def test_a_large_batch(race):
    embeddings, labels = batch(32_768, 128)
    sides = {
        "full matrix by blocks, twice": twice_by_blocks(embeddings, labels),
        "HistogramLoss": step(HistogramLoss(), embeddings, labels),
    }
    race("N = 32768, D = 128", "full matrix by blocks, twice", sides, rounds=3)


def test_memory_of_a_large_batch(record):
    grown = peak_above_start("""
import torch
from hloss import HistogramLoss
loss = HistogramLoss()
warm = torch.randn(64, 128).requires_grad_()
loss(warm, torch.arange(64) // 8).backward()
embeddings = torch.randn(32_768, 128).requires_grad_()
labels = torch.arange(32_768) // 8
# start
loss(embeddings, labels).backward()
""")
    record("N = 32768, D = 128", "HistogramLoss", f"{grown / 2**20:.0f} MiB", "peak above the process before the call")


@NEEDS_GPU
def test_memory_on_a_gpu(record):
    embeddings, labels = batch(131_072, 128)
    HistogramLoss()(embeddings, labels).backward()
    embeddings.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    HistogramLoss()(embeddings, labels).backward()
    grown = torch.cuda.max_memory_allocated() - before
    record("N = 131072, D = 128", "HistogramLoss", f"{grown / 2**20:.0f} MiB", "peak on the GPU above the input")
