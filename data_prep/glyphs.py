"""Prepare glyphs, the built-in dataset of drawn characters.

A class is a Unicode character; its images are drawings in up to sixteen
typefaces. Like the paper's datasets it has many classes, few images per class
and unseen classes at test time. Each image has a fixed jitter, drawn from the
dataset's seed. The classes are split into 60 % train, 10 % val and 30 % test.
"""

import json
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


def prepare(out: Path) -> dict:
    """Draw and write the glyphs dataset, in seconds.

    Args:
        out: The folder to write.

    Returns:
        The card. The same versions of matplotlib, Pillow and FreeType give the same bytes.

    Raises:
        PreparationError: a font file differs from the one of the glyph list, or `out` cannot be replaced.
    """
    listed = json.loads(LIST_FILE.read_text())
    check_faces(listed["sha256"])
    classes = listed["classes"]
    rng = np.random.default_rng(SEED)
    split_of = split_classes(len(classes), rng)
    rows, inks = [], []
    for label, entry in enumerate(classes):
        for face in entry["faces"]:
            code = f"U+{ord(entry['character']):04X}"
            rows.append((label, split_of[label], "both", -1, f"{code} {FACES[face]}"))
            inks.append((entry["character"], FACES[face]))
    with new_folder(out) as folder:
        images = create_images(folder, len(rows), SIDE, SIDE, 1)
        for i, (character, face) in enumerate(tqdm(inks, desc="glyphs", unit="images", mininterval=1)):
            images[i, :, :, 0] = jitter(draw(character, face), rng)
        images.flush()
        index = pd.DataFrame(rows, columns=list(COLUMNS))
        finish(folder, index, card())
    return json.loads((Path(out) / "card.json").read_text())


def card() -> dict:
    """Return the entries of the card besides counts and hashes."""
    return {
        "name": "glyphs",
        "source": "characters of Unicode categories L, N, P, S drawn in sixteen faces that matplotlib ships",
        "licence": "the fonts' own: DejaVu (Bitstream Vera) and STIX, LICENSE_DEJAVU and LICENSE_STIX in matplotlib",
        "protocol": "all-vs-rest",
        "recall_at": [1, 2, 4, 8, 16, 32],
        "settings": {"seed": SEED, "shares": SHARES, "jitter": JITTER},
        "versions": {
            "matplotlib": matplotlib.__version__,
            "pillow": PIL.__version__,
            "freetype": features.version("freetype2"),
            "unicode": unicodedata.unidata_version,
        },
    }


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


def jitter(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a character under a random affine map, with random grey levels, noise and occluding square.

    Args:
        ink: Drawing of the character, uint8 (h, w), 255 = ink.
        rng: Random generator, which is advanced.

    Returns:
        uint8 array of shape (32, 32).
    """
    scale, angle, shear = (rng.uniform(*JITTER[k]) for k in ("scale", "rotation_degrees", "shear"))
    low, high = JITTER["shift_pixels"]
    shift = rng.uniform(low, high, size=2)
    angle = np.deg2rad(angle)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    zoom = scale * JITTER["box_pixels"] / max(ink.shape)
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
    background, level = rng.uniform(*JITTER["background"]), rng.uniform(*JITTER["ink"])
    image = background + (level - background) * cover
    if rng.random() < JITTER["occluded_share"]:
        side = rng.integers(JITTER["occluder_pixels"][0], JITTER["occluder_pixels"][1] + 1)
        top, left = rng.integers(0, SIDE - side + 1, size=2)
        image[top : top + side, left : left + side] = rng.random()
    image += rng.normal(0, JITTER["noise_std"], image.shape)
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)
