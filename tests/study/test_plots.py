"""Figures show the given numbers: the tests read them back from the drawn artists."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import FillBetweenPolyCollection, LineCollection

from hloss.losses.histogram import pair_histograms, pair_slopes
from hloss.study import drawing, plots
from hloss.study.statistics import summary


@pytest.fixture
def results():
    """Two methods of three seeds, a third of one seed; one run is not complete."""
    rows = [
        {"method": method, "seed": seed, "recall@1": value, "complete": value is not None}
        for method, values in {"b": (40.0, 42.0, 47.0), "a": (10.0, 11.0, None), "c": (5.0,)}.items()
        for seed, value in enumerate(values)
    ]
    frame = pd.DataFrame(rows).assign(dataset="mini", comparison="losses", length=200, still_improving=False)
    return frame.assign(run_id=[f"r{i}" for i in range(len(frame))])


def line_of(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line.get_xydata()


def test_comparison_shows_seeds_means_and_intervals(results):
    table = summary(results, ["recall@1"])
    (axes,) = plots.comparison("losses", results, table).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "a", "c"]
    assert axes.figure.get_suptitle() == "mini: losses after 200 iterations"
    *points, errors = axes.collections
    shown = [sorted(p.get_offsets()[:, 0].tolist()) for p in points]
    assert shown == [[40.0, 42.0, 47.0], [10.0, 11.0], [5.0]]
    (means, _, _) = axes.containers[0]
    assert means.get_xdata().tolist() == pytest.approx([43.0, 10.5, 5.0])
    assert means.get_ydata().tolist() == [0, 1, 2]
    bars = [segment[:, 0].tolist() for segment in errors.get_segments()]
    assert bars[0] == pytest.approx([table["recall@1 low"][0], table["recall@1 high"][0]])
    assert bars[2] == [5.0, 5.0]  # one seed has no interval


@pytest.fixture
def levels():
    """Two lines over three bins: a of three seeds, b of one seed; one run of a is not complete."""
    rows = [
        {"method": f"{loss}, n_bins {n:g}", "loss": loss, "n_bins": n, "seed": seed, "recall@1": value}
        for loss, of_bins in {"a": {25.0: (10, 12, 14), 50.0: (20, 23, None), 100.0: (30, 30, 36)},
                              "b": {25.0: (5,), 50.0: (6,), 100.0: (8,)}}.items()
        for n, values in of_bins.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    frame = pd.DataFrame(rows).assign(dataset="mini", comparison="bins", length=600, still_improving=False)
    frame["recall@1"] = frame["recall@1"].astype(float)
    return frame.assign(complete=frame["recall@1"].notna(), run_id=[f"r{i}" for i in range(len(frame))])


def drawn_lines(axes):
    """(color, line style) -> points of each drawn line with at least two points."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
    return {(line.get_color(), line.get_linestyle()): line.get_xydata().tolist() for line in lines}


def test_levels_are_curves_with_intervals_and_seeds(levels):
    table = summary(levels, ["recall@1"])
    (axes,) = plots.comparison("bins", levels, table).axes
    a, b = drawing.COLORS[:2]
    expected = {(a, "-"): [[25, 12], [50, 21.5], [100, 32]], (b, "-"): [[25, 5], [50, 6], [100, 8]]}
    assert drawn_lines(axes) == expected
    assert (
        axes.collections[0].get_offsets().tolist()
        == levels.loc[levels["complete"], ["n_bins", "recall@1"]].to_numpy().tolist()
    )
    low, high = table["recall@1 low"][0], table["recall@1 high"][0]
    bars, of_one_seed = (c for c in axes.collections if isinstance(c, LineCollection))
    assert bars.get_segments()[0].tolist() == pytest.approx(np.array([[25, low], [25, high]]))
    assert of_one_seed.get_segments()[0].tolist() == [[25, 5], [25, 5]]
    band, without = (c.get_paths() for c in axes.collections if isinstance(c, FillBetweenPolyCollection))
    assert {(25, low), (25, high)} <= {tuple(vertex) for vertex in band[0].vertices}
    assert not without  # one seed has no interval
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["25", "50", "100"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("bins (intervals of [-1, 1])", "test Recall@1 (%)")
    assert axes.figure.get_suptitle() == "mini: bins after 600 iterations"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_open_circles_mark_levels_that_are_still_improving(levels):
    improving = levels.assign(still_improving=(levels["method"] == "a, n_bins 50") & (levels["seed"] == 1))
    (axes,) = plots.comparison("bins", improving, summary(improving, ["recall@1"])).axes
    assert axes.figure.get_suptitle() == "mini: bins after 600 iterations (open circle: still improving)"
    circles = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [points for points in circles if points] == [[[50, 21.5]]]


def test_shorter_lengths_are_lines_of_their_own(levels):
    shorter = levels.assign(length=200, **{"recall@1": levels["recall@1"] - 5})
    longer = levels.assign(length=2000, **{"recall@1": levels["recall@1"] + 5})
    of_lengths = summary(pd.concat([longer, shorter, levels], ignore_index=True), ["recall@1"])
    (axes,) = plots.comparison("bins", levels, summary(levels, ["recall@1"]), of_lengths).axes
    a, b = drawing.COLORS[:2]
    lines = drawn_lines(axes)
    assert len(lines) == 4  # lengths beyond the results are not drawn
    assert lines[a, "-"] == [[25, 12], [50, 21.5], [100, 32]]
    assert lines[a, "--"] == [[25, 7], [50, 16.5], [100, 27]]
    assert lines[b, "--"] == [[25, 0], [50, 1], [100, 3]]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["a", "b", "600 iterations", "200 iterations"]


def test_lengths_that_differ_between_levels_are_shown_as_a_range(levels):
    one = levels[levels["loss"] == "a"].copy()
    one["length"] = one["n_bins"].map({25.0: 800, 50.0: 400, 100.0: 200})
    both = pd.concat([one, one.assign(length=one["length"] // 10)], ignore_index=True)
    (axes,) = plots.comparison("bins", one, summary(one, ["recall@1"]), summary(both, ["recall@1"])).axes
    assert axes.figure.get_suptitle() == "mini: bins"
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["200 to 800 iterations", "20 to 80 iterations"]


def test_a_single_line_has_no_legend_and_linear_levels_a_linear_axis(levels):
    one = levels[levels["loss"] == "a"].copy()
    one["n_bins"] = one["n_bins"].map({25.0: 10.0, 50.0: 20.0, 100.0: 30.0})
    (axes,) = plots.comparison("bins", one, summary(one, ["recall@1"])).axes
    assert axes.get_legend() is None
    assert axes.get_xscale() == "linear"


def test_zero_before_geometric_levels_is_on_the_axis(levels):
    one = levels[levels["loss"] == "a"].rename(columns={"n_bins": "margin"})
    one["margin"] = one["margin"].map({25.0: 0.0, 50.0: 0.01, 100.0: 0.1})
    more = one[one["margin"] == 0.1].assign(margin=1.0, method="a, margin 1", run_id=["x", "y", "z"])
    four = pd.concat([one, more], ignore_index=True)
    (axes,) = plots.comparison("bins", four, summary(four, ["recall@1"])).axes
    assert axes.get_xscale() == "symlog"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.01", "0.1", "1"]


def test_method_to_which_the_number_does_not_apply_is_a_horizontal_line(levels):
    other = levels[levels["method"] == "a, n_bins 25"].assign(method="a, exact", kernel="none", n_bins=np.nan)
    runs = pd.concat([levels[levels["loss"] == "a"].assign(kernel="some"), other.assign(run_id=["x", "y", "z"])])
    table = summary(runs, ["recall@1"])
    (axes,) = plots.comparison("bins", runs, table).axes
    assert drawn_lines(axes)[drawing.COLORS[1], "-"] == [[0, 12], [1, 12]]  # over the whole width
    span = axes.patches[0].get_bbox()
    assert (span.y0, span.y1) == pytest.approx((table["recall@1 low"][0], table["recall@1 high"][0]))


def test_comparisons_drawn_together_have_a_legend_with_their_setting(levels):
    one = levels[levels["loss"] == "a"]
    slow, fast = one.assign(learning_rate=0.001), one.assign(learning_rate=0.003, comparison="fast")
    fast["recall@1"] += 1
    both = pd.concat([slow, fast], ignore_index=True)
    (axes,) = plots.comparison(["bins", "fast"], both, summary(both, ["recall@1"])).axes
    legend = axes.get_legend()
    assert legend.get_title().get_text() == "initial learning rate of Adam"
    assert [text.get_text() for text in legend.get_texts()] == ["0.001", "0.003"]
    assert drawn_lines(axes)[drawing.COLORS[1], "-"] == [[25, 13], [50, 22.5], [100, 33]]
    assert axes.figure.get_suptitle() == "mini: bins and fast after 600 iterations"


@pytest.fixture
def cells():
    """Two batch sizes by three bins, one cell missing, one cell of one seed, and one cell still improving."""
    values = {
        (32, 25.0): (10, 12),
        (32, 50.0): (20, 22),
        (32, 100.0): (30,),
        (64, 25.0): (40, 44),
        (64, 100.0): (60, 61),
    }
    rows = [
        {"method": f"a, batch_size {b}, n_bins {n:g}", "batch_size": b, "n_bins": n, "seed": seed, "recall@1": value}
        for (b, n), of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    frame = pd.DataFrame(rows).assign(dataset="mini", comparison="grid", length=200, complete=True, loss="a")
    improving = frame["method"] == "a, batch_size 64, n_bins 25"
    return frame.assign(still_improving=improving, run_id=[f"r{i}" for i in range(len(frame))])


def test_two_settings_are_a_map_with_the_mean_in_each_cell(cells):
    table = summary(cells, ["recall@1"])
    axes, bar = plots.comparison("grid", cells, table).axes
    shown = axes.images[0].get_array()
    assert shown.filled(-1).tolist() == [[11, 21, 30], [42, -1, 60.5]]
    half = table["recall@1 high"][0] - 11
    texts = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert texts[0, 0] == f"11.0 ± {half:.1f}"
    assert texts[2, 0] == "30.0"  # one seed
    assert texts[0, 1] == f"42.0 ± {table['recall@1 high'][3] - 42:.1f} ○"
    assert set(texts) == {(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["25", "50", "100"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["32", "64"]
    assert (axes.get_ylabel(), bar.get_ylabel()) == ("batch size (images)", "test Recall@1 (%)")
    colors = {text.get_position(): text.get_color() for text in axes.texts}
    assert (colors[0, 0], colors[2, 1]) == ("white", "black")  # on the darkest and the brightest cell


def test_method_without_a_level_fills_its_row_of_the_map(cells):
    kernels = [
        cells.assign(kernel=k, batch_size=32, method=f"a, kernel {k}, " + cells["method"].str.split(", ").str[2])
        for k in ("x", "y", "z")
    ]
    grid = pd.concat([rows.drop_duplicates("n_bins") for rows in kernels], ignore_index=True)
    alone = cells.head(1).assign(method="a", kernel="w", n_bins=np.nan, **{"recall@1": 33.0})
    runs = pd.concat([alone, grid], ignore_index=True)
    axes, _ = plots.comparison("grid", runs, summary(runs, ["recall@1"])).axes
    assert axes.images[0].get_array().tolist() == [[33, 33, 33]] + [[10, 20, 30]] * 3
    assert axes.texts[0].get_text() == "33.0"
    assert axes.texts[0].get_position() == (1, 0)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["w", "x", "y", "z"]


@pytest.mark.parametrize("map_color", np.linspace(0, 1, 11))
def test_text_on_the_map_has_a_contrast_of_at_least_4_5(map_color):
    background = plots.plt.get_cmap("cividis")(map_color)
    lights = [
        luminance(plots.plt.matplotlib.colors.to_rgb(c)) for c in (drawing._readable_on(background), background[:3])
    ]
    assert (max(lights) + 0.05) / (min(lights) + 0.05) >= 4.5


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def test_lines_differ_in_color_or_style_and_in_marker():
    styles = [drawing.style_of(number) for number in range(15)]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 15
    assert len({(style["color"], style["marker"]) for style in styles}) == 15


@pytest.fixture
def recalls():
    values = {("a", 0): (10, 30), ("a", 1): (20, 50), ("b", 0): (5, 99)}
    rows = [(m, s, k, v) for (m, s), pair in values.items() for k, v in zip((1, 10), pair, strict=True)]
    return pd.DataFrame(rows, columns=["method", "seed", "K", "recall"])


def test_recall_curves_show_mean_and_range_over_seeds(recalls):
    (axes,) = plots.recall_curves(recalls).axes
    assert line_of(axes, "a").tolist() == [[1, 15], [10, 40]]
    assert line_of(axes, "b").tolist() == [[1, 5], [10, 99]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1, 10), (1, 20), (10, 30), (10, 50)} <= {tuple(map(int, vertex)) for vertex in band}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "10"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["b", "a"]  # in the order of their right ends


def test_published_values_are_stars_in_the_color_of_their_method(recalls):
    points = [("b", 1, 7.5, "A"), ("b", 10, 80.0, "A"), ("unknown", 1, 50.0, "B")]
    published = pd.DataFrame(points, columns=["method", "k", "value", "source"])
    (axes,) = plots.recall_curves(recalls, published).axes
    (stars,) = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert stars.get_xydata().tolist() == [[1, 7.5], [10, 80]]
    assert stars.get_color() == drawing.style_of(1)["color"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["b", "a", "published"]
    (without,) = plots.recall_curves(recalls, published[2:]).axes
    assert [t.get_text() for t in without.get_legend().get_texts()] == ["b", "a"]


def test_recall_over_iterations_marks_the_reported_lengths():
    values = {("a", 0): (10, 20, 30), ("a", 1): (20, 20, 50), ("b", 0): (5, 6, 70)}
    rows = [(m, s, 50 * i, v) for (m, s), of_run in values.items() for i, v in enumerate(of_run, start=1)]
    history = pd.DataFrame(rows, columns=["method", "seed", "iteration", "recall"])
    (axes,) = plots.recall_over_iterations(history, [100, 150]).axes
    assert line_of(axes, "a").tolist() == [[50, 15], [100, 20], [150, 40]]
    assert line_of(axes, "b").tolist() == [[50, 5], [100, 6], [150, 70]]
    (a,) = [line for line in axes.get_lines() if line.get_label() == "a"]
    assert a.get_markevery() == [1, 2]
    assert {(50, 10), (50, 20), (150, 30), (150, 50)} <= {
        tuple(map(int, vertex)) for vertex in axes.collections[0].get_paths()[0].vertices
    }
    assert [line.get_xdata()[0] for line in axes.get_lines()[2:]] == [100, 150]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["b", "a", "test reported"]
    (without,) = plots.recall_over_iterations(history).axes
    assert [t.get_text() for t in without.get_legend().get_texts()] == ["b", "a"]


def test_densities_are_per_unit_of_similarity():
    density = pd.DataFrame({"nodes": [-1.0, 0.0, 1.0], "positive": [0.0, 0.25, 0.75], "negative": [0.5, 0.5, 0.0]})
    wide = density.assign(nodes=[-1.0, -0.5, 0.0])
    figure = plots.similarity_densities({"one": density, "two": wide})
    one, two = (axes for axes in figure.axes if axes.get_visible())
    assert (one.get_title(), two.get_title()) == ("one", "two")
    assert [p.get_label() for p in one.collections] == ["positive pairs", "negative pairs"]
    heights = [[c.get_paths()[0].vertices[:, 1].max() for c in axes.collections] for axes in (one, two)]
    assert heights == [[0.75, 0.5], [1.5, 1.0]]


def test_training_curves_have_one_line_per_run():
    history = pd.DataFrame(
        {"method": ["a"] * 4 + ["b"] * 2, "seed": [0, 0, 1, 1, 0, 0], "iteration": [1, 2] * 3, "recall": range(6)}
    )
    (axes,) = plots.training_curves(history).axes
    drawn = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata())]
    assert drawn == [[[1, 0], [2, 1]], [[1, 2], [2, 3]], [[1, 4], [2, 5]]]
    colors = [line.get_color() for line in axes.get_lines() if len(line.get_xdata())]
    assert colors[0] == colors[1] != colors[2]


def test_loss_curve_counts_iterations_from_one():
    (axes,) = plots.loss_curve(np.array([0.5, 0.25]), "histogram").axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[1, 0.5], [2, 0.25]]
    assert axes.get_ylabel() == "histogram loss of the batch"


def test_panel_shows_the_images_and_frames_hits_and_misses():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    panel = {"queries": [4], "neighbors": [[2, 0]], "hits": [[True, False]]}
    query, hit, miss = plots.retrieval_panel(images, panel).axes
    assert [axes.images[0].get_array().max() for axes in (query, hit, miss)] == [4, 2, 0]
    frames = [tuple(axes.spines["left"].get_edgecolor()) for axes in (hit, miss)]
    assert frames == [plots.plt.matplotlib.colors.to_rgba(color) for color in (plots.HIT, plots.MISS)]
    assert [len(axes.get_lines()) for axes in (query, hit, miss)] == [0, 0, 2]  # the cross


def test_images_per_class_counts_classes():
    sizes = pd.DataFrame({"split": ["train"] * 3 + ["test"], "images": [2, 2, 4, 3]})
    train, test = plots.images_per_class(sizes).axes
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in train.patches}
    assert {n: h for n, h in heights.items() if h} == {2: 2, 4: 1}
    assert sum(bar.get_height() for bar in test.patches) == 1


def test_contact_sheet_has_one_line_per_title():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    axes = plots.contact_sheet(images, [[3, 1], [2]], ["x", "y"]).axes
    assert [a.images[0].get_array().max() for a in axes if a.images] == [3, 1, 2]
    assert [a.get_ylabel() for a in axes if a.get_ylabel()] == ["x", "y"]
    assert [a.get_visible() for a in axes] == [True, True, True, False]


def test_similarity_matrix_shows_the_matrix():
    matrix = np.array([[1.0, -0.5], [-0.5, 1.0]])
    axes = plots.similarity_matrix(matrix).axes[0]
    assert axes.images[0].get_array().tolist() == matrix.tolist()
    assert axes.images[0].get_clim() == (-1, 1)


def test_linear_binning_shows_the_positive_weights():
    nodes = np.array([-1.0, 0.0, 1.0])
    (axes,) = plots.linear_binning(nodes, np.array([[0.0, 0.75, 0.25]]), [0.25]).axes
    segments = [segment.tolist() for segment in axes.collections[0].get_segments()]
    assert segments == [[[0, 0], [0, 0.75]], [[1, 0], [1, 0.25]]]
    assert line_of(axes, "s = 0.25")[0, 0] == 0.25


def test_expected_reversals_show_both_histograms_and_the_cumulative_share():
    shown = pd.DataFrame({"nodes": [-1.0, 0.0, 1.0], "positive": [0, 0.5, 0.5], "negative": [1.0, 0, 0]})
    shown["cumulative"] = shown["positive"].cumsum()
    below, above = plots.expected_reversals(shown).axes
    assert [bar.get_height() for bar in below.patches] == [0, 0.5, 0.5, 1.0, 0, 0]
    assert above.get_lines()[0].get_ydata().tolist() == [0, 0.5, 1.0]


def test_anatomy_shows_densities_above_and_slopes_below():
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) // 3
    density, slopes = pair_histograms(embeddings, labels, n_bins=10), pair_slopes(embeddings, labels, n_bins=10)
    top, bottom = plots.anatomy({"batch": (density, slopes)}).axes
    heights = [c.get_paths()[0].vertices[:, 1].max() for c in top.collections]
    assert heights == pytest.approx([5 * density.positive.max().item(), 5 * density.negative.max().item()])
    drawn = [line.get_ydata() for line in bottom.get_lines()[:2]]
    assert np.allclose(drawn[0], slopes.positive)
    assert np.allclose(drawn[1], slopes.negative)


def test_order_costs_and_discretisation_show_one_line_each():
    (axes,) = plots.order_costs(np.array([-1.0, 1.0]), {"step": np.array([0, 1]), "linear": np.array([0, 2])}).axes
    assert line_of(axes, "linear").tolist() == [[-1, 0], [1, 2]]
    errors = pd.DataFrame({"n_bins": [10, 100], "estimate": ["loss"] * 2, "error": [0.1, 0.01]})
    (axes,) = plots.discretisation(errors).axes
    assert [[10, 0.1], [100, 0.01]] in [line.get_xydata().tolist() for line in axes.get_lines()]


def test_import_leaves_out_seaborn_and_scipy():
    code = "import sys; from hloss.study import plots; sys.exit('seaborn' in sys.modules or 'scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_comparison_marks_methods_that_are_still_improving(results):
    improving = results.assign(still_improving=(results["method"] == "a") & (results["seed"] == 0))
    (axes,) = plots.comparison("losses", improving, summary(improving, ["recall@1"])).axes
    assert axes.figure.get_suptitle() == "mini: losses after 200 iterations (open circle: still improving)"
    (opened,) = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert opened.get_xydata().tolist() == [[10.5, 1]]


def test_recall_by_length_shows_means_and_which_are_still_improving(results):
    longer = results.assign(length=600, still_improving=False)
    longer["recall@1"] += 5
    both = pd.concat([results.assign(still_improving=True), longer], ignore_index=True)
    (axes,) = plots.recall_by_length("losses", summary(both, ["recall@1"])).axes
    assert line_of(axes, "a").tolist() == [[200, 10.5], [600, 15.5]]
    circles = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert circles == [[[200, 43.0]], [[200, 10.5]], [[200, 5.0]]]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["b", "a", "c"]


def test_slopes_and_recall_shows_means_intervals_and_levels():
    table = pd.DataFrame(
        {
            "comparison": ["margin", "margin", "cost"],
            "method": ["histogram, margin 0", "histogram, margin 0.1", "step cost"],
            "pairs_with_slope": [5.0, 20.0, 100.0],
            "pairs_with_slope low": [4.0, 10.0, np.nan],
            "pairs_with_slope high": [6.0, 30.0, np.nan],
            "recall@1": [50.0, 60.0, 55.0],
            "recall@1 low": [49.0, 58.0, np.nan],
            "recall@1 high": [51.0, 62.0, np.nan],
            "still improving": [0, 3, 0],
        }
    )
    margin, cost = plots.slopes_and_recall(table).axes
    assert [margin.get_title(), cost.get_title()] == ["margin", "cost"]
    (points, _, (across, upward)) = margin.containers[0]
    assert points.get_xydata().tolist() == [[5, 50], [20, 60]]
    assert [segment[:, 0].tolist() for segment in across.get_segments()] == [[4, 6], [10, 30]]
    assert [segment[:, 1].tolist() for segment in upward.get_segments()] == [[49, 51], [58, 62]]
    assert [text.get_text() for text in margin.texts] == ["0", "0.1"]
    assert margin.get_legend() is None
    assert [line.get_xydata().tolist() for line in margin.get_lines() if line.get_mfc() == "white"] == [[[20, 60]]]
    assert [segment[:, 1].tolist() for segment in cost.containers[0][2][1].get_segments()] == [[55, 55]]


def test_slopes_and_recall_connects_the_methods_of_one_loss():
    methods = ["histogram, step cost", "histogram, linear cost", "Beta density"]
    names = (f"{name}{end}" for name in ("pairs_with_slope", "recall@1") for end in ("", " low", " high"))
    bounds = {name: [40.0, 50.0, 60.0] for name in names}
    table = pd.DataFrame({"comparison": "order cost", "method": methods, "still improving": 0} | bounds)
    axes = plots.slopes_and_recall(table).axes[0]
    histogram, beta = (container.lines[0] for container in axes.containers)
    assert histogram.get_xydata().tolist() == [[40, 40], [50, 50]]
    assert beta.get_xydata().tolist() == [[60, 60]]
    assert histogram.get_color() != beta.get_color()
    assert [text.get_text() for text in axes.texts] == ["step cost", "linear cost", "Beta density"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["histogram", "Beta density"]


def test_pair_records_show_each_value_of_each_method():
    rows = [
        {"method": m, "iteration": i, "seed": seed, "share": i / k + seed, "slope": -i}
        for m, k in (("a", 1), ("b", 2))
        for i in (50, 100)
        for seed in (-1, 0, 1)
    ]
    figure = plots.pair_records(pd.DataFrame(rows), {"share": "a share", "slope": "a slope"})
    share, slope = figure.axes
    assert line_of(share, "b").tolist() == [[50, 25], [100, 50]]
    assert line_of(slope, "a").tolist() == [[50, -50], [100, -100]]
    band = share.collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (24, 51)
    assert [axes.get_ylabel() for axes in figure.axes] == ["a share", "a slope"]
