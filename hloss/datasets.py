"""The prepared dataset, read-only: the one way images enter a run."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor


class DatasetError(ValueError):
    """The folder is no prepared dataset, or not the one its card describes; the message names file and remedy."""


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset: `images` uint8 (n, height, width, channels), memory-mapped, one row of `index` per image.

    `index` has label, split (train/val/test), role (both/query/gallery/junk/distractor), camera (-1: none), source.
    """

    folder: Path
    card: dict
    card_sha256: str
    index: pd.DataFrame
    images: np.ndarray

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split."""
        return np.flatnonzero(self.index.split == split)

    def labels(self, rows: np.ndarray) -> Tensor:
        """Class labels, int64 (n,)."""
        return torch.tensor(self.index.label.to_numpy()[rows])

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Images of the given rows, uint8 (n, channels, height, width)."""
        return torch.from_numpy(self.images[np.asarray(rows)]).permute(0, 3, 1, 2)


def open_dataset(folder: Path) -> Dataset:
    """Open a prepared dataset and check its card against its files (pixels by size, the index by its hash)."""
    folder = Path(folder)
    card_file = folder / "card.json"
    if not card_file.exists():
        there = sorted(p.parent.name for p in folder.parent.glob("*/card.json"))
        raise DatasetError(
            f"dataset {folder.name!r} is not prepared: {card_file} does not exist; prepared in {folder.parent}: "
            f"{', '.join(there) or 'none'}. Prepare it with `python -m data_prep {folder.name}`"
        )
    raw = card_file.read_bytes()
    card = json.loads(raw)
    index = pd.read_parquet(folder / "index.parquet")
    if hashlib.sha256(index.to_csv(index=False).encode()).hexdigest() != card["index_sha256"]:
        raise DatasetError(
            f"{folder / 'index.parquet'} is not the one {card_file} describes; prepare the dataset again"
        )
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    expected = (card["images"], *card["image_shape"])
    if images.shape != expected or images.dtype != np.uint8:
        raise DatasetError(
            f"{folder / 'images.npy'} is {images.dtype} {images.shape}, {card_file} says {expected}; prepare again"
        )
    return Dataset(folder, card, hashlib.sha256(raw).hexdigest(), index, images)


def train_view(images: Tensor, crop: int | None, mirror: bool, generator: torch.Generator) -> Tensor:
    """A random crop of `crop` pixels and a random mirror image of each of the uint8 images (n, c, h, w)."""
    n, _, height, width = images.shape
    if crop is not None:
        tops = torch.randint(height - crop + 1, (n,), generator=generator).tolist()
        lefts = torch.randint(width - crop + 1, (n,), generator=generator).tolist()
        pieces = [i[:, t : t + crop, left : left + crop] for i, t, left in zip(images, tops, lefts, strict=True)]
        images = torch.stack(pieces)
    if mirror:
        flipped = torch.rand(n, generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    return images


def test_view(images: Tensor, crop: int | None) -> Tensor:
    """The central `crop` pixels of uint8 images (n, c, h, w)."""
    if crop is None:
        return images
    top, left = (images.shape[2] - crop) // 2, (images.shape[3] - crop) // 2
    return images[:, :, top : top + crop, left : left + crop]


def stripes(images: Tensor) -> Tensor:
    """Three overlapping stripes, from rows 0, 50 and 100, of images (n, 3, 160, 60): (n, 9, 60, 60)."""
    return torch.cat([images[:, :, top : top + 60] for top in (0, 50, 100)], 1)
