"""Decode the images of a source and write the prepared dataset, on all cores and in bounded memory."""

import json
import os
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from data_prep.archives import Source, open_source, read_files, verify
from data_prep.check import can_select_checkpoint, check_measurable, too_small
from data_prep.originals import Original
from data_prep.prepared import (
    DOWNLOAD_AGAIN,
    PreparationError,
    check_replaceable,
    create_images,
    drop_rows,
    finish,
    new_folder,
)
from hloss.runs.images import EXTENSIONS, BadImage, ImageSettings

QUEUED_PER_WORKER = 4  # images read ahead for each worker; this bounds the memory
MAX_LISTED = 20  # bad images listed in a message; the card lists all


@dataclass(frozen=True)
class Options:
    """Options of every dataset.

    Attributes:
        image_settings: How images are cropped and resized.
        val_fraction: Training classes moved to validation: a fraction below 1, or a number of classes. 0: none.
        seed: Seed of the random choice of classes, 0 or more.
        any_checksum: Whether to accept an archive that differs from the published one.
        skip_bad: Whether to leave out images that cannot be decoded.
    """

    image_settings: ImageSettings
    val_fraction: float = 0.1
    seed: int = 0
    any_checksum: bool = False
    skip_bad: bool = False

    def settings(self) -> dict:
        """Return the settings that the card records."""
        return {**self.image_settings.settings(), "val_fraction": self.val_fraction, "seed": self.seed}


def open_original(
    source: Path, out: Path, original: Original, options: Options, texts: Collection[str]
) -> tuple[Source, dict]:
    """Check the output folder and the checksum of an original archive, and open it.

    Args:
        source: The archive or its extracted folder.
        out: The folder to write.
        original: The published archive.
        options: Options of the preparation.
        texts: Names of text files to read.

    Returns:
        The opened source, and what the card states about it.

    Raises:
        PreparationError: `out` cannot be replaced, or the source is not the original.
    """
    check_replaceable(out, original.name)
    found = verify(source, original, options.any_checksum)
    return open_source(source, texts), found


def convert(out: Path, source: Source, index: pd.DataFrame, options: Options, card: dict) -> dict:
    """Decode the images of an index and write the prepared dataset.

    Args:
        out: The folder to write.
        source: The opened source.
        index: One row per image, with the columns of a prepared dataset; `source` is the image's path in the source.
        options: Options of the preparation.
        card: Entries of the card besides counts and hashes.

    Returns:
        The card.

    Raises:
        PreparationError: an image is missing, listed twice or cannot be decoded, or the disk is full. Nothing is
            written then.
    """
    rows = {name: row for row, name in enumerate(index.source)}
    if len(rows) < len(index):
        twice = index.source[index.source.duplicated()].iloc[0]
        raise PreparationError(
            f"{source.path}: {twice} is listed twice; each image must be listed once; {DOWNLOAD_AGAIN}"
        )
    lacking = [name for name in index.source if name not in source.files]
    if lacking:
        raise PreparationError(
            f"{source.path}: {len(lacking):,} of {len(index):,} listed images do not exist, the first is {lacking[0]}; "
            f"{DOWNLOAD_AGAIN}"
        )
    with new_folder(out, card["name"]) as folder:
        images = ((rows[name], data) for name, data in read_files(source, index.source))
        unused = sum(name.lower().endswith(EXTENSIONS) for name in source.files.keys() - rows.keys())
        write_images(folder, images, index, options, {**card, "ignored_files": source.ignored, "unused_images": unused})
    return json.loads((Path(out) / "card.json").read_text())


def write_images(
    folder: Path,
    images: Iterable[tuple[int, bytes | np.ndarray]],
    index: pd.DataFrame,
    options: Options,
    card: dict,
) -> None:
    """Decode images and write the files of a prepared dataset.

    Args:
        folder: The folder to write, from `new_folder`.
        images: Row number and image of each row of the index, in any order. An image is the content of an image file
            or a uint8 array of shape (height, width, 3).
        index: One row per image, with the columns of a prepared dataset.
        options: Options of the preparation.
        card: Entries of the card besides counts and hashes.

    Raises:
        PreparationError: an image cannot be decoded and `options.skip_bad` is False, or without such images a split
            would be empty, or could not be evaluated.
    """
    settings = options.image_settings
    pixels = create_images(folder, len(index), settings.height, settings.width, 3)
    bad = _decode_all(pixels, images, settings, card["name"])
    skipped = {index.source.iloc[row]: reason for row, reason in sorted(bad.items())}
    if skipped and not options.skip_bad:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in list(skipped.items())[:MAX_LISTED])
        more = f"\n  and {len(skipped) - MAX_LISTED:,} more" if len(skipped) > MAX_LISTED else ""
        raise PreparationError(
            f"{len(skipped):,} of {len(index):,} images cannot be decoded; replace them, or pass --skip-bad to leave "
            f"them out (card.json then lists them):{listed}{more}"
        )
    without = ""
    if skipped:
        drop_rows(folder, bad)
        left = index.drop(index.index[sorted(bad)])
        if empty := sorted(set(index.split) - set(left.split)):
            raise PreparationError(
                f"{len(skipped):,} of {len(index):,} images cannot be decoded: no image of {', '.join(empty)} remains; "
                "replace them"
            )
        without = f"without the {len(skipped):,} of {len(index):,} images that cannot be decoded, "
        if can_select_checkpoint(index, card["protocol"]) and not can_select_checkpoint(left, card["protocol"]):
            raise PreparationError(
                f"{without}{too_small(left, card['protocol'])}; replace these images, or pass a larger --val-fraction"
            )
        index = left
    for split in sorted({"val", "test"} & set(index.split)):
        check_measurable(index, split, card["protocol"], without)
    finish(folder, index, {**card, "skipped_images": skipped})


def _decode_all(
    pixels: np.memmap, images: Iterable[tuple[int, bytes | np.ndarray]], settings: ImageSettings, name: str
) -> dict[int, str]:
    """Fill the rows of `images.npy` and return the reason for each bad row. Pillow releases Python's global lock."""
    # Rows are written to the file, not to the memory map: mapped pages would count as memory of this process, and a
    # failed write to the map would kill the process instead of raising an error.
    descriptor = os.open(str(pixels.filename), os.O_WRONLY)
    row_bytes, start = pixels[0].size, pixels.offset
    bad: dict[int, str] = {}

    def work(row: int, image: bytes | np.ndarray) -> None:
        try:
            _write_all(descriptor, settings(image), start + row * row_bytes)
        except BadImage as error:
            bad[row] = str(error)

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        with tqdm(total=len(pixels), desc=name, unit="images", mininterval=1) as bar:
            for row, image in images:
                waiting.append(pool.submit(work, row, image))
                if len(waiting) > QUEUED_PER_WORKER * workers:
                    waiting.popleft().result()
                    bar.update()
            for future in waiting:
                future.result()
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(descriptor)
    return bad


def _write_all(descriptor: int, row: np.ndarray, offset: int) -> None:
    remaining = memoryview(row.tobytes())
    while remaining:
        written = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[written:], offset + written
