"""Tuned entries of studies: what waits, and what their grids choose."""

import shutil

import pytest
import yaml

from hloss.runs.errors import ConfigError
from hloss.runs.run import run
from hloss.study.spec import load_study
from hloss.study.tuning import resolve_tuning


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


def results_of_grid(monkeypatch, validation):
    """Let the runs of the grid have these validation Recall@1, as in {20: {2: 0.5, 4: 0.1}} for n_bins 20."""

    def read(folder):
        n_bins = {run.config.folder: run.config.n_bins for run in grid}.get(folder)
        entries = [{"iterations": n, "validation_recall@1": v} for n, v in validation.get(n_bins, {}).items()]
        return {"lengths": entries} if entries else None

    grid = []
    monkeypatch.setattr("hloss.study.tuning.read_result", read)
    return grid


def test_a_grid_chooses_at_each_length_and_runs_no_choice_longer_than_needed(study, monkeypatch):
    study.tune()["fixed"]["report_at"] = [2]
    study.content["runs"][1]["set"]["report_at"] = None
    grid = results_of_grid(monkeypatch, {20: {2: 0.5, 4: 0.1}, 50: {2: 0.2, 4: 0.3}})
    loaded = study.load()
    grid += loaded.runs[:2]
    assert [(r.config.lengths, r.config.seed) for r in loaded.waiting] == [((2, 4), 0), ((2, 4), 1)]
    tuned = [r for r in resolve_tuning(loaded).runs if "tuned losses" in r.methods]
    assert [(r.config.n_bins, r.config.lengths, r.config.seed) for r in tuned] == [
        (20, (2,), 0), (20, (2,), 1), (50, (4,), 0), (50, (4,), 1),
    ]  # fmt: skip
    assert {r.method for r in tuned} == {"histogram"}


def test_a_grid_that_chooses_the_same_at_each_length_needs_one_run_per_seed(study, monkeypatch):
    study.tune()["fixed"]["report_at"] = [2]
    study.content["runs"][1]["set"]["report_at"] = None
    grid = results_of_grid(monkeypatch, {20: {2: 0.5, 4: 0.5}, 50: {2: 0.2, 4: 0.3}})
    loaded = study.load()
    grid += loaded.runs[:2]
    tuned = [r for r in resolve_tuning(loaded).runs if "tuned losses" in r.methods]
    assert [(r.config.n_bins, r.config.lengths) for r in tuned] == [(20, (2, 4))] * 2


def test_a_choice_at_a_length_of_a_longer_run_of_the_study_is_not_run(study, monkeypatch):
    study.tune()["fixed"]["report_at"] = [2]
    study.content["runs"][1] = {"name": "fixed", "set": {"loss": "histogram", "n_bins": 20}, "seeds": [0]}
    grid = results_of_grid(monkeypatch, {20: {2: 0.5, 4: 0.1}, 50: {2: 0.2, 4: 0.3}})
    loaded = study.load()
    grid += loaded.runs[:2]
    resolved = resolve_tuning(loaded)
    (shared,) = [r for r in resolved.runs if r.config.n_bins == 20 and r.config.seed == 0]
    assert shared.methods == {"tuned losses": "histogram", "losses": "fixed"}
    assert (shared.config.lengths, shared.only_at) == ((2, 4), {"tuned losses": (2,)})
    assert [shared.lengths_in(name) for name in shared.methods] == [(2,), (2, 4)]


def test_a_grid_over_lengths_is_refused(study):
    study.tune()["runs"][0]["cross"] = {"iterations": [2, 4]}
    with pytest.raises(ConfigError, match="a grid cannot choose iterations, because it chooses at each length"):
        study.load()
