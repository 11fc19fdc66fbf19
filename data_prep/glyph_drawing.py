"""Draw one character in one of the sixteen typefaces that matplotlib ships."""

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
FONT_PIXELS = 48  # font size of a drawing, before it is cropped and resized
CANVAS = 192


def face_path(face: str) -> Path:
    """Return the path of one of the FACES in the installed matplotlib."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face


def face_checksums() -> dict[str, str]:
    """Return the SHA-256 checksum of each font file, by name."""
    return {face: hashlib.sha256(face_path(face).read_bytes()).hexdigest() for face in FACES}


def check_faces(expected: dict[str, str]) -> None:
    """Check that the installed font files are those that the glyph list was made with.

    Args:
        expected: SHA-256 checksum of each font file, by name.

    Raises:
        PreparationError: a font file differs.
    """
    for face, digest in face_checksums().items():
        if digest != expected[face]:
            raise PreparationError(
                f"{face_path(face)} is not the font file of the glyph list: got sha256 {digest}, expected "
                f"{expected[face]}; install another version of matplotlib (this is {matplotlib.__version__})"
            )


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # The basic layout engine draws the same pixels with and without libraqm.
    return ImageFont.truetype(str(face_path(face)), FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)


def draw(character: str, face: str) -> np.ndarray:
    """Draw a character and crop it to its bounding box.

    Args:
        character: The character.
        face: One of the FACES.

    Returns:
        uint8 array of shape (h, w), 255 = ink; of shape (0, 0) for an empty drawing.
    """
    canvas = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(canvas).text((CANVAS // 3, CANVAS // 3), character, fill=255, font=_font(face))
    box = canvas.getbbox()
    return np.asarray(canvas.crop(box)) if box else np.zeros((0, 0), np.uint8)


def fit(ink: np.ndarray, side: int = 24) -> np.ndarray:
    """Scale a drawing to fit a square, centred and with its aspect ratio.

    Args:
        ink: Drawing, uint8 (h, w), not empty.
        side: Side of the square in pixels.

    Returns:
        uint8 array of shape (side, side).
    """
    height, width = ink.shape
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    square = Image.new("L", (side, side))
    resized = Image.fromarray(ink).resize(size, Image.Resampling.BILINEAR)
    square.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)
