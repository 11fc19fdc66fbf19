"""Tuned entries of studies: what waits, and what their grids choose."""

import json
import shutil

import pytest
import yaml

from hloss.runs.errors import ConfigError
from hloss.runs.run import run
from hloss.study.results import chosen_settings, collect, read_results
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


def with_recalls(study, *recalls):
    """Tune the first entry of a study, and replace the validation Recall@1 of its grid's runs."""
    study.tune()
    study.content["runs"][0]["cross"]["n_bins"] = [20, 30, 50]
    loaded = study.load()
    for r, recall in zip(loaded.runs, recalls, strict=False):
        result = run(r.config, lambda line: None)
        text = json.dumps(result | {"validation_recall@1": recall})
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
    loaded, lines = with_recalls(study, 0.5, 0.6, 0.75), []
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
