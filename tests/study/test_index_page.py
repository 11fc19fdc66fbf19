"""The index page of a study."""

import html.parser
import json
import re

import pytest

from hloss.runs.checkpoints import read_progress, write_progress, write_status
from hloss.runs.files import atomic_write
from hloss.runs.run import run
from hloss.study.index_page import IndexPage, page, read_state, seconds_left
from hloss.study.spec import load_study
from hloss.study.tuning import resolve_tuning


class Text(html.parser.HTMLParser):
    """The words of a page, its links, and its unclosed tags."""

    def __init__(self, source):
        super().__init__()
        self.words, self.links, self.open = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name == "href"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def half_done(study, tmp_path, monkeypatch):
    """Of five runs one is complete, one failed, one is at work, and two are to do."""
    monkeypatch.chdir(tmp_path)
    loaded = study.load()
    complete, failed, working = loaded.runs[:3]
    run(complete.config, lambda line: None)
    for one in (failed, working):
        one.config.folder.mkdir(parents=True)
    write_status(failed.config.folder, "failed", 2, "RunError: the loss is <not> finite")
    write_status(working.config.folder, "running", 2)
    numbers = {"iteration": 2, "iterations": 4, "loss": 0.25, "images_per_second": 1234.0, "seconds_left": 60.0}
    write_progress(working.config.folder, **numbers, validations=[[2, 0.5]])
    return loaded


def test_shows_each_state(half_done, tmp_path):
    index = IndexPage(half_done)
    index.write()
    source = index.file.read_text()
    text = Text(source)
    assert text.open == []
    words = " ".join(" ".join(text.words).split())
    complete, failed, working, *to_do = half_done.runs
    result = json.loads((complete.config.folder / "result.json").read_text())
    assert "1 of 5 runs complete" in words
    assert "■ 1 complete ■ 1 failed ■ 1 at work ■ 2 to do about " in words
    assert "RunError: the loss is <not> finite" in words
    assert f"{working.name} 60 s 2 of 4 50.0 0.2500 1,234" in words
    assert f"tiny: {complete.name} {100 * result['metrics']['recall@1']:.1f}" in words
    assert all(one.name in words for one in to_do)
    linked = [(index.file.parent / link).resolve() for link in text.links]
    assert linked == [
        failed.config.folder / "run.log",
        working.config.folder / "run.log",
        complete.config.folder / "run.ipynb",
    ]
    assert len(re.findall("<polyline", source)) == 2
    assert 'http-equiv="refresh"' in source


def test_the_progress_of_a_run_is_what_it_measured(half_done):
    complete = half_done.runs[0].config
    numbers = read_progress(complete.folder)
    result = json.loads((complete.folder / "result.json").read_text())
    assert (numbers["iteration"], numbers["iterations"], numbers["seconds_left"]) == (4, 4, 0)
    assert max(recall for _, recall in numbers["validations"]) == result["validation_recall@1"]


def test_a_finished_study_does_not_reload(half_done):
    states = [read_state(half_done.runs[0])]
    assert "refresh" not in page(half_done, states, half_done.runs[0].config.folder, None)


def test_a_run_that_starts_is_at_work(half_done):
    starting = half_done.runs[3]
    assert read_state(starting).state == "to do"
    starting.config.folder.mkdir(parents=True)
    (starting.config.folder / "run.log").touch()
    assert read_state(starting).state == "running"


def test_time_left(half_done):
    states = [read_state(one) for one in half_done.runs]
    seconds = states[0].result["training_seconds"]
    assert seconds_left(states) == 60 + 2 * seconds
    assert seconds_left(states[1:]) is None
    assert seconds_left([s for s in states if s.state != "running"]) is None


def test_time_left_follows_the_pace_once_enough_runs_are_complete(half_done):
    states = [read_state(one) for one in half_done.runs]
    complete, working, to_do = states[0], states[2], states[3]
    index = IndexPage(half_done)
    at_first = [complete, working, *[to_do] * 9]
    assert index._seconds_left(at_first) == seconds_left(at_first)
    index.started -= 500.0
    after = [*[complete] * 6, working, *[to_do] * 4]
    assert index._seconds_left(after) == pytest.approx(500 / 5 * 5, rel=0.01)
    assert index._seconds_left([complete] * 11) is None


def test_a_change_is_written_at_once(half_done):
    index = IndexPage(half_done)
    index.write_if_due()
    index.file.unlink()
    index.write_if_due()
    assert not index.file.exists()
    index.outdated = True
    index.write_if_due()
    assert index.file.exists()


def test_two_processes_write_the_page_at_the_same_time(half_done, monkeypatch):
    ours, theirs = IndexPage(half_done), IndexPage(half_done)
    waiting = [theirs]

    def while_another_writes(file, write):
        def write_after(part):
            write(part)
            if waiting:
                with monkeypatch.context() as other_process:
                    other_process.setattr("os.getpid", lambda: 1)
                    waiting.pop().write()

        atomic_write(file, write_after)

    monkeypatch.setattr("hloss.study.index_page.atomic_write", while_another_writes)
    ours.write()
    assert waiting == []
    assert [file.name for file in ours.file.parent.iterdir() if file.is_file()] == ["index.html"]
    assert "small" in ours.file.read_text()


def test_a_tuned_study_says_what_waits(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study.tune()
    study.load()
    index = IndexPage(resolve_tuning(load_study("small", study.folder)))
    index.write()
    assert "2 more wait for settings that a grid chooses" in index.file.read_text()
