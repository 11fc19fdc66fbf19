"""A copy of the project in which tests run studies, with training steps that can be slowed down."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import pandas as pd
import psutil
import yaml

ROOT = Path(__file__).parents[2]
# A run has to be met in its middle, on a fast machine as on a slow one: a step lasts STEP_SECONDS longer, in all runs
# or in those in whose starting command (run_notebook.py run STUDY RUN_ID --attempt N) the pattern SLOW_RUNS is found.
SLOW_STEPS = """
import os, re, time, psutil, torch
_zero_grad = torch.optim.Optimizer.zero_grad

def _slow_zero_grad(self, *args, **kwargs):
    started_by = " ".join(psutil.Process(os.getppid()).cmdline())
    if re.search(os.environ.get("SLOW_RUNS", ""), started_by):
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return _zero_grad(self, *args, **kwargs)

torch.optim.Optimizer.zero_grad = _slow_zero_grad
"""


class Project:
    """The copied project, its study and its start."""

    def __init__(self, folder: Path, study: dict, name: str) -> None:
        self.folder = folder
        self.study = name
        self.starts: list[subprocess.Popen] = []
        for part in ("hloss", "data_prep", "workflow", "notebooks"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("Makefile", "pyproject.toml", "reports/claims.yaml", "reports/published_values.csv"):
            (folder / part).parent.mkdir(exist_ok=True)
            shutil.copy2(ROOT / part, folder / part)
        (folder / "data").symlink_to(ROOT / "data")
        with open(folder / "hloss" / "runs" / "models.py", "a") as file:
            file.write(SLOW_STEPS)
        (folder / "workflow" / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))

    def change_profile(self, profile: str, **settings: object) -> None:
        file = self.folder / "workflow" / "profiles" / profile / "config.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings))

    def start(self, *arguments: str, target: str = "study", **environment: str) -> subprocess.Popen:
        """Start `make study` or another target; its output is appended to start.log."""
        command = ["make", target, f"STUDY={self.study}", f"BIN={Path(sys.executable).parent}", *arguments]
        ours = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "start.log", "a") as log:
            start = subprocess.Popen(
                command,
                cwd=self.folder,
                env=ours | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.starts.append(start)
        return start

    def finish(self, start: subprocess.Popen, seconds: float = 900) -> int:
        """Wait for the exit status; a start that takes longer is killed, and the test fails."""
        try:
            return start.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_tree(start)
            raise AssertionError(f"not finished after {seconds} s:\n{self.printed()}") from None

    def printed(self) -> str:
        return (self.folder / "start.log").read_text()

    def runs(self) -> dict[str, Path]:
        """Name of a run with its seed -> folder of the run."""
        code = "import json, sys; from hloss.study.spec import load_study as s"
        code += "; print(json.dumps({r.name: r.config.run_id for r in s(sys.argv[1]).runs}))"
        answer = subprocess.run(
            [sys.executable, "-c", code, self.study],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": "."},
            stdout=subprocess.PIPE,
            check=True,
        )
        ids = json.loads(answer.stdout)
        return {name: self.folder / "runs" / self.study / run_id for name, run_id in ids.items()}

    def run_folders(self) -> list[Path]:
        """The folders of the runs that have begun."""
        return [folder for folder in (self.folder / "runs" / self.study).iterdir() if folder.is_dir()]

    def results(self) -> dict[str, dict]:
        """The results of each run without times and paths."""
        deciding = ("metrics", "chosen", "validation_recall@1", "similarity_density", "panel", "fingerprint")
        files = {name: json.loads((run / "result.json").read_text()) for name, run in self.runs().items()}
        return {name: {key: result[key] for key in deciding} for name, result in files.items()}

    @property
    def reports(self) -> Path:
        return self.folder / "reports" / self.study

    def summary(self) -> pd.DataFrame:
        return pd.read_csv(self.reports / "summary.csv")

    def claims(self) -> pd.DataFrame:
        """The verdicts without that on the cost of the loss, which is measured for every report."""
        claims = pd.read_csv(self.reports / "claims.csv")
        measured = claims["claim"] == "quadratic cost"
        assert measured.sum() == 1
        return claims[~measured]


@contextmanager
def projects(folder: Path) -> Iterator[Callable[..., Project]]:
    """`new(name, study)` makes copies in a folder; at the end, processes that still run are killed."""
    made: list[Project] = []

    def new(name: str, study: dict, study_name: str = "short") -> Project:
        made.append(Project(folder / name, study, study_name))
        return made[-1]

    try:
        yield new
    finally:
        for project in made:
            for start in project.starts:
                if start.poll() is None:
                    kill_tree(start)
        gone = {str(project.folder) for project in made}
        for process in (p for name in gone for p in processes("", PYTHONPATH=name)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def kill_tree(start: subprocess.Popen) -> None:
    """Send SIGKILL to the start and to all its descendants."""
    tree = [psutil.Process(start.pid), *psutil.Process(start.pid).children(recursive=True)]
    for process in tree:
        if process.is_running():
            process.kill()
    psutil.wait_procs(tree[1:], timeout=10)
    start.wait(10)


def wait_until(
    what: str, condition: Callable[[], object], seconds: float = 300, during: subprocess.Popen | None = None
) -> None:
    """Wait until a condition is true; the start `during` must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert during is None or during.poll() is None, f"the start has ended; still not: {what}"
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.3)


def has_checkpoint(run: Path) -> bool:
    return (run / "checkpoint.pt").exists()


def starts(run: Path) -> list[str]:
    """The lines of a log that give the start time and the GPUs of a run."""
    return [line for line in (run / "run.log").read_text().splitlines() if "started: 20_train" in line]


def continued(run: Path) -> bool:
    return "continued from iteration" in (run / "run.log").read_text()


def processes(word: str, **environment: str) -> list[psutil.Process]:
    """Processes with this word in their command and these variables in their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            command = " ".join(process.info["cmdline"] or ())
            if word in command and environment.items() <= process.environ().items():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_no_gpu_for_two(runs: list[Path], gpus: set[str]) -> None:
    """Check by the logs that runs used all of these GPUs, some in parallel, and no GPU for two runs at once."""
    spans = sorted(span_of(run) for run in runs)
    assert {gpu for *_, gpu in spans} == gpus
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans)), "never two at once"
    for number, (_, end, gpu) in enumerate(spans):
        assert all(begin >= end for begin, _, other in spans[number + 1 :] if other == gpu), spans


def most_at_once(runs: list[Path]) -> int:
    """The largest number of runs at one time, by their logs."""
    spans = [span_of(run) for run in runs]
    return max(sum(begin <= start < end for begin, end, _ in spans) for start, *_ in spans)


def span_of(run: Path) -> tuple[datetime, datetime, str]:
    """Start, end and GPU of a run, from its log."""
    lines = (run / "run.log").read_text().splitlines()
    times = [datetime.fromisoformat(found[0]) for line in lines if (found := re.match(r"\d{4}-\S+ [\d:]+,\d+", line))]
    (gpu,) = re.findall(r"GPUs '(\w+)'", "\n".join(starts(run)))
    return times[0], times[-1], gpu
