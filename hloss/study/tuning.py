"""Read the settings that a study's grids choose from the results of their runs."""

from dataclasses import replace

from hloss.runs.files import read_result
from hloss.study.results import reported
from hloss.study.spec import Entry, Study


def resolve_tuning(study: Study) -> Study:
    """Add the runs whose settings a complete grid has chosen.

    At each length a grid chooses the settings of the run with the highest validation Recall@1 up to this length, the
    first of equal ones. It chooses only when all of its runs have results.

    Args:
        study: as `hloss.study.spec.load_study` returns it.

    Returns:
        The study with the chosen runs; grids without all results stay as they are.
    """
    return replace(study, entries=tuple(map(_resolved, study.entries)))


def _resolved(entry: Entry) -> Entry:
    if entry.runs_with is None:
        return entry
    results = [read_result(run.config.folder) for run in entry.runs]
    if not all(results):
        return entry
    recalls = [{at["iterations"]: at["validation_recall@1"] for at in reported(result)} for result in results if result]
    chosen = {}
    for length in entry.runs[0].config.lengths:
        of_length = [recall[length] for recall in recalls]
        chosen[length] = entry.runs[of_length.index(max(of_length))].config
    return Entry(entry.runs + entry.runs_with(chosen))
