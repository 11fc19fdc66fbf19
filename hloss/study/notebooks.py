"""Notebooks of a study executed by papermill: its runs and its report."""

import base64
import contextlib
import io
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from html import escape
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
from hloss.study.devices import own_devices
from hloss.study.spec import Study, StudyRun

# Settings of HTMLExporter: scripts that a page would load from elsewhere.
SCRIPT_URLS = ("mathjax_url", "require_js_url", "jquery_url", "jupyter_widgets_base_url", "mermaid_js_url")
REFUSALS = ("ConfigError", "DatasetError")  # errors that another attempt would raise again
STOP_SECONDS = 20  # Slurm's KillWait is 30 unless the cluster says otherwise


def check_parameters() -> None:
    """Check that the parameters of 20_train are the settings of a run: papermill only warns about an unknown one.

    Raises:
        ConfigError: if they differ.
    """
    parameters = set(papermill.inspect_notebook("notebooks/20_train.ipynb"))
    if parameters != set(RunConfig.model_fields):
        raise ConfigError(
            f"notebooks/20_train.ipynb and RunConfig differ in {parameters ^ set(RunConfig.model_fields)}"
        )


def stop_on_signals() -> None:
    """On SIGTERM or SIGINT, let the kernel finish its iteration, save and end; interrupt it after STOP_SECONDS."""
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
    """Execute a run: the training notebook with its settings, kept as run.ipynb in its folder. Exits if it fails.

    Args:
        study: with its tuning resolved.
        run_id: of a run of the study.
        attempt: from 1; a run that failed for good is not attempted again.
        own_gpus: choose and lock GPUs of this machine; otherwise Slurm names them in CUDA_VISIBLE_DEVICES.
    """
    run = next(r for r in study.runs if r.config.run_id == run_id)
    folder = run.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    status = read_status(folder) or {}
    if attempt > 1 and is_final(status):
        fail(f"{run.name} is not tried again: {status['message']}")
    if is_final(status):  # of an earlier start, which does not decide about the attempts of this one
        (folder / "status.json").unlink()
    iteration = status.get("iteration", 0)
    if not own_gpus:
        _check_given_gpus(run, iteration)

    def on_refusal(message: str) -> None:
        if not is_final(read_status(folder) or {}):  # the run has not written its status
            write_status(folder, "failed", iteration, message)

    with own_devices(run.resources.gpus) if own_gpus or not run.resources.gpus else contextlib.nullcontext():
        execute("20_train", folder / "run.ipynb", run.config.model_dump(), folder / "run.log", on_refusal)
    if read_result(folder) is None:
        fail(f"{run.name}: the notebook ended without a result, see {folder / 'run.log'}")


def _check_given_gpus(run: StudyRun, iteration: int) -> None:
    """Fail, to be attempted again on another node, if torch cannot use the GPUs that Slurm gave to a run.

    Without this check the run would train on the CPU. torch also counts GPUs that it cannot initialise.
    """
    given = run.resources.gpus
    found = torch.cuda.device_count() if given and torch.cuda.is_available() else 0
    if given > found:
        message = (
            f"{run.name} was given {given} GPUs on {platform.node()}, but torch {torch.__version__} finds {found}: "
            "look at the driver and at torch's build there, or say `gpus: 0` in the study"
        )
        write_status(run.config.folder, "failed", iteration, message, retry=True)
        fail(message)


def is_final(status: dict[str, Any]) -> bool:
    """Whether a run has failed in a way that another attempt would not change."""
    return status.get("state") == "failed" and not status["retry"]


def execute_report(study: Study) -> None:
    """Execute the report on the results of a study, and export it as report.html. Exits if it fails."""
    folder = Path("reports") / study.name
    print(f"{'report':>8}  {folder / 'report.html'}", flush=True)
    parameters = {"results_file": str(folder / "results.parquet"), "report_dir": str(folder)}
    execute("90_report", folder / "90_report.ipynb", parameters, folder / "report.log")
    notebook = nbformat.read(folder / "90_report.ipynb", as_version=4)
    page = report_page(notebook, study.title)
    atomic_write(folder / "report.html", lambda part: part.write_text(page))


def report_page(notebook: nbformat.NotebookNode, title: str) -> str:
    """The HTML of an executed report, without its code, as one file that loads nothing from elsewhere."""
    from nbconvert import HTMLExporter  # here, because a run does not need it

    exporter = HTMLExporter(config=Config({"HTMLExporter": dict.fromkeys(SCRIPT_URLS, "")}))
    exporter.exclude_input = exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    html, _ = exporter.from_notebook_node(with_indexed_figures(notebook))
    # The exporter leaves script tags without a source, and a module that loads mermaid.
    html = re.sub(r"<script(?: [^>]*)?>(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>", "", html, flags=re.S)
    html = html.replace('<script src=""></script>', "")
    return re.sub(r"<title>.*?</title>", lambda _: f"<title>{escape(title)}</title>", html, count=1, flags=re.S)


def with_indexed_figures(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its figures in 256 colours, a third of the size: a report is small enough to be mailed."""
    from PIL import Image  # here, because a run does not need it

    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if png := output.get("data", {}).get("image/png"):
            indexed = io.BytesIO()
            figure = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
            figure.quantize(256, dither=Image.Dither.NONE).save(indexed, "PNG", optimize=True)
            output["data"]["image/png"] = base64.b64encode(indexed.getvalue()).decode()
    return notebook


def fail(message: str) -> NoReturn:
    """Say why and exit with 1."""
    print(f"{'failed':>8}  {message}", flush=True)
    sys.exit(1)


@contextlib.contextmanager
def socket_files() -> Iterator[Config]:
    """Settings of a kernel that is reached by files: over TCP, two kernels that start at once can take one port."""
    # In /tmp: a socket's path has at most 107 characters, and the run's folder may be on NFS.
    with tempfile.TemporaryDirectory(prefix="hloss-", dir="/tmp") as folder:
        yield Config({"KernelManager": {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}})


def execute(
    notebook: str,
    out: Path,
    parameters: dict[str, Any],
    log: Path,
    on_refusal: Callable[[str], object] = lambda message: None,
) -> None:
    """Execute a notebook from the project's root; if it fails, print the last line of its error and exit.

    Args:
        notebook: its name in notebooks/, without .ipynb.
        out: the executed notebook.
        parameters: of papermill.
        log: the file that its output is appended to.
        on_refusal: called with the message of a ConfigError or DatasetError of the notebook.
    """
    part = out.with_name(f".{out.name}")
    logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())  # the kernel's own messages belong to the log, too
    logging.info("started: %s, GPUs %r", notebook, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    try:
        _execute(notebook, part, parameters)
    except KeyboardInterrupt:
        fail(f"{out} was interrupted; its checkpoint is kept")
    except Exception as error:
        if part.exists():
            shutil.copy(part, out)
        if isinstance(error, PapermillExecutionError) and error.ename in REFUSALS:
            on_refusal(f"{error.ename}: {error.evalue}")
        last = str(error).strip().splitlines()[-1:] or [repr(error)]
        fail(f"{out} failed: {last[0]} (see {log})")
    part.replace(out)


def _execute(notebook: str, out: Path, parameters: dict[str, Any]) -> None:
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
