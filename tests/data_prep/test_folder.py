"""Anyone's own images: class-named folders and CSVs, all the way; and what is refused."""

import numpy as np
import pytest

from data_prep import folder
from data_prep.conversion import Options
from data_prep.prepared import PreparationError
from hloss.runs.images import ImageSettings
from tests.helpers.miniatures import a_batch, encoded, evaluated, photo, prepared, write_folder

SMALL = Options(ImageSettings(16, 16, "pad"), val_fraction=0.5)


def birds(n_classes=12, per_class=4):
    return {
        f"bird{label:02d}/{i}.jpg": photo(label, height=20 + i) for label in range(n_classes) for i in range(per_class)
    }


def csv(*rows, head="path,label,split,camera,role"):
    return {"images.csv": "\n".join([head, *rows]).encode()}


def refused(tmp_path, files, match, source="images.csv"):
    root, data = write_folder(tmp_path / "source", files), tmp_path / "data"
    with pytest.raises(PreparationError, match=match):
        folder.prepare(root / source, data / "mine", SMALL)
    assert not data.exists() or list(data.iterdir()) == []


def test_class_named_folders_go_all_the_way(tmp_path):
    source = write_folder(tmp_path / "source", birds() | {"readme.txt": b"x", "bird00/Thumbs.db": b"x"})
    dataset = prepared("folder", source, tmp_path / "data" / "birds")
    assert dataset.card["name"] == "birds"
    assert dataset.card["classes"] == {"train": 5, "val": 1, "test": 6}
    assert dataset.card["class_names"] == [f"bird{label:02d}" for label in range(12)]
    assert dataset.card["ignored_files"] == {"Thumbs.db": 1}
    names = [dataset.card["class_names"][label] for label in dataset.index.label]
    assert [source.partition("/")[0] for source in dataset.index.source] == names
    assert dataset.images.shape == (48, 256, 256, 3)
    images, _ = a_batch(dataset)
    assert images.shape == (8, 3, 256, 256)
    retrieval = evaluated(dataset)
    assert (retrieval.protocol, retrieval.n_queries) == ("all-vs-rest", 24)
    assert retrieval.metrics["recall@1"] > 0.5  # a class is one picture at several sizes


def test_a_csv_with_splits_cameras_and_roles_goes_all_the_way(tmp_path):
    files, rows = birds(9), []
    for name in files:
        label, i = int(name[4:6]), int(name[7])
        split = "train" if label < 4 else "val" if label < 6 else "test"
        role = ("query" if i == 0 else "gallery") if split == "test" else "both"
        rows.append(f"{name},person {label},{split},{i % 2},{role}")
    extra = {"more/junk.png": photo(50), "more/somebody.png": photo(51)}
    rows += ["more/junk.png,,test,0,junk", "./more/somebody.png,,test,1,distractor"]
    source = write_folder(tmp_path / "source", files | extra | csv(*rows))
    dataset = prepared(
        "folder", source / "images.csv", tmp_path / "data" / "people", "--size", "16x12", "--fit", "stretch"
    )
    index = dataset.index
    assert dataset.card["classes"] == {"train": 4, "val": 2, "test": 3}
    assert dataset.card["roles"] == {"both": 24, "query": 3, "gallery": 9, "junk": 1, "distractor": 1}
    assert dataset.card["settings"]["test_share"] == "given"
    assert index.label[index.role.isin(["junk", "distractor"])].tolist() == [-1, -1]
    assert index.source.iloc[-1] == "more/somebody.png"
    assert index.camera.tolist() == [int(row.split(",")[3]) for row in rows]
    assert dataset.images.shape[1:] == (16, 12, 3)
    retrieval = evaluated(dataset)
    assert retrieval.protocol == "market1501"
    assert retrieval.n_queries == 3


def test_a_csv_of_paths_and_labels_is_split_by_the_seed(tmp_path):
    files = birds()
    rows = [f"{name},{name[:6]}" for name in files]
    source = write_folder(tmp_path / "source", files | csv(*rows, head="\ufeffpath,label")) / "images.csv"
    a, b = (folder.prepare(source, tmp_path / name / "mine", SMALL) for name in "ab")
    assert a == b
    assert a["classes"] == {"train": 3, "val": 3, "test": 6}
    other = folder.prepare(source, tmp_path / "c" / "mine", Options(ImageSettings(16, 16, "pad"), 0.5, seed=1))
    assert other["index_sha256"] != a["index_sha256"]
    whole = folder.prepare(source.parent, tmp_path / "d" / "mine", SMALL)
    assert (whole["pixel_sha256"], whole["index_sha256"]) == (a["pixel_sha256"], a["index_sha256"])


def test_validation_classes_are_drawn_where_only_train_and_test_are_given(tmp_path):
    files = birds()
    rows = [f"{name},{name[:6]},{'train' if int(name[4:6]) < 8 else 'test'}" for name in files]
    source = write_folder(tmp_path / "source", files | csv(*rows, head="path,label,split"))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["classes"] == {"train": 4, "val": 4, "test": 4}


ROW = "bird00/0.jpg,a,train,,both"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (["../secret.jpg,a,train,,both"], r"path '\.\./secret\.jpg' leads out of the CSV's folder"),
        (["/etc/passwd,a,train,,both"], "path '/etc/passwd' leads out"),
        ([ROW, "bird00/0.jpg,b,train,,both"], r"names bird00/0\.jpg twice, with labels \['a', 'b'\]"),
        ([ROW, "bird00/./0.jpg,b,train,,both"], r"names bird00/0\.jpg twice"),
        (["bird00/0.jpg,a,training,,both"], "split is 'training' in a row, allowed are train, val, test"),
        (["bird00/0.jpg,a,train,,queries"], "role is 'queries' in a row, allowed are both, query"),
        (["bird00/0.jpg,a,train,c1,both"], "camera is 'c1' in a row"),
        (["bird00/0.jpg,,train,,both"], r"bird00/0\.jpg has no label"),
        ([ROW, "bird00/1.jpg,a,test,,both"], "is in more than one split"),
        ([ROW], "names no image of test"),
        ([ROW, "bird01/0.jpg,b,test,,both", "bird02/9.jpg,c,train,,both"], r"lacks 1 of the images .* bird02/9\.jpg"),
        ([ROW, "bird02/1.jpg,c,train,,query", "bird01/0.jpg,b,test,,both"], "only test images have roles"),
        ([ROW, "bird02/1.jpg,c,train,,both", "bird01/0.jpg,b,test,,query"], "there must be query and gallery"),
        ([ROW, "bird01/0.jpg,b,test,,both"], "of 1 training classes would hold out"),
        ([], r"has the columns path, label, split, camera, role \(0 rows\)"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path, rows, match):
    refused(tmp_path, birds() | csv(*rows), match)


def test_wrong_columns_are_named(tmp_path):
    refused(tmp_path / "a", birds() | csv("bird00/0.jpg,a", head="file,label"), r"lacks path")
    refused(
        tmp_path / "b", birds() | csv("bird00/0.jpg,a,1", head="path,label,cam"), r"has the columns path, label, cam"
    )
    refused(tmp_path / "c", birds() | {"images.csv": b"\xff\xfe\x00path"}, "cannot be read as CSV in UTF-8")


def test_folders_of_another_form_are_refused(tmp_path):
    refused(tmp_path / "a", birds() | {"loose.jpg": photo(0)}, r"loose\.jpg is directly in|not directly", source=".")
    refused(tmp_path / "b", {"train/bird/0.jpg": photo(0)}, r"train/bird/0\.jpg is", source=".")
    refused(tmp_path / "c", {"notes.txt": b"x"}, "no image is", source=".")
    refused(tmp_path / "d", birds(3), "3 classes cannot be split", source=".")
    refused(tmp_path / "e", {"images.txt": b"x"}, "neither a folder nor a .csv file", source="images.txt")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    root = write_folder(tmp_path / "source", birds())
    (tmp_path / "secret.png").write_bytes(encoded(np.zeros((4, 4), np.uint8), "PNG"))
    (root / "bird00" / "link.png").symlink_to(tmp_path / "secret.png")
    refused(tmp_path, {}, r"link\.png is a link", source=".")
