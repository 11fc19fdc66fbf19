"""Studies on this machine: killed at any time and started again, interrupted, repeated, with locked GPUs."""

import os
import shutil
import signal

import nbformat
import psutil
import pytest

from tests.helpers.copied_project import (
    ROOT,
    assert_no_gpu_for_two,
    continued,
    has_checkpoint,
    most_at_once,
    processes,
    projects,
    starts,
    wait_until,
)
from tests.helpers.linux import LINUX_ONLY

pytestmark = pytest.mark.slow

QUICK = {"dataset": "glyphs", "batch_size": 128, "validate_every": 10, "iterations": 40, "checkpoint_seconds": 2.0}


def one_run(**settings):
    """A study of one run with these settings."""
    return {
        "title": "one run",
        "fixed": QUICK | settings,
        "seeds": [0],
        "resources": {"gpus": 0},
        "runs": [{"name": "histogram", "set": {"loss": "histogram"}}],
    }


@pytest.fixture
def new_project(tmp_path):
    with projects(tmp_path) as new:
        yield new


def left_behind(project):
    """Processes of a project's starts that still run; the process of the tests has another PYTHONPATH."""
    return processes("", PYTHONPATH=str(project.folder))


def test_killed_study_continues_with_the_missing_runs(new_project):
    study = {
        "title": "a short study",
        "fixed": QUICK,
        "seeds": [0],
        "resources": {"gpus": 0},
        "runs": [
            {"name": "untrained network", "set": {"loss": "none", "iterations": 0}},
            {"name": "histogram", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 200]}},
        ],
    }
    project = new_project("someone's own project", study)  # a path with a blank and a quote
    untrained, *trained = project.runs().values()
    first = project.start("CORES=3", STEP_SECONDS="1")
    wait_until("two runs in the middle", lambda: all(has_checkpoint(run) for run in trained), during=first)
    wait_until("one run complete", (untrained / "result.json").exists, during=first)

    log = str(trained[0] / "run.log")
    forked = processes("hloss.study.starter", PYTHONPATH=str(project.folder))
    writers = [process for process in forked if os.readlink(f"/proc/{process.pid}/fd/2") == log]
    (kernel,) = (process for process in writers if process.ppid() in {writer.pid for writer in writers})
    kernel.kill()
    wait_until("the run whose kernel was killed starts again", lambda: len(starts(trained[0])) == 2, during=first)
    assert len(starts(trained[1])) == 1
    engine = processes("workflow/scripts/run_study.py short", PYTHONPATH=str(project.folder))
    for process in [psutil.Process(first.pid), *engine]:
        if process.is_running():
            process.kill()
    first.wait(10)
    wait_until("nothing of the killed start runs", lambda: not left_behind(project), 60)
    assert not any((run / "result.json").exists() for run in trained)

    assert project.finish(project.start("CORES=2")) == 0, project.printed()
    assert all(continued(run) for run in trained)
    assert [len(starts(run)) for run in (untrained, *trained)] == [1, 3, 2]

    report = project.folder / "reports" / "short" / "report.html"
    made = report.stat().st_mtime_ns
    assert project.finish(project.start("CORES=2"), 120) == 0, project.printed()
    assert [len(starts(run)) for run in (untrained, *trained)] == [1, 3, 2]
    assert report.stat().st_mtime_ns == made

    shutil.rmtree(trained[1])
    assert project.finish(project.start("CORES=2")) == 0, project.printed()
    assert [len(starts(run)) for run in (untrained, *trained)] == [1, 3, 1]
    assert report.stat().st_mtime_ns > made


def test_failure_after_the_result_does_not_repeat_training(new_project):
    project = new_project("project", one_run(iterations=10))
    (run,) = project.runs().values()
    file = project.folder / "notebooks" / "20_train.ipynb"
    notebook = nbformat.read(file, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('no picture today')"))
    nbformat.write(notebook, file)
    assert project.finish(project.start()) != 0
    assert "no picture today" in project.printed()
    assert len(starts(run)) == 3
    assert (run / "run.log").read_text().count("test Recall@1") == 1  # the other attempts read the result
    assert (run / "result.json").exists()

    shutil.copy(ROOT / "notebooks" / "20_train.ipynb", file)
    assert project.finish(project.start()) == 0, project.printed()
    assert (run / "run.log").read_text().count("test Recall@1") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupted_start_leaves_checkpoints_and_no_process(number, new_project):
    project = new_project("project", one_run())
    start = project.start(STEP_SECONDS="1")
    (run,) = project.runs().values()
    wait_until("a checkpoint", lambda: has_checkpoint(run), during=start)
    if number == signal.SIGINT:
        os.killpg(start.pid, number)  # as Ctrl-C in a terminal does
    else:
        start.send_signal(number)
    assert project.finish(start, 60) != 0
    wait_until("nothing of the start runs", lambda: not left_behind(project), 10)
    assert has_checkpoint(run)
    assert not (run / "result.json").exists()
    assert len(starts(run)) == 1


WITHOUT_LINUX = f"""
import os
for name in {LINUX_ONLY}:
    if hasattr(os, name):
        delattr(os, name)
"""


def test_folder_with_a_blank_and_a_quote_without_a_home_and_without_functions_of_linux(new_project):
    project = new_project("my project's", one_run(iterations=10))
    (project.folder / "sitecustomize.py").write_text(WITHOUT_LINUX)
    # A folder in a file cannot be made, not even by root.
    unknown_user = {"HOME": "/dev/null/home", "LOGNAME": "", "USER": "", "XDG_CACHE_HOME": ""}
    assert project.finish(project.start(**unknown_user)) == 0, project.printed()
    (run,) = project.runs().values()
    assert (run / "result.json").exists()
    assert (project.reports / "report.html").exists()
    assert (project.folder / ".home" / ".cache").is_dir()


def test_each_run_has_its_own_gpu(new_project, tmp_path):
    study = {
        "title": "four runs on two GPUs",
        "fixed": QUICK,
        "seeds": [0, 1],
        "resources": {"gpus": 1, "runs_per_gpu": 1},
        "runs": [{"name": "histogram", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 200]}}],
    }
    project = new_project("project", study)
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": str(tmp_path)}  # no such devices, so torch uses the CPU
    assert project.finish(project.start("CORES=4", **environment)) == 0, project.printed()
    assert_no_gpu_for_two(project.run_folders(), {"0", "1"})


def test_two_runs_share_a_gpu(new_project, tmp_path):
    study = {
        "title": "three runs on one GPU",
        "fixed": QUICK,
        "seeds": [0, 1, 2],
        "resources": {"gpus": 1, "runs_per_gpu": 2},
        "runs": [{"name": "histogram", "set": {"loss": "histogram"}}],
    }
    project = new_project("project", study)
    environment = {"CUDA_VISIBLE_DEVICES": "0", "TMPDIR": str(tmp_path)}  # no such device, so torch uses the CPU
    assert project.finish(project.start("CORES=4", **environment)) == 0, project.printed()
    assert most_at_once(project.run_folders()) == 2
