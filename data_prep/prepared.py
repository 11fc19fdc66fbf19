"""The one way a prepared dataset is written: into a temporary folder beside its place, then renamed."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "test")
ROLES = ("both", "query", "gallery", "junk", "distractor", "pool")
FORMAT = 1


class PreparationError(Exception):
    """The source cannot become a prepared dataset; the message names the file, the reason and the remedy."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` only when the block ends well; otherwise nothing stays behind."""
    out = Path(out)
    if out.exists() and not (out / "card.json").exists() and any(out.iterdir()):
        raise PreparationError(
            f"{out} holds something that is not a prepared dataset; choose another --out or empty it"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.preparing-*"):  # what an interrupted preparation left
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.preparing-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_images(folder: Path, n: int, height: int, width: int, channels: int) -> np.memmap:
    """Create `images.npy`, uint8 of shape (n, height, width, channels), to be filled row by row."""
    return np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(n, height, width, channels)
    )


def finish(folder: Path, index: pd.DataFrame, card: dict) -> None:
    """Check the index against the images, write `index.parquet` and `card.json` with counts and hashes.

    `index` has one row per image in the order of `images.npy`: label (int64), split (train/val/test),
    role (query/gallery/both/junk/distractor), camera (int64, -1 where there is none), source (str).
    `card` gives name, source, licence, protocol and settings; counts and hashes are added here.
    """
    images = np.load(folder / "images.npy", mmap_mode="r")
    _check(index, images)
    index = index.astype({"label": "int64", "camera": "int64"})
    index.to_parquet(folder / "index.parquet", index=False)
    known = index[index.label >= 0]
    card = {
        "format": FORMAT,
        **card,
        "images": len(index),
        "image_shape": list(images.shape[1:]),
        "classes": {s: int(known[known.split == s].label.nunique()) for s in SPLITS},
        "images_per_split": {s: int((index.split == s).sum()) for s in SPLITS},
        "roles": {r: int((index.role == r).sum()) for r in ROLES},
        "pixel_sha256": hash_file(folder / "images.npy"),
        "index_sha256": hash_index(index),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def _check(index: pd.DataFrame, images: np.ndarray) -> None:
    expected = ["label", "split", "role", "camera", "source"]
    if list(index.columns) != expected:
        raise PreparationError(f"index columns are {list(index.columns)}, expected {expected}")
    if len(index) != len(images):
        raise PreparationError(f"index has {len(index)} rows for {len(images)} images")
    for column, allowed in (("split", SPLITS), ("role", ROLES)):
        unknown = sorted(set(index[column]) - set(allowed))
        if unknown:
            raise PreparationError(f"index column {column} holds {unknown}, allowed are {list(allowed)}")
    known = index[index.label >= 0]
    splits = known.groupby("label").split.nunique()
    if (splits > 1).any():
        raise PreparationError(f"classes {list(splits[splits > 1].index[:5])} are in more than one split")


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hash_index(index: pd.DataFrame) -> str:
    """Hex digest of the index's content (a parquet file's own bytes change with its writer's version)."""
    return hashlib.sha256(index.to_csv(index=False).encode()).hexdigest()
