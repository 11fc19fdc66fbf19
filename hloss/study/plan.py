"""Plan of a study: the runs left, and the time, memory and disk that they need.

Costs come from complete runs in `runs/` of the same dataset, network, batch and kind of device, with any loss, or else
from `workflow/measured.csv`. For a run on a GPU whose steps per second are in `workflow/throughput.csv`, the plan
estimates the hours. For other runs it shows the resources that the study requests. It adds up each kind separately.
"""

import re
import shutil
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hloss.runs.checkpoints import read_status
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import DatasetError
from hloss.runs.files import NETWORK_FILE, read_result
from hloss.study.devices import CPU_NAMES
from hloss.study.input_files import read_csv
from hloss.study.results import card_hashes, stale_runs
from hloss.study.spec import Study, StudyRun
from hloss.study.throughput import MEASURED as THROUGHPUT
from hloss.study.throughput import Throughput

MEASURED = Path("workflow/measured.csv")
COST_COLUMNS = ("device", "machine", "seconds_per_iteration", "memory_mib", "disk_mib", "network_mib")
COST_SETTINGS = ("dataset", "network", "batch_size", "micro_batch", "devices")  # runs with equal values cost the same
COLUMNS = ("dataset", "run", "state", "hours", "memory GiB", "disk GiB", "measured")
ESTIMATED = "estimated"
STALE = "to redo"  # the state of a run whose result is stale
CostKey = tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """Measured cost of a run.

    Attributes:
        seconds: seconds per iteration, including validations.
        memory_mib: peak memory in MiB: of the GPU for a run on GPUs, else main memory.
        disk_mib: disk in MiB without the network.
        source: where it was measured.
        network_mib: disk of the network in MiB; used if `keep_network` is set.
    """

    seconds: float
    memory_mib: float
    disk_mib: float
    source: str
    network_mib: float = 0.0


@dataclass(frozen=True)
class Need:
    """Time, memory and disk that a run still needs.

    Attributes:
        hours: hours of training left.
        memory: memory in GiB: of the GPU if measured on one, else main memory.
        disk: disk in GiB.
        on_gpu: whether the run uses a GPU.
        source: where the cost was measured or estimated, or that it is the limit in the study's `resources`.
        measured: whether the cost was measured.
        remark: warnings about insufficient resources, or "".
    """

    hours: float
    memory: float
    disk: float
    on_gpu: bool
    source: str
    measured: bool = True
    remark: str = ""

    def shown(self) -> tuple[str, str, str, str]:
        """The last four columns of the run's line."""
        memory = f"{self.memory:.1f}{' of the GPU' * (self.on_gpu and self.measured)}"
        disk = f"{self.disk:.3f}" if self.measured else ""
        return f"{self.hours:.2f}", memory, disk, self.source + self.remark


@dataclass(frozen=True)
class PlannedRun:
    """A run of a plan.

    Attributes:
        run: the run.
        state: "done", "to do", "to redo" or "at iteration N".
        need: what the run still needs; None: it is done.
    """

    run: StudyRun
    state: str
    need: Need | None

    def line(self) -> tuple[str, ...]:
        """The values of `COLUMNS` of this run."""
        shown = self.need.shown() if self.need else ("",) * 4
        return self.run.dataset, self.run.name, self.state, *shown


def plan_runs(
    study: Study, gpus: int | None, costs: dict[CostKey, Cost], throughput: Throughput | None = None
) -> list[PlannedRun]:
    """Plan the known runs of a study.

    Args:
        study: with its tuning resolved.
        gpus: number of GPUs of this machine; None: a cluster provides the requested GPUs.
        costs: measured costs, from `measured_costs` and `read_costs`.
        throughput: of the GPUs that provide for the runs; None if it was not measured.

    Returns:
        One entry per run, in the order of the study.
    """
    stale = {run.config.run_id for run in stale_runs(study, card_hashes(study, skip_missing=True))}
    planned = []
    for run in study.runs:
        state, left = run_state(run, run.config.run_id in stale)
        need = None if left is None else need_of_run(run, left, gpus, costs, throughput)
        planned.append(PlannedRun(run, state, need))
    return planned


def plan_text(study: Study, planned: list[PlannedRun]) -> str:
    """Format a plan: one line per run, and the totals.

    Args:
        study: with its tuning resolved.
        planned: the plan of `plan_runs`.
    """
    needs = [entry.need for entry in planned if entry.need]
    stale = sum(entry.state == STALE for entry in planned)
    lines = [entry.line() for entry in planned]
    table = pd.DataFrame(lines, columns=list(COLUMNS)).to_string(index=False, justify="left")
    done = f"{len(planned) - len(needs)} of {len(planned)} runs are done"
    paragraphs = [f"study {study.name}: {study.title}", table, f"{done}. {total_text(needs)}"]
    if stale:
        paragraphs.append(
            f"{stale} results were made by other code or data: their runs are redone unless KEEP=1 is set."
        )
    if problems := data_problems(study):
        paragraphs.append("The study cannot start yet: " + "; ".join(problems))
    if study.waiting:
        paragraphs.append(
            f"{len(study.waiting)} more runs wait for settings that these runs choose; the sums do not include them."
        )
    return "\n\n".join(paragraphs)


def data_problems(study: Study) -> list[str]:
    """Say which datasets of a study are not prepared or damaged, and what to do.

    Args:
        study: with its tuning resolved.
    """
    problems = []
    for folder in sorted({run.config.data_folder for run in study.runs}):
        try:
            open_dataset(folder)
        except DatasetError as error:
            problems.append(str(error))
    return problems


def gpu_hours_text(planned: list[PlannedRun], throughput: Throughput) -> str:
    """Format the hours of one GPU that the training of the runs left would take; "" if none of them uses a GPU.

    Args:
        planned: the plan of `plan_runs`.
        throughput: of the GPU.
    """
    left = [(run_state(entry.run, entry.state == STALE)[1], entry.run) for entry in planned if entry.need]
    left = [(iterations, run) for iterations, run in left if iterations and run.resources.gpus]
    seconds = [(iterations, throughput.seconds(run.config)) for iterations, run in left]
    hours = sum(iterations * each / 3600 for iterations, each in seconds if iterations and each)
    if not hours:
        return ""
    known = sum(each is not None for _, each in seconds)
    return (
        f"Estimate: the training of {known} of {len(left)} runs takes {hours:.0f} hours of one {throughput.card}, "
        f"by the steps per second in {THROUGHPUT}, without validations and tests."
    )


def need_of_run(
    run: StudyRun, left: int, gpus: int | None, costs: dict[CostKey, Cost], throughput: Throughput | None = None
) -> Need:
    """Compute the time, memory and disk that a run needs for its remaining iterations.

    If the cost of runs without training is not known, that of trained runs is used.

    Args:
        run: the run.
        left: number of iterations left.
        gpus: as in `plan_runs`.
        costs: as in `plan_runs`.
        throughput: as in `plan_runs`.

    Returns:
        The need: measured, else estimated from `throughput`, else the limit in its `resources`.
    """
    key = cost_key(run, gpus)
    *settings, _, device = key
    cost = costs.get(key) or costs.get((*settings, "trained", device))
    on_gpu = device == "cuda"
    estimate = throughput.seconds(run.config) if throughput and on_gpu else None
    if cost is None and throughput and estimate:
        source = f"{ESTIMATED} for {throughput.card}, without validations"
        return Need(left * estimate / 3600, run.resources.memory_gb, 0.0, on_gpu, source, measured=False)
    if cost is None:
        of_gpu = " for a GPU" if run.resources.gpus and not on_gpu else ""  # on a CPU the run takes longer
        source = f"not measured on {device}; limit from the study's resources{of_gpu}"
        hours = run.resources.hours if left else 0.0
        return Need(hours, run.resources.memory_gb, 0.0, on_gpu, source, measured=False)
    hours, memory = left * cost.seconds / 3600, cost.memory_mib / 1024
    disk = cost.disk_mib + (cost.network_mib if run.config.keep_network else 0.0)
    remark = resource_warnings(run, hours, 0.0 if on_gpu else memory)
    return Need(hours, memory, disk / 1024, on_gpu, cost.source, remark=remark)


def total_text(needs: list[Need]) -> str:
    """Format the sums over measured runs and, separately, over runs without a measured cost.

    Args:
        needs: needs of the runs that are not done.
    """
    free = shutil.disk_usage(".").free / 2**30
    measured = [need for need in needs if need.measured]
    lines = [
        f"Of the other {len(needs)}, {len(measured)} are measured: {_hours_and_memory(measured)}, "
        f"{sum(need.disk for need in measured):.2f} GiB of disk ({free:.0f} GiB free) plus temporary checkpoints."
    ]
    guesses = defaultdict(list)
    for need in needs:
        if not need.measured:
            guesses[need.source].append(need)
    for source, asked in guesses.items():
        most = "about" if source.startswith(ESTIMATED) else "at most"
        lines.append(f"{len(asked)} run{'s' * (len(asked) > 1)} {source}: {most} {_hours_and_memory(asked)}.")
    if guesses:
        lines.append("The first complete run of each kind measures its cost.")
    return "\n\n".join(lines)


def _hours_and_memory(needs: list[Need]) -> str:
    hours, memory = sum(need.hours for need in needs), max((need.memory for need in needs), default=0.0)
    return f"{hours:.2f} h of training in sequence, at most {memory:.1f} GiB of memory per run"


def run_state(run: StudyRun, stale: bool) -> tuple[str, int | None]:
    """The state of a run and its remaining iterations.

    Args:
        run: the run.
        stale: whether its result is stale.

    Returns:
        The state of `PlannedRun`, and the largest possible number of remaining iterations, which `refit` doubles; None
        for a run that is done.
    """
    trainings = 2 if run.config.refit else 1
    if stale:
        return STALE, trainings * run.config.iterations
    if (run.config.folder / "result.json").exists():
        return "done", None
    iteration = (read_status(run.config.folder) or {"iteration": 0})["iteration"]
    left = max(trainings * run.config.iterations - iteration, 0)
    return (f"at iteration {iteration}" if iteration else "to do"), left


def cost_key(run: StudyRun, gpus: int | None) -> CostKey:
    """The key of a run's cost: its settings of `COST_SETTINGS`, whether it trains, and its device.

    Args:
        run: the run.
        gpus: as in `plan_runs`.
    """
    return _cost_key(run.config.resolved(), "cuda" if run.resources.gpus > 0 and gpus != 0 else "cpu")


def _cost_key(config: dict[str, Any], device: str) -> CostKey:
    trained = "trained" if config["iterations"] else "untrained"
    dataset = re.sub(r"-\d+$", "", config["dataset"])  # all splits of a dataset cost the same
    return (dataset, *(str(config[name]) for name in COST_SETTINGS[1:]), trained, device)


def resource_warnings(run: StudyRun, hours: float, main_memory: float) -> str:
    """Warnings about insufficient resources.

    Args:
        run: the run with its requested resources.
        hours: measured hours.
        main_memory: measured main memory in GiB; 0 if unknown.

    Returns:
        The warnings in parentheses, or "".
    """
    short = [f"hours={run.resources.hours:g} is too little"] * (hours > run.resources.hours)
    short += [f"memory_gb={run.resources.memory_gb:g} is too little"] * (main_memory > run.resources.memory_gb)
    return f" ({', '.join(short)})" if short else ""


def read_costs(file: Path = MEASURED) -> dict[CostKey, Cost]:
    """Read a table of measured costs.

    Args:
        file: CSV file with the columns of workflow/measured.csv.

    Raises:
        ConfigError: if the file cannot be read, has other columns, or lacks a number.
    """
    table = read_csv(file, (*COST_SETTINGS, *COST_COLUMNS), COST_COLUMNS[2:])
    return {
        (*row[list(COST_SETTINGS)], "trained", row.device): Cost(
            float(row.seconds_per_iteration),
            float(row.memory_mib),
            float(row.disk_mib),
            f"table: {row.machine}",
            float(row.network_mib),
        )
        for _, row in table.iterrows()
    }


def measured_costs(folder: Path) -> dict[CostKey, Cost]:
    """Measure costs as medians over complete runs.

    Args:
        folder: the folder `runs`.
    """
    by_key: dict[CostKey, list[tuple[float, ...]]] = defaultdict(list)
    for file in folder.glob("*/*/result.json"):
        result = read_result(file.parent)
        assert result is not None
        key = _cost_key(result["config"], "cpu" if result["provenance"]["device"] in CPU_NAMES else "cuda")
        trained = result["config"]["iterations"] + result["config"]["refit"] * result["chosen"]["iteration"]
        seconds = result["training_seconds"] / max(trained, 1)
        disk = sum(f.stat().st_size for f in file.parent.iterdir() if f.name != NETWORK_FILE) / 2**20
        by_key[key].append((seconds, result["peak_memory_mib"], disk, result.get("network_mib", 0.0)))
    return {key: _median_cost(costs) for key, costs in by_key.items()}


def _median_cost(costs: list[tuple[float, ...]]) -> Cost:
    seconds, memory_mib, disk_mib, network_mib = map(statistics.median, zip(*costs, strict=True))
    return Cost(seconds, memory_mib, disk_mib, f"{len(costs)} runs here", network_mib)
