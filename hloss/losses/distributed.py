"""A loss over the batches of all processes, including pairs between processes."""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hloss.numerics import checked_labels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def global_batch(loss: nn.Module) -> nn.Module:
    """Wrap a loss so that it uses the embeddings and labels of all processes of `torch.distributed`.

    Each process calls the result with its own part of the batch. Parts may differ in size and may be empty. Every
    process gets the loss of the whole batch. Gradients are multiplied by the number of processes. Their average, which
    DistributedDataParallel computes, is then the gradient of a single process with the whole batch.

    Args:
        loss: called as `loss(embeddings, labels)` with embeddings (n, d) and integer labels (n,).

    Returns:
        A module called in the same way. Without `torch.distributed`, or with one process, its result is that of `loss`.
        With several processes, it raises ValueError for reference embeddings, for a matrix of pairs, and for parts
        whose embeddings differ in width or dtype.

    Example:
        >>> criterion = global_batch(nn.CrossEntropyLoss())
        >>> criterion(torch.zeros(3, 2), torch.tensor([0, 0, 1]))
        tensor(0.6931)
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
                "global_batch does not accept reference embeddings with several processes: got "
                f"{dist.get_world_size()} processes; gather embeddings and references, and call the loss "
                "without global_batch"
            )
        labels = checked_labels("labels", labels, len(embeddings))
        sizes = _shares(embeddings)
        start = sum(sizes[: dist.get_rank()])
        others = _gathered(embeddings.detach(), sizes)
        own = embeddings.view_as(embeddings)
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * len(sizes))  # DistributedDataParallel divides by this number.
        whole = torch.cat([others[:start], own, others[start + len(own) :]])
        return self.loss(whole, _gathered(labels.to(embeddings.device), sizes))


def _shares(embeddings: Tensor) -> list[int]:
    """Return the number of embeddings of each process; raise ValueError if widths or dtypes differ."""
    dtype = DTYPES.index(embeddings.dtype) if embeddings.dtype in DTYPES else -1  # others are refused by the loss
    own = torch.tensor([[*embeddings.shape, dtype]], device=embeddings.device)
    sizes, widths, dtypes = _gathered(own, [1] * dist.get_world_size()).T.tolist()
    if len(set(widths)) > 1 or len(set(dtypes)) > 1:
        names = (*DTYPES, "another dtype")
        got = [f"{width} columns of {names[dtype]}" for width, dtype in zip(widths, dtypes, strict=True)]
        raise ValueError(f"embeddings must have the same width and dtype in all processes: got {', '.join(got)}")
    return sizes


def _gathered(share: Tensor, sizes: list[int]) -> Tensor:
    """Return the shares of all processes by rank. They are padded for the transfer: gloo needs equal shapes."""
    padded = share.new_zeros((max(sizes), *share.shape[1:]))
    padded[: len(share)] = share
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
