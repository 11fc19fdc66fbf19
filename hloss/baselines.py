"""The losses the histogram loss is compared with, each as its own paper defines it.

Every loss is called as `loss(embeddings, labels)` with floating embeddings of shape (n, d) and integer labels of shape
(n,), and returns a scalar of the embeddings' dtype (float32 for half precision; autocast is off inside). Pairs are the
pairs i < j of the batch, each counted once. ValueError for wrong shapes, NaN and out-of-range options. A batch on which
a loss is undefined is a ValueError, or with `on_degenerate="zero"` a zero that still has a (zero) gradient.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BinomialDeviance(nn.Module):
    """Binomial deviance, equations 7-8 of the paper (after Yi et al. 2014), on cosine similarities s.

    mean over positives of log(1 + exp(-alpha (s - beta))) + mean over negatives of log(1 + exp(alpha C (s - beta))).
    C is inside the exponent: the slope for negatives, not a weight. alpha = 2, beta = 0.5 are the authors' values on
    CUB and Online Products; C = 25 there, 10 on CUHK03. Undefined without a positive or without a negative pair.
    """

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


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean (n, n) matrices of positive and negative pairs, symmetric, the diagonal in neither."""
    same = labels[:, None] == labels[None, :]
    return same.clone().fill_diagonal_(False), ~same


def _products(embeddings: Tensor) -> Tensor:
    """Inner products of all pairs, shape (n, n), at the embeddings' own precision whatever autocast says."""
    with torch.autocast(embeddings.device.type, enabled=False):
        return embeddings @ embeddings.T


def _checked(embeddings: Tensor, labels: Tensor) -> Tensor:
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating of shape (n, d), got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({len(embeddings)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if not embeddings.isfinite().all():
        rows = (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()
        raise ValueError(f"embeddings must be finite, rows {rows[:10]} ({len(rows)} in all) hold NaN or infinity")
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _degenerate_mode(value: str) -> str:
    if value not in ("raise", "zero"):
        raise ValueError(f'on_degenerate must be "raise" or "zero", got {value!r}')
    return value


BASELINES: dict[str, type[nn.Module]] = {"binomial": BinomialDeviance}
