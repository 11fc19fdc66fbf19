"""Estimates over seeds and test classes, with intervals and one-sided tests.

A result varies with the seed (initial weights, batches) and with the test classes. If each seed has its own test
classes (`dataset: glyphs-{seed}`), the values of the seeds differ in both, so Student's t interval over seeds includes
both. If all seeds share the test classes, the values of the seeds do not show the variation of classes. The variance of
a mean over n seeds and m classes is then that of a crossed random-effects design,

    V = S / n + max(0, C / m - E / (n m)),

with the variances S of the means of seeds, C of the means of classes, and E of the residuals (Searle, Casella &
McCulloch, Variance Components, 1992, chapter 4). The mean divided by its error is compared with two t distributions,
with n - 1 and with m - 1 degrees of freedom: its tail probability is the mean of theirs, weighted by the two parts of
V. tests/study/test_estimates.py checks coverage and error rates in simulations. Intervals with the degrees of freedom
of Satterthwaite (1946) had too low coverage there.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

SEEDS, SEEDS_AND_CLASSES = "seeds", "seeds and classes"
_IS_CORRECTED = ContextVar("_IS_CORRECTED", default=False)


class Estimate(NamedTuple):
    """A mean over seeds with its standard error.

    Attributes:
        mean: the mean; NaN without a seed.
        error: standard error of the mean, in its unit; NaN for fewer than two seeds.
        n: number of seeds.
        varies: the variation that the error includes, `SEEDS` or `SEEDS_AND_CLASSES`.
        share: share of the squared error that comes from the seeds; the rest comes from the classes.
        classes: number of classes; used if `share` is below 1.
    """

    mean: float
    error: float
    n: int
    varies: str = SEEDS
    share: float = 1.0
    classes: int = 2

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval.

        Args:
            confidence: confidence level in (0, 1).

        Returns:
            Lower and upper bound; NaN for fewer than two seeds.
        """
        if self.n < 2:
            return math.nan, math.nan
        tail = (1 - confidence) / 2
        quantile = -float(special.stdtrit(self.n - 1, tail))
        if self.share < 1:
            most = 2 * max(quantile, -float(special.stdtrit(self.classes - 1, tail)))
            quantile = optimize.brentq(lambda value: self._tail(value) - tail, 0, most)
        return self.mean - quantile * self.error, self.mean + quantile * self.error

    def _tail(self, value: float) -> float:
        """Probability that the error of the mean, in standard errors, is above a value."""
        of_seeds, of_classes = special.stdtr([self.n - 1, self.classes - 1], -value)  # stats.t takes 50 times as long
        return float(self.share * of_seeds + (1 - self.share) * of_classes)

    def with_more(self, n: int, more_classes: bool = False) -> "Estimate":
        """The estimate with another number of seeds, if mean and spread stay.

        Args:
            n: number of seeds. Their part of the squared error becomes `self.n / n` of the present one.
            more_classes: whether the number of classes, if they have a part of the error, changes by the same factor.

        Returns:
            The estimate; its error stays NaN if this one has fewer than two seeds.
        """
        of_seeds, of_classes = self.share * self.n / n, 1 - self.share
        if more_classes:
            of_classes *= self.n / n
        scale = of_seeds + of_classes
        classes = self.classes * n // self.n if more_classes else self.classes
        return self._replace(error=self.error * math.sqrt(scale), n=n, share=of_seeds / scale, classes=classes)

    def p_above(self, value: float) -> float:
        """P value of the one-sided test whose alternative is that the true mean is above a value.

        Args:
            value: in the unit of the mean.

        Returns:
            In [0, 1]; 1 for fewer than two seeds.
        """
        if self.n < 2:
            return 1.0
        if self.error == 0:
            return 0.0 if self.mean > value else 1.0
        return self._tail((self.mean - value) / self.error)

    def p_below(self, value: float) -> float:
        """P value of the one-sided test whose alternative is that the true mean is below a value.

        Args:
            value: in the unit of the mean.

        Returns:
            In [0, 1]; 1 for fewer than two seeds.
        """
        return self._replace(mean=-self.mean).p_above(-value)

    def p_within(self, margin: float) -> float:
        """P value of two one-sided tests that the true mean is within ±margin (Schuirmann 1987).

        Args:
            margin: in the unit of the mean, 0 or more.

        Returns:
            In [0, 1]; 1 for fewer than two seeds.
        """
        return max(self.p_above(-margin), self.p_below(margin))

    def p_outside(self, margin: float) -> float:
        """P value of a two-sided test that the true mean is outside ±margin.

        Args:
            margin: in the unit of the mean, 0 or more.

        Returns:
            In [0, 1]; 1 for fewer than two seeds.
        """
        return min(1.0, 2 * min(self.p_above(margin), self.p_below(-margin)))


@contextlib.contextmanager
def corrected_for_shared_training() -> Iterator[None]:
    """Within it, errors over seeds with test classes of their own are larger: these seeds share training classes.

    The squared error is multiplied by 1 + n / (n - 1) for n seeds: the corrected resampled t test of Nadeau & Bengio
    (Inference for the Generalization Error, Machine Learning 52, 2003) for n disjoint test sets of one dataset. The
    correction is an approximation on the safe side.
    """
    token = _IS_CORRECTED.set(True)
    try:
        yield
    finally:
        _IS_CORRECTED.reset(token)


def mean_over_runs(runs: pd.DataFrame, column: str = "recall@1") -> Estimate:
    """Mean of a column over the runs of one method.

    Args:
        runs: one run per seed, with the columns seed and `column` and, if known, split, ranks and query_classes.
        column: a metric in %. For "recall@K" with known ranks, the error includes the variation of classes, as the
            docstring of this module says.

    Returns:
        The mean, in the unit of the column.

    Raises:
        ValueError: if a seed occurs twice or a value is not finite.
    """
    by_seed = _by_seed("runs", runs, column)
    return _estimate(by_seed[column], by_seed, None, column)


def paired_difference(a: pd.DataFrame, b: pd.DataFrame, column: str = "recall@1") -> Estimate:
    """Mean of a minus b over their common seeds.

    Runs with the same seed share classes, batches and initial weights, so their difference varies less than their
    values.

    Args:
        a: runs of one method, as in `mean_over_runs`.
        b: runs of another method.
        column: the compared column.

    Returns:
        The difference, in the unit of the column.

    Raises:
        ValueError: if a seed occurs twice or a value is not finite.
    """
    first, second = _by_seed("a", a, column), _by_seed("b", b, column)
    seeds = first.index.intersection(second.index)
    first, second = first.loc[seeds], second.loc[seeds]
    return _estimate(first[column] - second[column], first, second, column)


def _by_seed(name: str, runs: pd.DataFrame, column: str) -> pd.DataFrame:
    if not runs["seed"].is_unique:
        twice = sorted(set(runs["seed"][runs["seed"].duplicated()]))
        raise ValueError(f"{name} must have one value per seed: got several for {twice}")
    if not np.isfinite(runs[column].to_numpy(dtype=float)).all():
        values = dict(zip(runs["seed"], runs[column], strict=True))
        raise ValueError(f"{name} must be finite: got {values}; leave out the seeds whose value is not")
    return runs.set_index("seed")


def _estimate(values: pd.Series, a: pd.DataFrame, b: pd.DataFrame | None, column: str) -> Estimate:
    n, numbers = len(values), values.to_numpy(dtype=float)
    if n < 2:
        return Estimate(float(numbers.mean()) if n else math.nan, math.nan, n)
    mean, error = float(numbers.mean()), float(stats.sem(numbers))
    splits = a["split"].nunique() if "split" in a else 1
    if splits == n:
        larger = math.sqrt(1 + n / (n - 1)) if _IS_CORRECTED.get() else 1
        return Estimate(mean, larger * error, n, SEEDS_AND_CLASSES)
    scores = _class_scores(a, b, column) if splits == 1 else None
    if scores is None:
        return Estimate(mean, error, n)
    return Estimate(mean, *crossed_error(scores), scores.shape[1])


def crossed_error(scores: np.ndarray) -> tuple[float, int, str, float]:
    """Standard error of the mean of scores of seeds and classes that are both random.

    Args:
        scores: shape (seeds, classes), at least two of each.

    Returns:
        The fields error, n, varies and share of `Estimate`.
    """
    n, m = scores.shape
    seeds, classes = scores.mean(1), scores.mean(0)
    rest = scores - seeds[:, None] - classes + scores.mean()
    of_seeds = seeds.var(ddof=1) / n
    of_classes = max(0.0, classes.var(ddof=1) / m - (rest**2).sum() / ((n - 1) * (m - 1) * n * m))
    variance = of_seeds + of_classes
    return float(np.sqrt(variance)), n, SEEDS_AND_CLASSES, float(of_seeds / variance) if variance else 1.0


def _class_scores(a: pd.DataFrame, b: pd.DataFrame | None, column: str) -> np.ndarray | None:
    """Scores of each seed and class, whose mean over classes is the seed's value minus the mean of all seeds, in %.

    Recall@K is a ratio of sums over classes, hits by queries, so the scores are those of its linear approximation
    (Davison & Hinkley 1997, 3.8). None if the ranks of a run are not known, or there is one class.
    """
    tables = [a] if b is None else [a, b]
    known = all({"ranks", "query_classes"} <= set(runs) and runs["ranks"].notna().all() for runs in tables)
    if not (known and column.startswith("recall@")):
        return None
    k = int(column.removeprefix("recall@"))
    counted = [np.stack(list(map(_hits_and_sizes, t["ranks"], t["query_classes"], [k] * len(t)))) for t in tables]
    sizes = counted[0][:, 1]
    hits = counted[0][:, 0] - (counted[1][:, 0] if b is not None else 0)
    if sizes.shape[1] < 2:
        return None
    mean = (hits.sum(1) / sizes.sum(1)).mean()
    return 100 * sizes.shape[1] * (hits - mean * sizes) / sizes.sum(1, keepdims=True)


def _hits_and_sizes(ranks: np.ndarray, classes: np.ndarray, k: int) -> np.ndarray:
    """Queries with a match among the first k, and queries with a match, of each class: shape (2, classes)."""
    ranks, classes = np.asarray(ranks), np.asarray(classes)
    _, index, sizes = np.unique(classes[ranks > 0], return_inverse=True, return_counts=True)
    return np.stack([np.bincount(index, ranks[ranks > 0] <= k), sizes])


def holm(p_values: pd.Series) -> pd.Series:
    """P values adjusted for all tests of a family (Holm, Scandinavian Journal of Statistics 1979).

    Args:
        p_values: one per test.

    Returns:
        Adjusted p values in [0, 1], with the same index.
    """
    ordered = p_values.sort_values()
    factors = np.arange(len(ordered), 0, -1)
    return (ordered * factors).cummax().clip(upper=1).reindex(p_values.index)
