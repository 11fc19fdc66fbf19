"""Checks of a machine with GPUs."""

import signal
import subprocess
import sys
import threading
from functools import partial
from xml.etree import ElementTree

import psutil
import pytest
import torch

from hloss.study import gpu_check
from hloss.study.gpu_check import (
    NCCL,
    NO_CUDA,
    Check,
    at_once,
    benchmarks,
    check_from_case,
    check_gpus,
    check_table,
    files_with_mark,
    marked_tests,
    run_command,
    small_runs,
    smoke_run,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_exit_status_is_3(capsys):
    assert check_gpus() == NO_CUDA == 3
    assert "no CUDA device" in capsys.readouterr().out


def test_table_counts_passed_checks():
    cases = """<testsuite><testcase classname="tests.test_x" name="test_a" time="0.5"/>
    <testcase classname="tests.test_x" name="test_b" time="1"><failure message="far off&#10;more"/></testcase>
    <testcase classname="tests.test_x" name="test_c" time="0"><skipped message="one GPU"/></testcase></testsuite>"""
    checks = [check_from_case(case) for case in ElementTree.fromstring(cases)]
    assert [(c.name, c.outcome, c.remark) for c in checks] == [
        ("test_x: test_a", "passed", ""),
        ("test_x: test_b", "failed", "far off"),
        ("test_x: test_c", "skipped", "one GPU"),
    ]
    assert check_table(checks, 2).endswith("1 of 3 passed, on 2 GPUs")
    assert check_table(checks, 1).endswith("1 of 3 passed, on one GPU: multi-GPU tests were skipped")


def test_time_limit_ends_all_processes_of_a_check(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "STOP_SECONDS", 0.5)
    last = "import time; time.sleep(60)"
    code = f"""import signal, subprocess, sys, time
for own in (False, True):
    child = subprocess.Popen([sys.executable, '-c', {last!r}], start_new_session=own)
    print(child.pid, flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print('begun', flush=True)
{last}"""
    ended, _, output = run_command([sys.executable, "-c", code], 3)
    assert (ended, output[2:]) == ("not finished", ["begun"])
    for pid in output[:2]:
        psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=5)
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_all_time_limits_together_are_below_five_minutes_and_leave_time_to_measure_speed():
    parts = ("TESTS", "SHARING", "BENCHMARK")
    latest = sum(getattr(gpu_check, f"{part}_SECONDS") + gpu_check.STOP_SECONDS for part in parts)
    left = gpu_check.MOST_SECONDS - gpu_check.STOP_SECONDS - latest
    assert left >= 2 * gpu_check.START_SECONDS
    assert gpu_check.MOST_SECONDS < 300


def test_interruption_ends_checks_that_run_at_once():
    code = """import signal, subprocess, sys
from hloss.study.gpu_check import at_once, run_command
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell can have it ignored
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
at_once(*2 * [lambda: [run_command(sleep, 300)]])"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline(), process.stdout.readline()  # both commands begin
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]


def test_interruption_while_checks_are_started_ends_them():
    code = """import sys
from concurrent.futures import ThreadPoolExecutor
from hloss.study.gpu_check import at_once, run_command

class Interrupted(ThreadPoolExecutor):
    def submit(self, part):
        super().submit(part)
        raise KeyboardInterrupt

sys.modules["hloss.study.gpu_check"].ThreadPoolExecutor = Interrupted
at_once(lambda: [run_command([sys.executable, "-c", "import time; time.sleep(300)"], 300)])"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert b"KeyboardInterrupt" in answer.stderr


@pytest.mark.slow
def test_reports_tests_that_finished_before_the_time_limit(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("import time\n\ndef test_quick(): pass\n\ndef test_hangs(): time.sleep(90)\n")
    quick, *_, last = marked_tests("not slow", tmp_path, 30, str(file))
    assert (quick.name, quick.outcome) == ("test_some: test_quick", "passed")
    assert (last.name, last.outcome) == (f"tests marked not slow in {file}", "not finished")


def test_checks_at_once_are_run_together_and_keep_their_order():
    both_run = threading.Barrier(2, timeout=10)

    def part(name):
        both_run.wait()
        return [Check(name, "passed", 0.0)]

    assert [check.name for check in at_once(lambda: part("a"), lambda: part("b"))] == ["a", "b"]


@pytest.mark.slow
def test_checks_run_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "BENCHMARK_SECONDS", 200)  # a GPU is faster
    files = files_with_mark("cuda")
    assert NCCL not in files
    tests = at_once(*(partial(marked_tests, "cuda", tmp_path, 300, file) for file in [*files, NCCL]))
    modules = {check.name.partition(":")[0] for check in tests}
    losses = {"test_baselines", "test_cuda", "test_nccl", "test_transforms"}
    assert modules == losses | {"test_cuda_retrieval", "test_run"}
    assert all(check.outcome in ("passed", "skipped") for check in tests), check_table(tests, 0)
    for check in smoke_run("cpu", 1, tmp_path, 200) + small_runs("cpu", 2, tmp_path, 200):
        assert check.outcome == "passed", check.remark
    assert benchmarks("product and (64 or 128)").outcome == "passed"
    printed = capsys.readouterr().out
    assert "| N = 64 | HistogramLoss |" in printed
    assert "| N = 128 | quadruplet |" in printed
