"""Settings of the histogram loss, and checks of settings that losses share."""

from dataclasses import dataclass

from hloss.numerics import number, one_of, switch, whole_number

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
        object.__setattr__(self, "n_bins", whole_number("n_bins", self.n_bins, 1))
        one_of("kernel", self.kernel, ("triangular", "gaussian", "epanechnikov", "uniform"))
        one_of("order_cost", self.order_cost, ("step", "linear", "softplus"))
        one_of("density", self.density, ("histogram", "beta"))
        one_of("on_degenerate", self.on_degenerate, ON_DEGENERATE)
        object.__setattr__(self, "margin", number("margin", self.margin, least=0))
        object.__setattr__(self, "alpha", number("alpha", self.alpha, above=0))
        switch("normalize", self.normalize)
        if self.alpha != 1 and self.order_cost != "softplus":
            got = f"{self.alpha!r} with order_cost {self.order_cost!r}"
            raise ValueError(f'alpha is only for order_cost "softplus": got {got}')
        if self.order_cost == "step" and abs(self.margin / self.delta - self.margin_nodes) > 1e-6:
            width = f"the bin width {self.delta:g} (n_bins={self.n_bins})"
            raise ValueError(f"margin of the step cost must be a multiple of {width}: got {self.margin!r}")
        if self.density == "beta" and self.kernel != "triangular":
            raise ValueError(f'kernel must be "triangular" with density "beta": got {self.kernel!r}')
        if self.kernel != "triangular":
            name = f"bandwidth of the {self.kernel} kernel (standard deviation in nodes)"
            object.__setattr__(self, "bandwidth", number(name, self.bandwidth, above=0))
        elif self.bandwidth is not None:
            raise ValueError(f"bandwidth of the triangular kernel must be None: got {self.bandwidth!r}")

    @property
    def delta(self) -> float:
        """Delta, the distance between neighbouring nodes."""
        return 2 / self.n_bins

    @property
    def of_histogram(self) -> tuple[int, str, float | None, str, float, float, bool, str]:
        """All settings except the density, in the order of the arguments of the custom operators."""
        costs = self.order_cost, self.margin, self.alpha
        return self.n_bins, self.kernel, self.bandwidth, *costs, self.normalize, self.on_degenerate

    @property
    def margin_nodes(self) -> int:
        """The margin mu of equation 6, as a number of nodes (margin / Delta)."""
        return round(self.margin / self.delta)


def missing_pairs(negatives: int, positives: int) -> str:
    """Return the error message for a batch without negative or without positive pairs, or an empty string."""
    if negatives and positives:
        return ""
    remedy = 'draw several images of several classes, or set on_degenerate="zero"'
    return f"the loss of {positives} positive and {negatives} negative pairs is undefined; {remedy}"
