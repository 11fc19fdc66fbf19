"""Decode and resize image files; crop and flip batches of images.

`ImageSettings` decodes and resizes one image. `augment`, `center_crop` and `stripes` crop batches. Image files are
decoded to 8-bit RGB:

- Grey images have three equal channels. Black-and-white images have the values 0 and 255.
- 16-bit values are reduced to their high byte. (A plain conversion clips all values above 255 to white.)
- Palette images have the colours of their palette. Transparent pixels are composed on white.
- CMYK images are converted without colour profiles: R = (255 - C) (255 - K) / 255; G and B likewise.
- Other colour spaces (YCbCr, Lab, HSV) are converted by Pillow.
- Images that EXIF marks as rotated or mirrored are turned upright.
- The first page or frame of a file is used.
- Truncated, empty and unknown files, floating-point pixels and more than MAX_PIXELS pixels raise `BadImage`.
"""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Image.init()  # registers the formats of Pillow
# Formats of photographs and scans, without icons, textures and films. EPS, PDF and WMF are left out because Pillow
# would start other programs on an unchecked file. TGA is last because its files have no signature.
_USUAL = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_OTHERS = ("JPEG2000", "AVIF", "DIB", "PCX", "PSD", "QOI", "SGI", "SUN", "TGA")
FORMATS = tuple(name for name in _USUAL + _OTHERS if name in Image.OPEN)
# Pillow's JPEG plugin reads MPO (a JPEG file with several images). PFM is left out: its pixels are floating-point.
EXTENSIONS = tuple(
    extension for extension, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO") and extension != ".pfm"
)
MAX_PIXELS = 2**26  # 8192 x 8192, 200 MB as RGB
WHITE = 255
FILTERS = {"pad": Image.Resampling.BICUBIC, "stretch": Image.Resampling.BILINEAR}
BBOX250 = {"below_grey": 250, "margin_pixels": 15}
STRIPE_ROWS, STRIPE_STARTS = 60, (0, 50, 100)  # for images with 160 rows


class BadImage(ValueError):
    """The bytes are not an image of a supported kind; the message gives the reason."""


@dataclass(frozen=True)
class ImageSettings:
    """Decode, crop and resize images of a dataset in the same way.

    Attributes:
        height: height of the result in pixels.
        width: width of the result in pixels.
        fit: "pad" keeps the aspect ratio: the image is scaled to fit height x width (bicubic) and centred on white.
            "stretch" changes the aspect ratio (bilinear). Both use an antialiasing filter when they shrink
            the image.
        crop: None, or "bbox250", which removes the white border before resizing, as Song et al. (2016) do. The crop is
            the bounding box of all pixels with a grey value below 250, extended by 15 pixels on each side.
    """

    height: int
    width: int
    fit: str
    crop: str | None = None

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """Decode, crop and resize one image.

        Args:
            image: the bytes of an image file, or RGB pixels, uint8 (h, w, 3).

        Returns:
            RGB pixels, uint8 (height, width, 3).

        Raises:
            BadImage: the bytes cannot be decoded.
        """
        decoded = decode(image) if isinstance(image, bytes) else Image.fromarray(image)
        if self.crop:
            decoded = crop_white(decoded)
        return fit(decoded, self.height, self.width, self.fit)

    def settings(self) -> dict:
        """The settings as a dataset's card stores them: with the interpolation and the parameters of the crop."""
        crop = {"crop": self.crop, **BBOX250} if self.crop else {"crop": None}
        interpolation = FILTERS[self.fit].name.lower()
        return {"height": self.height, "width": self.width, "fit": self.fit, "interpolation": interpolation, **crop}


def decode(data: bytes) -> Image.Image:
    """Decode the bytes of an image file, as the module's docstring describes.

    Args:
        data: the bytes of the file.

    Returns:
        An upright image in mode "RGB".

    Raises:
        BadImage: the bytes are not an image of a supported kind.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"too many pixels: got {width} x {height}; at most {MAX_PIXELS:,} are decoded")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image of a supported format; supported are {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise many types on broken bytes.
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels: their range is unknown; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        return Image.fromarray(_high_byte(np.asarray(image))).convert("RGB")
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (WHITE,) * 4)
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_byte(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage(f"pixels are out of range: got {values.min()} to {values.max()}; allowed are 0 to {0xFFFF}")
    return (values >> 8).astype(np.uint8)


def crop_white(image: Image.Image) -> Image.Image:
    """Remove the white border of an image, as `ImageSettings` with `crop="bbox250"` does.

    Args:
        image: an RGB image.

    Returns:
        The cropped image. If all grey values are 250 or more, the image is returned unchanged.
    """
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
    """Resize an RGB image.

    Args:
        image: an image in mode "RGB".
        height: height of the result in pixels.
        width: width of the result in pixels.
        how: "pad" or "stretch", the `fit` of `ImageSettings`.

    Returns:
        uint8 (height, width, 3).
    """
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
    """Crop training images at random positions and flip them at random.

    Args:
        images: uint8 (n, c, h, w).
        crop: side of the square crop in pixels; None for the whole image.
        horizontal_flip: whether to flip each image left to right with probability 1/2.
        generator: random generator on the CPU. Each call draws 3 n numbers from it, whatever the other arguments are.

    Returns:
        uint8 (n, c, crop, crop), or (n, c, h, w) without a crop; contiguous.

    Raises:
        ValueError: the crop is larger than the images or smaller than 1.
    """
    from torchvision.transforms.v2 import functional as transforms  # Imported here because the import takes a second.

    n, channels, height, width = images.shape
    drawn = draw_views(n, (height, width), crop, horizontal_flip, generator)
    views = images.new_empty((n, channels, drawn.rows, drawn.columns))
    for i, (top, left, flip) in enumerate(zip(*(part.tolist() for part in drawn[:3]), strict=True)):
        view = transforms.crop(images[i], top, left, drawn.rows, drawn.columns)
        views[i] = transforms.horizontal_flip(view) if flip else view
    return views


class Views(NamedTuple):
    """Crops and horizontal flips of n images.

    Attributes:
        tops, lefts: int64 (n,), the first row and column of each crop.
        flips: bool (n,), whether the crop is flipped.
        rows, columns: height and width of all crops in pixels.
    """

    tops: Tensor
    lefts: Tensor
    flips: Tensor
    rows: int
    columns: int

    def share(self, own: slice) -> "Views":
        """The crops and flips of a slice of the images."""
        return self._replace(tops=self.tops[own], lefts=self.lefts[own], flips=self.flips[own])


def draw_views(
    n: int, size: tuple[int, int], crop: int | None, horizontal_flip: bool, generator: torch.Generator
) -> Views:
    """Draw random crops and horizontal flips.

    Args:
        n: number of images.
        size: their height and width in pixels.
        crop: side of the square crop in pixels; None for the whole image.
        horizontal_flip: flip each image with probability 1/2.
        generator: random generator on the CPU. Each call draws 3 n numbers from it, whatever the other arguments are.

    Returns:
        The crops and flips, on the CPU.

    Raises:
        ValueError: the crop is larger than the images or smaller than 1.
    """
    rows, columns = _crop_size(size, crop)
    draws = torch.rand((3, n), generator=generator, dtype=torch.float64)
    tops = (draws[0] * (size[0] - rows + 1)).long()
    lefts = (draws[1] * (size[1] - columns + 1)).long()
    return Views(tops, lefts, (draws[2] < 0.5).logical_and(torch.tensor(horizontal_flip)), rows, columns)


def channels_last(images: Tensor) -> Tensor:
    """Copy images to torch's channels-last memory layout.

    `Tensor.contiguous` does not change the strides of images with one channel; this function does.

    Args:
        images: (n, c, h, w).

    Returns:
        A copy of the same shape, dtype and device.
    """
    n, channels, height, width = images.shape
    return images.new_empty((n, height, width, channels)).permute(0, 3, 1, 2).copy_(images)


def center_crop(images: Tensor, crop: int | None) -> Tensor:
    """Crop images at their centre, for evaluation.

    Args:
        images: uint8 (n, c, h, w).
        crop: side of the square crop in pixels; None for the whole image.

    Returns:
        uint8 (n, c, crop, crop), or (n, c, h, w) without a crop.

    Raises:
        ValueError: the crop is larger than the images or smaller than 1.
    """
    if crop is None:
        return images
    from torchvision.transforms.v2 import functional as transforms

    return transforms.center_crop(images, list(_crop_size((images.shape[-2], images.shape[-1]), crop)))


def stripes(images: Tensor) -> Tensor:
    """Cut images of pedestrians into three overlapping horizontal stripes (the paper's re-identification network).

    The stripes have 60 rows and start at rows 0, 50 and 100, so that neighbouring stripes share ten rows.

    Args:
        images: (n, 3, 160, 60).

    Returns:
        The stripes, stacked along the channels: (n, 9, 60, 60).

    Raises:
        ValueError: the images have another shape.
    """
    if images.shape[1:] != (3, 160, 60):
        raise ValueError(f"images must have shape (n, 3, 160, 60): got {tuple(images.shape)}")
    return torch.cat([images[:, :, start : start + STRIPE_ROWS] for start in STRIPE_STARTS], 1)


def _crop_size(size: tuple[int, int], crop: int | None) -> tuple[int, int]:
    height, width = size
    if crop is None:
        return height, width
    smaller = min(height, width)
    if not 1 <= crop <= smaller:
        raise ValueError(
            f"crop={crop} does not fit into images of {height} x {width} pixels; allowed are 1 to {smaller}"
        )
    return crop, crop
