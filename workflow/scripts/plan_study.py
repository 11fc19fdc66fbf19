"""`python workflow/scripts/plan_study.py STUDY [--profile P] [--cores N]`: runs left, and their cost.

Training time, memory and disk are taken from complete runs in `runs/` of the same dataset, network, batch and kind of
device, whatever their loss; then from `measured.csv`. Of what neither knows, the plan shows what the study file asks
for, says so, and adds it up apart.
"""

import argparse
import os
import re
import shutil
import statistics
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from run_study import PROFILES, checked_profile

from hloss.runs.checkpoints import read_status
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import ConfigError, DatasetError
from hloss.runs.files import read_result
from hloss.study.devices import CPU_NAMES, visible_devices
from hloss.study.results import stale_runs
from hloss.study.slurm import is_slurm
from hloss.study.spec import Study, StudyRun, load_study

MEASURED = Path("workflow/measured.csv")
SAME = ("dataset", "network", "batch_size", "micro_batch", "devices")  # two runs alike in these cost the same
COLUMNS = ("dataset", "run", "state", "hours", "memory GiB", "disk GiB", "measured")
Kind = tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What a run takes: seconds per iteration with its validations, peak memory (a GPU: its own), disk; who says so."""

    seconds: float
    memory_mib: float
    disk_mib: float
    source: str


@dataclass(frozen=True)
class Need:
    """What a run still takes, in hours and GiB, by a measurement (a GPU's own memory) or by what the study asks for."""

    hours: float
    memory: float
    disk: float
    on_gpu: bool
    source: str
    measured: bool = True
    remark: str = ""

    def shown(self) -> tuple[str, str, str, str]:
        """The last columns of the run's line."""
        memory = f"{self.memory:.1f}{' of the GPU' * (self.on_gpu and self.measured)}"
        disk = f"{self.disk:.3f}" if self.measured else ""
        return f"{self.hours:.2f}", memory, disk, self.source + self.remark


def main() -> None:
    """Print the plan of a study."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/plan_study.py", description=__doc__)
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
    rows, needs = [], []
    stale = {run.config.run_id for run in stale_runs(study, cards_here(study))}
    for run in study.runs:
        state, left = state_of(run, run.config.run_id in stale)
        shown = ("", "", "", "")
        if left is not None:
            needs.append(need_of(run, left, gpus, costs))
            shown = needs[-1].shown()
        rows.append((run.dataset, run.name, state, *shown))
    table = pd.DataFrame(rows, columns=list(COLUMNS)).to_string(index=False, justify="left")
    done = f"{len(rows) - len(needs)} of {len(rows)} runs are done"
    lines = [f"study {study.name}: {study.title}", table, f"{done}. {totals(needs)}"]
    if stale:
        lines.append(f"Other code or data made {len(stale)} results: these runs are redone, unless KEEP=1 keeps them.")
    if study.waiting:
        lines.append(f"{len(study.waiting)} more runs wait for settings that these choose; they are not in these sums.")
    return "\n\n".join(lines)


def need_of(run: StudyRun, left: int, gpus: int | None, costs: dict[Kind, Cost]) -> Need:
    """What a run takes for the iterations left. One that does not train has the memory and disk of one that does."""
    kind = kind_of(run, gpus)
    *alike, _, device = kind
    cost = costs.get(kind) or costs.get((*alike, "trained", device))
    on_gpu = device == "cuda"
    if cost is None:
        asked_for = "on a GPU" if run.resources.gpus and not on_gpu else ""  # hours that a CPU will not keep
        source = f"not measured on {device}: what the study asks for {asked_for}".rstrip()
        hours = run.resources.hours if left else 0.0
        return Need(hours, run.resources.memory_gb, 0.0, on_gpu, source, measured=False)
    hours, memory = left * cost.seconds / 3600, cost.memory_mib / 1024
    remark = warnings(run, hours, 0.0 if on_gpu else memory)
    return Need(hours, memory, cost.disk_mib / 1024, on_gpu, cost.source, remark=remark)


def totals(needs: list[Need]) -> str:
    """What measurements say, and apart from it what the study file asks for where nobody has measured."""
    free = shutil.disk_usage(".").free / 2**30
    measured = [need for need in needs if need.measured]
    lines = [
        f"Of the other {len(needs)}, {len(measured)} are measured: {_hours_and_memory(measured)}, "
        f"{sum(need.disk for need in measured):.2f} GiB of disk ({free:.0f} GiB free), without checkpoints at work."
    ]
    guesses = defaultdict(list)
    for need in needs:
        if not need.measured:
            guesses[need.source].append(need)
    lines += [f"{len(asked)} runs {source}, at most {_hours_and_memory(asked)}." for source, asked in guesses.items()]
    if guesses:
        lines.append("One short run of each kind measures it.")
    return "\n\n".join(lines)


def _hours_and_memory(needs: list[Need]) -> str:
    hours, memory = sum(need.hours for need in needs), max((need.memory for need in needs), default=0.0)
    return f"{hours:.2f} h of training, one after the other, {memory:.1f} GiB of memory for the largest"


def state_of(run: StudyRun, stale: bool) -> tuple[str, int | None]:
    """Done, or where it stands, and the iterations it still takes at most (None: none): `refit` repeats up to all."""
    trainings = 2 if run.config.refit else 1
    if stale:
        return "to redo", trainings * run.config.iterations
    if (run.config.folder / "result.json").exists():
        return "done", None
    iteration = (read_status(run.config.folder) or {"iteration": 0})["iteration"]
    left = max(trainings * run.config.iterations - iteration, 0)
    return (f"at iteration {iteration}" if iteration else "to do"), left


def cards_here(study: Study) -> dict[str, str]:
    """Dataset -> hash of its card, of the datasets that are prepared here."""
    cards = {}
    for folder in {run.config.data_folder for run in study.runs}:
        with suppress(DatasetError):
            cards[folder.name] = open_dataset(folder).card_sha256
    return cards


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
        kind = _kind(result["config"], "cpu" if result["provenance"]["device"] in CPU_NAMES else "cuda")
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
