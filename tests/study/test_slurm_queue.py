"""Slurm's queue, read before anything is submitted."""

import os
import re
import time

import pytest

from hloss.study import slurm_queue


@pytest.fixture
def squeue(monkeypatch, tmp_path):
    """A stand-in for the program: it prints `lines`, after `failures` failures."""

    def stand_in(lines, failures=0):
        (tmp_path / "queue").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / "left").write_text("x" * failures)
        program = tmp_path / "squeue"
        program.write_text(
            f"#!/bin/sh\ncd {tmp_path}\n"
            'if [ -s left ]; then printf %s "$(cut -c2- left)" > left; echo "timed out" >&2; exit 1; fi\ncat queue\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm_queue, "PATIENCE_SECONDS", 0)

    return stand_in


def test_the_queue_tells_which_runs_an_earlier_start_left(squeue, monkeypatch, tmp_path):
    quick, paper = slurm_queue.job_prefix("quick"), slurm_queue.job_prefix("paper")
    with monkeypatch.context() as context:
        context.chdir(tmp_path)
        foreign = slurm_queue.job_prefix("quick")
    squeue(
        [
            f"17|{quick}_2b1c-77|rule_run_wildcards_quick_0123456789ab",
            f"18|{foreign}_2b1c-77|rule_run_wildcards_quick_ffffffffffff",
            f"19|{paper}_2b1c-78|rule_run_wildcards_cub_0123456789ab",
            "20|another job|(null)",
            f"21|with|{quick}|bars|",
        ],
        failures=2,
    )
    assert slurm_queue.jobs_in_queue() == {"17": "quick_0123456789ab", "19": "cub_0123456789ab"}


def test_a_start_waits_for_its_own_jobs_alone(squeue, monkeypatch):
    prefix = slurm_queue.job_prefix("quick")
    squeue([f"{n}|{prefix}_2b1c-77|rule_run_wildcards_quick_{n}" for n in (1, 2)])
    monkeypatch.setattr(slurm_queue, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    asked = []

    def meanwhile():
        asked.append("looked")
        squeue([f"2|{prefix}_2b1c-77|rule_run_wildcards_quick_2"])

    slurm_queue.wait_for_jobs(["1"], meanwhile)
    assert asked == ["looked"]


def test_a_start_that_waits_outlasts_a_queue_that_cannot_be_read(squeue, monkeypatch, capsys):
    squeue([], failures=3 * slurm_queue.ATTEMPTS)
    monkeypatch.setattr(slurm_queue, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    looks = []
    slurm_queue.wait_for_jobs(["1"], lambda: looks.append(1))
    assert len(looks) == 3
    assert capsys.readouterr().out.count("squeue says: timed out") == 1


def test_a_queue_that_cannot_be_read_stops_the_start(squeue, monkeypatch, tmp_path):
    squeue([], failures=slurm_queue.ATTEMPTS)
    with pytest.raises(slurm_queue.SlurmError, match="squeue says: timed out"):
        slurm_queue.jobs_in_queue()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    with pytest.raises(slurm_queue.SlurmError, match="squeue"):
        slurm_queue.jobs_in_queue()


def test_job_names_tell_studies_and_clones_apart(monkeypatch, tmp_path):
    names = {slurm_queue.job_prefix("quick"), slurm_queue.job_prefix("paper")}
    monkeypatch.chdir(tmp_path)
    names |= {slurm_queue.job_prefix("quick"), slurm_queue.job_prefix("x" * 100)}
    assert len(names) == 4
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,50}", name) for name in names)  # names that the Slurm plugin accepts
