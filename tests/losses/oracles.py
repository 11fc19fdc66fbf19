"""The histogram loss with the other kernels and densities, in the dense form of `hloss.losses.reference`."""

import torch

from hloss.losses import reference


def histogram_loss(
    embeddings, labels, n_bins=200, kernel="triangular", bandwidth=None, density="histogram", **settings
):
    """The loss of all settings of `HistogramLoss`: equation 4 or 6 over a density of each group of pairs."""
    similarities = reference.pair_similarities(embeddings, labels, settings.pop("normalize", True))
    if density == "beta":
        h_positive, h_negative = (beta_density(s, n_bins) for s in similarities)
    else:
        h_positive, h_negative = (smoothed_histogram(s, n_bins, kernel, bandwidth) for s in similarities)
    t = reference.nodes(n_bins)
    C = reference.order_costs(t[:, None] - t, **settings).to(h_positive)
    return h_negative @ C @ h_positive


def smoothed_histogram(s, n_bins, kernel="triangular", bandwidth=None):
    h = reference.histogram(s, n_bins)
    return h if kernel == "triangular" else kernel_weights(n_bins, kernel, bandwidth).to(h) @ h


def kernel_weights(n_bins, kernel, bandwidth):
    """K[r, b], the mass in the cell r +- 1/2 of a kernel around node b, reflected at both ends; columns sum to 1.

    `bandwidth` is the kernel's standard deviation in nodes.
    """
    r, period = torch.arange(n_bins + 1, dtype=torch.float64), 2 * (n_bins + 1)
    turns = range(-int(10 * bandwidth / period) - 1, int(10 * bandwidth / period) + 2)
    cells = torch.stack([image + turn * period for turn in turns for image in (r, -1 - r)])  # r and its reflections.
    offset = cells[:, :, None] - r
    return (mass_below((offset + 0.5) / bandwidth, kernel) - mass_below((offset - 0.5) / bandwidth, kernel)).sum(0)


def mass_below(z, kernel):
    """The mass below z of a kernel of standard deviation 1."""
    if kernel == "gaussian":
        return torch.special.ndtr(z)
    half_width = {"uniform": 3**0.5, "epanechnikov": 5**0.5}[kernel]
    z = (z / half_width).clamp(-1, 1)
    return (z + 1) / 2 if kernel == "uniform" else (2 + 3 * z - z**3) / 4


def beta_density(s, n_bins):
    """The authors' other h: at the nodes, the Beta density with the mean and variance of x = (s + 1) / 2."""
    x = (s + 1) / 2
    mean, variance = x.mean(), x.var()
    total = mean * (1 - mean) / variance - 1
    at = ((reference.nodes(n_bins) + 1) / 2).to(x)
    at[0], at[-1] = 1e-5, 0.999  # The authors' layer evaluates the density here instead of at 0 and 1.
    return torch.distributions.Beta(mean * total, (1 - mean) * total).log_prob(at).exp() / n_bins
