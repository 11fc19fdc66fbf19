"""Tests of Slurm are skipped, with the reason, on a machine where it cannot be started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import one_node_slurm
from tests.helpers.one_node_slurm import PROGRAMS, why_not

ROOT = Path(__file__).parents[2]


@pytest.fixture
def only_these(monkeypatch, tmp_path):
    """`only_these(programs)`: this machine finds only these programs and has no configured Slurm."""

    def prepare(programs):
        (tmp_path / "bin").mkdir()
        for program in programs:
            (tmp_path / "bin" / program).touch(mode=0o755)
        monkeypatch.setattr(one_node_slurm, "search_path", lambda: str(tmp_path / "bin"))
        monkeypatch.setattr(one_node_slurm, "ETC", tmp_path)
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    return prepare


@pytest.mark.parametrize("missing", [PROGRAMS, ["munged"], ["slurmctld", "slurmd"]], ids=", ".join)
def test_names_missing_programs(missing, only_these):
    only_these(set(PROGRAMS) - set(missing))
    assert why_not() == f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"


def test_refuses_users_other_than_root_and_a_second_slurm(only_these, monkeypatch, tmp_path):
    only_these(PROGRAMS)
    assert why_not() is None
    (tmp_path / "slurm.conf").touch()
    assert why_not() == f"{tmp_path / 'slurm.conf'} configures another Slurm"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "the daemons need root"


def test_without_slurm_its_tests_are_skipped(tmp_path):
    pytest_command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    answer = subprocess.run(
        [*pytest_command, "-m", "slow", "-rs", "tests/cluster/test_slurm.py"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},  # programs in /usr/sbin are still found; sbatch is not
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    skipped = [line for line in answer.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped
    assert all("no Slurm here: " in line and "sbatch" in line for line in skipped), answer.stdout
    assert not any(word in answer.stdout.splitlines()[-1] for word in ("passed", "failed", "error")), answer.stdout
