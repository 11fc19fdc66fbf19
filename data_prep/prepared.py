"""The one way a prepared dataset is written: into a temporary folder beside its place, then renamed."""

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


class PreparationError(Exception):
    """The source cannot become a prepared dataset; the message names the file, the reason and the remedy."""


@contextmanager
def new_folder(out: Path, name: str | None = None) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` only when the block ends well; otherwise nothing stays behind.

    An older preparation of the same dataset is replaced; `name` is the dataset's, to tell it from another one's.
    """
    out = Path(out)
    check_replaceable(out, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.preparing-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):  # what an interrupted preparation left
        _remove_unless_locked(left)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        with _preparation_lock(folder):  # tells another process that this folder is in use
            yield folder
            folder.chmod(0o755)
            _take_place(folder, out)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise PreparationError(
            f"no space left on the device of {out.parent.resolve()}; free some or choose another --out"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(out: Path, name: str | None = None) -> None:
    """Refuse an `out` that holds anything but a prepared dataset of this name."""
    out = Path(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise PreparationError(f"{out} is a file; choose another --out")
    there = {p.name for p in out.iterdir()}
    if there and ("card.json" not in there or there - set(FILES)):
        raise PreparationError(
            f"{out} holds something that is not a prepared dataset ({', '.join(sorted(there - set(FILES))[:5])}); "
            "choose another --out or empty it"
        )
    if there and name:
        try:
            other = json.loads((out / "card.json").read_text()).get("name")
        except ValueError:
            other = "with a broken card.json"
        if other != name:
            raise PreparationError(f"{out} holds the prepared dataset {other!r}, not {name!r}; choose another --out")


def _preparation_lock(folder: Path) -> AbstractContextManager[None]:
    return file_lock(folder, f"is preparing {folder}")


def _remove_unless_locked(left: Path) -> None:
    try:
        with _preparation_lock(left):
            shutil.rmtree(left)
    except LockedError as error:
        raise PreparationError(str(error)) from None


def _take_place(folder: Path, out: Path) -> None:
    # The older one is renamed first: removed in place, an interruption would leave half of it looking whole.
    older = folder.with_name(f"{folder.name}-older")
    if out.exists():
        out.rename(older)
    folder.rename(out)
    shutil.rmtree(older, ignore_errors=True)


def create_images(folder: Path, n: int, height: int, width: int, channels: int) -> np.memmap:
    """Create `images.npy`, uint8 of shape (n, height, width, channels), to be filled row by row.

    Its space is taken at once: a full disk is met here and not, as a crash, in the middle of writing to the map.
    """
    needed, free = n * height * width * channels, shutil.disk_usage(folder).free
    if needed > free:
        raise PreparationError(
            f"no space left on the device of {folder.parent.resolve()}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free; free some or choose another --out"
        )
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(n, height, width, channels)
    )
    with open(folder / "images.npy", "r+b") as file:
        reserve(file.fileno(), file.seek(0, os.SEEK_END))
    return images


def reserve(descriptor: int, size: int) -> None:
    """Take `size` bytes of the disk for an open file, where its file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise


def drop_rows(folder: Path, bad: Collection[int]) -> None:
    """Take the rows `bad` out of `images.npy`, in place."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    start, shape, row_bytes = images.offset, images.shape, images[0].size
    keep = [row for row in range(len(images)) if row not in bad]
    header = io.BytesIO()
    # The format leaves room for a longer first number, so that the data stay where they are.
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
    """The index with `n` training classes moved to val, drawn by `seed`; n below 1 is a fraction (of at least one)."""
    classes = np.unique(index.label[index.split == "train"])
    held = max(1, round(n * len(classes))) if n < 1 else int(n)
    if not 0 < held < len(classes):
        raise PreparationError(
            f"{n} of {len(classes)} training classes would hold out {held} for validation; "
            f"at least one must be held out and one be left: change --val-fraction"
        )
    chosen = np.random.default_rng(seed).choice(classes, held, replace=False)
    return index.assign(split=index.split.mask(index.split.eq("train") & index.label.isin(chosen), "val"))


def count(index: pd.DataFrame) -> dict[str, int]:
    """Classes and images per split, as the publications count them."""
    groups = index.groupby("split")
    classes = {f"{split} classes": n for split, n in groups.label.nunique().items()}
    return {**classes, **{f"{split} images": n for split, n in groups.size().items()}}


def check_counts(name: str, found: dict[str, int], published: dict[str, int]) -> None:
    """Refuse a source whose counts are not the published ones."""
    wrong = [f"{found.get(k, 0):,} {k} (published: {n:,})" for k, n in published.items() if found.get(k, 0) != n]
    if wrong:
        raise PreparationError(
            f"the source holds {', '.join(wrong)}: it is incomplete or not the original {name}; get it again "
            "(`python -m data_prep list` says where)"
        )


def check_classes(where: str, found: set, expected: set) -> None:
    """Refuse missing and extra classes by name."""
    for what, classes in (("lacks the", expected - found), ("has the extra", found - expected)):
        if classes:
            raise PreparationError(
                f"{where} {what} classes {_listed(sorted(classes))}: it is not the original; get it again"
            )


def _listed(values: Sequence[object], most: int = 10) -> str:
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def finish(folder: Path, index: pd.DataFrame, card: dict) -> None:
    """Check the index against the images, write `index.parquet` and `card.json` with counts and hashes.

    `index` has one row per image in the order of `images.npy`: label (int64, -1 for junk and distractors), split
    (train/val/test), role (one of ROLES), camera (int64, -1 where there is none), source (str).
    `card` gives name, source, licence, protocol and settings; counts and hashes are added here.
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
        raise PreparationError(f"index columns are {list(index.columns)}, expected {list(COLUMNS)}")
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
