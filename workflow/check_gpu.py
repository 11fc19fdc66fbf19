"""`make check-gpu`: the first thing to run on a machine with GPUs. Under five minutes; prints what passed.

The tests marked `cuda`, a short run on one GPU and on all, the benchmarks on the GPU. Exit status 0: all passed, 1: not
all, 3: there is no CUDA here and nothing was checked.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from hloss.experiment import parse_config, read_result

NO_CUDA = 3
TESTS_SECONDS, RUN_SECONDS, BENCHMARK_SECONDS = 120, 40, 90


@dataclass(frozen=True)
class Check:
    """One row of the table; outcome is passed, failed, skipped or not finished."""

    name: str
    outcome: str
    seconds: float
    remark: str = ""


def main() -> None:
    """Check the GPUs of this machine."""
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"
        print(f"check-gpu: torch finds no CUDA device here ({built}); nothing was checked", flush=True)
        sys.exit(NO_CUDA)
    gpus = torch.cuda.device_count()
    for number in range(gpus):
        memory = torch.cuda.get_device_properties(number).total_memory / 2**30
        print(f"GPU {number}: {torch.cuda.get_device_name(number)}, {memory:.0f} GiB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checks = marked_tests("cuda", Path(folder))
        for devices in sorted({1, gpus}):
            checks.append(short_run("cuda", devices, Path(folder)))
        checks.append(benchmarks(Path(folder)))
    print(table(checks))
    sys.exit(any(check.outcome not in ("passed", "skipped") for check in checks))


def marked_tests(mark: str, folder: Path) -> list[Check]:
    """A row per test with this mark; one row that says so if pytest itself does not get to an end."""
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", mark, "--ignore=tests/benchmarks", "tests"]
    ended, seconds, output = called([*command, f"--junitxml={report}"], TESTS_SECONDS)
    if not report.exists():
        return [Check(f"tests marked {mark}", ended, seconds, output[-1] if output else "")]
    return [check_of(case) for case in ElementTree.parse(report).iter("testcase")] or [
        Check(f"tests marked {mark}", "failed", seconds, "there are none")
    ]


def check_of(case: ElementTree.Element) -> Check:
    """The row of a test case of pytest's report."""
    name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}"
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(tag)) is not None:
            remark = (found.get("message") or "").strip().partition("\n")[0]
            return Check(name, outcome, float(case.get("time", 0)), remark)
    return Check(name, "passed", float(case.get("time", 0)))


def short_run(device: str, devices: int, folder: Path) -> Check:
    """The smoke run by the plain command."""
    settings = {"device": device, "devices": devices, "runs_dir": str(folder / f"runs-{devices}")}
    file = folder / f"config-{devices}.json"
    file.write_text(json.dumps(settings))
    name = f"smoke run on {devices} {'GPU' if devices == 1 else 'GPUs'}"
    ended, seconds, output = called([sys.executable, "-m", "hloss.training", str(file)], RUN_SECONDS)
    result = read_result(parse_config(settings).folder)
    if ended != "passed" or result is None:
        return Check(name, "failed" if ended == "passed" else ended, seconds, output[-1] if output else "")
    return Check(name, "passed", seconds, f"test Recall@1 {100 * result['metrics']['recall@1']:.1f} %")


def benchmarks(folder: Path) -> Check:
    """The benchmark table of the losses, printed as it is."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/benchmarks"]
    ended, seconds, output = called(command, BENCHMARK_SECONDS)
    print("\n".join(output), flush=True)
    return Check("benchmarks", ended, seconds)


def called(command: list[str], most_seconds: float) -> tuple[str, float, list[str]]:
    """How a command ended (passed, failed, not finished), after how long, and the lines it printed."""
    print(f"... {' '.join(command[1:5])} (at most {most_seconds} s)", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    try:
        answer = subprocess.run(
            command, env=environment, text=True, timeout=most_seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired as error:
        printed = error.output.decode() if isinstance(error.output, bytes) else error.output or ""
        return "not finished", time.monotonic() - started, printed.splitlines()
    ended = "passed" if answer.returncode == 0 else "failed"
    return ended, time.monotonic() - started, answer.stdout.splitlines()


def table(checks: list[Check]) -> str:
    """The pass table, and one line that sums it up."""
    width = max(len(check.name) for check in checks)
    rows = [f"{c.outcome:>12}  {c.name:<{width}}  {c.seconds:6.1f} s  {c.remark}".rstrip() for c in checks]
    passed = sum(check.outcome == "passed" for check in checks)
    return "\n".join(["", *rows, "", f"{passed} of {len(checks)} passed"])


if __name__ == "__main__":
    main()
