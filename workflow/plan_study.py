"""`python workflow/plan_study.py STUDY [--profile P] [--cores N]`: what a study has still to run, and what that takes.

Training time, memory and disk are taken from complete runs in `runs/` of the same dataset, network, batch and kind of
device, whatever their loss; then from `measured.csv`. What neither knows is said to be not measured.
"""

import argparse
import os
import re
import shutil
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from devices import visible_devices
from run_study import PROFILES, checked_profile
from slurm import is_slurm

from hloss.checkpoints import read_status
from hloss.experiment import ConfigError, read_result
from hloss.studies import Study, StudyRun, load_study

MEASURED = Path("workflow/measured.csv")
CPUS = ("x86_64", "AMD64", "aarch64", "arm64")  # what a result names as its device, if not a GPU's name
SAME = ("dataset", "network", "batch_size", "micro_batch", "devices")  # two runs alike in these cost the same
Kind = tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What a run takes: seconds per iteration with its validations, peak memory (a GPU: its own), disk; who says so."""

    seconds: float
    memory_mib: float
    disk_mib: float
    source: str


def main() -> None:
    """Print the plan of a study."""
    parser = argparse.ArgumentParser(prog="workflow/plan_study.py", description=__doc__)
    parser.add_argument("study", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("--profile", default="local", help="name of a folder in workflow/profiles")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="CPU threads at once, on this machine")
    options = parser.parse_args()
    try:
        study = load_study(options.study)
        checked_profile(options.profile)
    except ConfigError as error:
        sys.exit(f"study {options.study}: {error}")
    cluster = is_slurm(PROFILES / options.profile)
    gpus = None if cluster else len(visible_devices())
    print(plan(study, gpus, table_of(MEASURED) | measured(Path("runs"))))
    at_once = "as many at once as the cluster gives" if cluster else f"CORES={options.cores} and {gpus} GPUs"
    print(f"Runs side by side divide the hours: here {at_once}.")


def plan(study: Study, gpus: int | None, costs: dict[Kind, Cost]) -> str:
    """A line per run and the totals. gpus: of this machine; None: a cluster has what is asked for."""
    rows, unknown, total = [], 0, {"hours": 0.0, "disk": 0.0, "memory": 0.0}
    for run in study.runs:
        state, left = state_of(run)
        kind = kind_of(run, gpus)
        cost, on_gpu = costs.get(kind), kind[-1] == "cuda"
        row = {
            "dataset": run.dataset,
            "run": run.name,
            "state": state,
            "hours": "",
            "memory GiB": "",
            "disk GiB": "",
            "measured": "",
        }
        if left is not None and cost is None:
            unknown += 1
            row["measured"] = f"not measured on {kind[-1]}"
        elif left is not None and cost is not None:
            hours, memory, disk = left * cost.seconds / 3600, cost.memory_mib / 1024, cost.disk_mib / 1024
            total = {
                "hours": total["hours"] + hours,
                "disk": total["disk"] + disk,
                "memory": max(total["memory"], memory),
            }
            numbers = (f"{hours:.2f}", f"{memory:.1f}{' of the GPU' * on_gpu}", f"{disk:.3f}")
            row |= dict(zip(("hours", "memory GiB", "disk GiB"), numbers, strict=True))
            row["measured"] = cost.source + warnings(run, hours, 0.0 if on_gpu else memory)
        rows.append(row)
    free = shutil.disk_usage(".").free / 2**30
    todo = sum(row["state"] != "done" for row in rows)
    lines = [
        f"study {study.name}: {study.title}",
        pd.DataFrame(rows).to_string(index=False, justify="left"),
        f"{len(rows) - todo} of {len(rows)} runs are done. The other {todo}: {total['hours']:.2f} h of training, "
        f"one after the other, {total['memory']:.1f} GiB of memory for the largest, {total['disk']:.2f} GiB of disk "
        f"({free:.0f} GiB free).",
    ]
    if study.waiting:
        lines.append(f"{len(study.waiting)} more runs wait for settings that these choose; they are not in these sums.")
    if unknown:
        lines.append(f"Not in these sums: {unknown} runs that nobody has measured; one short run of each kind would.")
    return "\n\n".join(lines)


def state_of(run: StudyRun) -> tuple[str, int | None]:
    """Done, or where it stands, and the iterations it still takes at most (None: none): `refit` repeats up to all."""
    if (run.config.folder / "result.json").exists():
        return "done", None
    iteration = (read_status(run.config.folder) or {"iteration": 0})["iteration"]
    trainings = 2 if run.config.refit else 1
    return (f"at iteration {iteration}" if iteration else "to do"), max(
        trainings * run.config.iterations - iteration, 0
    )


def kind_of(run: StudyRun, gpus: int | None) -> Kind:
    """What decides the cost of a run."""
    return _kind(run.config.resolved(), "cuda" if run.resources.gpus > 0 and gpus != 0 else "cpu")


def _kind(config: dict, device: str) -> Kind:
    trained = "trained" if config["iterations"] else "untrained"
    dataset = re.sub(r"-\d+$", "", config["dataset"])  # a split costs what the others do
    return (dataset, *(str(config[name]) for name in SAME[1:]), trained, device)


def warnings(run: StudyRun, hours: float, main_memory: float) -> str:
    """What of the study's resources will not do."""
    short = [f"hours={run.resources.hours:g} is short"] * (hours > run.resources.hours)
    short += [f"memory_gb={run.resources.memory_gb:g} is little"] * (main_memory > run.resources.memory_gb)
    return f" ({', '.join(short)})" if short else ""


def table_of(file: Path) -> dict[Kind, Cost]:
    """The small table that comes with the project."""
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    return {
        (*row[list(SAME)], "trained", row.device): Cost(
            float(row.seconds_per_iteration), float(row.memory_mib), float(row.disk_mib), f"table: {row.machine}"
        )
        for _, row in table.iterrows()
    }


def measured(folder: Path) -> dict[Kind, Cost]:
    """Medians over the complete runs in `folder`, by kind."""
    found: dict[Kind, list[tuple[float, float, float]]] = defaultdict(list)
    for file in folder.glob("*/*/result.json"):
        result = read_result(file.parent)
        assert result is not None
        kind = _kind(result["config"], "cpu" if result["provenance"]["device"] in CPUS else "cuda")
        trained = result["config"]["iterations"] + result["config"]["refit"] * result["chosen"]["iteration"]
        seconds = result["training_seconds"] / max(trained, 1)
        disk = sum(f.stat().st_size for f in file.parent.iterdir()) / 2**20
        found[kind].append((seconds, result["peak_memory_mib"], disk))
    return {
        kind: Cost(*(statistics.median(values) for values in zip(*costs, strict=True)), f"{len(costs)} runs here")
        for kind, costs in found.items()
    }


if __name__ == "__main__":
    main()
