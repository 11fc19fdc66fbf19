"""Tuned entries of studies: waiting runs, and the choices of grids."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from hloss.runs.errors import ConfigError
from hloss.runs.run import run
from hloss.study.results import chosen_settings, collect, grid_recalls, read_results
from hloss.study.spec import load_study
from hloss.study.tuning import next_value, resolve_tuning


def test_a_tuned_setting_is_the_best_on_validation_and_only_then_known(study):
    study.tune()
    waiting = resolve_tuning(study.load())
    assert [(r.methods, r.config.seed) for r in waiting.runs[:2]] == [
        ({"tuned losses: choice": "histogram, n_bins 20"}, 9),
        ({"tuned losses: choice": "histogram, n_bins 50"}, 9),
    ]
    assert [r.name for r in waiting.waiting] == ["histogram, seed 0", "histogram, seed 1"]
    results = {r.config.n_bins: run(r.config, lambda line: None)["validation_recall@1"] for r in waiting.runs[:2]}
    known = resolve_tuning(waiting)
    assert known.waiting == ()
    chosen = [r.config.n_bins for r in known.runs if r.methods == {"tuned losses": "histogram"}]
    assert chosen == [max(results, key=results.get)] * 2
    assert list(known.order) == list(waiting.order)
    assert known.runs == resolve_tuning(study.load()).runs == resolve_tuning(known).runs


def test_a_study_is_loaded_from_its_files_alone_whatever_results_there_are(study):
    study.tune()
    before = study.load()
    for r in before.runs:
        run(r.config, lambda line: None)
    after = study.load()
    assert (after.runs, after.waiting) == (before.runs, before.waiting)


def test_tuning_on_a_seed_of_the_comparison_is_refused(study):
    study.tune()["tuning_seed"] = 0
    with pytest.raises(ConfigError, match="run 'histogram': tune needs a tuning_seed that is not one of seeds"):
        study.load()


def test_a_study_that_includes_others_has_their_runs_and_those_that_wait(study, tiny_data):
    text, folder = study
    study.tune()
    study.load()
    shutil.copytree(tiny_data / "tiny", folder / "data" / "tiny-1")
    other = text | {"seeds": [1], "fixed": text["fixed"] | {"dataset": "tiny-{seed}"}, "runs": text["runs"][1:]}
    other["runs"][0]["seeds"] = [1]
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    (folder / "both.yaml").write_text(yaml.safe_dump({"title": "both", "include": ["small", "other"]}))
    loaded = load_study("both", folder)
    assert [r.config.folder.parent.name for r in loaded.runs] == ["small"] * 3 + ["other"]
    assert [r.name for r in loaded.waiting] == ["histogram, seed 0", "histogram, seed 1"]
    assert [f.name for f in loaded.files] == ["both.yaml", "small.yaml", "other.yaml"]


def loaded_with_results(study, monkeypatch, validation):
    """Load a study; the runs of its grid have these validation Recall@1, as in {20: {2: 0.5, 4: 0.1}} for n_bins 20."""

    def read(folder):
        n_bins = {run.config.folder: run.config.n_bins for run in grid}.get(folder)
        entries = [{"iterations": n, "validation_recall@1": v} for n, v in validation.get(n_bins, {}).items()]
        return {"lengths": entries} if entries else None

    loaded = study.load()
    grid = loaded.runs[:2]
    monkeypatch.setattr("hloss.study.tuning.read_result", read)
    return loaded


def test_a_grid_chooses_at_each_length_and_runs_no_choice_longer_than_needed(study, monkeypatch):
    study.tune()["fixed"]["report_at"] = [2]
    study.content["runs"][1]["set"]["report_at"] = None
    loaded = loaded_with_results(study, monkeypatch, {20: {2: 0.5, 4: 0.1}, 50: {2: 0.2, 4: 0.3}})
    assert [(r.config.lengths, r.config.seed) for r in loaded.waiting] == [((2, 4), 0), ((2, 4), 1)]
    tuned = [r for r in resolve_tuning(loaded).runs if "tuned losses" in r.methods]
    assert [(r.config.n_bins, r.config.lengths, r.config.seed) for r in tuned] == [
        (20, (2,), 0), (20, (2,), 1), (50, (4,), 0), (50, (4,), 1),
    ]  # fmt: skip
    assert {r.method for r in tuned} == {"histogram"}


def test_a_grid_that_chooses_the_same_at_each_length_needs_one_run_per_seed(study, monkeypatch):
    study.tune()["fixed"]["report_at"] = [2]
    study.content["runs"][1]["set"]["report_at"] = None
    loaded = loaded_with_results(study, monkeypatch, {20: {2: 0.5, 4: 0.5}, 50: {2: 0.2, 4: 0.3}})
    tuned = [r for r in resolve_tuning(loaded).runs if "tuned losses" in r.methods]
    assert [(r.config.n_bins, r.config.lengths) for r in tuned] == [(20, (2, 4))] * 2


def test_a_choice_at_a_length_of_a_longer_run_of_the_study_is_not_run(study, monkeypatch):
    study.tune()["fixed"]["report_at"] = [2]
    study.content["runs"][1] = {"name": "fixed", "set": {"loss": "histogram", "n_bins": 20}, "seeds": [0]}
    loaded = loaded_with_results(study, monkeypatch, {20: {2: 0.5, 4: 0.1}, 50: {2: 0.2, 4: 0.3}})
    resolved = resolve_tuning(loaded)
    (shared,) = [r for r in resolved.runs if r.config.n_bins == 20 and r.config.seed == 0]
    assert shared.methods == {"tuned losses": "histogram", "losses": "fixed"}
    assert (shared.config.lengths, shared.only_at) == ((2, 4), {"tuned losses": (2,)})
    assert [shared.lengths_in(name) for name in shared.methods] == [(2,), (2, 4)]


def test_a_grid_over_lengths_is_refused(study):
    study.tune()["runs"][0]["cross"] = {"iterations": [2, 4]}
    with pytest.raises(ConfigError, match="a grid cannot choose iterations, because it chooses at each length"):
        study.load()


@pytest.fixture
def validated(monkeypatch):
    """`validated(function)`: every run has a result whose validation Recall@1 is a function of its settings."""

    def replace_results(recall):
        results = {}

        def made(folder):
            return results.get(folder)

        def complete(runs):
            for one in runs:
                at = {
                    "iterations": one.config.iterations,
                    "validation_recall@1": 1 / (1 + math.exp(-recall(one.config) / 1000)),
                }
                results[one.config.folder] = {"lengths": [at]}

        monkeypatch.setattr("hloss.study.tuning.read_result", made)
        return complete

    return replace_results


def grid_of(study, comparison="tuned losses: choice"):
    return sorted(r.config.n_bins for r in study.runs if comparison in r.methods)


def all_resolved(study, complete):
    """The study after every stage of its grids, and the number of stages."""
    loaded, stages = resolve_tuning(study.load()), 0
    while loaded.waiting:
        complete(loaded.runs)
        loaded, stages = resolve_tuning(study.load()), stages + 1
        assert stages < 9
    return loaded, stages


def tune(study, cross):
    """Tune the histogram loss alone on this grid."""
    study.tune()["runs"][0]["cross"] = cross
    del study.content["runs"][1:]


BINS = [20, 40, 80]


@pytest.mark.parametrize(
    ("best", "added", "stages", "chosen"),
    [(40, [], 1, 40), (80, [160], 2, 80), (160, [160, 320], 3, 160), (1000, [160, 320], 3, 320), (20, [10], 2, 20),
     (1, [5, 10], 3, 5)],
)  # fmt: skip
def test_a_grid_is_extended_until_its_choice_is_interior_at_most_twice(study, validated, best, added, stages, chosen):
    tune(study, {"n_bins": BINS})
    resolved, needed = all_resolved(study, validated(lambda config: -abs(config.n_bins - best)))
    assert needed == stages
    assert grid_of(resolved) == BINS
    assert grid_of(resolved, "tuned losses, extended: choice") == added
    assert set(grid_of(resolved, "tuned losses")) == {chosen}
    initial = {min(max(best, 20), 80)} if added else set()
    assert set(grid_of(resolved, "tuned losses, initial grid")) == initial
    assert resolve_tuning(resolved).runs == resolved.runs


def test_an_extension_has_all_combinations_with_the_other_settings(study, validated):
    tune(study, {"n_bins": BINS, "margin": [0.0, 0.1]})
    resolved, _ = all_resolved(study, validated(lambda config: config.n_bins + config.margin))
    added = [r.config for r in resolved.runs if "tuned losses, extended: choice" in r.methods]
    assert [(c.n_bins, c.margin) for c in added] == [
        (160, 0.0),
        (160, 0.1),
        (320, 0.0),
        (320, 0.1),
    ]  # 0 has no next value


def test_a_value_that_no_run_can_have_is_not_added(study, validated):
    tune(study, {"dropout": [0.3, 0.6, 0.9]})  # the next value is 1.8
    resolved, _ = all_resolved(study, validated(lambda config: config.dropout))
    assert not [r for r in resolved.runs if "tuned losses, extended: choice" in r.methods]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.001, 0.003, 0.01], 0.03), ([0.001, 0.0003, 0.0001], 0.00003), ([100, 200, 400], 800), ([4, 3, 2], None),
     ([5.0, 10.0, 25.0], 50.0), ([0.0, 0.1, 0.2], None), ([1, 2], None), (["a", "b", "c"], None)],
)  # fmt: skip
def test_next_value_continues_the_last_two_steps(values, expected):
    assert next_value(values) == expected
    assert type(next_value(values)) is type(expected)


def test_the_table_of_choices_shows_extensions_and_the_initial_choice(study):
    tune(study, {"n_bins": BINS})
    loaded = resolve_tuning(study.load())
    while loaded.waiting:
        for one in loaded.runs:
            run(one.config, lambda line: None)
        loaded = resolve_tuning(study.load())
    for one in loaded.runs:
        run(one.config, lambda line: None)
    table = collect(loaded).explode(["comparison", "method", "place"])
    (row,) = chosen_settings(table).to_dict("records")
    added = len(grid_of(loaded, "tuned losses, extended: choice"))
    assert row["runs of the grid"] == ("3" if not added else f"3 + {added}")
    assert row["chosen"] == f"n_bins {grid_of(loaded, 'tuned losses')[0]}"
    initial = grid_of(loaded, "tuned losses, initial grid")
    assert row["on the initial grid"] == (f"n_bins {initial[0]}" if initial else "")


def test_the_table_of_a_grid_has_a_column_per_learning_rate():
    rows = [
        ("tuned losses", "a", 0.01, 50.0, 60.0),
        ("tuned losses: choice", "a, learning_rate 0.01, n_bins 50", 0.01, 50.0, 60.0),
        ("tuned losses: choice", "a, learning_rate 0.001, n_bins 50", 0.001, 50.0, 30.0),
        ("tuned losses: choice", "a, learning_rate 0.001, n_bins 400", 0.001, 400.0, 20.0),
        ("tuned losses, extended: choice", "a, learning_rate 0.1, n_bins 400", 0.1, 400.0, 40.0),
        ("tuned losses", "b", 0.01, 50.0, 70.0),
        ("tuned losses: choice", "b, n_bins 50", 0.01, 50.0, 70.0),
        ("tuned losses: choice", "b, n_bins 100", 0.01, 100.0, 65.0),
    ]
    columns = ["comparison", "method", "learning_rate", "n_bins", "validation_recall@1"]
    table = grid_recalls(pd.DataFrame(rows, columns=columns).assign(dataset="mini"))
    assert table.columns[4:].tolist() == ["learning rate 0.001", "learning rate 0.01", "learning rate 0.1"]
    assert table.iloc[:, 1:4].to_numpy().tolist() == [["tuned losses", "a", f"n_bins {n}"] for n in (50, 400)]
    expected = [[30, 60, np.nan], [20, np.nan, 40]]
    np.testing.assert_array_equal(table.iloc[:, 4:].to_numpy(dtype=float), expected)
    assert grid_recalls(pd.DataFrame(rows[5:], columns=columns).assign(dataset="mini")).empty


def with_recalls(study, *recalls):
    """Tune the first entry of a study, and replace the validation Recall@1 of its grid's runs."""
    study.tune()
    study.content["runs"][0]["cross"]["n_bins"] = [20, 30, 50]
    loaded = study.load()
    for r, recall in zip(loaded.runs, recalls, strict=False):
        result = run(r.config, lambda line: None)
        at_length = result["lengths"][0] | {"validation_recall@1": recall}
        text = json.dumps(result | {"validation_recall@1": recall, "lengths": [at_length]})
        (r.config.folder / "result.json").write_text(text)
    return loaded


def test_a_choice_among_equal_runs_is_reported_and_named_in_the_table(study):
    loaded, lines = with_recalls(study, 0.5, 0.75, 0.75), []
    known = resolve_tuning(loaded, lines.append)
    assert {r.config.n_bins for r in known.runs if r.methods == {"tuned losses": "histogram"}} == {30}
    assert lines == [
        "2 runs of a grid are equally good (75.00 %), the first is chosen: histogram, n_bins 30; histogram, n_bins 50"
    ]
    for r in known.runs[3:]:
        run(r.config, lambda line: None)
    results = collected(known, study.folder)
    assert chosen_settings(results)["equally good runs"].tolist() == [2]
    loaded, lines = with_recalls(study, 0.5, 0.75, 0.6), []
    assert resolve_tuning(loaded, lines.append).waiting == ()
    assert lines == []
    assert "equally good runs" not in chosen_settings(collected(resolve_tuning(loaded), study.folder))


def collected(study, folder):
    collect(study).to_parquet(folder / "results.parquet")
    return read_results(folder / "results.parquet")


@pytest.mark.parametrize(
    ("recalls", "message"),
    [
        ((1.0, 1.0, 1.0), "the validation Recall@1 of all of its 3 runs is 100 %"),
        ((0.0, 0.0, 0.0), "the validation Recall@1 of all of its 3 runs is 0 %"),
        ((0.5, None, 0.6), "1 of 3 runs of this grid have no validation Recall@1"),
        ((float("nan"), 0.5, 0.6), "1 of 3 runs of this grid have no validation Recall@1"),
    ],
)
def test_a_grid_whose_validation_cannot_choose_is_refused(study, recalls, message):
    loaded = with_recalls(study, *recalls)
    with pytest.raises(ConfigError, match=f"histogram, n_bins 20, seed 9: .*{message}"):
        resolve_tuning(loaded)


def test_tuning_without_validation_is_refused(study):
    study.tune()["fixed"]["choose"] = "last"
    with pytest.raises(ConfigError, match="run 'histogram': tune does not fit choose='last'"):
        study.load()
