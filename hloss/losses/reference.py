"""The histogram loss as the paper states it: equations 1-6 over all pairs of a batch, differentiated by autograd.

Read this module first. It stores a weight for every pair and node, so memory is O(n^2 n_bins). `hloss.losses.histogram`
computes the same loss without storing the weights, and also has other kernels and densities.

The symbols are those of Ustinova & Lempitsky (2016), https://arxiv.org/abs/1611.00822:

- y_i: embeddings;
- s_ij = <y_i, y_j>: similarities, of the positive pairs in S+ and of the negative pairs in S-;
- t_r = -1 + r Delta, r = 0 ... n_bins: nodes, with Delta = 2 / n_bins;
- h+ and h-: histograms;
- L: the loss.

Functions compute in the dtype of their arguments. Autograd computes equation 5, the derivative of L with respect to
s_ij.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def histogram_loss(
    embeddings: Tensor, labels: Tensor, n_bins: int = 200, normalize: bool = True, **cost: Any
) -> Tensor:
    """Return L = sum over r, q of h-_r C_rq h+_q, equations 4 and 6. `cost` contains arguments of `order_costs`."""
    h_positive, h_negative = (histogram(s, n_bins) for s in pair_similarities(embeddings, labels, normalize))
    t = nodes(n_bins)
    C = order_costs(t[:, None] - t, **cost).to(h_positive)
    return h_negative @ C @ h_positive


def pair_similarities(embeddings: Tensor, labels: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Return S+ and S-, the similarities of the positive and of the negative pairs i < j.

    Args:
        embeddings: y, floating-point (n, d).
        labels: integer class labels (n,), or a matrix of pairs (n, n): +1 positive, -1 negative, 0 ignored.
        normalize: L2-normalise the embeddings.
    """
    y = F.normalize(embeddings) if normalize else embeddings
    sign = labels if labels.ndim == 2 else torch.where(labels[:, None] == labels, 1, -1)
    s, sign = y @ y.T, sign.triu(1)
    return s[sign == 1], s[sign == -1]


def nodes(n_bins: int) -> Tensor:
    """Return t_r = -1 + r Delta, float64 (n_bins + 1,)."""
    return 2 * torch.arange(n_bins + 1, dtype=torch.float64) / n_bins - 1


def node_weights(s: Tensor, n_bins: int) -> Tensor:
    """Return delta_ijr, equation 2, (pairs, n_bins + 1): the weights by which a pair adds to the two nearest nodes.

    For s = t_b + f Delta, 0 <= f < 1, node b gets 1 - f and node b + 1 gets f.
    """
    position = (s.clamp(-1, 1)[:, None] + 1) / (2 / n_bins)
    b = position.detach().floor().clamp(max=n_bins - 1)  # s = 1 belongs to the last interval.
    f, r = position - b, torch.arange(n_bins + 1, device=s.device)
    return (1 - f) * (r == b) + f * (r == b + 1)


def histogram(s: Tensor, n_bins: int) -> Tensor:
    """Return h, equation 1, (n_bins + 1,): the mean weight of each node."""
    return node_weights(s, n_bins).mean(0)


def order_costs(difference: Tensor, order_cost: str = "step", margin: float = 0.0, alpha: float = 1.0) -> Tensor:
    """Return C, the cost of a negative pair at t_r and a positive pair at t_q, as a function of t_r - t_q.

    "step" is 1 for t_q <= t_r + margin, else 0: equations 4 and 6. The code of the authors has two more costs: "linear"
    is max(0, t_r - t_q + margin), and "softplus" is ln(1 + exp(alpha (t_r - t_q + margin))).
    """
    reach = difference + margin
    if order_cost == "step":
        return (reach > -1e-9).to(reach)  # The bound allows for rounding.
    return reach.clamp(min=0) if order_cost == "linear" else F.softplus(alpha * reach, threshold=50)
