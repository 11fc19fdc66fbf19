"""Alternative texts of figures: what a figure shows, in one sentence, from the table that it draws."""

from collections.abc import Collection, Sequence

import pandas as pd

from hloss.study.difficulty import in_points
from hloss.study.levels import CATEGORIES, GRID, Levels, levels_of, setting_label
from hloss.study.spec import short_value
from hloss.study.tables import listed


def describe_comparison(name: str | Sequence[str], results: pd.DataFrame, table: pd.DataFrame) -> str:
    """Describe the figure of `hloss.study.plots.comparison` in one sentence.

    Args:
        name: name of the comparison, or names of several that are drawn in one figure.
        results: results on one dataset at one length.
        table: their summary.

    Returns:
        One sentence: the axes with their range, the highest mean with its interval, and the lowest.
    """
    runs = results[results["comparison"].isin([name] if isinstance(name, str) else name)]
    levels = levels_of(runs)
    means = levels.means(table)
    best, worst = (means.loc[at] for at in (means["recall@1"].idxmax(), means["recall@1"].idxmin()))
    low, high = best["recall@1 low"], best["recall@1 high"]
    interval = "" if pd.isna(low) else f" (95 % interval {low:.1f} to {high:.1f})"
    return (
        f"{_axes(levels, means)}{_after(means['length'])}: highest {_place(levels, best)} with "
        f"{best['recall@1']:.1f} %{interval}, lowest {_place(levels, worst)} with {worst['recall@1']:.1f} %."
    )


def _axes(levels: Levels, means: pd.DataFrame) -> str:
    """The kind of the figure and its axes."""
    dataset = means["dataset"].iloc[0]
    if levels.kind == CATEGORIES:
        return f"Means and intervals of the test Recall@1 on {dataset} for {len(means)} methods"
    lines, known = list(levels.places["line"].unique()), levels.places["level"].dropna()
    shown = "Map" if levels.kind == GRID else "Curve" if len(lines) == 1 else "Curves"
    of_lines = f" for {_named(levels, _listed(lines))}" * (len(lines) > 1)
    axis = f"{levels.label} from {known.min():g} to {known.max():g}"
    return f"{shown} of the test Recall@1 on {dataset} over {axis}{of_lines}"


def _place(levels: Levels, mean: pd.Series) -> str:
    """The place of a mean in words: "for triplet", "at 200" or "at 0.003 for histogram"."""
    parts = [] if pd.isna(mean["level"]) else [f"at {short_value(float(mean['level']))}"]
    parts += [f"for {_named(levels, mean['line'])}"] * (levels.places["line"].nunique() > 1 or not parts)
    return " ".join(parts)


def _named(levels: Levels, line: str) -> str:
    """A line with the setting in which lines differ, without its unit."""
    return f"{setting_label(levels.other).split(' (')[0]} {line}" if levels.other else line


def _after(lengths: pd.Series) -> str:
    trained = sorted(set(lengths) - {0})
    shown = " to ".join(f"{length:,}" for length in dict.fromkeys(trained[:1] + trained[-1:]))
    return f", after {shown} iterations" if trained else ""


def _listed(names: Sequence[str]) -> str:
    """Names as text: "a, b and c"; names with a comma are in quotes."""
    *first, last = (f'"{name}"' if "," in name else name for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def describe_differences(table: pd.DataFrame) -> str:
    """Describe the figure of `hloss.study.plots.differences`; the argument is its own.

    Args:
        table: rows of `hloss.study.difficulty.differences` at one length.

    Returns:
        One sentence: the difference from each method on each dataset, with its interval.
    """
    shown = []
    for other, rows in table.groupby("other", sort=False):
        values = [f"{in_points(row)} on {row['dataset']}" for row in rows.to_dict("records")]
        shown.append(f"minus {other} {listed(values)}")
    first = table["first"].iloc[0]
    return f"Differences in the test Recall@1 in points with 95 % intervals, {first} {'; '.join(shown)}."


def describe_recall_curves(recalls: pd.DataFrame, published: pd.DataFrame | None = None) -> str:
    """Describe the figure of `hloss.study.plots.recall_curves` in one sentence.

    Args:
        recalls: one row per run and K, with the columns method, seed, K, recall (%).
        published: the published values.

    Returns:
        One sentence: the range of K, and the highest mean and its method at both ends.
    """
    means = recalls.groupby(["K", "method"], sort=False)["recall"].mean()
    first, last = recalls["K"].min(), recalls["K"].max()
    tops = [f"at K = {k:,} {means[k].idxmax()} ({means[k].max():.1f} %)" for k in dict.fromkeys((first, last))]
    known = [] if published is None else published[published["method"].isin(recalls["method"])]
    stars = f"; {len(known)} published values as stars" if len(known) else ""
    return (
        f"Curves of the test Recall@K over K from {first:,} to {last:,} for {recalls['method'].nunique()} methods: "
        f"highest {'; '.join(tops)}{stars}."
    )


def describe_recall_over_iterations(histories: pd.DataFrame, lengths: Collection[int] = ()) -> str:
    """Describe the figure of `hloss.study.plots.recall_over_iterations` in one sentence.

    Args:
        histories: one row per validation, with the columns method, seed, iteration, recall (%).
        lengths: training lengths at which the test is reported.

    Returns:
        One sentence: the range of iterations, and the highest mean and its method at the end and at each length.
    """
    means = histories.groupby(["iteration", "method"], sort=False)["recall"].mean()
    validated = set(histories["iteration"])
    at = sorted({length for length in lengths if length in validated} | {max(validated)})
    tops = [f"after {n:,} iterations {means[n].idxmax()} ({means[n].max():.1f} %)" for n in at]
    return (
        f"Curves of the validation Recall@1 over training iterations from {min(validated):,} to {max(validated):,} for "
        f"{histories['method'].nunique()} methods: highest {'; '.join(tops)}."
    )


def describe_recall_by_length(name: str, table: pd.DataFrame) -> str:
    """Describe the figure of `hloss.study.plots.recall_by_length` in one sentence.

    Args:
        name: name of the comparison.
        table: the summary of one dataset at all lengths.

    Returns:
        One sentence: the lengths, and the highest mean and its method at each.
    """
    rows = table[(table["comparison"] == name) & (table["n"] > 0) & (table["length"] > 0)]
    best = rows.loc[rows.groupby("length")["recall@1"].idxmax()]
    tops = [f"after {row['length']:,} {row['method']} ({row['recall@1']:.1f} %)" for row in best.to_dict("records")]
    return (
        f"Curves of the test Recall@1 on {rows['dataset'].iloc[0]} over the training length in iterations for "
        f"{rows['method'].nunique()} methods: highest {'; '.join(tops)}."
    )
