"""The whole batch over all GPUs by NCCL: the loss, which two CPU processes compute, too, and synchronised BatchNorm."""

import socket

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from hloss import HistogramLoss, global_batch


def batch(n=48):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    return embeddings, torch.arange(n) % 8


def work(rank, world, backend, port, folder):
    """One process: the gradient of its share of the embeddings, written to a file."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    embeddings, labels = batch()
    share = embeddings.tensor_split(world)[rank].to(device).requires_grad_()
    loss = global_batch(HistogramLoss())(share, labels.tensor_split(world)[rank].to(device))
    loss.backward()
    torch.save((loss.detach().cpu(), share.grad.cpu() / world), folder / f"{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


NEEDS_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=NEEDS_CUDA)])
def test_all_devices_together_give_the_loss_and_gradient_of_the_whole_batch(backend, tmp_path):
    world = torch.cuda.device_count() if backend == "nccl" else 2
    multiprocessing.spawn(work, (world, backend, free_port(), tmp_path), nprocs=world)
    embeddings, labels = batch()
    embeddings.requires_grad_()
    whole = HistogramLoss()(embeddings, labels)
    whole.backward()
    losses, gradients = zip(
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)), strict=True
    )
    torch.testing.assert_close(torch.stack(losses), whole.detach().expand(world), rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.cat(gradients), embeddings.grad, rtol=1e-9, atol=1e-15)


def trained(network, loss, embeddings, labels):
    """Outputs, and what two steps of training leave: gradients, weights and the statistics of BatchNorm."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = network(embeddings)
        loss(outputs, labels).backward()
        optimizer.step()
    network = getattr(network, "module", network)
    gradients = {f"gradient of {name}": weights.grad for name, weights in network.named_parameters()}
    return outputs.detach().cpu(), {k: v.cpu() for k, v in (gradients | network.state_dict()).items()}


def with_batchnorm(device):
    torch.manual_seed(0)
    layers = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8)
    return nn.Sequential(*layers).to(device, torch.float64)


def train_share(rank, world, port, folder):
    """One process: training with synchronised BatchNorm, as a run on several devices does it."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(with_batchnorm("cuda"))
    network = nn.parallel.DistributedDataParallel(network, device_ids=[rank])
    embeddings, labels = (part.tensor_split(world)[rank].to("cuda") for part in batch(50))
    torch.save(trained(network, global_batch(HistogramLoss()), embeddings, labels), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_batchnorm_over_all_devices_is_that_of_one_device_with_the_whole_batch(tmp_path):
    world = torch.cuda.device_count()
    multiprocessing.spawn(train_share, (world, free_port(), tmp_path), nprocs=world)
    outputs, left = trained(with_batchnorm("cuda"), HistogramLoss(), *(part.to("cuda") for part in batch(50)))
    several = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    torch.testing.assert_close(torch.cat([share for share, _ in several]), outputs, rtol=1e-9, atol=1e-12)
    for _, of_one in several:
        torch.testing.assert_close(of_one, left, rtol=1e-9, atol=1e-12)
