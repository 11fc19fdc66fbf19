"""Evaluation of a run: result files, metric and protocol."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from data_prep.prepared import create_images, finish, new_folder
from hloss.retrieval.protocols import PROTOCOLS, evaluate
from hloss.retrieval.ranks import first_match_ranks
from hloss.runs.config import parse_config
from hloss.runs.evaluation import is_still_improving
from hloss.runs.run import run


def quiet(line):
    pass


def test_files_agree_with_the_result(settings, tiny_data):
    config = parse_config(settings)
    result = run(config, quiet)
    embeddings = torch.from_numpy(np.load(config.folder / "embeddings.npy"))
    index = pd.read_parquet(tiny_data / "tiny" / "index.parquet")
    labels = torch.tensor(index[index.split == "test"].label.to_numpy())
    ranks = np.load(config.folder / "ranks.npy")
    assert ranks.tolist() == [first_match_ranks(embeddings, labels).tolist()]
    assert result["metrics"]["recall@1"] == np.mean(ranks == 1)
    history = pd.read_parquet(config.folder / "history.parquet")
    validated = history.dropna()
    assert validated["iteration"].tolist() == [4, 8, 12]
    best = validated["validation_recall@1"].idxmax()
    assert result["chosen"]["iteration"] == validated["iteration"][best]
    assert result["validation_recall@1"] == validated["validation_recall@1"][best]
    for query, neighbors, hits in zip(*result["panel"].values(), strict=True):
        assert hits == (index.label[neighbors] == index.label[query]).tolist()
    density = result["similarity_density"]["after"]
    assert sum(density["positive"]) == pytest.approx(1)
    shared = np.minimum(density["positive"], density["negative"]).sum()
    assert result["lengths"][0]["trained_overlap"] == pytest.approx(shared)


def test_metric_defaults_to_the_trained_metric(settings, tiny_data):
    settings["validate_every"] = settings["iterations"]  # one validation, so that both metrics choose it
    config = parse_config({**settings, "loss": "lifted"})
    result = run(config, quiet)
    embeddings = torch.from_numpy(np.load(config.folder / "embeddings.npy"))
    index = pd.read_parquet(tiny_data / "tiny" / "index.parquet")
    labels = torch.tensor(index[index.split == "test"].label.to_numpy())
    assert embeddings.norm(dim=1).std() > 1e-3
    expected = evaluate("all-vs-rest", embeddings, labels, (1, 2, 4), "euclidean")
    assert result["metrics"] == expected.metrics
    distances = torch.cdist(embeddings.double(), embeddings.double())
    largest = 2 * (embeddings.double() - embeddings.double().mean(0)).norm(dim=1).max()
    pairs = torch.ones(len(labels), len(labels)).triu(1).bool()
    same = labels[:, None] == labels
    positive, negative = (
        np.histogram(distances[pairs & kind], bins=200, range=(0, float(largest)))[0] for kind in (same, ~same)
    )
    overlap = np.minimum(positive / positive.sum(), negative / negative.sum()).sum()
    assert result["lengths"][0]["trained_overlap"] == pytest.approx(overlap, abs=2e-3)
    told = parse_config({**settings, "loss": "lifted", "metric": "cosine"})
    assert told.run_id != config.run_id
    cosine = evaluate("all-vs-rest", embeddings, labels, (1, 2, 4), "cosine")
    assert run(told, quiet)["metrics"] == cosine.metrics != expected.metrics


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_evaluation_uses_the_protocol_cameras_and_roles_of_the_dataset(tmp_path, protocol):
    rng = np.random.default_rng(0)
    identity, view, shot = (axis.ravel() for axis in np.mgrid[0:30, 0:2, 0:4])
    split = np.where(identity < 16, "train", np.where(identity < 22, "val", "test"))
    names = np.where(shot == 0, "query", np.where(shot == 1, "pool", "gallery"))
    role = np.where(split == "test", names, "both") if "single-shot" not in protocol else "both"
    pixels = rng.uniform(0, 255, (30, 16, 16))[identity] + rng.normal(0, 60, (240, 16, 16))
    with new_folder(tmp_path / "data" / "street") as folder:
        images = create_images(folder, 240, 16, 16, 1)
        images[:] = pixels.clip(0, 255).astype(np.uint8)[..., None]
        images.flush()
        index = {"label": identity, "split": split, "role": role, "camera": view, "source": "noise"}
        finish(folder, pd.DataFrame(index), {"name": "street", "protocol": protocol, "recall_at": [1, 5]})
    places = {"data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs"), "device": "cpu"}
    config = parse_config({"dataset": "street", "network": "pixels", "loss": "none", "iterations": 0, **places})
    result = run(config, quiet)
    assert result["protocol"] == protocol
    test = split == "test"
    embeddings = torch.from_numpy(np.load(config.folder / "embeddings.npy"))
    cameras, roles = torch.tensor(view[test]), np.broadcast_to(role, 240)[test].tolist()
    expected = evaluate(protocol, embeddings, torch.tensor(identity[test]), (1, 5), "cosine", cameras, roles)
    assert result["metrics"] == expected.metrics
    assert np.load(config.folder / "ranks.npy").tolist() == [expected.ranks.tolist()]
    assert np.load(config.folder / "queries.npy").tolist() == expected.query_index.tolist()
    shown = [*result["panel"]["queries"], *itertools.chain(*result["panel"]["neighbors"])]
    assert {np.broadcast_to(role, 240)[row] for row in shown} <= {"both", "query", "gallery"}


@pytest.mark.parametrize(
    ("recalls", "length", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], 200, True),
        ([0.1, 0.2, 0.3, 0.3], 200, False),  # the first of equal ones
        ([0.1, 0.4, 0.3, 0.2], 200, False),
        ([0.1, 0.4, 0.3, 0.5], 100, True),  # later validations do not count
        ([], 0, False),
    ],
)
def test_a_run_is_still_improving_if_its_best_validation_is_in_the_last_tenth(recalls, length, expected):
    validations = [(50 * number, recall) for number, recall in enumerate(recalls, 1)]
    assert is_still_improving(validations, length) is expected


def test_the_last_tenth_begins_after_nine_tenths():
    assert not is_still_improving([(90, 0.5), (100, 0.4)], 100)
    assert is_still_improving([(90, 0.5), (91, 0.6), (100, 0.4)], 100)
