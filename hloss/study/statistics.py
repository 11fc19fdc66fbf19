"""Confidence intervals over seeds and classes, paired differences, equivalence tests and summary tables."""

from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from hloss.runs.config import LAST

EQUIVALENCE_MARGIN = 2.0  # points of Recall@1; fixed before any run


class Difference(NamedTuple):
    """Mean of a minus b over n common seeds, with its confidence interval, in the unit of a and b.

    Attributes:
        mean: mean difference; NaN without a common seed.
        low: lower bound; NaN with fewer than two common seeds.
        high: upper bound; NaN with fewer than two common seeds.
        n: number of common seeds.
    """

    mean: float
    low: float
    high: float
    n: int


class Equivalence(NamedTuple):
    """Verdict on a minus b, with the interval of the two one-sided tests, in the unit of a and b.

    Attributes:
        verdict: "equivalent", "different" or "undecided".
        mean: mean difference over the common seeds.
        low: lower bound.
        high: upper bound.
        n: number of common seeds.
    """

    verdict: Literal["equivalent", "different", "undecided"]
    mean: float
    low: float
    high: float
    n: int


def t_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's t confidence interval.

    Args:
        values: at least one value, shape (n,).
        confidence: confidence level in (0, 1).

    Returns:
        Mean, lower bound and upper bound; the bounds are NaN for a single value.
    """
    values = np.asarray(values, dtype=float)
    mean = values.mean()
    if len(values) < 2:
        return float(mean), float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(mean), float(mean - half), float(mean + half)


def paired_difference(a: pd.Series, b: pd.Series, confidence: float = 0.95) -> Difference:
    """Mean of a minus b over their common seeds, with Student's t interval (Student, Biometrika 1908).

    Runs with the same seed share classes, batches and initial weights, so their difference varies less than the values.

    Args:
        a: values indexed by seed.
        b: values indexed by seed, in the unit of `a`.
        confidence: confidence level in (0, 1).

    Returns:
        The difference, in the unit of `a` and `b`.

    Raises:
        ValueError: if a seed occurs twice or a value is not finite.
    """
    differences = _differences(a, b)
    if not len(differences):
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    return Difference(*t_interval(differences, confidence), len(differences))


def equivalence(a: pd.Series, b: pd.Series, margin: float = EQUIVALENCE_MARGIN, level: float = 0.05) -> Equivalence:
    """Test whether a minus b is negligible: two one-sided t tests, paired by seed (Schuirmann 1987).

    Equivalent: both tests reject, so the 1 - 2 level interval lies within ±margin. Different: the 1 - level interval
    lies outside ±margin. Undecided: neither, or fewer than two common seeds.

    Args:
        a: values indexed by seed.
        b: values indexed by seed, in the unit of `a`.
        margin: largest negligible difference, in the unit of `a`; above 0.
        level: significance level of each test, in (0, 0.5).

    Returns:
        The verdict, and the mean with its 1 - 2 level interval.

    Raises:
        ValueError: if `margin` or `level` is out of range, a seed occurs twice or a value is not finite.
    """
    if not (margin > 0 and 0 < level < 0.5):
        raise ValueError(f"margin must be above 0 and level between 0 and 0.5: got margin={margin}, level={level}")
    tests, wide = paired_difference(a, b, 1 - 2 * level), paired_difference(a, b, 1 - level)
    if -margin < tests.low and tests.high < margin:
        return Equivalence("equivalent", *tests)
    if wide.low > margin or wide.high < -margin:
        return Equivalence("different", *tests)
    return Equivalence("undecided", *tests)


def bootstrap_over_classes(
    hits: np.ndarray,
    classes: np.ndarray,
    generator: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """Mean of `hits` over the queries of one run, with its percentile bootstrap interval over classes.

    Queries of one class depend on each other, so each resample draws whole classes with replacement. Its value is a
    ratio of sums, the mean over the queries drawn (Davison & Hinkley 1997, 3.8). The interval describes variation over
    test classes, not over seeds. The same generator state gives the same bounds for any order of the queries.

    Args:
        hits: score of each query, shape (n,): True or False for Recall@K, or any finite number.
        classes: class of each query, shape (n,).
        generator: source of the resamples.
        confidence: confidence level in (0, 1).
        resamples: number of resamples.

    Returns:
        Mean, lower bound and upper bound; the bounds are NaN for a single class.

    Raises:
        ValueError: if `hits` and `classes` are empty or differ in length, or a value is not finite.
    """
    hits, classes = np.asarray(hits, dtype=float), np.asarray(classes)
    if hits.ndim != 1 or hits.shape != classes.shape or not len(hits) or not np.isfinite(hits).all():
        raise ValueError(
            "hits must be finite, and hits and classes must have one dimension and the same length of at least 1: "
            f"got hits {hits.shape} and classes {classes.shape}"
        )
    _, index, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    scores = np.bincount(index, hits)
    mean = float(scores.sum() / sizes.sum())
    if len(sizes) < 2:
        return mean, float("nan"), float("nan")
    drawn = stats.bootstrap(
        (scores, sizes),
        lambda scores, sizes, axis: scores.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, 2**22 // len(sizes)),  # limits memory to about 100 MB for any number of classes
        rng=generator,
    )
    return mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def summary(results: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Means over seeds of the complete runs.

    Args:
        results: the table of `hloss.study.results.read_results`.
        metrics: columns of `results` to average, in %.

    Returns:
        One row per dataset, comparison and method. Columns: dataset, comparison, method, n (complete runs), of (all
        runs), for each metric its mean and the bounds "METRIC low" and "METRIC high" of its 95 % interval, run_ids, and
        chosen_how if runs were trained without validation (`choose` "last").
    """
    rows = []
    for key, runs in results.groupby(["dataset", "comparison", "method"], sort=False):
        complete = runs[runs["complete"]]
        row: dict[str, object] = dict(zip(("dataset", "comparison", "method"), key, strict=True))
        row |= {"n": len(complete), "of": len(runs)}
        for metric in metrics if len(complete) else []:
            mean, low, high = t_interval(complete[metric].to_numpy())
            row |= {metric: mean, f"{metric} low": low, f"{metric} high": high}
        if "choose" in complete and (complete["choose"] == LAST).any():
            row["chosen_how"] = complete["chosen_how"].iloc[0]
        rows.append(row | {"run_ids": ", ".join(complete["run_id"])})
    return pd.DataFrame(rows)


def headline(table: pd.DataFrame, comparisons: Collection[str], metrics: list[str]) -> pd.DataFrame:
    """Format the means of some comparisons as text.

    Args:
        table: the table of `summary`.
        comparisons: comparisons to show.
        metrics: metrics to show; the interval is that of the first.

    Returns:
        One row per method with complete runs, indexed as in `table`. Columns: dataset, comparison, method, n, a mean in
        % per metric, "95 % interval", and "tested iteration" if runs were trained without validation.
    """
    rows = table[table["comparison"].isin(comparisons) & (table["n"] > 0)]
    shown = rows[["dataset", "comparison", "method", "n"]].copy()
    shown["n"] = [n if n == of else f"{n} of {of}" for n, of in zip(rows["n"], rows["of"], strict=True)]
    for metric in metrics:
        shown[f"{metric} (%)"] = rows[metric].map("{:.1f}".format)
    intervals = map(shown_interval, rows[f"{metrics[0]} low"], rows[f"{metrics[0]} high"])
    shown.insert(5, "95 % interval", list(intervals))
    if "chosen_how" in rows and rows["chosen_how"].notna().any():
        shown["tested iteration"] = rows["chosen_how"]
    return shown


def differences_from(results: pd.DataFrame, method: str) -> pd.DataFrame:
    """Paired differences in Recall@1 from one method of a comparison, in points.

    Args:
        results: runs of one comparison, from `hloss.study.results.read_results`.
        method: the method that is subtracted.

    Returns:
        One row per other method. Columns: method, "minus METHOD" (mean difference), low and high (95 % interval), n
        (common seeds) and verdict ("equivalent", "different" or "undecided"; "not run" while runs of the pair are
        missing).

    Raises:
        ValueError: if no run has the method `method`.
    """
    methods = dict(list(results.groupby("method", sort=False)))
    whole = {name: runs["complete"].all() for name, runs in methods.items()}
    by_seed = {name: runs[runs["complete"]].set_index("seed")["recall@1"] for name, runs in methods.items()}
    if method not in by_seed:
        raise ValueError(f"method is unknown: got {method!r}; allowed are {', '.join(by_seed)}")
    rows = []
    for other, recalls in by_seed.items():
        if other != method:
            found = paired_difference(recalls, by_seed[method])
            judged = whole[other] and whole[method]
            verdict = equivalence(recalls, by_seed[method]).verdict if judged else "not run"
            rows.append({"method": other, f"minus {method}": found.mean, "low": found.low, "high": found.high,
                         "n": found.n, "verdict": verdict})  # fmt: skip
    return pd.DataFrame(rows)


def shown_interval(low: float, high: float) -> str:
    """An interval as text: "41.0 to 43.2", or "no interval" if `low` is NaN."""
    return "no interval" if pd.isna(low) else f"{low:.1f} to {high:.1f}"


def _differences(a: pd.Series, b: pd.Series) -> np.ndarray:
    for name, values in (("a", a), ("b", b)):
        if not values.index.is_unique:
            twice = sorted(set(values.index[values.index.duplicated()]))
            raise ValueError(f"{name} must have one value per seed: got several for {twice}")
        if not np.isfinite(values.to_numpy(dtype=float)).all():
            raise ValueError(f"{name} must be finite: got {values.to_dict()}; leave out the seeds whose value is not")
    seeds = a.index.intersection(b.index)
    return (a.loc[seeds] - b.loc[seeds]).to_numpy(dtype=float)
