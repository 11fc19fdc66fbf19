"""Draw example pictures of a user: photographs of emblems, one folder per emblem.

An emblem is a class: four coloured shapes on a round plate. A picture shows it rotated, shifted, in another size and
light, on another background. They are written as JPEG files, as a camera does, and prepared like any other pictures.
"""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

SIDE = 96  # width of a picture in pixels; the height is 3/4 of it
SHAPES = 4  # on a plate


def draw_pictures(folder: Path, classes: int = 40, per_class: int = 12) -> None:
    """Write pictures to `FOLDER/emblem07/3.jpg`, the same at every call.

    Args:
        folder: The folder to create or fill.
        classes: Number of emblems.
        per_class: Number of pictures of each emblem.
    """
    for emblem in range(classes):
        place = folder / f"emblem{emblem:02d}"
        place.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            draw_picture(emblem, number).save(place / f"{number}.jpg", quality=90)


def draw_picture(emblem: int, number: int) -> Image.Image:
    """Draw one picture.

    Args:
        emblem: Number of the class, 0 or more.
        number: Number of the picture in its class, 0 or more.

    Returns:
        An RGB image of SIDE x 3/4 SIDE pixels, which depends on the two numbers only.
    """
    rng = np.random.default_rng([emblem, number])
    height, width = 3 * SIDE // 4, SIDE
    shade = rng.integers(60, 200, 3) + rng.normal(0, 12, (height, width, 1))
    picture = Image.fromarray(shade.clip(0, 255).astype(np.uint8))
    side = int(height * rng.uniform(0.7, 0.95))
    plate = _plate(emblem).rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC).resize((side, side))
    corner = int(rng.uniform(0, width - side)), int(rng.uniform(0, height - side))
    picture.paste(plate, corner, plate)
    return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.6, 1.3))


def _plate(emblem: int) -> Image.Image:
    """Draw the emblem upright, 4 pixels per pixel of a picture, on a transparent background."""
    rng = np.random.default_rng(emblem)
    side = 3 * SIDE
    plate = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(plate)
    pen.ellipse((0, 0, side - 1, side - 1), fill=_color(rng, 0.3))
    for _ in range(SHAPES):
        centre, radius = rng.uniform(0.3, 0.7, 2) * side, rng.uniform(0.1, 0.2) * side
        corners = int(rng.choice([3, 4, 5, 30]))  # 30 corners look like a circle
        pen.regular_polygon((*centre, radius), corners, rotation=int(rng.integers(0, 90)), fill=_color(rng, 0.9))
    return plate


def _color(rng: np.random.Generator, saturation: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(), saturation, rng.uniform(0.6, 1))
    return int(255 * red), int(255 * green), int(255 * blue)
