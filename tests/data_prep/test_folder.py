"""Anyone's own images: class-named folders and CSVs, all the way; and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep import folder
from data_prep.conversion import Options
from data_prep.prepared import PreparationError
from hloss.runs.images import ImageSettings
from tests.helpers.miniatures import a_batch, encoded, evaluated, photo, prepared, write_folder

SMALL = Options(ImageSettings(16, 16, "pad"), val_fraction=0.5)


def birds(n_classes=20, per_class=10):
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
    assert dataset.card["classes"] == {"train": 5, "val": 5, "test": 10}
    assert dataset.card["settings"]["val_fraction"] == 5  # a tenth would be one class
    assert dataset.card["class_names"] == [f"bird{label:02d}" for label in range(20)]
    assert dataset.card["ignored_files"] == {"Thumbs.db": 1}
    names = [dataset.card["class_names"][label] for label in dataset.index.label]
    assert [source.partition("/")[0] for source in dataset.index.source] == names
    assert dataset.images.shape == (200, 256, 256, 3)
    images, _ = a_batch(dataset)
    assert images.shape == (8, 3, 256, 256)
    retrieval = evaluated(dataset)
    assert (retrieval.protocol, retrieval.n_queries) == ("all-vs-rest", 100)
    assert retrieval.metrics["recall@1"] > 0.5  # a class is one picture at several sizes


def test_a_csv_with_splits_cameras_and_roles_goes_all_the_way(tmp_path):
    files, rows = birds(12), []
    for name in files:
        label, i = int(name[4:6]), int(name[7])
        split = "train" if label < 4 else "val" if label < 9 else "test"
        role = ("query" if i == 0 else "gallery") if split == "test" else "both"
        rows.append(f"{name},person {label},{split},{i % 2},{role}")
    extra = {"more/junk.png": photo(50), "more/somebody.png": photo(51)}
    rows += ["more/junk.png,,test,0,junk", "./more/somebody.png,,test,1,distractor"]
    source = write_folder(tmp_path / "source", files | extra | csv(*rows))
    dataset = prepared(
        "folder", source / "images.csv", tmp_path / "data" / "people", "--size", "16x12", "--fit", "stretch"
    )
    index = dataset.index
    assert dataset.card["classes"] == {"train": 4, "val": 5, "test": 3}
    assert dataset.card["roles"] == {"both": 90, "query": 3, "gallery": 27, "junk": 1, "distractor": 1}
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
    assert a["classes"] == {"train": 5, "val": 5, "test": 10}
    other = folder.prepare(source, tmp_path / "c" / "mine", Options(ImageSettings(16, 16, "pad"), 0.5, seed=1))
    assert other["index_sha256"] != a["index_sha256"]
    whole = folder.prepare(source.parent, tmp_path / "d" / "mine", SMALL)
    assert (whole["pixel_sha256"], whole["index_sha256"]) == (a["pixel_sha256"], a["index_sha256"])


def test_validation_classes_are_drawn_where_only_train_and_test_are_given(tmp_path):
    files = birds()
    rows = [f"{name},{name[:6]},{'train' if int(name[4:6]) < 12 else 'test'}" for name in files]
    source = write_folder(tmp_path / "source", files | csv(*rows, head="path,label,split"))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["classes"] == {"train": 6, "val": 6, "test": 8}


ROW = "bird00/0.jpg,a,train,,both"
TESTED = [f"bird{label:02d}/{i}.jpg,{label},test,,both" for label in (18, 19) for i in range(2)]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (["..\\secret.jpg,a,train,,both"], r"leads out of the CSV's folder"),
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
        (
            [ROW, "bird01/0.jpg,b,test,,both", "bird02/99.jpg,c,train,,both"],
            r"1 of 3 pictures are not there, .* bird02/99\.jpg; paths count from",
        ),
        ([ROW, "bird02/1.jpg,c,train,,query", "bird01/0.jpg,b,test,,both"], "only test images have roles"),
        ([ROW, "bird02/1.jpg,c,train,,both", "bird01/0.jpg,b,test,,query"], "there must be query and gallery"),
        ([ROW, *TESTED], "of 1 training classes would hold out"),
        ([ROW, "Bird01/0.JPG,b,test,,both"], r"the first is Bird01/0\.JPG \(there is bird01/0\.jpg\)"),
        (
            [ROW, "bird01/0.jpg,b,test,both"],
            r"'bird01/0\.jpg,b,test,both' has 4 fields, the header has the columns path,",
        ),
        ([], r"has the columns path, label, split, camera, role, separated by commas, and 0 rows"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path, rows, match):
    refused(tmp_path, birds() | csv(*rows), match)


def test_wrong_columns_are_named(tmp_path):
    refused(
        tmp_path / "a", birds() | csv("bird00/0.jpg,a", head="file,label"), r"the columns file, label, .* lacks path;"
    )
    refused(
        tmp_path / "b", birds() | csv("bird00/0.jpg,a,1", head="path,label,cam"), r"has the columns path, label, cam"
    )
    refused(tmp_path / "c", birds() | {"images.csv": b"\xff\xfe\x00path"}, "cannot be read as CSV in UTF-8")


def test_folders_of_another_form_are_refused(tmp_path):
    refused(
        tmp_path / "a",
        birds() | {"loose.jpg": photo(0)},
        r"1 of 201 images are in no folder of a class, the first is loose\.jpg",
        source=".",
    )
    refused(
        tmp_path / "b",
        {"train/bird/0.jpg": photo(0)},
        r"deeper than .* train/bird/0\.jpg; pass --last-folder .*'bird'",
        source=".",
    )
    refused(tmp_path / "c", {"notes.txt": b"x"}, "holds no image in a folder of its class", source=".")
    refused(tmp_path / "d", birds(3), "3 classes cannot be split", source=".")
    refused(tmp_path / "e", {"images.txt": b"x"}, "neither a folder nor a .csv file", source="images.txt")


def test_the_last_folder_may_be_the_class(tmp_path):
    files = {f"{'train' if i % 2 else 'test/more'}/{name}": image for i, (name, image) in enumerate(birds().items())}
    source = write_folder(tmp_path / "source", files)
    dataset = prepared("folder", source, tmp_path / "mine", "--last-folder", "--size", "16x16")
    assert dataset.card["class_names"] == [f"bird{label:02d}" for label in range(20)]
    assert dataset.card["images"] == 200


def test_hidden_and_system_folders_are_ignored_and_counted(tmp_path, capsys):
    other = (".ipynb_checkpoints/a.jpg", ".git/objects/1.png", "__MACOSX/bird00/0.jpg", "bird00/.trash/0.jpg")
    source = write_folder(tmp_path / "source", birds() | dict.fromkeys(other, photo(0)))
    dataset = prepared("folder", source, tmp_path / "mine", "--size", "16x16")
    assert dataset.card["class_names"] == [f"bird{label:02d}" for label in range(20)]
    assert dataset.card["ignored_files"] == {".git/": 1, ".ipynb_checkpoints/": 1, ".trash/": 1, "__MACOSX/": 1}
    listed = "1 in .git/, 1 in .ipynb_checkpoints/, 1 in .trash/, 1 in __MACOSX/"
    assert f"ignored: 4 hidden and system files ({listed})\n" in capsys.readouterr().out


def test_every_extension_of_the_formats_is_read_and_other_files_are_listed(tmp_path, capsys):
    files = birds()
    for i, extension in enumerate((".jfif", ".JPE", ".mpo", ".JPG")):
        files[f"bird01/{i}{extension}"] = files.pop(f"bird01/{i}.jpg")
    files["bird02/new.jp2"] = encoded(np.zeros((20, 20, 3), np.uint8), "JPEG2000")
    others = {f"bird02/{i}.heic": b"x" for i in range(5)} | {"README": b"x"}
    dataset = prepared(
        "folder", write_folder(tmp_path / "source", files | others), tmp_path / "mine", "--size", "16x16"
    )
    assert set(dataset.index.source) == set(files)
    heic = {"files": 5, "first": ["bird02/0.heic", "bird02/1.heic", "bird02/2.heic"]}
    assert dataset.card["unused_files"] == {".heic": heic, "no extension": {"files": 1, "first": ["README"]}}
    out = capsys.readouterr().out
    assert "not read: 5 of .heic (bird02/0.heic, bird02/1.heic, bird02/2.heic, ...)\n" in out
    assert "not read: 1 of no extension (README)\n" in out


def test_a_dataset_of_images_alone_says_nothing_of_other_files(tmp_path):
    card = folder.prepare(write_folder(tmp_path / "source", birds()), tmp_path / "mine", SMALL)
    assert card["ignored_files"] == {}
    assert "unused_files" not in card


@pytest.mark.parametrize(
    ("separator", "start"), [(";", ""), ("\t", ""), ("|", ""), (", ", ""), (";", "sep=;\n"), (",", "sep=,\r\n")]
)
def test_a_csv_may_have_other_separators_and_cases_and_blanks(tmp_path, separator, start):
    files = birds()
    rows = [f"{name}{separator}{name[:6]}" for name in files]
    expected = folder.prepare(
        write_folder(tmp_path / "plain", files | csv(*rows, head="path,label") if separator == "," else files)
        / ("images.csv" if separator == "," else "."),
        tmp_path / "plain_out" / "mine",
        SMALL,
    )
    text = csv(*rows, head=f"{start}Path{separator}LABEL ")
    source = write_folder(tmp_path / "other", files | text)
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert (card["index_sha256"], card["pixel_sha256"]) == (expected["index_sha256"], expected["pixel_sha256"])


def test_quoted_fields_may_hold_any_separator(tmp_path):
    files = birds()
    rows = [f'"{name}", "{name[:6]}; the ""great"", a|b"' for name in files]
    source = write_folder(tmp_path / "source", files | csv(*rows, head='"path","label"'))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["class_names"][0] == 'bird00; the "great", a|b'
    refused(tmp_path / "b", files | csv('bird00/0.jpg,"a'), "cannot be read as CSV in UTF-8: unexpected end of data")
    refused(tmp_path / "c", files | {"images.csv": b""}, r"separated by commas, and 0 rows: it lacks path")


def test_a_csv_of_windows_paths_is_read(tmp_path):
    files = birds()
    rows = [f"{name.replace('/', chr(92))},{name[:6]}" for name in files]
    source = write_folder(tmp_path / "source", files | csv(*rows, head="path,label"))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["images"] == 200
    assert card["unused_images"] == 0


def test_a_csv_needs_no_folder_beside_it_that_it_does_not_name(tmp_path):
    rows = [f"{name},{name[:6]}" for name in birds()]
    source = write_folder(tmp_path / "source", birds() | csv(*rows, head="path,label") | {"venv/x": b""})
    (source / "venv" / "lib64").symlink_to(tmp_path, target_is_directory=True)
    assert folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)["images"] == 200


def test_labels_are_stripped(tmp_path):
    rows = [f"{name}, {name[:6]}{' ' * (i % 3)}" for i, name in enumerate(birds())]
    source = write_folder(tmp_path / "source", birds() | csv(*rows, head="path,label"))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["class_names"] == [f"bird{label:02d}" for label in range(20)]


@pytest.mark.parametrize(("n_classes", "per_class"), [(12, 30), (20, 4), (60, 1)])
def test_validation_that_cannot_choose_is_refused(tmp_path, n_classes, per_class):
    files = birds(n_classes, per_class)
    if per_class == 1:  # the test classes must have a match
        files |= {f"bird{label:02d}/more.jpg": photo(label) for label in range(0, 60, 9)}
    match = r"validation cannot choose a checkpoint: \d+ queries of \d classes have .*, 50 of 5 are needed; give more"
    refused(tmp_path, files, match, source=".")


def test_a_fraction_that_would_do_is_named(tmp_path):
    root = write_folder(tmp_path / "source", birds(16, 10))
    with pytest.raises(
        PreparationError, match=r"8 classes for training .*, or hold out 5 of them with --val-fraction 5$"
    ):
        folder.prepare(root, tmp_path / "mine", replace(SMALL, val_fraction=0.1))
    assert folder.prepare(root, tmp_path / "mine", replace(SMALL, val_fraction=5))["classes"]["val"] == 5


def test_given_validation_classes_must_be_able_to_choose(tmp_path):
    rows = [
        f"{name},{name[:6]},{'val' if int(name[4:6]) < 4 else 'test' if int(name[4:6]) < 8 else 'train'}"
        for name in birds()
    ]
    refused(
        tmp_path, birds() | csv(*rows, head="path,label,split"), r"40 queries of 4 classes .* more in the CSV's column"
    )


def people(camera, roles=("query", "gallery")):
    """A CSV whose test has roles: `camera(label, i)` of each image."""
    rows = []
    for name in birds():
        label, i = int(name[4:6]), int(name[7])
        split = "train" if label < 8 else "val" if label < 14 else "test"
        role = roles[0 if i == 0 else 1] if split == "test" else "both"
        rows.append(f"{name},{name[:6]},{split},{camera(label, i)},{role}")
    return rows


def test_a_test_that_measures_nothing_is_refused(tmp_path):
    one_camera = people(lambda label, i: int(label < 14 and i % 2))
    match = r"measure nothing: of 6 queries 0 have a match and 6 a rival \(6 query classes, 6 of them in .*, 1 cameras"
    refused(tmp_path / "a", birds() | csv(*one_camera), match)
    others = [
        row for row in people(lambda label, i: i % 2) if (",query" in row) == (row[4:6] < "17") or row[4:6] < "14"
    ]
    refused(
        tmp_path / "b", birds() | csv(*others), r"of 3 queries 0 have .* \(3 query classes, 0 of them in the gallery"
    )
    single = [f"{name},{name[:6]},train" for name in birds(14)]
    single += [f"bird{label}/0.jpg,bird{label},test" for label in range(14, 20)]
    match = r"of 6 queries 0 have a match and 6 a rival .* protocol all-vs-rest\); give at least two test classes"
    refused(tmp_path / "c", birds() | csv(*single, head="path,label,split"), match)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    root = write_folder(tmp_path / "source", birds())
    (tmp_path / "secret.png").write_bytes(encoded(np.zeros((4, 4), np.uint8), "PNG"))
    (root / "bird00" / "link.png").symlink_to(tmp_path / "secret.png")
    refused(tmp_path, {}, r"link\.png is a link", source=".")
