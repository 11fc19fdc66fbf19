"""The settings of the histogram loss, and the checks of settings that all losses share. Nothing to read before.

A check returns the value it was given, or raises a ValueError that names the setting and the value.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

KERNELS = ("triangular", "gaussian", "epanechnikov", "uniform")
ORDER_COSTS = ("step", "linear", "softplus")
DENSITIES = ("histogram", "beta")
ON_DEGENERATE = ("raise", "zero")


@dataclass(frozen=True)
class LossSettings:
    """The arguments of `HistogramLoss`, which declares their meaning and defaults, checked."""

    n_bins: int
    kernel: str
    bandwidth: float | None
    order_cost: str
    margin: float
    alpha: float
    density: str
    normalize: bool
    on_degenerate: str

    def __post_init__(self) -> None:
        if not isinstance(self.n_bins, int) or isinstance(self.n_bins, bool) or self.n_bins < 1:
            raise ValueError(f"n_bins must be a whole number of at least 1, got {self.n_bins!r}")
        one_of("kernel", self.kernel, KERNELS)
        one_of("order_cost", self.order_cost, ORDER_COSTS)
        one_of("density", self.density, DENSITIES)
        one_of("on_degenerate", self.on_degenerate, ON_DEGENERATE)
        at_least_zero("margin", self.margin)
        above_zero("alpha", self.alpha)
        self._check_order_cost()
        self._check_density()

    def _check_order_cost(self) -> None:
        if self.alpha != 1 and self.order_cost != "softplus":
            raise ValueError(
                f'alpha belongs to order_cost "softplus", {self.order_cost!r} takes none; got {self.alpha!r}'
            )
        if self.order_cost == "step" and abs(self.margin / self.delta - self.margin_nodes) > 1e-6:
            raise ValueError(
                f"margin of the step cost must be a whole number of bins: a multiple of {self.delta:g} "
                f"for n_bins={self.n_bins}, got {self.margin!r}"
            )

    def _check_density(self) -> None:
        if self.density == "beta" and self.kernel != "triangular":
            raise ValueError(f"the beta density takes no kernel, got kernel={self.kernel!r}")
        if self.kernel != "triangular":
            above_zero(f"bandwidth of the {self.kernel} kernel (standard deviation in nodes)", self.bandwidth)
        elif self.bandwidth is not None:
            raise ValueError(
                f"bandwidth belongs to the other kernels, the triangular takes none; got {self.bandwidth!r}"
            )

    @property
    def delta(self) -> float:
        """Delta, the distance of two nodes."""
        return 2 / self.n_bins

    @property
    def margin_nodes(self) -> int:
        """mu of equation 6."""
        return round(self.margin / self.delta)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def finite(name: str, value: object) -> float:
    if not _is_number(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def above_zero(name: str, value: object) -> float:
    if not (_is_number(value) and value > 0):  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def at_least_zero(name: str, value: object) -> float:
    if not (_is_number(value) and value >= 0):  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def switch(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """` (did you mean NAME?)` for the allowed name most like `value`, empty if none is like it."""
    near = difflib.get_close_matches(value, list(allowed), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
