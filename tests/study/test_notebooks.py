"""Notebooks executed with papermill: attempts, refusals and GPUs."""

import contextlib
import json
import logging
import os

import nbformat
import pytest
import torch

from hloss.runs.checkpoints import read_status, write_status
from hloss.runs.errors import ConfigError
from hloss.study import devices, jupyter_kernels, notebooks, report_page
from hloss.study.notebooks import execute_report, execute_run
from tests.helpers.studies import study_of


@pytest.fixture
def attempt(config, monkeypatch, tmp_path, capsys):
    """`attempt(number, code)`: output of a failing attempt at a run whose notebook has this code."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)

    def carry_out_attempt(number, code):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(notebook, "notebooks/20_train.ipynb")
        # stderr is pointed to the run's log
        with open("stderr", "w") as file, contextlib.redirect_stderr(file), pytest.raises(SystemExit, match="1"):
            execute_run(study_of(config), config.run_id, number, own_gpus=True)
        return capsys.readouterr().out

    return carry_out_attempt


def test_refused_run_is_not_attempted_again(attempt, config):
    refusal = "class DatasetError(ValueError): pass\nraise DatasetError('tiny is not prepared')"
    assert "DatasetError: tiny is not prepared" in attempt(1, refusal)
    assert read_status(config.folder)["message"] == "DatasetError: tiny is not prepared"
    assert "is not attempted again: DatasetError: tiny is not prepared" in attempt(2, refusal)


def test_kernel_uses_socket_files(attempt):
    told = "import ipykernel, json; raise ValueError(json.loads(ipykernel.get_connection_info())['transport'])"
    assert "ValueError: ipc" in attempt(1, told)


def test_status_of_an_earlier_start_does_not_stop_attempts(attempt, config):
    write_status(config.folder, "failed", 3, "RunError: the loss is not finite")
    error = "raise OSError('the file system is away')"
    assert "the file system is away" in attempt(1, error)
    assert "the file system is away" in attempt(2, error)


def test_the_log_says_why_a_run_failed(attempt, caplog):
    attempt(1, "number = 0\n1 / number")
    assert "failed: " in caplog.text
    assert "----> 2 1 / number" in caplog.text  # the line of the traceback
    assert "ZeroDivisionError: division by zero" in caplog.text
    assert "\x1b" not in caplog.text


def test_permanent_failure_in_this_start_is_not_attempted_again(attempt, config):
    failed = json.dumps({"state": "failed", "iteration": 3, "message": "RunError: not finite", "retry": False})
    code = f"open({str(config.folder / 'status.json')!r}, 'w').write({failed!r})\nraise RuntimeError('not finite')"
    attempt(1, code)
    assert "is not attempted again: RunError: not finite" in attempt(2, code)


@pytest.mark.parametrize(("usable", "counted"), [(False, 0), (False, 2), (True, 1)])
def test_fails_early_if_torch_cannot_use_the_assigned_gpus(usable, counted, config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
    monkeypatch.setattr(notebooks, "execute", lambda *given: pytest.fail("it began"))
    with pytest.raises(SystemExit):
        execute_run(study_of(config, gpus=2), config.run_id, 1, own_gpus=False)
    assert "can use too few GPUs" in capsys.readouterr().out
    status = read_status(config.folder)  # another attempt may find another node
    assert (status["state"], status["retry"]) == ("failed", True)
    assert "can use too few GPUs" in status["message"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    began = []
    monkeypatch.setattr(notebooks, "execute", lambda *given: began.append(given[0]))
    with pytest.raises(SystemExit):  # there is no result
        execute_run(study_of(config, gpus=2), config.run_id, 1, own_gpus=False)
    assert began == ["20_train"]


def test_kernel_inherits_what_is_imported(attempt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    told = "import os, sys, torch\nraise ValueError(('hloss.runs.run' in sys.modules, os.getppid()))"
    assert f"ValueError: (True, {os.getpid()})" in attempt(1, told)


def test_kernel_of_a_process_that_used_cuda_starts_anew(attempt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    told = "import os, sys\nraise ValueError(('hloss.runs.run' in sys.modules, os.getppid()))"
    assert f"ValueError: (False, {os.getpid()})" in attempt(1, told)


def test_a_failed_export_of_the_report_says_why(config, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    study = study_of(config)
    folder = tmp_path / "reports" / study.name
    folder.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(), folder / "90_report.ipynb")
    monkeypatch.setattr(notebooks, "execute", lambda *arguments: None)

    def no_template(notebook, title):
        raise ValueError("No template sub-directory with name 'lab' found")

    monkeypatch.setattr(report_page, "report_page", no_template)
    with pytest.raises(ConfigError, match="reports/some has no results; run `make study STUDY=some` first"):
        execute_report(study)
    (folder / "results.parquet").touch()
    with pytest.raises(SystemExit, match="1"):
        execute_report(study)
    said = '90_report.ipynb is complete, but its export to report.html failed: ValueError("No template sub-directory'
    assert said in capsys.readouterr().out
    assert not (folder / "report.html").exists()


def test_kernels_start_as_usual_where_libraries_do_not_work_after_a_fork(monkeypatch):
    def no_fork():
        raise AssertionError("forked")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("os.fork", no_fork)
    jupyter_kernels.prepare_kernel(())
    assert devices.usable_gpus() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
