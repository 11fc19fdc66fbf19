"""Similarities and distances of all pairs of a batch, (n, n), with gradients.

For small batches a GPU's time depends on the number of kernels. On CUDA, normalisation and distances therefore use
forms with fewer kernels, equal to the CPU's up to rounding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST = 1e-12  # The smallest divisor of F.normalize.


def cosine_similarities(embeddings: Tensor) -> Tensor:
    """Return <y_i, y_j> of the L2-normalised embeddings y, in their dtype also under autocast."""
    y = normalized(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        return y @ y.T


def squared_distances(embeddings: Tensor, normalize: bool) -> Tensor:
    """Return |y_i - y_j|^2 in float64; in float32 the differences of products would lose their digits."""
    y = normalized(embeddings.double()) if normalize else embeddings.double()
    return FusedSquaredDistances.apply(y) if y.is_cuda else plain_squared_distances(y)


def root(squared: Tensor) -> Tensor:
    """Return distances from their squares. The gradient at 0, where none exists, is 0."""
    zero = squared <= 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def normalized(embeddings: Tensor) -> Tensor:
    """Return L2-normalised rows; a zero row stays zero."""
    return fused_normalize(embeddings) if embeddings.is_cuda else F.normalize(embeddings)


def fused_normalize(embeddings: Tensor) -> Tensor:
    """Compute F.normalize by rms_norm: on CUDA 5 kernels instead of 17, forward and backward."""
    d = embeddings.shape[1]
    return F.rms_norm(embeddings, (d,), eps=SHORTEST**2 / d) / d**0.5


def plain_squared_distances(y: Tensor) -> Tensor:
    """Return |y_i - y_j|^2 from the products of all rows."""
    products = y @ y.T
    squares = products.diagonal()
    return torch.sub(squares[:, None] + squares, products, alpha=2).clamp(min=0)


class FusedSquaredDistances(torch.autograd.Function):
    """`plain_squared_distances` with an explicit gradient: 4 kernels instead of 14."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """Return the distances."""
        ctx.save_for_backward(y)
        return plain_squared_distances(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return the gradient of y."""
        (y,) = ctx.saved_tensors
        both = grads[0] + grads[0].T
        return torch.addmm(both.sum(1, keepdim=True) * y, both, y, beta=2, alpha=-2)
