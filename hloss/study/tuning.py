"""Read the settings that a study's grids choose from the results of their runs."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from hloss.runs.errors import ConfigError
from hloss.runs.files import read_result
from hloss.study.spec import Entry, Study, StudyRun


def resolve_tuning(study: Study, report: Callable[[str], None] = lambda line: None) -> Study:
    """Add the runs whose settings a complete grid has chosen.

    A grid chooses the settings of the run with the highest validation Recall@1. Of several such runs it chooses the
    first in the order of the study's file. It chooses only when all of its runs have results.

    Args:
        study: as `hloss.study.spec.load_study` returns it.
        report: called with a line for each choice among several best runs.

    Returns:
        The study with the chosen runs; grids without all results stay as they are.

    Raises:
        ConfigError: if the validation of a grid cannot choose (`first_of_the_best`).
    """
    return replace(study, entries=tuple(_resolved(entry, report) for entry in study.entries))


def _resolved(entry: Entry, report: Callable[[str], None]) -> Entry:
    if entry.runs_with is None:
        return entry
    results = [read_result(run.config.folder) for run in entry.runs]
    recalls = [result["validation_recall@1"] for result in results if result]
    if len(recalls) < len(results):
        return entry
    chosen = first_of_the_best(entry.runs, recalls, report)
    return Entry(entry.runs + entry.runs_with(chosen.config))


def first_of_the_best(
    grid: Sequence[StudyRun], recalls: Sequence[float | None], report: Callable[[str], None]
) -> StudyRun:
    """Choose the run of a grid with the highest validation Recall@1, the first of equal ones.

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
