"""Several processes with a share of the batch each equal one process with the whole batch: loss and gradients."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from hloss import HistogramLoss, global_batch
from hloss.losses.baselines import BASELINES

LOSSES = {
    "histogram": HistogramLoss(n_bins=50),
    "gaussian kernel": HistogramLoss(n_bins=50, kernel="gaussian", bandwidth=2.0),
    "softplus cost": HistogramLoss(order_cost="softplus", margin=0.1, alpha=2.0),
    "beta density": HistogramLoss(density="beta"),
    **{name: loss() for name, loss in BASELINES.items()},
}
EQUAL = {2: [12, 12], 4: [6, 6, 6, 6]}
UNEQUAL = {2: [17, 7], 4: [3, 11, 0, 10]}


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 7, generator=generator, dtype=torch.float64)
    return images, torch.arange(24)[torch.randperm(24, generator=generator)] % 6


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 5)).double()


def gradients(loss, net, images, labels):
    net.zero_grad()
    value = loss(net(images), labels)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def work(rank, folder, world):
    """One process: its share through every loss; then what is refused."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    net = DistributedDataParallel(network())
    images, labels = batch()
    found = {}
    for shares in (EQUAL[world], UNEQUAL[world]):
        start = sum(shares[:rank])
        own = slice(start, start + shares[rank])
        for name, loss in LOSSES.items():
            found[name, tuple(shares)] = gradients(global_batch(loss), net, images[own], labels[own])
    loss = global_batch(HistogramLoss())
    messages = []
    half = torch.float16 if rank else torch.bfloat16
    for arguments in (
        (images, labels, images, labels),
        (images, labels[:, None] - labels),
        (images[:, : 7 - rank], labels),
        (images.to(half), labels),
    ):
        try:
            loss(*arguments)
            messages.append("not refused")
        except ValueError as error:
            messages.append(str(error))
    torch.save({"found": found, "messages": messages}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_a_batch_equal_the_whole(world, tmp_path):
    multiprocessing.start_processes(work, (tmp_path, world), nprocs=world, start_method="forkserver")
    for rank in range(world):
        answer = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        references, matrix, widths, dtypes = answer["messages"]
        assert references.startswith("global_batch does not accept reference embeddings with several processes")
        assert f": got {world} processes; gather embeddings and references" in references
        assert matrix.startswith("labels must be")
        assert "all processes: got 7 columns of torch.float64, 6 columns of torch.float64" in widths
        assert "all processes: got 7 columns of torch.bfloat16, 7 columns of torch.float16" in dtypes
        for (name, _), (value, gradient) in answer["found"].items():
            expected_value, expected = gradients(LOSSES[name], network(), *batch())
            assert value.item() == pytest.approx(expected_value.item(), rel=1e-10), name
            assert (gradient - expected).abs().max() <= 1e-10 * expected.abs().max(), name


def test_one_process_is_the_loss_itself():
    images, labels = batch()
    assert global_batch(HistogramLoss())(images, labels) == HistogramLoss()(images, labels)
    references = torch.ones(2, 7, dtype=torch.float64)
    with_references = (images, labels, references, torch.tensor([0, 1]))
    assert global_batch(HistogramLoss())(*with_references) == HistogramLoss()(*with_references)
