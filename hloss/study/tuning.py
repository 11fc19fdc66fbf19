"""Settings chosen on validation classes: the runs of a grid, and what they chose."""

from pathlib import Path
from typing import Any

import pandas as pd

from hloss.runs.config import RunConfig
from hloss.runs.errors import ConfigError
from hloss.runs.files import read_result
from hloss.study.spec import CHOICE, LOSS_COMPARISONS, StudyRun, crossed_runs


def tuned_runs(
    home: str, file: Path, text: dict[str, Any], entry: dict[str, Any]
) -> tuple[list[StudyRun], list[StudyRun]]:
    """The runs that choose among an entry's grid, then those with the chosen setting: as known, or waiting to be."""
    if "tuning_seed" not in text or text["tuning_seed"] in text["seeds"]:
        raise ConfigError(f"{file}, run {entry['name']!r}: tune needs a tuning_seed of the study that is none of seeds")
    comparison = entry.get("comparison", "losses")
    choice = {"comparison": f"{comparison}{CHOICE}", "set": entry["set"] | {"refit": False}}  # it chooses
    grid = crossed_runs(home, file, text, {**entry, **choice}, [text["tuning_seed"]])
    results = [read_result(run.config.folder) for run in grid]
    recalls = [result["validation_recall@1"] for result in results if result]
    chosen = grid[recalls.index(max(recalls)) if len(recalls) == len(grid) else 0].config
    settings = entry["set"] | {axis: getattr(chosen, axis) for axis in entry["cross"]}
    final = {**entry, "set": settings, "cross": {}}
    runs = crossed_runs(home, file, text, final, entry.get("seeds", text["seeds"]))
    return (grid + runs, []) if len(recalls) == len(grid) else (grid, runs)


def chosen_settings(results: pd.DataFrame) -> pd.DataFrame:
    """What tuning chose: dataset, method, settings that its grid crossed, which lie at an edge of it, the grid's runs.

    results: of `read_results`. Only of methods whose runs are known.
    """
    rows = []
    tuned = results[results["comparison"] == LOSS_COMPARISONS[1]]
    for (dataset, method), runs in tuned.groupby(["dataset", "method"], sort=False):
        first = runs.iloc[0]
        grid = results[(results["dataset"] == dataset) & (results["comparison"] == LOSS_COMPARISONS[1] + CHOICE)]
        grid = grid[grid["loss"] == first["loss"]]
        axes = [name for name in RunConfig.model_fields if name in grid and grid[name].nunique() > 1]
        edges = [name for name in axes if first["run_id"] and first[name] in (grid[name].min(), grid[name].max())]
        shown = ", ".join(f"{name} {first[name]:g}" for name in axes) if first["run_id"] else "not chosen yet"
        at_edge, run_ids = ", ".join(edges), ", ".join(grid.loc[grid["complete"], "run_id"])
        told = {"dataset": dataset, "method": method, "chosen": shown, "at an edge of its grid": at_edge}
        rows.append(told | {"run_ids": run_ids})
    return pd.DataFrame(rows)
