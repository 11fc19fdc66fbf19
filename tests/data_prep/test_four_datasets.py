"""The four datasets of the paper: prepare a miniature of each archive and train on it with the paper's settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import cub, market1501, sop
from tests.data_prep.test_cuhk03 import SIZES, mini, mini_slots
from tests.helpers.miniatures import (
    CUB_PUBLISHED,
    MARKET_IDENTITIES,
    MARKET_PUBLISHED,
    SOP_PUBLISHED,
    cub_files,
    expect,
    market_files,
    prepared,
    sop_files,
    write_mat,
    write_tgz,
    write_zip,
)
from tests.runs.test_step import PAPER

ROOT = Path(__file__).parents[2]


def cub_dataset(folder, monkeypatch):
    file = write_tgz(folder / "CUB_200_2011.tgz", cub_files())
    expect(monkeypatch, cub, CUB_PUBLISHED, file)
    return prepared("cub", file, folder / "data" / "cub")


def sop_dataset(folder, monkeypatch):
    file = write_zip(folder / "Stanford_Online_Products.zip", sop_files())
    expect(monkeypatch, sop, SOP_PUBLISHED, file)
    return prepared("sop", file, folder / "data" / "sop")


def cuhk03_dataset(folder, monkeypatch, name="cuhk03", test_set=1):
    mini(monkeypatch)
    file = folder / "cuhk03_release" / "cuhk-03.mat"
    if not file.exists():
        file.parent.mkdir()
        write_mat(file, SIZES, mini_slots, ("labeled", "detected"), test_size=4, shape=(3, 12, 32))
    options = ("--val-fraction", "3", "--test-set", str(test_set))
    return prepared("cuhk03", file.parent, folder / "data" / name, *options)


def market1501_dataset(folder, monkeypatch):
    file = write_zip(folder / "Market-1501-v15.09.15.zip", market_files())
    expect(monkeypatch, market1501, MARKET_PUBLISHED, file, IDENTITIES=MARKET_IDENTITIES)
    return prepared("market1501", file, folder / "data" / "market1501")


PROTOCOLS = {
    "cub": "all-vs-rest",
    "sop": "all-vs-rest",
    "cuhk03": "cuhk03-single-shot",
    "market1501": "market1501",
}


SLOW = ("sop", "market1501")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PAPER])
def test_trains_on_a_prepared_archive_with_the_papers_settings(name, tmp_path, monkeypatch):
    dataset = globals()[f"{name}_dataset"](tmp_path, monkeypatch)
    refit = name != "cuhk03"  # The paper itself holds out the 100 validation identities of CUHK03.
    settings = {
        **PAPER[name],
        "weights": "none",
        "dataset": name,
        "batch_size": 8,
        "images_per_class": 3,
        "iterations": 2,
        "validate_every": 1,
        "refit": refit,
        "data_dir": str(tmp_path / "data"),
        "runs_dir": str(tmp_path / "runs"),
    }
    command = [sys.executable, "-m", "papermill", "notebooks/20_train.ipynb", str(tmp_path / "out.ipynb")]
    parameters = [word for setting, value in settings.items() for word in ("-p", setting, str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    answer = subprocess.run([*command, *parameters], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    (file,) = (tmp_path / "runs").glob("notebook/*/result.json")
    result = json.loads(file.read_text())
    assert result["protocol"] == result["validation_protocol"] == PROTOCOLS[name]
    assert result["config"]["embedding_dim"] == {"googlenet": 512, "parts": 500}[PAPER[name]["network"]]
    assert result["config"]["loss"] == "histogram"
    assert result["chosen"]["iteration"] in (1, 2)
    assert result["trained_on"] == ("training and validation classes (refit)" if refit else "training classes")
    assert {f"recall@{k}" for k in dataset.card["recall_at"]} <= set(result["metrics"])
    assert all(0 <= value <= 1 for value in result["metrics"].values())
