"""`python workflow/run_notebook.py run STUDY RUN_ID | report STUDY`: execute one notebook of a study by papermill."""

import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import nbformat
import papermill
from nbconvert import HTMLExporter
from traitlets.config import Config

from hloss.experiment import read_result, write_whole
from hloss.studies import Study, load_study

DOWNLOADED = ("mathjax_url", "require_js_url", "jquery_url", "jupyter_widgets_base_url", "mermaid_js_url")


def main() -> None:
    """Execute a run or a report; exits with 1 and the last lines of the log if the notebook fails."""
    stop_with_parent()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # papermill saves the notebook on KeyboardInterrupt
    kind, study = sys.argv[1], load_study(sys.argv[2])
    if kind == "run":
        execute_run(study, sys.argv[3])
    else:
        execute_report(study)


def stop_with_parent() -> None:
    """End this process, and its kernel with it, when the engine that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def execute_run(study: Study, run_id: str) -> None:
    """One run: the training notebook with the run's settings, kept as run.ipynb in the run's folder."""
    run = next(r for r in study.runs if r.config.run_id == run_id)
    folder = run.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'started':>8}  {run.name}", flush=True)
    started = time.monotonic()
    execute("20_train", folder / "run.ipynb", run.config.model_dump(), folder / "run.log")
    result = read_result(folder)
    if result is None:
        fail(f"{run.name}: the notebook ended without a result, see {folder / 'run.log'}")
    seconds = time.monotonic() - started
    results = [(r.config.folder / "result.json").exists() for r in study.runs]
    done, total = sum(results), len(results)
    left = (total - done) * seconds / int(os.environ.get("HLOSS_CORES", "1")) / 60
    print(
        f"{f'[{done}/{total}]':>8}  {run.name}: test Recall@1 {100 * result['metrics']['recall@1']:.1f} % "
        f"({seconds:.0f} s, about {left:.1f} min left)",
        flush=True,
    )


def execute_report(study: Study) -> None:
    """The report: its notebook on the study's results, as one HTML file that loads nothing from elsewhere."""
    folder = Path("reports") / study.name
    print(f"{'report':>8}  {folder / 'report.html'}", flush=True)
    parameters = {"results_file": str(folder / "results.parquet"), "summary_file": str(folder / "summary.csv.part")}
    execute("90_report", folder / "90_report.ipynb", parameters, folder / "report.log")
    exporter = HTMLExporter(config=Config({"HTMLExporter": dict.fromkeys(DOWNLOADED, "")}))
    exporter.exclude_input = exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    html, _ = exporter.from_notebook_node(nbformat.read(folder / "90_report.ipynb", as_version=4))
    # What is left would still be loaded from elsewhere: script tags without a source, and the diagrams' module.
    html = re.sub(r"<script(?: [^>]*)?>(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>", "", html, flags=re.S)
    html = html.replace('<script src=""></script>', "")
    html = html.replace("<title>90_report</title>", f"<title>{study.title}</title>")
    write_whole(folder / "report.html", lambda part: part.write_text(html))
    (folder / "summary.csv.part").replace(folder / "summary.csv")


def fail(message: str) -> NoReturn:
    """Say why and exit with 1."""
    print(f"{'failed':>8}  {message}", flush=True)
    sys.exit(1)


def execute(notebook: str, out: Path, parameters: dict, log: Path) -> None:
    """Execute a notebook from the project's root; on failure print the end of its log and exit."""
    part = out.with_name(f".{out.name}")
    logging.basicConfig(filename=log, filemode="w", level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())  # the kernel's own messages belong to the log, too
    try:
        papermill.execute_notebook(
            f"notebooks/{notebook}.ipynb",
            part,
            parameters,
            cwd=".",
            progress_bar=False,
            log_output=True,
            autosave_cell_every=10,
        )
    except KeyboardInterrupt:
        fail(f"{out} was interrupted; its checkpoint is kept")
    except Exception as error:
        if part.exists():
            shutil.copy(part, out)
        last = str(error).strip().splitlines()[-1:] or [repr(error)]
        fail(f"{out} failed: {last[0]} (see {log})")
    part.replace(out)


if __name__ == "__main__":
    main()
