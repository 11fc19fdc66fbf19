"""The built-in dataset: its card, disjoint class splits, and the same bytes in every preparation."""

import hashlib
import json

import numpy as np
import pytest

from data_prep import glyphs
from data_prep.glyph_list import LIST_FILE
from data_prep.prepared import PreparationError, new_folder
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import DatasetError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "glyphs"
    return folder, glyphs.prepare(folder)


def test_the_card_describes_the_files(prepared):
    folder, card = prepared
    dataset = open_dataset(folder)
    index = dataset.index
    listed = json.loads(LIST_FILE.read_text())["classes"]
    assert len(index) == card["images"] == sum(len(entry["faces"]) for entry in listed)
    assert index.label.nunique() == len(listed)
    assert hashlib.sha256((folder / "images.npy").read_bytes()).hexdigest() == card["pixel_sha256"]
    assert {"matplotlib", "pillow", "freetype"} <= card["versions"].keys()
    assert dataset.images.shape[1:] == (32, 32, 1)


def test_splits_are_disjoint_and_have_the_stated_shares(prepared):
    index = open_dataset(prepared[0]).index
    classes = index.groupby("split").label.unique()
    assert not set(classes.train) & set(classes.val)
    assert not set(classes.train) & set(classes.test)
    assert not set(classes.val) & set(classes.test)
    shares = {split: len(classes[split]) / index.label.nunique() for split in classes.index}
    assert shares == pytest.approx(glyphs.SHARES, abs=1e-3)
    assert index.groupby("label").size().min() >= 10


def test_a_second_preparation_gives_the_same_bytes(prepared, tmp_path):
    folder, card = prepared
    again = glyphs.prepare(tmp_path / "glyphs")
    assert again == card
    assert (tmp_path / "glyphs" / "card.json").read_bytes() == (folder / "card.json").read_bytes()


def test_an_interrupted_preparation_leaves_no_files(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "data") as folder:
            (folder / "images.npy").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_replace_other_files(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with (
        pytest.raises(PreparationError, match="neither empty nor a prepared dataset: it contains precious"),
        new_folder(tmp_path),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_refuses_a_damaged_dataset(prepared, tmp_path):
    with pytest.raises(DatasetError, match=r"'glyph' is not prepared.*prepared in .*: glyphs"):
        open_dataset(prepared[0].parent / "glyph")
    broken = tmp_path / "glyphs"
    broken.mkdir()
    for name in ("card.json", "index.parquet"):
        (broken / name).write_bytes((prepared[0] / name).read_bytes())
    np.save(broken / "images.npy", np.zeros((3, 32, 32, 1), np.uint8))
    with pytest.raises(DatasetError, match=r"images\.npy is uint8 \(3, 32, 32, 1\)"):
        open_dataset(broken)
