"""Figures show the given numbers: the tests read them back from the drawn artists."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from hloss.losses.histogram import pair_histograms, pair_slopes
from hloss.study import plots
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
    assert axes.get_title() == "mini: losses after 200 iterations"
    *points, errors = axes.collections
    shown = [sorted(p.get_offsets()[:, 0].tolist()) for p in points]
    assert shown == [[40.0, 42.0, 47.0], [10.0, 11.0], [5.0]]
    (means, _, _) = axes.containers[0]
    assert means.get_xdata().tolist() == pytest.approx([43.0, 10.5, 5.0])
    assert means.get_ydata().tolist() == [0, 1, 2]
    bars = [segment[:, 0].tolist() for segment in errors.get_segments()]
    assert bars[0] == pytest.approx([table["recall@1 low"][0], table["recall@1 high"][0]])
    assert bars[2] == [5.0, 5.0]  # one seed has no interval


def test_recall_curves_show_mean_and_range_over_seeds():
    values = {("a", 0): (10, 30), ("a", 1): (20, 50), ("b", 0): (5, 9)}
    rows = [(m, s, k, v) for (m, s), pair in values.items() for k, v in zip((1, 10), pair, strict=True)]
    (axes,) = plots.recall_curves(pd.DataFrame(rows, columns=["method", "seed", "K", "recall"])).axes
    drawn = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata())]
    assert [[1, 15], [10, 40]] in drawn
    assert [[1, 5], [10, 9]] in drawn
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1, 10), (1, 20), (10, 30), (10, 50)} <= {tuple(map(int, vertex)) for vertex in band}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "10"]


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
    assert axes.get_title() == "mini: losses after 200 iterations (open circle: still improving)"
    (opened,) = [line for line in axes.get_lines() if line.get_color() == "white"]
    assert opened.get_xydata().tolist() == [[10.5, 1]]


def test_recall_by_length_shows_means_and_which_are_still_improving(results):
    longer = results.assign(length=600, still_improving=False)
    longer["recall@1"] += 5
    both = pd.concat([results.assign(still_improving=True), longer], ignore_index=True)
    (axes,) = plots.recall_by_length("losses", summary(both, ["recall@1"])).axes
    assert line_of(axes, "a").tolist() == [[200, 10.5], [600, 15.5]]
    faces = {
        tuple(line.get_xydata()[0]): line.get_markerfacecolor() for line in axes.get_lines() if line.get_marker() == "o"
    }
    assert {point for point, face in faces.items() if face == "white"} == {(200, 43.0), (200, 10.5), (200, 5.0)}
    assert len(faces) == 6


def test_pair_records_show_each_value_of_each_method():
    rows = [
        {"method": m, "iteration": i, "share": i / k, "slope": -i} for m, k in (("a", 1), ("b", 2)) for i in (50, 100)
    ]
    figure = plots.pair_records(pd.DataFrame(rows), {"share": "a share", "slope": "a slope"})
    share, slope = figure.axes
    assert line_of(share, "b").tolist() == [[50, 25], [100, 50]]
    assert line_of(slope, "a").tolist() == [[50, -50], [100, -100]]
    assert [axes.get_ylabel() for axes in figure.axes] == ["a share", "a slope"]
