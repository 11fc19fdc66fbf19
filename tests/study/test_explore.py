"""Data and widgets of the notebook that explores a study, without a browser."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from hloss.runs.datasets import open_dataset
from hloss.runs.evaluation import retrieval_panel
from hloss.runs.run import run
from hloss.study import explore
from hloss.study.explore import Gallery
from hloss.study.results import at_length, collect, histories, read_results, recall_names, select_results
from hloss.study.spec import OF_TUNING
from hloss.study.statistics import summary
from tests.helpers.sample import RESULTS, sample_rows


@pytest.fixture(scope="module")
def sample():
    return select_results(read_results(RESULTS), dataset="glyphs")


def levels(sample, comparison, setting):
    """The values of a setting in a comparison."""
    return sorted(sample.loc[sample["comparison"] == comparison, setting].unique())


def test_a_study_has_a_table_or_parts(tmp_path):
    for name in ("whole/results.parquet", "in parts/parts/one.parquet", "neither/report.html"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    names = ["in parts", "whole"]
    assert list(explore.studies(tmp_path).items()) == [(name, tmp_path / name / "results.parquet") for name in names]


def test_choices_of_the_sample(sample):
    assert explore.studies(RESULTS.parents[1])["sample"] == RESULTS
    names, rows = explore.comparisons(sample), sample_rows()
    assert names[0] == "losses"
    assert len(names) == len(set(names))
    assert set(names) == {name for name in rows["comparison"] if not name.endswith(OF_TUNING)}
    axes = {name: explore.axes(sample[sample["comparison"] == name]) for name in names}
    several = rows.loc[(rows["comparison"] == "losses") & (rows["length"] > 0), "length"].nunique() > 1
    assert axes["losses"] == ["K", "method", *["training length"] * several, "iteration"]
    assert axes["bins by batch"][:2] == ["n_bins", "batch_size"]
    assert axes["kernel"][0] == "bandwidth"
    assert "training length" in axes["batch at equal images"]
    metrics = explore.metric_columns(sample)
    assert metrics["Recall@K"] == {k: f"recall@{k}" for k in (1, 2, 4, 8, 16, 32)}
    assert metrics["MAP@R"] == {None: "map@r"}


def test_curves_of_every_comparison_and_axis_have_the_means_of_the_results(sample):
    for name in explore.comparisons(sample):
        results = sample[sample["comparison"] == name]
        longest = at_length(results)
        for axis in explore.axes(results):
            points = explore.curves(results, axis, "map")
            assert not points.duplicated(["curve", "x"]).any()
            if axis == "K":
                runs, drawn = longest, recall_names(results)
            else:
                runs, drawn = (results if axis == "training length" else longest), ["map"]
            if axis == "iteration":
                means = histories(longest).groupby(["method", "iteration"])["recall"].mean()
            elif axis in explore.settings_varied(results):
                means = runs[runs["method"].str.contains(f", {axis} ")].groupby("method")["map"].mean()
            else:
                trained = runs[runs["length"] > 0] if axis == "training length" else runs
                means = pd.concat([trained.groupby(["method", "length"])[column].mean() for column in drawn])
            np.testing.assert_allclose(np.sort(points["mean"]), np.sort(means), rtol=1e-12)
            known = points[["low", "high"]].notna().all(axis=1)
            assert (points["low"] <= points["mean"])[known].all()
            assert (points["mean"] <= points["high"])[known].all()


def test_curves_over_a_setting_join_the_methods_that_share_the_others(sample):
    results = sample[sample["comparison"] == "bins by batch"]
    points = explore.curves(results, "n_bins", "recall@4")
    assert points["curve"].unique().tolist() == [f"histogram, batch_size {size}" for size in (32, 128, 512)]
    bins = levels(sample, "bins by batch", "n_bins")
    assert bins[:2] == [25, 200]
    assert points["x"].tolist() == bins * 3
    table = summary(at_length(results), ["recall@4"]).set_index("method")
    row = points[(points["curve"] == "histogram, batch_size 512") & (points["x"] == 200)].iloc[0]
    told = table.loc["histogram, batch_size 512, n_bins 200"]
    assert (row["mean"], row["low"], row["high"], row["n"]) == tuple(
        told[["recall@4", "recall@4 low", "recall@4 high", "n"]]
    )
    other = explore.curves(results, "batch_size", "recall@4")
    assert other["curve"].unique().tolist() == [f"histogram, n_bins {n:g}" for n in bins]


def test_incomplete_runs_are_left_out(sample):
    results = sample[sample["comparison"] == "bins"].copy()
    *bins, last = levels(sample, "bins", "n_bins")
    results["complete"] &= ~results["method"].str.endswith(f" {last:g}")
    assert explore.curves(results, "n_bins", "recall@1")["x"].tolist() == bins
    assert explore.curves(results, "method", "recall@1")["x"].str.split().str[-1].astype(int).tolist() == bins


@pytest.fixture
def explored(study, tiny_data, tmp_path, monkeypatch):
    """Results of a small study whose runs are in the project's folder, with one run removed; and the dataset."""
    study.content["runs"][0]["comparison"] = "bins"
    study.content["runs"][1]["comparison"] = "bins"
    loaded = study.load()
    for made in loaded.runs:
        run(made.config, lambda line: None)
    file = tmp_path / "reports/small/results.parquet"
    file.parent.mkdir(parents=True)
    collect(loaded).to_parquet(file)
    (tmp_path / "data").symlink_to(tiny_data)
    monkeypatch.chdir(tmp_path)
    return read_results(file), open_dataset(tiny_data / "tiny")


def test_neighbours_are_those_that_the_run_stored(explored):
    results, dataset = explored
    for row in results.to_dict("records"):
        gallery = explore.open_gallery(dataset, row)
        stored = explore.stored_neighborhoods(row)
        panel = retrieval_panel(dataset, gallery.embeddings, gallery.labels, gallery.metric)
        assert panel == json.loads(row["panel"])
        assert list(stored) == panel["queries"]
        for query, neighborhood in stored.items():
            assert gallery.nearest(query, len(neighborhood.rows)) == neighborhood
            assert query not in neighborhood.rows
        hit = [gallery.nearest(query, 1).hits[0] for query in gallery.rows.tolist()]
        assert hit == [gallery.ranks[query] == 1 for query in gallery.rows.tolist()]
        assert np.mean(hit) == pytest.approx(row["recall@1"] / 100)


def test_gallery_of_a_run_without_embeddings_is_none(explored):
    results, dataset = explored
    row = results.iloc[0].to_dict()
    (explore.run_folder(row) / "embeddings.npy").unlink()
    assert explore.open_gallery(dataset, row) is None
    assert explore.open_gallery(dataset, row | {"run_id": "another"}) is None


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_projection_equals_a_singular_value_decomposition(metric):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    embeddings = torch.randn(80, 5, generator=generator) * spread + 2
    gallery = Gallery(np.arange(80), torch.zeros(80), embeddings, metric, {})
    points, shares = explore.projection(gallery)
    x = embeddings.double().numpy()
    if metric == "cosine":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x -= x.mean(0)
    left, singular, right = np.linalg.svd(x)
    assert right[0][np.abs(right[0]).argmax()] * np.sign(points[:, 0] @ left[:, 0]) > 0
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * singular[:2]), atol=1e-9)
    np.testing.assert_allclose(shares, (singular**2)[:2] / (singular**2).sum())


def test_map_draws_a_bounded_number_of_images():
    rows = np.arange(explore.MOST_POINTS + 500)
    large = Gallery(rows, torch.zeros(len(rows)), torch.zeros(len(rows), 2), "cosine", {})
    assert len(np.unique(large.shown())) == explore.MOST_POINTS
    assert large.shown()[-1] == rows[-1]
    assert len(Gallery(rows[:9], torch.zeros(9), torch.zeros(9, 2), "cosine", {}).shown()) == 9


def test_widgets_follow_the_choices(explored):
    from hloss.study import explore_widgets as shown

    choices = shown.Choices("unknown", "unknown", "bins")
    assert (choices.study.value, choices.dataset.value, choices.comparison.value) == ("small", "tiny", "bins")
    curves, neighbors = shown.Curves(choices), shown.Neighbors(choices)
    embedded = shown.Map(neighbors)
    for axis in curves.axis.options:
        curves.axis.value = axis
        points = explore.curves(choices.results, axis, "recall@1")
        drawn = [trace for trace in curves.figure.data if trace.hoverinfo != "skip"]
        assert len(drawn) == points["curve"].nunique()
        means = [y for trace in drawn for y in (trace.x if axis == "method" else trace.y)]
        np.testing.assert_allclose(means, points["mean"])
    neighbors.left.value, neighbors.right.value = "histogram, n_bins 20", "histogram, n_bins 50"
    galleries = neighbors.galleries
    assert all(galleries)
    for which, wanted in ((shown.LEFT, (True, False)), (shown.RIGHT, (False, True)), (shown.NEITHER, (False, False))):
        neighbors.which.value = which
        found = {query for _, query in neighbors.query.options}
        passing = {
            query for query in galleries[0].ranks if tuple(gallery.ranks[query] == 1 for gallery in galleries) == wanted
        }
        assert found == passing or not passing
    query = int(galleries[0].rows[-1])
    neighbors.pick(query)
    assert neighbors.query.value == query
    assert neighbors.shown == [gallery.nearest(query) for gallery in galleries]
    assert neighbors.panel.value.count("<img") == 1 + 2 * 8
    assert [sum(found.hits) for found in neighbors.shown] == [
        int(part.split(" hits of ")[0].split()[-1]) for part in neighbors.panel.value.split("</b>: ")[1:]
    ]
    points, _ = explore.projection(galleries[0])
    assert embedded.figure.data[-1].x.tolist() == [points[-1, 0]]
    assert sum(len(trace.x) for trace in embedded.figure.data[:2]) == len(points)
    assert neighbors.note.value == embedded.note.value == ""


def test_widgets_say_what_is_missing(explored, tmp_path):
    from hloss.study import explore_widgets as shown

    results, _ = explored
    shown._GALLERIES.clear()
    for run_id in results["run_id"]:
        (tmp_path / "runs/small" / run_id / "embeddings.npy").unlink(missing_ok=True)
    neighbors = shown.Neighbors(shown.Choices("small", "tiny", "bins"))
    embedded = shown.Map(neighbors)
    assert "make study STUDY=quick" in neighbors.note.value
    assert embedded.note.value == neighbors.note.value
    assert embedded.figure is None
    assert len(neighbors.query.options) == 6
    assert neighbors.panel.value.count("<img") == 1 + 2 * 8
    (tmp_path / "data").unlink()
    shown._dataset_in.cache_clear()
    neighbors.query.value = neighbors.query.options[1][1]
    assert "is not prepared" in neighbors.note.value
    assert neighbors.panel.value == ""
