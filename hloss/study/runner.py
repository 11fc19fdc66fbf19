"""Run a study with Snakemake, on this machine or as Slurm jobs."""

import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from hloss.runs.errors import ConfigError
from hloss.runs.files import file_lock
from hloss.study.claims import conclusions
from hloss.study.devices import SLOTS, visible_devices
from hloss.study.notebooks import check_training_notebook
from hloss.study.processes import call
from hloss.study.profiles import profile_folder, uses_slurm
from hloss.study.progress import Progress
from hloss.study.results import at_length, card_hashes, refuse_mixed_settings, stale_runs
from hloss.study.slurm_queue import job_prefix, jobs_in_queue, wait_for_jobs
from hloss.study.spec import LOSS_COMPARISONS, Study, load_study
from hloss.study.starter import starter
from hloss.study.statistics import headline
from hloss.study.tuning import resolve_tuning

ENGINE_LOG = Path("runs/engine.log")  # standard error of Snakemake in the last start
LAST_LINES = 15
SLURM_PLUGIN = "snakemake_executor_plugin_slurm"


def _print(line: str) -> None:
    print(line, flush=True)


def run_study(study: Study, profile: str, cores: int, keep: bool) -> None:
    """Run the incomplete runs of a study, write its report and print the main results.

    Invalid settings and missing data are refused before any training.

    Args:
        study: with its tuning resolved.
        profile: name of a folder in workflow/profiles.
        cores: number of CPU threads to use at once on this machine.
        keep: keep stale runs instead of running them again.

    Raises:
        ConfigError: if the profile is unknown or lacks a package, a run needs more GPUs than the machine has, or
            results cannot be compared.
        DatasetError: if a dataset is not prepared.
        LockedError: if another study runs in this clone.
        SlurmError: if the queue cannot be read.
        SystemExit: if a run fails in all of its attempts.
    """
    check_training_notebook()
    refuse_mixed_settings(study)
    folder = profile_folder(profile)
    on_slurm = uses_slurm(folder)
    if on_slurm and find_spec(SLURM_PLUGIN) is None:
        raise ConfigError(
            f"PROFILE={profile} needs the package {SLURM_PLUGIN.replace('_', '-')}, which is not installed: "
            "pip install 'hloss[slurm]'"
        )
    with project_lock(), nullcontext() if on_slurm else starter():
        queue = jobs_in_queue() if on_slurm else None  # inside the lock: no other start submits jobs
        study = set_aside_stale(study, keep)
        while study.waiting:
            print(f"{len(study.waiting)} more runs wait for settings that these runs choose", flush=True)
            _complete("runs", study, folder, cores, keep, queue)
            study = set_aside_stale(resolve_tuning(study, _print), keep)
        _complete("all", study, folder, cores, keep, queue)
    print_headline(study)


def _complete(target: str, study: Study, profile: Path, cores: int, keep: bool, queue: dict[str, str] | None) -> None:
    """Run a rule with Snakemake.

    `queue` has the jobs in Slurm's queue at the start; None: the runs are executed on this machine.
    """
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", "workflow/Snakefile"]
    command += ["--quiet", "host", "progress", "reason", "rules"]
    command += ["--profile", str(profile), "--rerun-triggers", "mtime", "--ignore-incomplete"]
    command += ["--keep-incomplete"]  # every output is written atomically
    command += [
        "--nolock",
        "--config",
        f"study={study.name}",
        *(["keep=1"] if keep else []),
    ]  # gpus=N may follow
    progress = Progress(study)
    progress.print_start()
    ENGINE_LOG.unlink(missing_ok=True)
    if queue is not None:
        status = _run_on_slurm(study, command, progress, queue)
    else:
        gpus = available_gpus(study)
        command += [f"gpus={gpus}", "--cores", str(cores), "--resources", f"gpu={SLOTS * gpus}"]
        status = call(command, progress, ENGINE_LOG)
    if status:
        print_engine_errors(status, progress)
        sys.exit(
            f"study {study.name} is not complete; run the same command again to continue "
            f"(logs: run.log in the folder of each run, and {ENGINE_LOG})"
        )


def print_engine_errors(status: int, progress: Progress) -> None:
    """Print how Snakemake ended and its last lines, unless a run that failed in this start has printed its reason.

    Args:
        status: exit status of Snakemake; below 0: the number of the signal that ended it.
        progress: progress of this start.
    """
    if any(state == "failed" for _, state in progress.seen.values()):
        return
    end = f"signal {-status} ended Snakemake (9: often too little memory)" if status < 0 else "Snakemake failed"
    lines = [line for line in ENGINE_LOG.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]
    print("\n".join([f"{end}; the end of {ENGINE_LOG}:", *(lines or ["(empty)"])]), flush=True)


def available_gpus(study: Study) -> int:
    """Number of GPUs that the study may use on this machine.

    Args:
        study: the study with its known runs.

    Raises:
        ConfigError: if a run needs more GPUs.
    """
    count = len(visible_devices())
    for run in study.runs:
        if run.resources.gpus > count and (count or run.config.device == "cuda"):
            raise ConfigError(
                f"{run.name} needs {run.resources.gpus} GPUs: got {count} on this machine; lower `devices` of the run, "
                "or set `device: cpu` and `gpus: 0`, or use another machine"
            )
    return count


def project_lock(patience_seconds: float = 30.0) -> AbstractContextManager[None]:
    """Lock the folder `runs`, so that one study runs at a time.

    Args:
        patience_seconds: time to wait for the lock; a study that was killed needs some seconds to end.

    Returns:
        A context manager that keeps the lock.

    Raises:
        LockedError: if the folder stays locked.
    """
    Path("runs").mkdir(exist_ok=True)
    activity = "is running a study in this folder"
    return file_lock(Path("runs/.lock"), activity, patience_seconds, lambda line: print(line, flush=True))


def _run_on_slurm(study: Study, command: list[str], progress: Progress, queue: dict[str, str]) -> int:
    """Run Snakemake with Slurm jobs; jobs of an earlier start that are in the queue are not submitted again."""
    prefix = job_prefix(study.name)
    command += ["--slurm-jobname-prefix", prefix]
    print(f"jobs are named {prefix}_...; `squeue --me` shows them; runs/slurm has the logs of failed jobs", flush=True)
    configs = {f"{run.config.study}_{run.config.run_id}": run.config for run in study.runs}
    left = {number: configs[run] for number, run in queue.items() if run in configs}
    if left:
        print(f"{len(left)} jobs of an earlier start are in the queue and are not submitted again", flush=True)
        results = (f"runs/{config.study}/{config.run_id}/result.json" for config in left.values())
        call([*command, "--omit-from", *results], progress, ENGINE_LOG)
        wait_for_jobs(left, progress)
        for number in left:
            del queue[number]  # the next stage of a tuned study does not wait for it again
    return call(command, progress, ENGINE_LOG)


def set_aside_stale(study: Study, keep: bool) -> Study:
    """Rename the results of stale runs to result.previous.json, so that these runs are redone.

    Args:
        study: with its tuning resolved.
        keep: keep stale results.

    Returns:
        The study, loaded again: choices made by renamed results are open again.

    Raises:
        DatasetError: if a dataset is not prepared.
    """
    stale = stale_runs(study, card_hashes(study))
    if stale and keep:
        print(f"KEEP=1: {len(stale)} runs made by other code or data are kept; the report says so", flush=True)
    elif stale:
        print(f"{len(stale)} runs were made by other code or data and are redone; KEEP=1 would keep them", flush=True)
        for run in stale:
            (run.config.folder / "result.json").replace(run.config.folder / "result.previous.json")
    return resolve_tuning(load_study(study.name))


def print_headline(study: Study) -> None:
    """Print the table of losses, the numbers of verdicts and the path of the report.

    Args:
        study: a study with a written report.
    """
    folder = Path("reports") / study.name
    table = headline(at_length(pd.read_csv(folder / "summary.csv")), LOSS_COMPARISONS, ["recall@1"])
    verdicts = conclusions(pd.read_csv(folder / "claims.csv"))["verdict"].value_counts().items()
    counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts)
    claims = f"claims of the paper, at the longest length: {counts}"
    print(f"\n{table.to_string(index=False)}\n\n{claims}\n\n{folder / 'report.html'}")
