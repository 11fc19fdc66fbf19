"""Plans of studies, computed from measured costs."""

import json
from pathlib import Path

import pandas as pd
import pytest

from hloss.runs.config import parse_config
from hloss.runs.run import run
from hloss.study.plan import (
    STALE,
    Cost,
    Need,
    cost_key,
    gpu_hours_text,
    measured_costs,
    plan_runs,
    plan_text,
    read_costs,
    run_state,
)
from hloss.study.spec import load_study
from hloss.study.throughput import Throughput, read_throughput
from tests.helpers.studies import study_of


def test_plan_separates_done_measured_and_unmeasured_runs(config, tmp_path):
    longer = parse_config({**config.model_dump(), "iterations": 3_600_000})
    twice = parse_config({**config.model_dump(), "iterations": 1_800_000, "refit": True})
    other = parse_config({**longer.model_dump(), "batch_size": 25})
    result = run(config, lambda line: None)
    result["training_seconds"] = 4 * 0.5
    (config.folder / "result.json").write_text(json.dumps(result))
    costs = measured_costs(tmp_path / "runs")
    study = study_of(config, longer, other, twice, hours=400.0)
    done, measured, unmeasured, repeated = plan_runs(study, 0, costs)
    assert (done.state, done.need) == ("done", None)
    assert {entry.state for entry in (measured, unmeasured, repeated)} == {"to do"}
    assert (measured.need.hours, measured.need.measured) == (500.0, True)
    assert repeated.need.hours == 500.0
    assert (unmeasured.need.hours, unmeasured.need.memory, unmeasured.need.measured) == (400.0, 8.0, False)
    text = plan_text(study, [done, measured, unmeasured, repeated])
    assert "1 of 4 runs are done. Of the other 3, 2 are measured: 1000.00 h" in text
    assert "1 run not measured on cpu; limit from the study's resources: at most 400.00 h of training" in text


@pytest.mark.parametrize(("gpus", "measured"), [(0, 195), (1, 0), (None, 0)])
def test_plan_of_the_paper_has_hours_and_memory_of_every_run(gpus, measured, monkeypatch, tmp_path):
    study, costs = load_study("paper"), read_costs()
    monkeypatch.chdir(tmp_path)  # a folder without results
    needs = [planned.need for planned in plan_runs(study, gpus, costs)]
    assert len(needs) == 201
    assert all(need.memory > 0 for need in needs)
    assert sum(need.measured for need in needs) == measured


def test_plan_of_the_paper_has_hours_of_a_known_gpu(monkeypatch, tmp_path):
    study, h200 = load_study("paper"), read_throughput()["NVIDIA H200"]
    file = Path("workflow/throughput.csv").resolve()
    monkeypatch.chdir(tmp_path)  # a folder without results
    planned = plan_runs(study, None, {}, h200)
    needs = [entry.need for entry in planned]
    cub = [entry.need for entry in planned if entry.run.dataset == "cub" and entry.run.config.iterations]
    table = pd.read_csv(file).query("card == 'NVIDIA H200' and network == 'googlenet' and precision == '32-true'")
    (rate,) = table.query("batch_size == 128 and tf32 == 'convolutions'")["steps_per_second"]
    assert {round(need.hours, 3) for need in cub} == {round(2 * 20_000 / rate / 3600, 3)}
    assert {need.source for need in cub} == {"estimated for NVIDIA H200, without validations"}
    hours = sum(need.hours for need in needs)
    assert f"about {hours:.2f} h" in plan_text(study, planned)
    assert all(0 < entry.need.hours < entry.run.resources.hours for entry in planned if entry.run.config.iterations)
    here = plan_runs(study, 0, {}, h200)
    assert f"takes {hours:.0f} hours of one NVIDIA H200" in gpu_hours_text(here, h200)


def test_throughput_of_another_batch_follows_from_the_most_similar(config):
    measured = Throughput("a card", {(config.network, "32-true", "convolutions"): {16: 100.0, 64: 200.0}})

    def seconds(**settings):
        return measured.seconds(parse_config(config.model_dump() | settings))

    assert [seconds(batch_size=n) for n in (8, 16, 24, 64, 128)] == [0.16, 0.16, 0.24, 0.32, 0.64]
    assert seconds(batch_size=128, micro_batch=32, batchnorm="slices") == pytest.approx(0.64 * 4 / 3)
    assert seconds(precision="bf16-mixed") is None
    assert seconds(devices=2) is None


def test_unmeasured_run_without_its_gpu_names_the_request(config):
    (planned,) = plan_runs(study_of(config, gpus=1, hours=7.0), 0, {})
    assert (planned.need.hours, planned.need.on_gpu, planned.need.measured) == (7.0, False, False)
    assert planned.need.source.endswith("for a GPU")


def test_run_without_training_needs_the_memory_and_disk_of_a_trained_run(config):
    untrained = parse_config({**config.model_dump(), "loss": "none", "iterations": 0})
    trained = cost_key(study_of(config).runs[0], 0)
    (planned,) = plan_runs(study_of(untrained), 0, {trained: Cost(3600.0, 2048.0, 512.0, "somebody")})
    assert planned.need == Need(0.0, 2.0, 0.5, on_gpu=False, source="somebody")


@pytest.mark.parametrize("gpus", [0, 1])
def test_compares_only_main_memory_with_the_requested_memory(config, gpus):
    study = study_of(config, gpus=gpus)
    cost = Cost(0.1, 1000 * 1024.0, 1.0, "somebody")
    (planned,) = plan_runs(study, gpus, {cost_key(study.runs[0], gpus): cost})
    assert (planned.need.memory, planned.need.on_gpu) == (1000.0, bool(gpus))
    assert ("memory_gb=8" in planned.need.remark) == (not gpus)


def test_warns_about_too_few_hours(config):
    study = study_of(config, hours=1.0)
    for seconds, warned in ((3600.0, True), (600.0, False)):  # of each of 4 iterations
        (planned,) = plan_runs(study, 0, {cost_key(study.runs[0], 0): Cost(seconds, 1.0, 1.0, "somebody")})
        assert ("hours=1" in planned.need.remark) == warned


def test_counts_the_disk_of_a_kept_network(config, tmp_path):
    without = parse_config({**config.model_dump(), "keep_network": False})
    run(without, lambda line: None)
    disk = sum(file.stat().st_size for file in without.folder.iterdir()) / 2**30
    keeping, other = parse_config({**config.model_dump(), "seed": 1}), parse_config({**without.model_dump(), "seed": 2})
    kept, not_kept = plan_runs(study_of(keeping, other), 0, measured_costs(tmp_path / "runs"))
    assert not_kept.need.disk == pytest.approx(disk)
    run(keeping, lambda line: None)
    size = (keeping.folder / "network.pt").stat().st_size / 2**30
    assert kept.need.disk - not_kept.need.disk == pytest.approx(size, rel=0.05)


def test_counts_the_remaining_iterations_of_a_run(config):
    config.folder.mkdir(parents=True)
    (config.folder / "status.json").write_text(json.dumps({"state": "stopped", "iteration": 3}))
    assert run_state(study_of(config).runs[0], stale=False) == ("at iteration 3", 1)


def test_stale_run_is_redone(config, monkeypatch):
    study = study_of(config)
    run(config, lambda line: None)
    assert [planned.state for planned in plan_runs(study, 0, {})] == ["done"]
    monkeypatch.setattr("hloss.runs.provenance.code_sha256", lambda: "other")
    (planned,) = plan_runs(study, 0, {})
    assert (planned.state, planned.need.hours) == (STALE, 4.0)
    assert "0 of 1 runs are done" in plan_text(study, [planned])


def test_table_of_costs_has_the_runs_of_the_quick_study():
    costs = read_costs()
    quick = load_study("quick").runs[0]
    assert costs[cost_key(quick, 0)].seconds < 1


def test_plan_says_which_data_is_missing(study, tmp_path):
    loaded = study.load()
    assert "cannot start" not in plan_text(loaded, plan_runs(loaded, 0, {}))
    study.content["fixed"]["data_dir"] = str(tmp_path / "empty")
    loaded = study.load()
    told = plan_text(loaded, plan_runs(loaded, 0, {}))
    assert "The study cannot start yet: dataset 'tiny' is not prepared: " in told
