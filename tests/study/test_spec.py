"""Studies: runs, resources, combinations and refused files."""

import pytest
import yaml

from hloss.runs.checkpoints import write_status
from hloss.runs.errors import ConfigError
from hloss.study.spec import load_study


def test_crosses_axes_and_seeds(study):
    runs = study.load().runs
    assert [r.name for r in runs] == [
        "histogram, n_bins 20, seed 0",
        "histogram, n_bins 20, seed 1",
        "histogram, n_bins 50, seed 0",
        "histogram, n_bins 50, seed 1",
        "raw pixels, seed 0",
    ]
    assert len({r.config.run_id for r in runs}) == 5
    assert all(r.config.folder.parent.name == "small" for r in runs)


def test_resources_of_a_run_replace_those_of_the_study(study):
    text, _ = study
    text["resources"] = {"partition": "gpu", "memory_gb": 16, "hours": 2}
    text["runs"][0]["resources"] = {"hours": 6.5}
    text["runs"][1]["resources"] = {"gpus": 0}
    runs = {r.name: r.resources for r in study.load().runs}
    histogram, pixels = runs["histogram, n_bins 50, seed 1"], runs["raw pixels, seed 0"]
    assert (histogram.partition, histogram.memory_gb, histogram.hours, histogram.gpus) == ("gpu", 16, 6.5, 1)
    assert (pixels.partition, pixels.memory_gb, pixels.hours, pixels.gpus) == ("gpu", 16, 2, 0)


def test_retries_request_more_up_to_node_and_partition(study):
    text, _ = study
    text["resources"] = {"memory_gb": 24, "max_memory_gb": 60, "hours": 10, "max_hours": 24}
    asked = study.load().runs[0].resources
    assert [asked.memory_mib(attempt) for attempt in (1, 2, 3, 4)] == [24 * 1024, 48 * 1024, 60 * 1024, 60 * 1024]
    assert [asked.minutes(attempt) for attempt in (1, 2, 3)] == [600, 1200, 1440]
    text["resources"] |= {"memory_gb": 100.5, "hours": 48}  # the first request is never reduced
    asked = study.load().runs[0].resources
    assert [asked.memory_mib(attempt) for attempt in (1, 2)] == [102_912] * 2
    assert [asked.minutes(attempt) for attempt in (1, 2)] == [48 * 60] * 2


def test_small_networks_share_a_gpu(study):
    text, _ = study
    text["runs"].append({"name": "large", "set": {"loss": "histogram", "network": "parts"}})
    runs = {r.name: r for r in study.load().runs}
    small, large = runs["raw pixels, seed 0"], runs["large, seed 0"]
    assert [r.resources.runs_per_gpu for r in (small, large)] == [16, 1]
    assert [r.resources.gpu_slots(alone=False) for r in (small, large)] == [1, 16]
    assert small.resources.gpu_slots(alone=True) == 16
    text["fixed"]["devices"] = 2
    asked = study.load().runs[0].resources
    assert (asked.gpus, asked.runs_per_gpu, asked.gpu_slots(alone=False)) == (2, 1, 32)


@pytest.mark.parametrize(
    ("resources", "alone", "asked"),
    [
        ({}, False, (1, "")),
        ({"gpu_parts": "shard:32"}, False, (0, "shard:2")),
        ({"gpu_parts": "shard:32"}, True, (1, "")),
        ({"gpu_parts": "mps:100"}, False, (0, "mps:6")),
        ({"gpu_parts": "shard:8"}, False, (0, "shard:1")),
        ({"gpu_parts": "shard:8", "runs_per_gpu": 4}, False, (0, "shard:2")),
        ({"gpu_parts": "shard:8", "runs_per_gpu": 1}, False, (1, "")),
        ({"gpu_parts": "shard:8", "gpus": 0}, False, (0, "")),
    ],
    ids=str,
)
def test_slurm_gives_parts_of_a_gpu_where_it_has_them(study, resources, alone, asked):
    study.content["resources"] = resources
    assert study.load().runs[0].resources.slurm_gpus(alone) == asked


def test_run_that_filled_a_shared_gpu_is_retried_alone(study):
    run = study.load().runs[0]
    assert not run.needs_own_gpu()
    run.config.folder.mkdir(parents=True)
    write_status(run.config.folder, "failed", 3, "GPUMemoryError: CUDA out of memory", retry=True)
    assert run.needs_own_gpu()
    write_status(run.config.folder, "running", 3)
    assert not run.needs_own_gpu()


def test_resources_do_not_change_the_run_id(study):
    before = [r.config.run_id for r in study.load().runs]
    study[0]["resources"] = {"hours": 1}
    assert [r.config.run_id for r in study.load().runs] == before


@pytest.mark.parametrize(
    ("resources", "device", "message"),
    [
        (
            {"gpu": 1},
            "auto",
            r"resources.gpu: unknown setting \(did you mean gpus\?\); allowed are partition, account, gpus,",
        ),
        ({"hours": 0}, "auto", "histogram, n_bins 20: resources.hours: got 0; must be greater than 0"),
        ({"memory_gb": "much"}, "auto", "resources.memory_gb: got 'much'; must be a number"),
        ({"gpus": 1}, "cpu", "got 1; with device='cpu' and devices=1 allowed are 0"),
        ({"gpus": 0}, "cuda", "got 0; with device='cuda' and devices=1 allowed are 1"),
        ({"gpus": 3}, "auto", "allowed are 0 or 1"),
        ({"runs_per_gpu": 3}, "auto", "resources.runs_per_gpu: got 3; must be 1, 2, 4, 8 or 16"),
        ({"gpu_parts": "shards"}, "auto", "resources.gpu_parts: got 'shards'; must be a name and a number"),
    ],
    ids=str,
)
def test_refuses_invalid_resources(study, resources, device, message):
    text, _ = study
    text["fixed"]["device"], text["resources"] = device, resources
    with pytest.raises(ConfigError, match=message):
        study.load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(seed=[1]), r"small.yaml: seed: unknown setting \(did you mean seeds\?\)"),
        (lambda t: t["runs"][0].pop("set"), "run 'histogram': set: missing"),
        (lambda t: t["runs"][0]["cross"].update(n_bins=[0]), "histogram, n_bins 0: n_bins must be a whole number"),
        (lambda t: t["fixed"].update(lr=1.0), "lr=1.0 is not a setting"),
    ],
)
def test_refuses_an_invalid_study(study, change, message):
    change(study[0])
    with pytest.raises(ConfigError, match=message):
        study.load()


def test_refuses_an_unknown_study_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"study is unknown: got 'quik'; allowed are .*\(did you mean quick\?\)"):
        load_study("quik")
    with pytest.raises(ConfigError, match=r"study is unknown: got '../studies/quick'; .*\(did you mean quick\?\)"):
        load_study("../studies/quick")


def test_run_of_two_comparisons_is_run_once(study):
    text, _ = study
    text["runs"].append({"name": "histogram, coarse", "comparison": "bins", "set": {"loss": "histogram", "n_bins": 20}})
    loaded = study.load()
    assert len(loaded.runs) == 5
    assert loaded.runs[0].methods == {"losses": "histogram, n_bins 20", "bins": "histogram, coarse"}


def test_extending_study_adds_runs_to_the_folder_of_its_base(study):
    _, folder = study
    base = study.load()
    more = {"name": "histogram", "comparison": "bins", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 100]}}
    (folder / "more.yaml").write_text(yaml.safe_dump({"title": "more", "extends": "small", "runs": [more]}))
    loaded = load_study("more", folder)
    assert (loaded.title, [f.name for f in loaded.files]) == ("more", ["more.yaml", "small.yaml"])
    assert [r.config for r in loaded.runs[:5]] == [r.config for r in base.runs]
    assert [r.name for r in loaded.runs[5:]] == [f"histogram, n_bins 100, seed {seed}" for seed in (0, 1)]
    assert {r.config.folder.parent.name for r in loaded.runs} == {"small"}
    shared = loaded.runs[2]
    assert shared.methods == {"losses": "histogram, n_bins 50", "bins": "histogram, n_bins 50"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"title": "t", "include": ["small"], "seeds": [0]},
            "more.yaml: seeds: unknown setting; allowed are title, include$",
        ),
        (
            {"title": "t", "extends": "small"},
            "more.yaml: runs: missing",
        ),
        (
            {"title": "t", "extends": "smal", "runs": []},
            r"extends: study is unknown: got 'smal'.*did you mean small",
        ),
        (
            {"title": "t", "extends": "more", "runs": []},
            r"more.yaml: a study that includes or extends others",
        ),
    ],
)
def test_refuses_an_invalid_combination_of_studies(study, text, message):
    study.load()
    (study[1] / "more.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(ConfigError, match=message):
        load_study("more", study[1])


def test_refuses_a_dataset_with_the_seed_inside_its_name(study):
    study[0]["fixed"]["dataset"] = "tiny-{seed}-labeled"
    with pytest.raises(ConfigError, match="must be a name of letters"):
        study.load()


def test_run_of_two_included_studies_belongs_to_both_comparisons(study):
    _, folder = study
    study.load()
    bins = {"name": "histogram", "comparison": "bins", "set": {"loss": "histogram", "n_bins": 20}}
    (folder / "more.yaml").write_text(yaml.safe_dump({"title": "m", "extends": "small", "runs": [bins]}))
    (folder / "both.yaml").write_text(yaml.safe_dump({"title": "b", "include": ["small", "more"]}))
    loaded = load_study("both", folder)
    assert len(loaded.runs) == 5
    assert loaded.runs[0].methods == {"losses": "histogram, n_bins 20", "bins": "histogram"}


def test_a_run_as_long_as_a_length_of_another_is_not_run(study):
    study.content["runs"] = [
        {"name": "short", "set": {"loss": "histogram", "iterations": 2}},
        {"name": "whole", "comparison": "long", "set": {"loss": "histogram", "report_at": [2]}},
        {"name": "other", "set": {"loss": "histogram", "iterations": 2, "n_bins": 20}},
        {"name": "no length of another", "set": {"loss": "histogram", "n_bins": 20}},
    ]
    runs = [run for run in study.load().runs if run.config.seed == 0]
    assert [(run.methods, run.config.lengths, run.only_at) for run in runs] == [
        ({"losses": "short", "long": "whole"}, (2, 4), {"losses": (2,)}),
        ({"losses": "other"}, (2,), {}),
        ({"losses": "no length of another"}, (4,), {}),
    ]


def test_lengths_of_one_comparison_add_up(study):
    study.content["runs"] = [
        {"name": "histogram", "set": {"loss": "histogram", "iterations": 2}},
        {"name": "histogram", "set": {"loss": "histogram", "report_at": [2]}},
    ]
    (run, _) = study.load().runs
    assert (run.config.lengths, run.only_at) == ((2, 4), {})
