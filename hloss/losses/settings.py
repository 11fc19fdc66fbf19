"""The settings of the histogram loss and their checks."""

import math
from dataclasses import dataclass

KERNELS = ("triangular", "gaussian", "epanechnikov", "uniform")
ORDER_COSTS = ("step", "linear", "softplus")
DENSITIES = ("histogram", "beta")


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
