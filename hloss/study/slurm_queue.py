"""Jobs of a study in Slurm's queue; a start that was killed leaves its jobs there."""

import hashlib
import math
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path

ATTEMPTS, PATIENCE_SECONDS = 5, 10
WARNING_SECONDS = 600  # interval of warnings that the queue cannot be read
COMMENT = "rule_run_wildcards_"  # prefix of STUDY_RUNID in the comment of a job


class SlurmError(RuntimeError):
    """The queue cannot be read, so a run could be submitted twice."""


def job_prefix(study: str) -> str:
    """The prefix of the names of a study's jobs.

    Args:
        study: name of the study.
    """
    return f"{_clone()}-{study[:25]}"


def _clone() -> str:
    """The prefix of the jobs of all studies of this clone; another clone has another prefix."""
    return f"hloss-{hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:8]}"


def jobs_in_queue() -> dict[str, str]:
    """Pending and running jobs of this clone.

    Returns:
        Job number -> "STUDY_RUNID".

    Raises:
        SlurmError: if squeue fails `ATTEMPTS` times.
    """
    jobs = (line.partition("|") for line in _queue().splitlines())  # names and comments of other jobs may contain "|"
    own = ((number, rest.partition("|")) for number, _, rest in jobs if rest.startswith(f"{_clone()}-"))
    return {number: comment.removeprefix(COMMENT) for number, (_, _, comment) in own}


def _queue() -> str:
    """The output of squeue, one line per job; squeue is called up to ATTEMPTS times."""
    command = ["squeue", "--me", "--noheader", "--format=%i|%j|%k"]
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            if not attempts_left or isinstance(error, FileNotFoundError):
                raise SlurmError(f"the queue cannot be read; squeue says: {reason}") from None
        time.sleep(PATIENCE_SECONDS)
    raise AssertionError("unreachable")


def wait_for_jobs(jobs: Collection[str], meanwhile: Callable[[], object]) -> None:
    """Wait until none of these jobs is in the queue; continue to wait while the queue cannot be read.

    Args:
        jobs: job numbers.
        meanwhile: called every second.
    """
    warned = -math.inf
    while True:
        try:
            if not set(jobs) & jobs_in_queue().keys():
                return
        except SlurmError as error:
            if time.monotonic() - warned >= WARNING_SECONDS:
                print(f"{'waiting':>8}  {error}", flush=True)
                warned = time.monotonic()
        for _ in range(PATIENCE_SECONDS):
            meanwhile()
            time.sleep(1)
