"""`python workflow/scripts/run_study.py STUDY [--profile P] [--cores N] [--keep]`: run what is not complete.

Everything that can be refused is refused here, before any training. One study runs at a time in a clone.
"""

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd
import papermill
import torch

from hloss.losses.histogram import histogram_loss
from hloss.runs.config import RunConfig
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import ConfigError, DatasetError, LockedError
from hloss.runs.files import atomic_write, file_lock
from hloss.study.devices import visible_devices
from hloss.study.processes import call, end_with_parent
from hloss.study.progress import Progress
from hloss.study.results import collect, stale_runs
from hloss.study.slurm import SlurmError, is_slurm, job_prefix, jobs_in_queue, wait_for_jobs
from hloss.study.spec import LOSS_COMPARISONS, Study, load_study
from hloss.study.statistics import shown_interval

PROFILES = Path("workflow/profiles")


def main() -> None:
    """Run, collect or check a study from the command line."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/run_study.py", description=__doc__)
    parser.add_argument("study", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("--profile", default="local", help="name of a folder in workflow/profiles")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="CPU threads at once, on this machine")
    parser.add_argument("--keep", action="store_true", help="keep runs that other code made, and say so in the report")
    parser.add_argument("--collect", action="store_true", help="only write reports/STUDY/results.parquet")
    options = parser.parse_args()
    if "MAKELEVEL" in os.environ:
        end_with_parent()
    try:
        study = load_study(options.study)
        if options.collect:
            write_results(study, options.keep)
        else:
            run(study, options.profile, options.cores, options.keep)
    except (ConfigError, DatasetError, LockedError, SlurmError) as error:
        sys.exit(f"study {options.study}: {error}")


def run(study: Study, profile: str, cores: int, keep: bool) -> None:
    """Hand the study to Snakemake and print the headline_table table."""
    check_notebook()
    slurm = is_slurm(checked_profile(profile))
    with project_lock():
        queue = jobs_in_queue() if slurm else None  # nobody else submits from here while the clone is held
        study = set_aside_stale(study, keep)
        while study.waiting:
            print(f"{len(study.waiting)} more runs wait for settings that these choose", flush=True)
            complete("runs", study, profile, cores, keep, queue)
            study = set_aside_stale(load_study(study.name), keep)
        complete("all", study, profile, cores, keep, queue)
    print_headline(study)


def complete(target: str, study: Study, profile: str, cores: int, keep: bool, queue: dict[str, str] | None) -> None:
    """Let Snakemake make a rule's target; exits if a run fails for good. queue: Slurm's at the start, if it is used."""
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", "workflow/Snakefile", "--quiet", "all"]
    command += ["--profile", str(PROFILES / profile), "--rerun-triggers", "mtime", "--ignore-incomplete"]
    command += ["--keep-incomplete"]  # of ours nothing is: all is written whole, then renamed
    command += ["--nolock", "--config", f"study={study.name}", *(["keep=1"] if keep else [])]  # last: gpus follows
    progress = Progress(study)
    progress.print_start()
    if queue is not None:
        status = run_on_slurm(study, command, progress, queue)
    else:
        gpus = checked_gpus(study)
        status = call([*command, f"gpus={gpus}", "--cores", str(cores), "--resources", f"gpu={gpus}"], progress)
    if status:
        sys.exit(
            f"study {study.name} is not complete; run the same command again to redo only what is missing "
            f"(each run's run.log says what happened, .snakemake/log what the engine did)"
        )


def checked_profile(name: str) -> Path:
    """The profile's folder; ConfigError if there is none."""
    there = sorted(p.parent.name for p in PROFILES.glob("*/config.yaml"))
    if name not in there:
        raise ConfigError(f"PROFILE={name} is unknown, allowed are {', '.join(there)}")
    return PROFILES / name


def checked_gpus(study: Study) -> int:
    """How many GPUs this machine has for the study; ConfigError if a run can never have those it needs."""
    devices = visible_devices()
    for r in study.runs:
        if r.resources.gpus > len(devices) and (devices or r.config.device == "cuda"):
            raise ConfigError(f"{r.name} needs {r.resources.gpus} GPUs, this machine offers {len(devices)}")
    return len(devices)


def project_lock(patience_seconds: float = 30.0) -> AbstractContextManager[None]:
    """Hold the lock on `runs`: one study runs at a time. One that was killed needs some seconds to end."""
    Path("runs").mkdir(exist_ok=True)
    activity = "is running a study in this folder"
    return file_lock(Path("runs/.lock"), activity, patience_seconds, lambda line: print(line, flush=True))


def run_on_slurm(study: Study, command: list[str], progress: Progress, queue: dict[str, str]) -> int:
    """Snakemake with Slurm jobs. What a killed start left in the queue is not submitted again, the rest goes on."""
    prefix = job_prefix(study.name)
    command += ["--slurm-jobname-prefix", prefix]
    print(f"jobs are named {prefix}_...; `squeue --me` shows them, runs/slurm keeps logs of failed ones", flush=True)
    ours = {f"{run.config.study}_{run.config.run_id}": run.config for run in study.runs}
    left = {number: ours[run] for number, run in queue.items() if run in ours}
    if left:
        print(f"{len(left)} jobs of an earlier start were in the queue: none is submitted again", flush=True)
        results = (f"runs/{config.study}/{config.run_id}/result.json" for config in left.values())
        call([*command, "--omit-from", *results], progress)
        wait_for_jobs(left, progress)
        for number in left:
            del queue[number]  # the next stage of a tuned study waits for others alone
    return call(command, progress)


def check_notebook() -> None:
    """The notebook's parameters must be the settings of a run: papermill only warns about one it does not know."""
    parameters = set(papermill.inspect_notebook("notebooks/20_train.ipynb"))
    if parameters != set(RunConfig.model_fields):
        raise ConfigError(
            f"notebooks/20_train.ipynb and RunConfig differ in {parameters ^ set(RunConfig.model_fields)}"
        )


def set_aside_stale(study: Study, keep: bool) -> Study:
    """Runs that other code or data made are made anew, unless they are to be kept; their result stays beside.

    Returns the study as it then is: what is set aside chooses no settings any more.
    """
    folders = {run.config.data_folder for run in study.runs}
    stale = stale_runs(study, {folder.name: open_dataset(folder).card_sha256 for folder in folders})
    if stale and keep:
        print(f"KEEP: {len(stale)} runs made by other code or data are kept; the report says so", flush=True)
    elif stale:
        print(f"{len(stale)} runs were made by other code or data and are redone (KEEP=1 keeps them)", flush=True)
        for run in stale:
            (run.config.folder / "result.json").replace(run.config.folder / "result.previous.json")
    return load_study(study.name)


def write_results(study: Study, keep: bool) -> None:
    """Write the table of all runs."""
    file = Path("reports") / study.name / "results.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table, cost = collect(study, keep), measured_cost()
    atomic_write(file.with_name("loss_cost.csv"), lambda part: cost.to_csv(part, index=False))
    atomic_write(file, lambda part: table.to_parquet(part, index=False))


def measured_cost() -> pd.DataFrame:
    """Seconds of the loss, forward and backward, by batch size: the best of three, D = 128, on this machine's CPU."""
    rows = []
    for n in (1024, 2048, 4096, 8192):
        embeddings = torch.randn(n, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            histogram_loss(embeddings, torch.arange(n) // 8).backward()
            seconds.append(time.perf_counter() - start)
        rows.append({"batch_size": n, "seconds": min(seconds)})
    return pd.DataFrame(rows)


def print_headline(study: Study) -> None:
    """The table of the report, and where the report is."""
    folder = Path("reports") / study.name
    table = pd.read_csv(folder / "summary.csv")
    table = table[table["comparison"].isin(LOSS_COMPARISONS)]
    shown = table[["dataset", "comparison", "method", "n"]].copy()
    shown["test Recall@1 (%)"] = table["recall@1"].map("{:.1f}".format)
    shown["95 % interval"] = list(map(shown_interval, table["recall@1 low"], table["recall@1 high"]))
    board = pd.read_csv(folder / "claims.csv")
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in board["verdict"].value_counts().items())
    print(f"\n{shown.to_string(index=False)}\n\nclaims of the paper: {verdicts}\n\n{folder / 'report.html'}")


if __name__ == "__main__":
    main()
