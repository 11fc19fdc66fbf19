"""Steps per second of training against the floor."""

import csv

import torch

from hloss.runs.config import parse_config
from hloss.study import speed
from hloss.study.speed import measure, noise, steps_per_second
from hloss.study.throughput import read_throughput

SMALL = {"network": "glyphnet", "batch_size": 8, "device": "cpu", "iterations": speed.STOP, "checkpoint_seconds": 1e6}


def test_floor_and_run_take_about_as_long(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "WARM", 1)
    config = parse_config({**SMALL, "batch_size": 16, "crop": 28, "horizontal_flip": True})
    floor, run = steps_per_second(config, noise((64, 32, 32, 1)), 0.05)
    assert 0.2 < run / floor < 5
    assert not list(tmp_path.iterdir())  # no run's folder


def test_rows_can_be_read_as_the_measured_table(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(speed, "CASES", {"glyphnet, 8": ({"network": "glyphnet", "batch_size": 8}, (16, 32, 32, 1))})
    monkeypatch.setattr(speed, "steps_per_second", lambda config, dataset: (20.0, 10.0 + (config.tf32 == "all")))
    file = tmp_path / "throughput.csv"
    with open("workflow/throughput.csv") as table:
        file.write_text(table.readline())
    measure(10.0, file)
    rates = read_throughput(file)["a card"].images_per_second
    assert rates[("glyphnet", "32-true", "convolutions")] == {8: 80.0}
    assert rates[("glyphnet", "32-true", "all")] == {8: 88.0}
    with open(file, newline="") as rows:
        assert {len(row) for row in csv.reader(rows)} == {9}
