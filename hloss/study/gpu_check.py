"""Check a machine with GPUs: tests marked `cuda`, short runs, benchmarks of the losses, throughput of training."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import psutil
import torch

from hloss.runs.config import parse_config
from hloss.runs.files import read_result
from hloss.study.devices import SLOTS
from hloss.study.processes import prepare
from hloss.study.throughput import MEASURED as THROUGHPUT

NO_CUDA = 3
TESTS_SECONDS, SHARING_SECONDS, BENCHMARK_SECONDS = 150, 45, 40  # limits of the first three parts
MOST_SECONDS = 295  # of all parts; the fourth, training speed, has what the others leave
START_SECONDS = 20  # that training speed takes before its first case and for a case begun at its last moment
STOP_SECONDS = 5  # to stop a part
QUIET_CHECKS = 10  # number of checks, 0.1 seconds apart, without a running command after which none will start
SPEED_FILE = Path("throughput.csv")
NCCL = "tests/losses/test_nccl.py"


@dataclass(frozen=True)
class Check:
    """A row of the table of checks.

    Attributes:
        name: name of the check.
        outcome: "passed", "failed", "skipped" or "not finished".
        seconds: duration.
        remark: reason or result, in one line.
    """

    name: str
    outcome: str
    seconds: float
    remark: str = ""


def check_gpus() -> int:
    """Check the GPUs of this machine and print a table of the checks.

    Returns:
        Exit status: 0 if all checks passed, 1 if not, `NO_CUDA` if torch finds no CUDA device.
    """
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"
        print(f"check-gpu: torch finds no CUDA device ({built}); nothing was checked", flush=True)
        return NO_CUDA
    began = time.monotonic()
    gpus = torch.cuda.device_count()
    for number in range(gpus):
        memory = torch.cuda.get_device_properties(number).total_memory / 2**30
        print(f"GPU {number}: {torch.cuda.get_device_name(number)}, {memory:.0f} GiB", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = [partial(marked_tests, "cuda", folder, TESTS_SECONDS, file) for file in files_with_mark("cuda")]
        trains = [partial(smoke_run, "cuda", devices, folder, TESTS_SECONDS) for devices in sorted({1, gpus})]
        nccl = partial(marked_tests, "cuda", folder, SHARING_SECONDS, NCCL)  # later than the others: it can hang
        several = partial(small_runs, "cuda", min(SLOTS, os.cpu_count() or 1), folder, SHARING_SECONDS)
        checks = [*at_once(*tests, *trains), *at_once(nccl, several)]
        checks.append(benchmarks("not memory"))  # main memory is measured on the CPU
        checks.append(throughput(MOST_SECONDS - STOP_SECONDS - (time.monotonic() - began)))
    print(check_table(checks, gpus))
    return int(any(check.outcome not in ("passed", "skipped") for check in checks))


def files_with_mark(mark: str) -> list[str]:
    """The files of tests with a mark, without those of NCCL and the benchmarks.

    Args:
        mark: mark of pytest.
    """
    files = [str(file) for file in sorted(Path("tests").rglob("test_*.py")) if f"mark.{mark}" in file.read_text()]
    return [file for file in files if file != NCCL and not file.startswith("tests/benchmarks/")]


def at_once(*parts: Callable[[], list[Check]]) -> list[Check]:
    """Run checks in which no time is measured, all at the same time.

    Args:
        *parts: functions that run a check and return its rows.

    Returns:
        The rows in the order of the parts.
    """
    with ThreadPoolExecutor(len(parts)) as pool:
        try:
            found = [pool.submit(part) for part in parts]
            while not all(running.done() for running in found):
                time.sleep(0.1)  # a wait without end can miss an interruption that comes just before it
            return [check for running in found for check in running.result()]
        except KeyboardInterrupt:
            end = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True})  # waits for running parts
            end.start()
            quiet = 0  # The pool does not know a thread whose start was interrupted, so wait until no command runs.
            while end.is_alive() or quiet < QUIET_CHECKS:
                commands = psutil.Process().children(recursive=True)
                _kill(commands)
                quiet = 0 if commands else quiet + 1
                time.sleep(0.1)
            raise


def marked_tests(mark: str, folder: Path, most_seconds: float, *which: str) -> list[Check]:
    """Run the tests with a mark.

    Args:
        mark: mark of pytest.
        folder: folder for the report of pytest.
        most_seconds: time limit.
        *which: paths and options of pytest, a path first.

    Returns:
        One row per test, and one for pytest if it does not finish or finds no test.
    """
    report = folder / f"tests-{which[0].replace('/', '-')}.xml"
    command = [sys.executable, "-m", "pytest", "-q", *which, "-m", mark, "--ignore=tests/benchmarks"]
    outcome, seconds, output = run_command([*command, f"--junitxml={report}"], most_seconds)
    checks = [check_from_case(case) for case in ElementTree.parse(report).iter("testcase")] if report.exists() else []
    if outcome == "not finished" or not checks:
        name = f"tests marked {mark} in {which[0]}"
        checks.append(Check(name, "failed" if outcome == "passed" else outcome, seconds, output[-1] if output else ""))
    return checks


def check_from_case(case: ElementTree.Element) -> Check:
    """The row of a test case.

    Args:
        case: element of pytest's JUnit report.
    """
    name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}"
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(tag)) is not None:
            remark = (found.get("message") or "").strip().partition("\n")[0]
            return Check(name, outcome, float(case.get("time", 0)), remark)
    return Check(name, "passed", float(case.get("time", 0)))


def smoke_run(device: str, devices: int, folder: Path, most_seconds: float) -> list[Check]:
    """Train with default settings from the command line.

    Args:
        device: "cuda" or "cpu".
        devices: number of devices.
        folder: folder for the config and the run.
        most_seconds: time limit.

    Returns:
        One row.
    """
    settings = {"device": device, "devices": devices, "runs_dir": str(folder / f"runs-{devices}")}
    file = folder / f"config-{devices}.json"
    file.write_text(json.dumps(settings))
    name = f"smoke run on {devices} {'GPU' if devices == 1 else 'GPUs'}"
    outcome, seconds, output = run_command([sys.executable, "-m", "hloss.runs", str(file)], most_seconds)
    result = read_result(parse_config(settings).folder)
    if outcome != "passed" or result is None:
        return [Check(name, "failed" if outcome == "passed" else outcome, seconds, output[-1] if output else "")]
    return [Check(name, "passed", seconds, f"test Recall@1 {100 * result['metrics']['recall@1']:.1f} %")]


def small_runs(device: str, several: int, folder: Path, most_seconds: float) -> list[Check]:
    """Train small networks at the same time on one GPU.

    Args:
        device: "cuda" or "cpu".
        several: number of runs.
        folder: folder for the configs and the runs.
        most_seconds: time limit.

    Returns:
        One row.
    """

    def start(seed: int) -> tuple[str, float, list[str]]:
        file = folder / f"config-seed-{seed}.json"
        settings = {"device": device, "seed": seed, "iterations": 20, "runs_dir": str(folder / "runs-small")}
        file.write_text(json.dumps(settings))
        return run_command([sys.executable, "-m", "hloss.runs", str(file)], most_seconds)

    with ThreadPoolExecutor(several) as pool:
        found = list(pool.map(start, range(1, several + 1)))
    failed = [(outcome, output[-1] if output else "") for outcome, _, output in found if outcome != "passed"]
    outcome, remark = failed[0] if failed else ("passed", "")
    return [Check(f"{several} small runs at once on one GPU", outcome, max(seconds for _, seconds, _ in found), remark)]


def throughput(most_seconds: float) -> Check:
    """Measure the steps per second of training and print them.

    Args:
        most_seconds: time limit; without time for all networks and precisions, the last are left out.
    """
    command = [sys.executable, "-m", "hloss.study.speed", f"{most_seconds - START_SECONDS:.0f}", str(SPEED_FILE)]
    outcome, seconds, output = run_command(command, most_seconds)
    print("\n".join(output), flush=True)
    return Check("throughput of training", outcome, seconds, f"rows for {THROUGHPUT} are in {SPEED_FILE}")


def benchmarks(which: str) -> Check:
    """Run the benchmarks of the losses and print their table.

    Args:
        which: expression for pytest's option -k.
    """
    files = [f"tests/benchmarks/test_{name}_speed.py" for name in ("histogram", "baselines")]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", which, "--benchmark-quiet"]
    outcome, seconds, output = run_command(command, BENCHMARK_SECONDS)
    print("\n".join(output), flush=True)
    return Check("benchmarks of the losses", outcome, seconds)


def run_command(command: list[str], most_seconds: float) -> tuple[str, float, list[str]]:
    """Run a command with a time limit.

    Args:
        command: program and arguments.
        most_seconds: time limit.

    Returns:
        Outcome ("passed", "failed" or "not finished"), seconds, and the printed lines.
    """
    print(f"... {' '.join(command[1:5])} (at most {most_seconds:.0f} s)", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=prepare,
    ) as process:
        try:
            output = process.communicate(timeout=most_seconds)[0]
            outcome = "failed" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            outcome, output = "not finished", stop_command(process)
        except KeyboardInterrupt:
            stop_command(process)
            raise
    return outcome, time.monotonic() - started, output.splitlines()


def stop_command(process: subprocess.Popen[str]) -> str:
    """End a command and all processes that it started, which would otherwise keep using the GPUs.

    The command gets SIGINT first, so that pytest reports the finished tests. The processes of torchrun run in other
    sessions and are killed one by one.

    Args:
        process: the command.

    Returns:
        The output of the command.
    """
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=STOP_SECONDS)[0]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    finally:
        _kill(children)
    return process.communicate()[0]


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def check_table(checks: list[Check], gpus: int) -> str:
    """Format checks as one line each, with a summary.

    Args:
        checks: the checks.
        gpus: number of GPUs that torch finds.
    """
    width = max(len(check.name) for check in checks)
    rows = [f"{c.outcome:>12}  {c.name:<{width}}  {c.seconds:6.1f} s  {c.remark}".rstrip() for c in checks]
    passed = sum(check.outcome == "passed" for check in checks)
    seen = f"on {gpus} GPUs" if gpus > 1 else "on one GPU: multi-GPU tests were skipped"
    return "\n".join(["", *rows, "", f"{passed} of {len(checks)} passed, {seen}"])
