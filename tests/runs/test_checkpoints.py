"""Checkpoints: after a kill, a signal, a full disk or a broken checkpoint a run ends with the same result."""

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
from hloss.runs.errors import GPUMemoryError, RunError, RunStopped
from hloss.runs.files import run_lock
from hloss.runs.run import run

KILLING = Path(__file__).parents[1] / "helpers" / "killing.py"


RANDOM = {"crop": 15, "horizontal_flip": True, "dropout": 0.3, "refit": True}
SHORT = {"batch_size": 16, "iterations": 36, "validate_every": 6}


@pytest.fixture
def settings(settings):
    """A run with dropout, crops, horizontal flips and refit, which saves a checkpoint after every iteration."""
    return settings | RANDOM | SHORT


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    """The folder of a complete run with these settings, except that it was never interrupted."""
    places = {"data_dir": str(tiny_data), "runs_dir": str(tmp_path_factory.mktemp("whole"))}
    config = parse_config({"dataset": "tiny", "images_per_class": 4, "device": "cpu", **places, **RANDOM, **SHORT})
    run(config, lambda line: None)
    return config.folder


def assert_same_outcome(folder, expected):
    """Compare all results bit for bit, except times, memory and provenance."""
    timed = ("training_seconds", "peak_memory_mib", "provenance")
    one, other = (json.loads((f / "result.json").read_text()) for f in (folder, expected))
    for result in (one, other):
        result["lengths"] = [{k: v for k, v in at.items() if k not in timed} for at in result["lengths"]]
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert one["network_sha256"]
    assert np.array_equal(np.load(folder / "embeddings.npy"), np.load(expected / "embeddings.npy"))
    pd.testing.assert_frame_equal(*(pd.read_parquet(f / "history.parquet") for f in (folder, expected)))
    assert not list(folder.glob("*checkpoint*"))


@pytest.mark.parametrize(
    ("kills", "iterations", "seed"),
    [(6, 36, 0), *(pytest.param(24, 150, s, marks=pytest.mark.slow) for s in range(1, 5))],
)
def test_killed_run_continues_to_the_same_result(kills, iterations, seed, settings, tmp_path):
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
    assert any(".checkpoint.new.pt.part" in a["left"] for a in attempts), "no kill while a checkpoint was written"
    if kills > 20:
        assert any(a["left"] and "checkpoint.pt" not in a["left"] for a in attempts), "no kill between the renames"
    assert any(line.startswith("continued from iteration") for line in lines)
    assert_same_outcome(parse_config(settings).folder, whole.folder)


def interrupted(config, at="iteration 30/"):
    """Interrupt a run right before it reports the validation of an iteration."""

    def report(line):
        if line.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, report)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_the_loop_saves_after_the_iteration(number, settings, uninterrupted):
    config = parse_config({**settings, "checkpoint_seconds": 1e6})
    before = signal.getsignal(number)

    def report(line):
        if line.startswith("iteration 30/"):
            os.kill(os.getpid(), number)

    with pytest.raises(RunStopped, match=f"stopped by {number.name}; start the run again to continue it"):
        run(config, report)
    assert signal.getsignal(number) is before
    status = read_status(config.folder)
    assert (status["state"], status["iteration"], status["retry"]) == ("stopped", 30, True)
    assert number.name in status["message"]
    lines = []
    run(config, lines.append)
    assert lines[0] == "continued from iteration 30 (stage choose)"
    assert read_status(config.folder)["state"] == "complete"
    assert_same_outcome(config.folder, uninterrupted)


def test_signal_outside_the_loop_stops_at_once(settings, uninterrupted):
    config = parse_config(settings)

    def report(line):
        if line.startswith("test Recall@1"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped):
        run(config, report)
    assert read_status(config.folder)["state"] == "stopped"
    lines = []
    run(config, lines.append)
    assert lines[0].endswith("(stage refit)")
    assert_same_outcome(config.folder, uninterrupted)


def test_run_in_another_thread_handles_no_signals(settings, uninterrupted):
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
    "truncated": (truncated, "is skipped: it cannot be read"),
    "empty": (lambda file: os.truncate(file, 0), "is skipped: it cannot be read"),
    "no archive": (lambda file: file.write_bytes(b"\x80\x02}q\x00."), "is skipped"),
    "another object": (lambda file: torch.save([1, 2], file), "is skipped: it is not a checkpoint of a run"),
    "another run": (foreign, "is skipped: it was saved with other settings"),
    "other code": (of_other_code, "is skipped: it was saved with other code or data"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_checkpoint_is_reported_and_the_previous_one_used(kind, settings, uninterrupted):
    breaks, message = BROKEN[kind]
    config = parse_config(settings)
    interrupted(config)
    breaks(config.folder / "checkpoint.pt")
    lines = []
    run(config, lines.append)
    assert lines[0].startswith("checkpoint.pt ")
    assert message in lines[0]
    assert lines[1] == "continued from iteration 28 (stage choose)"
    assert_same_outcome(config.folder, uninterrupted)


def test_training_restarts_without_a_usable_checkpoint(settings, uninterrupted):
    config = parse_config(settings)
    interrupted(config)
    for file in config.folder.glob("checkpoint*.pt"):
        truncated(file)
    lines = []
    run(config, lines.append)
    assert [line.split()[0] for line in lines[:2]] == ["checkpoint.pt", "checkpoint.previous.pt"]
    assert lines[2] == "no checkpoint is usable: training starts from the beginning"
    assert_same_outcome(config.folder, uninterrupted)


STARVED = """
import json, resource, sys
from pathlib import Path
from hloss.runs.config import parse_config
from hloss.runs.run import run
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # The size limit of a file makes the write fail half-way.
run(parse_config(json.loads(Path(sys.argv[1]).read_text())))
"""


def test_full_disk_keeps_the_previous_checkpoint(settings, uninterrupted, tmp_path):
    config = parse_config(settings)
    interrupted(config)
    kept = (config.folder / "checkpoint.pt").read_bytes()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    answer = subprocess.run([sys.executable, "-c", STARVED, str(file)], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "cannot write a checkpoint (" in answer.stdout
    assert "OSError" in answer.stderr or "File too large" in answer.stderr
    assert (config.folder / "checkpoint.pt").read_bytes() == kept
    assert not list(config.folder.glob(".*.part"))
    status = read_status(config.folder)
    assert (status["state"], status["retry"]) == ("failed", True)
    lines = []
    run(config, lines.append)
    assert lines[0] == "continued from iteration 29 (stage choose)"
    assert_same_outcome(config.folder, uninterrupted)


def test_failed_save_keeps_the_checkpoints(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"a": 1})
    save_checkpoint(tmp_path, {"a": 2})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(content, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="cannot be written"):
        save_checkpoint(tmp_path, {"a": 3})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert load_checkpoint(tmp_path, {"a": 2}, print) == {"a": 2}


@pytest.mark.parametrize(
    ("error", "raised", "retry"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), GPUMemoryError, True),
        (RuntimeError("Connection closed by peer"), RuntimeError, True),
        (MemoryError(), MemoryError, True),
        (TypeError("no such thing"), TypeError, False),
    ],
    ids=repr,
)
def test_status_retry_depends_on_the_error(error, raised, retry, settings, monkeypatch, uninterrupted):
    config = parse_config(settings)

    def report(line):
        if line.startswith("iteration 30/"):
            raise error

    with pytest.raises(raised):
        run(config, report)
    status = read_status(config.folder)
    assert (status["state"], status["iteration"], status["retry"]) == ("failed", 30, retry)
    run(config, lambda line: None)
    assert_same_outcome(config.folder, uninterrupted)


def test_complete_run_removes_left_over_checkpoints(settings):
    config = parse_config(settings)
    result = run(config, lambda line: None)
    write_status(config.folder, "running", 60)
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "failed.pt"):
        (config.folder / name).write_bytes(b"left behind")
    assert run(config, lambda line: None) == result
    assert read_status(config.folder)["state"] == "complete"
    assert [file.name for file in config.folder.glob("*.pt")] == ["network.pt"]


def test_refuses_a_second_process_on_a_run(settings, monkeypatch):
    config = parse_config(settings)
    interrupted(config)
    status = read_status(config.folder)
    monkeypatch.setattr("hloss.runs.run.run_lock", partial(run_lock, patience_seconds=0.1))
    with run_lock(config.folder), pytest.raises(RunError, match="another process is working in"):
        run(config)
    assert read_status(config.folder) == status
