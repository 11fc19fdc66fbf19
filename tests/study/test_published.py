"""Published values: reading, refused rows, and comparison with results of the same protocol and method."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hloss.integrations.pml_losses import PREFIX
from hloss.retrieval.protocols import PROTOCOLS
from hloss.runs.config import LOSSES
from hloss.runs.errors import ConfigError
from hloss.study.published import (
    EXACT,
    NETWORK,
    PROTOCOL,
    PUBLISHED,
    compare_with_published,
    published_points,
    read_published,
)


@pytest.fixture(scope="module")
def published():
    return read_published()


def test_committed_values_are_percentages_with_sources(published):
    assert len(published) > 100
    assert published.value.between(0, 100, inclusive="right").all()
    assert published.url.str.startswith("https://").all()
    assert set(published.dataset) == {"cub", "sop", "cuhk03", "market1501"}
    key = ["dataset", "method", "network", "dim", "metric", "source", "place"]
    again = published.assign(settings=published.settings.map(str)).duplicated([*key, "settings", "note"], keep=False)
    assert not again.any(), published[again]


def test_committed_names_of_losses_and_protocols_are_known(published):
    ours = published[published.selection != "test set"]
    assert {m for m in ours.method if not m.startswith(PREFIX)} <= {*LOSSES, "none"}
    assert {p for p in published.protocol if " " not in p} <= set(PROTOCOLS)


def test_table_1_equals_the_paper(published):
    table = published[(published.source == "Ustinova & Lempitsky 2016") & (published.place == "Table 1")]
    values = table.pivot(index="dataset", columns="metric", values="value")
    columns = [f"recall@{k}" for k in (1, 5, 10, 15, 20)]
    assert values.loc["cuhk03", columns].tolist() == [65.77, 92.85, 97.62, 98.94, 99.43]
    assert values.loc["market1501", columns].tolist() == [59.47, 80.73, 86.94, 89.28, 91.09]


def test_published_recall_increases_with_k(published):
    recall = published[published.metric.str.startswith("recall@")]
    recall = recall.assign(k=recall.metric.str.removeprefix("recall@").astype(int), settings=recall.settings.map(str))
    for _, rows in recall.groupby(["dataset", "method", "network", "dim", "settings", "source"], dropna=False):
        assert rows.sort_values("k").value.is_monotonic_increasing


@pytest.mark.parametrize(
    ("column", "wrong", "message"),
    [
        ("value", "165.77", r"line 3: value must be above 0 and at most 100 \(%\): got '165.77'"),
        ("value", "0", r"line 3: value must be above 0 and at most 100 \(%\): got '0'"),
        ("value", "nan", r"line 3: value must be above 0 and at most 100 \(%\): got 'nan'"),
        ("value", "about 60", r"line 3: value must be a number: got 'about 60'"),
        ("dataset", "CUB", r"line 3: dataset is unknown: got 'CUB'; allowed are cub"),
        ("metric", "R@1", r"line 3: metric must be recall@K or map: got 'R@1'"),
        ("settings", "batch=256", r"line 3: settings='batch=256' names unknown settings of a run: batch"),
        ("selection", "best", r"line 3: selection is unknown: got 'best'"),
        ("source", " ", r"line 3: source is empty"),
    ],
)
def test_refuses_an_invalid_row_by_line(column, wrong, message, tmp_path):
    table = pd.read_csv(PUBLISHED, dtype=str, keep_default_na=False).head(4)
    table.loc[1, column] = wrong
    table.to_csv(tmp_path / "values.csv", index=False)
    with pytest.raises(ConfigError, match=message):
        read_published(tmp_path / "values.csv")


def test_refuses_a_file_with_other_columns(tmp_path):
    (tmp_path / "values.csv").write_text("dataset,value\ncub,1\n")
    with pytest.raises(ConfigError, match=r"has wrong columns: got dataset, value; required are dataset, method"):
        read_published(tmp_path / "values.csv")


def runs_of(dataset, method, recall, **settings):
    """Runs of one method, one per given Recall@1."""
    own = {"loss": "histogram", "network": "parts", "embedding_dim": 500, "batch_size": 256, "C": None, **settings}
    protocol = {"cuhk03": "cuhk03-single-shot", "market1501": "market1501"}.get(dataset, "all-vs-rest")
    runs = [
        {
            "dataset": dataset,
            "method": method,
            "run_id": f"{method}-{i}",
            "seed": i,
            "protocol": protocol,
            "complete": True,
            "prepared": '{"boxes": "labeled", "camera_pairs": 3}',
            **own,
            "recall@1": 100 * r,
        }
        for i, r in enumerate(recall)
    ]
    return pd.DataFrame(runs)


def test_exact_match_needs_protocol_network_and_dimensions():
    recall = np.array([0.65, 0.66, 0.67])
    table = compare_with_published(runs_of("cuhk03", "histogram", recall))
    assert table.published.tolist() == [65.77, 65.918]  # the paper's and its notebook's; Recall@5 was not measured
    assert set(table.match) == {EXACT}
    row = table.iloc[0]
    low, high = stats.t.interval(0.95, 2, 66, stats.sem(100 * recall))
    assert (row.ours, row.low, row.high) == pytest.approx((66, low, high))
    assert (row.n, row.run_ids) == (3, "histogram-0, histogram-1, histogram-2")
    assert row.difference == pytest.approx(0.23)
    assert (row.source, row.place) == ("Ustinova & Lempitsky 2016", "Table 1")


def test_points_are_the_recalls_of_exact_matches():
    runs = runs_of("cuhk03", "histogram", [0.65, 0.66], **{"recall@5": 90.0, "map": 50.0})
    beside = compare_with_published(pd.concat([runs, runs.assign(method="again, of another network", network="x")]))
    assert {EXACT, NETWORK} == set(beside.match)
    points = published_points(pd.concat([beside, beside]))  # from several comparisons
    paper = points[points.source == "Ustinova & Lempitsky 2016"]
    assert paper[["method", "k", "value"]].to_numpy().tolist() == [["histogram", 1, 65.77], ["histogram", 5, 92.85]]
    assert set(points.method) == {"histogram"}
    assert not points.duplicated().any()
    assert published_points(beside[:0]).columns.tolist() == ["method", "k", "value", "source"]
    as_map = beside.assign(metric="map")
    assert published_points(as_map).empty


def test_method_with_missing_runs_has_no_difference():
    half = runs_of("cuhk03", "histogram", [0.65, 0.66, 0.67])
    half.loc[1, ["complete", "recall@1"]] = False, np.nan
    table = compare_with_published(half)
    assert table.ours.tolist() == [66, 66]
    assert table.n.tolist() == [2, 2]
    assert table.difference.isna().all()
    assert compare_with_published(half.assign(complete=False)).empty


def test_other_stated_settings_are_another_method():
    assert compare_with_published(runs_of("cuhk03", "histogram", [0.6], batch_size=128)).empty
    binomial = {"loss": "binomial", "network": "googlenet", "embedding_dim": 512}
    with_2 = compare_with_published(runs_of("cub", "binomial", [0.4], C=2.0, batch_size=128, **binomial))
    with_25 = compare_with_published(runs_of("cub", "binomial", [0.4], C=25.0, batch_size=128, **binomial))
    assert 43.5 in with_2.published.tolist()
    assert 43.5 not in with_25.published.tolist()
    assert 52.8 in with_25.published.tolist()
    assert 52.8 not in with_2.published.tolist()
    histogram = {"network": "googlenet", "embedding_dim": 512}
    for batch_size, quoted in ((128, True), (32, False)):
        beside = compare_with_published(runs_of("cub", "histogram", [0.4], batch_size=batch_size, **histogram))
        assert (50.3 in beside.published.tolist()) == quoted


def test_googlenet_differs_from_the_network_of_the_paper():
    table = compare_with_published(
        runs_of("sop", "lifted", [0.6], loss="lifted", network="googlenet", embedding_dim=512)
    )
    assert table.published.tolist() == [62.1]
    assert set(table.match) == {NETWORK}
    fewer = compare_with_published(runs_of("market1501", "histogram", [0.6], embedding_dim=128))
    assert EXACT not in set(fewer.match)


def test_choice_on_the_test_set_is_another_protocol_and_a_part_has_no_published_value():
    table = compare_with_published(
        runs_of("cub", "histogram", [0.5], network="torchvision:resnet50", embedding_dim=128)
    )
    roth = table[table.source == "Roth et al. 2020"]
    assert roth.published.tolist() == [60.55]
    assert roth.match.tolist() == [PROTOCOL]
    two_way = runs_of("cuhk03", "histogram", [0.7]).assign(protocol="cuhk03-767-700")
    other = compare_with_published(two_way)
    assert set(other.match) == {PROTOCOL}
    assert other.difference.isna().all()
    for prepared in ('{"boxes": "detected", "camera_pairs": 3}', '{"boxes": "labeled", "camera_pairs": 5}', "{}"):
        other = compare_with_published(runs_of("cuhk03", "histogram", [0.7], prepared=prepared))
        assert set(other.match) == {PROTOCOL}
    for dataset in ("cub", "cuhk03", "market1501"):
        assert len(compare_with_published(runs_of(dataset, "histogram", [0.7])))
        part = runs_of(dataset, "histogram", [0.7], prepared='{"partial": {"identities": [20, 22]}}')
        assert compare_with_published(part).empty
    pooled = runs_of("market1501", "histogram", [0.5]).assign(map=0.4)
    maps = compare_with_published(pooled).query("metric == 'map'")
    assert set(maps.match) == {PROTOCOL}
    assert maps.published.tolist() == [54.71]


def test_refuses_runs_that_are_no_repetitions():
    mixed = pd.concat([runs_of("cub", "histogram", [0.5]), runs_of("cub", "histogram", [0.5], network="googlenet")])
    with pytest.raises(ConfigError, match=r"the runs of 'histogram' on cub differ in network: got parts, googlenet"):
        compare_with_published(mixed)


def test_dataset_without_published_values_gives_an_empty_table():
    table = compare_with_published(runs_of("glyphs", "histogram", [0.5]))
    assert table.empty
    assert "match" in table
