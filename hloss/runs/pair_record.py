"""Slopes and separation of pairs during training.

The slope of a pair is dL/ds, the derivative of the loss with respect to the similarity s of the pair. The similarity is
the cosine, or 1 - D^2/2 for a loss on Euclidean distances D; for unit vectors both are equal. A pair whose slope is 0
does not change the network. The separation of positive and negative pairs is measured by the overlap of their densities
and by the probability of reverse. This module implements the losses a second time, from their equations, as functions
of the similarity matrix.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hloss.losses import baselines
from hloss.losses.histogram import HistogramLoss, pair_slopes

LEAST_SLOPE = 1e-6  # absolute slope times the number of pairs of the group; smaller values count as 0
BINS = 100  # intervals of the densities whose overlap is measured


def slope_record(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure the slopes of the pairs of a batch.

    Args:
        loss: a loss of hloss on pairs; the result for any other loss is empty.
        embeddings: floating-point (n, d).
        labels: int64 (n,).

    Returns:
        `positive_slope` and `negative_slope` are the sums of the slopes of the positive and of the negative pairs.
        `pairs_with_slope` is the share of pairs with N |slope| > `LEAST_SLOPE`. N is the number of positive pairs for a
        positive pair, and the number of negative pairs for a negative pair. The dict is empty for other losses, and for
        a batch without positive or without negative pairs.
    """
    upper = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu(1)
    same = labels[:, None] == labels
    if not is_recorded(loss) or not (same & upper).any() or same.all():
        return {}
    slopes = pair_slope_matrix(loss, embeddings, labels)
    positive, negative = slopes[same & upper], slopes[~same & upper]
    found = [(group * len(group)).abs() > LEAST_SLOPE for group in (positive, negative)]
    return {
        "pairs_with_slope": torch.cat(found).double().mean().item(),
        "positive_slope": positive.sum().item(),
        "negative_slope": negative.sum().item(),
    }


def is_recorded(loss: nn.Module) -> bool:
    """Whether the slopes of a loss can be recorded."""
    return isinstance(loss, HistogramLoss) or type(loss) in DENSE_LOSSES


def pair_slope_matrix(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Slopes of the pairs of a batch, dL/ds.

    Args:
        loss: a loss of hloss on pairs.
        embeddings: floating-point (n, d).
        labels: int64 (n,), with positive and negative pairs.

    Returns:
        float64 (n, n), symmetric: entry (i, j) is the slope of the pair of i and j. The diagonal is 0.
    """
    normalize = loss.settings.normalize if isinstance(loss, HistogramLoss) else loss.normalize
    similarity = similarities(embeddings.detach(), "cosine" if normalize else "euclidean")
    if isinstance(loss, HistogramLoss):
        return _histogram_slopes(loss, embeddings.detach(), labels, similarity)
    same = labels[:, None] == labels
    with torch.enable_grad():
        similarity.requires_grad_()
        value = DENSE_LOSSES[type(loss)](loss, similarity, same.clone().fill_diagonal_(False), ~same)
        (slope,) = torch.autograd.grad(value, similarity)
    return (slope + slope.T).fill_diagonal_(0)


def similarities(embeddings: Tensor, metric: str) -> Tensor:
    """Cosine similarities, or 1 - D^2/2 for the metric "euclidean": float64 (n, n)."""
    y = embeddings.double()
    if metric == "cosine":
        y = F.normalize(y)
        return y @ y.T
    products = y @ y.T
    squares = products.diagonal()
    return 1 - (squares[:, None] + squares - 2 * products).clamp(min=0) / 2


def separation(embeddings: Tensor, labels: Tensor, metric: str) -> dict[str, float]:
    """Measure how far positive and negative pairs are separated.

    Args:
        embeddings: floating-point (n, d); memory grows with n^2.
        labels: int64 (n,).
        metric: "cosine" or "euclidean".

    Returns:
        `overlap`, the common mass of both densities: the sum of min(h+, h-) over BINS + 1 nodes. `reverse`, the
        probability that a negative pair is more similar than a positive pair; ties count half. Both lie in [0, 1].
        Similarities are cosines in [-1, 1], or negative distances in [-largest distance, 0]. The dict is empty without
        positive or without negative pairs.
    """
    similarity = similarities(embeddings, metric)
    low, high = -1.0, 1.0
    if metric == "euclidean":
        similarity = -(2 - 2 * similarity).clamp(min=0).sqrt()
        low, high = similarity.min().item() or -1.0, 0.0
    upper = torch.ones_like(similarity, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels
    positive, negative = similarity[same & upper], similarity[~same & upper]
    if not len(positive) or not len(negative):
        return {}
    densities = [_density((group - low) / (high - low)) for group in (positive, negative)]
    return {"overlap": torch.minimum(*densities).sum().item(), "reverse": _reverse(positive, negative)}


def _density(shares: Tensor) -> Tensor:
    """Mass at BINS + 1 nodes of values in [0, 1], each spread linearly over its two nodes: float64, sum 1."""
    position = shares.clamp(0, 1) * BINS
    node = position.long().clamp(max=BINS - 1)
    part = position - node
    mass = torch.bincount(node, 1 - part, BINS + 1) + torch.bincount(node + 1, part, BINS + 1)
    return mass / len(shares)


def _reverse(positive: Tensor, negative: Tensor) -> float:
    rising, found = np.sort(negative.cpu().numpy()), positive.cpu().numpy()  # numpy sorts faster than torch
    above, at_least = (
        len(found) * len(rising) - int(np.searchsorted(rising, found, side).sum()) for side in ("right", "left")
    )
    return (above + at_least) / 2 / len(found) / len(rising)


def _histogram_slopes(loss: HistogramLoss, embeddings: Tensor, labels: Tensor, similarity: Tensor) -> Tensor:
    """Slope of each pair, by the interval of its similarity; for the Beta density, at the interval's centre."""
    s = loss.settings
    settings = {name: getattr(s, name) for name in SETTINGS}
    found = pair_slopes(embeddings, labels, **settings)
    interval = ((similarity.clamp(-1, 1) + 1) / s.delta).long().clamp(max=s.n_bins - 1)
    same = labels[:, None] == labels
    n_positive = (int(same.sum()) - len(same)) / 2
    n_negative = int((~same).sum()) / 2
    slopes = torch.where(same, found.positive[interval] / n_positive, found.negative[interval] / n_negative)
    return slopes.fill_diagonal_(0)


SETTINGS = ("n_bins", "kernel", "bandwidth", "order_cost", "margin", "alpha", "density", "normalize")


def _binomial(loss: Any, s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    of_positives = F.softplus(-loss.alpha * (s[positive] - loss.beta), threshold=40).mean()
    return of_positives + F.softplus(loss.alpha * loss.C * (s[negative] - loss.beta), threshold=40).mean()


def _contrastive(loss: Any, s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    of_negatives = F.relu(loss.margin - _distances(s)[negative]).square().sum()
    return ((2 - 2 * s[positive]).sum() + of_negatives) / (2 * (len(s) ** 2 - len(s)))


def _lifted(loss: Any, s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    distance = _distances(s)
    nearest = (loss.margin - distance).masked_fill(~negative, -torch.inf).logsumexp(1)
    hinge = F.relu(torch.logaddexp(nearest[:, None], nearest) + distance)
    return hinge[positive].square().sum() / (2 * positive.sum())


def _triplet(loss: Any, s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    total, n_active = s.new_zeros(()), 0
    for row, positives, negatives in zip(2 - 2 * s, positive, negative, strict=True):
        hinge = row[positives][:, None] - row[negatives] + loss.margin
        active = hinge > 0
        if loss.semi_hard:
            active &= hinge < loss.margin - baselines.ROUNDING
        total = total + hinge[active].sum()
        n_active += int(active.sum())
    return total / max(n_active, 1)


def _quadruplet(loss: Any, s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    positives, negatives = s[positive], s[negative]
    below, reach = positives.detach().sort().values, (negatives.detach() + loss.margin).sort().values
    active_of_positive = len(reach) - torch.searchsorted(reach, positives.detach(), right=True)
    active_of_negative = torch.searchsorted(below, negatives.detach() + loss.margin)
    total = active_of_negative.double() @ negatives - active_of_positive.double() @ positives
    return total / (len(positives) * len(negatives))


def _distances(s: Tensor) -> Tensor:
    """Euclidean distances D of similarities 1 - D^2/2; the gradient at D = 0, which does not exist, is set to 0."""
    return (2 - 2 * s).clamp(min=1e-24).sqrt()


DENSE_LOSSES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    baselines.BinomialDeviance: _binomial,
    baselines.Contrastive: _contrastive,
    baselines.LiftedStructure: _lifted,
    baselines.Triplet: _triplet,
    baselines.SemiHardTriplet: _triplet,
    baselines.Quadruplet: _quadruplet,
}
