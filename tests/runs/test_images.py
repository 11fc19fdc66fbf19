"""Decoding and resizing of all kinds of images, as `hloss.runs.images` describes."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hloss.runs.images import FILTERS, BadImage, ImageSettings, decode, fit
from tests.helpers.miniatures import encoded

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 8, 3), np.uint8)
GREY = RNG.integers(0, 256, (6, 8), np.uint8)


def pixels(data):
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_decodes_colours_exactly():
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(pixels(encoded(COLOURS, format)), COLOURS)
    assert np.array_equal(pixels(encoded(COLOURS, "WEBP", lossless=True)), COLOURS)


def test_decodes_grey_to_three_equal_channels():
    for data in (encoded(GREY, "PNG"), encoded(Image.fromarray(GREY), "GIF"), encoded(GREY, "TIFF")):
        assert np.array_equal(pixels(data), np.stack([GREY] * 3, 2))
    jpeg = pixels(encoded(GREY, "JPEG", quality=95))
    assert (jpeg == jpeg[..., :1]).all()
    assert np.abs(jpeg[..., 0].astype(int) - GREY).mean() < 10


def test_decodes_black_and_white_to_0_and_255():
    assert np.array_equal(pixels(encoded(GREY > 127, "PNG"))[..., 0], np.where(GREY > 127, 255, 0))


def test_decodes_the_colours_of_a_palette():
    few = COLOURS[:1].repeat(6, 0)
    image = Image.fromarray(few).quantize(16)
    assert image.mode == "P"
    assert np.array_equal(pixels(encoded(image, "PNG")), few)
    assert np.array_equal(pixels(encoded(image, "GIF")), few)


def test_composes_transparency_on_white():
    alpha = np.zeros((6, 8), np.uint8)
    alpha[:, 4:], alpha[:, 7] = 255, 128
    rgba = pixels(encoded(np.dstack([COLOURS, alpha]), "PNG"))
    assert (rgba[:, :4] == 255).all()
    assert np.array_equal(rgba[:, 4:7], COLOURS[:, 4:7])
    half = COLOURS[:, 7].astype(int) * 128 / 255 + 255 * 127 / 255
    assert np.abs(rgba[:, 7] - half).max() <= 1
    grey = pixels(encoded(Image.fromarray(np.dstack([GREY, alpha]), "LA"), "PNG"))
    assert (grey[:, :4] == 255).all()
    image = Image.fromarray(COLOURS[:1].repeat(6, 0)).quantize(16)
    first = image.getpixel((0, 0))
    assert (pixels(encoded(image, "PNG", transparency=first))[:, 0] == 255).all()
    assert (pixels(encoded(image, "PNG", transparency=bytes([0] * 16)))[:, :] == 255).all()


def test_converts_cmyk_without_a_profile():
    cmyk = RNG.integers(0, 256, (6, 8, 4), np.uint8)
    ink = cmyk.astype(float)
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    assert np.abs(pixels(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF")) - expected).max() <= 1
    flat = np.full((16, 16, 4), (0, 200, 100, 50), np.uint8)
    jpeg = pixels(encoded(Image.fromarray(flat, "CMYK"), "JPEG", quality=98))
    assert np.abs(jpeg - np.array([255, 55, 155]) * 205 / 255).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_turns_images_upright_by_exif(orientation, format):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[16:, 24:] = (250, 0, 0), (0, 0, 250)  # red above left, blue below right
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    out = pixels(encoded(np.ascontiguousarray(turn(upright)), format, exif=exif, **settings))
    assert out.shape == upright.shape
    assert np.abs(out.astype(int) - upright).mean() < 8


def png_16(values):
    """A 16-bit PNG, grey (h, w) or RGB (h, w, 3), written after the specification of the format."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_decodes_16_bits_to_the_high_byte():
    grey = RNG.integers(0, 2**16, (6, 8)).astype(np.uint16)
    colour = RNG.integers(0, 2**16, (6, 8, 3)).astype(np.uint16)
    assert np.array_equal(pixels(png_16(grey)), np.stack([grey >> 8] * 3, 2))
    assert np.array_equal(pixels(encoded(Image.fromarray(grey), "TIFF")), np.stack([grey >> 8] * 3, 2))
    assert np.array_equal(pixels(png_16(colour)), colour >> 8)
    pgm = b"P5 8 6 65535\n" + grey.astype(">u2").tobytes()
    assert np.array_equal(pixels(pgm), np.stack([grey >> 8] * 3, 2))


def test_decodes_the_first_frame():
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(data)[..., 0], GREY)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"not an image", "not an image of a supported format; supported are JPEG, PNG"),
        (encoded(COLOURS, "PNG")[:-30], "SyntaxError|OSError|broken|truncated"),
        (encoded(Image.fromarray(COLOURS).resize((300, 300)), "JPEG")[:2000], "truncated"),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(GREY.astype(np.int32) * 10**6), "TIFF"), "got .*; allowed are 0 to 65535"),
        (encoded(Image.fromarray(COLOURS), "PDF"), "not an image of a supported format; supported are JPEG, PNG"),
        (encoded(Image.fromarray(COLOURS), "EPS"), "not an image of a supported format; supported are JPEG, PNG"),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "float TIFF", "32-bit TIFF", "PDF", "EPS"],  # a PDF has its time in it
)
def test_refuses_unusable_images_with_the_reason(data, match):
    with pytest.raises(BadImage, match=match):
        decode(data)


def test_refuses_too_many_pixels_before_decoding():
    side = 8_200
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + head))
    with pytest.raises(BadImage, match=r"too many pixels: got 8200 x 8200; at most 67,108,864 are decoded"):
        decode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + crc + struct.pack(">I", 0) + b"IDAT")


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.integers(0, 10**6))
def test_broken_bytes_raise_bad_image_only(noise, format, place):
    data = bytearray(encoded(COLOURS, format))
    place %= len(data)
    data[place : place + len(noise)] = noise
    try:
        image = decode(bytes(data))
    except BadImage:
        return
    assert image.mode == "RGB"


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([(32, 32), (40, 15), (15, 40)]))
def test_pad_keeps_the_aspect_ratio_and_centres(height, width, size):
    out = fit(Image.new("RGB", (width, height)), *size, "pad")
    assert out.shape == (*size, 3)
    rows, columns = np.flatnonzero((out == 0).all(2).any(1)), np.flatnonzero((out == 0).all(2).any(0))
    assert (out == 0).all(2).sum() == len(rows) * len(columns)
    scale = min(size[0] / height, size[1] / width)
    assert len(rows) == max(1, round(scale * height))
    assert len(columns) == max(1, round(scale * width))
    for inside, whole in ((rows, size[0]), (columns, size[1])):
        assert abs(inside[0] - (whole - 1 - inside[-1])) <= 1
    assert len(rows) == size[0] or len(columns) == size[1]


def test_stretch_fills_the_frame():
    out = ImageSettings(160, 60, "stretch")(encoded(np.full((20, 90, 3), 7, np.uint8), "PNG"))
    assert out.shape == (160, 60, 3)
    assert (out == 7).all()


def test_images_of_the_right_size_are_not_resampled():
    assert np.array_equal(ImageSettings(6, 8, "pad")(encoded(COLOURS, "PNG")), COLOURS)
    assert np.array_equal(ImageSettings(6, 8, "stretch")(COLOURS), COLOURS)


def test_shrinking_applies_an_antialiasing_filter():
    """A checkerboard of single pixels becomes grey; resampling without a filter would leave black or white pixels."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    for how in FILTERS:
        out = fit(Image.fromarray(board.astype(np.uint8)).convert("RGB"), 16, 16, how)
        assert np.abs(out.astype(int) - 127).max() <= 8
