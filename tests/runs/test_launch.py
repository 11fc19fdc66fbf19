"""Runs on several devices, tested with two CPU processes over gloo: they equal one process with the whole batch."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from data_prep.prepared import create_images, finish, new_folder
from hloss.runs import run as run_module
from hloss.runs.checkpoints import StopSignals, read_status
from hloss.runs.config import parse_config
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import ConfigError, RunError, RunStopped
from hloss.runs.evaluation import weights_sha256
from hloss.runs.files import run_lock
from hloss.runs.load import load_run
from hloss.runs.loop import Loop, RunContext
from hloss.runs.models import batchnorms, build_network
from hloss.runs.run import run
from tests.helpers.processes import execute

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A data folder with the dataset `people`: 10 classes of 4 noisy images of 160 x 60 pixels."""
    rng = np.random.default_rng(0)
    data = tmp_path_factory.mktemp("data")
    label = np.repeat(np.arange(10), 4)
    clothes = rng.normal(0, 20, (10, 8, 1, 3))[label] + rng.normal(125, 40, (40, 8, 1, 3))
    with new_folder(data / "people") as folder:
        images = create_images(folder, 40, 160, 60, 3)
        images[:] = (clothes.repeat(20, 1) + rng.normal(0, 30, (40, 160, 60, 3))).clip(0, 255).astype(np.uint8)
        images.flush()
        split = np.where(label < 6, "train", np.where(label < 8, "val", "test"))
        index = {"label": label, "split": split, "role": "both", "camera": -1, "source": "noise"}
        card = {"name": "people", "protocol": "all-vs-rest", "recall_at": [1, 2], "val_from_train": True}
        finish(folder, pd.DataFrame(index), card)
    return data


@pytest.fixture
def settings(people, tmp_path):
    return {
        "dataset": "people",
        "network": "glyphnet",
        "batchnorm": "frozen",
        "precision": "64-true",
        "batch_size": 6,
        "images_per_class": 3,
        "learning_rate": 1e-4,
        "iterations": 20,
        "validate_every": 10,
        "data_dir": str(people),
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
    }


def keep_checkpoints():
    run_module.remove_checkpoints = lambda folder: None


def started(settings, tmp_path):
    """Execute a run and return its weights after the last iteration and its result."""
    ended = execute(settings, tmp_path, keep_checkpoints)
    assert ended.code == 0, ended.errors
    folder = parse_config(settings).folder
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["iteration"] == settings["iterations"]
    return checkpoint["network"], json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    "network",
    [
        {"network": "glyphnet", "batchnorm": "frozen", "crop": 40, "horizontal_flip": True},
        pytest.param(
            {"network": "parts", "batchnorm": None, "dropout": 0.0, "batch_size": 4, "images_per_class": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda n: n["network"],
)
def test_two_processes_train_the_same_weights_as_one(network, settings, tmp_path):
    """After 20 iterations in float64 without dropout, weights agree within 1e-9, with and without slices."""
    settings = {**settings, **network}
    one, alone = started(settings, tmp_path)
    for several in ({"devices": 2}, {"devices": 2, "micro_batch": 1}):
        two, together = started({**settings, **several}, tmp_path)
        assert one.keys() == two.keys()
        for name, weights in one.items():
            assert weights.dtype in (torch.float64, torch.int64)
            assert (weights - two[name]).abs().max() <= 1e-9, name
        assert alone["metrics"] == together["metrics"]
        assert alone["chosen"] == together["chosen"]
    first, _ = started({**settings, "iterations": 1, "validate_every": 1}, tmp_path)
    moved = [(first[name] - weights).abs().max() for name, weights in one.items() if name.endswith(("weight", "bias"))]
    assert min(moved) > 1e-5, "training changes the weights"


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_processes_with_unequal_shares_embed_in_slices(micro_batch, settings, tmp_path):
    """Of nine images, one process embeds 5 in two or three slices and the other 4 in one or two."""
    settings = {**settings, "batch_size": 9, "iterations": 4, "validate_every": 2}
    one, alone = started(settings, tmp_path)
    two, together = started({**settings, "devices": 2, "micro_batch": micro_batch}, tmp_path)
    assert all((weights - two[name]).abs().max() <= 1e-9 for name, weights in one.items())
    assert alone["metrics"] == together["metrics"]


class Leaving(Loop):
    """At the end of training, each process saves the weights of its loss, its losses and its number of threads."""

    def train(self):
        super().train()
        progress = self.context.progress
        own = {"loss": self.loss.state_dict(), "losses": progress["losses"], "threads": torch.get_num_threads()}
        torch.save(own, f"{os.environ['LEFT']}/{os.environ['RANK']}.pt")


def leave():
    run_module.Loop = Leaving


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_random_loss_is_the_same_in_all_processes(micro_batch, settings, tmp_path):
    """Each process also has the threads of the settings, not those of OMP_NUM_THREADS."""
    pytest.importorskip("pytorch_metric_learning")
    random = {"loss": "pml:ArcFaceLoss", "miner": "DistanceWeightedMiner", "embedding_dim": 8, "dropout": 0.2}
    short = {"devices": 2, "iterations": 4, "validate_every": 2, "learning_rate": 1e-2, "threads": 2}
    given = {**settings, **random, **short, "micro_batch": micro_batch}
    ended = execute(given, tmp_path, leave, LEFT=str(tmp_path))
    assert ended.code == 0, ended.errors
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["losses"] == other["losses"]
    assert one["loss"].keys() == other["loss"].keys()
    assert one["loss"], "the loss has weights"
    assert all(torch.equal(value, other["loss"][name]) for name, value in one["loss"].items())
    assert (one["threads"], other["threads"]) == (2, 2)


class Stopping(Loop):
    """With STOP="STAGE ITERATION SIGNAL", the second process receives the signal in this iteration."""

    def step(self):
        super().step()
        progress = self.context.progress
        stage, iteration, name = os.environ["STOP"].split() or ("", 0, "")
        if os.environ["RANK"] == "1" and (progress["stage"], progress["iteration"]) == (stage, int(iteration)):
            os.kill(os.getpid(), signal.Signals[name])


def stop():
    run_module.Loop = Stopping


def test_processes_stopped_in_both_stages_continue_to_the_same_weights(settings, tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    random = {
        "loss": "pml:ArcFaceLoss",
        "miner": "DistanceWeightedMiner",
        "dropout": 0.2,
        "crop": 40,
        "horizontal_flip": True,
    }
    settings |= {**random, "devices": 2, "refit": True, "iterations": 6, "validate_every": 2, "learning_rate": 1e-2}
    whole = {**settings, "runs_dir": str(tmp_path / "whole")}
    for given, when in ((whole, ""), (settings, "choose 3 SIGTERM"), (settings, "refit 1 SIGTERM"), (settings, "")):
        ended = execute(given, tmp_path, stop, STOP=when)
        assert (ended.code == 0) == (when == ""), ended.errors
        status = read_status(parse_config(given).folder)
        expected = ("stopped", int(when.split()[1])) if when else ("complete", status["iteration"])
        assert (status["state"], status["iteration"]) == expected
    assert "continued from iteration 1 (stage refit)" in ended.printed
    one, other = (json.loads((parse_config(s).folder / "result.json").read_text()) for s in (whole, settings))
    for key in ("network_sha256", "metrics", "chosen", "validation_recall@1"):
        assert one[key] == other[key]


def test_live_batchnorm_becomes_synchronised_batchnorm(settings):
    """Only CUDA can execute it (`make check-gpu`), so this test checks that training inserts it."""
    config = parse_config({**settings, "batchnorm": "live", "devices": 2})
    fabric = SimpleNamespace(world_size=2, global_rank=0, device=torch.device("cpu"), setup=lambda *made: made)
    dataset = open_dataset(config.data_folder)
    context = RunContext(config, dataset, {}, fabric, StopSignals(False), print)
    network = build_network("glyphnet", dataset.images.shape[1:], 10)
    layers = len(batchnorms(network))
    loop = Loop(context, network, dataset.rows("train"), 1, None)
    loop.batches.close()
    kinds = {type(layer) for layer in batchnorms(loop.network)}
    assert (len(batchnorms(loop.network)), kinds) == (layers, {torch.nn.SyncBatchNorm})
    assert layers > 0


def test_run_continues_after_a_killed_process(settings, tmp_path):
    """torchrun ends the other process."""
    settings |= {"devices": 2, "iterations": 6, "validate_every": 2, "checkpoint_seconds": 0.0}
    whole = {**settings, "runs_dir": str(tmp_path / "whole")}
    assert execute(whole, tmp_path).code == 0
    script, file = tmp_path / "stopping.py", tmp_path / "config.json"
    script.write_text(
        "from tests.runs.test_launch import stop\nfrom hloss.runs import __main__\nstop()\n__main__.main()\n"
    )
    file.write_text(json.dumps(settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = ENVIRONMENT | {"STOP": "choose 4 SIGKILL", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([*torchrun, script, file], env=environment, capture_output=True, timeout=300).returncode != 0
    assert read_status(parse_config(settings).folder)["retry"] is True
    ended = execute(settings, tmp_path)
    assert ended.code == 0, ended.errors
    assert "continued from iteration" in ended.printed
    one, other = (json.loads((parse_config(s).folder / "result.json").read_text()) for s in (whole, settings))
    assert one["network_sha256"] == other["network_sha256"]


def test_run_on_several_devices_reports_and_returns_its_result(settings):
    config = parse_config({**settings, "devices": 2, "batchnorm": "slices", "precision": "32-true"})
    lines = []
    result = run(config, lines.append)
    words = [line.split()[0] for line in lines if not line.startswith("all 2 validations have Recall@1")]
    assert words[:3] == ["iteration", "iteration", "test"]
    assert result["config"]["devices"] == 2
    assert read_status(config.folder)["state"] == "complete"
    assert run(config, print) == result
    assert weights_sha256(load_run(config.folder).network) == result["network_sha256"]


def test_signal_to_the_parent_stops_all_processes_at_one_iteration(settings):
    config = parse_config({**settings, "devices": 2, "iterations": 100_000, "validate_every": 20})

    def report(line):
        if line.startswith("iteration 20/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped, match="stopped by"):
        run(config, report)
    status = read_status(config.folder)
    assert (status["state"], status["retry"]) == ("stopped", True)
    checkpoint = torch.load(config.folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["iteration"] == status["iteration"] >= 20


def test_processes_end_with_their_parent(settings, tmp_path):
    """After SIGKILL of the parent, its processes save a checkpoint and end."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**settings, "devices": 2, "iterations": 100_000, "validate_every": 20}))
    folder = parse_config(json.loads(file.read_text())).folder
    command = [sys.executable, "-m", "hloss.runs", str(file)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout.readline().startswith("iteration 20/")
        starter.kill()
    with run_lock(folder, patience_seconds=60):
        status = read_status(folder)
    assert status["retry"] is True
    assert status["iteration"] >= 20
    assert (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"devices": 3, "batch_size": 2},
            "devices=3: more devices than images in a batch; allowed are 1 to batch_size=2",
        ),
        (
            {"devices": 2, "device": "cuda"},
            'device="cuda" with devices=2 requires one GPU per process: torch finds 0; lower devices',
        ),
        ({"batchnorm": "live", "micro_batch": 2}, "cannot use statistics of the whole batch in slices"),
    ],
    ids=str,
)
def test_refuses_settings_that_devices_or_slices_do_not_support(given, message, settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", str(given.get("devices", 1)))
    with pytest.raises(ConfigError, match=message):
        run(parse_config({**settings, **given}), print)


def test_refuses_live_batchnorm_over_several_cpu_processes(settings):
    config = parse_config({**settings, "devices": 2, "batchnorm": "live"})
    config.folder.mkdir(parents=True)
    log = config.folder / "devices.log"
    log.write_text("of a process at work\n")
    with pytest.raises(RunError, match="live BatchNorm is synchronised over devices, which torch can do on CUDA only"):
        run(config, print)
    first, second = log.read_text().splitlines()[:2]
    assert first == "of a process at work"
    assert second.endswith("started on 2 devices")


def test_refuses_another_number_of_processes(settings, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="devices=1 requires one process per device: got 2"):
        run(parse_config(settings), print)


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda", 0), ("cuda", 1)])
def test_more_processes_than_gpus_are_refused_before_any_starts(device, gpus, settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: pytest.fail("a process was started"))
    config = parse_config({**settings, "devices": 2, "device": device})
    with pytest.raises(ConfigError, match=f"devices=2 requires one GPU per process: torch finds {gpus}; lower devices"):
        run(config)
    status = read_status(config.folder)
    assert (status["state"], status["retry"]) == ("failed", False)
