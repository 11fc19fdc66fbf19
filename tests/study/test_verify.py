"""Verification of results by repeated runs: equal values, tolerance on other machines, and refusals."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hloss.runs.config import parse_config
from hloss.runs.errors import ConfigError
from hloss.runs.run import run
from hloss.study.results import collect
from hloss.study.verified import DIFFERENT
from hloss.study.verify import CLOSE, EXACT, NOT_COMPARED, TOLERANCE_POINTS, config_of, origin, verify
from tests.helpers.sample import sample_table
from tests.helpers.scripts import run_script
from tests.helpers.studies import study_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table(tiny_data, tmp_path_factory):
    """The results of a small study whose runs are complete; `data_dir` is where the tests' dataset is."""
    where = {"data_dir": str(tiny_data), "runs_dir": str(tmp_path_factory.mktemp("runs")), "device": "cpu"}
    small = {"dataset": "tiny", "batch_size": 24, "images_per_class": 4, "iterations": 4, "validate_every": 2, **where}
    pixels = {"dataset": "tiny", "network": "pixels", "loss": "none", "iterations": 0, **where}
    configs = [parse_config(settings) for settings in (*({**small, "seed": seed} for seed in range(4)), pixels)]
    for config in configs:
        run(config, lambda line: None)
    return collect(study_of(*configs)).assign(data_dir=where["data_dir"])


@pytest.fixture
def results(table, tmp_path):
    file = tmp_path / "results.parquet"
    table.to_parquet(file)
    return file


def changed(file, **columns):
    """Write a table again with changed values in some columns."""
    table = pd.read_parquet(file)
    for name, change in columns.items():
        table[name] = [change(value) for value in table[name]]
    table.to_parquet(file)


def outcomes(verified):
    return [run["outcome"] for run in verified["runs"].values()]


def test_repeated_runs_are_equal_bit_by_bit_and_the_report_says_so(table, results):
    lines = []
    verified = verify(results, n=5, report=lines.append)
    assert outcomes(verified) == [EXACT] * 5
    assert [line.endswith(EXACT) for line in lines] == [True] * 5
    assert verified == json.loads(results.with_name("verified.json").read_text())
    assert set(verified["runs"]) == set(table["run_id"])
    assert {run["largest_difference_points"] for run in verified["runs"].values()} == {0.0}
    code = verified["code_sha256"][:8]
    assert f"; verified at code `{code}` (commit " in origin(table, results)
    assert origin(table, results).endswith(f"by 5 runs repeated on {verified['date']}: 5 {EXACT}.")
    compared = set(table) - NOT_COMPARED
    assert compared >= {
        "recall@1",
        "map",
        "validation_recall@1",
        "chosen_iteration",
        "history_recall",
        "positive_after",
    }


def test_the_seed_decides_which_runs_are_repeated(results):
    drawn = [set(verify(results, 2, seed, lambda line: None)["runs"]) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert any(other != drawn[0] for other in drawn[2:])
    assert {len(runs) for runs in drawn} == {2}


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("recall@1", lambda value: np.nextafter(value, 2)),
        ("map", lambda value: np.nextafter(value, 0)),
        ("chosen_iteration", lambda value: value + 1),
        ("history_recall", lambda values: values * (1 + 1e-15)),
        ("positive_after", lambda values: values[:-1]),
        ("panel", lambda text: text.replace("[", "[0, ", 1)),
        ("protocol", lambda value: "another"),
    ],
)
def test_any_other_bit_of_any_measured_column_is_named_on_the_same_kind_of_machine(column, change, table, results):
    changed(results, **{column: change})
    verified = verify(results, n=1, report=lambda line: None)
    assert outcomes(verified) == [DIFFERENT]
    assert [run["columns"] for run in verified["runs"].values()] == [[column]]
    assert "**not confirmed** at" in origin(table, results)


@pytest.mark.parametrize(
    "elsewhere", [{"processor": lambda value: "Other CPU, 2 cores"}, {"torch": lambda value: "2.6"}]
)
@pytest.mark.parametrize(
    ("column", "change", "outcome"),
    [
        ("recall@1", lambda value: value + 0.9 * TOLERANCE_POINTS / 100, CLOSE),
        ("recall@1", lambda value: value - 1.1 * TOLERANCE_POINTS / 100, DIFFERENT),
        ("chosen_iteration", lambda value: value + 1, CLOSE),
        ("positive_after", lambda values: values * (1 + 1e-6), CLOSE),
        ("n_queries", lambda value: value + 1, DIFFERENT),
    ],
)
def test_on_another_machine_fractions_may_differ_by_the_tolerance(elsewhere, column, change, outcome, results):
    changed(results, **elsewhere, **{column: change})
    verified = verify(results, n=1, report=lambda line: None)
    assert outcomes(verified) == [outcome]
    assert [run["columns"] for run in verified["runs"].values()] == [[column] if outcome == DIFFERENT else []]


def test_without_the_name_of_a_processor_the_machine_counts_as_another(table, results):
    table.assign(**{"recall@1": table["recall@1"] + 1e-9}).drop(columns="processor").to_parquet(results)
    assert outcomes(verify(results, n=1, report=lambda line: None)) == [CLOSE]


def test_other_data_and_old_names_and_a_missing_gpu_are_refused(table, results, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    table.assign(card_sha256="0" * 64).to_parquet(results)
    with pytest.raises(ConfigError, match="dataset tiny differs from that of the results"):
        verify(results)
    table.rename(columns={"horizontal_flip": "mirror"}).to_parquet(results)
    with pytest.raises(ConfigError, match=r"old names of settings: got mirror; .*rename_results.py"):
        verify(results)
    table.assign(device="NVIDIA H100").to_parquet(results)
    with pytest.raises(ConfigError, match=r"needs a GPU \(NVIDIA H100\): torch finds none"):
        verify(results)
    assert not results.with_name("verified.json").exists()


def test_a_table_that_was_made_again_is_not_verified(table, results):
    verify(results, n=1, report=lambda line: None)
    assert "verified" in origin(table, results)
    table.assign(title="made again").to_parquet(results)
    assert "verified" not in origin(table, results)


def test_renaming_keeps_the_values_and_the_outcome_of_verified_runs(table, results):
    verify(results, n=1, report=lambda line: None)
    before = pd.read_parquet(results)
    assert run_script("rename_results.py", str(results), "--title", "a new title").returncode == 0
    renamed = pd.read_parquet(results)
    assert set(renamed["title"]) == {"a new title"}
    pd.testing.assert_frame_equal(renamed.drop(columns="title"), before.drop(columns="title"))
    assert "verified" in origin(renamed, results)
    renamed.assign(title="made again").to_parquet(results)
    assert run_script("rename_results.py", str(results)).returncode == 0
    assert "verified" not in origin(renamed, results)
    refused = run_script("rename_results.py", "nowhere.parquet")
    assert refused.returncode == 1
    assert refused.stderr.startswith("nowhere.parquet: no such table of results; name a results.parquet")


def test_several_versions_of_the_code_are_named(table, results):
    table = table.copy()
    table.loc[0, ["code_sha256", "git_commit"]] = "abcdefghij", "0123456789 with changes"
    assert origin(table, results).startswith(
        "**Made by 2 versions of the code**: code `abcdefgh` (commit 01234567 with"
    )


def test_commits_with_the_same_code_are_one_version(table, results):
    table = table.assign(code_sha256="abcdefghij", git_commit="0123456789")
    table.loc[0, "git_commit"] = "9876543210 with changes"
    assert origin(table, results).startswith("Made by code `abcdefgh` (commits 98765432 with changes and 01234567)")


def test_every_run_of_the_committed_sample_has_a_config_again(tmp_path):
    for _, rows in sample_table().groupby("run_id"):
        row, resolved = rows.iloc[0], config_of(rows, str(tmp_path)).resolved() | {"dataset": rows["dataset"].iloc[0]}
        lengths = {row["iterations"], *rows.get("length", [])}
        assert resolved.pop("report_at", [row["iterations"]]) == sorted(lengths)
        assert {name: row[name] for name, value in resolved.items() if value is not None} == {
            name: value for name, value in resolved.items() if value is not None
        }


def test_the_command_exits_with_1_and_names_the_columns_that_differ(results):
    changed(results, **{"recall@1": lambda value: value + 0.5})
    answer = run_script("verify_results.py", str(results.parent), "--runs", "1")
    assert answer.returncode == 1
    assert f"{DIFFERENT} recall@1" in answer.stdout
    assert "1 of 1 runs differ from" in answer.stderr
    missing = run_script("verify_results.py", str(ROOT / "hloss"))
    assert (missing.returncode, "must be a folder with results.parquet" in missing.stderr) == (1, True)
