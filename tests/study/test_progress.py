"""Progress of a study, read from the folders of its runs."""

import json
import os
import re

from hloss.runs.checkpoints import write_progress, write_status
from hloss.runs.run import run
from hloss.study.progress import Progress
from tests.helpers.studies import study_of


def test_prints_each_change_once_and_ignores_old_statuses(config, capsys):
    progress = Progress(study_of(config))
    status = config.folder / "status.json"
    config.folder.mkdir(parents=True)

    def says(state, message=""):
        status.write_text(json.dumps({"state": state, "iteration": 1, "message": message, "retry": True}))
        os.utime(status, ns=(0, status.stat().st_mtime_ns + 1))
        progress()
        progress()
        return capsys.readouterr().out.split("\n")[:-1]

    assert says("running") == [" started  method 0, seed 0"]
    assert says("running") == []
    assert says("stopped", "out of time") == [" stopped  method 0, seed 0: out of time"]
    assert Progress(study_of(config))() is None
    assert capsys.readouterr().out == ""
    run(config, lambda line: None)
    progress()
    progress()
    assert re.fullmatch(
        r"   \[1/1\]  method 0, seed 0: test Recall@1 [\d.]+ % \(about 0.0 min left\)\n", capsys.readouterr().out
    )


def test_a_terminal_has_one_line_per_run_at_work(config, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(study_of(config))
    config.folder.mkdir(parents=True)
    write_status(config.folder, "running", 2)
    numbers = {"iteration": 2, "iterations": 4, "loss": 0.25, "images_per_second": 1234.0, "seconds_left": 60.0}
    write_progress(config.folder, **numbers, validations=[[2, 0.5]])
    progress()
    shown = capsys.readouterr().err
    assert "method 0, seed 0: 50 % of 4 iterations, " in shown
    assert "loss 0.2500, validation 50.0 %, 1234 images/s" in shown
    run(config, lambda line: None)
    progress()
    assert progress.bars == {}
