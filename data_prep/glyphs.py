"""Prepare glyphs, the built-in dataset of drawn characters.

A class is a Unicode character; its images are drawings in up to sixteen
typefaces. Like the paper's datasets it has many classes, few images per class
and unseen classes at test time. Each image has a fixed jitter, drawn from the
dataset's seed. The classes are split into 60 % train, 10 % val and 30 % test.

The same images also make six datasets with one test set per seed of a study.
A fixed tenth of the classes is for tuning alone. The other classes are cut into
FOLDS disjoint test sets. Dataset n of the first five tests on set n, and trains
and validates on classes of the other sets. Dataset TUNING validates on the
tenth and trains on classes of all sets.

The classes and splits also come in an easier and a harder drawing, with less
and more jitter.
"""

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import PIL
from PIL import Image, features
from tqdm import tqdm

from data_prep.glyph_drawing import FACES, check_faces, draw
from data_prep.glyph_list import LIST_FILE
from data_prep.prepared import create_images, finish, new_folder
from hloss.runs.datasets import COLUMNS

SIDE = 32
SEED = 20161128  # seed of jitter and split, chosen once, before any training
SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}
FOLDS = 5
TUNING = FOLDS  # number of the dataset for tuning
TUNING_SHARE = 0.1  # of all classes; a dataset of a fold has as many validation classes
TUNING_TEST = 20  # classes for tuning that are the test set of its dataset: every dataset needs one; none is read
JITTER: dict[str, Any] = {
    "box_pixels": 24,
    "scale": (0.7, 1.1),
    "rotation_degrees": (-12.0, 12.0),
    "shear": (-0.15, 0.15),
    "shift_pixels": (-2.5, 2.5),
    "background": (0.0, 0.3),
    "ink": (0.6, 1.0),
    "noise_std": 0.15,
    "occluded_share": 0.5,
    "occluder_pixels": (6, 10),
}
JITTERS: dict[str, dict[str, Any]] = {  # by difficulty
    "normal": JITTER,
    "easy": JITTER
    | {
        "scale": (0.85, 1.05),
        "rotation_degrees": (-6.0, 6.0),
        "shear": (-0.07, 0.07),
        "shift_pixels": (-1.5, 1.5),
        "noise_std": 0.08,
        "occluded_share": 0.2,
    },
    "hard": JITTER
    | {
        "scale": (0.6, 1.15),
        "rotation_degrees": (-18.0, 18.0),
        "shear": (-0.22, 0.22),
        "shift_pixels": (-3.5, 3.5),
        "noise_std": 0.2,
        "occluded_share": 0.8,
        "occluder_pixels": (8, 12),
    },
}


def prepare(out: Path, difficulty: str = "normal") -> dict:
    """Draw and write the glyphs dataset, in seconds.

    Args:
        out: The folder to write.
        difficulty: One of JITTERS.

    Returns:
        The card. The same versions of matplotlib, Pillow and FreeType give the same bytes.

    Raises:
        PreparationError: a font file differs from the one of the glyph list, or `out` cannot be replaced.
    """
    images, index, splits = draw_dataset(difficulty)
    return _write(out, images, index.assign(split=splits[index.label]), card(difficulty))


def prepare_folds(out: Path, difficulty: str = "normal") -> list[dict]:
    """Draw the images once and write the datasets OUT-0 to OUT-4, one per test set, and OUT-5 for tuning.

    The five datasets of the test sets have the same images, whose file is stored once where the disk has hard links.

    Args:
        out: Path of the datasets without their numbers.
        difficulty: One of JITTERS.

    Returns:
        The cards.

    Raises:
        PreparationError: as in `prepare`.
    """
    images, index, splits = draw_dataset(difficulty)
    cards, first = [], None
    for number, of_class in enumerate(fold_splits(len(splits))):
        split = of_class[index.label]
        used = split != ""
        folder = out.with_name(f"{out.name}-{number}")
        cards.append(
            _write(folder, images[used], index.assign(split=split)[used], fold_card(number, difficulty), first)
        )
        first = folder if number + 1 < TUNING else None
    return cards


def draw_dataset(difficulty: str = "normal") -> tuple[np.ndarray, pd.DataFrame, np.ndarray]:
    """Draw all images.

    Args:
        difficulty: One of JITTERS.

    Returns:
        Images, uint8 (n, 32, 32, 1); the index, with empty splits; and the split of each class in `glyphs`.

    Raises:
        PreparationError: a font file differs from the one of the glyph list.
    """
    listed = json.loads(LIST_FILE.read_text())
    check_faces(listed["sha256"])
    rng = np.random.default_rng(SEED)
    splits = split_classes(len(listed["classes"]), rng)
    rows, images = [], []
    drawings = [(label, entry, face) for label, entry in enumerate(listed["classes"]) for face in entry["faces"]]
    for label, entry, face in tqdm(drawings, desc="glyphs", unit="images", mininterval=1):
        code = f"U+{ord(entry['character']):04X}"
        rows.append((label, "", "both", -1, f"{code} {FACES[face]}"))
        images.append(jitter(draw(entry["character"], FACES[face]), rng, JITTERS[difficulty]))
    return np.stack(images)[..., None], pd.DataFrame(rows, columns=list(COLUMNS)), splits


def _write(out: Path, images: np.ndarray, index: pd.DataFrame, card: dict, same_images: Path | None = None) -> dict:
    """Write a dataset and return its card. `same_images`: a dataset with these images, whose file is linked."""
    with new_folder(out) as folder:
        if same_images:
            _link(same_images / "images.npy", folder / "images.npy")
        else:
            stored = create_images(folder, *images.shape)
            stored[:] = images
            stored.flush()
        finish(folder, index.reset_index(drop=True), card)
    return json.loads((Path(out) / "card.json").read_text())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)


def card(difficulty: str = "normal") -> dict:
    """Return the entries of the card besides counts and hashes.

    Args:
        difficulty: One of JITTERS.
    """
    return {
        "name": "glyphs" if difficulty == "normal" else f"glyphs-{difficulty}",
        "source": "characters of Unicode categories L, N, P, S drawn in sixteen faces that matplotlib ships",
        "licence": "the fonts' own: DejaVu (Bitstream Vera) and STIX, LICENSE_DEJAVU and LICENSE_STIX in matplotlib",
        "protocol": "all-vs-rest",
        "recall_at": [1, 2, 4, 8, 16, 32],
        "settings": {"seed": SEED, "shares": SHARES, "jitter": JITTERS[difficulty]},
        "versions": {
            "matplotlib": matplotlib.__version__,
            "pillow": PIL.__version__,
            "freetype": features.version("freetype2"),
            "unicode": unicodedata.unidata_version,
        },
    }


def fold_card(number: int, difficulty: str = "normal") -> dict:
    """Return the entries of the card of a numbered dataset besides counts and hashes.

    Args:
        number: From 0; TUNING for the dataset for tuning.
        difficulty: One of JITTERS.
    """
    split = f"test set {number} of 0 to {FOLDS - 1}; training and validation classes are drawn from the other test sets"
    if number == TUNING:
        split = (
            "for tuning: validation and test classes are in no test set of the other datasets, training classes are "
            "drawn from all of them; the few test classes decide nothing"
        )
    shares = {"tuning": TUNING_SHARE, "val": TUNING_SHARE, "test sets": FOLDS}
    settings = {"seed": SEED, "shares": shares, "jitter": JITTERS[difficulty], "test_set": number}
    return card(difficulty) | {"settings": settings, "class_split": split}


def fold_splits(n: int) -> list[np.ndarray]:
    """Draw the split of each class in the numbered datasets.

    Args:
        n: Number of classes.

    Returns:
        FOLDS + 1 arrays of n strings: train, val, test, or "" for a class that the dataset leaves out.
    """
    rng = np.random.default_rng([SEED, FOLDS])  # another stream than that of `glyphs`, whose draws stay the same
    held = round(TUNING_SHARE * n)
    tuning, tested = np.split(rng.permutation(n), [held])
    folds = []
    for test in np.array_split(tested, FOLDS):
        others = rng.permutation(np.setdiff1d(tested, test))
        folds.append(_split_of_class(n, train=others[held:], val=others[:held], test=test))
    train = rng.permutation(tested)[: (folds[0] == "train").sum()]
    folds.append(_split_of_class(n, train=train, val=tuning[TUNING_TEST:], test=tuning[:TUNING_TEST]))
    return folds


def _split_of_class(n: int, **classes: np.ndarray) -> np.ndarray:
    splits = np.full(n, "", dtype="<U5")
    for name, labels in classes.items():
        splits[labels] = name
    return splits


def split_classes(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the split of each class.

    Args:
        n: Number of classes.
        rng: Random generator, which is advanced.

    Returns:
        Array of n strings: train, val or test.
    """
    cuts = np.round(np.cumsum([SHARES["train"], SHARES["val"]]) * n).astype(int)
    splits = np.array(["train"] * cuts[0] + ["val"] * (cuts[1] - cuts[0]) + ["test"] * (n - cuts[1]))
    return rng.permutation(splits)


def jitter(ink: np.ndarray, rng: np.random.Generator, settings: dict[str, Any] = JITTER) -> np.ndarray:
    """Draw a character under a random affine map, with random grey levels, noise and occluding square.

    Args:
        ink: Drawing of the character, uint8 (h, w), 255 = ink.
        rng: Random generator, which is advanced.
        settings: One of the values of JITTERS.

    Returns:
        uint8 array of shape (32, 32).
    """
    scale, angle, shear = (rng.uniform(*settings[k]) for k in ("scale", "rotation_degrees", "shear"))
    low, high = settings["shift_pixels"]
    shift = rng.uniform(low, high, size=2)
    angle = np.deg2rad(angle)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    zoom = scale * settings["box_pixels"] / max(ink.shape)
    forward = zoom * rotation @ np.array([[1.0, shear], [0.0, 1.0]])
    inverse = np.linalg.inv(forward)
    # Pillow maps output to input coordinates: input centre + inverse (x - output centre - shift).
    centre = np.array([ink.shape[1] / 2, ink.shape[0] / 2])
    offset = centre - inverse @ (np.array([SIDE / 2, SIDE / 2]) + shift)
    affine = (*inverse[0], offset[0], *inverse[1], offset[1])
    size = (SIDE * 4, SIDE * 4)  # Drawing at four times the size and averaging avoids aliasing.
    fine = tuple(a / 4 if i % 3 < 2 else a for i, a in enumerate(affine))
    mask = Image.fromarray(ink).transform(size, Image.Transform.AFFINE, fine, Image.Resampling.BILINEAR)
    cover = np.asarray(mask, float).reshape(SIDE, 4, SIDE, 4).mean((1, 3)) / 255
    background, level = rng.uniform(*settings["background"]), rng.uniform(*settings["ink"])
    image = background + (level - background) * cover
    if rng.random() < settings["occluded_share"]:
        side = rng.integers(settings["occluder_pixels"][0], settings["occluder_pixels"][1] + 1)
        top, left = rng.integers(0, SIDE - side + 1, size=2)
        image[top : top + side, left : left + side] = rng.random()
    image += rng.normal(0, settings["noise_std"], image.shape)
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)
