"""`run_notebook.py run STUDY RUN_ID [--attempt N] [--own-gpus] | report STUDY`: execute one notebook by papermill."""

import argparse
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
from hloss.runs.files import atomic_write, read_result
from hloss.study.devices import own_devices
from hloss.study.processes import end_with_parent
from hloss.study.spec import Study, load_study

DOWNLOADED = ("mathjax_url", "require_js_url", "jquery_url", "jupyter_widgets_base_url", "mermaid_js_url")
REFUSALS = ("ConfigError", "DatasetError")  # another attempt would meet them again
STOP_SECONDS = 20  # Slurm's KillWait is 30 unless the cluster says otherwise


def main() -> None:
    """Execute a run or a report; exits with 1 and the last lines of the log if the notebook fails."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/run_notebook.py", description=__doc__)
    parser.add_argument("kind", choices=["run", "report"])
    parser.add_argument("study")
    parser.add_argument("run_id", nargs="?")
    parser.add_argument("--attempt", type=int, default=1, help="how often the engine has started this run")
    parser.add_argument("--own-gpus", action="store_true", help="choose and hold GPUs of this machine")
    options = parser.parse_args()
    end_with_parent()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # papermill saves the notebook on KeyboardInterrupt
    study = load_study(options.study)
    if options.kind == "run":
        execute_run(study, options.run_id, options.attempt, options.own_gpus)
    else:
        execute_report(study)


def stop(signum: int, frame: object) -> None:
    """Let the kernel finish its iteration, save and end; interrupt it after STOP_SECONDS."""
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    signal.alarm(STOP_SECONDS if children else 1)


def execute_run(study: Study, run_id: str, attempt: int, own_gpus: bool) -> None:
    """One run: the training notebook with the run's settings, kept as run.ipynb in the run's folder."""
    run = next(r for r in study.runs if r.config.run_id == run_id)
    folder = run.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    status = read_status(folder) or {}
    if attempt > 1 and is_final(status):
        fail(f"{run.name} is not tried again: {status['message']}")
    if is_final(status):  # of an earlier start: it must not decide about the attempts of this one
        (folder / "status.json").unlink()

    def refused(message: str) -> None:
        if not is_final(read_status(folder) or {}):  # the run had not begun to keep its status
            write_status(folder, "failed", status.get("iteration", 0), message)

    given = 0 if own_gpus else run.resources.gpus  # by Slurm, which says so in CUDA_VISIBLE_DEVICES
    # Counted is also what a driver knows that torch cannot start.
    found = torch.cuda.device_count() if given and torch.cuda.is_available() else 0
    if given > found:  # else it would train for hours on a CPU, unnoticed
        message = (
            f"{run.name} was given {given} GPUs on {platform.node()}, but torch {torch.__version__} finds {found}: "
            "look at the driver and at torch's build there, or say `gpus: 0` in the study"
        )
        write_status(folder, "failed", status.get("iteration", 0), message, retry=True)  # elsewhere it may have them
        fail(message)
    with contextlib.nullcontext() if given else own_devices(run.resources.gpus):
        execute("20_train", folder / "run.ipynb", run.config.model_dump(), folder / "run.log", refused)
    if read_result(folder) is None:
        fail(f"{run.name}: the notebook ended without a result, see {folder / 'run.log'}")


def is_final(status: dict[str, Any]) -> bool:
    """Whether a run has failed in a way that another attempt would not change."""
    return status.get("state") == "failed" and not status["retry"]


def execute_report(study: Study) -> None:
    """The report: its notebook on the study's results, as one HTML file that loads nothing from elsewhere."""
    folder = Path("reports") / study.name
    print(f"{'report':>8}  {folder / 'report.html'}", flush=True)
    parameters = {"results_file": str(folder / "results.parquet"), "report_dir": str(folder)}
    execute("90_report", folder / "90_report.ipynb", parameters, folder / "report.log")
    from nbconvert import HTMLExporter  # here, because a run needs none of it

    exporter = HTMLExporter(config=Config({"HTMLExporter": dict.fromkeys(DOWNLOADED, "")}))
    exporter.exclude_input = exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    html, _ = exporter.from_notebook_node(with_light_figures(nbformat.read(folder / "90_report.ipynb", as_version=4)))
    # What is left would still be loaded from elsewhere: script tags without a source, and the diagrams' module.
    html = re.sub(r"<script(?: [^>]*)?>(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>", "", html, flags=re.S)
    html = html.replace('<script src=""></script>', "")
    html = re.sub(r"<title>.*?</title>", lambda _: f"<title>{escape(study.title)}</title>", html, count=1, flags=re.S)
    atomic_write(folder / "report.html", lambda part: part.write_text(html))


def with_light_figures(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its figures in 256 colours: the page is to be mailed, and they are a third as large."""
    from PIL import Image

    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if png := output.get("data", {}).get("image/png"):
            light = io.BytesIO()
            figure = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
            figure.quantize(256, dither=Image.Dither.NONE).save(light, "PNG", optimize=True)
            output["data"]["image/png"] = base64.b64encode(light.getvalue()).decode()
    return notebook


def fail(message: str) -> NoReturn:
    """Say why and exit with 1."""
    print(f"{'failed':>8}  {message}", flush=True)
    sys.exit(1)


@contextlib.contextmanager
def sockets_of_its_own() -> Iterator[Config]:
    """A kernel that is reached by files: of two that begin at once, over TCP, one can find its port taken and dies."""
    # In /tmp: a socket's path has at most 107 characters, and the run's folder may be on NFS.
    with tempfile.TemporaryDirectory(prefix="hloss-", dir="/tmp") as folder:
        yield Config({"KernelManager": {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}})


def execute(
    notebook: str, out: Path, parameters: dict, log: Path, refused: Callable[[str], object] = lambda message: None
) -> None:
    """Execute a notebook from the project's root; on failure print the end of its log and exit.

    `refused` is told what a notebook says of settings or data with which it does not begin.
    """
    part = out.with_name(f".{out.name}")
    logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())  # the kernel's own messages belong to the log, too
    logging.info("started: %s, GPUs %r", notebook, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    try:
        with sockets_of_its_own() as config:
            papermill.execute_notebook(
                f"notebooks/{notebook}.ipynb",
                part,
                parameters,
                cwd=".",
                progress_bar=False,
                log_output=True,
                autosave_cell_every=10,
                config=config,
            )
    except KeyboardInterrupt:
        fail(f"{out} was interrupted; its checkpoint is kept")
    except Exception as error:
        if part.exists():
            shutil.copy(part, out)
        if isinstance(error, PapermillExecutionError) and error.ename in REFUSALS:
            refused(f"{error.ename}: {error.evalue}")
        last = str(error).strip().splitlines()[-1:] or [repr(error)]
        fail(f"{out} failed: {last[0]} (see {log})")
    part.replace(out)


if __name__ == "__main__":
    main()
