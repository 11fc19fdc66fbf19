"""From a source's images to a prepared dataset, on all cores, in bounded memory."""

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

from data_prep.archives import Source, open_source, read, verify
from data_prep.originals import Original
from data_prep.prepared import PreparationError, check_replaceable, create_images, drop_rows, finish, new_folder
from hloss.runs.images import EXTENSIONS, BadImage, ImageSettings

WAITING = 4  # images read ahead for each worker: what bounds the memory
LISTED = 20  # bad images named in a message; the card names all


@dataclass(frozen=True)
class Options:
    """Options of every dataset: how images are resized, which classes validate, which faults are accepted."""

    image_settings: ImageSettings
    val_fraction: float = 0.1
    seed: int = 0
    any_checksum: bool = False
    skip_bad: bool = False

    def settings(self) -> dict:
        """For the card."""
        return {**self.image_settings.settings(), "val_fraction": self.val_fraction, "seed": self.seed}


def begin(source: Path, out: Path, original: Original, options: Options, texts: Collection[str]) -> tuple[Source, dict]:
    """The source, opened, and what the card says of it, after every check that needs no decoding."""
    check_replaceable(out, original.name)
    found = verify(source, original, options.any_checksum)
    return open_source(source, texts), found


def convert(out: Path, source: Source, index: pd.DataFrame, options: Options, card: dict) -> dict:
    """Decode each image of `index` (its column `source` names a file of the source) and write the prepared dataset.

    Returns the card. Raises PreparationError, and leaves nothing behind, if an image is bad and not to be skipped.
    """
    rows = {name: row for row, name in enumerate(index.source)}
    if len(rows) < len(index):
        twice = index.source[index.source.duplicated()].iloc[0]
        raise PreparationError(f"the index names {twice} twice; an image has one row")
    lacking = [name for name in index.source if name not in source.files]
    if lacking:
        raise PreparationError(
            f"{source.path} lacks {len(lacking):,} of the images its index names, the first is {lacking[0]}; "
            "get the original again"
        )
    with new_folder(out, card["name"]) as folder:
        images = ((rows[name], data) for name, data in read(source, index.source))
        unused = sum(name.lower().endswith(EXTENSIONS) for name in source.files.keys() - rows.keys())
        fill(folder, images, index, options, {**card, "ignored_files": source.ignored, "unused_images": unused})
    return json.loads((Path(out) / "card.json").read_text())


def fill(
    folder: Path,
    images: Iterable[tuple[int, bytes | np.ndarray]],
    index: pd.DataFrame,
    options: Options,
    card: dict,
) -> None:
    """Write a prepared dataset into `folder`, from pairs of a row and its image (a file's bytes or uint8 (h, w, 3))."""
    settings = options.image_settings
    pixels = create_images(folder, len(index), settings.height, settings.width, 3)
    bad = _decode_all(pixels, images, settings, card["name"])
    skipped = {index.source.iloc[row]: reason for row, reason in sorted(bad.items())}
    if skipped and not options.skip_bad:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in list(skipped.items())[:LISTED])
        more = f"\n  and {len(skipped) - LISTED:,} more" if len(skipped) > LISTED else ""
        raise PreparationError(
            f"{len(skipped):,} of {len(index):,} images cannot be used; replace them, or pass --skip-bad to leave them "
            f"out and have the card name them:{listed}{more}"
        )
    if skipped:
        drop_rows(folder, bad)
        left = index.drop(index.index[sorted(bad)])
        if set(left.split) != set(index.split):
            raise PreparationError(f"without the {len(skipped):,} bad images a whole split is empty")
        index = left
    finish(folder, index, {**card, "skipped_images": skipped})


def _decode_all(
    pixels: np.memmap, images: Iterable[tuple[int, bytes | np.ndarray]], settings: ImageSettings, name: str
) -> dict[int, str]:
    """Fill the rows of `images.npy`; returns why a row could not be, by row. Pillow works outside of Python's lock."""
    # Written to the file and not through the map: mapped pages would count as this process's memory, and a write
    # that the disk refuses would be a signal instead of an error.
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
                if len(waiting) > WAITING * workers:
                    waiting.popleft().result()
                    bar.update()
            for future in waiting:
                future.result()
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(descriptor)
    return bad


def _write_all(descriptor: int, row: np.ndarray, place: int) -> None:
    left = memoryview(row.tobytes())
    while left:
        written = os.pwrite(descriptor, left, place)
        left, place = left[written:], place + written
