"""The losses that the histogram loss is compared with, each as its own paper defines it.

Read `hloss.losses.pairwise` (similarities and distances of all pairs) before.

Every loss is called as `loss(embeddings, labels)` with floating embeddings of shape (n, d) and integer labels of shape
(n,), and returns a scalar of the embeddings' dtype (float32 for half precision; autocast is off inside). Pairs are the
pairs i < j of the batch, each counted once. ValueError for wrong shapes, NaN and out-of-range options. A batch on which
a loss is undefined is a ValueError, or with `on_degenerate="zero"` a zero that still has a (zero) gradient.

`loss.metric` is the similarity that the loss trains, and by which its embeddings are to be searched: "cosine" where it
normalises the embeddings, "euclidean" where it takes them as they are.

Memory is O(n^2), also for the losses over triplets and quadruplets: a hinge is linear where it is active, so the sum
over them is a sum over pairs, each weighted by the number of active terms it is in, and sorting tells that number.
A call reads from the embeddings' device once, for its checks; labels may be on the CPU.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hloss.losses.pairwise import cosine_similarities, root, squared_distances
from hloss.losses.settings import ON_DEGENERATE, above_zero, at_least_zero, finite, one_of, switch
from hloss.numerics import check_embeddings, check_finite, check_labels, full_precision

ROUNDING = 1e-12  # squared distances of unit vectors that differ by less are equal: their float64 error is about 1e-15


class BinomialDeviance(nn.Module):
    """Binomial deviance, equations 7-8 of the paper (after Yi et al. 2014), on cosine similarities s.

    mean over positives of log(1 + exp(-alpha (s - beta))) + mean over negatives of log(1 + exp(alpha C (s - beta))).
    C is inside the exponent: the slope for negatives, not a weight. alpha = 2, beta = 0.5 are the authors' values on
    CUB and Online Products; C = 25 there, 10 on CUHK03. Undefined without a positive or without a negative pair.
    """

    metric = "cosine"

    def __init__(self, alpha: float = 2.0, beta: float = 0.5, C: float = 10.0, on_degenerate: str = "raise") -> None:
        super().__init__()
        self.alpha = above_zero("alpha", alpha)
        self.beta = finite("beta", beta)
        self.C = above_zero("C", C)
        self.on_degenerate = one_of("on_degenerate", on_degenerate, ON_DEGENERATE)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings, same = _checked(embeddings, labels)
        n_positive, n_negative = _pair_counts(embeddings, same)
        if not (n_positive and n_negative):
            return _undefined(embeddings, n_positive, n_negative, self.on_degenerate)
        slope = self.alpha * embeddings.new_full(same.shape, self.C).masked_fill_(same, -1)
        weight = embeddings.new_full(same.shape, 1 / n_negative).masked_fill_(same, 1 / n_positive).fill_diagonal_(0)
        similarity = cosine_similarities(embeddings)
        deviance = F.softplus(slope * (similarity - self.beta), threshold=40)  # the default 20 is off by 2e-9
        return (deviance * weight).sum()


class LiftedStructure(nn.Module):
    """Lifted structured similarity softmax, equation 4 of Song et al. 2016, on Euclidean distances D (not squared).

    J_ij = log(sum over negatives k of i of exp(margin - D_ik) + sum over negatives l of j of exp(margin - D_jl)) + D_ij
    of each positive pair; the loss is sum max(0, J_ij)^2 / (2 |P|). The paper does not normalise the embeddings, and
    evaluates by Euclidean distance; with `normalize=True` the distances are at most 2 and the loss is another one.
    Undefined without a positive or without a negative pair.
    """

    def __init__(self, margin: float = 1.0, normalize: bool = False, on_degenerate: str = "raise") -> None:
        super().__init__()
        self.margin = finite("margin", margin)
        self.normalize = switch("normalize", normalize)
        self.on_degenerate = one_of("on_degenerate", on_degenerate, ON_DEGENERATE)

    @property
    def metric(self) -> str:
        return "cosine" if self.normalize else "euclidean"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings, same = _checked(embeddings, labels)
        n_positive, n_negative = _pair_counts(embeddings, same)
        if not (n_positive and n_negative):
            return _undefined(embeddings, n_positive, n_negative, self.on_degenerate)
        distance = root(squared_distances(embeddings, self.normalize))
        rivals = (self.margin - distance).masked_fill(same, -torch.inf)
        # A row without any negative does not exist here: it would have all labels equal to its own.
        hinges = all_hinges if embeddings.is_cuda else listed_hinges
        hinge = hinges(rivals.logsumexp(1), distance, same)
        return (hinge.square().sum() / n_positive).to(embeddings.dtype)


class Triplet(nn.Module):
    """Triplet hinge on squared Euclidean distances d of L2-normalised embeddings, over all triplets that violate it.

    The mean of d_ap - d_an + margin over the triplets (anchor a, positive p, negative n) where it is above 0, each
    ordered (a, p) counted; 0 with a zero gradient where no triplet violates the margin. Undefined without a positive or
    without a negative pair. The hinge is that of Schroff et al. 2015 (FaceNet), equation 3, whose margin is 0.2.
    """

    metric = "cosine"
    semi_hard = False

    def __init__(self, margin: float = 0.2, on_degenerate: str = "raise") -> None:
        super().__init__()
        self.margin = above_zero("margin", margin)
        self.on_degenerate = one_of("on_degenerate", on_degenerate, ON_DEGENERATE)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings, same = _checked(embeddings, labels)
        n_positive, n_negative = _pair_counts(embeddings, same)
        if not (n_positive and n_negative):
            return _undefined(embeddings, n_positive, n_negative, self.on_degenerate)
        distance = squared_distances(embeddings, normalize=True)
        margins = (self.margin, ROUNDING) if self.semi_hard else (self.margin,)
        weight = _memberships(distance.detach(), same, margins)
        n_triplets = weight.clamp(min=0).sum()
        total = (weight * distance).sum() + self.margin * n_triplets
        return (total / n_triplets.clamp(min=1)).to(embeddings.dtype)


class SemiHardTriplet(Triplet):
    """`Triplet` over the semi-hard triplets alone: those with d_ap < d_an < d_ap + margin, all of the batch.

    0 with a zero gradient where no triplet is semi-hard. (FaceNet picks semi-hard negatives; TensorFlow Addons' loss of
    the name takes one negative per positive pair and falls back to the farthest.)
    """

    semi_hard = True


class Contrastive(nn.Module):
    """Contrastive loss of Hadsell, Chopra & LeCun 2006, on Euclidean distances D, over all pairs of the batch.

    The mean over pairs of D^2 / 2 for positives and max(0, margin - D)^2 / 2 for negatives. Its paper takes embeddings
    as they are, whose scale the margin must then fit; `normalize=True` L2-normalises them, and is the one to compare
    with (on glyphs 45 against 23 % Recall@1 after 400 iterations with the margin 1, one seed). Undefined for a batch of
    one.
    """

    def __init__(self, margin: float = 1.0, normalize: bool = False, on_degenerate: str = "raise") -> None:
        super().__init__()
        self.margin = above_zero("margin", margin)
        self.normalize = switch("normalize", normalize)
        self.on_degenerate = one_of("on_degenerate", on_degenerate, ON_DEGENERATE)

    @property
    def metric(self) -> str:
        return "cosine" if self.normalize else "euclidean"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings, same = _checked(embeddings, labels)
        check_finite(embeddings)
        if len(labels) < 2:
            return _undefined(embeddings, 0, 0, self.on_degenerate)
        negative, positive = ~same, same.fill_diagonal_(False)
        squared = squared_distances(embeddings, self.normalize)
        hinge = F.relu(self.margin - root(squared)).square()
        n_pairs = len(labels) * (len(labels) - 1)  # both triangles, as in the sum
        return ((squared * positive + hinge * negative).sum() / (2 * n_pairs)).to(embeddings.dtype)


class Quadruplet(nn.Module):
    """Quadruplet hinge on cosine similarities: what the histogram loss with the linear cost tends to for many bins.

    The mean of max(0, margin + s_negative - s_positive) over all pairs of a positive and a negative pair, the two
    sharing an image or not: O(n^4) terms, told exactly from one sorting of the pairs. Undefined without a positive or
    without a negative pair.
    """

    metric = "cosine"

    def __init__(self, margin: float = 0.1, on_degenerate: str = "raise") -> None:
        super().__init__()
        self.margin = at_least_zero("margin", margin)
        self.on_degenerate = one_of("on_degenerate", on_degenerate, ON_DEGENERATE)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings, same = _checked(embeddings, labels)
        n_positive, n_negative = _pair_counts(embeddings, same)
        if not (n_positive and n_negative):
            return _undefined(embeddings, n_positive, n_negative, self.on_degenerate)
        similarity = cosine_similarities(embeddings.double())
        positives = listed(similarity, same.triu(1), n_positive // 2)
        negatives = listed(similarity, (~same).triu(), n_negative // 2)
        reach = negatives.detach() + self.margin
        below, above = positives.detach().sort().values, reach.sort().values
        # Active where s_positive < s_negative + margin: how many such partners each pair has.
        by_positive = len(above) - torch.searchsorted(above, positives.detach(), right=True)
        by_negative = torch.searchsorted(below, reach)
        total = by_negative.double() @ (negatives + self.margin) - by_positive.double() @ positives
        return (total / (len(positives) * len(negatives))).to(embeddings.dtype)


def _checked(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings in full precision, and which pairs are of one class: (n, n), the diagonal included."""
    check_embeddings("embeddings", embeddings)
    check_labels(labels, len(embeddings))
    labels = labels.to(embeddings.device, non_blocking=embeddings.is_cuda)
    return full_precision(embeddings), labels[:, None] == labels


def _pair_counts(embeddings: Tensor, same: Tensor) -> tuple[int, int]:
    """Numbers of positive and of negative pairs, both orders of a pair counted.

    NotFiniteError for NaN and infinite embeddings: one read from the device tells both.
    """
    total, n_same = torch.stack([embeddings.detach().sum(dtype=torch.float64), same.sum()]).tolist()
    if not math.isfinite(total):
        check_finite(embeddings)
    return int(n_same) - len(same), len(same) ** 2 - int(n_same)


def _undefined(embeddings: Tensor, n_positive: int, n_negative: int, on_degenerate: str) -> Tensor:
    if on_degenerate == "zero":
        return embeddings.sum() * 0
    raise ValueError(
        f"a batch of {len(embeddings)} with {n_positive // 2} positive and {n_negative // 2} "
        'negative pairs leaves this loss undefined; draw several images of several classes, or set on_degenerate="zero"'
    )


def listed_hinges(nearest: Tensor, distance: Tensor, same: Tensor) -> Tensor:
    """max(0, J_ij) of the lifted structure loss, for the positive pairs i < j one by one."""
    i, j = same.triu(1).nonzero(as_tuple=True)
    return F.relu(torch.logaddexp(nearest[i], nearest[j]) + distance[i, j])


def all_hinges(nearest: Tensor, distance: Tensor, same: Tensor) -> Tensor:
    """The same as a matrix (n, n) with 0 for all other pairs."""
    hinge = F.relu(torch.logaddexp(nearest[:, None], nearest) + distance)
    return hinge.masked_fill(~same.triu(1), 0)


def listed(matrix: Tensor, mask: Tensor, n: int) -> Tensor:
    """The n entries of a matrix where the mask is true, row by row."""
    if not matrix.is_cuda:
        return matrix[mask]
    return matrix.flatten().gather(0, true_places(mask, n))


def true_places(mask: Tensor, n: int) -> Tensor:
    """Flat indices of the n true entries of a mask, in order. Unlike `nonzero` it does not wait for the device."""
    return mask.flatten().byte().sort(descending=True, stable=True).indices[:n]


def _memberships(distance: Tensor, same: Tensor, margins: tuple[float, ...]) -> Tensor:
    """Number of triplets with d_an < d_ap + margin that each (anchor, other) is in: (n, n), negated for negatives.

    With two margins, the number by the first minus the number by the second.
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
