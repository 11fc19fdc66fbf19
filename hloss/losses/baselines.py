"""Baseline losses as their papers define them.

Memory is O(n^2), also for losses over triplets and quadruplets. A triplet is active if its hinge is above 0. The term
of an active triplet is a difference of two distances plus a constant, so the sum over triplets is a weighted sum of
distances. The weight of a distance d_ap is the number of active triplets that contain it; the weight of d_an is minus
this number. Sorting gives these numbers. Quadruplets are summed in the same way, with similarities. Within one batch,
losses over pairs use the pairs i < j.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hloss.losses.batch import Batch
from hloss.losses.cuda_forms import CudaPairs
from hloss.losses.pairwise import DensePairs, root
from hloss.losses.settings import ON_DEGENERATE, missing_pairs
from hloss.numerics import full_precision, number, one_of, switch, to_normalize, to_use_raw

ROUNDING = 1e-12  # Smaller differences of squared distances count as 0; their float64 error is about 1e-15.


class BaselineLoss(nn.Module):
    """Base class of the baseline losses, called as `loss(embeddings, labels)`.

    A loss is undefined without a positive or without a negative pair (`Contrastive`: without any pair). It then raises
    ValueError if `on_degenerate` is "raise", or returns 0 with a zero gradient if it is "zero".
    """

    needs_both_groups = True
    has_anchors = False  # whether (i, j) and (j, i) are different pairs
    normalize = True

    def __init__(self, on_degenerate: str) -> None:
        super().__init__()
        self.on_degenerate = one_of("on_degenerate", on_degenerate, ON_DEGENERATE)

    @property
    def metric(self) -> str:
        """Metric for retrieval: "cosine" if the loss normalises the embeddings, else "euclidean"."""
        return "cosine" if self.normalize else "euclidean"

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the pairs of a batch, or of the pairs of every embedding with every reference.

        Arguments and result are those of `HistogramLoss.forward`. For losses over triplets, each embedding is an
        anchor, and its row of a matrix of pairs gives its positives and negatives. Synchronises with the embeddings'
        device once.

        Raises:
            ValueError: as for `HistogramLoss.forward`, or the norm of an embedding is so large that squared distances
                can overflow.
        """
        batch = Batch(embeddings, labels, reference_embeddings, reference_labels)
        pairs = (CudaPairs if embeddings.is_cuda else DensePairs)(batch)
        prepare = to_normalize if self.normalize else to_use_raw
        n_pairs = [int(n) for n in batch.verify(prepare, *pairs.counts())]
        pairs.n_positive, pairs.n_negative = n_pairs
        dtype = full_precision(embeddings[:0]).dtype
        if all(n_pairs) or (any(n_pairs) and not self.needs_both_groups):
            return self._loss(pairs).to(dtype)
        if self.on_degenerate == "zero":
            sides = [x for x in (embeddings, reference_embeddings) if x is not None]
            return torch.cat([x * 0 for x in sides]).sum().to(dtype)
        raise ValueError(missing_pairs(pairs.n_negative // pairs.orders, pairs.n_positive // pairs.orders))

    def _loss(self, pairs: DensePairs) -> Tensor:
        raise NotImplementedError


class BinomialDeviance(BaselineLoss):
    """Binomial deviance on cosine similarities s, equations 7-8 of the histogram loss's paper (after Yi et al. 2014).

    The loss is the mean of log(1 + exp(-alpha (s - beta))) over positive pairs, plus the mean of
    log(1 + exp(alpha C (s - beta))) over negative pairs. C scales the slope of a negative pair's term, not its weight.

    Args:
        alpha: slope, above 0; the authors use 2.
        beta: similarity at which the term of a pair is log 2; the authors use 0.5.
        C: factor of the slope for negative pairs, above 0; the authors use 25, and 10 on CUHK03.
        on_degenerate: "raise" or "zero", for a batch without a positive or without a negative pair.

    Example:
        >>> BinomialDeviance(C=25)(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(2.9408)
    """

    def __init__(self, alpha: float = 2.0, beta: float = 0.5, C: float = 10.0, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.alpha = number("alpha", alpha, above=0)
        self.beta = number("beta", beta)
        self.C = number("C", C, above=0)

    def _loss(self, pairs: DensePairs) -> Tensor:
        similarity = pairs.similarities()
        slope = self.alpha * torch.full_like(similarity, self.C).masked_fill_(pairs.positive, -1)
        weight = torch.zeros_like(similarity).masked_fill_(pairs.negative, 1 / pairs.n_negative)
        weight.masked_fill_(pairs.positive, 1 / pairs.n_positive)
        # The default threshold has an error of 2e-9.
        deviance = F.softplus(slope * (similarity - self.beta), threshold=40)
        return (deviance * weight).sum()


class LiftedStructure(BaselineLoss):
    """Lifted structured loss on Euclidean distances D, equation 4 of Song et al. 2016.

    For each of the |P| positive pairs, J_ij = D_ij + log(sum over negatives k of i of exp(margin - D_ik) + sum over
    negatives l of j of exp(margin - D_jl)). The loss is sum max(0, J_ij)^2 / (2 |P|).

    Args:
        margin: margin of the distances.
        normalize: L2-normalise the embeddings, so that distances are at most 2. The paper does not normalise.
        on_degenerate: "raise" or "zero", for a batch without a positive or without a negative pair.

    Example:
        >>> LiftedStructure()(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.7256)
    """

    has_anchors = True

    def __init__(self, margin: float = 1.0, normalize: bool = False, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.normalize = switch("normalize", normalize)
        self.margin = number("margin", margin)

    def _loss(self, pairs: DensePairs) -> Tensor:
        distance = root(pairs.squared_distances(self.normalize))
        # A finite number replaces -inf: logsumexp of a row without a negative, all -inf, would have a NaN gradient.
        rivals = (self.margin - distance).masked_fill(~pairs.negative, torch.finfo(distance.dtype).min)
        by_row = rivals.logsumexp(1)
        by_column = by_row if pairs.batch.within else rivals.logsumexp(0)
        total = pairs.lifted_hinges(by_row, by_column, distance).square().sum()
        return total / (2 * pairs.n_positive // pairs.orders)


class Triplet(BaselineLoss):
    """Triplet hinge on squared Euclidean distances d of L2-normalised embeddings, equation 3 of Schroff et al. 2015.

    The loss is the mean of the positive values d_ap - d_an + margin over all triplets (anchor a, positive p, negative
    n). The loss is 0 with a zero gradient if no value is positive.

    Args:
        margin: margin of the squared distances, above 0; the paper (FaceNet) uses 0.2.
        on_degenerate: "raise" or "zero", for a batch without a positive or without a negative pair.

    Example:
        >>> Triplet(margin=1.0)(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.6000)
    """

    has_anchors = True
    semi_hard = False

    def __init__(self, margin: float = 0.2, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.margin = number("margin", margin, above=0)

    def _loss(self, pairs: DensePairs) -> Tensor:
        distance = pairs.squared_distances(normalize=True)
        margins = (self.margin, ROUNDING) if self.semi_hard else (self.margin,)
        weight = _memberships(distance.detach(), pairs, margins)
        n_triplets = weight.clamp(min=0).sum()
        total = (weight * distance).sum() + self.margin * n_triplets
        return total / n_triplets.clamp(min=1)


class SemiHardTriplet(Triplet):
    """`Triplet` over all semi-hard triplets of the batch: those with d_ap < d_an < d_ap + margin.

    FaceNet samples semi-hard negatives instead; TensorFlow Addons takes one negative per positive pair.

    Example:
        >>> SemiHardTriplet(margin=1.0)(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.6000)
    """

    semi_hard = True


class Contrastive(BaselineLoss):
    """Contrastive loss on Euclidean distances D (Hadsell, Chopra & LeCun 2006). It is undefined without any pair.

    Positive pairs cost D^2 / 2, negative pairs max(0, margin - D)^2 / 2. The loss is the mean over all pairs.

    Args:
        margin: distance above which the cost of a negative pair is 0; above 0.
        normalize: L2-normalise the embeddings, unlike the paper. If False, choose a margin that suits the embeddings'
            norms.
        on_degenerate: "raise" or "zero", for a batch without any pair.

    Example:
        >>> Contrastive(normalize=True)(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.0685)
    """

    needs_both_groups = False

    def __init__(self, margin: float = 1.0, normalize: bool = False, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.normalize = switch("normalize", normalize)
        self.margin = number("margin", margin, above=0)

    def _loss(self, pairs: DensePairs) -> Tensor:
        total = pairs.contrastive_sum(pairs.squared_distances(self.normalize), self.margin)
        return total / (2 * (pairs.n_positive + pairs.n_negative))


class Quadruplet(BaselineLoss):
    """Quadruplet hinge on cosine similarities, the limit of the histogram loss with the linear cost for many bins.

    The loss is the mean of max(0, margin + s_negative - s_positive) over all combinations of a positive and a negative
    pair. There are O(n^4) terms; sorting the pairs makes the exact sum cheap.

    Args:
        margin: margin of the similarities, at least 0.
        on_degenerate: "raise" or "zero", for a batch without a positive or without a negative pair.

    Example:
        >>> Quadruplet()(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.)
    """

    def __init__(self, margin: float = 0.1, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.margin = number("margin", margin, least=0)

    def _loss(self, pairs: DensePairs) -> Tensor:
        similarity = pairs.similarities(torch.float64)
        positives = pairs.listed(similarity, pairs.each(pairs.positive), pairs.n_positive // pairs.orders)
        negatives = pairs.listed(similarity, pairs.each(pairs.negative), pairs.n_negative // pairs.orders)
        reach = negatives.detach() + self.margin
        below, above = positives.detach().sort().values, reach.sort().values
        # A term is active where s_positive < s_negative + margin. Each pair is weighted by its number of active terms.
        by_positive = len(above) - torch.searchsorted(above, positives.detach(), right=True)
        by_negative = torch.searchsorted(below, reach)
        total = by_negative.double() @ (negatives + self.margin) - by_positive.double() @ positives
        return total / (len(positives) * len(negatives))


def _memberships(distance: Tensor, pairs: DensePairs, margins: tuple[float, ...]) -> Tensor:
    """Return the weight of each pair, (n, m): the number of triplets with d_an < d_ap + margin that contain the pair.

    The weight of a negative pair is minus this number. With two margins, the result is the weights for the first margin
    minus those for the second.
    """
    reach = torch.stack([distance + margin for margin in margins])
    negatives = distance.masked_fill(~pairs.negative, torch.inf).sort(1).values.expand_as(reach)
    of_positive = torch.searchsorted(negatives.contiguous(), reach)
    reaching = reach.masked_fill(~pairs.positive, -torch.inf).sort(2).values
    not_reaching = torch.searchsorted(reaching, distance.expand_as(reach).contiguous(), right=True)
    of_negative = torch.where(pairs.negative, not_reaching - distance.shape[1], 0)
    n_triplets = torch.where(pairs.positive, of_positive, of_negative)
    return (n_triplets[0] if len(margins) == 1 else n_triplets[0] - n_triplets[1]).to(distance)


BASELINES: dict[str, type[nn.Module]] = {
    "binomial": BinomialDeviance,
    "lifted": LiftedStructure,
    "triplet": Triplet,
    "semi-hard-triplet": SemiHardTriplet,
    "contrastive": Contrastive,
    "quadruplet": Quadruplet,
}
