"""The format of a prepared dataset, and its reader.

A prepared dataset is a folder with the FILES `card.json`, `images.npy` and `index.parquet`; `data_prep` writes it.
Images of a batch are uint8 of shape (n, channels, height, width): networks scale them themselves.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hloss.retrieval.protocols import ROLES as ROLES
from hloss.runs.errors import DatasetError
from hloss.runs.files import file_sha256

FORMAT = 1
FILES = ("card.json", "images.npy", "index.parquet")
SPLITS = ("train", "val", "test")
COLUMNS = ("label", "split", "role", "camera", "source")
CARD_KEYS = ("format", "name", "protocol", "recall_at", "images", "image_shape", "classes", "roles", "index_sha256")


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset: `images` uint8 (n, height, width, channels), memory-mapped, one row of `index` per image.

    `index` has the COLUMNS label (-1: of no class), split (one of SPLITS), role (one of ROLES), camera (-1: none) and
    source (the file's name in the original).
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

    def cameras(self, rows: np.ndarray) -> Tensor:
        """Camera numbers, int64 (n,); -1 where there is none."""
        return torch.tensor(self.index.camera.to_numpy()[rows])

    def roles(self, rows: np.ndarray) -> list[str]:
        """What each image is for in retrieval."""
        return self.index.role.to_numpy()[rows].tolist()

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Images of the given rows, uint8 (n, channels, height, width); a copy, laid out as it is on the disk."""
        return torch.from_numpy(self.images[np.asarray(rows)]).permute(0, 3, 1, 2)

    def counts(self) -> pd.DataFrame:
        """Per split: images, classes, images per class (of images that have one), cameras."""
        known = self.index[self.index.label >= 0]
        sizes = known.groupby(["split", "label"]).size().groupby("split")
        splits = [split for split in SPLITS if (self.index.split == split).any()]
        counts = {
            "images": self.index.groupby("split").size(),
            "classes": sizes.size(),
            "fewest per class": sizes.min(),
            "median per class": sizes.median(),
            "most per class": sizes.max(),
            "cameras": self.index[self.index.camera >= 0].groupby("split").camera.nunique(),
        }
        return pd.DataFrame(counts).reindex(splits).fillna(0).astype({"cameras": int})

    def against_published(self) -> pd.DataFrame:
        """The counts of the publications, as far as the card has any, beside those of the index.

        A count is named like "train images" or "gallery and distractor images": splits or roles, then what is counted.
        The publications' train is train and val here, whose classes are drawn from it.
        """
        published = self.card.get("published", {})
        found = {name: self._counted(name) for name in published}
        return pd.DataFrame({"published": published, "here": found}, dtype="int64")

    def _counted(self, name: str) -> int:
        *groups, what = name.split()
        groups += ["val"] if "train" in groups else []
        rows = self.index[self.index.split.isin(groups) | self.index.role.isin(groups)]
        return len(rows) if what == "images" else rows.label[rows.label >= 0].nunique()

    def check_pixels(self) -> None:
        """Compare all pixels with the card's checksum (reads the whole file: a minute for 20 GB)."""
        if file_sha256(self.folder / "images.npy") != self.card["pixel_sha256"]:
            raise DatasetError(f"{self.folder / 'images.npy'} is not the one its card describes; prepare it again")


def index_sha256(index: pd.DataFrame) -> str:
    """Hex digest of the index's content (a parquet file's own bytes change with its writer's version)."""
    return hashlib.sha256(index.to_csv(index=False).encode()).hexdigest()


def query_counts(index: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Matches and rivals of each query among the rows of one split: columns label, matches, rivals.

    A match is a gallery image that a protocol counts as right, a rival one that it counts as wrong. The single-shot
    protocols count identities: a query is one image of an identity in one view.
    """
    if "single-shot" in protocol:
        return _single_shot_counts(index, both_ways=protocol.endswith("two-way"))
    all_vs_rest = protocol == "all-vs-rest"
    queries = index if all_vs_rest else index[index.role.isin(["query", "both"])]
    known = index if all_vs_rest else index[index.role.isin(["gallery", "both"])]
    distractors = 0 if all_vs_rest else int((index.role == "distractor").sum())
    own = queries.label.map(known.groupby("label").size()).fillna(0).astype(int)
    if all_vs_rest:
        ignored = 1  # the query itself
    else:  # images of the query's class and camera
        seen = known.groupby(["label", "camera"]).size()
        ignored = seen.reindex(pd.MultiIndex.from_frame(queries[["label", "camera"]]), fill_value=0).to_numpy()
    rivals = len(known) + distractors - own
    return pd.DataFrame({"label": queries.label, "matches": own - ignored, "rivals": rivals})


def _single_shot_counts(index: pd.DataFrame, both_ways: bool) -> pd.DataFrame:
    views = [set(images.label) for _, images in index.groupby("camera")]
    if len(views) != 2:
        return pd.DataFrame({"label": [], "matches": [], "rivals": []}, dtype=int)
    rows = [
        (label, int(label in gallery), len(gallery - {label}))
        for queries, gallery in ([views, views[::-1]] if both_ways else [views])
        for label in sorted(queries)
    ]
    return pd.DataFrame(rows, columns=["label", "matches", "rivals"])


def open_dataset(folder: Path) -> Dataset:
    """Open a prepared dataset and check its card against its files (pixels by size, the index by its hash)."""
    folder = Path(folder)
    card_file = folder / "card.json"
    if not card_file.exists():
        there = sorted(p.parent.name for p in folder.parent.glob("*/card.json") if not p.parent.name.startswith("."))
        raise DatasetError(
            f"dataset {folder.name!r} is not prepared: {card_file} does not exist; prepared in {folder.parent}: "
            f"{', '.join(there) or 'none'}. `python -m data_prep list` says how to prepare it"
        )
    raw = card_file.read_bytes()
    card = _read_card(card_file, raw)
    index = _read_index(folder / "index.parquet", card)
    return Dataset(folder, card, hashlib.sha256(raw).hexdigest(), index, _map_images(folder / "images.npy", card))


def _read_card(file: Path, raw: bytes) -> dict:
    try:
        card = json.loads(raw)
    except ValueError as error:
        raise DatasetError(f"{file} is no JSON ({error}); prepare the dataset again") from error
    lacking = [key for key in CARD_KEYS if key not in card]
    if lacking or card["format"] != FORMAT:
        raise DatasetError(
            f"{file} {'lacks ' + ', '.join(lacking) if lacking else 'has format ' + str(card['format'])}, "
            f"this version reads format {FORMAT}; prepare the dataset again"
        )
    return card


def _read_index(file: Path, card: dict) -> pd.DataFrame:
    try:
        index = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read ({error}); prepare the dataset again") from error
    if index_sha256(index) != card["index_sha256"]:
        raise DatasetError(f"{file} is not the one {file.with_name('card.json')} describes; prepare the dataset again")
    roles = index.role.value_counts()
    classes = index[index.label >= 0].groupby("split").label.nunique()
    counted = card["images"], dict(card["roles"]), dict(card["classes"])
    found = len(index), {r: int(roles.get(r, 0)) for r in counted[1]}, {s: int(classes.get(s, 0)) for s in counted[2]}
    if tuple(index.columns) != COLUMNS or found != counted:
        raise DatasetError(f"{file} holds {found}, its card says {counted}; prepare the dataset again")
    return index


def _map_images(file: Path, card: dict) -> np.ndarray:
    expected = (card["images"], *card["image_shape"])
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be mapped ({error}); prepare the dataset again") from error
    if images.shape != expected or images.dtype != np.uint8:
        raise DatasetError(
            f"{file} is {images.dtype} {images.shape}, {file.with_name('card.json')} says {expected}; prepare again"
        )
    return images
