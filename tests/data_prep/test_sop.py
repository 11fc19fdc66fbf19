"""Stanford Online Products from a miniature of its archive: preparation, Song's crop and refused sources."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import sop
from data_prep.prepared import PreparationError
from hloss.runs.images import ImageSettings
from tests.helpers.miniatures import (
    SOP_PUBLISHED,
    a_batch,
    encoded,
    evaluated,
    expect,
    prepared,
    sop_files,
    write_folder,
    write_zip,
)

ROOT = "Stanford_Online_Products"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    file = write_zip(tmp_path / "Stanford_Online_Products.zip", sop_files())
    expect(monkeypatch, sop, SOP_PUBLISHED, file)
    return file


def refused(tmp_path, files, match):
    source, data = write_folder(tmp_path / "altered", files), tmp_path / "data"
    with pytest.raises(PreparationError, match=match):
        sop.prepare(source, data / "sop")
    assert not data.exists() or list(data.iterdir()) == []


def test_published_counts_equal_the_papers():
    published = {"train classes": 11_318, "test classes": 11_316, "train images": 59_551, "test images": 60_502}
    assert published == sop.PUBLISHED
    assert sop.ORIGINAL.images == 120_053 == 59_551 + 60_502


def test_prepares_and_evaluates_the_archive(archive, tmp_path):
    dataset = prepared("sop", archive, tmp_path / "data" / "sop")
    index = dataset.index
    assert dataset.card["classes"] == {"train": 10, "val": 2, "test": 11}
    assert set(index.label[index.split == "test"]) == set(range(13, 24))
    assert len(index) == 31 + 28
    assert list(dict.fromkeys(index.label)) == list(range(1, 24))
    assert index.groupby("label").size().isin([2, 3]).all()
    assert index.source.str.endswith(".JPG").all()
    assert (set(index.role), set(index.camera)) == ({"both"}, {-1})
    assert dataset.images.shape == (59, 256, 256, 3)
    table = dataset.against_published()
    assert len(table) >= 2
    assert (table["published"] == table["here"]).all()
    images, labels = a_batch(dataset)
    assert (images.shape, labels.shape) == ((8, 3, 256, 256), (8,))
    retrieval = evaluated(dataset)
    assert list(retrieval.metrics)[:4] == [f"recall@{k}" for k in (1, 10, 100, 1000)]
    assert retrieval.n_queries == 28
    assert retrieval.n_unmatched == 0


def test_a_grey_image_has_three_equal_channels(archive, tmp_path):
    dataset = prepared("sop", archive, tmp_path / "sop")
    grey = [(image == image[..., :1]).all() for image in dataset.images]
    assert np.flatnonzero(grey).tolist() == [4]


def test_the_extracted_folder_equals_the_archive(archive, tmp_path):
    packed = prepared("sop", archive, tmp_path / "packed" / "sop")
    unpacked = prepared("sop", write_folder(tmp_path / "extracted", sop_files()), tmp_path / "unpacked" / "sop")
    assert unpacked.card["pixel_sha256"] == packed.card["pixel_sha256"]
    assert unpacked.card["index_sha256"] == packed.card["index_sha256"]


def test_songs_crop_is_an_option_and_in_the_card(archive, tmp_path):
    product = np.full((200, 300, 3), 255, np.uint8)
    product[80:120, 100:180] = (10, 120, 40)
    product[0, 0] = (250, 250, 250)  # Grey 250 is part of the border.
    image = encoded(product, "PNG")
    whole, cut = ImageSettings(256, 256, "pad")(image), ImageSettings(256, 256, "pad", "bbox250")(image)

    def height(view):
        return int((view[:, 128] < 200).any(1).sum())

    # The 40 rows scale by 256/300; cropped to 70 x 110 pixels (with the margin of 15) they scale by 256/110.
    assert height(whole) == pytest.approx(40 * 256 / 300, abs=2)
    assert height(cut) == pytest.approx(40 * 256 / 110, abs=3)
    plain = prepared("sop", archive, tmp_path / "plain" / "sop").card
    cropped = prepared("sop", archive, tmp_path / "crop" / "sop", "--crop", "bbox250").card
    assert plain["settings"]["crop"] is None
    assert cropped["settings"] | {"crop": "bbox250", "below_grey": 250, "margin_pixels": 15} == cropped["settings"]


def test_a_white_image_is_not_cropped():
    white = encoded(np.full((20, 10, 3), 255, np.uint8), "PNG")
    assert (ImageSettings(16, 16, "pad", "bbox250")(white) == 255).all()


def test_the_crop_stops_at_the_border():
    dark = np.full((50, 40, 3), 255, np.uint8)
    dark[2:40, 3:30] = 0
    image = Image.open(io.BytesIO(encoded(dark, "PNG")))
    cut = ImageSettings(50, 40, "stretch", "bbox250")(encoded(dark, "PNG"))
    reference = image.crop((0, 0, 40, 50)).resize((40, 50), Image.Resampling.BILINEAR)
    assert np.array_equal(cut, np.asarray(reference))


def test_names_missing_and_unexpected_classes(tmp_path, monkeypatch):
    expect(monkeypatch, sop, SOP_PUBLISHED)
    files = sop_files()
    name = f"{ROOT}/Ebay_test.txt"
    lines = files[name].splitlines()
    refused(
        tmp_path / "a", files | {name: b"\n".join(lines[:-2])}, "Ebay_train.txt and Ebay_test.txt: missing classes 23; "
    )
    more = b"99 24 1 bicycle_final/111085120001_0.JPG"
    refused(
        tmp_path / "b",
        files | {name: b"\n".join([*lines, more])},
        "Ebay_train.txt and Ebay_test.txt: unexpected classes 24; ",
    )
    more = {f"{ROOT}/toaster_final/1_0.JPG": files[f"{ROOT}/mug_final/111085120009_0.JPG"]}
    refused(tmp_path / "c", files | more, "image folders: unexpected classes toaster_final; ")


def test_refuses_super_classes_that_contradict_the_folders(tmp_path, monkeypatch):
    expect(monkeypatch, sop, SOP_PUBLISHED)
    files = sop_files()
    name = f"{ROOT}/Ebay_train.txt"
    other = files[name].replace(b" 2 1 bicycle_final", b" 2 3 bicycle_final", 1)
    refused(
        tmp_path,
        files | {name: other},
        r"Ebay_train\.txt: super class of .*_final/.* differs from that of the other images in its folder: got \d;",
    )


def test_refuses_an_image_in_two_rows(tmp_path, monkeypatch):
    expect(monkeypatch, sop, SOP_PUBLISHED)
    files = sop_files()
    name = f"{ROOT}/Ebay_train.txt"
    twice = files[name].replace(b"111085120001_1.JPG", b"111085120001_0.JPG")
    refused(tmp_path, files | {name: twice}, "bicycle_final/111085120001_0.JPG is listed twice")


def test_refuses_a_truncated_archive(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(PreparationError, match=r"got [\d,]+ bytes \(published: [\d,]+\), sha256"):
        prepared_or_error(archive, tmp_path)
    with pytest.raises(PreparationError, match=r"truncated or damaged \(BadZipFile"):
        prepared_or_error(archive, tmp_path, any_checksum=True)
    assert not (tmp_path / "data").exists()


def test_refuses_a_damaged_member(archive, tmp_path):
    with zipfile.ZipFile(archive) as opened:
        place = opened.infolist()[5].header_offset + 120
    content = bytearray(archive.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    archive.write_bytes(content)
    with pytest.raises(PreparationError, match="truncated or damaged"):
        prepared_or_error(archive, tmp_path, any_checksum=True)
    assert list((tmp_path / "data").iterdir()) == []


def prepared_or_error(archive, tmp_path, any_checksum=False):
    from dataclasses import replace

    return sop.prepare(archive, tmp_path / "data" / "sop", replace(sop.OPTIONS, any_checksum=any_checksum))
