"""One run: repeatable, resumable, chosen on validation, refused before any work when it cannot be."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from hloss.checkpoints import RunError, held
from hloss.experiment import ConfigError, RunConfig, code_sha256, config_from_notebook, parse_config
from hloss.retrieval import first_match_ranks
from hloss.training import run


@pytest.fixture
def settings(tiny_data, tmp_path):
    return {
        "dataset": "tiny",
        "batch_size": 24,
        "images_per_class": 4,
        "iterations": 12,
        "validate_every": 4,
        "data_dir": str(tiny_data),
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "checkpoint_seconds": 0.0,
    }


def quiet(line):
    pass


def outcome(result):
    return {k: result[k] for k in ("metrics", "chosen", "validation_recall@1", "similarity_density", "panel")}


def test_the_same_config_gives_the_same_result_bit_for_bit(settings, tmp_path):
    first = run(parse_config(settings), quiet)
    second = run(parse_config({**settings, "runs_dir": str(tmp_path / "again")}), quiet)
    other_seed = run(parse_config({**settings, "seed": 1}), quiet)
    assert outcome(first) == outcome(second)
    assert outcome(first) != outcome(other_seed)


def test_the_files_agree_with_the_result(settings, tiny_data):
    config = parse_config(settings)
    result = run(config, quiet)
    embeddings = torch.from_numpy(np.load(config.folder / "embeddings.npy"))
    index = pd.read_parquet(tiny_data / "tiny" / "index.parquet")
    labels = torch.tensor(index[index.split == "test"].label.to_numpy())
    ranks = np.load(config.folder / "ranks.npy")
    assert ranks.tolist() == first_match_ranks(embeddings, labels).tolist()
    assert result["metrics"]["recall@1"] == np.mean(ranks == 1)
    history = pd.read_parquet(config.folder / "history.parquet")
    validated = history.dropna()
    assert validated["iteration"].tolist() == [4, 8, 12]
    best = validated["validation_recall@1"].idxmax()
    assert result["chosen"]["iteration"] == validated["iteration"][best]
    assert result["validation_recall@1"] == validated["validation_recall@1"][best]
    for query, neighbours, hits in zip(*result["panel"].values(), strict=True):
        assert hits == (index.label[neighbours] == index.label[query]).tolist()
    assert sum(result["similarity_density"]["after"]["positive"]) == pytest.approx(1)


def test_a_killed_run_continues_to_the_same_result(settings, tmp_path):
    whole = run(parse_config(settings), quiet)
    broken = parse_config({**settings, "runs_dir": str(tmp_path / "broken")})

    def killed_after_the_second_validation(line):
        if line.startswith("iteration 12/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, killed_after_the_second_validation)
    assert not (broken.folder / "result.json").exists()
    lines = []
    assert outcome(run(broken, lines.append)) == outcome(whole)
    assert lines[0] == "continued from iteration 11 (choose)"
    assert not list(broken.folder.glob("checkpoint*"))


def test_a_finished_run_is_returned_and_one_of_other_code_redone(settings, monkeypatch):
    config = parse_config(settings)
    lines = []
    run(config, quiet)
    run(config, lines.append)
    assert lines == []
    monkeypatch.setattr("hloss.experiment.code_sha256", lambda: "other")
    assert run(config, lines.append)["fingerprint"]["code_sha256"] == "other"
    assert lines


def test_training_beats_no_training(settings):
    trained = run(parse_config({**settings, "iterations": 60, "validate_every": 20}), quiet)
    untrained = run(parse_config({**settings, "iterations": 0, "loss": "none"}), quiet)
    assert untrained["metrics"]["recall@1"] < trained["metrics"]["recall@1"]


class NotANumber(torch.nn.Module):
    def forward(self, embeddings, labels):
        return embeddings.sum() * float("nan")


def test_a_loss_that_is_not_finite_stops_the_run(settings, monkeypatch):
    monkeypatch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: NotANumber())
    with pytest.raises(RunError, match="nan at iteration 1"):
        run(parse_config(settings), quiet)


def test_a_second_process_on_a_run_is_refused(settings, monkeypatch):
    config = parse_config(settings)
    config.folder.mkdir(parents=True)
    with (
        held(config.folder),
        pytest.raises(RunError, match="another process"),
        held(config.folder, patience_seconds=0.1),
    ):
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_bin": 50}, r"n_bin=50 is no setting of a run \(did you mean n_bins\?\)"),
        ({"n_bins": 0}, "n_bins must be a whole number of at least 1, got 0"),
        ({"n_bins": "fifty"}, "n_bins='fifty': Input should be a valid integer"),
        (
            {"loss": "histogramm"},
            r"loss='histogramm' is unknown, allowed are .*\(did you mean histogram\?\)",
        ),
        ({"loss": "binomial", "n_bins": 50}, "loss 'binomial' takes no n_bins, it takes alpha, beta, C"),
        ({"iterations": 0}, "go together"),
        ({"network": "pixels"}, "nothing to train"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"study": "../escape"}, "study='../escape' must be a name"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(wrong)


def test_a_notebook_variable_that_is_no_setting_is_refused():
    assert config_from_notebook({"loss": "binomial", "_hidden": 1, "json": json}).loss == "binomial"
    with pytest.raises(ConfigError, match="bins=5 is no setting"):
        config_from_notebook({"loss": "histogram", "bins": 5})


def test_run_id_names_what_decides_the_result():
    default = parse_config({})
    assert parse_config({"n_bins": 200, "kernel": "triangular"}).run_id == default.run_id
    assert parse_config({"device": "cpu", "study": "other", "threads": 2}).run_id == default.run_id
    assert parse_config({"n_bins": 100}).run_id != default.run_id
    assert parse_config({"seed": 1}).run_id != default.run_id


def test_the_command_line_is_a_door(settings, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**settings, "dataset": "tinny"}))
    command = [sys.executable, "-m", "hloss.training", str(file)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "dataset 'tinny' is not prepared" in refused.stderr
    file.write_text(json.dumps(settings))
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((parse_config(settings).folder / "result.json").read_text())
    assert outcome(result) == outcome(run(parse_config({**settings, "runs_dir": str(tmp_path / "b")}), quiet))


def test_the_code_hash_covers_every_module_that_a_run_imports():
    code = "import sys, hloss.training; print([m for m in sys.modules if m.startswith('hloss.')])"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    from hloss.experiment import SOURCES

    assert {f"hloss.{name}" for name in SOURCES} == set(json.loads(answer.stdout.replace("'", '"')))
    assert len(code_sha256()) == 64
