"""The histogram loss, equations 1-6 of Ustinova & Lempitsky (2016), exact and streaming.

Read `hloss.losses.reference` first: the same loss in dense form. The parts of this one are, in the order to read them,
`settings`, `pairs`, `densities` and `streaming`; on CUDA fused kernels take the place of the last three (`fused`).

The similarities s of the positive and of the negative pairs of a batch are binned into two histograms on the nodes
t_r = -1 + r Delta, r = 0 ... n_bins, Delta = 2 / n_bins (`n_bins` intervals, n_bins + 1 nodes). The loss is the
probability that a random negative pair is more similar than a random positive one: p_neg' C p_pos.

Nothing of the size of all pairs is ever stored, unless they are few (KEPT_PAIRS). A pair between nodes b and b+1 adds
1 - f to the first and f to the second (equation 2), so the forward pass keeps per interval the number of pairs and the
sum of f; the loss depends on s through those alone, so its slope dL/ds is constant within an interval and the backward
pass looks it up (equation 5).
Counts and sums are integers: they do not depend on the order of the pairs, on CPU or CUDA.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hloss.losses import fused
from hloss.losses.densities import BetaDensity, HistogramDensity, grid_nodes, missing_pairs
from hloss.losses.pairs import NEGATIVE, POSITIVE, Buffers, LabelPairs, MatrixPairs, PairBlock, find_pairs
from hloss.losses.settings import LossSettings
from hloss.losses.streaming import Sides, StreamedLoss, arrange, checked_sides, collect_density
from hloss.numerics import checked_norms, exact_products


class HistogramLoss(nn.Module):
    """Histogram loss, equations 1-6: the estimated probability that a negative pair is more similar than a positive.

    Args:
        n_bins: intervals that [-1, 1] is cut into, at least 1; Delta = 2 / n_bins (the paper's 0.01 is 200).
        kernel: how a pair is spread over the nodes: "triangular" (equation 2), "gaussian", "epanechnikov", "uniform".
        bandwidth: standard deviation of the kernel in nodes, above 0; the triangular kernel takes none.
        order_cost: cost C of a negative at t_r and a positive at t_q: "step" is 1 if t_q <= t_r + margin (equations
            4, 6), "linear" is max(0, margin - t_q + t_r), "softplus" is ln(1 + exp(alpha (margin + t_r - t_q))).
        margin: in similarity units, at least 0; for the step cost a whole number of bins.
        alpha: steepness of the softplus cost, above 0; the other costs take none (1.0).
        density: "histogram", or "beta", the authors' fit of a Beta density to each group of pairs by its moments.
        normalize: L2-normalise the embeddings, as the authors do. If False they must have |s| <= 1 (+ 1e-4).
        on_degenerate: "raise" a ValueError or return "zero" (with a zero gradient) when there is no positive or no
            negative pair, or no variance for a Beta density to fit.

    The step cost's loss is in [0, 1]. ValueError for a setting out of its range, naming it.
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
        """The loss of the pairs i < j of `embeddings`, or of all pairs of an embedding with a reference embedding.

        Args:
            embeddings: (n, d), floating; half precision is computed in float32.
            labels: (n,) integer class labels, or a matrix of pairs, (n, n) symmetric or (n, m) against references:
                +1 positive, -1 negative, 0 ignored (the diagonal of (n, n) is never a pair).
            reference_embeddings: (m, d), for example a memory of earlier batches; gradient flows where it is required.
            reference_labels: (m,) integer class labels of the references; none with a matrix of pairs.

        Returns a scalar of the embeddings' dtype (float32 for half precision). ValueError for wrong shapes and, naming
        the rows, for NaN, infinite or zero embeddings. Second derivatives are refused.
        """
        s = self.settings
        if fused.serves(embeddings, labels, reference_embeddings, reference_labels, s):
            return fused.loss(embeddings, labels, reference_embeddings, reference_labels, s)
        norms, reference_norms = checked_sides(embeddings, reference_embeddings, s.normalize)
        pairs = find_pairs(embeddings, labels, reference_embeddings, reference_labels)
        return StreamedLoss.apply(embeddings, reference_embeddings, norms, reference_norms, pairs, s)

    def extra_repr(self) -> str:
        s = self.settings
        shape = s.density if s.density == "beta" else f"{s.kernel} kernel"
        return f"n_bins={s.n_bins} (Delta={s.delta:g}), {shape}, {s.order_cost} cost, margin={s.margin:g}"


def histogram_loss(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    **settings: object,
) -> Tensor:
    """`HistogramLoss(**settings)(embeddings, labels, ...)`: the loss as a pure function."""
    return HistogramLoss(**settings)(embeddings, labels, reference_embeddings, reference_labels)  # type: ignore[arg-type]


class PairHistograms(NamedTuple):
    """Two densities on the same nodes, float64 of shape (n_bins + 1,), each of mass 1."""

    nodes: Tensor
    positive: Tensor
    negative: Tensor


def pair_histograms(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    **settings: object,
) -> PairHistograms:
    """The two densities p_pos and p_neg that the loss compares (equation 1 with `HistogramLoss`'s settings)."""
    density = _density_of(embeddings, labels, reference_embeddings, reference_labels, settings)
    negative, positive = density.densities()
    return PairHistograms(grid_nodes(density.s.n_bins, positive.device), positive, negative)


class PairSlopes(NamedTuple):
    """Where the loss pushes: at the similarity in the middle of each interval, float64 of shape (n_bins,)."""

    similarities: Tensor
    positive: Tensor
    negative: Tensor


def pair_slopes(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    **settings: object,
) -> PairSlopes:
    """dL/ds of one pair by its similarity s, times the number of pairs of its sign (equation 5).

    The positive slopes are at most 0 and the negative at least 0 for the histograms: positives are drawn together,
    negatives are driven apart.
    """
    density = _density_of(embeddings, labels, reference_embeddings, reference_labels, settings)
    n_bins, slopes = density.s.n_bins, density.loss_and_slopes()[1]
    position = torch.arange(n_bins, device=slopes.device)[None] + slopes.new_tensor(0.5)
    everything = slice(0, n_bins)
    found = []
    for group in (POSITIVE, NEGATIVE):
        groups = torch.full_like(position, group, dtype=torch.int8)
        block, buffers = PairBlock(slice(0, 1), everything, everything, groups), Buffers()
        places = density.places(position, block, buffers)
        found.append(density.slope(slopes, places, block, buffers)[0] * density.counts[group].sum())
    return PairSlopes(position[0] * density.s.delta - 1, *found)


@torch.no_grad()
def _density_of(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    settings: dict[str, object],
) -> "HistogramDensity | BetaDensity":
    s = HistogramLoss(**settings).settings  # type: ignore[arg-type]
    norms, reference_norms = checked_sides(embeddings, references, s.normalize)
    pairs = find_pairs(embeddings, labels, references, reference_labels)
    with exact_products(embeddings.device):
        density, _ = collect_density(Sides(embeddings, references, norms, reference_norms, pairs, s), pairs, s)
    if density.undefined:
        raise ValueError(density.undefined)
    return density


def reverse_probability(embeddings: Tensor, labels: Tensor, ties: str = "half") -> float:
    """The probability that a negative pair is more similar than a positive one, exactly: what the loss estimates.

    Over all pairs i < j of L2-normalised embeddings (n, d) and labels (n,) or a matrix of pairs as in `HistogramLoss`.
    Equal similarities count one half (then it is 1 - ROC AUC of the pairs) or, with `ties="count"`, fully: the limit of
    equation 4 for many bins. In [0, 1]. Takes O(P log p) time for P pairs, p of them positive, and O(p) memory.
    """
    if ties not in ("half", "count"):
        raise ValueError(f'ties must be "half" or "count", got {ties!r}')
    norms = checked_norms("embeddings", embeddings, True)
    pairs = find_pairs(embeddings, labels, None, None)
    with torch.no_grad(), exact_products(embeddings.device):
        unit = arrange(embeddings, norms, pairs.row_order)
        positive = torch.cat([unit.new_empty(0), *_similarities(unit, pairs, POSITIVE)]).sort().values
        n_negative, reversed_pairs = 0, 0.0
        for negative in _similarities(unit, pairs, NEGATIVE):
            n_negative += len(negative)
            at_most = torch.searchsorted(positive, negative, right=True)
            reversed_pairs += at_most.sum().item()
            if ties == "half" and len(positive):
                equal = positive[(at_most - 1).clamp_(0)] == negative  # few: these alone are searched again
                below = torch.searchsorted(positive, negative[equal])
                reversed_pairs -= (at_most[equal] - below).sum().item() / 2
    if not (len(positive) and n_negative):
        raise ValueError(missing_pairs(len(positive), n_negative))
    return reversed_pairs / len(positive) / n_negative


def _similarities(unit: Tensor, pairs: "LabelPairs | MatrixPairs", group: int) -> Iterator[Tensor]:
    """The similarities of the pairs of one group, block by block."""
    for block in pairs.blocks():
        if block.groups is None and group == POSITIVE:
            continue  # all of it is negative
        similarity = unit[block.rows] @ unit[block.columns].T
        groups = torch.full_like(similarity, NEGATIVE, dtype=torch.int8)
        if block.groups is not None:
            groups[:, block.window] = block.groups
        yield similarity[groups == group]
