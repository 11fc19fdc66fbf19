"""Locks and atomic writes of files."""

import threading

import pytest

from hloss.runs.errors import DamagedError, LockedError, RunError
from hloss.runs.files import atomic_write, file_lock, read_result, run_lock


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_lock_excludes_others_until_it_is_released(kind, tmp_path):
    path = tmp_path if kind == "directory" else tmp_path / "lock"
    with file_lock(path, "is at work"):
        with pytest.raises(LockedError, match=r"^another process is at work; wait until it ends, or end it$"):
            file_lock(path, "is at work").__enter__()
        with file_lock(tmp_path / "other", "is at work"):
            pass
    with file_lock(path, "is at work"):
        pass


def test_waiting_is_reported_once_and_ends_with_the_lock(tmp_path):
    held, told, got = file_lock(tmp_path, "is at work"), [], threading.Event()

    def wait():
        with file_lock(tmp_path, "is at work", 30.0, told.append):
            got.set()

    with held:
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.5)
    waiting.join(10)
    assert got.is_set()
    assert told == ["another process is at work; waiting for at most 30 s"]


def test_error_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), file_lock(tmp_path, "is at work"):
        _ = 1 / 0
    with file_lock(tmp_path, "is at work"):
        pass


def test_locked_run_raises_run_error_with_the_folder(tmp_path):
    with run_lock(tmp_path), pytest.raises(RunError, match=f"another process is working in {tmp_path};"):
        run_lock(tmp_path, patience_seconds=0.0).__enter__()


def test_failed_write_keeps_the_file(tmp_path):
    file = tmp_path / "file"
    atomic_write(file, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        atomic_write(file, fail)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("content", [b"", b'{"run_id": "a", "conf', b"[1]", b'{"run_id": "a"}', b"\xff\x00"])
def test_a_damaged_result_is_refused_by_name_with_the_remedy(content, tmp_path):
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"result\.json is damaged \(.+\); delete the folder .* and start the run"):
        read_result(tmp_path)
