"""Market-1501 from a miniature of its archive: roles, cameras, system files and refused sources."""

from pathlib import Path

import nbformat
import pytest

from data_prep import market1501
from data_prep.prepared import PreparationError
from tests.helpers.miniatures import (
    MARKET_IDENTITIES,
    MARKET_PUBLISHED,
    a_batch,
    evaluated,
    expect,
    market_files,
    prepared,
    write_folder,
    write_zip,
)

PROJECT = Path(__file__).parents[2]
ROOT = "Market-1501-v15.09.15"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    file = write_zip(tmp_path / "Market-1501-v15.09.15.zip", market_files())
    expect(monkeypatch, market1501, MARKET_PUBLISHED, file, IDENTITIES=MARKET_IDENTITIES)
    return file


def refused(tmp_path, monkeypatch, files, match):
    expect(monkeypatch, market1501, MARKET_PUBLISHED, IDENTITIES=MARKET_IDENTITIES)
    source, data = write_folder(tmp_path / "altered", files), tmp_path / "data"
    with pytest.raises(PreparationError, match=match):
        market1501.prepare(source, data / "market1501")
    assert not data.exists() or list(data.iterdir()) == []


def test_published_counts_equal_those_of_the_dataset_page():
    published = market1501.PUBLISHED
    assert published["train images"] + published["gallery and distractor images"] + published["junk images"] == 32_668
    assert published["gallery and distractor images"] + published["junk images"] == 19_732
    assert (published["train images"], published["query images"]) == (12_936, 3_368)
    assert (published["train classes"], published["test classes"], published["query classes"]) == (751, 750, 750)
    assert published["train classes"] + published["test classes"] == market1501.IDENTITIES == 1_501


def test_prepares_and_evaluates_the_archive(archive, tmp_path):
    dataset = prepared("market1501", archive, tmp_path / "data" / "market1501")
    index, card = dataset.index, dataset.card
    assert dataset.images.shape[1:] == (160, 60, 3)
    assert card["classes"] == {"train": 10, "val": 2, "test": 8}
    assert card["roles"] == {"both": 48, "query": 16, "gallery": 32, "junk": 3, "distractor": 2, "pool": 48}
    assert (index.role[index.split != "test"] == "both").all()
    assert card["ignored_files"] == {"Thumbs.db": 3}
    tested = {identity for identity in range(1, 21) if identity % 5 >= 3}
    for role in ("query", "gallery", "pool"):
        assert set(index.label[index.role == role]) == tested
    assert set(index.label[index.role.isin(["junk", "distractor"])]) == {-1}
    first = index[index.source == "query/0003_c4s1_000201_00.jpg"].iloc[0]
    assert (first.label, first.split, first.role, first.camera) == (3, "test", "query", 4)
    assert sorted(index.camera[index.role == "junk"]) == [1, 3, 5]
    assert sorted(index.camera[index.role == "distractor"]) == [2, 6]
    table = dataset.against_published()
    assert len(table) >= 2
    assert (table["published"] == table["here"]).all()
    images, labels = a_batch(dataset, batch_size=8, images_per_class=4)
    assert images.shape == (8, 3, 160, 60)
    assert labels.unique().numel() == 2
    retrieval = evaluated(dataset)
    assert retrieval.protocol == "market1501"
    assert retrieval.n_queries == 16
    assert {f"recall@{k}" for k in (1, 5, 10, 15, 20)} <= retrieval.metrics.keys()
    assert (retrieval.metrics["recall@1"], retrieval.n_unmatched) == (1.0, 0)  # All images of an identity are equal.
    assert evaluated(dataset, protocol="market1501-multi-query").metrics["recall@1"] == 1.0
    assert evaluated(dataset, split="val").n_queries == 8


def test_the_extracted_folder_equals_the_archive(archive, tmp_path):
    packed = prepared("market1501", archive, tmp_path / "packed" / "market1501")
    unpacked = write_folder(tmp_path / "extracted", market_files()) / ROOT
    dataset = prepared("market1501", unpacked, tmp_path / "unpacked" / "market1501")
    assert dataset.card["pixel_sha256"] == packed.card["pixel_sha256"]
    assert dataset.card["index_sha256"] == packed.card["index_sha256"]


def test_names_a_missing_identity(tmp_path, monkeypatch):
    files = {name: c for name, c in market_files().items() if "bounding_box_train/0005" not in name}
    refused(tmp_path, monkeypatch, files, r"image files: missing classes 5; download the original again")


def test_names_an_identity_in_both_splits(tmp_path, monkeypatch):
    files = market_files()
    files[f"{ROOT}/bounding_box_train/0003_c1s1_000151_01.jpg"] = files[f"{ROOT}/query/0003_c4s1_000201_00.jpg"]
    refused(tmp_path, monkeypatch, files, r"identities \[3\] are in bounding_box_train and in a test folder")


def test_refuses_an_incomplete_gallery(tmp_path, monkeypatch):
    files = market_files()
    del files[f"{ROOT}/bounding_box_test/-1_c3s1_000401_03.jpg"]
    refused(tmp_path, monkeypatch, files, r"got 2 junk images \(published: 3\)")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("bounding_box_test/0003.jpg", "must have the form PPPP_cCsS_FFFFFF_BB.jpg: got bounding_box_test/0003.jpg"),
        (
            "query/-1_c1s1_000401_03.jpg",
            "query/-1_c1s1_000401_03.jpg: junk and distractors must be in bounding_box_test",
        ),
        ("bounding_box_train/0000_c1s1_000401_03.jpg", "junk and distractors must be in bounding_box_test"),
    ],
)
def test_names_an_image_in_the_wrong_folder(tmp_path, monkeypatch, name, match):
    files = market_files()
    files[f"{ROOT}/{name}"] = files[f"{ROOT}/query/0003_c4s1_000201_00.jpg"]
    refused(tmp_path, monkeypatch, files, match)


def test_names_a_missing_folder(tmp_path, monkeypatch):
    files = {name: c for name, c in market_files().items() if "/gt_bbox/" not in name}
    refused(tmp_path, monkeypatch, files, "contains no images in gt_bbox/")


def test_the_dataset_notebook_shows_it(archive, tmp_path):
    prepared("market1501", archive, tmp_path / "data" / "market1501")
    names = {}
    for cell in nbformat.read(PROJECT / "notebooks" / "10_dataset.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= {"dataset": "market1501", "data_dir": str(tmp_path / "data")}
    assert names["published"]["here"].to_dict() == MARKET_PUBLISHED
    assert len(names["lines"]) == 8  # Three classes of train, three of test, and the two of val.
