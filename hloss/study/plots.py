"""Figures of the notebooks. Each function draws the given numbers and returns a matplotlib Figure."""

from collections.abc import Collection, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hloss.losses.histogram import PairHistograms, PairSlopes
from hloss.study.drawing import (
    MEAN,
    RECALL,
    bars_of,
    by_right_end,
    draw_curves,
    draw_heat_map,
    draw_intervals,
    legend_beside,
    mean_and_range,
    open_circles,
    style_of,
    ticks_at,
)
from hloss.study.levels import CURVES, GRID, levels_of

# Functions import seaborn where they need it: it imports scipy, and the notebook of a run would wait a second for it.

POSITIVE, NEGATIVE = MEAN, "#d95f02"
SHARES = (1, 3, 10, 30, 100)  # %, ticks of a logarithmic axis
HIT, MISS = "#1a7f37", "#cf222e"


def _finish(figure: Figure, title: str = "") -> Figure:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    plt.close(figure)  # so that a notebook shows the returned figure only once
    return figure


def recall_curves(recalls: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Plot Recall@K of each method over K: mean, range over seeds, and published values as stars.

    Args:
        recalls: one row per run and K, with the columns method, seed, K, recall (%).
        published: the table of `hloss.study.published.published_points`; points of other methods are left out.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5))
    star: dict[str, Any] = {
        "marker": "*",
        "markersize": 13,
        "markeredgecolor": "black",
        "linestyle": "none",
        "zorder": 4,
    }
    entries = []
    for number, (method, rows) in enumerate(recalls.groupby("method", sort=False)):
        mean_and_range(axes, rows, "K", label=method, **style_of(number))
        points = None if published is None else published[published["method"] == method]
        if points is not None and len(points):
            axes.plot(points["k"], points["value"], color=style_of(number)["color"], **star)
            entries = [Line2D([], [], color="0.7", label="published", **star)]
    axes.set(xscale="log", xlabel="K (number of nearest images)", ylabel="test Recall@K (%)", ylim=(0, 100))
    ticks_at(axes.xaxis, recalls["K"])
    legend_beside(axes, [*by_right_end(axes), *entries])
    return _finish(figure)


def recall_over_iterations(histories: pd.DataFrame, lengths: Collection[int] = ()) -> Figure:
    """Plot the validation Recall@1 of each method over iterations: mean, and range from the lowest to the highest seed.

    Args:
        histories: one row per validation, with the columns method, seed, iteration, recall (%).
        lengths: training lengths at which the test is reported: a mark on each line, and a vertical line.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for number, (method, rows) in enumerate(histories.groupby("method", sort=False)):
        marked = np.flatnonzero(np.isin(np.unique(rows["iteration"]), list(lengths))).tolist()
        mean_and_range(axes, rows, "iteration", label=method, markevery=marked, **style_of(number))
    for length in lengths:
        axes.axvline(length, color="0.6", linewidth=0.8, zorder=0)
    entries = [Line2D([], [], color="0.6", linewidth=0.8, label="test reported")] * bool(lengths)
    axes.set(xlabel="training iterations", ylabel="validation Recall@1 (%)", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    legend_beside(axes, [*by_right_end(axes), *entries])
    return _finish(figure)


def comparison(
    name: str | Sequence[str], results: pd.DataFrame, table: pd.DataFrame, of_lengths: pd.DataFrame | None = None
) -> Figure:
    """Plot the test Recall@1 of a comparison, as `hloss.study.levels.levels_of` says.

    - Levels of a number: the mean over the levels with its 95 % interval (bars and band), and one grey point per seed.
      A method to which the number does not apply is a horizontal line.
    - Each level of one setting with each of another: the mean in each cell, ± half its 95 % interval.
    - Categories: the mean with its 95 % interval, and one grey point per seed.

    An open circle marks a mean if a run of the method is still improving.

    Args:
        name: name of the comparison, or names of several that are drawn in one figure.
        results: results on one dataset at one length, from `hloss.study.results.read_results`.
        table: their `hloss.study.statistics.summary`.
        of_lengths: the summary at all lengths; for levels of a number shorter lengths become lines of their own.
    """
    runs = results[results["comparison"].isin([name] if isinstance(name, str) else name)]
    levels = levels_of(runs)
    means, runs = levels.means(table), runs[runs["complete"]].merge(levels.places, on=["comparison", "method"])
    if levels.kind == CURVES:
        figure, axes = plt.subplots(figsize=(8, 4.2))
        draw_curves(axes, levels, runs, means, means if of_lengths is None else levels.means(of_lengths))
    elif levels.kind == GRID:
        figure, axes = plt.subplots(figsize=(8, 1.4 + 0.55 * levels.places["line"].nunique()))
        draw_heat_map(axes, levels, means)
    else:
        figure, axes = plt.subplots(figsize=(8, 0.9 + 0.33 * len(means)))
        draw_intervals(axes, runs, means)
    remark = " (open circle: still improving)" * bool((means["still improving"] > 0).any())
    title = f"{runs['dataset'].iloc[0]}: {name if isinstance(name, str) else ' and '.join(name)}"
    lengths = runs.loc[runs["length"] > 0, "length"]
    after = f" after {lengths.max():,.0f} iterations" * (lengths.nunique() == 1)
    return _finish(figure, f"{title}{after}{remark}")


def differences(table: pd.DataFrame) -> Figure:
    """Plot the differences between the first method and each other method on datasets, with their 95 % intervals.

    An open circle marks a difference of runs of which some are still improving.

    Args:
        table: rows of `hloss.study.difficulty.differences` at one length.
    """
    of_others = dict(list(table.groupby("other", sort=False)))
    datasets = list(table["dataset"].unique())
    figure, grid = plt.subplots(
        1, len(of_others), figsize=(8, 1.2 + 0.33 * len(datasets)), sharex=True, sharey=True, squeeze=False
    )
    for axes, (other, rows) in zip(grid.flat, of_others.items(), strict=True):
        places = rows["dataset"].map(datasets.index)
        bars = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.errorbar(rows["difference"], places, xerr=np.nan_to_num(bars), fmt="o", color=MEAN, capsize=3)
        open_circles(axes, rows["difference"], places, rows, color=MEAN)
        axes.set(title=f"{rows['first'].iloc[0]} minus {other}", xlabel="difference in test Recall@1 (points)")
        axes.grid(axis="x", color="0.9")
    grid[0, 0].set(ylim=(len(datasets) - 0.5, -0.5))
    grid[0, 0].set_yticks(range(len(datasets)), datasets)
    return _finish(figure)


def recall_by_length(name: str, table: pd.DataFrame) -> Figure:
    """Plot the mean test Recall@1 of the methods of a comparison over the training length.

    An open circle marks a length at which a run of the method is still improving.

    Args:
        name: name of the comparison.
        table: the `hloss.study.statistics.summary` of one dataset at all lengths.
    """
    rows = table[(table["comparison"] == name) & (table["n"] > 0) & (table["length"] > 0)]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for number, (method, means) in enumerate(rows.groupby("method", sort=False)):
        means, style = means.sort_values("length"), style_of(number)
        axes.plot(means["length"], means["recall@1"], label=method, **style | {"marker": "o"})
        open_circles(axes, means["length"], means["recall@1"], means, color=style["color"])
    axes.set(xscale="log", xlabel="training length (iterations); open circle: still improving",
             ylabel=RECALL)  # fmt: skip
    ticks_at(axes.xaxis, rows["length"])
    legend_beside(axes, by_right_end(axes))
    return _finish(figure, f"{rows['dataset'].iloc[0]}: {name}")


def similarity_densities(panels: dict[str, pd.DataFrame]) -> Figure:
    """Plot the densities of positive and negative similarities.

    Args:
        panels: title -> density, with the columns nodes (equally spaced), positive and negative (mass per node).
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.6 * rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, density) in zip(grid.flat, panels.items(), strict=False):
        step = density["nodes"].iloc[1] - density["nodes"].iloc[0]
        for sign, color in (("positive", POSITIVE), ("negative", NEGATIVE)):
            axes.fill_between(density["nodes"], density[sign] / step, color=color, alpha=0.45, label=f"{sign} pairs")
        axes.set_title(title, fontsize=10)
        axes.set(xlim=(-1, 1), xlabel="cosine similarity", ylabel="density", ylim=(0, None))
    grid[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    return _finish(figure)


def training_curves(history: pd.DataFrame) -> Figure:
    """Plot the validation Recall@1 over iterations, one line per method and seed.

    Args:
        history: one row per validation, with the columns method, seed, iteration, recall (%).
    """
    import seaborn as sns

    figure, axes = plt.subplots(figsize=(8, 4))
    sns.lineplot(history, x="iteration", y="recall", hue="method", units="seed", estimator=None, ax=axes)
    axes.set(xlabel="iteration", ylabel="validation Recall@1 (%)", ylim=(0, None))
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title=None, frameon=False)
    return _finish(figure)


def _two_columns(n: int, height: float, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure of n panels in two columns, each of a height in inches; `shared`: sharex and sharey."""
    rows = -(-n // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(9, height * rows), squeeze=False, **shared)
    for axes in grid.flat[n:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:n])


def pair_records(records: pd.DataFrame, labels: dict[str, str]) -> Figure:
    """Plot recorded values of pairs over iterations: a panel per value, a line per method with the range of its seeds.

    Args:
        records: one row per run and validation, with the columns method, iteration and those of `labels`.
        labels: column -> label of its axis.
    """
    figure, panels = _two_columns(len(labels), 2.9)
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for number, (method, rows) in enumerate(records.groupby("method", sort=False)):
            mean_and_range(axes, rows, "iteration", name, label=method, **style_of(number) | {"marker": ""})
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="iteration", ylabel=label)
    panels[:2][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _finish(figure)


def slopes_and_recall(means: pd.DataFrame) -> Figure:
    """Plot the test Recall@1 over the share of pairs with a slope: a panel per comparison, a point per method.

    Bars show 95 % intervals. An open circle marks a method with runs that are still improving. The dotted line connects
    the methods of one loss in their order.

    Args:
        means: `hloss.study.statistics.summary` with the metrics pairs_with_slope and recall@1, both in %; one row per
            method.
    """
    of_comparisons = dict(list(means.groupby("comparison", sort=False)))
    figure, panels = _two_columns(len(of_comparisons), 3.3, sharex=True, sharey=True)
    for axes, (name, rows) in zip(panels, of_comparisons.items(), strict=True):
        losses = rows["method"].str.partition(", ")[0]
        for number, (loss, points) in enumerate(rows.groupby(losses, sort=False)):
            color, x, y = style_of(number)["color"], points["pairs_with_slope"], points["recall@1"]
            bars = {"xerr": bars_of(points, "pairs_with_slope"), "yerr": bars_of(points, "recall@1")}
            axes.errorbar(x, y, **bars, fmt="o:", color=color, linewidth=0.8, elinewidth=1, label=loss)
            open_circles(axes, x, y, points, color=color)
        places = zip(rows["pairs_with_slope"], rows["recall@1"], strict=True)
        for number, (label, place) in enumerate(zip(_levels(rows["method"]), places, strict=True)):
            beside, side = ((4, 4), "left") if number % 2 else ((-4, 4), "right")
            axes.annotate(label, place, beside, textcoords="offset points", ha=side, fontsize=8)
        if losses.nunique() > 1:
            axes.legend(frameon=False, fontsize=8, loc="lower left")
        axes.set(title=name, xlabel="pairs with a slope (% of the batch)", ylabel=RECALL, xscale="log")
        ticks_at(axes.xaxis, SHARES)
        axes.grid(color="0.9")
    return _finish(figure)


def _levels(methods: pd.Series) -> list[str]:
    """The end of each name, without the words before the last if all ends begin with them: "0.1" of "margin 0.1"."""
    ends = [method.rsplit(", ", 1)[-1] for method in methods]
    begins = {end.rpartition(" ")[0] for end in ends}
    return [end.rpartition(" ")[2] for end in ends] if len(begins) == 1 else ends


def loss_curve(loss: np.ndarray, name: str) -> Figure:
    """Plot the loss of each batch over iterations.

    Args:
        loss: loss per iteration, shape (iterations,).
        name: name of the loss.
    """
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot(np.arange(1, len(loss) + 1), loss, color="0.3", linewidth=1)
    axes.set(xlabel="iteration", ylabel=f"{name} loss of the batch", ylim=(0, None))
    return _finish(figure)


def retrieval_panel(images: np.ndarray, panel: dict[str, list]) -> Figure:
    """Show queries (left) and their nearest images, nearest first.

    Hits have a green frame; misses have a red frame and a cross.

    Args:
        images: images of the dataset, shape (n, height, width, channels), uint8.
        panel: row numbers of `images` under "queries" (q) and "neighbors" (q, k), and "hits" (q, k, booleans).
    """
    queries, neighbors, hits = panel["queries"], panel["neighbors"], panel["hits"]
    rows, columns = len(queries), 1 + len(neighbors[0])
    figure, grid = plt.subplots(rows, columns, figsize=(0.95 * columns, 1.0 * rows), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for i, query in enumerate(queries):
        _show(grid[i, 0], images[query], "0.2")
        for j, (row, hit) in enumerate(zip(neighbors[i], hits[i], strict=True), 1):
            _show(grid[i, j], images[row], HIT if hit else MISS)
            if not hit:
                grid[i, j].plot([0.82, 0.97], [0.82, 0.97], color=MISS, transform=grid[i, j].transAxes, linewidth=2)
                grid[i, j].plot([0.82, 0.97], [0.97, 0.82], color=MISS, transform=grid[i, j].transAxes, linewidth=2)
    grid[0, 0].set_title("query", fontsize=9)
    for j in range(1, columns):
        grid[0, j].set_title(str(j), fontsize=9)
    return _finish(figure)


def images_per_class(sizes: pd.DataFrame) -> Figure:
    """Plot the distribution of the number of images per class, one panel per split.

    Args:
        sizes: one row per class, with the columns split and images.
    """
    import seaborn as sns

    splits = list(dict.fromkeys(sizes["split"]))
    figure, grid = plt.subplots(1, len(splits), figsize=(3.6 * len(splits), 3), sharex=True, squeeze=False)
    for axes, split in zip(grid.flat, splits, strict=True):
        sns.histplot(sizes[sizes["split"] == split], x="images", discrete=True, color=POSITIVE, ax=axes)
        axes.set(title=split, xlabel="images of a class", ylabel="number of classes")
        axes.yaxis.get_major_locator().set_params(integer=True)
    return _finish(figure)


def contact_sheet(images: np.ndarray, rows: list[list[int]], titles: list[str]) -> Figure:
    """Show one line of images per title.

    Args:
        images: images of the dataset, shape (n, height, width, channels), uint8.
        rows: row numbers of `images` for each line; lines may differ in length.
        titles: titles of the lines.
    """
    columns = max(map(len, rows))
    height, width = images.shape[1:3]
    size = 0.8 * columns, 0.8 * len(rows) * height / width
    figure, grid = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, numbers, title in zip(grid, rows, titles, strict=True):
        for axes in line[len(numbers) :]:
            axes.set_visible(False)
        for axes, number in zip(line, numbers, strict=False):
            axes.set(xticks=[], yticks=[])
            _show(axes, images[number], "0.8")
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return _finish(figure)


def _show(axes: plt.Axes, image: np.ndarray, frame: str) -> None:
    axes.imshow(
        image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255, interpolation="nearest"
    )
    for spine in axes.spines.values():
        spine.set(edgecolor=frame, linewidth=2.5)


def similarity_matrix(similarity: np.ndarray) -> Figure:
    """Plot the cosine similarities of all pairs of a batch.

    Args:
        similarity: similarities, shape (n, n).
    """
    figure, axes = plt.subplots(figsize=(4.8, 4))
    shown = axes.imshow(similarity, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set(xlabel="image j", ylabel="image i")
    figure.colorbar(shown, label="cosine similarity")
    return _finish(figure)


def linear_binning(nodes: np.ndarray, weights: np.ndarray, similarities: list[float]) -> Figure:
    """Plot the weights that single similarities add to the nodes.

    Args:
        nodes: nodes, shape (m,).
        weights: weights, shape (similarities, m).
        similarities: the similarities.
    """
    import seaborn as sns

    figure, axes = plt.subplots(figsize=(7, 2.6))
    for row, s, color in zip(weights, similarities, sns.color_palette("dark"), strict=False):
        used = row > 0
        axes.vlines(nodes[used], 0, row[used], color=color, linewidth=4, alpha=0.6)
        axes.plot(s, 0.02, marker="v", color=color, markersize=9, clip_on=False, label=f"s = {s:g}")
    axes.set(
        xticks=nodes, xlabel="cosine similarity; a tick is a node $t_r$", ylabel="weight of the node", ylim=(0, 1.05)
    )
    axes.legend(frameon=False, ncols=len(similarities), loc="upper left", bbox_to_anchor=(0, 1.25))
    return _finish(figure)


def expected_reversals(histograms: pd.DataFrame) -> Figure:
    """Plot the terms of equation 4: both histograms, and the cumulative histogram of positive pairs.

    Args:
        histograms: one row per node, with the columns nodes, positive, negative, cumulative.
    """
    step = histograms["nodes"].iloc[1] - histograms["nodes"].iloc[0]
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for sign, color in (("positive", POSITIVE), ("negative", NEGATIVE)):
        axes.bar(histograms["nodes"], histograms[sign], step, color=color, alpha=0.45, label=f"$h$ of {sign} pairs")
    axes.set(xlim=(-1, 1), xlabel="cosine similarity", ylabel="mass of a node")
    above = axes.twinx()
    above.plot(histograms["nodes"], histograms["cumulative"], color=POSITIVE, label="share of positives up to here")
    above.set(ylabel="cumulative share", ylim=(0, 1.02))
    figure.legend(*(a + b for a, b in zip(axes.get_legend_handles_labels(), above.get_legend_handles_labels(),
                  strict=True)), loc="upper left", bbox_to_anchor=(0.1, 0.95), frameon=False, fontsize=8)  # fmt: skip
    return _finish(figure)


def anatomy(panels: dict[str, tuple[PairHistograms, PairSlopes]]) -> Figure:
    """Plot densities (above) and slopes of the loss (below), one column per title.

    Args:
        panels: title -> histograms of the pairs, and slopes of the loss.
    """
    figure, grid = plt.subplots(
        2, len(panels), figsize=(2.6 + 2.4 * len(panels), 4.6), squeeze=False, sharex=True, sharey="row"
    )
    for (title, (density, slopes)), top, bottom in zip(panels.items(), grid[0], grid[1], strict=True):
        step = density.nodes[1] - density.nodes[0]
        for sign, color in (("positive", POSITIVE), ("negative", NEGATIVE)):
            top.fill_between(density.nodes, getattr(density, sign) / step, color=color, alpha=0.45, label=sign)
            bottom.plot(slopes.similarities, getattr(slopes, sign), color=color, drawstyle="steps-mid")
        bottom.axhline(0, color="0.6", linewidth=0.8)
        top.set_title(title, fontsize=10)
        bottom.set(xlim=(-1, 1), xlabel="cosine similarity")
    grid[0, 0].set(ylabel="density of pairs", ylim=(0, None))
    grid[1, 0].set_ylabel("dL/ds of a pair\n(times their number)")
    grid[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    return _finish(figure)


def order_costs(reach: np.ndarray, costs: dict[str, np.ndarray]) -> Figure:
    """Plot order costs over the difference in similarity between a negative and a positive pair.

    Args:
        reach: similarity of the negative pair minus that of the positive pair, shape (m,).
        costs: name of the cost -> values, shape (m,).
    """
    figure, axes = plt.subplots(figsize=(6, 3))
    for (name, cost), style in zip(costs.items(), ("-", "--", "-.", ":"), strict=False):
        axes.plot(reach, cost, style, label=name, linewidth=2)
    axes.set(
        xlabel="similarity of the negative pair minus that of the positive pair", ylabel="cost C", ylim=(-0.05, None)
    )
    axes.legend(frameon=False)
    return _finish(figure)


def discretisation(errors: pd.DataFrame) -> Figure:
    """Plot the distance of estimates from the exact probability of reverse.

    Args:
        errors: one row per estimate, with the columns n_bins, estimate, error.
    """
    import seaborn as sns

    figure, axes = plt.subplots(figsize=(6, 3.4))
    sns.lineplot(errors, x="n_bins", y="error", hue="estimate", style="estimate", markers=True, dashes=False, ax=axes)
    axes.set(
        xscale="log", yscale="log", xlabel="n_bins (intervals of [-1, 1])", ylabel="distance from the exact probability"
    )
    axes.legend(title=None, frameon=False)
    return _finish(figure)
