"""Settings in which the methods of a comparison differ: lines of levels, grids, categories, and scales."""

import numpy as np
import pandas as pd
import pytest

from hloss.study.levels import CATEGORIES, CURVES, GRID, levels_of, scale_of, setting_label

SETTINGS = {"loss": "histogram", "n_bins": 200.0, "batch_size": 128, "learning_rate": 0.001, "kernel": "triangular",
            "bandwidth": np.nan, "micro_batch": np.nan, "loss_options": None}  # fmt: skip


def table_of(*methods, comparison="axis", complete=True):
    """One row per method; a method is its name and the settings that differ from SETTINGS."""
    rows = [SETTINGS | {"method": name, **settings} for name, settings in methods]
    return pd.DataFrame(rows).assign(comparison=comparison, complete=complete, seed=0)


def crossed(name, values, **settings):
    return [(f"histogram, {name} {value:g}", settings | {name: value}) for value in values]


def test_one_number_makes_a_curve():
    found = levels_of(table_of(*crossed("n_bins", [25.0, 50.0, 100.0])))
    assert (found.kind, found.setting, found.other) == (CURVES, "n_bins", "")
    assert found.label == "bins (intervals of [-1, 1])"
    assert found.places["level"].tolist() == [25, 50, 100]
    assert found.places["line"].tolist() == ["histogram"] * 3


def test_one_or_two_levels_are_categories():
    for values in ([25.0], [25.0, 50.0]):
        found = levels_of(table_of(*crossed("n_bins", values)))
        assert found.kind == CATEGORIES
        assert found.places["line"].tolist() == found.places["method"].tolist()


def test_levels_without_a_result_count():
    runs = table_of(*crossed("n_bins", [25.0, 50.0, 100.0]))
    assert levels_of(runs.assign(complete=[True, False, False])).places["level"].tolist() == [25, 50, 100]


def test_losses_are_categories_although_one_of_them_has_levels():
    binomial = [(f"binomial deviance, C {c:g}", {"loss": "binomial", "C": c}) for c in (2.0, 10.0, 25.0)]
    assert levels_of(table_of(("histogram", {"C": np.nan}), *binomial)).kind == CATEGORIES
    assert levels_of(table_of(*binomial)).setting == "C"


def test_two_losses_are_two_lines_named_by_what_their_methods_share():
    rates = [0.001, 0.003, 0.01]
    other = [(f"binomial deviance, learning_rate {r:g}", {"loss": "binomial", "learning_rate": r, "n_bins": np.nan})
             for r in rates]  # fmt: skip
    found = levels_of(table_of(*crossed("learning_rate", rates), *other))
    assert (found.kind, found.setting, found.other) == (CURVES, "learning_rate", "")
    assert found.places["line"].tolist() == ["histogram"] * 3 + ["binomial deviance"] * 3


def test_the_axis_is_the_setting_that_names_the_methods():
    tuned = [(f"histogram, batch {b}, tuned", {"batch_size": b, "n_bins": n, "iterations": 6400 // b})
             for b, n in ((32, 50.0), (64, 100.0), (128, 400.0))]  # fmt: skip
    assert levels_of(table_of(*tuned)).setting == "batch_size"


def test_one_method_may_be_off_the_line():
    sliced = ("histogram, in slices", {"batch_size": 1024, "micro_batch": 256.0, "batchnorm": "slices"})
    found = levels_of(table_of(*crossed("batch_size", [32, 64, 128], batchnorm="live"), sliced))
    assert (found.kind, found.setting) == (CURVES, "batch_size")
    assert found.places.iloc[-1][["line", "level"]].tolist() == ["histogram, in slices", 1024]
    another = ("Beta density", {"batch_size": 512, "density": "beta"})
    runs = table_of(*crossed("batch_size", [32, 64, 128], batchnorm="live", density="histogram"), sliced, another)
    assert levels_of(runs).kind == CATEGORIES


def test_three_lines_make_a_grid_and_a_setting_without_meaning_has_no_level():
    kernels = [(f"histogram, kernel {k}, bandwidth {b:g}", {"kernel": k, "bandwidth": b})
               for k in ("gaussian", "epanechnikov", "uniform") for b in (0.5, 2.0, 20.0)]  # fmt: skip
    found = levels_of(table_of(("histogram", {}), *kernels))
    assert (found.kind, found.setting, found.other) == (GRID, "bandwidth", "kernel")
    assert found.places["line"].unique().tolist() == ["triangular", "gaussian", "epanechnikov", "uniform"]
    assert found.places["level"].isna().tolist() == [True] + [False] * 9


def test_two_numbers_make_a_grid_over_the_one_with_more_levels():
    pairs = [(f"histogram, batch_size {b}, n_bins {n:g}", {"batch_size": b, "n_bins": n})
             for b in (32, 128) for n in (25.0, 200.0, 800.0)]  # fmt: skip
    for given in (pairs, pairs[1:]):  # pairs[1:] lacks one cell of the grid
        found = levels_of(table_of(*given))
        assert (found.kind, found.setting, found.other) == (GRID, "n_bins", "batch_size")
        assert found.places["line"].unique().tolist() == ["32", "128"]


def test_comparisons_drawn_together_are_lines_named_by_their_setting():
    bins = [25.0, 50.0, 100.0]
    slow = table_of(*crossed("n_bins", bins), comparison="bins")
    fast = table_of(*crossed("n_bins", bins, learning_rate=0.003), comparison="bins at a higher rate")
    found = levels_of(pd.concat([slow, fast], ignore_index=True))
    assert (found.kind, found.setting, found.other) == (CURVES, "n_bins", "learning_rate")
    assert found.places["line"].tolist() == ["0.001"] * 3 + ["0.003"] * 3


def test_lines_of_the_same_name_are_told_apart():
    lines = [(f"histogram, {i}{n:g}", {"n_bins": n, "kernel": kernel, "order_cost": cost})
             for i, (kernel, cost) in enumerate((("gaussian", "step"), ("uniform", "linear")))
             for n in (1.0, 2.0, 4.0)]  # fmt: skip
    assert set(levels_of(table_of(*lines)).places["line"]) == {"gaussian, step", "uniform, linear"}


def test_settings_that_are_mappings_are_compared_as_text():
    methods = [(f"m{i}", {"loss_options": {"margin": i}}) for i in range(3)]
    assert levels_of(table_of(*methods)).kind == CATEGORIES


def test_means_have_the_places_of_complete_methods():
    found = levels_of(table_of(*crossed("n_bins", [25.0, 50.0, 100.0])))
    names = found.places[["comparison", "method"]]
    means = found.means(names.assign(n=[2, 0, 1], **{"recall@1": [10.0, np.nan, 20.0]}))
    assert means["level"].tolist() == [25, 100]
    assert means["recall@1"].tolist() == [10, 20]


@pytest.mark.parametrize(
    ("levels", "scale"),
    [
        ([32, 64, 128, 256, 512], "log"),
        ([0.01, 0.0001, 0.001, 0.003, 0.0003], "log"),
        ([2, 5, 10, 25, 50], "log"),
        ([25, 200, 800], "log"),
        ([0, 0.01, 0.04, 0.1], "symlog"),
        ([0.5, 1.0, 1.5, 2.0], "linear"),
        ([0, 1, 2, 3], "linear"),
        ([-1, 1, 10, 100], "linear"),
        ([1, 100], "linear"),
        ([5], "linear"),
    ],
)
def test_scale_follows_the_spacing(levels, scale):
    assert scale_of(levels) == scale


def test_labels_have_units_and_a_margin_that_of_its_loss():
    assert setting_label("batch_size") == "batch size (images)"
    assert setting_label("margin", ["histogram", "quadruplet"]) == "margin (cosine similarity)"
    assert setting_label("margin", ["triplet"]) == "margin (squared distance)"
    assert setting_label("margin", ["triplet", "contrastive"]) == setting_label("margin") == "margin"
    assert setting_label("weight_decay") == "weight decay"
