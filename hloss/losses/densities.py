"""Densities of the positive and negative similarities, the loss, and its derivative with respect to each similarity.

A pair lies at t_b + f Delta, 0 <= f < 1, between the nodes b and b + 1. Its group is positive, negative or ignored.
`HistogramDensity` implements equations 1 and 2, `expected_cost` equations 4 and 6.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from hloss.losses.pairs import NEGATIVE, POSITIVE, Buffers, PairBlock
from hloss.losses.settings import LossSettings, missing_pairs

CPU_LANES = 16
# A packed number is ONE_PAIR times the number of pairs, plus the sum of their f in units of 2^-24.
ONE_PAIR = 2**42  # Larger than the sum of LANE_PAIRS such f.
FLAGS = 4  # Number of flags at the end of a table on a GPU; `triton_kernels` gives their meaning.
LANE_PAIRS = 2**18  # Most pairs that one packed number, or one int64 sum of f in units of 2^-44, can count.
BETA_ENDS = (1e-5, 0.999)  # The authors' layer evaluates the Beta density at these points instead of at 0 and 1.


class HistogramDensity:
    """Histograms (equation 2).

    The class counts the pairs and sums their f, for each group and interval. dL/ds depends only on group and interval.
    """

    def __init__(self, s: LossSettings, device: torch.device) -> None:
        self.s, self.size = s, s.n_bins + 1  # Interval n_bins contains only s = 1.
        self.counts = torch.zeros(3, self.size, dtype=torch.int64, device=device)
        self.fractions = torch.zeros(3, self.size, dtype=torch.float64, device=device)

    def add(self, position: Tensor, block: PairBlock, buffers: Buffers) -> Tensor:
        """Add pairs with `position` (s + 1) / Delta in [0, n_bins]; return their indices in the table of dL/ds.

        Overwrites `position`.
        """
        places = code = self.places(position, block, buffers)
        n = 1 if block.groups is None else 3
        # A lane is a copy of the table. Several lanes reduce collisions of atomic additions on CUDA, and let CPU
        # threads add at the same time.
        lanes = len(code) if code.is_cuda else math.gcd(len(code), CPU_LANES)
        table = torch.zeros(lanes, n * self.size, dtype=torch.int64, device=code.device)
        code, fraction = code.view(lanes, -1), position.frac_().view(lanes, -1)
        number = buffers.take("number", code.shape, torch.int64, code.device)
        if fraction.dtype == torch.float32:  # Here f has 24 bits, so that f and the count of pairs fit into one number.
            number.copy_(fraction.mul_(2.0**24)).add_(ONE_PAIR)
            table.scatter_add_(1, code, number)
            if code.numel() <= LANE_PAIRS:  # The sum of all lanes also fits into packed numbers.
                table = table.sum(0, keepdim=True)
            counts, sums = (table // ONE_PAIR).sum(0), (table % ONE_PAIR).sum(0).double() / 2.0**24
        else:
            counts = table.scatter_add_(1, code, number.fill_(1)).sum(0)
            number.copy_(fraction.mul_(2.0**44))
            table.zero_().scatter_add_(1, code, number)
            sums = table.double().sum(0) if code.numel() > LANE_PAIRS else table.sum(0).double()
            sums /= 2.0**44
        self.counts[:n] += counts.view(n, -1)
        self.fractions[:n] += sums.view(n, -1)
        return places

    def places(self, position: Tensor, block: PairBlock, buffers: Buffers) -> Tensor:
        """Return the interval of each pair, plus `size` for a positive and 2 `size` for an ignored pair."""
        code = buffers.take("code", position.shape, torch.int64, position.device).copy_(position)
        if block.groups is not None:
            code[:, block.window].add_(block.groups, alpha=self.size)
        return code

    def finish(self) -> None:
        """Set `undefined` to the reason why the loss is undefined, or to an empty string. Synchronises once."""
        self.totals = self.counts[:2].sum(1)
        self.undefined = missing_pairs(*self.totals.tolist())

    def densities(self) -> Tensor:
        """Return p_neg and p_pos, (2, n_bins + 1)."""
        mass = self.counts[:2].double() - self.fractions[:2]
        mass[:, 1:] += self.fractions[:2, :-1]
        h = mass / self.totals[:, None].double()
        return h if self.s.kernel == "triangular" else h @ kernel_matrix(self.s, h.device).T

    def loss_and_slopes(self) -> tuple[Tensor, Tensor]:
        """Return the loss, and dL/ds (equation 5) for each group and interval, as a table (3, n_bins + 1)."""
        loss, by_density = expected_cost(self.densities(), self.s)
        by_mass = by_density if self.s.kernel == "triangular" else by_density @ kernel_matrix(self.s, loss.device)
        slopes = by_mass.new_zeros(3, self.size)
        torch.div(by_mass.diff(dim=1), self.s.delta * self.totals[:, None].double(), out=slopes[:2, :-1])
        slopes[:2, -1] = slopes[:2, -2]  # s = 1 has the derivative of the interval before it.
        return loss, slopes

    def slope(self, slopes: Tensor, places: Tensor, block: PairBlock, buffers: Buffers) -> Tensor:
        """Return dL/ds of the pairs at `places`."""
        found = buffers.take("slope", places.shape, slopes.dtype, slopes.device)
        return torch.gather(slopes.view(1, -1).expand(len(places), -1), 1, places, out=found)


class BetaDensity:
    """The authors' Beta densities of x = (s + 1) / 2, fitted by mean and variance; dL/ds is affine in x."""

    def __init__(self, s: LossSettings, device: torch.device) -> None:
        self.s = s
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.moments = torch.zeros(2, 2, dtype=torch.float64, device=device)  # Sums of x - 1/2 and its square.

    def add(self, position: Tensor, block: PairBlock, buffers: Buffers) -> Tensor:
        """Add pairs with `position` (s + 1) / Delta, and return a copy of the positions. Overwrites `position`."""
        places = buffers.take("places", position.shape, position.dtype, position.device).copy_(position)
        x = position.div_(self.s.n_bins).sub_(0.5)
        negatives: int | Tensor = x.numel()
        if block.groups is not None:
            window, positive = x[:, block.window], block.groups == POSITIVE
            self._add(POSITIVE, window * positive, positive.sum())
            negatives = negatives - (block.groups != NEGATIVE).sum()
            window *= block.groups == NEGATIVE
        self._add(NEGATIVE, x, negatives)
        return places

    def places(self, position: Tensor, block: PairBlock, buffers: Buffers) -> Tensor:
        """Return the positions, because the slope is a function of the position."""
        return position

    def _add(self, group: int, x: Tensor, n: Tensor | int) -> None:
        self.counts[group] += n
        self.moments[group, 0] += x.sum(dtype=torch.float64)
        self.moments[group, 1] += torch.linalg.vector_norm(x, dtype=torch.float64).square()

    def finish(self) -> None:
        """Set `undefined` to the reason why the loss is undefined, or to an empty string."""
        n = self.counts[:2].double()
        mean = self.moments[:, 0] / n
        variance = (self.moments[:, 1] - n * mean**2) / (n - 1)
        self.mean_variance = torch.stack([mean + 0.5, variance], dim=1)
        fits = (variance > 1e-12) & (variance < self.mean_variance[:, 0] * (1 - self.mean_variance[:, 0]))
        unfit = [group for group, fit in zip(("negative", "positive"), fits.tolist(), strict=True) if not fit]
        self.undefined = missing_pairs(*self.counts[:2].tolist())
        if unfit and not self.undefined:
            reason = "their variance is undefined, 0 or too large"
            self.undefined = f"a Beta density does not fit the similarities of the {unfit[-1]} pairs: {reason}"

    def densities(self, mean_variance: Tensor | None = None) -> Tensor:
        """Return p_neg and p_pos, (2, n_bins + 1)."""
        mean_variance = self.mean_variance if mean_variance is None else mean_variance
        mean, variance = mean_variance[:, :1], mean_variance[:, 1:]
        total = mean * (1 - mean) / variance - 1
        a, b = mean * total, (1 - mean) * total
        x = (grid_nodes(self.s.n_bins, mean.device) + 1) / 2
        x[0], x[-1] = BETA_ENDS
        log_density = (a - 1) * x.log() + (b - 1) * (-x).log1p() + (a + b).lgamma() - a.lgamma() - b.lgamma()
        return log_density.exp() * (self.s.delta / 2)

    def loss_and_slopes(self) -> tuple[Tensor, Tensor]:
        """Return the loss, and a table (3, 2) with two columns, a and b, and one row for each group.

        dL/ds of a pair is a + b * position.
        """
        with torch.enable_grad():
            moments = self.mean_variance.detach().requires_grad_()
            densities = self.densities(moments)
            loss, by_density = expected_cost(densities.detach(), self.s)
            by_mean, by_variance = torch.autograd.grad(densities, moments, by_density)[0].unbind(1)
        n = self.counts[:2].double()
        linear = by_variance / (n - 1)  # dx/ds = 1/2, d variance/dx = 2 (x - mean) / (n - 1).
        constant = by_mean / (2 * n) - linear * self.mean_variance[:, 0]
        slopes = torch.stack([constant, linear / self.s.n_bins], dim=1)
        return loss, torch.cat([slopes, torch.zeros_like(slopes[:1])])

    def slope(self, slopes: Tensor, places: Tensor, block: PairBlock, buffers: Buffers) -> Tensor:
        """Return dL/ds of the pairs at `places`."""
        constant, linear = slopes.unbind(1)
        slope = places * linear[NEGATIVE] + constant[NEGATIVE]
        if block.groups is not None:
            groups = block.groups.long()
            slope[:, block.window] = constant[groups] + linear[groups] * places[:, block.window]
        return slope


Density = HistogramDensity | BetaDensity
DENSITY_CLASSES: dict[str, type[Density]] = {"histogram": HistogramDensity, "beta": BetaDensity}


def grid_nodes(n_bins: int, device: torch.device) -> Tensor:
    """Return the nodes t_r = -1 + r Delta."""
    return torch.linspace(-1, 1, n_bins + 1, dtype=torch.float64, device=device)


def expected_cost(densities: Tensor, s: LossSettings) -> tuple[Tensor, Tensor]:
    """Return the loss p_neg' C p_pos and its gradient with respect to p_neg and p_pos, shape (2, n_bins + 1)."""
    negative, positive = densities
    if s.order_cost == "step":  # Cumulative sums replace the product with C (equations 4 and 6).
        r = torch.arange(len(negative), device=negative.device)
        by_negative = positive.cumsum(0)[(r + s.margin_nodes).clamp(max=s.n_bins)]
        by_positive = negative.flip(0).cumsum(0).flip(0)[(r - s.margin_nodes).clamp(min=0)]
    else:
        cost = cost_matrix(s, negative.device)
        by_negative, by_positive = cost @ positive, negative @ cost
    return negative @ by_negative, torch.stack([by_negative, by_positive])


@lru_cache(maxsize=8)
def cost_matrix(s: LossSettings, device: torch.device) -> Tensor:
    """Return C[r, q], the cost of a negative pair at t_r and a positive pair at t_q."""
    nodes = grid_nodes(s.n_bins, device)
    if s.order_cost == "step":
        r = torch.arange(len(nodes), device=device)
        return (r <= r[:, None] + s.margin_nodes).double()
    reach = s.margin + nodes[:, None] - nodes
    if s.order_cost == "linear":
        return reach.clamp(min=0)
    return torch.logaddexp(s.alpha * reach, torch.zeros_like(reach))


@lru_cache(maxsize=8)
def kernel_matrix(s: LossSettings, device: torch.device) -> Tensor:
    """Return K[r, b], the mass of the kernel centred at b in the cell from r - 1/2 to r + 1/2, in units of Delta.

    Mass below the first cell and above the last cell is reflected. Columns sum to 1.
    """
    assert s.bandwidth is not None
    half_width = {"gaussian": 10.0, "epanechnikov": 5**0.5, "uniform": 3**0.5}[s.kernel]  # In standard deviations.
    reach = math.ceil(half_width * s.bandwidth)
    offsets = torch.arange(-reach, reach + 1)
    z = torch.cat([offsets - 0.5, offsets[-1:] + 0.5]).double() / s.bandwidth
    u = (z / half_width).clamp(-1, 1)
    below = {"gaussian": torch.special.ndtr(z), "epanechnikov": 0.5 + 0.75 * (u - u**3 / 3), "uniform": u / 2 + 0.5}
    mass = below[s.kernel].diff()
    size = s.n_bins + 1
    target = (torch.arange(size) + offsets[:, None]) % (2 * size)  # Reflections repeat after 2 (n_bins + 1).
    target = torch.where(target < size, target, 2 * size - 1 - target)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(0, target, (mass / mass.sum())[:, None].expand_as(target).contiguous())
    return matrix.to(device)
