"""Baseline losses, each as its own paper defines it.

Memory is O(n^2), also for losses over triplets and quadruplets. An active hinge is linear, so the sum over triplets is
a sum over pairs, each weighted by its number of active terms. Sorting gives these numbers. Pairs are i < j.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hloss.losses.pairwise import cosine_similarities, root, squared_distances
from hloss.losses.settings import ON_DEGENERATE, number, switch
from hloss.numerics import check_embeddings, check_finite, check_labels, full_precision, one_of

ROUNDING = 1e-12  # Closer squared distances of unit vectors count as equal: their float64 error is about 1e-15.


class BaselineLoss(nn.Module):
    """Base class: `loss(embeddings, labels)`. The loss needs a positive and a negative pair.

    Args:
        on_degenerate: "raise" a ValueError for an undefined loss, or return "zero" with a zero gradient.
    """

    needs_both_groups = True
    normalize = True

    def __init__(self, on_degenerate: str) -> None:
        super().__init__()
        self.on_degenerate = one_of("on_degenerate", on_degenerate, ON_DEGENERATE)

    @property
    def metric(self) -> str:
        """Similarity for retrieval: "cosine" if the loss normalises the embeddings, else "euclidean"."""
        return "cosine" if self.normalize else "euclidean"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch. Synchronises with the embeddings' device once.

        Args:
            embeddings: floating-point (n, d); half precision is computed in float32, also under autocast.
            labels: integer class labels (n,), on any device.

        Returns:
            Scalar of the embeddings' dtype, float32 for half precision.

        Raises:
            ValueError: a shape or dtype is wrong, an embedding is NaN or infinite, or the loss is undefined.
        """
        check_embeddings("embeddings", embeddings)
        check_labels("labels", labels, len(embeddings))
        embeddings, labels = full_precision(embeddings), labels.to(embeddings.device, non_blocking=embeddings.is_cuda)
        same = labels[:, None] == labels
        total, n_same = torch.stack([embeddings.detach().sum(dtype=torch.float64), same.sum()]).tolist()
        if not math.isfinite(total):
            check_finite(embeddings)
        n_positive, n_negative = int(n_same) - len(same), len(same) ** 2 - int(n_same)
        if (n_positive and n_negative) or (len(same) > 1 and not self.needs_both_groups):
            return self._loss(embeddings, same, n_positive, n_negative).to(embeddings.dtype)
        if self.on_degenerate == "zero":
            return embeddings.sum() * 0
        raise ValueError(
            f"a batch of {len(embeddings)} with {n_positive // 2} positive and {n_negative // 2} negative pairs leaves "
            'this loss undefined; draw several images of several classes, or set on_degenerate="zero"'
        )

    def _loss(self, embeddings: Tensor, same: Tensor, n_positive: int, n_negative: int) -> Tensor:
        """Compute the loss from the mask (n, n) of equal labels and the numbers of ordered pairs."""
        raise NotImplementedError


class BinomialDeviance(BaselineLoss):
    """Binomial deviance on cosine similarities s, equations 7-8 of the histogram loss's paper (after Yi et al. 2014).

    Mean of log(1 + exp(-alpha (s - beta))) over positive pairs plus mean of log(1 + exp(alpha C (s - beta))) over
    negative pairs. C scales the slope for negative pairs; it is no weight.

    Args:
        alpha: slope, above 0; the authors use 2.
        beta: similarity where the deviance bends; the authors use 0.5.
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

    def _loss(self, embeddings: Tensor, same: Tensor, n_positive: int, n_negative: int) -> Tensor:
        slope = self.alpha * embeddings.new_full(same.shape, self.C).masked_fill_(same, -1)
        weight = embeddings.new_full(same.shape, 1 / n_negative).masked_fill_(same, 1 / n_positive).fill_diagonal_(0)
        similarity = cosine_similarities(embeddings)
        deviance = F.softplus(slope * (similarity - self.beta), threshold=40)  # The default threshold errs by 2e-9.
        return (deviance * weight).sum()


class LiftedStructure(BaselineLoss):
    """Lifted structured loss on Euclidean distances D, equation 4 of Song et al. 2016.

    For each of the |P| positive pairs, J_ij = D_ij + log(sum over negatives k of i of exp(margin - D_ik) + sum over
    negatives l of j of exp(margin - D_jl)). The loss is sum max(0, J_ij)^2 / (2 |P|).

    Args:
        margin: margin of the distances.
        normalize: L2-normalise the embeddings, which the paper does not do; distances are then at most 2.
        on_degenerate: "raise" or "zero", for a batch without a positive or without a negative pair.

    Example:
        >>> LiftedStructure()(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.7256)
    """

    def __init__(self, margin: float = 1.0, normalize: bool = False, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.normalize = switch("normalize", normalize)
        self.margin = number("margin", margin)

    def _loss(self, embeddings: Tensor, same: Tensor, n_positive: int, n_negative: int) -> Tensor:
        distance = root(squared_distances(embeddings, self.normalize))
        rivals = (self.margin - distance).masked_fill(same, -torch.inf)
        # Every row has a negative: a row without one would share its label with the whole batch.
        hinges = all_hinges if embeddings.is_cuda else listed_hinges
        return hinges(rivals.logsumexp(1), distance, same).square().sum() / n_positive


class Triplet(BaselineLoss):
    """Triplet hinge on squared Euclidean distances d of L2-normalised embeddings, equation 3 of Schroff et al. 2015.

    The mean of d_ap - d_an + margin over all triplets (anchor a, positive p, negative n) where it is above 0. Zero with
    a zero gradient if there is no such triplet.

    Args:
        margin: margin of the squared distances, above 0; the paper (FaceNet) uses 0.2.
        on_degenerate: "raise" or "zero", for a batch without a positive or without a negative pair.

    Example:
        >>> Triplet(margin=1.0)(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.6000)
    """

    semi_hard = False

    def __init__(self, margin: float = 0.2, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.margin = number("margin", margin, above=0)

    def _loss(self, embeddings: Tensor, same: Tensor, n_positive: int, n_negative: int) -> Tensor:
        distance = squared_distances(embeddings, normalize=True)
        margins = (self.margin, ROUNDING) if self.semi_hard else (self.margin,)
        weight = _memberships(distance.detach(), same, margins)
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
    """Contrastive loss on Euclidean distances D, of Hadsell, Chopra & LeCun 2006. Undefined for a batch of one.

    The mean over pairs of D^2 / 2 for positive and max(0, margin - D)^2 / 2 for negative pairs.

    Args:
        margin: distance from which negative pairs cost nothing, above 0.
        normalize: L2-normalise the embeddings, unlike the paper. Otherwise the margin must fit their scale.
        on_degenerate: "raise" or "zero", for a batch of one embedding.

    Example:
        >>> Contrastive(normalize=True)(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.0685)
    """

    needs_both_groups = False

    def __init__(self, margin: float = 1.0, normalize: bool = False, on_degenerate: str = "raise") -> None:
        super().__init__(on_degenerate)
        self.normalize = switch("normalize", normalize)
        self.margin = number("margin", margin, above=0)

    def _loss(self, embeddings: Tensor, same: Tensor, n_positive: int, n_negative: int) -> Tensor:
        negative, positive = ~same, same.fill_diagonal_(False)
        squared = squared_distances(embeddings, self.normalize)
        hinge = F.relu(self.margin - root(squared)).square()
        return (squared * positive + hinge * negative).sum() / (2 * (n_positive + n_negative))


class Quadruplet(BaselineLoss):
    """Quadruplet hinge on cosine similarities, the limit of the histogram loss with the linear cost for many bins.

    The mean of max(0, margin + s_negative - s_positive) over all combinations of a positive and a negative pair. These
    are O(n^4) terms; sorting the pairs sums them exactly.

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

    def _loss(self, embeddings: Tensor, same: Tensor, n_positive: int, n_negative: int) -> Tensor:
        similarity = cosine_similarities(embeddings.double())
        positives = _listed(similarity, same.triu(1), n_positive // 2)
        negatives = _listed(similarity, (~same).triu(), n_negative // 2)
        reach = negatives.detach() + self.margin
        below, above = positives.detach().sort().values, reach.sort().values
        # A term is active where s_positive < s_negative + margin. Each pair is weighted by its number of active terms.
        by_positive = len(above) - torch.searchsorted(above, positives.detach(), right=True)
        by_negative = torch.searchsorted(below, reach)
        total = by_negative.double() @ (negatives + self.margin) - by_positive.double() @ positives
        return total / (len(positives) * len(negatives))


def listed_hinges(nearest: Tensor, distance: Tensor, same: Tensor) -> Tensor:
    """Return max(0, J_ij) of the lifted structured loss for each positive pair i < j, as a vector."""
    i, j = same.triu(1).nonzero(as_tuple=True)
    return F.relu(torch.logaddexp(nearest[i], nearest[j]) + distance[i, j])


def all_hinges(nearest: Tensor, distance: Tensor, same: Tensor) -> Tensor:
    """Return the same as a matrix (n, n) that is 0 for all other pairs. It does not synchronise."""
    hinge = F.relu(torch.logaddexp(nearest[:, None], nearest) + distance)
    return hinge.masked_fill(~same.triu(1), 0)


def _listed(matrix: Tensor, mask: Tensor, n: int) -> Tensor:
    """Return the n entries of a matrix where the mask is true, row by row."""
    return matrix.flatten().gather(0, true_places(mask, n)) if matrix.is_cuda else matrix[mask]


def true_places(mask: Tensor, n: int) -> Tensor:
    """Return the flat indices of the n true entries of a mask, in order. Unlike `nonzero` it does not synchronise."""
    return mask.flatten().byte().sort(descending=True, stable=True).indices[:n]


def _memberships(distance: Tensor, same: Tensor, margins: tuple[float, ...]) -> Tensor:
    """Count the triplets with d_an < d_ap + margin of each (anchor, other): (n, n), negated for negative pairs.

    With two margins, return the count for the first minus the count for the second.
    """
    reach = torch.stack([distance + margin for margin in margins])
    negatives = distance.masked_fill(same, torch.inf).sort(1).values.expand_as(reach)
    of_positive = torch.searchsorted(negatives.contiguous(), reach)
    reaching = reach.masked_fill((~same).fill_diagonal_(True), -torch.inf).sort(2).values
    not_reaching = torch.searchsorted(reaching, distance.expand_as(reach).contiguous(), right=True)
    n_triplets, *others = torch.where(same, of_positive, not_reaching - len(distance))
    for other in others:
        n_triplets = n_triplets - other
    return n_triplets.fill_diagonal_(0).to(distance)


BASELINES: dict[str, type[nn.Module]] = {
    "binomial": BinomialDeviance,
    "lifted": LiftedStructure,
    "triplet": Triplet,
    "semi-hard-triplet": SemiHardTriplet,
    "contrastive": Contrastive,
    "quadruplet": Quadruplet,
}
