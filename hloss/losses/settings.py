"""Settings of the histogram loss, and checks of settings that losses share.

A check returns the given value, or raises a ValueError with the name of the setting and the value.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from hloss.numerics import one_of, whole_number

KERNELS = ("triangular", "gaussian", "epanechnikov", "uniform")
ORDER_COSTS = ("step", "linear", "softplus")
DENSITIES = ("histogram", "beta")
ON_DEGENERATE = ("raise", "zero")


@dataclass(frozen=True)
class LossSettings:
    """The checked arguments of `HistogramLoss`, which documents their meaning and defaults."""

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
        whole_number("n_bins", self.n_bins, 1)
        one_of("kernel", self.kernel, KERNELS)
        one_of("order_cost", self.order_cost, ORDER_COSTS)
        one_of("density", self.density, DENSITIES)
        one_of("on_degenerate", self.on_degenerate, ON_DEGENERATE)
        number("margin", self.margin, least=0)
        number("alpha", self.alpha, above=0)
        if self.alpha != 1 and self.order_cost != "softplus":
            raise ValueError(f'alpha is only for order_cost "softplus": got {self.alpha!r} with {self.order_cost!r}')
        if self.order_cost == "step" and abs(self.margin / self.delta - self.margin_nodes) > 1e-6:
            raise ValueError(
                f"margin of the step cost must be a multiple of the bin width {self.delta:g} (n_bins={self.n_bins}): "
                f"got {self.margin!r}"
            )
        if self.density == "beta" and self.kernel != "triangular":
            raise ValueError(f"kernel is only for the histogram density: got {self.kernel!r} with the beta density")
        if self.kernel != "triangular":
            number(f"bandwidth of the {self.kernel} kernel (standard deviation in nodes)", self.bandwidth, above=0)
        elif self.bandwidth is not None:
            raise ValueError(f"bandwidth of the triangular kernel must be None: got {self.bandwidth!r}")

    @property
    def delta(self) -> float:
        """Delta, the distance between neighbouring nodes."""
        return 2 / self.n_bins

    @property
    def margin_nodes(self) -> int:
        """The margin mu of equation 6, in nodes."""
        return round(self.margin / self.delta)


def number(name: str, value: object, least: float = -math.inf, above: float = -math.inf) -> float:
    """Check that `value` is a finite number of at least `least` and above `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and least <= value > above):  # type: ignore[operator]
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{bound}: got {value!r}")
    return float(value)  # type: ignore[arg-type]


def switch(name: str, value: bool) -> bool:
    """Check that `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False: got {value!r}")
    return value


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean NAME?)` with the most similar allowed name, or an empty string if none is similar."""
    similar = difflib.get_close_matches(value, list(allowed), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""
