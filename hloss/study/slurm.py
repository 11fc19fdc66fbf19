"""Jobs of a study in Slurm's queue: a start that was killed leaves its jobs there."""

import hashlib
import math
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path

ATTEMPTS, PATIENCE_SECONDS = 5, 10
WARNING_SECONDS = 600  # between two warnings that the queue cannot be read
COMMENT = "rule_run_wildcards_"  # prefix of STUDY_RUNID in the comment of a job


class SlurmError(RuntimeError):
    """The queue cannot be read; without it a run might be submitted twice."""


def job_prefix(study: str) -> str:
    """The prefix of the names of a study's jobs."""
    return f"{_clone()}-{study[:25]}"


def _clone() -> str:
    """The prefix of the jobs of this clone: the jobs of all of its studies, which share runs, and of no other clone."""
    return f"hloss-{hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:8]}"


def jobs_in_queue() -> dict[str, str]:
    """Slurm's job number -> STUDY_RUNID, of the pending and running jobs of this clone."""
    jobs = (line.partition("|") for line in _queue().splitlines())  # names and comments of other jobs may hold "|"
    own = ((number, rest.partition("|")) for number, _, rest in jobs if rest.startswith(f"{_clone()}-"))
    return {number: comment.removeprefix(COMMENT) for number, (_, _, comment) in own}


def _queue() -> str:
    """What squeue prints, a line per job. A busy controller is asked up to ATTEMPTS times."""
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
    """Return when none of these jobs is in the queue, calling `meanwhile` every second.

    A queue that cannot be read may hold them: the wait continues.
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
