"""Image files to the uint8 pixels of a prepared dataset, and the crops that training and evaluation take from them.

`ImageSettings` decodes and resizes one image; `augment`, `center_crop` and `stripes` cut batches. Each kind of image
is decoded as follows:

- Grey images: the three channels are equal. Black-and-white ones: 0 and 255.
- 16-bit images: the high byte of each value. (A plain conversion would clip all above 255 to white.)
- Palette images: their colours. Transparency, of palettes or alpha channels: composed on white.
- CMYK: R = (255 - C) (255 - K) / 255 and so on, without colour profiles. Other colour spaces (YCbCr, Lab, HSV): as
  Pillow converts them.
- Images that EXIF says are turned or mirrored: upright, as they are to be seen.
- Several pages or frames: the first.
- Truncated, empty and unknown files, floating-point pixels, more than MAX_PIXELS: refused, with the reason.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Image.init()  # Pillow's formats register themselves
# The formats of photographs and scans. Icons, textures and films are left out; so are EPS, PDF and WMF, for which
# outside programs would be started on a file that nobody has checked. TGA files have no signature: tried last.
_USUAL = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_OTHERS = ("JPEG2000", "AVIF", "DIB", "PCX", "PSD", "QOI", "SGI", "SUN", "TGA")
FORMATS = tuple(name for name in _USUAL + _OTHERS if name in Image.OPEN)
# Pillow reads MPO (a JPEG file of several images) by its JPEG plugin. The pixels of PFM are floating-point numbers.
EXTENSIONS = tuple(
    extension for extension, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO") and extension != ".pfm"
)
MAX_PIXELS = 2**26  # 8192 x 8192: 200 MB decoded
WHITE = 255
FILTERS = {"pad": Image.Resampling.BICUBIC, "stretch": Image.Resampling.BILINEAR}
BBOX250 = {"below_grey": 250, "margin_pixels": 15}
STRIPE_ROWS, STRIPE_STARTS = 60, (0, 50, 100)  # of images of 160 rows


class BadImage(ValueError):
    """The bytes are no image that can be used; the message says why."""


@dataclass(frozen=True)
class ImageSettings:
    """How every image of a dataset is decoded, cropped and resized.

    `fit="pad"` keeps the aspect ratio: the image is scaled to fit height x width and centred on white (bicubic);
    `fit="stretch"` does not keep it (bilinear). Both average when they shrink. `crop="bbox250"` first cuts the white
    border off, as Song et al. do: the box around all pixels of grey below 250, and 15 pixels more on each side.
    """

    height: int
    width: int
    fit: str
    crop: str | None = None

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """uint8 (height, width, 3) from a file's bytes or from uint8 (h, w, 3). Raises BadImage."""
        decoded = decode(image) if isinstance(image, bytes) else Image.fromarray(image)
        if self.crop:
            decoded = crop_white(decoded)
        return fit(decoded, self.height, self.width, self.fit)

    def settings(self) -> dict:
        """For the card."""
        crop = {"crop": self.crop, **BBOX250} if self.crop else {"crop": None}
        interpolation = FILTERS[self.fit].name.lower()
        return {"height": self.height, "width": self.width, "fit": self.fit, "interpolation": interpolation, **crop}


def decode(data: bytes) -> Image.Image:
    """The image in a file's bytes, RGB of 8 bits and upright. Raises BadImage."""
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS:,} are not decoded")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range nobody knows")
    if image.mode.startswith("I"):
        return Image.fromarray(_high_byte(np.asarray(image))).convert("RGB")
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (WHITE,) * 4)
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_byte(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage(f"integer pixels from {values.min()} to {values.max()}, at most 16 bits are read")
    return (values >> 8).astype(np.uint8)


def crop_white(image: Image.Image) -> Image.Image:
    """Without its white border (BBOX250); an image that is white all over stays as it is."""
    dark = image.convert("L").point(lambda grey: 255 * (grey < BBOX250["below_grey"]))
    box = dark.getbbox()
    if box is None:
        return image
    margin = BBOX250["margin_pixels"]
    left, top, right, bottom = box
    return image.crop(
        (
            max(left - margin, 0),
            max(top - margin, 0),
            min(right + margin, image.width),
            min(bottom + margin, image.height),
        )
    )


def fit(image: Image.Image, height: int, width: int, how: str) -> np.ndarray:
    """An RGB image as uint8 (height, width, 3), scaled as `ImageSettings` says."""
    if how == "stretch":
        return np.asarray(_resized(image, height, width, how))
    scale = min(height / image.height, width / image.width)
    inner_height, inner_width = max(1, round(scale * image.height)), max(1, round(scale * image.width))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    padded = np.full((height, width, 3), WHITE, np.uint8)
    inner = np.asarray(_resized(image, inner_height, inner_width, how))
    padded[top : top + inner_height, left : left + inner_width] = inner
    return padded


def _resized(image: Image.Image, height: int, width: int, how: str) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), FILTERS[how])


def augment(images: Tensor, crop: int | None, horizontal_flip: bool, generator: torch.Generator) -> Tensor:
    """Random crops, half of them flipped, for training.

    Args:
        images: uint8 (n, c, h, w).
        crop: side of the square that is cut out, in pixels; None for the whole image.
        horizontal_flip: whether to flip left to right with probability 1/2.
        generator: decides crops and flips, and is advanced by 3 n draws whatever the settings.

    Returns uint8 (n, c, crop, crop), contiguous. Raises ValueError if the crop is larger than the images.
    """
    from torchvision.transforms.v2 import functional as transforms  # here, because it takes a second to import

    n, _, height, width = images.shape
    rows, columns = _crop_size(images, crop)
    draws = torch.rand((3, n), generator=generator, dtype=torch.float64)
    tops = (draws[0] * (height - rows + 1)).long().tolist()
    lefts = (draws[1] * (width - columns + 1)).long().tolist()
    mirrored = (draws[2] < 0.5).logical_and(torch.tensor(horizontal_flip)).tolist()
    views = images.new_empty((n, images.shape[1], rows, columns))
    for i, (top, left, flip) in enumerate(zip(tops, lefts, mirrored, strict=True)):
        view = transforms.crop(images[i], top, left, rows, columns)
        views[i] = transforms.horizontal_flip(view) if flip else view
    return views


def center_crop(images: Tensor, crop: int | None) -> Tensor:
    """The central square of `crop` pixels of each image, for evaluation: uint8 (n, c, h, w) to (n, c, crop, crop)."""
    if crop is None:
        return images
    from torchvision.transforms.v2 import functional as transforms

    return transforms.center_crop(images, list(_crop_size(images, crop)))


def stripes(images: Tensor) -> Tensor:
    """The three overlapping horizontal parts of pedestrians, stacked: (n, 3, 160, 60) to (n, 9, 60, 60).

    Parts start at rows 0, 50 and 100 and overlap by ten (the paper's network for re-identification).
    """
    if images.shape[1:] != (3, 160, 60):
        raise ValueError(f"stripes are cut of images (n, 3, 160, 60), got {tuple(images.shape)}")
    return torch.cat([images[:, :, start : start + STRIPE_ROWS] for start in STRIPE_STARTS], 1)


def _crop_size(images: Tensor, crop: int | None) -> tuple[int, int]:
    height, width = images.shape[-2:]
    if crop is None:
        return height, width
    if not 1 <= crop <= min(height, width):
        raise ValueError(f"crop={crop} does not fit into images of {height} x {width} pixels")
    return crop, crop
