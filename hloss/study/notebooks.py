"""Execute the notebooks of a study with papermill: its runs and its report."""

import contextlib
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import nbformat
import papermill
import psutil
import torch
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from hloss.runs.checkpoints import read_status, write_status
from hloss.runs.config import RunConfig
from hloss.runs.errors import ConfigError
from hloss.runs.files import atomic_write, read_result
from hloss.study.devices import own_devices, usable_gpus
from hloss.study.jupyter_kernels import NOTEBOOK_IMPORTS, prepare_kernel
from hloss.study.parts import parts_of
from hloss.study.spec import Study, StudyRun

REFUSALS = ("ConfigError", "DatasetError")  # another attempt would raise these errors again
STOP_SECONDS = 20  # Slurm's KillWait is 30 unless the cluster says otherwise


def check_training_notebook() -> None:
    """Check that the parameters of notebooks/20_train.ipynb are the settings of a run.

    papermill only warns about an unknown parameter.

    Raises:
        ConfigError: if they differ.
    """
    parameters = set(papermill.inspect_notebook("notebooks/20_train.ipynb"))
    if parameters != set(RunConfig.model_fields):
        raise ConfigError(
            "the parameters of notebooks/20_train.ipynb must be the fields of RunConfig: got differences in "
            f"{', '.join(sorted(parameters ^ set(RunConfig.model_fields)))}"
        )


def stop_on_signals() -> None:
    """On SIGTERM or SIGINT, let the kernel finish its iteration, save and exit; interrupt it after STOP_SECONDS."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # papermill saves the notebook on KeyboardInterrupt


def _stop(signum: int, frame: object) -> None:
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    signal.alarm(STOP_SECONDS if children else 1)


def execute_run(study: Study, run_id: str, attempt: int, own_gpus: bool) -> None:
    """Execute the training notebook with the settings of a run, and save it as run.ipynb in the run's folder.

    Args:
        study: with its tuning resolved.
        run_id: id of a run of the study.
        attempt: number of the attempt, from 1; a run that failed permanently is not attempted again.
        own_gpus: choose and lock GPUs of this machine; otherwise Slurm names them in CUDA_VISIBLE_DEVICES.

    Raises:
        ConfigError: if the study has no such run.
        SystemExit: if the run fails.
    """
    run = next((r for r in study.runs if r.config.run_id == run_id), None)
    if run is None:
        raise ConfigError(
            f"the study has no run with the id {run_id!r}: got {len(study.runs)} other runs; the id changes with the "
            f"settings, and runs/{study.name}/index.html lists them"
        )
    folder = run.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    status = read_status(folder) or {}
    runs_per_gpu = 1 if run.needs_own_gpu() else run.resources.runs_per_gpu
    if attempt > 1 and is_final(status):
        fail(f"{run.name} is not attempted again: {status['message']}")
    if is_final(status):  # an earlier start wrote it; this start attempts the run again
        (folder / "status.json").unlink()
    iteration = status.get("iteration", 0)
    if not own_gpus:
        _check_given_gpus(run, iteration)

    def on_refusal(message: str) -> None:
        if not is_final(read_status(folder) or {}):  # the run has not written its status
            write_status(folder, "failed", iteration, message)

    gpus, locks = run.resources.gpus, own_gpus or not run.resources.gpus
    with own_devices(gpus, runs_per_gpu) if locks else contextlib.nullcontext():
        execute("20_train", folder / "run.ipynb", run.config.model_dump(), folder / "run.log", on_refusal)
    if read_result(folder) is None:
        fail(f"{run.name}: the notebook ended without a result; the log is {folder / 'run.log'}")


def _check_given_gpus(run: StudyRun, iteration: int) -> None:
    """Fail if torch cannot use the GPUs that Slurm gave to a run; another attempt may get another node.

    Without this check the run would train on the CPU, because torch also counts GPUs that it cannot initialise.
    """
    given = run.resources.gpus
    found = usable_gpus() if given else 0
    if given > found:
        message = (
            f"{run.name}: torch {torch.__version__} can use too few GPUs on {platform.node()}: got {found}, Slurm "
            f"assigned {given}; check the driver and the build of torch on that node, or set `gpus: 0` in the study"
        )
        write_status(run.config.folder, "failed", iteration, message, retry=True)
        fail(message)


def is_final(status: dict[str, Any]) -> bool:
    """Whether a run has failed in a way that another attempt would repeat.

    Args:
        status: content of the run's status.json; {} without one.
    """
    return status.get("state") == "failed" and not status["retry"]


def execute_report(study: Study) -> None:
    """Execute the report notebook on the results of a study, and export it as reports/STUDY/report.html.

    Args:
        study: the study.

    Raises:
        ConfigError: if it has no results.
        SystemExit: if the notebook or its export fails.
    """
    folder = Path("reports") / study.name
    if not (folder / "results.parquet").exists() and not parts_of(folder / "results.parquet"):
        raise ConfigError(f"{folder} has no results; run `make study STUDY={study.name}` first")
    print(f"{'report':>8}  {folder / 'report.html'}", flush=True)
    parameters = {"results_file": str(folder / "results.parquet"), "report_dir": str(folder)}
    execute("90_report", folder / "90_report.ipynb", parameters, folder / "report.log")
    file = folder / "90_report.ipynb"
    try:
        from hloss.study.report_page import report_page  # imported here because runs do not need it

        page = report_page(nbformat.read(file, as_version=4), study.title)
    except Exception as error:  # a reader of other libraries raises many types
        logging.exception("export of %s", file)
        fail(f"{file} is complete, but its export to report.html failed: {error!r}; the log is {folder / 'report.log'}")
    atomic_write(folder / "report.html", lambda part: part.write_text(page))


def fail(message: str) -> NoReturn:
    """Print why and exit with status 1."""
    print(f"{'failed':>8}  {message}", flush=True)
    sys.exit(1)


@contextlib.contextmanager
def socket_files() -> Iterator[Config]:
    """Settings of a kernel that uses socket files and is killed after the last cell, which has saved everything.

    Over TCP, two kernels that start together can choose one port.

    Yields:
        The settings; the files are deleted at the end.
    """
    # The files are in /tmp because a socket's path has at most 107 characters, and the run's folder may be on NFS.
    with tempfile.TemporaryDirectory(prefix="hloss-", dir="/tmp") as folder:
        manager = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        yield Config({"KernelManager": manager, "NotebookClient": {"shutdown_kernel": "immediate"}})


def execute(
    notebook: str,
    out: Path,
    parameters: dict[str, Any],
    log: Path,
    on_refusal: Callable[[str], object] = lambda message: None,
) -> None:
    """Execute a notebook in the project's root; if it fails, print the last line of its error.

    Args:
        notebook: name in notebooks/, without .ipynb.
        out: file of the executed notebook.
        parameters: values of the parameters cell.
        log: file to which the output is appended.
        on_refusal: called with the message if the notebook raises a ConfigError or DatasetError.

    Raises:
        SystemExit: if the notebook fails or is interrupted.
    """
    part = out.with_name(f".{out.name}")
    logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())  # the log also gets the kernel's messages
    logging.info("started: %s, GPUs %r", notebook, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    try:
        _execute(notebook, part, parameters)
    except KeyboardInterrupt:
        fail(f"{out} was interrupted; the checkpoint is kept")
    except Exception as error:
        if part.exists():
            shutil.copy(part, out)
        if isinstance(error, PapermillExecutionError) and error.ename in REFUSALS:
            on_refusal(f"{error.ename}: {error.evalue}")
        reason = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or repr(error)  # without the colors of a traceback
        logging.error("failed: %s", reason)
        fail(f"{out} failed: {reason.splitlines()[-1]}; the log is {log}")
    part.replace(out)


def _execute(notebook: str, out: Path, parameters: dict[str, Any]) -> None:
    prepare_kernel(NOTEBOOK_IMPORTS)
    with socket_files() as config:
        papermill.execute_notebook(
            f"notebooks/{notebook}.ipynb",
            out,
            parameters,
            cwd=".",
            progress_bar=False,
            log_output=True,
            autosave_cell_every=10,
            config=config,
        )
