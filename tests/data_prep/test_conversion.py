"""Preparation of any source: bad images, full disks, interruptions, memory; and the command line."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import __main__ as command_line
from data_prep import cub, folder
from data_prep.conversion import Options
from data_prep.prepared import PreparationError, create_images, new_folder
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import DatasetError
from hloss.runs.images import ImageSettings
from tests.helpers.miniatures import CUB_PUBLISHED, cub_files, encoded, expect, photo, prepared, write_folder, write_tgz

ROOT = Path(__file__).parents[2]
SMALL = Options(ImageSettings(16, 16, "pad"), val_fraction=0.5)


def images(n_classes=20, per_class=10, **others):
    """Class folders of PNG images; every pixel of an image is its number."""
    files = {}
    for label in range(n_classes):
        for i in range(per_class):
            files[f"class{label}/{i}.png"] = encoded(np.full((16, 16, 3), len(files), np.uint8), "PNG")
    return {**files, **others}


def children(data):
    return sorted(p.name for p in data.iterdir()) if data.exists() else []


N = 200
BAD = {"class1/1.png": b"", "class3/0.png": b"\x89PNG\r\n\x1a\n broken", "class4/2.png": photo(0)[:300]}


def test_lists_bad_images_and_writes_nothing(tmp_path):
    source = write_folder(tmp_path / "source", images(**BAD))
    with pytest.raises(PreparationError) as error:
        folder.prepare(source, tmp_path / "data" / "mine", SMALL)
    message = str(error.value)
    assert "3 of 200 images cannot be decoded; replace them, or pass --skip-bad" in message
    assert "class1/1.png: empty file (0 bytes)" in message
    assert all(f"\n  {name}: " in message for name in BAD)
    assert children(tmp_path / "data") == []


def test_skips_bad_images_and_lists_them_in_the_card(tmp_path):
    source = write_folder(tmp_path / "source", images(**BAD))
    dataset = prepared("folder", source, tmp_path / "mine", "--skip-bad", "--size", "16x16", "--val-fraction", "6")
    assert dataset.card["skipped_images"].keys() == BAD.keys()
    assert dataset.card["images"] == len(dataset.images) == N - 3
    numbers = [int(name[5:-6]) * 10 + int(name[-5]) for name in dataset.index.source]
    assert dataset.images[:, 0, 0, 0].tolist() == numbers
    assert (tmp_path / "mine" / "images.npy").stat().st_size == 128 + (N - 3) * 16 * 16 * 3
    dataset.check_pixels()


def test_refuses_a_split_with_only_bad_images(tmp_path):
    source = write_folder(tmp_path / "source", dict.fromkeys(images(), b""))
    with pytest.raises(
        PreparationError, match="200 of 200 images cannot be decoded: no image of test, train, val remains"
    ):
        folder.prepare(source, tmp_path / "data" / "mine", replace(SMALL, skip_bad=True))
    assert children(tmp_path / "data") == []


def test_refuses_splits_that_are_too_small_without_bad_images(tmp_path):
    files = images()
    index = prepared("folder", write_folder(tmp_path / "a", files), tmp_path / "first" / "mine").index

    def refused(match, split, keep, source=tmp_path / "b"):
        """Damage all images of a split but the first `keep` of each class."""
        rows = index[index.split == split]
        bad = rows.source[rows.groupby("label").cumcount() >= keep]
        write_folder(source, files | dict.fromkeys(bad, b"broken"))
        with pytest.raises(PreparationError, match=match):
            folder.prepare(source, tmp_path / "data" / "mine", Options(SMALL.image_settings, skip_bad=True))
        assert children(tmp_path / "data") == []

    refused(
        "without the 90 of 200 images that cannot be decoded, the test split cannot be evaluated: of 10 queries, 0",
        "test",
        1,
    )
    refused("without the 5 of 200 images .* the validation split is too small .* got 45 queries of 5 classes", "val", 9)


def test_refuses_a_published_dataset_that_cannot_be_evaluated_without_bad_images(tmp_path, monkeypatch):
    files = cub_files()
    first_of_class = {}
    for name in files:
        if "/images/" in name and int(name.split("/")[2][:3]) > 6:  # classes 7 to 10 are for the test
            first_of_class.setdefault(name.split("/")[2], name)
    bad = {name: b"broken" for name in files if name.split("/")[2:3] and name.split("/")[2] in first_of_class}
    files |= {name: data for name, data in bad.items() if name not in first_of_class.values()}
    archive = write_tgz(tmp_path / "cub.tgz", files)
    expect(monkeypatch, cub, CUB_PUBLISHED, archive)
    options = replace(cub.OPTIONS, skip_bad=True)
    with pytest.raises(
        PreparationError, match="the test split cannot be evaluated: of 4 queries, 0 have a match and 4"
    ):
        cub.prepare(archive, tmp_path / "data" / "cub", options)
    assert children(tmp_path / "data") == []


def test_refuses_a_published_dataset_with_one_validation_class(tmp_path, monkeypatch):
    archive = write_tgz(tmp_path / "cub.tgz", cub_files())
    expect(monkeypatch, cub, CUB_PUBLISHED, archive)
    with pytest.raises(
        PreparationError, match=r"the val split cannot be evaluated: of [45] queries, [45] have a match and 0"
    ):
        cub.prepare(archive, tmp_path / "data" / "cub", replace(cub.OPTIONS, val_fraction=1))
    without = cub.prepare(archive, tmp_path / "data" / "cub", replace(cub.OPTIONS, val_fraction=0))
    assert without["classes"] == {"train": 6, "val": 0, "test": 4}


def test_refuses_to_overwrite_other_files(tmp_path):
    source = write_folder(tmp_path / "source", images())
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(
        PreparationError, match=r"neither empty nor a prepared dataset: it contains thesis\.tex; choose"
    ):
        folder.prepare(source, other, SMALL)
    folder.prepare(source, tmp_path / "mine", SMALL)
    with (
        pytest.raises(PreparationError, match="is the prepared dataset 'mine', not 'theirs'"),
        new_folder(tmp_path / "mine", "theirs"),
    ):
        pass
    (tmp_path / "mine" / "notes.txt").write_text("mine too")
    with pytest.raises(PreparationError, match=r"nor a prepared dataset: it contains notes\.txt; choose"):
        folder.prepare(source, tmp_path / "mine", SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine too"
    (tmp_path / "mine" / "notes.txt").unlink()
    (tmp_path / "mine" / "card.json").write_text("{")
    with pytest.raises(PreparationError, match=r"mine/card\.json is not valid JSON; choose another --out"):
        folder.prepare(source, tmp_path / "mine", SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PreparationError, match=r"--out must be a folder: got the file .*file"):
        folder.prepare(source, tmp_path / "file", SMALL)


def test_a_second_preparation_replaces_the_first(tmp_path):
    source = write_folder(tmp_path / "source", images())
    before = folder.prepare(source, tmp_path / "data" / "mine", SMALL)
    after = folder.prepare(source, tmp_path / "data" / "mine", replace(SMALL, seed=3))
    assert before["index_sha256"] != after["index_sha256"]
    assert open_dataset(tmp_path / "data" / "mine").card == after
    assert children(tmp_path / "data") == ["mine"]


def test_refuses_a_disk_without_enough_space(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", images())
    usage = __import__("collections").namedtuple("usage", "total used free")(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(PreparationError, match=r"not enough disk space in .*/data: 0\.0 GB are needed"):
        folder.prepare(source, tmp_path / "data" / "mine", SMALL)
    assert children(tmp_path / "data") == []


@pytest.mark.parametrize("where", ["pwrite", "posix_fallocate", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_names_a_disk_that_fills_up_and_leaves_no_files(tmp_path, monkeypatch, where, number):
    source = write_folder(tmp_path / "source", images())
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > (5 if where == "pwrite" else 0):
            raise OSError(number, os.strerror(number))
        return len(arguments[1])

    monkeypatch.setattr(os, where, full, raising=False)  # macOS has no posix_fallocate
    with pytest.raises(PreparationError, match=r"not enough disk space in .*/data; free some space or choose another"):
        folder.prepare(source, tmp_path / "data" / "mine", SMALL)
    assert calls
    assert children(tmp_path / "data") == []


def test_continues_a_partial_write(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", images())
    whole = folder.prepare(source, tmp_path / "whole" / "mine", SMALL)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: write(descriptor, data[:100], place))
    assert folder.prepare(source, tmp_path / "cut" / "mine", SMALL) == whole


def test_refuses_two_preparations_of_one_output_at_once(tmp_path):
    with new_folder(tmp_path / "mine") as first:
        with pytest.raises(PreparationError, match="another process is preparing"), new_folder(tmp_path / "mine"):
            pass
        assert first.exists()


def start(source, out, *options):
    command = [sys.executable, "-m", "data_prep", "folder", "--source", str(source), "--out", str(out), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background of a shell ignores SIGINT, and its child processes would inherit that.
    return subprocess.Popen(command, cwd=ROOT, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for(condition, process):
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("the condition did not become true in 30 s")


@pytest.mark.parametrize("older", [False, True])
def test_a_killed_preparation_leaves_no_partial_dataset(tmp_path, older):
    rng = np.random.default_rng(0)
    slow = [encoded(rng.integers(0, 256, (1200, 1200, 3), np.uint8), "PNG", compress_level=1) for _ in range(2)]
    source = write_folder(tmp_path / "source", {f"class{i % 20}/{i}.png": slow[i % 2] for i in range(200)})
    data = tmp_path / "data"
    if older:
        before = folder.prepare(write_folder(tmp_path / "few", images()), data / "mine", SMALL)
    process = start(source, data / "mine")
    wait_for(lambda: list(data.glob(".mine.preparing-*/images.npy")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(list(data.glob(".mine.preparing-*"))) == 1
    if older:
        assert open_dataset(data / "mine").card == before
    else:
        with pytest.raises(DatasetError, match=r"prepared in .*: none"):
            open_dataset(data / "mine")
    small = write_folder(tmp_path / "small", images())
    folder.prepare(small, data / "mine", SMALL)
    assert children(data) == ["mine"]
    assert open_dataset(data / "mine").card["images"] == N


def test_an_interrupted_preparation_removes_its_files(tmp_path):
    big = encoded(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8), "PNG", compress_level=1)
    source = write_folder(tmp_path / "source", {f"class{i % 20}/{i}.png": big for i in range(200)})
    process = start(source, tmp_path / "data" / "mine")
    wait_for(lambda: list((tmp_path / "data").glob(".mine.preparing-*/images.npy")), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.endswith("data_prep folder: interrupted; nothing was written\n")
    assert children(tmp_path / "data") == []


# getrusage would include the peak memory of the parent process before the fork.
PEAK = """
import sys
from data_prep.__main__ import main
main(["folder", "--source", sys.argv[1], "--out", sys.argv[2]])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory that Linux tells")
def test_peak_memory_does_not_grow_with_the_dataset(tmp_path):
    """1,600 images (315 MB prepared) need at most 40 MB more memory than 200 images (39 MB prepared)."""
    tiny = [photo(i) for i in range(10)]
    peaks = []
    for n in (200, 1600):
        source = write_folder(tmp_path / str(n), {f"class{i % 20}/{i}.jpg": tiny[i % 10] for i in range(n)})
        command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "data" / f"of{n}")]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(answer.stdout.split()[-1]) / 1024)
        assert f"{n}/{n}" in answer.stderr  # the progress bar
    assert peaks[1] < peaks[0] + 40, peaks


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot allocate disk space")
def test_allocates_the_disk_space_of_all_images_at_once(tmp_path):
    create_images(tmp_path, 100, 64, 64, 3)
    file = os.stat(tmp_path / "images.npy")
    assert file.st_size == 128 + 100 * 64 * 64 * 3
    assert file.st_blocks * 512 >= file.st_size


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "data_prep", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_lists_datasets_and_download_pages(tmp_path, capsys):
    data = tmp_path / "data"
    folder.prepare(write_folder(tmp_path / "source", images()), data / "mine", SMALL)
    command_line.main(["list", "--data", str(data)])
    text = capsys.readouterr().out
    blocks = {block.partition(":")[0]: block for block in text.split("\n\n")}
    assert list(blocks) == ["glyphs", "cub", "sop", "cuhk03", "market1501", "folder", "mine"]
    assert "not prepared" in blocks["cub"]
    assert "mine: 200 images of 20 classes (train 5, val 5, test 10), 0.00 GB" in blocks["mine"]
    assert "1,150,585,339 bytes" in blocks["cub"]
    assert "7f73d41a2f44250d4779881525aea32e" in blocks["sop"]
    assert "23.6 GB prepared" in blocks["sop"]
    assert "2.3 GB prepared" in blocks["cub"]
    for name, module in command_line.PUBLISHED.items():
        words = ["https://", "terms ", f"--source {module.ORIGINAL.file}", "md5 " * bool(module.ORIGINAL.md5)]
        assert all(word in blocks[name] for word in words)
    assert sum("md5 " in block for block in blocks.values()) >= 4


def test_lists_a_dataset_with_a_damaged_card(tmp_path, capsys):
    write_folder(tmp_path, {"mine/card.json": b"{", "yours/card.json": b"{}"})
    command_line.main(["list", "--data", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    for name in ("mine", "yours"):
        assert (
            f"{name}: damaged: {tmp_path / name / 'card.json'} is not a valid card; prepare the dataset again" in lines
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cub"], "required: --source"),
        (["cbu", "--source", "x"], "invalid choice: 'cbu'"),
        (
            ["cub", "--source", "nothing.tgz"],
            "data_prep cub: --source must be an existing file or folder: got nothing.tgz",
        ),
        (
            ["cub", "--source", "x", "--size", "0x5"],
            "must be HEIGHTxWIDTH, each from 1 to 9999 pixels, such as 256x256: got '0x5'",
        ),
        (
            ["cub", "--source", "x", "--val-fraction", "-1"],
            "a fraction between 0 and 1 or a number of classes: got '-1'",
        ),
        (["cub", "--source", "x", "--val-fraction", "2.5"], "or a number of classes: got '2.5'"),
        (["cub", "--source", "x", "--val-fraction", "inf"], "or a number of classes: got 'inf'"),
        (["cub", "--source", "x", "--val-fraction", "ten"], "or a number of classes: got 'ten'"),
        (["cub", "--source", "x", "--seed", "-1"], "--seed: must be a whole number, 0 or more: got '-1'"),
        (["cub", "--source", "x", "--crop", "bbox250"], "unrecognized arguments: --crop"),
        (["cuhk03", "--source", "x", "--test-set", "0"], "--test-set must be from 1 to 20: got 0"),
    ],
)
def test_refuses_a_wrong_command(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command_line.main(arguments)
    assert message in str(end.value) + capsys.readouterr().err
    assert children(tmp_path) == []


def test_runs_as_a_command(tmp_path):
    answer = run(
        "folder", "--source", str(write_folder(tmp_path / "source", images())), "--out", str(tmp_path / "mine")
    )
    assert answer.returncode == 0, answer.stderr
    assert "200 images of 20 classes" in answer.stdout
    assert json.loads((tmp_path / "mine" / "card.json").read_text())["images"] == N
    answer = run("folder", "--source", str(tmp_path / "source" / "class0"), "--out", str(tmp_path / "other"))
    assert answer.returncode == 1
    assert answer.stderr.startswith("data_prep folder: ")
