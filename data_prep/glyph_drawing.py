"""Drawing one character in one of the sixteen faces that matplotlib ships."""

import functools
import hashlib
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.prepared import PreparationError

FACES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralBolIta.ttf",
)
FONT_PIXELS = 48  # size at which a character is drawn before it is cropped and resized
CANVAS = 192


def face_path(face: str) -> Path:
    """Path of one of the FACES in the installed matplotlib."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face


def face_checksums() -> dict[str, str]:
    """sha256 of each face's file, by name."""
    return {face: hashlib.sha256(face_path(face).read_bytes()).hexdigest() for face in FACES}


def check_faces(expected: dict[str, str]) -> None:
    """Raise PreparationError where an installed font file is not the one that the glyph list was made with."""
    for face, digest in face_checksums().items():
        if digest != expected[face]:
            raise PreparationError(
                f"{face_path(face)}: sha256 {digest}, expected {expected[face]}; this matplotlib "
                f"({matplotlib.__version__}) ships another font file: install the version the glyph list names"
            )


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # The basic layout engine draws the same pixels with and without libraqm.
    return ImageFont.truetype(str(face_path(face)), FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)


def draw(character: str, face: str) -> np.ndarray:
    """Ink of a character, cropped to its bounding box: uint8 (h, w), 255 = ink; (0, 0) where nothing is drawn."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(canvas).text((CANVAS // 3, CANVAS // 3), character, fill=255, font=_font(face))
    box = canvas.getbbox()
    return np.asarray(canvas.crop(box)) if box else np.zeros((0, 0), np.uint8)


def fit(ink: np.ndarray, side: int = 24) -> np.ndarray:
    """The ink scaled to fit a square of `side` pixels, aspect kept, centred: uint8 (side, side)."""
    height, width = ink.shape
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    square = Image.new("L", (side, side))
    resized = Image.fromarray(ink).resize(size, Image.Resampling.BILINEAR)
    square.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)
