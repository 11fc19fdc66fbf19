"""The baselines, forward and backward, against the plain product and pytorch-metric-learning; D = 512."""

import pytest
import torch

from hloss.losses.baselines import BASELINES
from tests.benchmarks.conftest import peak_above_start

FLOOR = "product Y Y' (autograd)"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("n", [128, 256, 1024])
def test_against_the_product(race, n):
    embeddings, labels = batch(n)
    sides = {FLOOR: product, **{name: loss() for name, loss in BASELINES.items()}}
    race(f"N = {n}", FLOOR, {name: step(loss, embeddings, labels) for name, loss in sides.items()}, rounds=10)


def peers():
    """The losses of pytorch-metric-learning that are the same, with the settings that make them so."""
    from pytorch_metric_learning import distances, losses, miners

    squared, raw = distances.LpDistance(power=2), distances.LpDistance(normalize_embeddings=False)
    triplet = losses.TripletMarginLoss(0.2, distance=squared)
    miner = miners.TripletMarginMiner(0.2, "semihard", distance=squared)
    return {
        "lifted": losses.LiftedStructureLoss(distance=raw),
        "triplet": triplet,
        "semi-hard-triplet": lambda embeddings, labels: triplet(embeddings, labels, miner(embeddings, labels)),
    }


@pytest.mark.parametrize("n", [128, 256])
@pytest.mark.parametrize("name", ["lifted", "triplet", "semi-hard-triplet"])
def test_against_pytorch_metric_learning(race, n, name):
    pytest.importorskip("pytorch_metric_learning")
    embeddings, labels = batch(n)
    sides = {f"{name} of pytorch-metric-learning": peers()[name], name: BASELINES[name]()}
    race(f"N = {n}", name, {side: step(loss, embeddings, labels) for side, loss in sides.items()}, rounds=5)


@pytest.mark.parametrize("name", BASELINES)
def test_memory_of_a_batch_of_1024(record, name):
    grown = peak_above_start(f"""
import torch
from hloss.losses.baselines import BASELINES
loss = BASELINES[{name!r}]()
warm = torch.randn(64, 512).requires_grad_()
loss(warm, torch.arange(64) // 8).backward()
embeddings = torch.randn(1024, 512).requires_grad_()
labels = torch.arange(1024) // 8
# start
loss(embeddings, labels).backward()
""")
    record("N = 1024", name, f"{grown / 2**20:.0f} MiB", "peak above the process before the call")
    assert grown < 2**30
