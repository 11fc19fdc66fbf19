"""`make check-gpu`: the first thing to run on a machine with GPUs. Under five minutes; prints what passed.

The tests marked `cuda`, a short run on one GPU and on all, the benchmarks of the losses on the GPU. Exit status 0: all
passed, 1: not all, 3: there is no CUDA here and nothing was checked.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import psutil
import torch

from hloss.runs.config import parse_config
from hloss.runs.files import read_result
from hloss.study.processes import prepare

NO_CUDA = 3
TESTS_SECONDS, NCCL_SECONDS, RUN_SECONDS, BENCHMARK_SECONDS = 80, 50, 40, 60  # two runs
STOP_SECONDS = 5  # after each of these five; together below 300
NCCL = "tests/losses/test_nccl.py"


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
        checks = marked_tests("cuda", Path(folder), TESTS_SECONDS, "tests", f"--ignore={NCCL}")
        checks += marked_tests("cuda", Path(folder), NCCL_SECONDS, NCCL)  # where GPUs wait for each other, by itself
        for devices in sorted({1, gpus}):
            checks.append(short_run("cuda", devices, Path(folder)))
        checks.append(benchmarks("not memory"))  # that is the main memory, measured on the CPU
    print(table(checks, gpus))
    sys.exit(any(check.outcome not in ("passed", "skipped") for check in checks))


def marked_tests(mark: str, folder: Path, most_seconds: float, *which: str) -> list[Check]:
    """A row per test with this mark, and one for pytest itself if it does not get to an end."""
    report = folder / f"tests-{which[0].replace('/', '-')}.xml"
    command = [sys.executable, "-m", "pytest", "-q", *which, "-m", mark, "--ignore=tests/benchmarks"]
    ended, seconds, output = called([*command, f"--junitxml={report}"], most_seconds)
    checks = [check_of(case) for case in ElementTree.parse(report).iter("testcase")] if report.exists() else []
    if ended == "not finished" or not checks:
        name = f"tests marked {mark} in {which[0]}"
        checks.append(Check(name, "failed" if ended == "passed" else ended, seconds, output[-1] if output else ""))
    return checks


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
    ended, seconds, output = called([sys.executable, "-m", "hloss.runs", str(file)], RUN_SECONDS)
    result = read_result(parse_config(settings).folder)
    if ended != "passed" or result is None:
        return Check(name, "failed" if ended == "passed" else ended, seconds, output[-1] if output else "")
    return Check(name, "passed", seconds, f"test Recall@1 {100 * result['metrics']['recall@1']:.1f} %")


def benchmarks(which: str) -> Check:
    """The benchmark table of the losses, of the tests that pytest's -k would choose; printed as it is."""
    files = [f"tests/benchmarks/test_{name}_speed.py" for name in ("histogram", "baselines")]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", which, "--benchmark-quiet"]
    ended, seconds, output = called(command, BENCHMARK_SECONDS)
    print("\n".join(output), flush=True)
    return Check("benchmarks of the losses", ended, seconds)


def called(command: list[str], most_seconds: float) -> tuple[str, float, list[str]]:
    """How a command ended (passed, failed, not finished), after how long, and the lines it printed."""
    print(f"... {' '.join(command[1:5])} (at most {most_seconds} s)", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    own = {"start_new_session": True, "preexec_fn": prepare, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, **own) as process:
        try:
            output = process.communicate(timeout=most_seconds)[0]
            ended = "failed" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            ended, output = "not finished", stopped(process)
        except KeyboardInterrupt:
            stopped(process)
            raise
    return ended, time.monotonic() - started, output.splitlines()


def stopped(process: subprocess.Popen[str]) -> str:
    """End a command and all that it started, which would keep the GPUs; what it printed.

    It is asked first, as by Ctrl-C: pytest then still tells what it has. torchrun's processes have sessions of their
    own, and are ended one by one.
    """
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=STOP_SECONDS)[0]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    return process.communicate()[0]


def table(checks: list[Check], gpus: int) -> str:
    """The pass table, and one line that sums it up; gpus: how many torch sees."""
    width = max(len(check.name) for check in checks)
    rows = [f"{c.outcome:>12}  {c.name:<{width}}  {c.seconds:6.1f} s  {c.remark}".rstrip() for c in checks]
    passed = sum(check.outcome == "passed" for check in checks)
    seen = f"on {gpus} GPUs" if gpus > 1 else "on one GPU: nothing between GPUs was checked"
    return "\n".join(["", *rows, "", f"{passed} of {len(checks)} passed, {seen}"])


if __name__ == "__main__":
    main()
