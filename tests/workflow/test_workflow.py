"""What starts runs: GPUs held one by one, Slurm's queue read before anything is submitted, plans from measurements."""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from xml.etree import ElementTree

import check_gpu
import nbformat
import plan_study
import psutil
import pytest
import run_notebook
import torch

from hloss.runs.checkpoints import read_status, write_status
from hloss.runs.config import parse_config
from hloss.runs.run import run as carry_out
from hloss.study import devices, processes, slurm
from hloss.study.devices import own_devices, visible_devices
from hloss.study.progress import Progress
from hloss.study.spec import Resources, Study, StudyRun


def study_of(*configs, **resources):
    runs = [
        StudyRun(c, Resources(**{"gpus": 0, **resources}), {"losses": f"method {n}"}, c.dataset)
        for n, c in enumerate(configs)
    ]
    return Study("some", "a title", (), tuple(runs))


@pytest.fixture
def config(tiny_data, tmp_path):
    settings = {"dataset": "tiny", "batch_size": 24, "images_per_class": 4, "iterations": 4, "validate_every": 2}
    return parse_config({**settings, "data_dir": str(tiny_data), "runs_dir": str(tmp_path / "runs"), "device": "cpu"})


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "visible_devices", lambda: ["0", "1"])
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))


def test_the_gpus_of_a_study_are_those_it_was_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_devices() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices() == [str(n) for n in range(torch.cuda.device_count())]


def test_each_run_sees_gpus_of_its_own(monkeypatch, two_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with own_devices(1) as first, own_devices(1) as second:
        assert (first, second) == (["0"], ["1"])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    with own_devices(0) as none:
        assert none == []
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_run_on_two_gpus_waits_for_both_and_keeps_neither_meanwhile(two_gpus):
    got = threading.Event()

    def wait_for_two():
        with own_devices(2) as both:
            assert both == ["0", "1"]
            got.set()

    with own_devices(1):
        waiting = threading.Thread(target=wait_for_two)
        waiting.start()
        assert not got.wait(0.2)
        held = own_devices(1)
        with held as other:  # the one that waits lets go of it between two looks
            assert other == ["1"]
    waiting.join(10)
    assert got.is_set()


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
        monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 0)

    return stand_in


def test_the_queue_tells_which_runs_an_earlier_start_left(squeue, monkeypatch, tmp_path):
    quick, paper = slurm.job_prefix("quick"), slurm.job_prefix("paper")
    with monkeypatch.context() as context:
        context.chdir(tmp_path)
        foreign = slurm.job_prefix("quick")
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
    assert slurm.jobs_in_queue() == {"17": "quick_0123456789ab", "19": "cub_0123456789ab"}


def test_a_start_waits_for_its_own_jobs_alone(squeue, monkeypatch):
    prefix = slurm.job_prefix("quick")
    squeue([f"{n}|{prefix}_2b1c-77|rule_run_wildcards_quick_{n}" for n in (1, 2)])
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    asked = []

    def meanwhile():
        asked.append("looked")
        squeue([f"2|{prefix}_2b1c-77|rule_run_wildcards_quick_2"])

    slurm.wait_for_jobs(["1"], meanwhile)
    assert asked == ["looked"]


def test_a_start_that_waits_outlasts_a_queue_that_cannot_be_read(squeue, monkeypatch, capsys):
    squeue([], failures=3 * slurm.ATTEMPTS)
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    looks = []
    slurm.wait_for_jobs(["1"], lambda: looks.append(1))
    assert len(looks) == 3
    assert capsys.readouterr().out.count("squeue says: timed out") == 1


def test_a_queue_that_cannot_be_read_stops_the_start(squeue, monkeypatch, tmp_path):
    squeue([], failures=slurm.ATTEMPTS)
    with pytest.raises(slurm.SlurmError, match="squeue says: timed out"):
        slurm.jobs_in_queue()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    with pytest.raises(slurm.SlurmError, match="squeue"):
        slurm.jobs_in_queue()


def test_job_names_tell_studies_and_clones_apart(monkeypatch, tmp_path):
    names = {slurm.job_prefix("quick"), slurm.job_prefix("paper")}
    monkeypatch.chdir(tmp_path)
    names |= {slurm.job_prefix("quick"), slurm.job_prefix("x" * 100)}
    assert len(names) == 4
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,50}", name) for name in names)  # what the Slurm plugin accepts


@pytest.fixture
def attempt(config, monkeypatch, tmp_path, capsys):
    """`attempt(number, code)`: what an attempt at a run prints whose notebook is this code; it fails."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)

    def carry_out_attempt(number, code):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(notebook, "notebooks/20_train.ipynb")
        # stderr is pointed to the run's log
        with open("stderr", "w") as file, contextlib.redirect_stderr(file), pytest.raises(SystemExit, match="1"):
            run_notebook.execute_run(study_of(config), config.run_id, number, own_gpus=True)
        return capsys.readouterr().out

    return carry_out_attempt


def test_a_refused_run_is_not_tried_again(attempt, config):
    refusal = "class DatasetError(ValueError): pass\nraise DatasetError('tiny is not prepared')"
    assert "DatasetError: tiny is not prepared" in attempt(1, refusal)
    assert read_status(config.folder)["message"] == "DatasetError: tiny is not prepared"
    assert "is not tried again: DatasetError: tiny is not prepared" in attempt(2, refusal)


def test_a_kernel_is_reached_by_files_and_not_by_ports_that_another_may_take(attempt):
    told = "import ipykernel, json; raise ValueError(json.loads(ipykernel.get_connection_info())['transport'])"
    assert "ValueError: ipc" in attempt(1, told)


def test_what_an_earlier_start_left_does_not_decide_about_the_attempts_of_this_one(attempt, config):
    write_status(config.folder, "failed", 3, "RunError: the loss is not finite")
    error = "raise OSError('the file system is away')"
    assert "the file system is away" in attempt(1, error)
    assert "the file system is away" in attempt(2, error)


def test_a_run_that_failed_for_good_in_this_start_is_not_tried_again(attempt, config):
    failed = json.dumps({"state": "failed", "iteration": 3, "message": "RunError: not finite", "retry": False})
    code = f"open({str(config.folder / 'status.json')!r}, 'w').write({failed!r})\nraise RuntimeError('not finite')"
    attempt(1, code)
    assert "is not tried again: RunError: not finite" in attempt(2, code)


def test_a_command_is_watched_to_its_end():
    looks = []
    assert processes.call([sys.executable, "-c", "raise SystemExit(7)"], lambda: looks.append(1)) == 7
    assert looks


def test_a_command_is_asked_to_stop_as_by_a_terminal(capfd):
    code = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('asked')"
    printed = ""

    def stop():
        nonlocal printed
        new = capfd.readouterr().out
        printed += new
        if "begun" in new:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="the same command continues"):
        processes.call([sys.executable, "-c", code], stop)
    assert "asked" in printed + capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("usable", "counted"), [(False, 0), (False, 2), (True, 1)])
def test_a_run_that_was_given_gpus_that_torch_cannot_use_is_not_left_to_a_cpu(
    usable, counted, config, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
    monkeypatch.setattr(run_notebook, "execute", lambda *given: pytest.fail("it began"))
    with pytest.raises(SystemExit):
        run_notebook.execute_run(study_of(config, gpus=2), config.run_id, 1, own_gpus=False)
    assert "but torch" in capsys.readouterr().out
    status = read_status(config.folder)  # another attempt may find another node
    assert (status["state"], status["retry"]) == ("failed", True)
    assert "but torch" in status["message"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    began = []
    monkeypatch.setattr(run_notebook, "execute", lambda *given: began.append(given[0]))
    with pytest.raises(SystemExit):  # there is no result
        run_notebook.execute_run(study_of(config, gpus=2), config.run_id, 1, own_gpus=False)
    assert began == ["20_train"]


def test_progress_tells_a_change_once_and_old_news_never(config, capsys):
    progress = Progress(study_of(config))
    status = config.folder / "status.json"
    config.folder.mkdir(parents=True)

    def says(state, message=""):
        status.write_text(json.dumps({"state": state, "iteration": 1, "message": message, "retry": True}))
        os.utime(status, ns=(0, status.stat().st_mtime_ns + 1))
        progress()
        progress()
        return capsys.readouterr().out.split("\n")[:-1]

    assert says("running") == [" started  method 0, seed 0"]
    assert says("running") == []
    assert says("stopped", "out of time") == [" stopped  method 0, seed 0: out of time"]
    assert Progress(study_of(config))() is None
    assert capsys.readouterr().out == ""
    carry_out(config, lambda line: None)
    progress()
    progress()
    assert re.fullmatch(
        r"   \[1/1\]  method 0, seed 0: test Recall@1 [\d.]+ % \(about 0.0 min left\)\n", capsys.readouterr().out
    )


def test_a_plan_tells_what_is_done_measured_and_not_measured(config, tmp_path):
    longer = parse_config({**config.model_dump(), "iterations": 3_600_000})
    twice = parse_config({**config.model_dump(), "iterations": 1_800_000, "refit": True})
    other = parse_config({**longer.model_dump(), "batch_size": 25})
    result = carry_out(config, lambda line: None)
    result["training_seconds"] = 4 * 0.5
    (config.folder / "result.json").write_text(json.dumps(result))
    costs = plan_study.measured(tmp_path / "runs")
    text = plan_study.plan(study_of(config, longer, other, twice, hours=400.0), 0, costs)
    assert re.search(r"method 0, seed 0 +done", text)
    assert re.search(r"method 1, seed 0 +to do +500\.00 .*1 runs here \(hours=400 is short\)", text)
    assert re.search(r"method 2, seed 0 +to do +400\.00 +8\.0 +not measured on cpu: what the study asks for\n", text)
    assert re.search(r"method 3, seed 0 +to do +500\.00 ", text)
    assert "1 of 4 runs are done. Of the other 3, 2 are measured: 1000.00 h" in text
    assert "1 runs not measured on cpu: what the study asks for, at most 400.00 h of training" in text


@pytest.mark.parametrize(("gpus", "measured"), [(0, 185), (1, 0), (None, 0)])
def test_the_plan_of_the_paper_tells_hours_and_memory_of_every_run(gpus, measured, monkeypatch, tmp_path):
    study, costs = plan_study.load_study("paper"), plan_study.table_of(plan_study.MEASURED)
    monkeypatch.chdir(tmp_path)  # where nothing is done
    text = plan_study.plan(study, gpus, costs)
    told = re.findall(r", seed \d +to do +\d+\.\d\d +\d+\.\d ", text)
    assert len(told) == len(study.runs) == 191
    assert f"0 of 191 runs are done. Of the other 191, {measured} are measured: " in text
    assert f"{191 - measured} runs not measured on " in text


def test_a_plan_names_hours_that_are_asked_for_with_a_gpu_where_there_is_none(config):
    text = plan_study.plan(study_of(config, gpus=1, hours=7.0), 0, {})
    assert "1 runs not measured on cpu: what the study asks for on a GPU, at most 7.00 h" in text


def test_a_run_without_training_has_the_memory_and_disk_of_one_that_trains(config):
    untrained = parse_config({**config.model_dump(), "loss": "none", "iterations": 0})
    trained = plan_study.kind_of(study_of(config).runs[0], 0)
    text = plan_study.plan(study_of(untrained), 0, {trained: plan_study.Cost(3600.0, 2048.0, 512.0, "somebody")})
    assert re.search(r"to do +0\.00 +2\.0 +0\.500 +somebody", text)


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_plan_holds_only_main_memory_against_the_memory_asked_for(config, gpus):
    study = study_of(config, gpus=gpus)
    cost = plan_study.Cost(0.1, 1000 * 1024.0, 1.0, "somebody")
    text = plan_study.plan(study, gpus, {plan_study.kind_of(study.runs[0], gpus): cost})
    assert ("1000.0 of the GPU" in text) == bool(gpus)
    assert ("memory_gb=8 is little" in text) == (not gpus)


def test_a_plan_counts_what_is_left_of_a_run(config, tmp_path):
    config.folder.mkdir(parents=True)
    (config.folder / "status.json").write_text(json.dumps({"state": "stopped", "iteration": 3}))
    assert plan_study.state_of(study_of(config).runs[0], stale=False) == ("at iteration 3", 1)


def test_a_plan_counts_what_other_code_or_data_made_as_to_redo(config, monkeypatch):
    carry_out(config, lambda line: None)
    assert "1 of 1 runs are done" in plan_study.plan(study_of(config), 0, {})
    monkeypatch.setattr("hloss.runs.provenance.code_sha256", lambda: "other")
    text = plan_study.plan(study_of(config), 0, {})
    assert re.search(r"method 0, seed 0 +to redo +4\.00 ", text)
    assert "0 of 1 runs are done" in text
    assert "Other code or data made 1 results" in text


def test_the_table_of_measurements_is_of_the_quick_studys_runs():
    costs = plan_study.table_of(plan_study.MEASURED)
    quick = plan_study.load_study("quick").runs[0]
    assert costs[plan_study.kind_of(quick, 0)].seconds < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_check_without_cuda_says_so_and_exits_with_a_status_of_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        check_gpu.main()
    assert end.value.code == check_gpu.NO_CUDA == 3
    assert "no CUDA device here" in capsys.readouterr().out


def test_the_table_of_checks_counts_what_passed():
    cases = """<testsuite><testcase classname="tests.test_x" name="test_a" time="0.5"/>
    <testcase classname="tests.test_x" name="test_b" time="1"><failure message="far off&#10;more"/></testcase>
    <testcase classname="tests.test_x" name="test_c" time="0"><skipped message="one GPU"/></testcase></testsuite>"""
    checks = [check_gpu.check_of(case) for case in ElementTree.fromstring(cases)]
    assert [(c.name, c.outcome, c.remark) for c in checks] == [
        ("test_x: test_a", "passed", ""),
        ("test_x: test_b", "failed", "far off"),
        ("test_x: test_c", "skipped", "one GPU"),
    ]
    assert check_gpu.table(checks, 2).endswith("1 of 3 passed, on 2 GPUs")
    assert check_gpu.table(checks, 1).endswith("1 of 3 passed, on one GPU: nothing between GPUs was checked")


def test_a_check_that_takes_too_long_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(check_gpu, "STOP_SECONDS", 0.5)
    last = "import time; time.sleep(60)"
    code = f"""import signal, subprocess, sys, time
for own in (False, True):
    child = subprocess.Popen([sys.executable, '-c', {last!r}], start_new_session=own)
    print(child.pid, flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print('begun', flush=True)
{last}"""
    ended, _, output = check_gpu.called([sys.executable, "-c", code], 3)
    assert (ended, output[2:]) == ("not finished", ["begun"])
    for pid in output[:2]:
        psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=5)
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_what_was_tested_before_a_check_took_too_long_is_told(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("import time\n\ndef test_quick(): pass\n\ndef test_hangs(): time.sleep(90)\n")
    quick, *_, last = check_gpu.marked_tests("not slow", tmp_path, 30, str(file))
    assert (quick.name, quick.outcome) == ("test_some: test_quick", "passed")
    assert (last.name, last.outcome) == (f"tests marked not slow in {file}", "not finished")


@pytest.mark.slow
def test_the_checks_run_to_their_end_on_a_cpu(tmp_path, capsys):
    tests = check_gpu.marked_tests("cuda", tmp_path, 300, "tests", f"--ignore={check_gpu.NCCL}")
    tests += check_gpu.marked_tests("cuda", tmp_path, 300, check_gpu.NCCL)
    assert {check.name.partition(":")[0] for check in tests} == {"test_cuda", "test_nccl"}
    assert all(check.outcome in ("passed", "skipped") for check in tests), check_gpu.table(tests, 0)
    run = check_gpu.short_run("cpu", 1, tmp_path)
    assert run.outcome == "passed", run.remark
    assert check_gpu.benchmarks("product and (64 or 128)").outcome == "passed"
    printed = capsys.readouterr().out
    assert "| N = 64 | HistogramLoss |" in printed
    assert "| N = 128 | quadruplet |" in printed
