"""The training loop: a loss that is not finite, a full disk, what a refit reports."""

import os
import signal
import time

import pandas as pd
import pytest
import torch

from hloss import HistogramLoss
from hloss.losses.checks import verify_or_defer
from hloss.numerics import NotFiniteError
from hloss.runs import loop
from hloss.runs.checkpoints import read_status
from hloss.runs.config import RunConfig, parse_config
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import RunError, RunStopped
from hloss.runs.run import run
from hloss.runs.step import Batches


def quiet(line):
    pass


class NotANumber(torch.nn.Module):
    def forward(self, embeddings, labels):
        return embeddings.sum() * float("nan")


def test_a_loss_that_is_not_finite_stops_the_run(settings, monkeypatch):
    monkeypatch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: NotANumber())
    with pytest.raises(RunError, match="nan at iteration 1"):
        run(parse_config(settings), quiet)


def test_a_full_disk_does_not_hide_that_the_loss_is_not_finite(settings, monkeypatch):
    def full(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")

    monkeypatch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: NotANumber())
    monkeypatch.setattr(torch, "save", full)
    config = parse_config(settings)
    with pytest.raises(RunError, match=r"nan at iteration 1; .* lost: .*failed\.pt cannot be written"):
        run(config, quiet)
    status = read_status(config.folder)
    assert (status["state"], status["retry"]) == ("failed", False)
    assert "nan at iteration 1" in status["message"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_state(settings, monkeypatch):
    config = parse_config({**settings, "iterations": 30})

    class FailingAtTheTwentieth(HistogramLoss):
        calls = 0

        def forward(self, embeddings, labels):
            self.calls += 1
            return super().forward(embeddings, labels) * (float("nan") if self.calls == 20 else 1)

    monkeypatch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: FailingAtTheTwentieth())
    with pytest.raises(RunError, match="the loss is nan at iteration 20; try a lower learning_rate"):
        run(config, lambda line: None)
    status = read_status(config.folder)
    assert (status["state"], status["iteration"], status["retry"]) == ("failed", 19, False)
    assert "the loss is nan at iteration 20" in status["message"]
    checkpoint = torch.load(config.folder / "checkpoint.pt", weights_only=True)
    failed = torch.load(config.folder / "failed.pt", weights_only=True)
    assert checkpoint["progress"]["iteration"] == failed["progress"]["iteration"] == 19
    weights = {k: v for k, v in checkpoint["network"].items() if k.endswith(("weight", "bias"))}
    assert all(torch.equal(value, failed["network"][name]) for name, value in weights.items())
    assert failed["batch"] == [int(i) for i in failed["batch"]]
    assert len(failed["batch"]) == 24
    assert not (config.folder / "result.json").exists()


@pytest.mark.parametrize(("validate_every", "when"), [(6, "at iteration 2"), (1, "after iteration 1")])
def test_embeddings_that_loss_or_validation_refuse_stop_the_run_the_same_way(validate_every, when, settings):
    config = parse_config({**settings, "learning_rate": 1e30, "validate_every": validate_every})
    with pytest.raises(RunError, match=f"{when}; try a lower learning_rate"):
        run(config, lambda line: None)
    status = read_status(config.folder)
    assert (status["state"], status["retry"]) == ("failed", False)
    assert (config.folder / "failed.pt").exists()


@pytest.fixture
def read_every_ten(monkeypatch):
    """Losses are read as on a GPU."""
    monkeypatch.setattr(loop, "reading_interval", lambda device: 10)


class BadAt(HistogramLoss):
    """Calls `bad` with the loss and the number of the call, which returns the loss."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, embeddings, labels):
        self.calls += 1
        return self.bad(super().forward(embeddings, labels), self.calls)


def nan_from_17(loss, call):
    return loss + (float("nan") if call >= 17 else 0)  # a gradient without NaN, so that training goes on


def refused_from_17(loss, call):
    """A check of the embeddings that the loss postpones."""

    def verify(numbers):
        if numbers != [0, 0]:
            raise NotFiniteError(f"embeddings rows [{numbers[0]}] hold NaN or infinity")

    verify_or_defer(torch.tensor([call, call] if call >= 17 else [0, 0]), verify)
    return loss


def raising_at_19(loss, call):
    if call == 19:
        raise ValueError("the batch has no positive pair")
    return nan_from_17(loss, call)


@pytest.mark.parametrize(
    ("bad", "message", "read"),
    [
        (nan_from_17, "the loss is nan", 20),
        (refused_from_17, r"embeddings rows \[17\] hold NaN or infinity", 20),
        (raising_at_19, "the loss is nan", 18),
    ],
)
def test_a_loss_read_later_ends_the_run_with_the_iteration_at_which_it_began(
    bad, message, read, settings, monkeypatch, read_every_ten
):
    config = parse_config({**settings, "iterations": 30, "validate_every": 30, "checkpoint_seconds": 1e6})
    batches = Batches(open_dataset(config.data_folder), open_dataset(config.data_folder).rows("train"), config)
    for _ in range(17):
        next(batches)
    batches.close()
    monkeypatch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: BadAt(bad))
    message += rf" at iteration 17 \(detected after iteration {read}\); try a lower learning_rate"
    with pytest.raises(RunError, match=message):
        run(config, quiet)
    failed = torch.load(config.folder / "failed.pt", weights_only=True)
    assert failed["batch"] == batches.rows[batches.current].tolist()
    assert failed["progress"]["iteration"] == read
    assert len(failed["progress"]["losses"]["choose"]) == 16
    assert not (config.folder / "result.json").exists()


def test_losses_read_later_change_no_result(settings, tmp_path, monkeypatch):
    """Validations, checkpoints and the end come between two readings."""
    settings = {**settings, "iterations": 27, "validate_every": 12}
    expected = run(parse_config(settings), quiet)
    history = pd.read_parquet(parse_config(settings).folder / "history.parquet")
    monkeypatch.setattr(loop, "reading_interval", lambda device: 10)
    for seconds in (0.0, 1e6):
        config = parse_config({**settings, "checkpoint_seconds": seconds, "runs_dir": str(tmp_path / str(seconds))})
        found = run(config, quiet)
        assert found["network_sha256"] == expected["network_sha256"]
        assert found["metrics"] == expected["metrics"]
        pd.testing.assert_frame_equal(pd.read_parquet(config.folder / "history.parquet"), history)


def test_a_run_stopped_between_two_readings_continues_to_the_same_bits(settings, tmp_path, monkeypatch, read_every_ten):
    settings = {**settings, "iterations": 27, "checkpoint_seconds": 1e6, "horizontal_flip": True}
    whole = run(parse_config(settings), quiet)
    config = parse_config({**settings, "images": "device", "runs_dir": str(tmp_path / "stopped")})

    def stop_at_13(loss, call):
        if call == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: BadAt(stop_at_13))
        with pytest.raises(RunStopped):
            run(config, quiet)
    saved = torch.load(config.folder / "checkpoint.pt", weights_only=True)["progress"]
    assert saved["iteration"] == len(saved["losses"]["choose"]) == 13
    lines = []
    assert run(config, lines.append)["network_sha256"] == whole["network_sha256"]
    assert lines[0] == "continued from iteration 13 (stage choose)"


def test_a_refit_tells_its_own_rate(settings, monkeypatch):
    """Without the seconds of the first training, here those of its validations."""
    monkeypatch.setattr(loop, "validation_recall", lambda *arguments: time.sleep(0.5) or 0.5)
    lines = []
    run(parse_config({**settings, "refit": True}), lines.append)
    rates = {line.split()[0]: int(line.split(" images/s")[0].split()[-1]) for line in lines if "images/s" in line}
    assert rates["refit"] > 2 * rates["iteration"]
