"""The histogram loss as the paper states it: equations 1-6 over all pairs of a batch, differentiated by autograd.

Read this module first. It stores a weight for every pair and node, so memory is O(n^2 n_bins). `hloss.losses.histogram`
computes the same loss without them.

The symbols are those of Ustinova & Lempitsky (2016), https://arxiv.org/abs/1611.00822: embeddings y_i; similarities
s_ij = <y_i, y_j> of the positive pairs in S+ and of the negative pairs in S-; nodes t_r = -1 + r Delta for r = 0 ...
n_bins, with Delta = 2 / n_bins; histograms h+ and h-; the loss L. Functions compute in the dtype of their arguments.
Autograd computes equation 5, the derivative of L by one s_ij.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def histogram_loss(
    embeddings: Tensor,
    labels: Tensor,
    n_bins: int = 200,
    kernel: str = "triangular",
    bandwidth: float | None = None,
    order_cost: str = "step",
    margin: float = 0.0,
    alpha: float = 1.0,
    density: str = "histogram",
    normalize: bool = True,
) -> Tensor:
    """Return L = sum over r, q of h-_r C_rq h+_q, equations 4 and 6. Arguments as for `HistogramLoss`."""
    positive, negative = pair_similarities(embeddings, labels, normalize)
    if density == "beta":
        h_positive, h_negative = beta_density(positive, n_bins), beta_density(negative, n_bins)
    else:
        h_positive, h_negative = (histogram(s, n_bins, kernel, bandwidth) for s in (positive, negative))
    t = nodes(n_bins)
    C = order_costs(t[:, None] - t, order_cost, margin, alpha).to(h_positive)
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
    """Return delta_ijr, equation 2, (pairs, n_bins + 1): a pair adds to the two nodes next to it.

    For s = t_b + f Delta, 0 <= f < 1, node b gets 1 - f and node b + 1 gets f.
    """
    position = (s.clamp(-1, 1)[:, None] + 1) / (2 / n_bins)
    b = position.detach().floor().clamp(max=n_bins - 1)  # s = 1 belongs to the last interval.
    f, r = position - b, torch.arange(n_bins + 1, device=s.device)
    return (1 - f) * (r == b) + f * (r == b + 1)


def histogram(s: Tensor, n_bins: int, kernel: str = "triangular", bandwidth: float | None = None) -> Tensor:
    """Return h, equation 1, (n_bins + 1,): the mean weight of each node, smoothed unless the kernel is triangular."""
    h = node_weights(s, n_bins).mean(0)
    return h if kernel == "triangular" else kernel_weights(n_bins, kernel, bandwidth).to(h) @ h


def order_costs(difference: Tensor, order_cost: str = "step", margin: float = 0.0, alpha: float = 1.0) -> Tensor:
    """Return C, the cost of a negative pair at t_r and a positive pair at t_q, as a function of t_r - t_q.

    "step" is 1 for t_q <= t_r + margin, else 0: equations 4 and 6. "linear" and "softplus" are the authors' other
    costs, max(0, t_r - t_q + margin) and ln(1 + exp(alpha (t_r - t_q + margin))).
    """
    reach = difference + margin
    if order_cost == "step":
        return (reach > -1e-9).to(reach)  # The bound allows for rounding.
    return reach.clamp(min=0) if order_cost == "linear" else F.softplus(alpha * reach, threshold=50)


def kernel_weights(n_bins: int, kernel: str, bandwidth: float | None) -> Tensor:
    """Return K[r, b], the mass in the cell r +- 1/2 of a kernel around node b, reflected at both ends.

    `bandwidth` is the kernel's standard deviation in nodes. Columns sum to 1.
    """
    assert bandwidth is not None
    r, period = torch.arange(n_bins + 1, dtype=torch.float64), 2 * (n_bins + 1)
    turns = range(-int(10 * bandwidth / period) - 1, int(10 * bandwidth / period) + 2)
    cells = torch.stack([image + turn * period for turn in turns for image in (r, -1 - r)])  # r and its reflections.
    offset = cells[:, :, None] - r
    return (mass_below((offset + 0.5) / bandwidth, kernel) - mass_below((offset - 0.5) / bandwidth, kernel)).sum(0)


def mass_below(z: Tensor, kernel: str) -> Tensor:
    """Return the mass below z of a kernel of standard deviation 1."""
    if kernel == "gaussian":
        return torch.special.ndtr(z)
    half_width = {"uniform": 3**0.5, "epanechnikov": 5**0.5}[kernel]
    z = (z / half_width).clamp(-1, 1)
    return (z + 1) / 2 if kernel == "uniform" else (2 + 3 * z - z**3) / 4


def beta_density(s: Tensor, n_bins: int) -> Tensor:
    """Return the authors' other h: at the nodes, the Beta density with the mean and variance of x = (s + 1) / 2."""
    x = (s + 1) / 2
    mean, variance = x.mean(), x.var()
    total = mean * (1 - mean) / variance - 1
    at = ((nodes(n_bins) + 1) / 2).to(x)
    at[0], at[-1] = 1e-5, 0.999  # The authors' layer evaluates the density here instead of at 0 and 1.
    return torch.distributions.Beta(mean * total, (1 - mean) * total).log_prob(at).exp() / n_bins
