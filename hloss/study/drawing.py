"""Draw lines, bands, legends, and comparisons by their levels, for `hloss.study.plots`."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from hloss.study.levels import Levels, scale_of, setting_label

MEAN, SEED = "#1b9e77", "0.55"  # green and grey
COLORS = (
    MEAN,
    "#d55e00",
    "#0072b2",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#000000",
)  # as Okabe & Ito 2008, but no yellow
LINES, MARKERS = ("-", "--", ":"), "osD^vPX<"
RECALL = "test Recall@1 (%)"


def style_of(number: int) -> dict[str, Any]:
    """Color, line style and marker of a line; the first 168 lines have different ones.

    Args:
        number: number of the line, from 0.
    """
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": LINES[number // len(COLORS) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def legend_beside(axes: plt.Axes, entries: Sequence[Line2D], title: str | None = None) -> None:
    """Draw a legend to the right of the axes, aligned with their top.

    Args:
        axes: the axes.
        entries: lines with labels.
        title: title of the legend.
    """
    axes.legend(handles=entries, title=title, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0,
                frameon=False, alignment="left")  # fmt: skip


def by_right_end(axes: plt.Axes) -> list[Line2D]:
    """The lines with a label, the one with the highest right end first.

    Args:
        axes: the axes.
    """
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return sorted(lines, key=lambda line: -float(np.asarray(line.get_ydata())[-1]))


def ticks_at(axis: Axis, values: Iterable[float]) -> None:
    """Set the ticks of an axis to these values, without minor ticks.

    Args:
        axis: the x or y axis.
        values: the values, in any order.
    """
    ticks = sorted(set(values))
    axis.set_ticks(ticks, [f"{value:,.0f}" if value >= 1000 else f"{value:g}" for value in ticks])
    axis.set_ticks([], minor=True)


def mean_and_range(axes: plt.Axes, rows: pd.DataFrame, x: str, y: str = "recall", **style: Any) -> None:
    """Draw the mean over seeds as a line, with a band from the lowest to the highest seed.

    Args:
        axes: the axes.
        rows: one row per seed and value of x.
        x: name of the column of x.
        y: name of the column of y.
        **style: settings of the line; "color" is needed.
    """
    of_seeds = rows.groupby(x)[y].agg(["mean", "min", "max"])
    axes.plot(of_seeds.index, of_seeds["mean"], markersize=5, **style)
    axes.fill_between(of_seeds.index, of_seeds["min"], of_seeds["max"], color=style["color"], alpha=0.12, linewidth=0)


def draw_intervals(axes: plt.Axes, runs: pd.DataFrame, means: pd.DataFrame) -> None:
    """Draw one row per method: its mean with its interval, and one point per seed.

    Args:
        axes: the axes.
        runs: complete runs with the columns comparison, method and recall@1.
        means: their means, the table of `hloss.study.levels.Levels.means`.
    """
    of_methods = runs.groupby(["comparison", "method"])["recall@1"]
    for row, key in enumerate(zip(means["comparison"], means["method"], strict=True)):
        seeds = of_methods.get_group(key)
        apart = np.linspace(-0.12, 0.12, len(seeds)) if len(seeds) > 1 else 0
        axes.scatter(seeds, np.full(len(seeds), row) + apart, s=16, color=SEED)
    rows = np.arange(len(means))
    axes.errorbar(means["recall@1"], rows, xerr=bars_of(means), fmt="o", color=MEAN, capsize=3, zorder=3)
    open_circles(axes, means["recall@1"], rows, means, color=MEAN)
    axes.set(xlabel=RECALL, ylim=(len(means) - 0.5, -0.5))
    axes.set_yticks(rows, means["line"])
    axes.grid(axis="x", color="0.9")


def bars_of(means: pd.DataFrame, metric: str = "recall@1") -> np.ndarray:
    """Distances of the bounds of intervals from the means, shape (2, n); 0 without an interval.

    Args:
        means: the table of `hloss.study.statistics.summary`.
        metric: one of its metrics.
    """
    low, mean, high = (means[name] for name in (f"{metric} low", metric, f"{metric} high"))
    return np.nan_to_num(np.array([mean - low, high - mean]))


def open_circles(axes: plt.Axes, x: ArrayLike, y: ArrayLike, means: pd.DataFrame, **style: Any) -> None:
    """Draw an open circle at each mean with runs that are still improving.

    Args:
        axes: the axes.
        x: positions of the means, shape (n,).
        y: positions of the means, shape (n,).
        means: the means, with the column "still improving".
        **style: settings of the circles.
    """
    shown = (means["still improving"] > 0).to_numpy()
    axes.plot(np.asarray(x)[shown], np.asarray(y)[shown], "o", markerfacecolor="white", zorder=4, **style)


def draw_curves(
    axes: plt.Axes, levels: Levels, runs: pd.DataFrame, means: pd.DataFrame, of_lengths: pd.DataFrame
) -> None:
    """Draw lines over the levels of a number: the means with their intervals, and one point per seed.

    Args:
        axes: the axes.
        levels: the levels.
        runs: complete runs with the columns level and recall@1.
        means: their means, the table of `hloss.study.levels.Levels.means`.
        of_lengths: the means at all lengths; those of shorter training become lines without intervals.
    """
    axes.scatter(runs["level"], runs["recall@1"], s=14, color=SEED, zorder=2.5)
    ranked = _ranked(of_lengths, means)
    ranks = dict(list(ranked.groupby("rank", sort=True)["length"]))
    colors = dict(zip(levels.places["line"].unique(), cycle(COLORS), strict=False))
    styles = dict(zip(ranks, cycle(LINES), strict=False))
    for (line, rank), points in ranked.groupby(["line", "rank"], sort=False):
        _line(axes, points.sort_values("level"), rank == 1, color=colors[line], linestyle=styles[rank])
    known = np.unique(levels.places["level"].dropna())
    scale = scale_of(known)
    axes.set_xscale(scale, **({"linthresh": known[known > 0][0], "linscale": 0.5} if scale == "symlog" else {}))
    ticks_at(axes.xaxis, known)
    axes.set(xlabel=levels.label, ylabel=RECALL)
    axes.grid(axis="y", color="0.9")
    lines = [Line2D([], [], color=color, marker="o", label=line) for line, color in colors.items()]
    after = [Line2D([], [], color="0.4", linestyle=styles[n], label=_span(of_rank)) for n, of_rank in ranks.items()]
    if entries := lines * (len(lines) > 1) + after * (len(after) > 1):
        legend_beside(axes, entries, setting_label(levels.other) if levels.other else None)


def _ranked(of_lengths: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """The rows up to the length in `means`, with the column rank: 1 is this length, 2 the next shorter one."""
    key = ["comparison", "method"]
    rows = of_lengths.merge(means[[*key, "length"]].rename(columns={"length": "longest"}), on=key)
    rows = rows[rows["length"] <= rows["longest"]]
    return rows.assign(rank=rows.groupby(key)["length"].rank(ascending=False).astype(int))


def _span(lengths: pd.Series) -> str:
    """Lengths as text: "600 iterations" or "50 to 800 iterations"."""
    return " to ".join(f"{length:,}" for length in sorted({lengths.min(), lengths.max()})) + " iterations"


def _line(axes: plt.Axes, points: pd.DataFrame, intervals: bool, color: str, linestyle: str) -> None:
    """Draw the means of one line over their levels; without a level, as a horizontal line."""
    level, mean, low, high = (points[name] for name in ("level", "recall@1", "recall@1 low", "recall@1 high"))
    if level.isna().all():
        axes.axhline(mean.iloc[0], color=color, linestyle=linestyle)
        if intervals:
            axes.axhspan(low.iloc[0], high.iloc[0], color=color, alpha=0.15, linewidth=0)
        return
    size = 6 if intervals else 4
    axes.plot(level, mean, marker="o", markersize=size, color=color, linestyle=linestyle)
    open_circles(axes, level, mean, points, color=color, markersize=size)
    if intervals:
        axes.errorbar(level, mean, yerr=bars_of(points), fmt="none", color=color, elinewidth=1)
        axes.fill_between(level, low, high, color=color, alpha=0.15, linewidth=0)


def draw_heat_map(axes: plt.Axes, levels: Levels, means: pd.DataFrame) -> None:
    """Draw a cell per line and level: the mean ± half its interval. A method without a level fills its row.

    Args:
        axes: the axes.
        levels: the levels.
        means: the table of `hloss.study.levels.Levels.means`.
    """
    cells = means.pivot(index="line", columns="level", values="recall@1")
    cells = cells.reindex(index=levels.places["line"].unique(), columns=np.unique(levels.places["level"].dropna()))
    for without in means[means["level"].isna()].itertuples():
        cells.loc[without.line] = means.loc[without.Index, "recall@1"]
    shown = axes.imshow(cells, cmap="cividis", aspect="auto")
    axes.set_facecolor("0.93")
    x, y = ({value: at for at, value in enumerate(names)} for names in (cells.columns, cells.index))
    for mean, half, cell in zip(means["recall@1"], bars_of(means).mean(axis=0), means.to_dict("records"), strict=True):
        text = f"{mean:.1f}{f' ± {half:.1f}' if half else ''}{' ○' if cell['still improving'] else ''}"
        at = x.get(cell["level"], (len(x) - 1) / 2), y[cell["line"]]
        axes.text(*at, text, ha="center", va="center", color=_readable_on(shown.to_rgba(np.array([mean]))[0]))
    axes.set_xticks(range(len(x)), [f"{level:g}" for level in x])
    axes.set_yticks(range(len(y)), y)
    axes.set(xlabel=levels.label, ylabel=setting_label(levels.other) if levels.other else "")
    axes.figure.colorbar(shown, label=RECALL)


def _readable_on(color: np.ndarray) -> str:
    """Black or white, whichever has the higher contrast to a color (WCAG 2, relative luminance)."""
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in color[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"
