"""Studies as jobs of a real Slurm of one node: the same report as on this machine, whatever happens to the jobs."""

import os
import signal
import subprocess

import pytest
from copied_project import (
    assert_no_gpu_for_two,
    continued,
    has_checkpoint,
    kill_tree,
    processes,
    projects,
    starts,
    wait_until,
)
from one_node_slurm import one_node_slurm, why_not
from pandas.testing import assert_frame_equal

pytestmark = pytest.mark.slow

QUICK = {"dataset": "glyphs", "batch_size": 128, "validate_every": 10, "iterations": 60, "checkpoint_seconds": 2.0}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The variables that reach the daemons."""
    reason = why_not()
    if reason is None:
        pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install -e '.[slurm]'")
    else:
        pytest.skip(f"no Slurm here: {reason}")
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def called(slurm, *command):
    """What a program of Slurm prints; a hanging or failing one fails the test."""
    environment = os.environ | slurm
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout


@pytest.fixture
def new_project(jobs, tmp_path):
    """`new_project(name, study)`; its starts end before its jobs do, or they would submit them again."""
    with projects(tmp_path) as new:
        yield new


@pytest.fixture
def jobs(slurm):
    """`jobs()`: job number -> (run_id, state, minutes, MiB) of every job of this test, in order."""

    def query(format):
        printed = called(slurm, "squeue", "--states=all", "--noheader", f"--format={format}")
        return [line.split("|") for line in printed.splitlines()]

    earlier = {number for (number,) in query("%i")}

    def ours():
        rows = sorted((row for row in query("%i|%k|%T|%l|%m") if row[0] not in earlier), key=lambda row: int(row[0]))
        return {number: (comment.rsplit("_", 1)[-1], *rest) for number, comment, *rest in rows}

    yield ours
    left = [number for number, (_, state, *_) in ours().items() if state in ("PENDING", "RUNNING")]
    if left:
        called(slurm, "scancel", *left)


def test_cancelled_killed_and_overdue_jobs_are_retried_to_the_report_of_this_machine(slurm, jobs, new_project):
    study = {
        "title": "the quick study, shortened",
        "fixed": QUICK,
        "seeds": [0],
        "resources": {"gpus": 0, "memory_gb": 4, "hours": 0.2},
        "runs": [
            {"name": "histogram", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 200]}},
            {"name": "binomial", "set": {"loss": "binomial", "iterations": 240}},
            {"name": "untrained network", "set": {"loss": "none", "iterations": 0}},
            {"name": "raw pixels", "set": {"loss": "none", "iterations": 0, "network": "pixels"}},
        ],
    }
    here = new_project("here", study)
    assert here.finish(here.start()) == 0, here.printed()

    there = new_project("there", study)
    there.change_profile("slurm", **{"slurm-init-seconds-before-status-checks": 5, "default-resources": []})
    start = there.start("PROFILE=slurm", **slurm, STEP_SECONDS="0.6")
    runs = there.runs()
    cancelled, killed, overdue = (runs[name] for name in ("histogram, n_bins 50", "histogram, n_bins 200", "binomial"))

    def first_job(run):
        return next(number for number, (run_id, *_) in jobs().items() if run_id == run.name)

    def cancel():
        called(slurm, "scancel", first_job(cancelled))

    def kill():
        for kernel in processes("ipykernel_launcher", SLURM_JOB_ID=first_job(killed)):
            kernel.kill()

    def let_time_run_out():
        called(slurm, "scontrol", "update", f"JobId={first_job(overdue)}", "TimeLimit=1")

    ends_of_first_attempts = {cancelled: cancel, killed: kill, overdue: let_time_run_out}
    while ends_of_first_attempts:
        wait_until("the next in mid-run", lambda: any(map(has_checkpoint, ends_of_first_attempts)), during=start)
        for run in filter(has_checkpoint, list(ends_of_first_attempts)):
            ends_of_first_attempts.pop(run)()
    assert there.finish(start, 900) == 0, there.printed()

    ends = {run.name: [(state, time, memory) for run_id, state, time, memory in jobs().values() if run_id == run.name]
            for run in runs.values()}  # fmt: skip
    assert [state for state, *_ in ends[cancelled.name]] == ["CANCELLED", "COMPLETED"]
    assert [state for state, *_ in ends[killed.name]] == ["FAILED", "COMPLETED"]
    assert [state for state, *_ in ends[overdue.name]] == ["TIMEOUT", "COMPLETED"]
    assert [(time, memory) for _, time, memory in ends[killed.name]] == [("12:00", "4G"), ("24:00", "8G")]
    assert [len(ends[runs[name].name]) for name in ("untrained network", "raw pixels")] == [1, 1]
    assert all(continued(run) for run in (cancelled, killed, overdue))
    assert there.results() == here.results()
    assert_frame_equal(there.summary(), here.summary())
    assert (there.folder / "reports" / "short" / "report.html").exists()


def test_a_start_that_was_killed_and_started_again_runs_nothing_twice_and_no_gpu_for_two(slurm, jobs, new_project):
    study = {
        "title": "four runs on two GPUs",
        "fixed": QUICK,
        "seeds": [0, 1],
        "resources": {"gpus": 1, "memory_gb": 4, "hours": 0.2},
        "runs": [{"name": "histogram", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 200]}}],
    }
    project = new_project("project", study)
    project.change_profile("slurm", **{"slurm-init-seconds-before-status-checks": 5, "jobs": 3})
    first = project.start("PROFILE=slurm", **slurm, STEP_SECONDS="0.4")
    wait_until(
        "two jobs run, one waits", lambda: sorted(s for _, s, *_ in jobs().values()) == ["PENDING", *["RUNNING"] * 2]
    )
    folder = project.folder / "runs" / "short"
    wait_until("two runs are at work", lambda: sum(1 for _ in folder.glob("*/run.log")) == 2)
    kill_tree(first)

    assert project.finish(project.start("PROFILE=slurm", **slurm)) == 0, project.printed()
    assert "3 jobs of an earlier start are in the queue" in project.printed()
    submitted = [run_id for run_id, *_ in jobs().values()]
    assert sorted(submitted) == sorted(run.name for run in folder.iterdir())
    assert len(submitted) == 4
    assert [len(starts(run)) for run in folder.iterdir()] == [1] * 4

    assert_no_gpu_for_two(list(folder.iterdir()), {"0", "1"})


def test_an_interrupted_start_takes_its_jobs_with_it(slurm, jobs, new_project):
    study = {
        "title": "one run",
        "fixed": QUICK,
        "seeds": [0],
        "resources": {"gpus": 0, "memory_gb": 4, "hours": 0.2},
        "runs": [{"name": "histogram", "set": {"loss": "histogram"}}],
    }
    project = new_project("project", study)
    start = project.start("PROFILE=slurm", **slurm, STEP_SECONDS="2")
    wait_until("the job runs", lambda: [state for _, state, *_ in jobs().values()] == ["RUNNING"])
    os.killpg(start.pid, signal.SIGINT)
    assert project.finish(start, 120) != 0
    wait_until("the job is cancelled", lambda: [state for _, state, *_ in jobs().values()] == ["CANCELLED"], 60)
