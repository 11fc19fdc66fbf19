"""What the suite does without functions that only Linux has."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from hloss.runs import process
from hloss.runs.config import parse_config
from hloss.runs.run import run
from tests.helpers.linux import LINUX_ONLY


def test_prepares_and_runs_without_functions_of_linux(tmp_path, monkeypatch):
    for name in LINUX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    generator = np.random.default_rng(0)
    for label in range(40):
        for number in range(6):
            file = tmp_path / "pictures" / f"class {label}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    data = tmp_path / "data" / "mine"
    main(["folder", "--source", str(tmp_path / "pictures"), "--out", str(data), "--size", "16x16"])
    settings = {"dataset": "mine", "data_dir": str(data.parent), "runs_dir": str(tmp_path / "runs"), "device": "cpu"}
    steps = {"iterations": 2, "validate_every": 2, "batch_size": 32, "images_per_class": 4}
    result = run(parse_config(settings | steps), lambda line: None)
    assert 0 <= result["metrics"]["recall@1"] <= 1


@pytest.mark.parametrize(("platform", "mebibytes"), [("linux", 2048.0), ("darwin", 2.0)])
def test_peak_memory_without_proc(monkeypatch, platform, mebibytes):
    """Linux counts ru_maxrss in KiB, macOS in bytes."""
    monkeypatch.setattr(process, "Path", lambda name: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(process.sys, "platform", platform)
    monkeypatch.setattr(process.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2**21))
    assert process.peak_memory_mib(process.torch.device("cpu")) == mebibytes
