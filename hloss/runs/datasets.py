"""The format of a prepared dataset, and its reader.

A prepared dataset is a folder with three files, which `data_prep` writes: `card.json` describes the dataset,
`images.npy` has all pixels and `index.parquet` has one row per image. Batches of images are uint8 tensors of shape
(n, channels, height, width). Networks scale the pixels.
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
REMEDY = "prepare the dataset again"
CARD_KEYS = ("format", "name", "protocol", "recall_at", "images", "image_shape", "classes", "roles", "index_sha256")


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, as `open_dataset` returns it.

    Attributes:
        folder: the folder of the dataset.
        card: content of `card.json`.
        card_sha256: SHA-256 hash of `card.json`.
        index: one row per image, with the columns label (-1: no class), split (one of SPLITS), role (one of ROLES),
            camera (-1: none) and source (the image's file in the original dataset).
        images: uint8 (n, height, width, channels), a read-only memory map.
    """

    folder: Path
    card: dict
    card_sha256: str
    index: pd.DataFrame
    images: np.ndarray

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of the images of a split ("train", "val" or "test"), int64 (n,)."""
        return np.flatnonzero(self.index.split == split)

    def labels(self, rows: np.ndarray) -> Tensor:
        """Class labels of the given rows, int64 (n,); -1 for images of no class."""
        return torch.tensor(self.index.label.to_numpy()[rows])

    def cameras(self, rows: np.ndarray) -> Tensor:
        """Camera numbers of the given rows, int64 (n,); -1 for images without a camera."""
        return torch.tensor(self.index.camera.to_numpy()[rows])

    def roles(self, rows: np.ndarray) -> list[str]:
        """Roles of the given rows in retrieval: n strings, each one of ROLES."""
        return self.index.role.to_numpy()[rows].tolist()

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Copy the images of the given rows.

        Args:
            rows: row numbers, (n,).

        Returns:
            uint8 (n, channels, height, width), with the memory layout of `images` (channels last).
        """
        return torch.from_numpy(self.images[np.asarray(rows)]).permute(0, 3, 1, 2)

    def counts(self) -> pd.DataFrame:
        """Count images, classes, images per class and cameras.

        Returns:
            One row per split and one column per count. Images without a class are counted in the columns "images" and
            "cameras" only.
        """
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
        """Compare the published counts in the card with the counts in the index.

        The name of a count consists of splits or roles and of "images" or "classes", for example "train images" or
        "gallery and distractor images". "train" includes the split val, whose classes are drawn from the published
        training classes.

        Returns:
            One row per published count, with the int64 columns "published" and "here"; empty if the card has none.
        """
        published = self.card.get("published", {})
        found = {name: self._counted(name) for name in published}
        return pd.DataFrame({"published": published, "here": found}, dtype="int64")

    def _counted(self, name: str) -> int:
        *groups, unit = name.split()
        groups += ["val"] if "train" in groups else []
        rows = self.index[self.index.split.isin(groups) | self.index.role.isin(groups)]
        return len(rows) if unit == "images" else rows.label[rows.label >= 0].nunique()

    def check_pixels(self) -> None:
        """Compare the SHA-256 hash of `images.npy` with the card; this takes about a minute for 20 GB.

        Raises:
            DatasetError: the hashes differ.
        """
        if file_sha256(self.folder / "images.npy") != self.card["pixel_sha256"]:
            raise DatasetError(f"{self.folder / 'images.npy'}: its hash differs from the card's; {REMEDY}")


def index_sha256(index: pd.DataFrame) -> str:
    """SHA-256 hash of an index as CSV text, because the bytes of a parquet file depend on the version of its writer."""
    return hashlib.sha256(index.to_csv(index=False).encode()).hexdigest()


def query_counts(index: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Count the matches and the non-matches (rivals) of each query.

    A match is a gallery image that the protocol counts as correct; a rival is one that it counts as wrong. In the
    single-shot protocols, a query is an identity in one view, and matches and rivals are identities.

    Args:
        index: rows of one split, with the columns of `Dataset.index`.
        protocol: one of `hloss.retrieval.protocols.PROTOCOLS`.

    Returns:
        One row per query, with the columns label, matches and rivals.
    """
    if "single-shot" in protocol:
        return _single_shot_counts(index, both_ways=protocol.endswith("two-way"))
    if protocol == "query-gallery":  # The protocol ignores only the query itself. A camera per image has this effect.
        index = index.assign(camera=range(len(index)))
    all_vs_rest = protocol == "all-vs-rest"
    queries = index if all_vs_rest else index[index.role.isin(["query", "both"])]
    known = index if all_vs_rest else index[index.role.isin(["gallery", "both"])]
    distractors = 0 if all_vs_rest else int((index.role == "distractor").sum())
    own = queries.label.map(known.groupby("label").size()).fillna(0).astype(int)
    if all_vs_rest:
        ignored = 1  # The query itself is not in its own gallery.
    else:  # Images of the query's class and camera are neither matches nor rivals.
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
    """Open a prepared dataset and compare its files with its card.

    The index is compared by its hash, the images by shape and dtype only; `Dataset.check_pixels` compares all pixels.

    Args:
        folder: the folder of the dataset.

    Returns:
        The dataset, with the images as a read-only memory map.

    Raises:
        DatasetError: the folder does not exist, or a file is missing, unreadable or does not match the card.
    """
    folder = Path(folder)
    card_file = folder / "card.json"
    if not card_file.exists():
        prepared = sorted(p.parent.name for p in folder.parent.glob("*/card.json") if not p.parent.name.startswith("."))
        raise DatasetError(
            f"dataset {folder.name!r} is not prepared: {card_file} does not exist; prepared in {folder.parent}: "
            f"{', '.join(prepared) or 'none'}. `python -m data_prep list` shows how to prepare it"
        )
    raw = card_file.read_bytes()
    card = _read_card(card_file, raw)
    index = _read_index(folder / "index.parquet", card)
    return Dataset(folder, card, hashlib.sha256(raw).hexdigest(), index, _map_images(folder / "images.npy", card))


def _read_card(file: Path, raw: bytes) -> dict:
    try:
        card = json.loads(raw)
    except ValueError as error:
        raise DatasetError(f"{file} is not JSON ({error}); {REMEDY}") from error
    missing = [key for key in CARD_KEYS if key not in card]
    if missing:
        raise DatasetError(f"{file} lacks the keys {', '.join(missing)}; {REMEDY}")
    if card["format"] != FORMAT:
        raise DatasetError(f"{file} has format {card['format']}, but this version reads format {FORMAT}; {REMEDY}")
    return card


def _read_index(file: Path, card: dict) -> pd.DataFrame:
    try:
        index = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read ({error}); {REMEDY}") from error
    if tuple(index.columns) != COLUMNS:
        got = ", ".join(map(str, index.columns))
        raise DatasetError(f"{file} must have the columns {', '.join(COLUMNS)}: got {got}; {REMEDY}")
    if index_sha256(index) != card["index_sha256"]:
        raise DatasetError(f"{file}: its hash differs from the one in {file.with_name('card.json')}; {REMEDY}")
    roles = index.role.value_counts()
    classes = index[index.label >= 0].groupby("split").label.nunique()
    counted = card["images"], dict(card["roles"]), dict(card["classes"])
    found = len(index), {r: int(roles.get(r, 0)) for r in counted[1]}, {s: int(classes.get(s, 0)) for s in counted[2]}
    if found != counted:
        names = ("images", "images by role", "classes by split")
        had, named = (", ".join(f"{name} {n}" for name, n in zip(names, of, strict=True)) for of in (found, counted))
        raise DatasetError(f"{file} must match the counts in card.json ({named}): got {had}; {REMEDY}")
    return index


def _map_images(file: Path, card: dict) -> np.ndarray:
    expected = (card["images"], *card["image_shape"])
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read as a memory map ({error}); {REMEDY}") from error
    if images.shape != expected or images.dtype != np.uint8:
        raise DatasetError(
            f"{file} is {images.dtype} {images.shape}, but {file.with_name('card.json')} requires uint8 {expected}; "
            f"{REMEDY}"
        )
    return images
