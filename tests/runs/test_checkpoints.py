"""Checkpoints: a run that was killed or stopped, or whose disk or checkpoint failed, ends with the same result."""

import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hloss.runs.checkpoints import load_checkpoint, read_status, save_checkpoint, write_status
from hloss.runs.config import parse_config
from hloss.runs.errors import RunError, RunStopped
from hloss.runs.files import run_lock
from hloss.runs.run import run

KILLING = Path(__file__).parents[1] / "helpers" / "killing.py"


@pytest.fixture
def settings(tiny_data, tmp_path):
    """A run with everything that has a state: dropout, crops, mirrors, two stages; saved after every iteration."""
    return {
        "dataset": "tiny",
        "batch_size": 16,
        "images_per_class": 4,
        "crop": 15,
        "horizontal_flip": True,
        "dropout": 0.3,
        "iterations": 60,
        "validate_every": 6,
        "refit": True,
        "data_dir": str(tiny_data),
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "checkpoint_seconds": 0.0,
    }


@pytest.fixture
def uninterrupted(settings, tmp_path):
    config = parse_config({**settings, "runs_dir": str(tmp_path / "whole")})
    run(config, lambda line: None)
    return config.folder


def assert_same_outcome(folder, expected):
    """Weights, metrics and everything else but time and memory, bit for bit."""
    timed = ("training_seconds", "peak_memory_mib", "provenance")
    one, other = (json.loads((f / "result.json").read_text()) for f in (folder, expected))
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert one["network_sha256"]
    assert np.array_equal(np.load(folder / "embeddings.npy"), np.load(expected / "embeddings.npy"))
    pd.testing.assert_frame_equal(*(pd.read_parquet(f / "history.parquet") for f in (folder, expected)))
    assert not list(folder.glob("*checkpoint*"))


@pytest.mark.parametrize(
    ("kills", "iterations", "seed"),
    [(6, 60, 0), *(pytest.param(24, 150, s, marks=pytest.mark.slow) for s in range(1, 5))],
)
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_been(kills, iterations, seed, settings, tmp_path):
    settings["iterations"] = iterations
    whole = parse_config({**settings, "runs_dir": str(tmp_path / "whole")})
    run(whole, lambda line: None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    command = [sys.executable, str(KILLING), str(file), str(kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    said = [json.loads(line) for line in answer.stdout.splitlines()]
    attempts, lines = [s for s in said if "moment" in s], [s["line"] for s in said if "line" in s]
    assert sum(a["killed"] for a in attempts) >= kills * 5 / 6, attempts
    assert any("checkpoint.pt" in a["left"] for a in attempts)
    assert any(".checkpoint.new.pt.part" in a["left"] for a in attempts), "never while one was written"
    if kills > 20:
        assert any(a["left"] and "checkpoint.pt" not in a["left"] for a in attempts), "never between the renames"
    assert any(line.startswith("continued from iteration") for line in lines)
    assert_same_outcome(parse_config(settings).folder, whole.folder)


def interrupted(config, at="iteration 30/"):
    """Break a run off right before the validation of an iteration is reported."""

    def report(line):
        if line.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, report)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_iteration_and_saves(number, settings, uninterrupted):
    config = parse_config({**settings, "checkpoint_seconds": 1e6})
    before = signal.getsignal(number)

    def report(line):
        if line.startswith("iteration 30/"):
            os.kill(os.getpid(), number)

    with pytest.raises(RunStopped, match=f"stopped by {number.name}; start it again and it continues"):
        run(config, report)
    assert signal.getsignal(number) is before
    status = read_status(config.folder)
    assert (status["state"], status["iteration"], status["retry"]) == ("stopped", 30, True)
    assert number.name in status["message"]
    lines = []
    run(config, lines.append)
    assert lines[0] == "continued from iteration 30 (choose)"
    assert read_status(config.folder)["state"] == "complete"
    assert_same_outcome(config.folder, uninterrupted)


def test_a_signal_outside_the_loop_stops_at_once(settings, uninterrupted):
    config = parse_config(settings)

    def report(line):
        if line.startswith("test Recall@1"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped):
        run(config, report)
    assert read_status(config.folder)["state"] == "stopped"
    lines = []
    run(config, lines.append)
    assert lines[0].endswith("(refit)")
    assert_same_outcome(config.folder, uninterrupted)


def test_a_run_outside_the_main_thread_leaves_signals_alone(settings, uninterrupted):
    config = parse_config(settings)
    thread = threading.Thread(target=run, args=(config, lambda line: None))
    thread.start()
    thread.join()
    assert_same_outcome(config.folder, uninterrupted)


def truncated(file):
    os.truncate(file, file.stat().st_size // 2)


def foreign(file):
    checkpoint = torch.load(file, weights_only=True)
    torch.save({**checkpoint, "config": {**checkpoint["config"], "seed": 1}}, file)


def of_other_code(file):
    checkpoint = torch.load(file, weights_only=True)
    torch.save({**checkpoint, "fingerprint": {"code_sha256": "other"}}, file)


BROKEN = {
    "truncated": (truncated, "cannot be read and is skipped"),
    "empty": (lambda file: os.truncate(file, 0), "cannot be read and is skipped"),
    "no archive": (lambda file: file.write_bytes(b"\x80\x02}q\x00."), "is skipped"),
    "another object": (lambda file: torch.save([1, 2], file), "is no checkpoint of a run and is skipped"),
    "another run": (foreign, r"is of another run (config differ) and is skipped"),
    "other code": (of_other_code, r"is of another run (fingerprint differ) and is skipped"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_falls_back_to_the_one_before_and_says_so(kind, settings, uninterrupted):
    breaks, message = BROKEN[kind]
    config = parse_config(settings)
    interrupted(config)
    breaks(config.folder / "checkpoint.pt")
    lines = []
    run(config, lines.append)
    assert lines[0].startswith("checkpoint.pt ")
    assert message in lines[0]
    assert lines[1] == "continued from iteration 28 (choose)"
    assert_same_outcome(config.folder, uninterrupted)


def test_without_any_usable_checkpoint_training_begins_anew_and_says_so(settings, uninterrupted):
    config = parse_config(settings)
    interrupted(config)
    for file in config.folder.glob("checkpoint*.pt"):
        truncated(file)
    lines = []
    run(config, lines.append)
    assert [line.split()[0] for line in lines[:2]] == ["checkpoint.pt", "checkpoint.previous.pt"]
    assert lines[2] == "no checkpoint can be used: training begins anew"
    assert_same_outcome(config.folder, uninterrupted)


STARVED = """
import json, resource, sys
from pathlib import Path
from hloss.runs.config import parse_config
from hloss.runs.run import run
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a file cannot grow beyond: the write fails half-way
run(parse_config(json.loads(Path(sys.argv[1]).read_text())))
"""


def test_a_full_disk_loses_nothing_that_was_complete(settings, uninterrupted, tmp_path):
    config = parse_config(settings)
    interrupted(config)
    kept = (config.folder / "checkpoint.pt").read_bytes()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    answer = subprocess.run([sys.executable, "-c", STARVED, str(file)], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "no checkpoint, the one before stays" in answer.stdout
    assert "OSError" in answer.stderr or "File too large" in answer.stderr
    assert (config.folder / "checkpoint.pt").read_bytes() == kept
    assert not list(config.folder.glob(".*.part"))
    status = read_status(config.folder)
    assert (status["state"], status["retry"]) == ("failed", True)
    lines = []
    run(config, lines.append)
    assert lines[0] == "continued from iteration 29 (choose)"
    assert_same_outcome(config.folder, uninterrupted)


def test_what_cannot_be_saved_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"a": 1})
    save_checkpoint(tmp_path, {"a": 2})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(content, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="could not be written"):
        save_checkpoint(tmp_path, {"a": 3})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert load_checkpoint(tmp_path, {"a": 2}, print) == {"a": 2}


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("Connection closed by peer"), True),
        (MemoryError(), True),
        (TypeError("no such thing"), False),
    ],
    ids=repr,
)
def test_what_another_attempt_may_overcome_is_tried_again(error, retry, settings, monkeypatch, uninterrupted):
    config = parse_config(settings)

    def report(line):
        if line.startswith("iteration 30/"):
            raise error

    with pytest.raises(type(error)):
        run(config, report)
    status = read_status(config.folder)
    assert (status["state"], status["iteration"], status["retry"]) == ("failed", 30, retry)
    run(config, lambda line: None)
    assert_same_outcome(config.folder, uninterrupted)


def test_what_was_killed_right_after_its_result_is_tidied(settings):
    config = parse_config(settings)
    result = run(config, lambda line: None)
    write_status(config.folder, "running", 60)
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "failed.pt"):
        (config.folder / name).write_bytes(b"left behind")
    assert run(config, lambda line: None) == result
    assert read_status(config.folder)["state"] == "complete"
    assert [file.name for file in config.folder.glob("*.pt")] == ["network.pt"]


def test_a_second_process_on_a_run_is_refused_and_disturbs_nothing(settings, monkeypatch):
    config = parse_config(settings)
    interrupted(config)
    status = read_status(config.folder)
    monkeypatch.setattr("hloss.runs.run.run_lock", partial(run_lock, patience_seconds=0.1))
    with run_lock(config.folder), pytest.raises(RunError, match="another process is working in"):
        run(config)
    assert read_status(config.folder) == status
