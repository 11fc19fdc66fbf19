"""CUDA implementations of the computations of `hloss.losses.pairwise`, equal up to rounding.

The time of a small batch depends on the number of kernels, so normalisation and distances use fewer kernels. `nonzero`
and boolean indexing wait for the GPU; these implementations avoid them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.losses.pairwise import DensePairs, root, squared_within


def true_places(mask: Tensor, n: int) -> Tensor:
    """Return the flat indices of the n true entries of a mask, in order."""
    return mask.flatten().byte().sort(descending=True, stable=True).indices[:n]


def fused_normalize(embeddings: Tensor) -> Tensor:
    """Compute F.normalize by rms_norm, with 5 kernels instead of 17 (forward and backward). Rows must not be zero."""
    d = embeddings.shape[1]
    return F.rms_norm(embeddings, (d,), eps=1e-36) / d**0.5


class FusedSquaredDistances(torch.autograd.Function):
    """`squared_within` with an explicit gradient: 4 kernels instead of 14."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """Return the distances."""
        ctx.save_for_backward(y)
        return squared_within(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return the gradient of y."""
        (y,) = ctx.saved_tensors
        both = grads[0] + grads[0].T
        return torch.addmm(both.sum(1, keepdim=True) * y, both, y, beta=2, alpha=-2)


def contrastive_terms(squared: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return `DensePairs.contrastive_sum`, and its derivative (n, m) with respect to the squared distances."""
    distance = root(squared)
    hinge = F.relu(margin - distance) * negative
    total = torch.where(positive, squared, hinge.square()).sum()
    divisor = distance.masked_fill(distance == 0, torch.inf)  # The derivative of root at 0 is 0.
    return total, torch.addcdiv(positive.to(hinge), hinge, divisor, value=-1)


class FusedContrastiveSum(torch.autograd.Function):
    """`DensePairs.contrastive_sum` with an explicit gradient."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
        """Return the sum."""
        total, slopes = contrastive_terms(squared, positive, negative, margin)
        ctx.save_for_backward(squared, positive, negative, slopes)
        ctx.margin = margin
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the squared distances."""
        squared, positive, negative, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            slopes = contrastive_terms(squared, positive, negative, ctx.margin)[1]
        return grads[0] * slopes, None, None, None


class CudaPairs(DensePairs):
    """`DensePairs` on a GPU."""

    _normalized = staticmethod(fused_normalize)
    _squared_within = staticmethod(FusedSquaredDistances.apply)

    def contrastive_sum(self, squared: Tensor, margin: float) -> Tensor:
        """Return the sum of D^2 over positive and max(0, margin - D)^2 over negative pairs, from D^2 (n, m)."""
        return FusedContrastiveSum.apply(squared, self.positive, self.negative, margin)

    def listed(self, matrix: Tensor, mask: Tensor, n: int) -> Tensor:
        """Return the n entries of a matrix where the mask is true, row by row."""
        return matrix.flatten().gather(0, true_places(mask, n))

    def lifted_hinges(self, by_row: Tensor, by_column: Tensor, distance: Tensor) -> Tensor:
        """Return max(0, log(exp by_row_i + exp by_column_j) + D_ij) of the positive pairs, 0 for all others, (n, m)."""
        hinge = F.relu(torch.logaddexp(by_row[:, None], by_column) + distance)
        return hinge.masked_fill(~self.each(self.positive), 0)


def swap_cuda_precision(precision: str) -> str:
    """Set the precision of float32 matrix products on CUDA ("ieee": exact), and return the previous precision."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        before, matmul.fp32_precision = matmul.fp32_precision, precision
    else:  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else precision)
    return before
