"""A loss over the batches of all processes, pairs between processes included. Nothing to read before."""

import torch
from torch import Tensor, nn
from torch import distributed as dist


def global_batch(loss: nn.Module) -> nn.Module:
    """Wrap a loss so that it sees the embeddings and labels of all processes of `torch.distributed`.

    Call the result as `loss(embeddings, labels)` with this process's share: embeddings (n, d) and integer labels (n,).
    Shares may differ in size; one may be empty. Every process gets the loss of the whole batch. The gradient is scaled
    by the number of processes, so that DistributedDataParallel's average is exactly the gradient of one process with
    the whole batch. Without `torch.distributed`, or with one process, it is the loss itself.

    ValueError for reference embeddings and for a matrix of pairs, which cannot be exact over several processes, and for
    shares of different width or dtype.
    """
    return _GlobalBatch(loss)


class _GlobalBatch(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embeddings: Tensor, labels: Tensor, *references: Tensor | None) -> Tensor:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.loss(embeddings, labels, *references)
        if any(reference is not None for reference in references):
            raise ValueError(
                "reference embeddings are not supported over several processes: each process would hold other "
                "references; gather them yourself and use the loss unwrapped"
            )
        if labels.ndim != 1 or len(labels) != len(embeddings):
            raise ValueError(
                f"labels must have shape ({len(embeddings)},) on each of several processes, got {tuple(labels.shape)}; "
                "a matrix of pairs cannot be gathered from its shares"
            )
        sizes = _shares(embeddings)
        start = sum(sizes[: dist.get_rank()])
        others = _gathered(embeddings.detach(), sizes)
        own = embeddings.view_as(embeddings)
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * len(sizes))  # DistributedDataParallel divides by it
        whole = torch.cat([others[:start], own, others[start + len(own) :]])
        return self.loss(whole, _gathered(labels.to(embeddings.device), sizes))


def _shares(embeddings: Tensor) -> list[int]:
    """Number of embeddings of each process. ValueError if the shares differ in width or dtype."""
    own = torch.tensor([len(embeddings), embeddings.shape[1], embeddings.element_size()], device=embeddings.device)
    shapes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, own)
    sizes, widths, bytes_ = torch.stack(shapes, dim=1).tolist()
    if len(set(widths)) > 1 or len(set(bytes_)) > 1:
        raise ValueError(f"the processes hold embeddings of different width {widths} or bytes per number {bytes_}")
    return sizes


def _gathered(share: Tensor, sizes: list[int]) -> Tensor:
    """The shares of all processes in the order of their ranks, padded in transit because gloo needs equal shapes."""
    padded = share.new_zeros((max(sizes), *share.shape[1:]))
    padded[: len(share)] = share
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
