"""What of a study is already in Slurm's queue: a start that was killed leaves its jobs there."""

import hashlib
import math
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path

import yaml

ATTEMPTS, PATIENCE_SECONDS = 5, 10
TELL_SECONDS = 600  # between two lines that say that the queue still cannot be read
COMMENT = "rule_run_wildcards_"  # before STUDY_RUNID in a job's comment


class SlurmError(RuntimeError):
    """The queue cannot be read; without it a run might be submitted twice."""


def is_slurm(profile: Path) -> bool:
    """Whether the profile hands runs to Slurm."""
    return (yaml.safe_load((profile / "config.yaml").read_text()) or {}).get("executor") == "slurm"


def job_prefix(study: str) -> str:
    """What the names of a study's jobs begin with."""
    return f"{_clone()}-{study[:25]}"


def _clone() -> str:
    """Another clone's jobs are not ours, those of any study of this clone are: studies share runs."""
    return f"hloss-{hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:8]}"


def jobs_in_queue() -> dict[str, str]:
    """Slurm's job number -> STUDY_RUNID, of this clone's jobs that wait or run."""
    jobs = (line.partition("|") for line in _queue().splitlines())  # others' names and comments may hold any more
    ours = ((number, rest.partition("|")) for number, _, rest in jobs if rest.startswith(f"{_clone()}-"))
    return {number: comment.removeprefix(COMMENT) for number, (_, _, comment) in ours}


def _queue() -> str:
    """One line per job; a busy controller is asked more than once."""
    command = ["squeue", "--me", "--noheader", "--format=%i|%j|%k"]
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            if not attempts_left or isinstance(error, FileNotFoundError):
                raise SlurmError(f"it is not known which runs are in the queue, squeue says: {reason}") from None
        time.sleep(PATIENCE_SECONDS)
    raise AssertionError("unreachable")


def wait_for_jobs(jobs: Collection[str], meanwhile: Callable[[], object]) -> None:
    """Return when none of these jobs is in the queue. While it cannot be read they may be: the wait goes on."""
    told = -math.inf
    while True:
        try:
            if not set(jobs) & jobs_in_queue().keys():
                return
        except SlurmError as error:
            if time.monotonic() - told >= TELL_SECONDS:
                print(f"{'waiting':>8}  {error}", flush=True)
                told = time.monotonic()
        for _ in range(PATIENCE_SECONDS):
            meanwhile()
            time.sleep(1)
