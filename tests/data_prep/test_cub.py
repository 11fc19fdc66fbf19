"""CUB-200-2011 from a miniature of its archive: preparation, evaluation and refused sources."""

import numpy as np
import pytest

from data_prep import cub
from data_prep.prepared import PreparationError
from tests.helpers.miniatures import (
    CUB_PUBLISHED,
    a_batch,
    cub_files,
    evaluated,
    expect,
    prepared,
    write_folder,
    write_tgz,
)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    file = write_tgz(tmp_path / "CUB_200_2011.tgz", cub_files())
    expect(monkeypatch, cub, CUB_PUBLISHED, file)
    return file


def refused(tmp_path, files, match):
    """Check that the folder of `files` is refused and that no files are left."""
    source, data = write_folder(tmp_path / "altered", files), tmp_path / "data"
    with pytest.raises(PreparationError, match=match):
        cub.prepare(source, data / "cub")
    assert not data.exists() or list(data.iterdir()) == []


def test_published_counts_equal_the_papers():
    assert cub.PUBLISHED == {"train classes": 100, "test classes": 100, "train images": 5864, "test images": 5924}
    assert cub.ORIGINAL.images == 5864 + 5924


def test_prepares_and_evaluates_the_archive(archive, tmp_path):
    dataset = prepared("cub", archive, tmp_path / "data" / "cub")
    index = dataset.index
    assert dataset.card["classes"] == {"train": 4, "val": 2, "test": 4}
    assert sorted(index.label[index.split == "test"].unique()) == [7, 8, 9, 10]
    assert len(index) == 27 + 18
    assert dict(index.groupby("label").size()) == {label: 4 + label % 2 for label in range(1, 11)}
    assert set(index.role) == {"both"}
    assert set(index.camera) == {-1}
    assert index.source[0] == "images/001.Mini_Bird/Mini_Bird_0000_1.jpg"
    assert dataset.images.shape == (45, 256, 256, 3)
    assert dataset.card["original"]["checksum"] == "as published"
    table = dataset.against_published()
    assert len(table) >= 2
    assert (table["published"] == table["here"]).all()
    images, labels = a_batch(dataset)
    assert images.shape == (8, 3, 256, 256)
    assert labels.unique().numel() >= 4
    retrieval = evaluated(dataset)
    assert retrieval.protocol == "all-vs-rest"
    assert list(retrieval.metrics)[:6] == [f"recall@{k}" for k in (1, 2, 4, 8, 16, 32)]
    assert retrieval.n_queries == 18


def test_keeps_the_aspect_ratio_and_pads_with_white(archive, tmp_path):
    dataset = prepared("cub", archive, tmp_path / "cub")
    image = dataset.images[0]  # 21 x 30 pixels become 179 x 256
    inside = (image != 255).any(2).any(1)
    assert inside.sum() == 179
    assert np.flatnonzero(inside)[0] == (256 - 179) // 2


def test_the_extracted_folder_equals_the_archive(archive, tmp_path):
    packed = prepared("cub", archive, tmp_path / "packed" / "cub")
    outer = write_folder(tmp_path / "extracted", cub_files())
    for name, source in (("outer", outer), ("inner", outer / "CUB_200_2011")):
        unpacked = prepared("cub", source, tmp_path / name / "cub")
        for key in ("pixel_sha256", "index_sha256"):
            assert unpacked.card[key] == packed.card[key]
        assert unpacked.card["original"]["kind"] == "extracted folder"
        assert "has none" in unpacked.card["original"]["checksum"]


def test_the_seed_decides_the_validation_classes(archive, tmp_path):
    def validation_classes(name, *options):
        index = prepared("cub", archive, tmp_path / name, "--size", "16x16", *options).index
        return set(index.label[index.split == "val"])

    assert validation_classes("a", "--val-fraction", "0.5") == validation_classes("b", "--val-fraction", "0.5")
    assert len(validation_classes("c", "--val-fraction", "0.5")) == 3
    assert len({tuple(validation_classes(f"d{seed}", "--seed", str(seed))) for seed in range(5)}) > 1


def test_refuses_a_wrong_checksum_unless_overridden(archive, tmp_path, monkeypatch):
    published = cub.ORIGINAL
    archive.write_bytes(archive.read_bytes() + b"\0" * 512)
    with pytest.raises(
        PreparationError, match=r"not the published CUB_200_2011\.tgz: got .* bytes \(published: .*--any-checksum"
    ):
        cub.prepare(archive, tmp_path / "data" / "cub")
    assert not (tmp_path / "data").exists()
    dataset = prepared("cub", archive, tmp_path / "data" / "cub", "--any-checksum")
    assert dataset.card["original"]["checksum"] == "overridden by --any-checksum"
    assert dataset.card["original"]["sha256"] != published.sha256


def test_names_a_missing_class(tmp_path, monkeypatch):
    expect(monkeypatch, cub, CUB_PUBLISHED)
    files = {name: content for name, content in cub_files().items() if "images/003." not in name}
    refused(tmp_path, files, r"folder images/: missing classes 3; download the original again")


def test_names_an_unexpected_class(tmp_path, monkeypatch):
    expect(monkeypatch, cub, CUB_PUBLISHED)
    files = cub_files()
    files["CUB_200_2011/images/011.Other_Bird/a.jpg"] = files["CUB_200_2011/images/001.Mini_Bird/Mini_Bird_0000_1.jpg"]
    refused(tmp_path, files, r"folder images/: unexpected classes 11; download the original again")


def test_counts_missing_images(tmp_path, monkeypatch):
    expect(monkeypatch, cub, CUB_PUBLISHED)
    files = cub_files()
    del files["CUB_200_2011/images/002.Mini_Bird/Mini_Bird_0003_2.jpg"]
    refused(tmp_path, files, r"1 of 45 listed images do not exist, the first is images/002\..*0003_2\.jpg")


def test_refuses_counts_that_are_not_published(tmp_path, monkeypatch):
    expect(monkeypatch, cub, {**CUB_PUBLISHED, "test images": 19})
    refused(tmp_path, cub_files(), r"got 18 test images \(published: 19\); download the original again")


def test_refuses_labels_that_contradict_the_folders(tmp_path, monkeypatch):
    expect(monkeypatch, cub, CUB_PUBLISHED)
    files = cub_files()
    labels = files["CUB_200_2011/image_class_labels.txt"]
    files["CUB_200_2011/image_class_labels.txt"] = labels.replace(b"\n7 2\n", b"\n7 3\n")
    refused(tmp_path, files, r"class of image 7 differs from its folder: got 3 for 002\.Mini_Bird")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        (
            "images",
            b"1 001.Mini_Bird/a b.jpg\n",
            "images.txt has a line of another form: got '1 001.Mini_Bird/a b.jpg'; expected 2 columns",
        ),
        (
            "image_class_labels",
            b"1 one\n",
            "image_class_labels.txt has a line of another form: got '1 one'; expected 2 columns",
        ),
        ("image_class_labels", b"1 1\n", "in only one of images.txt and image_class_labels.txt"),
        ("images", None, "does not contain images.txt"),
        ("image_class_labels", None, "does not contain CUB_200_2011/image_class_labels.txt"),
    ],
)
def test_names_broken_lists(tmp_path, monkeypatch, name, text, match):
    expect(monkeypatch, cub, CUB_PUBLISHED)
    files = cub_files()
    del files[f"CUB_200_2011/{name}.txt"]
    if text:
        files[f"CUB_200_2011/{name}.txt"] = text
    refused(tmp_path, files, match)
