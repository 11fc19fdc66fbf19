"""Write a prepared dataset: fill a temporary folder beside `--out`, then rename it, so that no half is ever visible."""

import errno
import glob
import io
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from hloss.runs.datasets import COLUMNS, FILES, FORMAT, ROLES, SPLITS, index_sha256
from hloss.runs.errors import LockedError
from hloss.runs.files import file_lock, file_sha256

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
DOWNLOAD_AGAIN = "download the original again (`python -m data_prep list` shows where)"  # remedy of many errors


class PreparationError(Exception):
    """The source cannot be prepared; the message names the file or option, the reason and the remedy."""


@contextmanager
def new_folder(out: Path, name: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block succeeds and is removed when it fails.

    An earlier preparation of the same dataset in `out` is replaced.

    Args:
        out: The folder to create or replace.
        name: The dataset's name. A prepared dataset of another name in `out` is refused; None replaces any.

    Yields:
        The temporary folder, beside `out` and locked while the block runs.

    Raises:
        PreparationError: `out` contains something else, another process prepares it, or the disk is full.
    """
    out = Path(out)
    check_replaceable(out, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.preparing-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):  # interrupted preparations
        _remove_unless_locked(left)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        with _preparation_lock(folder):
            yield folder
            folder.chmod(0o755)
            _replace(folder, out)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise PreparationError(
            f"not enough disk space in {out.parent.resolve()}; free some space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(out: Path, name: str | None = None) -> None:
    """Refuse to overwrite `out` unless it is missing, empty or an earlier preparation of this dataset.

    Args:
        out: The folder to write.
        name: The dataset's name; None accepts a prepared dataset of any name.

    Raises:
        PreparationError: `out` is a file, contains other files, or is another prepared dataset.
    """
    out = Path(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise PreparationError(f"--out must be a folder: got the file {out}")
    there = {p.name for p in out.iterdir()}
    if there and ("card.json" not in there or there - set(FILES)):
        raise PreparationError(
            f"{out} is neither empty nor a prepared dataset: it contains "
            f"{', '.join(sorted(there - set(FILES) or there)[:5])}; choose another --out or empty the folder"
        )
    if there and name:
        try:
            other = json.loads((out / "card.json").read_text()).get("name")
        except ValueError:
            raise PreparationError(
                f"{out / 'card.json'} is not valid JSON; choose another --out or delete the folder"
            ) from None
        if other != name:
            raise PreparationError(f"{out} is the prepared dataset {other!r}, not {name!r}; choose another --out")


def _preparation_lock(folder: Path) -> AbstractContextManager[None]:
    return file_lock(folder, f"is preparing {folder}")


def _remove_unless_locked(left: Path) -> None:
    try:
        with _preparation_lock(left):
            shutil.rmtree(left)
    except LockedError as error:
        raise PreparationError(str(error)) from None


def _replace(folder: Path, out: Path) -> None:
    # The older folder is renamed before it is removed: an interrupted removal in place would leave a partial dataset.
    older = folder.with_name(f"{folder.name}-older")
    if out.exists():
        out.rename(older)
    folder.rename(out)
    shutil.rmtree(older, ignore_errors=True)


def create_images(folder: Path, n: int, height: int, width: int, channels: int) -> np.memmap:
    """Create `images.npy` in `folder` and return it as a writable memory map.

    The disk space is allocated at once: on a full disk, writing to the map later would crash the process.

    Args:
        folder: The folder of the file.
        n: Number of images.
        height: Height of every image, in pixels.
        width: Width of every image, in pixels.
        channels: 1 or 3.

    Returns:
        uint8 array of shape (n, height, width, channels).

    Raises:
        PreparationError: the disk has less free space than the images need.
    """
    needed, free = n * height * width * channels, shutil.disk_usage(folder).free
    if needed > free:
        raise PreparationError(
            f"not enough disk space in {folder.parent.resolve()}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free; free some space or choose another --out"
        )
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(n, height, width, channels)
    )
    with open(folder / "images.npy", "r+b") as file:
        allocate(file.fileno(), file.seek(0, os.SEEK_END))
    return images


def allocate(descriptor: int, size: int) -> None:
    """Allocate disk space for an open file; do nothing where the system (macOS) or the file system cannot.

    Args:
        descriptor: File descriptor, open for writing.
        size: Size of the file in bytes.

    Raises:
        OSError: the disk or the user's quota is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise


def drop_rows(folder: Path, bad: Collection[int]) -> None:
    """Remove rows from `images.npy`, in place.

    Args:
        folder: The folder of the file.
        bad: Row numbers to remove, from 0.
    """
    images = np.load(folder / "images.npy", mmap_mode="r")
    start, shape, row_bytes = images.offset, images.shape, images[0].size
    keep = [row for row in range(len(images)) if row not in bad]
    header = io.BytesIO()
    # The npy format pads the header, so a smaller first dimension does not move the data.
    description = {"descr": "|u1", "fortran_order": False, "shape": (len(keep), *shape[1:])}
    np.lib.format.write_array_header_1_0(header, description)
    assert header.tell() == start
    with open(folder / "images.npy", "r+b") as file:
        file.write(header.getvalue())
        for new, old in enumerate(keep):
            if new != old:
                file.seek(start + old * row_bytes)
                row = file.read(row_bytes)
                file.seek(start + new * row_bytes)
                file.write(row)
        file.truncate(start + len(keep) * row_bytes)


def hold_out(index: pd.DataFrame, n: int | float, seed: int) -> pd.DataFrame:
    """Move random training classes to the validation split.

    Args:
        index: The index, with columns label and split.
        n: Number of classes to move; below 1, the fraction of the training classes, rounded, at least one class.
        seed: Seed of the draw.

    Returns:
        A copy of the index with the new splits.

    Raises:
        PreparationError: no training class would be moved, or none would remain.
    """
    classes = np.unique(index.label[index.split == "train"])
    held = max(1, round(n * len(classes))) if n < 1 else int(n)
    if not 0 < held < len(classes):
        raise PreparationError(
            f"--val-fraction moves {held} of {len(classes)} training classes to validation: got {n:g}; at least one "
            "class must be moved and one must remain for training"
        )
    chosen = np.random.default_rng(seed).choice(classes, held, replace=False)
    return index.assign(split=index.split.mask(index.split.eq("train") & index.label.isin(chosen), "val"))


def count(index: pd.DataFrame) -> dict[str, int]:
    """Count classes and images per split, for comparison with the published counts.

    Args:
        index: The index, with columns label and split.

    Returns:
        Counts by name, such as "train classes" and "test images".
    """
    groups = index.groupby("split")
    classes = {f"{split} classes": n for split, n in groups.label.nunique().items()}
    return {**classes, **{f"{split} images": n for split, n in groups.size().items()}}


def check_counts(name: str, found: dict[str, int], published: dict[str, int]) -> None:
    """Refuse a source whose counts differ from the published ones.

    Args:
        name: Title of the dataset or protocol, for the message.
        found: Counts of the source, by name; a missing name counts as 0.
        published: Published counts, by name.

    Raises:
        PreparationError: a count differs; the message lists each difference.
    """
    wrong = [f"{found.get(k, 0):,} {k} (published: {n:,})" for k, n in published.items() if found.get(k, 0) != n]
    if wrong:
        raise PreparationError(
            f"the source is incomplete or not the original {name}: got {', '.join(wrong)}; {DOWNLOAD_AGAIN}"
        )


def check_classes(where: str, found: set, expected: set) -> None:
    """Refuse missing and unexpected classes.

    Args:
        where: The file or folder that defines the classes, for the message.
        found: Classes of the source.
        expected: Classes of the original.

    Raises:
        PreparationError: a class is missing or unexpected; the message names up to ten.
    """
    for problem, classes in (("missing", expected - found), ("unexpected", found - expected)):
        if classes:
            raise PreparationError(f"{where}: {problem} classes {_listed(sorted(classes))}; {DOWNLOAD_AGAIN}")


def _listed(values: Sequence[object], most: int = 10) -> str:
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def finish(folder: Path, index: pd.DataFrame, card: dict) -> None:
    """Check the index and write `index.parquet` and `card.json` beside `images.npy`.

    Args:
        folder: The folder that contains the filled `images.npy`.
        index: One row per image, in the order of `images.npy`: label (int64; -1 for junk and distractors), split
            (train, val or test), role (one of ROLES), camera (int64; -1: unknown) and source (file name).
        card: Name, source, licence, protocol and settings. Counts and hashes are added here.

    Raises:
        PreparationError: wrong columns, splits or roles, a class in two splits, or a row without an image.
    """
    images = np.load(folder / "images.npy", mmap_mode="r")
    _check(index, images)
    index = index.astype({"label": "int64", "camera": "int64"})
    index.to_parquet(folder / "index.parquet", index=False)
    known = index[index.label >= 0]
    roles = {r: int((index.role == r).sum()) for r in ROLES}
    if not roles["pool"]:  # only Market-1501 has such images
        del roles["pool"]
    card = {
        "format": FORMAT,
        **card,
        "images": len(index),
        "image_shape": list(images.shape[1:]),
        "classes": {s: int(known[known.split == s].label.nunique()) for s in SPLITS},
        "images_per_split": {s: int((index.split == s).sum()) for s in SPLITS},
        "roles": roles,
        "pixel_sha256": file_sha256(folder / "images.npy"),
        "index_sha256": index_sha256(index),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    for name in FILES:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def _check(index: pd.DataFrame, images: np.ndarray) -> None:
    if tuple(index.columns) != COLUMNS:
        raise PreparationError(f"wrong index columns: got {list(index.columns)}; expected {list(COLUMNS)}")
    if len(index) != len(images):
        raise PreparationError(f"index must have one row per image: got {len(index)} rows for {len(images)} images")
    for column, allowed in (("split", SPLITS), ("role", ROLES)):
        unknown = sorted(set(index[column]) - set(allowed))
        if unknown:
            raise PreparationError(
                f"index column {column} has unknown values: got {unknown}; allowed are {list(allowed)}"
            )
    known = index[index.label >= 0]
    splits = known.groupby("label").split.nunique()
    if (splits > 1).any():
        raise PreparationError(
            f"classes must be in one split each: got classes {list(splits[splits > 1].index[:5])} in several"
        )
