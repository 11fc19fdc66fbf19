"""The description of a prepared dataset: warnings, counts and what was left out."""

import numpy as np
import pandas as pd
import pytest

from data_prep import __main__ as command_line
from data_prep.check import normalized_name, warnings
from data_prep.prepared import create_images, finish, new_folder
from hloss.runs.datasets import COLUMNS, open_dataset
from tests.helpers.miniatures import encoded, photo, prepared, write_folder


def grey(value):
    return encoded(np.full((16, 16, 3), (value % 256, value // 256, 0), np.uint8), "PNG")


def classes(n=20, per_class=10):
    return {f"c{label:02d}/{i}.png": grey(label * per_class + i) for label in range(n) for i in range(per_class)}


def prepare(tmp_path, files, *options):
    source = write_folder(tmp_path / "source", files)
    return prepared("folder", source, tmp_path / "data" / "mine", "--size", "16x16", *options)


def test_a_good_dataset_has_no_warnings(tmp_path, capsys):
    dataset = prepare(tmp_path, classes())
    assert warnings(dataset) == []
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("mine: 200 images of 20 classes (train 5, val 5, test 10)")
    assert last == f"Details: python -m data_prep check {dataset.folder}"


def test_describes_images_queries_and_small_classes(tmp_path, capsys):
    command_line.main(["check", str(prepare(tmp_path, classes()).folder)])
    page = capsys.readouterr().out
    assert "200 images of 20 classes (train 5, val 5, test 10), 16 x 16 x 3 pixels, protocol all-vs-rest" in page
    assert "no warnings" in page
    lines = [line.split() for line in page.splitlines()]
    assert ["test", "100", "10", "10", "10.0", "10", "0"] in lines
    assert ["val", "50", "50", "50", "9.0", "40.0"] in lines
    assert ["test", "100", "100", "100", "9.0", "90.0"] in lines
    assert "5, of which 0 with fewer than 2 images, 0 with fewer than 5 images, 0 with fewer than 10 images" in page
    assert "nothing was left out" in page


def test_warns_of_identical_images_in_two_splits_or_classes(tmp_path):
    files = classes()
    index = prepare(tmp_path / "a", files).index
    of = {split: index.source[index.split == split].tolist() for split in ("train", "val", "test")}
    files[of["test"][0]] = files[of["train"][0]]
    files[of["val"][11]] = files[of["val"][0]]  # of another class
    files[of["val"][21]] = files[of["val"][20]]  # of the same class, which does not matter
    splits, labels = warnings(prepare(tmp_path / "b", files))
    assert splits.startswith("identical images in different splits (1): ")
    assert f"{of['train'][0]} (train)" in splits
    assert f"{of['test'][0]} (test)" in splits
    assert labels.startswith("identical images in different classes (2): ")
    assert f"{of['val'][0]} ({of['val'][0][:3]}) = {of['val'][11]} ({of['val'][11][:3]})" in labels


def test_warns_of_similar_class_names(tmp_path):
    names = ["Black bird", "blackbird", "7", "007", *(f"c{i}" for i in range(20))]
    files = {f"{name}/{i}.png": grey(len(name) + i) for name in names for i in range(10)}
    (alike,) = [line for line in warnings(prepare(tmp_path, files)) if "class names" in line]
    assert alike == "class names that may mean the same class (2): '007' and '7'; 'Black bird' and 'blackbird'"


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("7", "007", True),
        ("7", "7.0", True),
        ("7", "+7", True),
        ("id_07", "ID 7", False),
        ("id 07", "ID7", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("7", "70", False),
        ("0", "00", True),
        ("1.5", "1.05", False),
        ("a", "b", False),
    ],
)
def test_compares_names_without_spaces_case_and_number_format(one, other, alike):
    assert (normalized_name(one) == normalized_name(other)) == alike


def test_warns_of_small_training_classes_and_queries_without_a_match(tmp_path):
    files = classes(30)
    for label in range(0, 30, 3):
        for i in range(1, 10):
            del files[f"c{label:02d}/{i}.png"]
    dataset = prepare(tmp_path, files, "--val-fraction", "9")
    sizes = dataset.index.groupby(["split", "label"]).size()
    n_train, n_test = len(sizes["train"]), int(sizes["test"].sum())
    single_train, single_test = int((sizes["train"] == 1).sum()), int((sizes["test"] == 1).sum())
    assert single_train > 0
    assert single_test > 0
    found = warnings(dataset)
    assert f"train: {single_train} of {n_train} classes have one image and form no positive pair" in found
    assert f"test: {single_test} of {n_test} queries have no match and are left out of the metrics" in found


def test_lists_what_was_left_out(tmp_path, capsys):
    files = classes() | {"c00/0.png": b"", ".git/x": b"x", "c00/Thumbs.db": b"x", "notes.txt": b"x"}
    source = write_folder(tmp_path / "source", files)
    prepared("folder", source, tmp_path / "mine", "--skip-bad", "--size", "16x16")
    capsys.readouterr()
    command_line.main(["check", str(tmp_path / "mine")])
    page = capsys.readouterr().out
    assert "hidden and system files, ignored: 2 (1 in .git/, 1 Thumbs.db)\n" in page
    assert "files of an unsupported type (.txt): 1 (notes.txt)\n" in page
    assert "images that cannot be decoded, skipped: 1 (listed in card.json)\n" in page


def test_counts_images_that_a_csv_does_not_list(tmp_path, capsys):
    files = classes() | {"more/1.png": grey(3), "more/2.jpg": photo(0)}
    rows = "\n".join(["path,label", *(f"{name},{name[:3]}" for name in classes())])
    source = write_folder(tmp_path / "source", files | {"images.csv": rows.encode()})
    prepared("folder", source / "images.csv", tmp_path / "mine", "--size", "16x16")
    assert "unlisted images, not used: 2\n" in capsys.readouterr().out


def test_warns_of_splits_that_cannot_be_evaluated(tmp_path):
    rows = [(label, split, "both", -1, f"{split}{label}") for label, split in enumerate(["train", "val", "test"])]
    with new_folder(tmp_path / "few") as folder:
        create_images(folder, 3, 4, 4, 1)[:] = np.arange(3)[:, None, None, None]
        card = {"name": "few", "protocol": "all-vs-rest", "recall_at": [1]}
        finish(folder, pd.DataFrame(rows, columns=list(COLUMNS)), card)
    assert warnings(open_dataset(tmp_path / "few")) == [
        "val: retrieval cannot be measured, none of 1 queries has a match and a non-match",
        "test: retrieval cannot be measured, none of 1 queries has a match and a non-match",
        "val: only 0 queries of 0 classes have a match and a non-match; checkpoint selection is unreliable below "
        "50 queries of 5 classes; prepare the dataset again with more validation classes (--val-fraction)",
        "train: 1 of 1 classes have one image and form no positive pair",
    ]


def test_refuses_a_missing_or_damaged_dataset(tmp_path):
    with pytest.raises(SystemExit, match="data_prep check: dataset 'nothing' is not prepared"):
        command_line.main(["check", str(tmp_path / "nothing")])
    folder = prepare(tmp_path, classes()).folder
    content = bytearray((folder / "images.npy").read_bytes())
    content[-1] ^= 1
    (folder / "images.npy").write_bytes(content)
    with pytest.raises(SystemExit, match=r"data_prep check: .*images\.npy.* card.*; prepare"):
        command_line.main(["check", str(folder)])
