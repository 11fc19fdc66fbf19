"""The histogram loss of Ustinova & Lempitsky (2016), equations 1-6, exact and without a matrix of all pairs.

`hloss.losses.reference` defines the same loss in few lines; read it first. Then read `settings`, `pairs`, `densities`
and `streaming`. On a GPU, Triton kernels (`fused`) replace the last three, except for float64 and the Beta density.

The similarity s of a pair lies between two neighbouring nodes, at t_b + f Delta with 0 <= f < 1. The pair adds 1 - f to
node b and f to node b + 1 (equation 2). The forward pass counts the pairs in each interval and sums their f. The
derivative dL/ds is constant within an interval (equation 5), so the backward pass reads it from a table. Threads add
integers, so the order in which they add the pairs does not change counts and sums. Pairs are computed in blocks: with
class labels, memory is O(n d), not O(n^2).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hloss.losses import compiled, fused
from hloss.losses.densities import Density, grid_nodes
from hloss.losses.pairs import NEGATIVE, POSITIVE, Buffers, PairBlock, Pairs
from hloss.losses.settings import LossSettings, missing_pairs
from hloss.losses.streaming import StreamedLoss, arrange, checked_pairs, collect_density
from hloss.numerics import check_embeddings, exact_products, integers, one_of


class HistogramLoss(nn.Module):
    """Histogram loss: the estimated probability that a negative pair is more similar than a positive pair.

    The nodes t_r = -1 + r Delta, r = 0 ... n_bins, divide [-1, 1] into n_bins intervals of width Delta = 2 / n_bins.

    Args:
        n_bins: number of intervals, at least 1. The paper's Delta = 0.01 is n_bins=200.
        kernel: kernel that distributes a pair over the nodes: "triangular" (equation 2), "gaussian", "epanechnikov" or
            "uniform".
        bandwidth: standard deviation of the kernel in units of Delta, above 0; None for the triangular kernel.
        order_cost: cost C of a negative pair at t_r and a positive pair at t_q. "step" is 1 if t_q <= t_r + margin
            (equations 4, 6), "linear" max(0, margin + t_r - t_q), "softplus" ln(1 + exp(alpha (margin + t_r - t_q))).
        margin: margin of the similarities, at least 0; a multiple of Delta for the step cost.
        alpha: steepness of the softplus cost, above 0; 1 for other costs.
        density: "histogram", or "beta": Beta densities with the mean and variance of the positive and of the negative
            similarities, as in the authors' code.
        normalize: L2-normalise the embeddings. If False, their squared norms must be at most 1 + 1e-4.
        on_degenerate: "raise" an error or return "zero" if the loss is undefined. It is undefined without a positive
            pair, without a negative pair, or if a Beta density does not fit.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> HistogramLoss(n_bins=10)(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.)
    """

    def __init__(
        self,
        n_bins: int = 200,
        kernel: str = "triangular",
        bandwidth: float | None = None,
        order_cost: str = "step",
        margin: float = 0.0,
        alpha: float = 1.0,
        density: str = "histogram",
        normalize: bool = True,
        on_degenerate: str = "raise",
    ) -> None:
        super().__init__()
        self.settings = LossSettings(
            n_bins, kernel, bandwidth, order_cost, margin, alpha, density, normalize, on_degenerate
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the pairs i < j of a batch, or of the pairs of every embedding with every reference.

        Args:
            embeddings: floating-point (n, d). Half-precision embeddings are converted to float32, also under autocast.
            labels: integer class labels (n,), or a matrix of pairs: +1 positive, -1 negative, 0 ignored. With
                references, the matrix is (n, m). Without, it is symmetric (n, n), and its diagonal is ignored.
            reference_embeddings: (m, d), for example a memory of earlier batches. They get a gradient if
                they require it.
            reference_labels: integer class labels (m,) of the references; None with a matrix of pairs.

        Returns:
            Scalar of the embeddings' dtype, float32 for half precision. The loss has no second derivatives.

        Raises:
            ValueError: a shape, dtype or entry of a matrix of pairs is wrong; an embedding is NaN, infinite, zero with
                normalize=True or longer than 1 with normalize=False; the loss is undefined with on_degenerate="raise".
            RuntimeError: the call is inside a transform of torch.func, or the Beta density is compiled or exported.
        """
        s = self.settings
        compiled.refuse_transforms()
        check_embeddings("embeddings", embeddings)
        labels = integers("labels", labels)
        if reference_labels is not None:
            reference_labels = integers("reference_labels", reference_labels)
        if fused.serves(embeddings, labels, reference_embeddings, reference_labels, s):
            return fused.loss(embeddings, labels, reference_embeddings, reference_labels, s)
        if torch.compiler.is_compiling():
            return compiled.loss(embeddings, labels, reference_embeddings, reference_labels, s)
        checked = checked_pairs(embeddings, labels, reference_embeddings, reference_labels, normalize=s.normalize)
        return StreamedLoss.apply(*checked, s)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        s = self.settings
        shape = s.density if s.density == "beta" else f"{s.kernel} kernel"
        return f"n_bins={s.n_bins} (Delta={s.delta:g}), {shape}, {s.order_cost} cost, margin={s.margin:g}"


def histogram_loss(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return `HistogramLoss(**settings)(embeddings, labels, reference_embeddings, reference_labels)`.

    Example:
        >>> histogram_loss(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]), n_bins=10)
        tensor(0.)
    """
    return HistogramLoss(**settings)(embeddings, labels, reference_embeddings, reference_labels)


class PairHistograms(NamedTuple):
    """Densities p_pos and p_neg at the nodes, float64 (n_bins + 1,). Histograms sum to 1; Beta densities need not."""

    nodes: Tensor
    positive: Tensor
    negative: Tensor


def pair_histograms(embeddings: Tensor, labels: Tensor, *references: Tensor | None, **settings: Any) -> PairHistograms:
    """Return the densities of the positive and of the negative similarities (equation 1).

    Takes the arguments of `histogram_loss` and raises its errors; an undefined loss always raises ValueError.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> pair_histograms(embeddings, torch.tensor([0, 0, 1]), n_bins=4).positive
        tensor([0.0000, 0.0000, 0.0000, 0.4000, 0.6000], dtype=torch.float64)
    """
    density = _density_of(embeddings, labels, *references, **settings)
    negative, positive = density.densities()
    return PairHistograms(grid_nodes(density.s.n_bins, positive.device), positive, negative)


class PairSlopes(NamedTuple):
    """Slopes from `pair_slopes` at the similarity in the middle of each interval, float64 (n_bins,)."""

    similarities: Tensor
    positive: Tensor
    negative: Tensor


def pair_slopes(embeddings: Tensor, labels: Tensor, *references: Tensor | None, **settings: Any) -> PairSlopes:
    """Return dL/ds (equation 5) of a positive and of a negative pair, each times the number of such pairs.

    Takes the arguments of `histogram_loss` and raises its errors; an undefined loss always raises ValueError.

    Example:
        >>> pair_slopes(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]), n_bins=4).positive
        tensor([ 0.0000,  0.0000, -1.0000, -0.8000], dtype=torch.float64)
    """
    density = _density_of(embeddings, labels, *references, **settings)
    n_bins, slopes = density.s.n_bins, density.loss_and_slopes()[1]
    position = (torch.arange(n_bins, device=slopes.device) + slopes.new_tensor(0.5)).expand(2, n_bins)
    groups = torch.tensor([[NEGATIVE], [POSITIVE]], dtype=torch.int8, device=slopes.device).expand(2, n_bins)
    block, buffers = PairBlock(slice(0, 2), slice(0, n_bins), slice(0, n_bins), groups), Buffers()
    places = density.places(position, block, buffers)
    n_pairs = density.counts.view(3, -1).sum(1)[:2, None]
    negative, positive = density.slope(slopes, places, block, buffers) * n_pairs
    return PairSlopes(position[0] * density.s.delta - 1, positive, negative)


@torch.no_grad()
def _density_of(embeddings: Tensor, labels: Tensor, *references: Tensor | None, **settings: Any) -> Density:
    s = HistogramLoss(**settings).settings
    density, _ = collect_density(*checked_pairs(embeddings, labels, *references, normalize=s.normalize), s)
    if density.undefined:
        raise ValueError(density.undefined)
    return density


def reverse_probability(embeddings: Tensor, labels: Tensor, ties: str = "half") -> float:
    """Return the exact probability that a negative pair is more similar than a positive pair.

    The histogram loss estimates this probability.
    For P pairs i < j, of which p are positive, time is O(P (d + log p)) and memory is O(n d + p).

    Args:
        embeddings: floating-point (n, d). The function L2-normalises them.
        labels: integer class labels (n,), or a matrix of pairs as for `HistogramLoss`.
        ties: weight of a negative pair that is exactly as similar as a positive pair. With "half", the weight is 1/2,
            and the result is 1 - ROC AUC. With "count", it is 1, and the result is the limit of the loss for many bins.

    Raises:
        ValueError: an argument is wrong, or there is no positive or no negative pair.

    Example:
        >>> reverse_probability(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
        0.5
    """
    one_of("ties", ties, ("half", "count"))
    embeddings, _, (norms, _), pairs = checked_pairs(embeddings, labels, normalize=True)
    with torch.no_grad(), exact_products(embeddings.device):
        unit = arrange(embeddings, norms, pairs.row_order)
        positive = torch.cat([unit.new_empty(0), *_similarities(unit, pairs, POSITIVE)]).sort().values
        n_negative, reversed_pairs = 0, 0.0
        for negative in _similarities(unit, pairs, NEGATIVE):
            n_negative += len(negative)
            at_most = torch.searchsorted(positive, negative, right=True)
            below = torch.searchsorted(positive, negative) if ties == "half" else at_most
            reversed_pairs += (at_most + below).sum().item() / 2
    if undefined := missing_pairs(n_negative, len(positive)):
        raise ValueError(undefined)
    return reversed_pairs / len(positive) / n_negative


def _similarities(unit: Tensor, pairs: Pairs, group: int) -> Iterator[Tensor]:
    """Yield the similarities of the pairs of one group, block by block."""
    for block in pairs.blocks():
        if block.groups is None and group == POSITIVE:
            continue  # All pairs of this block are negative.
        similarity = unit[block.rows] @ unit[block.columns].T
        groups = torch.full_like(similarity, NEGATIVE, dtype=torch.int8)
        if block.groups is not None:
            groups[:, block.window] = block.groups
        yield similarity[groups == group]
