"""The loss of the whole batch over all GPUs by NCCL; the same over two CPU processes keeps the test itself honest."""

import socket

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from hloss import HistogramLoss, global_batch


def batch():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(48, 16, generator=generator, dtype=torch.float64)
    return embeddings, torch.arange(48) % 8


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


NEEDS_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=NEEDS_CUDA)])
def test_all_devices_together_give_the_loss_and_gradient_of_the_whole_batch(backend, tmp_path):
    world = torch.cuda.device_count() if backend == "nccl" else 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (world, backend, port, tmp_path), nprocs=world)
    embeddings, labels = batch()
    embeddings.requires_grad_()
    whole = HistogramLoss()(embeddings, labels)
    whole.backward()
    losses, gradients = zip(
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)), strict=True
    )
    torch.testing.assert_close(torch.stack(losses), whole.detach().expand(world), rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.cat(gradients), embeddings.grad, rtol=1e-9, atol=1e-15)
