"""A user's own images: class folders and CSV files, and refused sources."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep import __main__ as command_line
from data_prep import folder
from data_prep.conversion import Options
from data_prep.prepared import PreparationError
from hloss.runs.config import parse_config
from hloss.runs.images import ImageSettings
from hloss.runs.run import run
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


def test_prepares_and_evaluates_class_folders(tmp_path):
    source = write_folder(tmp_path / "source", birds() | {"readme.txt": b"x", "bird00/Thumbs.db": b"x"})
    dataset = prepared("folder", source, tmp_path / "data" / "birds")
    assert dataset.card["name"] == "birds"
    assert dataset.card["classes"] == {"train": 5, "val": 5, "test": 10}
    assert dataset.card["settings"]["val_fraction"] == 5  # A tenth would be one class, which is too few.
    assert dataset.card["class_names"] == [f"bird{label:02d}" for label in range(20)]
    assert dataset.card["ignored_files"] == {"Thumbs.db": 1}
    names = [dataset.card["class_names"][label] for label in dataset.index.label]
    assert [source.partition("/")[0] for source in dataset.index.source] == names
    assert dataset.images.shape == (200, 256, 256, 3)
    images, _ = a_batch(dataset)
    assert images.shape == (8, 3, 256, 256)
    retrieval = evaluated(dataset)
    assert (retrieval.protocol, retrieval.n_queries) == ("all-vs-rest", 100)
    assert retrieval.metrics["recall@1"] > 0.5  # The images of a class are one picture at several sizes.


def test_prepares_and_evaluates_a_csv_with_splits_cameras_and_roles(tmp_path):
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


def test_the_seed_splits_a_csv_of_paths_and_labels(tmp_path):
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


def test_draws_validation_classes_from_train(tmp_path):
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
        (["..\\secret.jpg,a,train,,both"], r"path must be relative to the CSV's folder and inside it: got '\.\."),
        (["../secret.jpg,a,train,,both"], r"relative to the CSV's folder and inside it: got '\.\./secret\.jpg'"),
        (["/etc/passwd,a,train,,both"], "relative to the CSV's folder and inside it: got '/etc/passwd'"),
        ([ROW, "bird00/0.jpg,b,train,,both"], r"bird00/0\.jpg is listed twice, with labels \['a', 'b'\]"),
        ([ROW, "bird00/./0.jpg,b,train,,both"], r"bird00/0\.jpg is listed twice"),
        (["bird00/0.jpg,a,training,,both"], r"split of bird00/0\.jpg must be one of train, val, test: got 'training'"),
        (["bird00/0.jpg,a,train,,queries"], r"role of bird00/0\.jpg must be one of both, query, .*: got 'queries'"),
        (["bird00/0.jpg,a,train,c1,both"], r"camera of bird00/0\.jpg must be a whole number or empty: got 'c1'"),
        (["bird00/0.jpg,,train,,both"], r"label of bird00/0\.jpg is empty"),
        ([ROW, "bird00/1.jpg,a,test,,both"], r"the class of bird00/0\.jpg has images in test and train"),
        ([ROW], "column split of the CSV has no image of test"),
        (
            [ROW, "bird01/0.jpg,b,test,,both", "bird02/99.jpg,c,train,,both"],
            r"1 of 3 images do not exist, .* bird02/99\.jpg; paths are relative to",
        ),
        (
            [ROW, "bird02/1.jpg,c,train,,query", "bird01/0.jpg,b,test,,both"],
            r"role of bird02/1\.jpg must be both: got query",
        ),
        (
            [ROW, "bird02/1.jpg,c,train,,both", "bird01/0.jpg,b,test,,query"],
            "must include query and gallery: got query",
        ),
        ([ROW, *TESTED], "--val-fraction moves 1 of 1 training classes"),
        ([ROW, "Bird01/0.JPG,b,test,,both"], r"the first is Bird01/0\.JPG \(did you mean bird01/0\.jpg\?\)"),
        (
            [ROW, "bird01/0.jpg,b,test,both"],
            r"must have 5 fields separated by commas: got 4 in 'bird01/0\.jpg,b,test,both'",
        ),
        ([], r"images\.csv has a header but no rows"),
    ],
)
def test_refuses_a_wrong_csv(tmp_path, rows, match):
    refused(tmp_path, birds() | csv(*rows), match)


def test_names_wrong_columns(tmp_path):
    refused(
        tmp_path / "a",
        birds() | csv("bird00/0.jpg,a", head="file,label"),
        r"missing columns path: got file, label \(separated by commas\)",
    )
    refused(
        tmp_path / "b",
        birds() | csv("bird00/0.jpg,a,1", head="path,label,cam"),
        r"unknown columns cam: got path, label, cam",
    )
    refused(tmp_path / "c", birds() | {"images.csv": b"\xff\xfe\x00path"}, "cannot be read as CSV in UTF-8")


def test_refuses_other_folder_structures(tmp_path):
    refused(
        tmp_path / "a",
        birds() | {"loose.jpg": photo(0)},
        r"1 of 201 images are not in a class folder, the first is loose\.jpg",
        source=".",
    )
    refused(
        tmp_path / "b",
        {"train/bird/0.jpg": photo(0)},
        r"in nested folders, .* train/bird/0\.jpg; pass --last-folder .*'bird'",
        source=".",
    )
    refused(tmp_path / "c", {"notes.txt": b"x"}, "contains no images in class folders", source=".")
    refused(tmp_path / "d", birds(3), "at least 4 classes are needed .*: got 3", source=".")
    refused(
        tmp_path / "e",
        {"images.txt": b"x"},
        r"must be a folder, a \.csv file or a \.tsv file: got .*images\.txt",
        source="images.txt",
    )


def test_last_folder_uses_the_innermost_folder_as_the_class(tmp_path):
    files = {f"{'train' if i % 2 else 'test/more'}/{name}": image for i, (name, image) in enumerate(birds().items())}
    source = write_folder(tmp_path / "source", files)
    dataset = prepared("folder", source, tmp_path / "mine", "--last-folder", "--size", "16x16")
    assert dataset.card["class_names"] == [f"bird{label:02d}" for label in range(20)]
    assert dataset.card["images"] == 200


def test_ignores_and_counts_hidden_and_system_folders(tmp_path, capsys):
    other = (".ipynb_checkpoints/a.jpg", ".git/objects/1.png", "__MACOSX/bird00/0.jpg", "bird00/.trash/0.jpg")
    source = write_folder(tmp_path / "source", birds() | dict.fromkeys(other, photo(0)))
    dataset = prepared("folder", source, tmp_path / "mine", "--size", "16x16")
    assert dataset.card["class_names"] == [f"bird{label:02d}" for label in range(20)]
    assert dataset.card["ignored_files"] == {".git/": 1, ".ipynb_checkpoints/": 1, ".trash/": 1, "__MACOSX/": 1}
    listed = "1 in .git/, 1 in .ipynb_checkpoints/, 1 in .trash/, 1 in __MACOSX/"
    assert f"hidden and system files, ignored: 4 ({listed})\n" in capsys.readouterr().out


def test_reads_all_image_extensions_and_lists_other_files(tmp_path, capsys):
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
    assert "files of an unsupported type (.heic): 5 (bird02/0.heic, bird02/1.heic, bird02/2.heic, ...)\n" in out
    assert "files of an unsupported type (no extension): 1 (README)\n" in out


def test_the_card_of_images_alone_lists_no_other_files(tmp_path):
    card = folder.prepare(write_folder(tmp_path / "source", birds()), tmp_path / "mine", SMALL)
    assert card["ignored_files"] == {}
    assert "unused_files" not in card


@pytest.mark.parametrize(
    ("separator", "start"), [(";", ""), ("\t", ""), ("|", ""), (", ", ""), (";", "sep=;\n"), (",", "sep=,\r\n")]
)
def test_reads_a_csv_with_other_separators_case_and_blanks(tmp_path, separator, start):
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


def test_reads_separators_in_quoted_fields(tmp_path):
    files = birds()
    rows = [f'"{name}", "{name[:6]}; the ""great"", a|b"' for name in files]
    source = write_folder(tmp_path / "source", files | csv(*rows, head='"path","label"'))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["class_names"][0] == 'bird00; the "great", a|b'
    refused(tmp_path / "b", files | csv('bird00/0.jpg,"a'), "cannot be read as CSV in UTF-8: unexpected end of data")
    refused(tmp_path / "c", files | {"images.csv": b""}, r"missing columns path, label: got none")


def test_reads_windows_paths_in_a_csv(tmp_path):
    files = birds()
    rows = [f"{name.replace('/', chr(92))},{name[:6]}" for name in files]
    source = write_folder(tmp_path / "source", files | csv(*rows, head="path,label"))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["images"] == 200
    assert card["unused_images"] == 0


def test_ignores_folders_that_a_csv_does_not_list(tmp_path):
    rows = [f"{name},{name[:6]}" for name in birds()]
    source = write_folder(tmp_path / "source", birds() | csv(*rows, head="path,label") | {"venv/x": b""})
    (source / "venv" / "lib64").symlink_to(tmp_path, target_is_directory=True)
    assert folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)["images"] == 200


def test_strips_blanks_from_labels(tmp_path):
    rows = [f"{name}, {name[:6]}{' ' * (i % 3)}" for i, name in enumerate(birds())]
    source = write_folder(tmp_path / "source", birds() | csv(*rows, head="path,label"))
    card = folder.prepare(source / "images.csv", tmp_path / "mine", SMALL)
    assert card["class_names"] == [f"bird{label:02d}" for label in range(20)]


def test_strips_blanks_from_the_names_of_folders(tmp_path):
    files = {f"{name[:6]} {name[6:]}" if n % 2 else name: file for n, (name, file) in enumerate(birds().items())}
    assert len({name.split("/")[0] for name in files}) == 40
    card = folder.prepare(write_folder(tmp_path / "source", files), tmp_path / "mine", SMALL)
    assert card["class_names"] == [f"bird{label:02d}" for label in range(20)]


@pytest.mark.parametrize(("n_classes", "per_class"), [(12, 30), (20, 4), (60, 1)])
def test_refuses_a_validation_split_that_is_too_small(tmp_path, n_classes, per_class):
    files = birds(n_classes, per_class)
    if per_class == 1:  # Some test classes need a match.
        files |= {f"bird{label:02d}/more.jpg": photo(label) for label in range(0, 60, 9)}
    match = (
        r"select a checkpoint: got \d+ queries of \d classes .*; at least 50 queries of 5 classes are needed "
        r"\(protocol all-vs-rest: a match is another image of the query's class\); add .*, or pass --val-fraction 0: "
        r'runs train without validation if their setting choose is "last"'
    )
    refused(tmp_path, files, match, source=".")


def test_suggests_a_sufficient_val_fraction(tmp_path):
    root = write_folder(tmp_path / "source", birds(16, 10))
    with pytest.raises(
        PreparationError, match=r"training and validation have 8 classes\), or pass --val-fraction 5, or pass --val-f"
    ):
        folder.prepare(root, tmp_path / "mine", replace(SMALL, val_fraction=0.1))
    assert folder.prepare(root, tmp_path / "mine", replace(SMALL, val_fraction=5))["classes"]["val"] == 5


def test_refuses_given_validation_classes_that_are_too_few(tmp_path):
    rows = [
        f"{name},{name[:6]},{'val' if int(name[4:6]) < 4 else 'test' if int(name[4:6]) < 8 else 'train'}"
        for name in birds()
    ]
    refused(
        tmp_path,
        birds() | csv(*rows, head="path,label,split"),
        r"got 40 queries of 4 classes .* add classes or images of split val to the CSV",
    )


def people(camera, roles=("query", "gallery")):
    """Return rows of a CSV whose test images have roles and the cameras `camera(label, i)`."""
    rows = []
    for name in birds():
        label, i = int(name[4:6]), int(name[7])
        split = "train" if label < 8 else "val" if label < 14 else "test"
        role = roles[0 if i == 0 else 1] if split == "test" else "both"
        rows.append(f"{name},{name[:6]},{split},{camera(label, i)},{role}")
    return rows


def test_refuses_a_test_split_that_cannot_be_evaluated(tmp_path):
    one_camera = people(lambda label, i: int(label < 14 and i % 2))
    match = r"of 6 queries, 0 have a match and 6 a non-match; .* classes: 6, 6 of them in .*; cameras: 1;"
    refused(tmp_path / "a", birds() | csv(*one_camera), match)
    others = [
        row for row in people(lambda label, i: i % 2) if (",query" in row) == (row[4:6] < "17") or row[4:6] < "14"
    ]
    refused(
        tmp_path / "b", birds() | csv(*others), r"of 3 queries, 0 have .* \(query classes: 3, 0 of them in the gallery"
    )
    single = [f"{name},{name[:6]},train" for name in birds(14)]
    single += [f"bird{label}/0.jpg,bird{label},test" for label in range(14, 20)]
    match = r"of 6 queries, 0 have a match and 6 a non-match; a match is another image .*; protocol: all-vs-rest\)"
    refused(tmp_path / "c", birds() | csv(*single, head="path,label,split"), match)


def test_prepares_without_validation_classes(tmp_path, capsys):
    source = write_folder(tmp_path / "source", birds(6, 5))
    dataset = prepared("folder", source, tmp_path / "mine", "--val-fraction", "0", "--size", "16x16")
    assert dataset.card["classes"] == {"train": 3, "val": 0, "test": 3}
    assert dataset.card["settings"]["val_fraction"] == 0
    warning = (
        'WARNING: val: there are no validation classes; runs train without validation if their setting choose is "last"'
    )
    assert warning in capsys.readouterr().out
    command_line.main(["check", str(dataset.folder)])
    assert capsys.readouterr().out.count("WARNING") == 1


def prepare_rows(tmp_path, rows, *options, size="16x16"):
    source = write_folder(tmp_path / "source", birds() | csv(*rows)) / "images.csv"
    return prepared("folder", source, tmp_path / "data" / "mine", "--size", size, *options)


VIEWS = people(lambda label, i: i % 2)
NO_CAMERAS = people(lambda label, i: "")
NO_VALIDATION = [row.replace(",val,", ",train,") for row in VIEWS]  # Single-shot has one query per identity: too few.


@pytest.mark.parametrize(
    ("rows", "options", "protocol", "n_queries"),
    [
        (VIEWS, (), "market1501", 6),
        (VIEWS, ("--protocol", "all-vs-rest"), "all-vs-rest", 60),
        (VIEWS, ("--protocol", "query-gallery"), "query-gallery", 6),
        (NO_VALIDATION, ("--val-fraction", "0", "--protocol", "cuhk03-single-shot"), "cuhk03-single-shot", 600),
        (
            NO_VALIDATION,
            ("--val-fraction", "0", "--protocol", "cuhk03-single-shot-two-way"),
            "cuhk03-single-shot-two-way",
            1200,
        ),
        (NO_CAMERAS, (), "query-gallery", 6),
        (NO_CAMERAS, ("--protocol", "all-vs-rest"), "all-vs-rest", 60),
        (people(lambda label, i: i % 2, ("both", "both")), (), "all-vs-rest", 60),
        (people(lambda label, i: i % 3, ("both", "both")), ("--protocol", "market1501"), "market1501", 60),
        (people(lambda label, i: i % 2, ("both", "both")), ("--protocol", "query-gallery"), "query-gallery", 60),
    ],
)
def test_evaluates_by_the_protocol_that_fits_or_is_chosen(tmp_path, rows, options, protocol, n_queries):
    dataset = prepare_rows(tmp_path, rows, *options)
    assert dataset.card["protocol"] == protocol
    retrieval = evaluated(dataset)
    assert (retrieval.protocol, retrieval.n_queries) == (protocol, n_queries)
    assert list(dataset.card["recall_at"])[-1] == (32 if protocol == "all-vs-rest" else 20)
    choose = "last" if rows == NO_VALIDATION else "best"
    settings = {"dataset": "mine", "iterations": 0, "loss": "none", "network": "pixels", "choose": choose}
    config = parse_config({**settings, "data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")})
    result = run(config, lambda line: None)
    assert (result["protocol"], result["validation_protocol"], result["n_queries"]) == (protocol, protocol, n_queries)


def test_reports_the_chosen_recalls(tmp_path, capsys):
    dataset = prepare_rows(tmp_path, VIEWS, "--recall-at", "1,3,50")
    assert dataset.card["recall_at"] == [1, 3, 50]
    assert {"recall@1", "recall@3", "recall@50"} <= evaluated(dataset).metrics.keys()
    for wrong in ("5,10", "1,10,5", "1,1", "1,x", "", "1,", "0,1", "1.5"):
        with pytest.raises(SystemExit):
            prepare_rows(tmp_path, VIEWS, "--recall-at", wrong)
        assert f"must be increasing whole numbers from 1, such as 1,5,10: got {wrong!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "protocol", "match"),
    [
        (
            NO_CAMERAS,
            "market1501",
            r"camera of bird14/0\.jpg is empty; protocol market1501 needs .* \(missing in 60 of 60\)",
        ),
        (
            people(lambda label, i: i % 2 if i else ""),
            None,
            r"camera of bird14/0\.jpg is empty; .* \(missing in 6 of 60\)",
        ),
        (NO_CAMERAS, "cuhk03-single-shot", r"camera of bird14/0\.jpg is empty; protocol cuhk03-single-shot needs"),
        (
            people(lambda label, i: i % 3),
            "cuhk03-single-shot",
            r"exactly two cameras among the test images: got 0, 1, 2;",
        ),
        (
            [*VIEWS[:-1], "bird19/9.jpg,,test,1,junk"],
            "all-vs-rest",
            r"role of bird19/9\.jpg must be both, query or .*: got junk",
        ),
        (
            people(lambda label, i: i % 2 if label > 13 else 0),
            "market1501",
            r"got 0 queries of 0 classes .*\(protocol market1501: a match is a gallery image .* from another camera\)",
        ),
    ],
)
def test_refuses_a_protocol_that_does_not_fit(tmp_path, rows, protocol, match):
    source = write_folder(tmp_path / "source", birds() | csv(*rows)) / "images.csv"
    with pytest.raises(PreparationError, match=match):
        folder.prepare(source, tmp_path / "data" / "mine", SMALL, evaluation=folder.Evaluation(protocol))
    assert not (tmp_path / "data").exists() or list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("name", ["cub", "cuhk03", "cuhk03-1", "market1501", "glyphs", "glyphs-3", "glyphs-hard-0"])
def test_refuses_the_name_of_another_dataset(tmp_path, name):
    source = write_folder(tmp_path / "source", birds())
    with pytest.raises(SystemExit, match=f"{name} is the name of another dataset"):
        prepared("folder", source, tmp_path / "data" / name)
    assert not (tmp_path / "data").exists()


def test_names_a_path_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/read-only/mine")

    monkeypatch.setattr(folder, "prepare", refuse)
    message = r"data_prep folder: /read-only/mine: Permission denied; check that the path exists and that you may read"
    with pytest.raises(SystemExit, match=message):
        prepared("folder", tmp_path, tmp_path / "mine")


def test_refuses_a_link_out_of_the_folder(tmp_path):
    root = write_folder(tmp_path / "source", birds())
    (tmp_path / "secret.png").write_bytes(encoded(np.zeros((4, 4), np.uint8), "PNG"))
    (root / "bird00" / "link.png").symlink_to(tmp_path / "secret.png")
    refused(tmp_path, {}, r"link\.png is a link to a file outside of", source=".")
