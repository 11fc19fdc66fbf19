"""Intervals over seeds and over classes, paired differences and equivalence."""

from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

EQUIVALENCE_MARGIN = 2.0  # points of Recall@1; fixed before any run


class Difference(NamedTuple):
    """Mean of a - b over n common seeds and its interval, in the unit of a and b."""

    mean: float
    low: float
    high: float
    n: int


class Equivalence(NamedTuple):
    """The verdict on a - b, and the interval of the two one-sided tests, in the unit of a and b."""

    verdict: Literal["equivalent", "different", "undecided"]
    mean: float
    low: float
    high: float
    n: int


def t_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, lower and upper bound of Student's t interval; the bounds are NaN for a single value."""
    values = np.asarray(values, dtype=float)
    mean = values.mean()
    if len(values) < 2:
        return float(mean), float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(mean), float(mean - half), float(mean + half)


def paired_difference(a: pd.Series, b: pd.Series, confidence: float = 0.95) -> Difference:
    """Mean of a - b over the seeds that both have, with Student's t interval (Student, Biometrika 1908).

    `a` and `b` are indexed by seed, in one unit. Runs of one seed share classes, batches and initial weights, so
    their difference varies less than either. With one common seed the bounds are NaN, with none the mean is, too.
    Raises ValueError for a seed that stands twice and for a value that is not finite.
    """
    differences = _differences(a, b)
    if not len(differences):
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    return Difference(*t_interval(differences, confidence), len(differences))


def equivalence(a: pd.Series, b: pd.Series, margin: float = EQUIVALENCE_MARGIN, level: float = 0.05) -> Equivalence:
    """Whether a - b is negligible: two one-sided t tests at `level` each (Schuirmann 1987), paired by seed.

    equivalent: both tests reject, that is the 1 - 2 level interval lies inside +-margin. different: the 1 - level
    interval lies wholly outside +-margin. undecided: neither, or fewer than two common seeds. `a`, `b` as in
    `paired_difference`; `margin` in their unit (points of Recall@1 if they are in %).
    """
    if not (margin > 0 and 0 < level < 0.5):
        raise ValueError(f"margin={margin} and level={level}: margin must be above 0, level between 0 and 0.5")
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
    """Mean of `hits` over the queries of one run, lower and upper bound of its percentile interval over classes.

    `hits` (n,) is what each query scored (True and False for Recall@K; any finite number), `classes` (n,) its class.
    Queries of one class stand and fall together, so whole classes are drawn with replacement, and each draw is a
    ratio of sums: the mean over its queries (Davison & Hinkley 1997, 3.8). The interval is about other test classes,
    not about other seeds. With a single class the bounds are NaN. The same generator state gives the same bounds,
    in whatever order the queries stand.
    """
    hits, classes = np.asarray(hits, dtype=float), np.asarray(classes)
    if hits.ndim != 1 or hits.shape != classes.shape or not len(hits) or not np.isfinite(hits).all():
        raise ValueError(
            f"hits {hits.shape} and classes {classes.shape} must be two equally long rows, not empty, and hits finite"
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
        batch=max(1, 2**22 // len(sizes)),  # draws at a time: some 100 MB whatever the number of classes
        rng=generator,
    )
    return mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def summary(results: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """One row per dataset, comparison and method: mean, 95 % interval over seeds of each metric, n, and the runs.

    results: of `hloss.study.results.read_results`. Runs that are not complete are left out, `of` says how many there
    are.
    """
    rows = []
    for key, runs in results.groupby(["dataset", "comparison", "method"], sort=False):
        complete = runs[runs["complete"]]
        row: dict[str, object] = dict(zip(("dataset", "comparison", "method"), key, strict=True))
        row |= {"n": len(complete), "of": len(runs)}
        for metric in metrics if len(complete) else []:
            mean, low, high = t_interval(complete[metric].to_numpy())
            row |= {metric: mean, f"{metric} low": low, f"{metric} high": high}
        rows.append(row | {"run_ids": ", ".join(complete["run_id"])})
    return pd.DataFrame(rows)


def headline(table: pd.DataFrame, comparisons: Collection[str], metrics: list[str]) -> pd.DataFrame:
    """The rows of these comparisons with complete runs, as text: means in %, and the interval of the first metric.

    table: of `summary`. The index is that of its rows.
    """
    rows = table[table["comparison"].isin(comparisons) & (table["n"] > 0)]
    shown = rows[["dataset", "comparison", "method", "n"]].copy()
    shown["n"] = [n if n == of else f"{n} of {of}" for n, of in zip(rows["n"], rows["of"], strict=True)]
    for metric in metrics:
        shown[f"{metric} (%)"] = rows[metric].map("{:.1f}".format)
    intervals = map(shown_interval, rows[f"{metrics[0]} low"], rows[f"{metrics[0]} high"])
    shown.insert(5, "95 % interval", list(intervals))
    return shown


def differences_from(results: pd.DataFrame, method: str) -> pd.DataFrame:
    """Recall@1 of every other method of a comparison less that of `method`, in points: mean, 95 % interval, n, verdict.

    results: runs of one comparison, of `hloss.study.results.read_results`. Where runs of a method or of `method` are
    not complete, the difference is that of the others and the verdict "not run". ValueError if `method` is unknown.
    """
    methods = dict(list(results.groupby("method", sort=False)))
    whole = {name: runs["complete"].all() for name, runs in methods.items()}
    by_seed = {name: runs[runs["complete"]].set_index("seed")["recall@1"] for name, runs in methods.items()}
    if method not in by_seed:
        raise ValueError(f"method={method!r} is none of {', '.join(by_seed)}")
    rows = []
    for other, recalls in by_seed.items():
        if other != method:
            found = paired_difference(recalls, by_seed[method])
            judged = whole[other] and whole[method]
            verdict = equivalence(recalls, by_seed[method]).verdict if judged else "not run"
            rows.append({"method": other, f"less {method}": found.mean, "low": found.low, "high": found.high,
                         "n": found.n, "verdict": verdict})  # fmt: skip
    return pd.DataFrame(rows)


def shown_interval(low: float, high: float) -> str:
    """An interval in words: "41.0 to 43.2", or that there is none."""
    return "no interval" if pd.isna(low) else f"{low:.1f} to {high:.1f}"


def _differences(a: pd.Series, b: pd.Series) -> np.ndarray:
    for name, values in (("a", a), ("b", b)):
        if not values.index.is_unique:
            twice = sorted(set(values.index[values.index.duplicated()]))
            raise ValueError(f"{name} has more than one value for seed {twice}; give one value per seed")
        if not np.isfinite(values.to_numpy(dtype=float)).all():
            raise ValueError(f"{name} has a value that is not finite: {values.to_dict()}; leave that seed out")
    seeds = a.index.intersection(b.index)
    return (a.loc[seeds] - b.loc[seeds]).to_numpy(dtype=float)
