"""Studies as jobs of a real Slurm of one node give the report of this machine, even if jobs fail."""

import os
import signal
import subprocess
import time

import pytest
import torch
import yaml
from pandas.testing import assert_frame_equal

from hloss.runs.checkpoints import read_status
from tests.helpers.copied_project import (
    ROOT,
    assert_no_gpu_for_two,
    continued,
    has_checkpoint,
    kill_tree,
    processes,
    projects,
    span_of,
    starts,
    wait_until,
)
from tests.helpers.forty_runs import check_end, check_seen, counts, forty_runs, without_figures
from tests.helpers.one_node_slurm import one_node_slurm, why_not

pytestmark = pytest.mark.slow

SHORT = {"dataset": "glyphs", "batch_size": 128, "validate_every": 10, "iterations": 60, "checkpoint_seconds": 2.0}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment variables for access to the daemons."""
    reason = why_not()
    if reason is None:
        pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install -e '.[slurm]'")
    else:
        pytest.skip(f"no Slurm here: {reason}")
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def called(slurm, *command):
    """The output of a Slurm program; the test fails if the program hangs or fails."""
    environment = os.environ | slurm
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout


@pytest.fixture
def new_project(jobs, tmp_path):
    """`new_project(name, study)`; at the end starts are killed before jobs, so that they submit none again."""
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


def quick_study():
    """The quick study with less training and frequent checkpoints, which are no part of the settings of a run."""
    study = yaml.safe_load((ROOT / "workflow/studies/quick.yaml").read_text())
    study["fixed"] |= {"iterations": 200, "checkpoint_seconds": 2.0}
    return study


def test_failed_jobs_are_retried_to_the_report_of_this_machine(slurm, jobs, new_project):
    here = new_project("here", quick_study(), "quick")
    assert here.finish(here.start()) == 0, here.printed()

    there = new_project("there", quick_study(), "quick")
    there.change_profile("slurm", **{"slurm-init-seconds-before-status-checks": 5})
    runs = there.runs()
    cancelled, killed = runs["histogram, seed 0"], runs["histogram, n_bins 50, seed 1"]
    warned, overdue = runs["binomial, C 2, seed 0"], runs["binomial, C 10, seed 1"]
    hit = {cancelled: "CANCELLED", killed: "FAILED", warned: "FAILED", overdue: "TIMEOUT"}
    slow = f"({'|'.join(run.name for run in hit)}) --attempt 1"
    start = there.start("PROFILE=slurm", **slurm, STEP_SECONDS="0.8", SLOW_RUNS=slow)
    saved_at = {}

    def first_job(run):
        return next(number for number, (run_id, *_) in jobs().items() if run_id == run.name)

    def cancel():
        called(slurm, "scancel", first_job(cancelled))

    def kill():
        for runner in processes("run_notebook.py run", SLURM_JOB_ID=first_job(killed)):
            for kernel in runner.children():
                if "run_notebook.py" in " ".join(kernel.cmdline()):  # forked from the runner
                    kernel.kill()

    def let_time_run_out():
        called(slurm, "scontrol", "update", f"JobId={first_job(overdue)}", "EndTime=now+1")

    def warn():  # Slurm sends warnings every 30 seconds, a minute before the end as set in the profile
        called(slurm, "scontrol", "update", f"JobId={first_job(warned)}", "EndTime=now+88")
        wait_until("the warned run stops", lambda: read_status(warned)["state"] == "stopped", 60, during=start)
        assert read_status(warned)["message"].startswith("stopped by SIGTERM")
        saved_at.update(status=read_status(warned)["iteration"], last=iteration_of(warned / "checkpoint.pt"))
        saved_at.update(before=iteration_of(warned / "checkpoint.previous.pt"))

    to_do = {cancelled: cancel, killed: kill, overdue: let_time_run_out, warned: warn}
    while to_do:
        wait_until("the next in mid-run", lambda: any(map(has_checkpoint, to_do)), during=start)
        for run in filter(has_checkpoint, list(to_do)):
            to_do.pop(run)()
    assert there.finish(start, 900) == 0, there.printed()

    attempts = {run: [rest for run_id, *rest in jobs().values() if run_id == run.name] for run in runs.values()}
    for run, (first, *later) in attempts.items():
        states = [first[0], *(state for state, *_ in later)]
        assert states == ([hit[run], "COMPLETED"] if run in hit else ["COMPLETED"]), f"{run}: {states}"
        assert len(starts(run)) == len(states)
        assert continued(run) == (run in hit)
    assert [limits for _, *limits in attempts[killed]] == [["30:00", "4G"], ["1:00:00", "8G"]]
    assert saved_at["before"] < saved_at["last"] == saved_at["status"]
    assert f"continued from iteration {saved_at['last']} (stage choose)" in (warned / "run.log").read_text()
    assert there.results() == here.results()
    assert_frame_equal(there.summary(), here.summary())
    assert_frame_equal(there.claims(), here.claims())
    assert (there.reports / "report.html").exists()


def iteration_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["progress"]["iteration"]


def trust_simulated_gpus(project):
    """Let runs begin although torch cannot use the simulated GPUs, which have no driver."""
    file = project.folder / "hloss" / "study" / "notebooks.py"
    counted = "usable_gpus() if given else 0"
    assert counted in file.read_text()
    file.write_text(file.read_text().replace(counted, "given"))


def test_small_runs_share_gpus_by_shards(slurm, jobs, new_project):
    study = {
        "title": "three runs on shards of two GPUs",
        "fixed": SHORT,
        "seeds": [0, 1, 2],
        "resources": {"gpus": 1, "runs_per_gpu": 2, "gpu_parts": "shard:2", "memory_gb": 4, "hours": 0.2},
        "runs": [{"name": "histogram", "set": {"loss": "histogram"}}],
    }
    project = new_project("project", study)
    project.change_profile("slurm", **{"slurm-init-seconds-before-status-checks": 5})
    trust_simulated_gpus(project)
    start = project.start("PROFILE=slurm", **slurm, STEP_SECONDS="0.2")
    wait_until(
        "three run at once", lambda: [state for _, state, *_ in jobs().values()] == ["RUNNING"] * 3, during=start
    )
    assert project.finish(start) == 0, project.printed()
    asked = called(slurm, "squeue", "--states=all", "--noheader", "--format=%b", f"--jobs={','.join(jobs())}")
    assert asked.split() == ["gres:shard:1"] * 3
    gpus = [span_of(run)[2] for run in project.run_folders()]
    assert sorted(gpus) in (["0", "0", "1"], ["0", "1", "1"])


def test_killed_start_continues_without_running_anything_twice(slurm, jobs, new_project):
    study = {
        "title": "four runs on two GPUs",
        "fixed": SHORT,
        "seeds": [0, 1],
        "resources": {"partition": "second", "gpus": 1, "memory_gb": 4, "hours": 0.2},
        "runs": [{"name": "histogram", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 200]}}],
    }
    project = new_project("project", study)
    project.change_profile("slurm", **{"slurm-init-seconds-before-status-checks": 5, "jobs": 3})
    trust_simulated_gpus(project)
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
    assert sorted(submitted) == sorted(run.name for run in project.run_folders())
    assert len(submitted) == 4
    assert [len(starts(run)) for run in project.run_folders()] == [1] * 4
    partitions = called(slurm, "squeue", "--states=all", "--noheader", "--format=%P", f"--jobs={','.join(jobs())}")
    assert partitions.split() == ["second"] * 4
    assert_no_gpu_for_two(project.run_folders(), {"0", "1"})


def test_interrupted_start_cancels_its_jobs(slurm, jobs, new_project):
    study = {
        "title": "one run",
        "fixed": SHORT,
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


def test_a_study_is_watched_from_the_login_node(slurm, new_project, tiny_data):
    project = new_project("project", forty_runs(tiny_data))
    without_figures(project)
    project.change_profile("slurm", **{"slurm-init-seconds-before-status-checks": 5})
    watch = project.start(target="watch")
    index = project.folder / "runs/short/index.html"
    wait_until("the index page", index.exists, during=watch)
    start = project.start("PROFILE=slurm", **slurm, STEP_SECONDS="0.5")
    seen = [counts(index.read_text())]
    while start.poll() is None:
        time.sleep(1)
        seen.append(counts(index.read_text()))
    index.unlink()  # `make study` has ended, so `make watch` alone writes it again
    wait_until("the page of the end", index.exists, 60, during=watch)
    check_seen([*seen, counts(index.read_text())])
    os.killpg(watch.pid, signal.SIGINT)
    project.finish(watch, 30)
    assert start.returncode != 0
    check_end(project)
