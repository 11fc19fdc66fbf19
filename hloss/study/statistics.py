"""Bootstrap over the classes of one run, and summary tables."""

from collections.abc import Collection

import numpy as np
import pandas as pd
from scipy import stats

from hloss.runs.config import LAST
from hloss.study.estimates import Estimate, mean_over_runs, paired_difference
from hloss.study.tables import signed

EQUIVALENCE_MARGIN = 2.0  # points of Recall@1; fixed before any run


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
        One row per dataset, comparison, method and length. Columns: dataset, comparison, method, length, n (complete
        runs), of (all runs), still improving (runs), for each metric its mean and the bounds "METRIC low" and "METRIC
        high" of its 95 % interval (NaN if no run has a value), run_ids, and chosen_how if runs were trained without
        validation (`choose` "last").
    """
    rows, names = [], ["dataset", "comparison", "method", "length"]
    for key, runs in results.groupby(names, sort=False):
        complete = runs[runs["complete"]]
        row: dict[str, object] = dict(zip(names, key, strict=True))
        row |= {"n": len(complete), "of": len(runs), "still improving": int(complete["still_improving"].sum())}
        for metric in metrics:
            if complete[metric].isna().all():  # The protocol of another dataset has this K.
                continue
            found = mean_over_runs(complete, metric)
            row |= {metric: found.mean, **dict(zip((f"{metric} low", f"{metric} high"), found.interval(), strict=True))}
        if "choose" in complete and (complete["choose"] == LAST).any():
            row["chosen_how"] = complete["chosen_how"].iloc[0]
        rows.append(row | {"run_ids": ", ".join(complete["run_id"])})
    return pd.DataFrame(rows)


def late_gain(runs: pd.DataFrame) -> pd.Series:
    """How far the best validation Recall@1 of each run rose in the second half of its training, in points.

    Args:
        runs: complete runs with training, from `hloss.study.results.read_results`.

    Returns:
        The best of the whole length minus the best of its first half, 0 or more, with the index of `runs`; NaN without
        a validation in the first half.
    """
    gains = []
    for iterations, recalls, length in runs[["history_iteration", "history_recall", "length"]].itertuples(index=False):
        first = np.asarray(recalls)[np.asarray(iterations) <= length / 2]
        gains.append(100 * (np.max(recalls) - first.max()) if len(first) else np.nan)
    return pd.Series(gains, index=runs.index, dtype=float)


def headline(table: pd.DataFrame, comparisons: Collection[str], metrics: list[str]) -> pd.DataFrame:
    """Format the means of some comparisons as text.

    Args:
        table: the table of `summary`.
        comparisons: comparisons to show.
        metrics: metrics to show; the interval is that of the first.

    Returns:
        One row per method with complete runs, indexed as in `table`. Columns: dataset, comparison, method, length, n, a
        mean in % per metric, "95 % interval", "still improving" ("3 of 5": of the complete runs), and "tested
        iteration" if runs were trained without validation.
    """
    rows = table[table["comparison"].isin(comparisons) & (table["n"] > 0)]
    shown = rows[["dataset", "comparison", "method", "length", "n"]].copy()
    shown["n"] = [n if n == of else f"{n} of {of}" for n, of in zip(rows["n"], rows["of"], strict=True)]
    for metric in metrics:
        shown[f"{metric} (%)"] = rows[metric].round(1)
    intervals = map(shown_interval, rows[f"{metrics[0]} low"], rows[f"{metrics[0]} high"])
    shown.insert(6, "95 % interval", list(intervals))
    improving = [f"{m} of {n}" for m, n in zip(rows["still improving"], rows["n"], strict=True)]
    shown = shown.assign(**{"still improving": improving})
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
    if not (method in methods and methods[method]["complete"].any()):
        raise ValueError(f"method is unknown: got {method!r}; allowed are {', '.join(methods)}")
    reference = methods[method][methods[method]["complete"]]
    rows = []
    for other, runs in methods.items():
        complete = runs[runs["complete"]]
        if other != method and len(complete):
            found = paired_difference(complete, reference)
            low, high = found.interval()
            verdict = _equivalence(found) if whole[other] and whole[method] else "not run"
            rows.append({"method": other, f"minus {method}": found.mean, "low": low, "high": high, "n": found.n,
                         "verdict": verdict})  # fmt: skip
    return pd.DataFrame(rows)


def _equivalence(difference: Estimate) -> str:
    """Whether a difference is negligible: "equivalent", "different" or "undecided", each test at 5 %."""
    if difference.p_within(EQUIVALENCE_MARGIN) < 0.05:
        return "equivalent"
    return "different" if difference.p_outside(EQUIVALENCE_MARGIN) < 0.05 else "undecided"


def shown_interval(low: float, high: float, decimals: int = 1) -> str:
    """An interval as text: "41.0 to 43.2", or "no interval".

    Args:
        low: lower bound; NaN: there is no interval.
        high: upper bound.
        decimals: number of decimals.
    """
    return "no interval" if pd.isna(low) else f"{signed(low, decimals)} to {signed(high, decimals)}"


def shown_mean(row: pd.Series, metric: str = "recall@1", decimals: int = 1) -> str:
    """A mean with its interval as text: "42.1 (41.0 to 43.2)".

    Args:
        row: a row of `summary`.
        metric: one of its metrics.
        decimals: number of decimals.
    """
    interval = shown_interval(row[f"{metric} low"], row[f"{metric} high"], decimals)
    return f"{signed(row[metric], decimals)} ({interval})"
