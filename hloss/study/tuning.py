"""Read the settings that a study's grids choose from the results of their runs, and extend grids.

A grid is extended if it chooses the smallest or largest value of a numeric setting at one of the lengths. It gets the
next value in this direction, in all combinations with the other settings, and chooses again: at most `EXTENSIONS`
times. The next value continues the last two steps of the grid (`next_value`); the rule is the same for all losses. The
first choice, from the grid without extensions, is also run with every seed, so that verdicts with and without
extensions can be compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hloss.runs.config import RunConfig
from hloss.runs.errors import ConfigError
from hloss.runs.files import read_result
from hloss.study.results import reported
from hloss.study.spec import CHOICE, EXTENDED, INITIAL, Entry, Grid, Study, StudyRun

EXTENSIONS = 2


def resolve_tuning(study: Study, report: Callable[[str], None] = lambda line: None) -> Study:
    """Add the runs whose settings a complete grid has chosen.

    At each length a grid chooses the settings of the run with the highest validation Recall@1 up to this length. Of
    several such runs it chooses the first in the order of the study's file. It chooses only when all of its runs have
    results.

    Args:
        study: as `hloss.study.spec.load_study` returns it.
        report: called with a line for each choice among several best runs.

    Returns:
        The study with the runs of extended grids and the chosen runs; grids without all results choose nothing.

    Raises:
        ConfigError: if the validation of a grid cannot choose (`first_of_the_best`).
    """
    return replace(study, entries=tuple(_resolved(entry, report) for entry in study.entries))


def _resolved(entry: Entry, report: Callable[[str], None]) -> Entry:
    if entry.grid is None:
        return entry
    axes, runs = entry.grid.axes, entry.grid.runs_on(entry.grid.axes, CHOICE)
    choices = []
    for extension in range(EXTENSIONS + 1):
        chosen = _chosen(runs, report)
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


def _chosen(runs: tuple[StudyRun, ...], report: Callable[[str], None]) -> dict[int, RunConfig] | None:
    """The settings that a grid chooses at each length; None if a run has no result."""
    results = [read_result(run.config.folder) for run in runs]
    if not all(results):
        return None
    recalls = [{at["iterations"]: at["validation_recall@1"] for at in reported(result)} for result in results if result]
    chosen = {}
    for length in runs[0].config.lengths:
        chosen[length] = first_of_the_best(runs, [recall[length] for recall in recalls], report).config
    return chosen


def first_of_the_best(
    grid: Sequence[StudyRun], recalls: Sequence[float | None], report: Callable[[str], None]
) -> StudyRun:
    """Choose the run of a grid with the highest validation Recall@1; of several, the first.

    Args:
        grid: the runs of a grid in the order of the study's file.
        recalls: their validation Recall@1, fractions in [0, 1]; None without validation.
        report: called with a line if several runs are the best.

    Returns:
        The chosen run.

    Raises:
        ConfigError: if a run has no validation Recall@1, or several runs all have 0 % or all 100 %.
    """
    known = [recall for recall in recalls if recall is not None and 0 <= recall <= 1]
    if len(known) < len(grid):
        raise ConfigError(
            f"{grid[0].name}: {len(grid) - len(known)} of {len(grid)} runs of this grid have no validation Recall@1 to "
            "choose by; delete their folders and run the study again"
        )
    best = max(known)
    tied = [run for run, recall in zip(grid, known, strict=True) if recall == best]
    if len(tied) == len(grid) > 1 and best in (0, 1):
        raise ConfigError(
            f"{grid[0].name}: this grid cannot choose, because the validation Recall@1 of all of its {len(grid)} runs "
            f"is {100 * best:g} %; validate on more classes (`--val-fraction` of data_prep), or remove tune"
        )
    if len(tied) > 1:
        methods = "; ".join(run.method for run in tied)
        report(f"{len(tied)} runs of a grid are equally good ({100 * best:.2f} %), the first is chosen: {methods}")
    return tied[0]


def wider_axes(grid: Grid, axes: dict[str, list[Any]], chosen: list[RunConfig]) -> dict[str, list[Any]]:
    """The axes of a grid with the next value at each edge that was chosen, unless runs cannot have this value.

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
