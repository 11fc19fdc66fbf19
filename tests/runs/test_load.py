"""Loaded runs embed pixels and files as the run did; networks of other runs are refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision import models

import hloss.runs
from data_prep.prepared import create_images, finish, new_folder
from hloss.runs.config import parse_config
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import NetworkError
from hloss.runs.evaluation import weights_sha256
from hloss.runs.images import BadImage, ImageSettings
from hloss.runs.load import load_run
from hloss.runs.run import run
from tests.helpers.miniatures import encoded


def quiet(line):
    pass


@pytest.fixture
def short(settings):
    return {**settings, "iterations": 4, "batch_size": 16, "checkpoint_seconds": 60.0}


def test_pixels(config):
    dataset = open_dataset(config.data_folder)
    return dataset.images[dataset.rows("test")]


test_pixels.__test__ = False


def stored(config):
    return torch.from_numpy(np.load(config.folder / "embeddings.npy"))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {
            "crop": 15,
            "horizontal_flip": True,
            "refit": True,
            "dropout": 0.3,
            "sampler": "random-class",
            "min_images_per_class": 3,
        },
        {"micro_batch": 8, "batchnorm": "slices", "loss": "lifted"},
        {"precision": "64-true", "embedding_dim": 8, "threads": 2},
        {"precision": "bf16-mixed", "loss": "binomial"},
        {"network": "torchvision:resnet18", "batchnorm": "frozen", "iterations": 1},
        {"network": "pixels", "loss": "none", "iterations": 0},
        {"loss": "none", "iterations": 0},
    ],
    ids=lambda given: ", ".join(f"{k}={v}" for k, v in given.items()) or "default",
)
def test_loaded_run_embeds_bit_for_bit_as_the_run_did(given, short):
    config = parse_config({**short, **given})
    result = run(config, quiet)
    loaded = load_run(config.folder)
    embeddings = loaded.embed(test_pixels(config))
    assert (embeddings.dtype, embeddings.device.type) == (torch.float32, "cpu")
    assert torch.equal(embeddings, stored(config))
    assert loaded.result == json.loads(json.dumps(result))
    assert loaded.card == open_dataset(config.data_folder).card
    assert loaded.config.resolved() == config.resolved()
    assert loaded.config.run_id == config.run_id


@pytest.mark.filterwarnings("ignore")  # theirs
def test_loads_a_run_whose_loss_has_weights(short):
    pytest.importorskip("pytorch_metric_learning")
    config = parse_config({**short, "loss": "pml:ArcFaceLoss", "miner": "MultiSimilarityMiner"})
    run(config, quiet)
    assert torch.equal(load_run(config.folder).embed(test_pixels(config)), stored(config))


def test_loads_a_moved_run_without_dataset_and_pretrained_weights(short, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    weights = tmp_path / "weights.pth"
    torch.save(models.resnet18(weights=None).state_dict(), weights)
    own = {"data_dir": str(tmp_path / "data"), "network": "torchvision:resnet18", "weights": str(weights)}
    config = parse_config({**short, **own, "iterations": 1, "batch_size": 8})
    run(config, quiet)
    images = np.array(test_pixels(config))
    moved = tmp_path / "elsewhere" / "my best run"
    moved.parent.mkdir()
    config.folder.rename(moved)
    shutil.rmtree(tmp_path / "data")
    weights.unlink()
    before = torch.get_rng_state()
    loaded = load_run(str(moved))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.embed(images), torch.from_numpy(np.load(moved / "embeddings.npy")))


def test_files_are_converted_for_a_grey_dataset(short, tmp_path):
    config = parse_config(short)
    run(config, quiet)
    loaded, images = load_run(config.folder), test_pixels(config)[:3]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(encoded(image[..., 0], "PNG"))
    assert torch.equal(loaded.embed(files), loaded.embed(images))
    assert torch.equal(loaded.embed([str(file) for file in files]), loaded.embed(images))
    assert torch.equal(loaded.embed(files[0]), loaded.embed(images[:1]))
    colours = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
    files[0].write_bytes(encoded(colours, "PNG"))
    resized = Image.fromarray(colours).resize((16, 16), Image.Resampling.BILINEAR).convert("L")
    assert torch.equal(loaded.embed(files[:1]), loaded.embed(np.asarray(resized)[None, ..., None]))


@pytest.mark.parametrize("image_settings", [ImageSettings(24, 18, "pad"), ImageSettings(24, 18, "stretch", "bbox250")])
def test_files_are_resized_and_cropped_like_the_dataset(image_settings, short, tmp_path):
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (36, 12, 18, 3), np.uint8)
    photos[:, :3] = 255  # a white border, for bbox250
    files = [tmp_path / f"{i}.png" for i in range(36)]
    for file, photo in zip(files, photos, strict=True):
        Image.fromarray(photo).resize((90, 60)).save(file)
    label = np.arange(36) // 3
    split = np.where(label < 8, "train", np.where(label < 10, "val", "test"))
    with new_folder(tmp_path / "data" / "photos") as folder:
        images = create_images(folder, 36, 24, 18, 3)
        images[:] = [image_settings(file.read_bytes()) for file in files]
        images.flush()
        index = {"label": label, "split": split, "role": "both", "camera": -1, "source": [f.name for f in files]}
        card = {"name": "photos", "protocol": "all-vs-rest", "recall_at": [1], "settings": image_settings.settings()}
        finish(folder, pd.DataFrame(index), card)
    own = {"dataset": "photos", "data_dir": str(tmp_path / "data"), "crop": 16, "images_per_class": 2, "batch_size": 8}
    config = parse_config({**short, **own})
    run(config, quiet)
    tested = [file for file, part in zip(files, split, strict=True) if part == "test"]
    assert torch.equal(load_run(config.folder).embed(tested), stored(config))


def test_refuses_images_that_cannot_be_embedded(short, tmp_path):
    config = parse_config(short)
    run(config, quiet)
    loaded = load_run(config.folder)
    for wrong in (np.zeros((2, 16, 15, 1), np.uint8), np.zeros((2, 16, 16, 1)), np.zeros((16, 16, 1), np.uint8)):
        with pytest.raises(
            ValueError, match=r"images must be uint8 of shape \(n, 16, 16, 1\): got .*; give the paths of image"
        ):
            loaded.embed(wrong)
    for nothing in ([], np.zeros((0, 16, 16, 1), np.uint8)):
        with pytest.raises(ValueError, match="images is empty"):
            loaded.embed(nothing)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"broken\.png: not an image of a supported format; supported are JPEG, PNG"):
        loaded.embed([tmp_path / "broken.png"])


def without_network(folder):
    (folder / "network.pt").unlink()


def of_another_seed(folder):
    """Change the last bit of one weight."""
    state = torch.load(folder / "network.pt", weights_only=True)
    weight = state["embedding.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    torch.save(state, folder / "network.pt")


def of_another_size(folder):
    state = torch.load(folder / "network.pt", weights_only=True)
    torch.save({**state, "embedding.weight": state["embedding.weight"][:5]}, folder / "network.pt")


def of_another_kind(folder):
    torch.save([1, 2], folder / "network.pt")


def truncated(folder):
    file = folder / "network.pt"
    file.write_bytes(file.read_bytes()[:-1000])


def without_card(folder):
    result = json.loads((folder / "result.json").read_text())
    del result["card"]
    (folder / "result.json").write_text(json.dumps(result))


REMEDY = "; delete the run's folder and start the run again with keep_network=True"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without_network,
            r"network\.pt does not exist: the run did not save its network, or the file was deleted" + REMEDY,
        ),
        (of_another_seed, r"network\.pt is not the network of run \w+: its hash differs" + REMEDY),
        (of_another_size, r"network\.pt cannot be loaded \(RuntimeError: .*size mismatch"),
        (of_another_kind, r"network\.pt cannot be loaded \(TypeError: "),
        (truncated, r"network\.pt cannot be loaded \("),
        (without_card, r"result\.json has no dataset card: an older version wrote it" + REMEDY),
        (lambda folder: (folder / "result.json").unlink(), "is not a complete run: it has no result.json"),
    ],
)
def test_refuses_incomplete_runs_and_other_networks(spoil, message, short):
    config = parse_config(short)
    run(config, quiet)
    spoil(config.folder)
    with pytest.raises(NetworkError, match=f"(?s){message}"):
        load_run(config.folder)


def test_keep_network_does_not_change_the_run_id(short):
    config = parse_config({**short, "keep_network": False})
    assert config.run_id == parse_config(short).run_id
    first = run(config, quiet)
    assert not (config.folder / "network.pt").exists()
    assert run(parse_config(short), quiet) == first, "a complete run is not repeated for its network"
    shutil.rmtree(config.folder)
    second = run(parse_config(short), quiet)
    assert second["network_sha256"] == first["network_sha256"] == weights_sha256(load_run(config.folder).network)
    assert second["network_mib"] == first["network_mib"]
    assert second["network_mib"] * 2**20 == pytest.approx((config.folder / "network.pt").stat().st_size, rel=0.05)


def test_rerun_by_other_code_removes_the_old_network(short, monkeypatch):
    config = parse_config(short)
    run(config, quiet)
    monkeypatch.setattr("hloss.runs.provenance.code_sha256", lambda: "other")
    run(parse_config({**short, "keep_network": False}), quiet)
    assert not (config.folder / "network.pt").exists()


def test_result_is_written_after_the_network(short, monkeypatch):
    """If a full disk prevents the network from being written, the run is not complete."""
    config = parse_config(short)
    whole_save = torch.save

    def full(state, file):
        if "network" in file.name:
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")
        whole_save(state, file)

    with monkeypatch.context() as context:
        context.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"network\.pt cannot be written"):
            run(config, quiet)
    assert not (config.folder / "result.json").exists()
    assert not list(config.folder.glob("*network.pt*"))
    run(config, quiet)
    assert torch.equal(load_run(config.folder).embed(test_pixels(config)), stored(config))


def test_importing_the_package_imports_no_modules():
    assert hloss.runs.load_run is load_run
    with pytest.raises(AttributeError, match="no attribute 'lode_run'"):
        _ = hloss.runs.lode_run
    code = "import sys, hloss, hloss.runs; print([m for m in sys.modules if m.startswith('hloss.runs.')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
