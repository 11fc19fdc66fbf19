"""The losses the histogram loss is compared with, each as its own paper defines it.

Every loss is called as `loss(embeddings, labels)` with floating embeddings of shape (n, d) and integer labels of shape
(n,), and returns a scalar of the embeddings' dtype (float32 for half precision; autocast is off inside). Pairs are the
pairs i < j of the batch, each counted once. ValueError for wrong shapes, NaN and out-of-range options. A batch on which
a loss is undefined is a ValueError, or with `on_degenerate="zero"` a zero that still has a (zero) gradient.

`loss.metric` is the similarity that the loss trains, and by which its embeddings are to be searched: "cosine" where it
normalises the embeddings, "euclidean" where it takes them as they are.

Memory is O(n^2), also for the losses over triplets and quadruplets: a hinge is linear where it is active, so the sum
over them is a sum over pairs, each weighted by the number of active terms it is in, and sorting tells that number.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hloss.numerics import check_finite

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
        self.alpha = _positive("alpha", alpha)
        self.beta = _finite("beta", beta)
        self.C = _positive("C", C)
        self.on_degenerate = _degenerate_mode(on_degenerate)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = _checked(embeddings, labels)
        positive, negative = _pairs(labels)
        if not (positive.any() and negative.any()):
            return _undefined(embeddings, positive, negative, self.on_degenerate)
        positive, negative = positive.to(embeddings), negative.to(embeddings)
        slope = self.alpha * (self.C * negative - positive)
        similarity = _products(F.normalize(embeddings))
        deviance = F.softplus(slope * (similarity - self.beta), threshold=40)  # the default 20 is off by 2e-9
        # Both triangles are summed: every pair twice in the sum and twice in the count.
        return (deviance * (positive / positive.sum() + negative / negative.sum())).sum()


class LiftedStructure(nn.Module):
    """Lifted structured similarity softmax, equation 4 of Song et al. 2016, on Euclidean distances D (not squared).

    J_ij = log(sum over negatives k of i of exp(margin - D_ik) + sum over negatives l of j of exp(margin - D_jl)) + D_ij
    of each positive pair; the loss is sum max(0, J_ij)^2 / (2 |P|). The paper does not normalise the embeddings, and
    evaluates by Euclidean distance; with `normalize=True` the distances are at most 2 and the loss is another one.
    Undefined without a positive or without a negative pair.
    """

    def __init__(self, margin: float = 1.0, normalize: bool = False, on_degenerate: str = "raise") -> None:
        super().__init__()
        self.margin = _finite("margin", margin)
        self.normalize = _switch("normalize", normalize)
        self.on_degenerate = _degenerate_mode(on_degenerate)

    @property
    def metric(self) -> str:
        return "cosine" if self.normalize else "euclidean"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = _checked(embeddings, labels)
        positive, negative = _pairs(labels)
        if not (positive.any() and negative.any()):
            return _undefined(embeddings, positive, negative, self.on_degenerate)
        distance = _root(_squared_distances(embeddings, self.normalize))
        rivals = (self.margin - distance).masked_fill(~negative, -torch.inf)
        # A row without any negative does not exist here: it would have all labels equal to its own.
        nearest = rivals.logsumexp(1)
        i, j = positive.triu().nonzero(as_tuple=True)
        hinge = F.relu(torch.logaddexp(nearest[i], nearest[j]) + distance[i, j])
        return (hinge.square().sum() / (2 * len(i))).to(embeddings.dtype)


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
        self.margin = _positive("margin", margin)
        self.on_degenerate = _degenerate_mode(on_degenerate)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = _checked(embeddings, labels)
        positive, negative = _pairs(labels)
        if not (positive.any() and negative.any()):
            return _undefined(embeddings, positive, negative, self.on_degenerate)
        distance = _squared_distances(embeddings, normalize=True)
        weight = _memberships(distance.detach(), positive, negative, self.margin)
        if self.semi_hard:
            weight -= _memberships(distance.detach(), positive, negative, ROUNDING)
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
        self.margin = _positive("margin", margin)
        self.normalize = _switch("normalize", normalize)
        self.on_degenerate = _degenerate_mode(on_degenerate)

    @property
    def metric(self) -> str:
        return "cosine" if self.normalize else "euclidean"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = _checked(embeddings, labels)
        positive, negative = _pairs(labels)
        if len(labels) < 2:
            return _undefined(embeddings, positive, negative, self.on_degenerate)
        squared = _squared_distances(embeddings, self.normalize)
        hinge = F.relu(self.margin - _root(squared)).square()
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
        self.margin = _at_least_zero("margin", margin)
        self.on_degenerate = _degenerate_mode(on_degenerate)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = _checked(embeddings, labels)
        positive, negative = _pairs(labels)
        if not (positive.any() and negative.any()):
            return _undefined(embeddings, positive, negative, self.on_degenerate)
        similarity = _products(F.normalize(embeddings.double()))
        positives, negatives = similarity[positive.triu()], similarity[negative.triu()]
        reach = negatives.detach() + self.margin
        below, above = positives.detach().sort().values, reach.sort().values
        # Active where s_positive < s_negative + margin: how many such partners each pair has.
        by_positive = len(above) - torch.searchsorted(above, positives.detach(), right=True)
        by_negative = torch.searchsorted(below, reach)
        total = by_negative.double() @ (negatives + self.margin) - by_positive.double() @ positives
        return (total / (len(positives) * len(negatives))).to(embeddings.dtype)


def _memberships(distance: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """How many triplets with d_an < d_ap + margin each (anchor, other) is in: (n, n), negated for negatives."""
    reach = distance + margin
    negatives = distance.masked_fill(~negative, torch.inf).sort(1).values
    of_positive = torch.searchsorted(negatives, reach)
    reaching = reach.masked_fill(~positive, -torch.inf).sort(1).values
    of_negative = len(distance) - torch.searchsorted(reaching, distance, right=True)
    return (of_positive * positive - of_negative * negative).to(distance)


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean (n, n) matrices of positive and negative pairs, symmetric, the diagonal in neither."""
    same = labels[:, None] == labels[None, :]
    return same.clone().fill_diagonal_(False), ~same


def _products(embeddings: Tensor) -> Tensor:
    """Inner products of all pairs, shape (n, n), at the embeddings' own precision whatever autocast says."""
    with torch.autocast(embeddings.device.type, enabled=False):
        return embeddings @ embeddings.T


def _squared_distances(embeddings: Tensor, normalize: bool) -> Tensor:
    """Squared Euclidean distances of all pairs, float64 (n, n): in float32 the difference would lose its digits."""
    embeddings = embeddings.double()
    if normalize:
        embeddings = F.normalize(embeddings)
    products = _products(embeddings)
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp(min=0)


def _root(squared: Tensor) -> Tensor:
    """Distances; the gradient at 0, where there is none, is 0."""
    apart = squared > 0
    return squared.where(apart, 1).sqrt().where(apart, 0)


def _checked(embeddings: Tensor, labels: Tensor) -> Tensor:
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating of shape (n, d), got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({len(embeddings)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    check_finite(embeddings)
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


def _undefined(embeddings: Tensor, positive: Tensor, negative: Tensor, on_degenerate: str) -> Tensor:
    if on_degenerate == "zero":
        return embeddings.sum() * 0
    raise ValueError(
        f"a batch of {len(embeddings)} with {int(positive.sum()) // 2} positive and {int(negative.sum()) // 2} "
        'negative pairs leaves this loss undefined; draw several images of several classes, or set on_degenerate="zero"'
    )


def _finite(name: str, value: float) -> float:
    if not _is_number(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _positive(name: str, value: float) -> float:
    if not (_is_number(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def _at_least_zero(name: str, value: float) -> float:
    if not (_is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def _switch(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _degenerate_mode(value: str) -> str:
    if value not in ("raise", "zero"):
        raise ValueError(f'on_degenerate must be "raise" or "zero", got {value!r}')
    return value


BASELINES: dict[str, type[nn.Module]] = {
    "binomial": BinomialDeviance,
    "lifted": LiftedStructure,
    "triplet": Triplet,
    "semi-hard-triplet": SemiHardTriplet,
    "contrastive": Contrastive,
    "quadruplet": Quadruplet,
}
