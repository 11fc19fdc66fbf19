"""What training costs beside the network: the rest of a step on glyphs, time and memory in slices, papermill."""

import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import torch

from hloss.losses.streaming import StreamedLoss
from hloss.runs.checkpoints import StopSignals
from hloss.runs.config import parse_config
from hloss.runs.datasets import open_dataset
from hloss.runs.launch import build_fabric
from hloss.runs.loop import Loop, RunContext
from hloss.runs.run import new_network
from tests.benchmarks.conftest import peak_above_start

ROOT = Path(__file__).parent.parent.parent


def test_overhead_of_a_step_on_glyphs(benchmark, record, monkeypatch):
    """What of a step is neither its network's forward or backward pass nor its optimiser: loss, batch, Fabric.

    Timed inside the step. Against another network alone it cannot be: two copies of one network differ by as much,
    from where their memory happens to lie. Bound: at most 10 % of the step.
    """
    config = parse_config({"device": "cpu", "iterations": 10**6})
    dataset = open_dataset(ROOT / "data" / "glyphs")
    progress = {"stage": "choose", "iteration": 0, "seconds": 0.0, "losses": {"choose": [], "refit": []}}
    work = RunContext(config, dataset, {}, build_fabric(config), StopSignals(), print, progress)
    torch.set_num_threads(1)
    loop = Loop(work, new_network(work), dataset.rows("train"), config.iterations, None)
    seconds, steps = Counter(), []

    def timed(function, part):
        def measured(*given, **named):
            start = time.perf_counter()
            result = function(*given, **named)
            seconds[part] += time.perf_counter() - start
            return result

        return measured

    monkeypatch.setattr(loop.network, "forward", timed(loop.network.forward, "network"))
    monkeypatch.setattr(torch.Tensor, "backward", timed(torch.Tensor.backward, "network"))  # and within it, the loss's
    monkeypatch.setattr(StreamedLoss, "backward", staticmethod(timed(StreamedLoss.backward, "loss's backward")))
    monkeypatch.setattr(loop.optimizer, "zero_grad", timed(loop.optimizer.zero_grad, "optimiser"))
    monkeypatch.setattr(loop.optimizer.optimizer, "step", timed(loop.optimizer.optimizer.step, "optimiser"))

    def step():
        seconds.clear()
        timed(loop.step, "whole")()
        steps.append(Counter(seconds))

    benchmark.pedantic(step, rounds=500, warmup_rounds=20)
    loop.batches.close()
    rest = [s["whole"] - s["network"] + s["loss's backward"] - s["optimiser"] for s in steps[20:]]
    whole = [s["whole"] for s in steps[20:]]
    assert all(s["network"] > 0 and s["loss's backward"] > 0 and s["optimiser"] > 0 for s in steps)
    share = statistics.median(r / w for r, w in zip(rest, whole, strict=True))
    case = "a step, glyphnet, batch 128, 1 thread"
    record(case, "the training loop", f"{1000 * statistics.median(whole):.1f} ms")
    beside = f"{100 * share:.1f} % of it (of all steps together {100 * sum(rest) / sum(whole):.1f} %)"
    record(case, "beside network and optimiser", f"{1000 * statistics.median(rest):.2f} ms", beside)


PARTS = """
import torch
from hloss import HistogramLoss
from hloss.runs.config import parse_config
from hloss.runs.models import build_network
from hloss.runs.step import build_optimizer, gradient, seed_of
from hloss.runs.launch import build_fabric
torch.set_num_threads(2)
config = parse_config({"network": "parts", "device": "cpu", "learning_rate": 1e-4})
fabric = build_fabric(config)
network, optimizer = build_network("parts", (160, 60, 3), 500, 0.5), None
optimizer = build_optimizer(network, config)
wrapped, optimizer = fabric.setup(network, optimizer)
def step(images, micro_batch):
    optimizer.zero_grad()
    labels = torch.arange(len(images)) // 8
    gradient(fabric, wrapped, HistogramLoss(), images, labels, micro_batch, lambda part: seed_of(0, part))
    optimizer.step()
step(torch.zeros(16, 3, 160, 60, dtype=torch.uint8), None)  # the optimiser's state is there
optimizer.zero_grad()
images = torch.randint(256, (512, 3, 160, 60), dtype=torch.uint8)
# start
step(images, {micro_batch})
"""


@pytest.mark.slow  # the one bound here that no other work on the machine moves
def test_memory_of_a_batch_in_slices(benchmark, record):
    """The parts network, batch 512: peak above model, optimiser and images: in slices at most 30 % of it."""
    peaks = {}

    def measure():
        for micro_batch in (None, 64):
            peaks[micro_batch] = peak_above_start(PARTS.replace("{micro_batch}", str(micro_batch)))

    benchmark.pedantic(measure, rounds=1)
    assert peaks[64] <= 0.3 * peaks[None]
    case = "parts network, batch 512"
    record(case, "plain step", f"{peaks[None] / 2**20:.0f} MiB", "peak above model and optimiser")
    record(case, "micro_batch 64", f"{peaks[64] / 2**20:.0f} MiB", f"{100 * peaks[64] / peaks[None]:.0f} % of it")


def test_time_of_a_batch_in_slices(race):
    torch.set_num_threads(2)
    namespace = {}
    exec(PARTS.split("# start")[0], namespace)  # the same set-up as the measure of memory, in this process
    step, images = namespace["step"], namespace["images"]
    sides = {"plain step": lambda: step(images, None), "micro_batch 64": lambda: step(images, 64)}
    race("parts network, batch 512, 2 threads", "plain step", sides, rounds=3)


def test_overhead_of_papermill(benchmark, record, tmp_path):
    """A papermilled run, its whole process, against what its cells take; and the same run by the command."""
    settings = {"iterations": 20, "validate_every": 20, "device": "cpu"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds = {}

    def timed(name, command, **runs):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        seconds[name] = time.perf_counter() - start

    def measure():
        file = tmp_path / "config.json"
        given = parse_config({**settings, "data_dir": str(ROOT / "data"), "runs_dir": str(tmp_path / "command")})
        file.write_text(given.model_dump_json())
        timed("command", [sys.executable, "-m", "hloss.runs", str(file)])
        papermill = [sys.executable, "-m", "papermill", "notebooks/20_train.ipynb", str(tmp_path / "out.ipynb")]
        here = {**settings, "data_dir": str(ROOT / "data"), "runs_dir": str(tmp_path / "notebook")}
        timed("papermill", papermill + [word for name, value in here.items() for word in ("-p", name, str(value))])

    benchmark.pedantic(measure, rounds=1)
    record("a run of 20 iterations", "hloss.runs", f"{seconds['command']:.1f} s")
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    in_cells = sum(cell.metadata.papermill.duration or 0 for cell in cells)
    beside = (
        f"{seconds['papermill'] - in_cells:.1f} s beside its cells, {in_cells:.1f} s in them (imports and figures too)"
    )
    record("a run of 20 iterations", "papermill", f"{seconds['papermill']:.1f} s", beside)
