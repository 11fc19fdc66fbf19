"""`python -m hloss.study.speed SECONDS [FILE.csv]`: measure steps per second of training on this machine's first GPU.

The floor of a network and precision is its forward and backward pass, HistogramLoss and fused Adam on one batch that is
on the GPU.
"""

import csv
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hloss.losses.checks import deferred_checks
from hloss.runs.checkpoints import StopSignals
from hloss.runs.config import RunConfig, parse_config
from hloss.runs.datasets import Dataset
from hloss.runs.launch import build_fabric
from hloss.runs.loop import READ_EVERY, REFIT, Loop, RunContext
from hloss.runs.process import gpu_arithmetic, torch_threads
from hloss.runs.resident import place_images
from hloss.runs.run import new_network

BLOCKS, WARM = 5, 8
BLOCK_SECONDS = 0.3
STOP = 10**6  # iterations, more than are measured
CROPPED = {"horizontal_flip": True, "learning_rate": 1e-5}
PHOTOS, PEDESTRIANS, LETTERS = (1024, 256, 256, 3), (2048, 160, 60, 3), (4096, 32, 32, 1)  # shapes of the images
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "glyphnet, 128": ({"network": "glyphnet", "batch_size": 128}, LETTERS),
    "parts, 128": ({"network": "parts", "batch_size": 128, "learning_rate": 1e-5}, PEDESTRIANS),
    "parts, 256": ({"network": "parts", "batch_size": 256, "learning_rate": 1e-5}, PEDESTRIANS),
    "GoogLeNet, 128": ({"network": "googlenet", "batch_size": 128, "crop": 227, **CROPPED}, PHOTOS),
    "ResNet-50, 128": ({"network": "torchvision:resnet50", "batch_size": 128, "crop": 224, **CROPPED}, PHOTOS),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "TF32": {"tf32": "all"},
    "bfloat16": {"precision": "bf16-mixed"},
}


def noise(shape: tuple[int, ...]) -> Dataset:
    """A dataset of noise, with ten images per class, all of them training images.

    Args:
        shape: (n, height, width, channels).
    """
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    index = pd.DataFrame({"label": np.arange(shape[0]) // 10, "split": "train", "role": "both", "camera": -1})
    return Dataset(Path("noise"), {}, "", index, images)


def floor_step(config: RunConfig, context: RunContext) -> Callable[[], None]:
    """A function that carries out one step of network, loss and optimiser on one batch.

    Args:
        config: settings of a run.
        context: its context; the dataset gives the size of the images.
    """
    device = context.fabric.device
    network = new_network(context).train()
    height, width, channels = context.dataset.images.shape[1:]
    size = (config.batch_size, config.crop or height, config.crop or width, channels)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    labels = torch.arange(config.batch_size, device=device) // 8
    loss = config.build_loss()
    assert loss is not None
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=device.type == "cuda" or None)
    half = config.precision == "bf16-mixed"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            embeddings = network(images)
        loss(embeddings, labels).backward()
        optimizer.step()

    return step


class QuietLoop(Loop):
    """The loop of a run, without validations, lines and checkpoints."""

    def train_for(self, steps: int) -> None:
        """Train for a number of iterations."""
        self.until += steps
        self.train()

    def _report(self) -> None:
        pass

    def _save(self) -> None:
        pass


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds of work on the host and on a device.

    Args:
        work: the work.
        device: waited for before and after.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def steps_per_second(config: RunConfig, dataset: Dataset, block_seconds: float = BLOCK_SECONDS) -> tuple[float, float]:
    """Measure the steps per second of the floor and of a run.

    Args:
        config: settings of the run.
        dataset: its images.
        block_seconds: duration of each of the BLOCKS blocks of either.

    Returns:
        Medians of the floor and of the run.
    """
    fabric = build_fabric(config)
    progress = {"stage": REFIT, "iteration": 0, "seconds": 0.0, "seconds_before_stage": 0.0, "losses": {REFIT: []}}
    placed = place_images(dataset, "device", fabric.device)
    context = RunContext(config, placed, {}, fabric, StopSignals(), print, progress)
    with torch_threads(config.threads), gpu_arithmetic(fabric.device, config.tf32):
        loop, floor = (
            QuietLoop(context, new_network(context), placed.rows("train"), 0, None),
            floor_step(config, context),
        )

        def floor_for(steps: int) -> None:
            with deferred_checks(READ_EVERY):
                for _ in range(steps):
                    floor()

        def rate(work: Callable[[int], None], steps: int) -> float:
            return steps / seconds_of(lambda: work(steps), fabric.device)

        for work in (loop.train_for, floor_for):
            work(WARM)
        steps = max(int(block_seconds * rate(floor_for, WARM)), 2)
        rates = [(rate(floor_for, steps), rate(loop.train_for, steps)) for _ in range(BLOCKS)]
    floors, runs = map(statistics.median, zip(*rates, strict=True))
    return floors, runs


def measure(seconds: float, file: Path | None) -> None:
    """Measure all networks and precisions, print a table, and append its rows to a file.

    Args:
        seconds: time after which no other network or precision is begun.
        file: CSV file with the columns of workflow/throughput.csv; None writes none.
    """
    began, card = time.monotonic(), torch.cuda.get_device_name()
    versions = f"torch {torch.__version__.partition('+')[0]} CUDA {torch.version.cuda}"
    print(f"{card}, {versions}: steps per second of floor and run, and the run's share", flush=True)
    for (name, (settings, shape)), (precision, more) in itertools.product(CASES.items(), PRECISIONS.items()):
        if time.monotonic() - began > seconds:
            return print("no time for the others", flush=True)
        config = parse_config({**settings, **more, "device": "cuda", "iterations": STOP, "checkpoint_seconds": 1e6})
        floor, run = steps_per_second(config, noise(shape))
        torch.cuda.empty_cache()
        print(f"{name:>16}, {precision:<8} {floor:6.1f} {run:6.1f}  {run / floor:.2f}", flush=True)
        row = [card, config.network, config.batch_size, config.precision, config.tf32, f"{floor:.1f}", f"{run:.1f}"]
        if file:
            with open(file, "a", newline="") as opened:
                csv.writer(opened).writerow([*row, time.strftime("%Y-%m-%d"), versions])
    return None


if __name__ == "__main__":
    measure(float(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
