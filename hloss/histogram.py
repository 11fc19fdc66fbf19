"""The histogram loss, equations 1-6 of Ustinova & Lempitsky (2016), exact and streaming.

The similarities s of the positive and of the negative pairs of a batch are binned into two histograms on the nodes
t_r = -1 + r Delta, r = 0 ... n_bins, Delta = 2 / n_bins (`n_bins` intervals, n_bins + 1 nodes). The loss is the
probability that a random negative pair is more similar than a random positive one: p_neg' C p_pos.

Nothing of the size of all pairs is ever stored, unless they are few (KEPT_PAIRS). A pair between nodes b and b+1 adds
1 - f to the first and f to the second (equation 2), so the forward pass keeps per interval the number of pairs and the
sum of f; the loss depends on s through those alone, so its slope dL/ds is constant within an interval and the backward
pass looks it up (equation 5).
Counts and sums are integers: they do not depend on the order of the pairs, on CPU or CUDA.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

KERNELS = ("triangular", "gaussian", "epanechnikov", "uniform")
ORDER_COSTS = ("step", "linear", "softplus")
DENSITIES = ("histogram", "beta")
NEGATIVE, POSITIVE, IGNORED = 0, 1, 2  # the group of a pair
ROWS, COLUMNS = 256, 1024  # largest block of pairs held at once: 2^18 of them, so that int64 sums cannot overflow
KEPT_PAIRS = 2**20  # so few pairs are kept for the backward pass, in at most 8 MiB: to recompute them costs more
CPU_LANES = 16
ONE_PAIR = 2**42  # above the sum of 2^18 fractions of 24 bits
LONGEST = (1 + 1e-4) ** 0.5  # norm of an embedding that is not to be normalised
BETA_ENDS = (1e-5, 0.999)  # where the authors' layer evaluates the Beta density in place of 0 and 1


class NotFiniteError(ValueError):
    """Embeddings or a loss that are NaN or infinite: mostly a learning rate too high."""


def check_finite(embeddings: Tensor) -> None:
    """NotFiniteError, naming the rows, if embeddings (n, d) hold NaN or infinity."""
    if not embeddings.isfinite().all():
        rows = (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()
        raise NotFiniteError(f"embeddings must be finite, rows {rows[:10]} ({len(rows)} in all) hold NaN or infinity")


class HistogramLoss(nn.Module):
    """Histogram loss, equations 1-6: the estimated probability that a negative pair is more similar than a positive.

    Args:
        n_bins: intervals that [-1, 1] is cut into, at least 1; Delta = 2 / n_bins (the paper's 0.01 is 200).
        kernel: how a pair is spread over the nodes: "triangular" (equation 2), "gaussian", "epanechnikov", "uniform".
        bandwidth: standard deviation of the kernel in nodes, above 0; the triangular kernel takes none.
        order_cost: cost C of a negative at t_r and a positive at t_q: "step" is 1 if t_q <= t_r + margin (equations
            4, 6), "linear" is max(0, margin - t_q + t_r), "softplus" is ln(1 + exp(alpha (margin + t_r - t_q))).
        margin: in similarity units, at least 0; for the step cost a whole number of bins.
        alpha: steepness of the softplus cost, above 0; the other costs take none (1.0).
        density: "histogram", or "beta", the authors' fit of a Beta density to each group of pairs by its moments.
        normalize: L2-normalise the embeddings, as the authors do. If False they must have |s| <= 1 (+ 1e-4).
        on_degenerate: "raise" a ValueError or return "zero" (with a zero gradient) when there is no positive or no
            negative pair, or no variance for a Beta density to fit.

    The step cost's loss is in [0, 1]. ValueError for a setting out of its range, naming it.
    """

    def __init__(
        self,
        n_bins: int = 200,
        kernel: str = "triangular",
        bandwidth: float | None = None,
        order_cost: str = "step",
        margin: float = 0.0,
        alpha: float = 1.0,
        density: str = "histogram",
        normalize: bool = True,
        on_degenerate: str = "raise",
    ) -> None:
        super().__init__()
        self.settings = _Settings(
            n_bins, kernel, bandwidth, order_cost, margin, alpha, density, normalize, on_degenerate
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of the pairs i < j of `embeddings`, or of all pairs of an embedding with a reference embedding.

        Args:
            embeddings: (n, d), floating; half precision is computed in float32.
            labels: (n,) integer class labels, or a matrix of pairs, (n, n) symmetric or (n, m) against references:
                +1 positive, -1 negative, 0 ignored (the diagonal of (n, n) is never a pair).
            reference_embeddings: (m, d), for example a memory of earlier batches; gradient flows where it is required.
            reference_labels: (m,) integer class labels of the references; none with a matrix of pairs.

        Returns a scalar of the embeddings' dtype (float32 for half precision). ValueError for wrong shapes and, naming
        the rows, for NaN, infinite or zero embeddings. Second derivatives are refused.
        """
        s = self.settings
        norms, reference_norms = _checked_sides(embeddings, reference_embeddings, s.normalize)
        pairs = _pairs(embeddings, labels, reference_embeddings, reference_labels)
        return _StreamedLoss.apply(embeddings, reference_embeddings, norms, reference_norms, pairs, s)

    def extra_repr(self) -> str:
        s = self.settings
        shape = s.density if s.density == "beta" else f"{s.kernel} kernel"
        return f"n_bins={s.n_bins} (Delta={s.delta:g}), {shape}, {s.order_cost} cost, margin={s.margin:g}"


def histogram_loss(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    **settings: object,
) -> Tensor:
    """`HistogramLoss(**settings)(embeddings, labels, ...)`: the loss as a pure function."""
    return HistogramLoss(**settings)(embeddings, labels, reference_embeddings, reference_labels)  # type: ignore[arg-type]


class PairHistograms(NamedTuple):
    """Two densities on the same nodes, float64 of shape (n_bins + 1,), each of mass 1."""

    nodes: Tensor
    positive: Tensor
    negative: Tensor


def pair_histograms(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    **settings: object,
) -> PairHistograms:
    """The two densities p_pos and p_neg that the loss compares (equation 1 with `HistogramLoss`'s settings)."""
    density = _density_of(embeddings, labels, reference_embeddings, reference_labels, settings)
    negative, positive = density.densities()
    return PairHistograms(_nodes(density.s.n_bins, positive.device), positive, negative)


class PairSlopes(NamedTuple):
    """Where the loss pushes: at the similarity in the middle of each interval, float64 of shape (n_bins,)."""

    similarities: Tensor
    positive: Tensor
    negative: Tensor


def pair_slopes(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    **settings: object,
) -> PairSlopes:
    """dL/ds of one pair by its similarity s, times the number of pairs of its sign (equation 5).

    The positive slopes are at most 0 and the negative at least 0 for the histograms: positives are drawn together,
    negatives are driven apart.
    """
    density = _density_of(embeddings, labels, reference_embeddings, reference_labels, settings)
    n_bins, slopes = density.s.n_bins, density.loss_and_slopes()[1]
    position = torch.arange(n_bins, device=slopes.device)[None] + slopes.new_tensor(0.5)
    everything = slice(0, n_bins)
    found = []
    for group in (POSITIVE, NEGATIVE):
        groups = torch.full_like(position, group, dtype=torch.int8)
        block, buffers = _Block(slice(0, 1), everything, everything, groups), _Buffers()
        places = density.places(position, block, buffers)
        found.append(density.slope(slopes, places, block, buffers)[0] * density.counts[group].sum())
    return PairSlopes(position[0] * density.s.delta - 1, *found)


@torch.no_grad()
def _density_of(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    settings: dict[str, object],
) -> "_Histogram | _Beta":
    s = _Settings(**settings)  # type: ignore[arg-type]
    norms, reference_norms = _checked_sides(embeddings, references, s.normalize)
    pairs = _pairs(embeddings, labels, references, reference_labels)
    with exact_products(embeddings.device):
        density, _ = _collected(_Sides(embeddings, references, norms, reference_norms, pairs, s), pairs, s)
    if density.undefined:
        raise ValueError(density.undefined)
    return density


def reverse_probability(embeddings: Tensor, labels: Tensor, ties: str = "half") -> float:
    """The probability that a negative pair is more similar than a positive one, exactly: what the loss estimates.

    Over all pairs i < j of L2-normalised embeddings (n, d) and labels (n,) or a matrix of pairs as in `HistogramLoss`.
    Equal similarities count one half (then it is 1 - ROC AUC of the pairs) or, with `ties="count"`, fully: the limit of
    equation 4 for many bins. In [0, 1]. Takes O(P log p) time for P pairs, p of them positive, and O(p) memory.
    """
    if ties not in ("half", "count"):
        raise ValueError(f'ties must be "half" or "count", got {ties!r}')
    norms = _checked_norms("embeddings", embeddings, True)
    pairs = _pairs(embeddings, labels, None, None)
    with torch.no_grad(), exact_products(embeddings.device):
        unit = _arranged(embeddings, norms, pairs.row_order)
        positive = torch.cat([unit.new_empty(0), *_similarities(unit, pairs, POSITIVE)]).sort().values
        n_negative, reversed_pairs = 0, 0.0
        for negative in _similarities(unit, pairs, NEGATIVE):
            n_negative += len(negative)
            at_most = torch.searchsorted(positive, negative, right=True)
            reversed_pairs += at_most.sum().item()
            if ties == "half" and len(positive):
                equal = positive[(at_most - 1).clamp_(0)] == negative  # few: these alone are searched again
                below = torch.searchsorted(positive, negative[equal])
                reversed_pairs -= (at_most[equal] - below).sum().item() / 2
    if not (len(positive) and n_negative):
        raise ValueError(_lacking(len(positive), n_negative))
    return reversed_pairs / len(positive) / n_negative


def _similarities(unit: Tensor, pairs: "_LabelPairs | _MatrixPairs", group: int) -> Iterator[Tensor]:
    """The similarities of the pairs of one group, block by block."""
    for block in pairs.blocks():
        if block.groups is None and group == POSITIVE:
            continue  # all of it is negative
        similarity = unit[block.rows] @ unit[block.columns].T
        groups = torch.full_like(similarity, NEGATIVE, dtype=torch.int8)
        if block.groups is not None:
            groups[:, block.window] = block.groups
        yield similarity[groups == group]


# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class _Settings:
    n_bins: int = 200
    kernel: str = "triangular"
    bandwidth: float | None = None
    order_cost: str = "step"
    margin: float = 0.0
    alpha: float = 1.0
    density: str = "histogram"
    normalize: bool = True
    on_degenerate: str = "raise"

    def __post_init__(self) -> None:
        if not isinstance(self.n_bins, int) or isinstance(self.n_bins, bool) or self.n_bins < 1:
            raise ValueError(f"n_bins must be a whole number of at least 1, got {self.n_bins!r}")
        _check_choice("kernel", self.kernel, KERNELS)
        _check_choice("order_cost", self.order_cost, ORDER_COSTS)
        _check_choice("density", self.density, DENSITIES)
        _check_choice("on_degenerate", self.on_degenerate, ("raise", "zero"))
        if not _is_number(self.margin) or self.margin < 0:
            raise ValueError(f"margin must be a number of at least 0 (similarity units), got {self.margin!r}")
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha must be a number above 0, got {self.alpha!r}")
        if self.alpha != 1 and self.order_cost != "softplus":
            raise ValueError(
                f'alpha belongs to order_cost "softplus", {self.order_cost!r} takes none; got {self.alpha!r}'
            )
        if self.order_cost == "step" and abs(self.margin / self.delta - self.margin_nodes) > 1e-6:
            raise ValueError(
                f"margin of the step cost must be a whole number of bins: a multiple of {self.delta:g} "
                f"for n_bins={self.n_bins}, got {self.margin!r}"
            )
        if self.density == "beta" and self.kernel != "triangular":
            raise ValueError(f"the beta density takes no kernel, got kernel={self.kernel!r}")
        if self.kernel == "triangular" and self.bandwidth is not None:
            raise ValueError(
                f"bandwidth belongs to the other kernels, the triangular takes none; got {self.bandwidth!r}"
            )
        if self.kernel != "triangular" and not (_is_number(self.bandwidth) and self.bandwidth > 0):  # type: ignore[operator]
            raise ValueError(
                f"bandwidth of the {self.kernel} kernel must be a number above 0 (standard deviation in nodes), "
                f"got {self.bandwidth!r}"
            )

    @property
    def delta(self) -> float:
        return 2 / self.n_bins

    @property
    def margin_nodes(self) -> int:
        """mu of equation 6."""
        return round(self.margin / self.delta)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------- which pairs


class _Block(NamedTuple):
    """A block of pairs: all of them negative but for those of a window of its columns, whose groups are told."""

    rows: slice
    columns: slice
    window: slice  # within the columns
    groups: Tensor | None  # int8 (rows, window); None where the window is empty


class _Buffers:
    """Memory for the blocks of one pass, taken once: memory that is new to the process costs time."""

    def __init__(self) -> None:
        self.taken: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size | tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with anything in it, in the memory of the name's last."""
        n = shape[0] * shape[1]
        if name not in self.taken or len(self.taken[name]) < n:
            self.taken[name] = torch.empty(n, dtype=dtype, device=device)
        return self.taken[name][:n].view(shape)


class _LabelPairs:
    """Pairs told by class labels. Sorted by label, the positives of a block of rows lie in one window of columns."""

    def __init__(self, labels: Tensor, reference_labels: Tensor | None) -> None:
        rows, self.row_order = labels.sort(stable=True)
        columns, self.column_order = rows, self.row_order
        if reference_labels is not None:
            columns, self.column_order = reference_labels.sort(stable=True)
        self.n_columns, self.within = len(columns), reference_labels is None
        # Row i has its positives in the columns first[i] ... last[i] - 1; within one batch they begin behind i itself.
        self.column = torch.arange(1, self.n_columns + 1, device=rows.device, dtype=torch.int32)
        self.last = torch.searchsorted(columns, rows, right=True, out_int32=True)
        self.first = self.column if self.within else torch.searchsorted(columns, rows, out_int32=True)
        self.cuts = _row_cuts(len(rows))
        ends = torch.tensor(self.cuts, device=rows.device, dtype=torch.int64)
        self.windows = torch.stack([self.first[ends[:-1]], self.last[ends[1:] - 1]], 1).tolist()  # synchronises, once

    def blocks(self) -> Iterator[_Block]:
        for top, bottom, (left, right) in zip(self.cuts, self.cuts[1:], self.windows, strict=False):
            rows = slice(top, bottom)
            for columns in _chunks(top if self.within else 0, self.n_columns):
                window = slice(max(top if self.within else left, columns.start), min(right, columns.stop))
                groups = self._groups(rows, window) if window.start < window.stop else None
                yield _Block(rows, columns, slice(window.start - columns.start, window.stop - columns.start), groups)

    def _groups(self, rows: slice, window: slice) -> Tensor:
        groups = (self.column[window] <= self.last[rows, None]).view(torch.int8)  # columns are numbered from 1
        if not self.within:
            return groups - (self.column[window] <= self.first[rows, None]).view(torch.int8)
        if window.start == rows.start:
            n = rows.stop - rows.start
            groups[:, :n] += _lower_triangle(ROWS, groups.device)[:n, :n]
        return groups


@lru_cache(maxsize=8)
def _lower_triangle(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.int8, device=device).tril_()


class _MatrixPairs:
    """Pairs told by a matrix of +1 (positive), -1 (negative) and 0 (ignored)."""

    def __init__(self, matrix: Tensor, within: bool) -> None:
        self.matrix, self.within = matrix, within
        self.row_order, self.column_order = (torch.arange(size, device=matrix.device) for size in matrix.shape)

    def blocks(self) -> Iterator[_Block]:
        n, m = self.matrix.shape
        for top, bottom in itertools.pairwise(_row_cuts(n)):
            rows = slice(top, bottom)
            for columns in _chunks(top if self.within else 0, m):
                sign = self.matrix[rows, columns]
                groups = torch.where(sign == 0, IGNORED, (sign > 0).to(torch.int8))
                if self.within:  # the pairs i < j alone
                    behind = torch.ones_like(groups, dtype=torch.bool).tril_(top - columns.start)
                    groups.masked_fill_(behind, IGNORED)
                yield _Block(rows, columns, slice(0, groups.shape[1]), groups)


def _pairs(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None
) -> _LabelPairs | _MatrixPairs:
    n, m = len(embeddings), len(embeddings if references is None else references)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.to(embeddings.device)
    if labels.ndim == 2:
        return _matrix_pairs(labels, reference_labels, n, m, references is None)
    if labels.shape != (n,):
        raise ValueError(f"labels must have shape ({n},) or be a ({n}, {m}) matrix of pairs, got {tuple(labels.shape)}")
    if references is None:
        if reference_labels is not None:
            raise ValueError("reference_labels were given without reference_embeddings")
        return _LabelPairs(labels, None)
    if reference_labels is None or reference_labels.shape != (m,) or reference_labels.is_floating_point():
        got = "none" if reference_labels is None else f"{reference_labels.dtype} {tuple(reference_labels.shape)}"
        raise ValueError(f"reference_labels must be integers of shape ({m},), got {got}")
    return _LabelPairs(labels, reference_labels.to(labels.device))


def _matrix_pairs(matrix: Tensor, reference_labels: Tensor | None, n: int, m: int, within: bool) -> _MatrixPairs:
    if matrix.shape != (n, m):
        raise ValueError(f"the matrix of pairs must have shape ({n}, {m}), got {tuple(matrix.shape)}")
    if reference_labels is not None:
        raise ValueError("reference_labels were given beside a matrix of pairs, which already tells every pair")
    rows = _rows_where((matrix.abs() > 1).any(1))
    if rows:
        raise ValueError(f"the matrix of pairs may hold +1, -1 and 0 alone; rows {rows} hold other values")
    rows = _rows_where((matrix != matrix.T).any(1)) if within else []
    if rows:
        raise ValueError(f"the matrix of pairs must be symmetric; rows {rows} differ from their columns")
    return _MatrixPairs(matrix, within)


def _row_cuts(n: int) -> list[int]:
    """Bounds of the row blocks."""
    return [*range(0, n, ROWS), n]


def _chunks(start: int, stop: int) -> Iterator[slice]:
    for left in range(start, stop, COLUMNS):
        yield slice(left, min(left + COLUMNS, stop))


# --------------------------------------------------------------------------------------- the two densities and C


class _Histogram:
    """Counts and sums of f per interval and group (equation 2), the loss from them, and dL/ds by look-up."""

    def __init__(self, s: _Settings, device: torch.device) -> None:
        self.s, self.size = s, s.n_bins + 1  # the last interval is a point: s = 1 has b = n_bins, f = 0
        self.counts = torch.zeros(3, self.size, dtype=torch.int64, device=device)
        self.fractions = torch.zeros(3, self.size, dtype=torch.float64, device=device)

    def add(self, position: Tensor, block: _Block, buffers: _Buffers) -> Tensor:
        """Add pairs at `position` (s + 1) / Delta in [0, n_bins], shape (rows, columns), used up; returns `places`."""
        places = code = self.places(position, block, buffers)
        n = 1 if block.groups is None else 3
        # A table has several lanes: on CUDA for few collisions of atomic additions, on CPU one or more per thread.
        lanes = len(code) if code.is_cuda else math.gcd(len(code), CPU_LANES)
        table = torch.zeros(lanes, n * self.size, dtype=torch.int64, device=code.device)
        code, fraction = code.view(lanes, -1), position.frac_().view(lanes, -1)
        number = buffers.take("number", code.shape, torch.int64, code.device)
        if fraction.dtype == torch.float32:  # its 24 bits leave room for the count: one number a pair, one pass
            number.copy_(fraction.mul_(2.0**24)).add_(ONE_PAIR)
            both = table.scatter_add_(1, code, number).sum(0)
            counts, sums = both // ONE_PAIR, (both % ONE_PAIR).double() / 2.0**24
        else:
            counts = table.scatter_add_(1, code, number.fill_(1)).sum(0)
            number.copy_(fraction.mul_(2.0**44))
            sums = table.zero_().scatter_add_(1, code, number).sum(0).double() / 2.0**44
        self.counts[:n] += counts.view(n, -1)
        self.fractions[:n] += sums.view(n, -1)
        return places

    def places(self, position: Tensor, block: _Block, buffers: _Buffers) -> Tensor:
        """Interval of each pair, moved on by `size` for a positive and by 2 `size` for an ignored one."""
        code = buffers.take("code", position.shape, torch.int64, position.device).copy_(position)
        if block.groups is not None:
            code[:, block.window].add_(block.groups, alpha=self.size)
        return code

    def finish(self) -> None:
        self.totals = self.counts[:2].sum(1)
        negatives, positives = self.totals.tolist()
        self.undefined = "" if positives and negatives else _lacking(positives, negatives)

    def densities(self) -> Tensor:
        """p_neg and p_pos, (2, n_bins + 1)."""
        mass = self.counts[:2].double() - self.fractions[:2]
        mass[:, 1:] += self.fractions[:2, :-1]
        h = mass / self.totals[:, None].double()
        return h if self.s.kernel == "triangular" else h @ _kernel_matrix(self.s, h.device).T

    def loss_and_slopes(self) -> tuple[Tensor, Tensor]:
        loss, by_density = _expected_cost(self.densities(), self.s)
        by_mass = by_density if self.s.kernel == "triangular" else by_density @ _kernel_matrix(self.s, loss.device)
        slopes = by_mass.new_zeros(3, self.size)
        torch.div(by_mass.diff(dim=1), self.s.delta * self.totals[:, None].double(), out=slopes[:2, :-1])
        slopes[:2, -1] = slopes[:2, -2]  # s = 1 belongs to the last interval
        return loss, slopes

    def slope(self, slopes: Tensor, places: Tensor, block: _Block, buffers: _Buffers) -> Tensor:
        """dL/ds of the pairs at `places`, from the (3, n_bins + 1) table of slopes."""
        found = buffers.take("slope", places.shape, slopes.dtype, slopes.device)
        return torch.gather(slopes.view(1, -1).expand(len(places), -1), 1, places, out=found)


class _Beta:
    """The authors' Beta densities of x = (s + 1) / 2, fitted by mean and variance; dL/ds is affine in x."""

    def __init__(self, s: _Settings, device: torch.device) -> None:
        self.s = s
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.moments = torch.zeros(2, 2, dtype=torch.float64, device=device)  # sums of x - 1/2 and its square, by group

    def add(self, position: Tensor, block: _Block, buffers: _Buffers) -> Tensor:
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

    def places(self, position: Tensor, block: _Block, buffers: _Buffers) -> Tensor:
        return position

    def _add(self, group: int, x: Tensor, n: Tensor | int) -> None:
        self.counts[group] += n
        self.moments[group, 0] += x.sum(dtype=torch.float64)
        self.moments[group, 1] += torch.linalg.vector_norm(x, dtype=torch.float64).square()

    def finish(self) -> None:
        n = self.counts[:2].double()
        mean = self.moments[:, 0] / n
        variance = (self.moments[:, 1] - n * mean**2) / (n - 1)
        self.mean_variance = torch.stack([mean + 0.5, variance], dim=1)
        fits = (variance > 1e-12) & (variance < self.mean_variance[:, 0] * (1 - self.mean_variance[:, 0]))
        (negatives, positives), (negative_fits, positive_fits) = self.counts[:2].tolist(), fits.tolist()
        self.undefined = "" if positives and negatives else _lacking(positives, negatives)
        if not self.undefined and not (negative_fits and positive_fits):
            group = "negative" if positive_fits else "positive"
            self.undefined = f"no Beta density fits the {group} pairs, whose similarities do not vary between -1 and 1"

    def densities(self) -> Tensor:
        return self._densities(self.mean_variance)

    def _densities(self, mean_variance: Tensor) -> Tensor:
        mean, variance = mean_variance[:, :1], mean_variance[:, 1:]
        total = mean * (1 - mean) / variance - 1
        a, b = mean * total, (1 - mean) * total
        x = (_nodes(self.s.n_bins, mean.device) + 1) / 2
        x[0], x[-1] = BETA_ENDS
        log_density = (a - 1) * x.log() + (b - 1) * (-x).log1p() + (a + b).lgamma() - a.lgamma() - b.lgamma()
        return log_density.exp() * (self.s.delta / 2)

    def loss_and_slopes(self) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            moments = self.mean_variance.detach().requires_grad_()
            densities = self._densities(moments)
            loss, by_density = _expected_cost(densities.detach(), self.s)
            by_mean, by_variance = torch.autograd.grad(densities, moments, by_density)[0].unbind(1)
        n = self.counts[:2].double()
        linear = by_variance / (n - 1)  # dx/ds = 1/2, d variance/dx = 2 (x - mean) / (n - 1)
        constant = by_mean / (2 * n) - linear * self.mean_variance[:, 0]
        slopes = torch.stack([constant, linear / self.s.n_bins], dim=1)
        return loss, torch.cat([slopes, torch.zeros_like(slopes[:1])])

    def slope(self, slopes: Tensor, places: Tensor, block: _Block, buffers: _Buffers) -> Tensor:
        """dL/ds of the pairs at `places`, their positions, from (3, 2) of constants and factors of the position."""
        constant, linear = slopes.unbind(1)
        slope = places * linear[NEGATIVE] + constant[NEGATIVE]
        if block.groups is not None:
            groups = block.groups.long()
            slope[:, block.window] = constant[groups] + linear[groups] * places[:, block.window]
        return slope


_DENSITIES: dict[str, type[_Histogram] | type[_Beta]] = {"histogram": _Histogram, "beta": _Beta}


def _nodes(n_bins: int, device: torch.device) -> Tensor:
    """t_r = -1 + r Delta."""
    return torch.linspace(-1, 1, n_bins + 1, dtype=torch.float64, device=device)


def _expected_cost(densities: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    """The loss p_neg' C p_pos and its derivative by (p_neg, p_pos), shape (2, n_bins + 1)."""
    negative, positive = densities
    if s.order_cost == "step":  # cumulative sums instead of C, equations 4 and 6
        by_negative, by_positive = positive.cumsum(0), negative.flip(0).cumsum(0).flip(0)
        if s.margin_nodes:
            r = torch.arange(len(negative), device=negative.device)
            by_negative = by_negative[(r + s.margin_nodes).clamp(max=s.n_bins)]
            by_positive = by_positive[(r - s.margin_nodes).clamp(min=0)]
    else:
        cost = _cost_matrix(s, negative.device)
        by_negative, by_positive = cost @ positive, negative @ cost
    return negative @ by_negative, torch.stack([by_negative, by_positive])


@lru_cache(maxsize=8)
def _cost_matrix(s: _Settings, device: torch.device) -> Tensor:
    """C[r, q], the cost of a negative at t_r with a positive at t_q."""
    nodes = _nodes(s.n_bins, device)
    reach = s.margin + nodes[:, None] - nodes
    if s.order_cost == "linear":
        return reach.clamp(min=0)
    return torch.logaddexp(s.alpha * reach, torch.zeros_like(reach))


@lru_cache(maxsize=8)
def _kernel_matrix(s: _Settings, device: torch.device) -> Tensor:
    """K[r, b]: the kernel's mass in the cell r +- 1/2 around node b, reflected at both ends; columns sum to 1."""
    assert s.bandwidth is not None
    half_width = {"gaussian": 10.0, "epanechnikov": 5**0.5, "uniform": 3**0.5}[s.kernel] * s.bandwidth
    reach = math.ceil(half_width)
    offsets = torch.arange(-reach, reach + 1)
    edges = torch.cat([offsets - 0.5, offsets[-1:] + 0.5]).double()
    mass = _kernel_cumulative(s.kernel, edges / s.bandwidth).diff()
    size = s.n_bins + 1
    target = (torch.arange(size) + offsets[:, None]) % (2 * size)  # reflection at both ends has period 2 R
    target = torch.where(target < size, target, 2 * size - 1 - target)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(0, target, (mass / mass.sum())[:, None].expand_as(target).contiguous())
    return matrix.to(device)


def _kernel_cumulative(kernel: str, z: Tensor) -> Tensor:
    """The kernel's mass below z, a kernel of standard deviation 1."""
    if kernel == "gaussian":
        return torch.special.ndtr(z)
    if kernel == "uniform":
        return (z / 3**0.5).clamp(-1, 1) / 2 + 0.5
    z = (z / 5**0.5).clamp(-1, 1)
    return 0.5 + 0.75 * (z - z**3 / 3)


# ------------------------------------------------------------------------------------------- the streamed passes


class _Sides:
    """The rows and columns of the matrix of similarities, in the order of the pairs."""

    def __init__(
        self,
        embeddings: Tensor,
        references: Tensor | None,
        norms: Tensor | None,
        reference_norms: Tensor | None,
        pairs: _LabelPairs | _MatrixPairs,
        s: _Settings,
    ) -> None:
        self.half_bins = s.n_bins / 2
        self.rows = _arranged(embeddings, norms, pairs.row_order)
        self.columns = self.rows if references is None else _arranged(references, reference_norms, pairs.column_order)

    def blocks(self, pairs: _LabelPairs | _MatrixPairs, buffers: _Buffers) -> Iterator[tuple[_Block, Tensor]]:
        """Blocks of pairs with their positions (s + 1) / Delta, clipped to [0, n_bins]: each until the next."""
        half = self.rows.new_tensor(self.half_bins)
        for block in pairs.blocks():
            rows, columns = self.rows[block.rows], self.columns[block.columns]
            position = buffers.take("position", (len(rows), len(columns)), rows.dtype, rows.device)
            torch.addmm(half, rows, columns.T, alpha=self.half_bins, out=position)
            yield block, position.clamp_(0, 2 * self.half_bins)


def _collected(
    sides: _Sides, pairs: _LabelPairs | _MatrixPairs, s: _Settings
) -> tuple[_Histogram | _Beta, list[tuple[_Block, Tensor]]]:
    """One pass over all pairs; if they are few, the blocks are kept with the places of their pairs."""
    density, buffers, kept = _DENSITIES[s.density](s, sides.rows.device), _Buffers(), []
    few = len(sides.rows) * len(sides.columns) <= KEPT_PAIRS
    for block, position in sides.blocks(pairs, buffers):
        places = density.add(position, block, _Buffers() if few else buffers)
        if few:
            kept.append((block, places))
    density.finish()
    return density, kept


class _StreamedLoss(torch.autograd.Function):
    """Forward keeps the slopes of the loss; backward recomputes the pairs block by block, unless they are few."""

    @staticmethod
    def forward(ctx, embeddings, references, norms, reference_norms, pairs, s):  # type: ignore[no-untyped-def]
        with exact_products(embeddings.device):
            density, kept = _collected(_Sides(embeddings, references, norms, reference_norms, pairs, s), pairs, s)
        if density.undefined and s.on_degenerate == "raise":
            raise ValueError(density.undefined)
        ctx.save_for_backward(embeddings, references, norms, reference_norms)
        ctx.pairs, ctx.settings, ctx.density, ctx.kept = pairs, s, density, kept
        dtype = _full(embeddings[:0]).dtype
        if density.undefined:
            return embeddings.new_zeros((), dtype=dtype)
        loss, ctx.slopes = density.loss_and_slopes()
        return loss.to(dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the histogram loss has no second derivatives (its gradient is piecewise constant in the "
                "similarities); call backward without create_graph=True"
            )
        embeddings, references, norms, reference_norms = ctx.saved_tensors
        if ctx.density.undefined:
            return (*(x if x is None else torch.zeros_like(x) for x in (embeddings, references)), *(None,) * 4)
        pairs = ctx.pairs
        with exact_products(embeddings.device):
            sides = _Sides(embeddings, references, norms, reference_norms, pairs, ctx.settings)
            by_rows = torch.zeros_like(sides.rows)
            by_columns = by_rows if references is None else torch.zeros_like(sides.columns)
            slopes, buffers = (ctx.slopes * grad).to(sides.rows.dtype), _Buffers()
            recomputed = ((b, ctx.density.places(p, b, buffers)) for b, p in sides.blocks(pairs, buffers))
            for block, places in ctx.kept or recomputed:
                slope = ctx.density.slope(slopes, places, block, buffers)
                rows, columns, below = block.rows, block.columns, slope
                if references is None and columns.start == rows.start:  # pairs among these rows: their slopes mirrored
                    square, below = slope.split([len(slope), slope.shape[1] - len(slope)], dim=1)
                    square += square.T.clone()
                if ctx.needs_input_grad[0]:
                    by_rows[rows].addmm_(slope, sides.columns[columns])
                if references is None or ctx.needs_input_grad[1]:
                    by_columns[columns.stop - below.shape[1] : columns.stop].addmm_(below.T, sides.rows[rows])
            by_embeddings = _through_norm(by_rows, sides.rows, norms, pairs.row_order, embeddings)
            if references is None:
                return by_embeddings, *(None,) * 5
            by_references = _through_norm(by_columns, sides.columns, reference_norms, pairs.column_order, references)
        return by_embeddings, by_references, *(None,) * 4


def _full(embeddings: Tensor) -> Tensor:
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


def _arranged(embeddings: Tensor, norms: Tensor | None, order: Tensor) -> Tensor:
    """The embeddings in the order of the pairs, divided by their norms (n, 1) if there are any."""
    arranged = _full(embeddings).index_select(0, order)
    return arranged if norms is None else arranged.div_(norms.index_select(0, order))


def _through_norm(grad: Tensor, unit: Tensor, norms: Tensor | None, order: Tensor, like: Tensor) -> Tensor:
    """From the gradient by arranged embeddings (used up) to the one by the embeddings given."""
    if norms is not None:
        for g, u in zip(grad.split(ROWS), unit.split(ROWS), strict=True):
            g.addcmul_(u, torch.linalg.vecdot(g, u)[:, None], value=-1)
        grad.div_(norms.index_select(0, order))
    return torch.index_select(grad, 0, order.argsort(), out=unit).to(like.dtype)  # no longer needed: `unit`


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in their own precision: no autocast, no TF32 or bf16 inside, restored after."""
    matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends = [b for b in matmuls if b is not None and hasattr(b, "fp32_precision")]
    if backends:
        before = [b.fp32_precision for b in backends]
        for b in backends:
            b.fp32_precision = "ieee"
    else:  # torch before 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if backends:
            for b, value in zip(backends, before, strict=True):
                b.fp32_precision = value
        else:
            torch.set_float32_matmul_precision(precision)


# ------------------------------------------------------------------------------------------------------ refusals


def _checked_sides(
    embeddings: Tensor, references: Tensor | None, normalize: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Norms of both sides, None where they are not to be divided by."""
    norms = _checked_norms("embeddings", embeddings, normalize)
    if references is None:
        return norms, None
    reference_norms = _checked_norms("reference_embeddings", references, normalize)
    if references.shape[1] != embeddings.shape[1] or references.dtype != embeddings.dtype:
        raise ValueError(
            f"reference_embeddings must be (m, {embeddings.shape[1]}) of {embeddings.dtype}, "
            f"got {tuple(references.shape)} of {references.dtype}"
        )
    return norms, reference_norms


def _checked_norms(name: str, embeddings: Tensor, normalize: bool) -> Tensor | None:
    """The norms (n, 1) to divide by, None if the embeddings are to be taken as they are."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating of shape (n, d), got {embeddings.dtype} {tuple(embeddings.shape)}")
    norms = torch.linalg.vector_norm(_full(embeddings.detach()), dim=1, keepdim=True)
    if len(norms):
        shortest, longest = torch.stack(norms.aminmax()).tolist()  # NaN spreads
        if not (0 < shortest <= longest < math.inf if normalize else longest <= LONGEST):
            _refuse_rows(name, norms[:, 0])
    return norms if normalize else None


def _refuse_rows(name: str, norms: Tensor) -> None:
    endless, zero = _rows_where(~norms.isfinite()), _rows_where(norms == 0)
    if endless:
        raise NotFiniteError(f"{name} rows {endless} hold NaN or infinity")
    if zero:
        raise ValueError(f"{name} rows {zero} are zero and have no direction")
    raise ValueError(
        f"{name} rows {_rows_where(norms > LONGEST)} are longer than 1 (up to {norms.max().item():.6g}): similarities "
        "leave [-1, 1]; normalise them or set normalize=True"
    )


def _rows_where(mask: Tensor) -> list[int]:
    """The first ten rows of a mask."""
    return mask.nonzero().flatten()[:10].tolist()


def _lacking(positives: int, negatives: int) -> str:
    return (
        f"the histogram loss of {positives} positive and {negatives} negative pairs is undefined; "
        'draw several images of several classes, or set on_degenerate="zero"'
    )
