"""The training loop: a loss that is not finite, a full disk, what a refit reports."""

import time

import pytest
import torch

from hloss import HistogramLoss
from hloss.runs import loop
from hloss.runs.checkpoints import read_status
from hloss.runs.config import RunConfig, parse_config
from hloss.runs.errors import RunError
from hloss.runs.run import run


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
    with pytest.raises(RunError, match=r"nan at iteration 1; .* lost: .*failed\.pt could not be written"):
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


def test_a_refit_tells_its_own_rate(settings, monkeypatch):
    """Without the seconds of the first training, here those of its validations."""
    monkeypatch.setattr(loop, "validation_recall", lambda *arguments: time.sleep(0.5) or 0.5)
    lines = []
    run(parse_config({**settings, "refit": True}), lines.append)
    rates = {line.split()[0]: int(line.split(" images/s")[0].split()[-1]) for line in lines if "images/s" in line}
    assert rates["refit"] > 2 * rates["iteration"]
