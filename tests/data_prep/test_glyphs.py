"""The built-in dataset: its card, disjoint class splits, and the same bytes in every preparation."""

import hashlib
import json
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest

from data_prep import glyphs
from data_prep.__main__ import main
from data_prep.glyph_list import LIST_FILE
from data_prep.prepared import PreparationError, new_folder
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import DatasetError


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The characters are drawn once for all tests, which takes most of a preparation."""
    with patch.object(glyphs, "draw_dataset", cache(glyphs.draw_dataset)):
        yield


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
    glyphs.draw_dataset.cache_clear()
    again = glyphs.prepare(tmp_path / "glyphs")
    assert again == card
    assert (tmp_path / "glyphs" / "card.json").read_bytes() == (folder / "card.json").read_bytes()


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    main(["glyphs", "--folds", "--out", str(folder / "glyphs")])
    return [open_dataset(folder / f"glyphs-{number}") for number in range(6)]


def classes_of(dataset, split):
    return set(dataset.index.label[dataset.index.split == split])


def test_every_class_is_tested_by_one_fold_or_is_for_tuning_alone(prepared, folds):
    *tested, tuning = folds
    every = set(open_dataset(prepared[0]).index.label)
    test_sets = [classes_of(dataset, "test") for dataset in tested]
    held = classes_of(tuning, "val") | classes_of(tuning, "test")
    assert sorted(label for labels in (*test_sets, held) for label in labels) == sorted(every)
    assert len(held) == round(0.1 * len(every))
    assert max(map(len, test_sets)) - min(map(len, test_sets)) <= 1
    for dataset, own in zip(tested, test_sets, strict=True):
        others = classes_of(dataset, "train") | classes_of(dataset, "val")
        assert others == every - held - own
        assert len(classes_of(dataset, "val")) == len(held)
    assert classes_of(tuning, "train") <= every - held
    assert len({len(classes_of(dataset, "train")) for dataset in folds}) == 1


def test_folds_have_the_images_of_glyphs(prepared, folds):
    whole = open_dataset(prepared[0])
    row_of = dict(zip(whole.index.source, range(len(whole.index)), strict=True))
    for dataset in folds:
        rows = dataset.index.source.map(row_of)
        assert dataset.index.label.tolist() == whole.index.label[rows].tolist()
        assert np.array_equal(dataset.images, whole.images[rows])
    assert len({(d.folder / "images.npy").stat().st_ino for d in folds[:5]}) == 1


def test_cards_of_folds_differ_in_their_test_set_only(folds):
    settings = [dict(dataset.card["settings"]) for dataset in folds]
    assert [one.pop("test_set") for one in settings] == list(range(6))
    assert all(one == settings[0] for one in settings)
    assert "for tuning" in folds[5].card["class_split"]


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


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Difficulty -> the datasets of its test sets and the one for tuning, with one class in 20."""
    folder, found = tmp_path_factory.mktemp("difficulties"), {}
    listed = json.loads(LIST_FILE.read_text())
    few = folder / "few.json"
    few.write_text(json.dumps(listed | {"classes": listed["classes"][::20]}))
    glyphs.draw_dataset.cache_clear()
    with patch.object(glyphs, "LIST_FILE", few):
        for name in ("normal", "easy", "hard"):
            main(["glyphs", "--difficulty", name, "--folds", "--out", str(folder / name)])
            found[name] = [open_dataset(folder / f"{name}-{number}") for number in range(6)]
    glyphs.draw_dataset.cache_clear()
    return found


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_a_difficulty_changes_the_drawings_alone(drawings, difficulty):
    for normal, other in zip(drawings["normal"], drawings[difficulty], strict=True):
        assert other.index.equals(normal.index)
        assert other.card["name"] == f"glyphs-{difficulty}"
        assert other.card["settings"]["jitter"] != normal.card["settings"]["jitter"]
        assert not np.array_equal(other.images, normal.images)


def distance_within_classes(dataset):
    """Squared distance of the images of a class from their mean, as a share of that of all images from theirs."""
    images = dataset.images.reshape(len(dataset.images), -1) / 255
    labels = dataset.index.label.to_numpy()
    within = sum(((images[labels == label] - images[labels == label].mean(0)) ** 2).sum() for label in set(labels))
    return within / ((images - images.mean(0)) ** 2).sum()


def test_images_of_a_class_differ_more_the_harder_the_drawing(drawings):
    easy, normal, hard = (distance_within_classes(drawings[name][0]) for name in ("easy", "normal", "hard"))
    assert easy < normal < hard
