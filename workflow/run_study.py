"""`python workflow/run_study.py STUDY [--cores N] [--keep]`: check a study, run what is not complete, print its table.

Everything that can be refused is refused here, before any training. One study runs at a time in a clone.
"""

import argparse
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import papermill

from hloss.datasets import DatasetError, open_dataset
from hloss.experiment import ConfigError, RunConfig, fingerprint, found_from_here, write_whole
from hloss.studies import Study, collect, load_study, stale_runs


def main() -> None:
    """Run, collect or check a study from the command line."""
    parser = argparse.ArgumentParser(prog="workflow/run_study.py", description=__doc__)
    parser.add_argument("study", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="runs at once (default: all cores)")
    parser.add_argument("--keep", action="store_true", help="keep runs that other code made, and say so in the report")
    parser.add_argument("--collect", action="store_true", help="only write reports/STUDY/results.parquet")
    options = parser.parse_args()
    try:
        study = load_study(options.study)
        if options.collect:
            write_results(study, options.keep)
        else:
            run(study, options.cores, options.keep)
    except (ConfigError, DatasetError) as error:
        sys.exit(f"study {options.study}: {error}")


def run(study: Study, cores: int, keep: bool) -> None:
    """Hand the study to Snakemake and print the headline table."""
    check_notebook()
    Path("runs").mkdir(exist_ok=True)
    with open("runs/.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("another study is running in this folder; wait for it or end it")
        set_stale_aside(study, keep)
        todo = [r for r in study.runs if not (r.config.folder / "result.json").exists()]
        print(f"study {study.name}: {len(study.runs) - len(todo)} of {len(study.runs)} runs are complete", flush=True)
        command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--cores", str(cores)]
        command += ["--config", f"study={study.name}", *(["keep=1"] if keep else [])]
        command += ["--rerun-triggers", "mtime", "--ignore-incomplete", "--nolock", "--keep-going", "--quiet", "all"]
        status = subprocess.run(command, env={**os.environ, "HLOSS_CORES": str(cores)}).returncode
    if status:
        sys.exit(f"study {study.name} is not complete; run the same command again to redo only what is missing")
    print_headline(study)


def check_notebook() -> None:
    """The notebook's parameters must be the settings of a run: papermill only warns about one it does not know."""
    parameters = set(papermill.inspect_notebook("notebooks/20_train.ipynb"))
    if parameters != set(RunConfig.model_fields):
        raise ConfigError(
            f"notebooks/20_train.ipynb and RunConfig differ in {parameters ^ set(RunConfig.model_fields)}"
        )


def set_stale_aside(study: Study, keep: bool) -> None:
    """Runs that other code or data made are made anew, unless they are to be kept; their result stays beside."""
    for dataset in {run.config.dataset for run in study.runs}:
        card_sha256 = open_dataset(found_from_here("data") / dataset).card_sha256
        stale = [r for r in stale_runs(study, fingerprint(card_sha256)) if r.config.dataset == dataset]
        if stale and keep:
            print(f"KEEP: {len(stale)} runs made by other code or data are kept; the report says so", flush=True)
        elif stale:
            print(f"{len(stale)} runs were made by other code or data and are redone (KEEP=1 keeps them)", flush=True)
            for r in stale:
                (r.config.folder / "result.json").replace(r.config.folder / "result.previous.json")


def write_results(study: Study, keep: bool) -> None:
    """Write the table of all runs."""
    file = Path("reports") / study.name / "results.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table = collect(study, keep)
    write_whole(file, lambda part: table.to_parquet(part, index=False))


def print_headline(study: Study) -> None:
    """The table of the report, and where the report is."""
    folder = Path("reports") / study.name
    table = pd.read_csv(folder / "summary.csv")
    shown = table[["method", "n"]].copy()
    shown["test Recall@1 (%)"] = table["recall@1"].map("{:.1f}".format)
    shown["95 % interval"] = [
        "one run" if pd.isna(low) else f"{low:.1f} to {high:.1f}"
        for low, high in zip(table["recall@1 low"], table["recall@1 high"], strict=True)
    ]
    print(f"\n{shown.to_string(index=False)}\n\n{folder / 'report.html'}")


if __name__ == "__main__":
    main()
