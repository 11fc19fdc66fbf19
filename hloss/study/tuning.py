"""Read the settings that a study's grids choose from the results of their runs, and extend grids.

If a grid chooses the smallest or largest value of a numeric setting at one of the lengths, it is extended by the next
value in this direction, in all combinations with the other settings, and chooses again: at most `EXTENSIONS` times. The
rule is the same for all losses: the next value continues the last two steps of the grid (`next_value`). The choice of
the grid in the file is run with every seed, too, so that verdicts with and without extensions can be compared.
"""

from dataclasses import replace
from typing import Any

from hloss.runs.config import RunConfig
from hloss.runs.errors import ConfigError
from hloss.runs.files import read_result
from hloss.study.results import reported
from hloss.study.spec import CHOICE, EXTENDED, INITIAL, Entry, Grid, Study, StudyRun

EXTENSIONS = 2


def resolve_tuning(study: Study) -> Study:
    """Add the runs whose settings a complete grid has chosen.

    At each length a grid chooses the settings of the run with the highest validation Recall@1 up to this length, the
    first of equal ones. It chooses only when all of its runs have results.

    Args:
        study: as `hloss.study.spec.load_study` returns it.

    Returns:
        The study with the runs of extended grids and the chosen runs; grids without all results choose nothing.
    """
    return replace(study, entries=tuple(map(_resolved, study.entries)))


def _resolved(entry: Entry) -> Entry:
    if entry.grid is None:
        return entry
    axes, runs = entry.grid.axes, entry.grid.runs_on(entry.grid.axes, CHOICE)
    choices = []
    for extension in range(EXTENSIONS + 1):
        chosen = _chosen(runs)
        if chosen is None:
            return replace(entry, runs=runs)
        choices.append(chosen)
        wider = wider_axes(entry.grid, axes, list(chosen.values()))
        if wider == axes or extension == EXTENSIONS:
            break
        known = {run.config.run_id for run in runs}
        runs += tuple(run for run in entry.grid.runs_on(wider, EXTENDED + CHOICE) if run.config.run_id not in known)
        axes = wider
    of_initial = entry.grid.runs_with(choices[0], INITIAL) if len(choices) > 1 else ()
    return Entry(runs + entry.grid.runs_with(choices[-1], "") + of_initial)


def _chosen(runs: tuple[StudyRun, ...]) -> dict[int, RunConfig] | None:
    """The settings that a grid chooses at each length; None if a run has no result."""
    results = [read_result(run.config.folder) for run in runs]
    if not all(results):
        return None
    recalls = [{at["iterations"]: at["validation_recall@1"] for at in reported(result)} for result in results if result]
    chosen = {}
    for length in runs[0].config.lengths:
        of_length = [recall[length] for recall in recalls]
        chosen[length] = runs[of_length.index(max(of_length))].config
    return chosen


def wider_axes(grid: Grid, axes: dict[str, list[Any]], chosen: list[RunConfig]) -> dict[str, list[Any]]:
    """The axes of a grid, with the next value at each edge that was chosen; a value that no run can have is left out.

    Args:
        grid: the grid, which says whether runs can have a value.
        axes: values of each setting.
        chosen: the chosen settings.

    Returns:
        The same axes if no edge was chosen.
    """
    wider = dict(axes)
    for name, values in axes.items():
        picked = {getattr(config, name) for config in chosen}
        for ordered in (sorted(values), sorted(values, reverse=True)):
            value = next_value(ordered) if ordered[-1] in picked else None
            if value is not None and _is_allowed(grid, axes | {name: [value]}):
                wider[name] = [*wider[name], value]
    return wider


def _is_allowed(grid: Grid, axes: dict[str, list[Any]]) -> bool:
    try:
        return bool(grid.runs_on(axes, EXTENDED + CHOICE))
    except ConfigError:
        return False


def next_value(values: list[Any]) -> float | int | None:
    """The value after the last of a list, which continues its last two steps: 1, 3, 10 -> 30; 50, 100, 200 -> 400.

    Args:
        values: in ascending or descending order.

    Returns:
        A value of the type of the last one; None for fewer than three values, values that are not positive numbers, or
        a step of less than 1 between whole numbers.
    """
    if len(values) < 3 or not all(isinstance(value, (int, float)) and value > 0 for value in values[-3:]):
        return None
    found = float(f"{values[-2] * values[-1] / values[-3]:.3g}")
    if isinstance(values[-1], int):
        return round(found) if round(found) not in (0, values[-1]) else None
    return found
