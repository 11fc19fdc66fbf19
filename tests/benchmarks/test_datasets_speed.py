"""Preparation against a plain loop over the images, and a training batch from the map against one from JPEG files.

The images are JPEGs of 500 x 375 pixels, as those of CUB-200-2011 mostly are, prepared to 256 x 256.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import folder
from data_prep.conversion import Options
from hloss.runs.datasets import open_dataset
from hloss.runs.images import ImageSettings, augment

N, SIDE, CROP, BATCH = 1200, 256, 227, 128
OPTIONS = Options(ImageSettings(SIDE, SIDE, "pad"))


def jpeg(seed):
    """About 80 kB: smooth shapes and some noise, as a photograph has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
    pixels = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twenty classes."""
    root = tmp_path_factory.mktemp("photos")
    different = [jpeg(seed) for seed in range(40)]
    for i in range(N):
        place = root / f"class{i % 20}" / f"{i}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(different[i % len(different)])
    return root


def decoded(file):
    """One image as a plain loop would do it."""
    image = Image.open(file).convert("RGB")
    scale = SIDE / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    canvas = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(canvas)


def by_source(prepared):
    """Images in the order of their files."""
    dataset = open_dataset(prepared)
    return dataset.images[dataset.index.source.argsort()]


def test_preparation_against_a_plain_loop(race, photos, tmp_path):
    files = sorted(photos.glob("*/*.jpg"))

    def loop():
        images = np.lib.format.open_memmap(tmp_path / "loop.npy", "w+", np.uint8, (N, SIDE, SIDE, 3))
        for row, file in enumerate(files):
            images[row] = decoded(file)
        images.flush()

    def prepare():
        folder.prepare(photos, tmp_path / "data" / "photos", OPTIONS)

    race(f"{N} photographs", "plain PIL loop", {"plain PIL loop": loop, "data_prep": prepare}, rounds=5)
    assert np.array_equal(np.load(tmp_path / "loop.npy")[::100], by_source(tmp_path / "data" / "photos")[::100])


def test_a_batch_from_the_map_against_decoding_it(race, photos, tmp_path):
    folder.prepare(photos, tmp_path / "photos", OPTIONS)
    dataset = open_dataset(tmp_path / "photos")
    rows = np.random.default_rng(0).choice(N, BATCH, replace=False)
    files = [photos / name for name in dataset.index.source.iloc[rows]]

    def view(images):
        return augment(images, CROP, True, torch.Generator().manual_seed(0))

    def from_files():
        return view(torch.from_numpy(np.stack([decoded(file) for file in files])).permute(0, 3, 1, 2))

    def from_map():
        return view(dataset.pixels(rows))

    assert torch.equal(from_files(), from_map())
    race(
        f"batch of {BATCH}",
        "decoded from JPEG files",
        {"decoded from JPEG files": from_files, "from the map": from_map},
    )
