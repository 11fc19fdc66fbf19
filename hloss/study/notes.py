"""Notes of a report as Markdown: data, intervals, lengths, settings, and the command that repeats the study."""

import json
from pathlib import Path

import pandas as pd

from hloss.runs.files import project_path
from hloss.study.levels import settings_in
from hloss.study.results import distinct_runs, lengths_in
from hloss.study.spec import STUDIES


def dataset_note(dataset: str, rows: pd.DataFrame) -> str:
    """Queries and protocol of a dataset, and the variation that its intervals include.

    Args:
        dataset: name of the dataset.
        rows: its complete runs, from `hloss.study.results.read_results`.
    """
    note = f"`{dataset}`: {rows['n_queries'].iloc[0]:,.0f} test queries, protocol {rows['protocol'].iloc[0]}."
    if rows["validation_recall@1"].isna().all():
        note += " **Trained without validation: the last iteration was tested.**"
    if rows["n_unmatched"].max():
        note += f" {rows['n_unmatched'].max():,.0f} queries without a match are left out."
    return f"{note} {_interval_note(rows)}"


def _interval_note(rows: pd.DataFrame) -> str:
    if rows["split"].nunique() > 1:
        return (
            f"{rows['split'].nunique()} splits, one per seed, with test classes of their own: intervals include seeds "
            "and test classes. The training classes of two splits overlap, so intervals are too narrow; the row *wider "
            "intervals* of a claim corrects for this. Each draw of a single-shot protocol counts as a query."
        )
    if "ranks" in rows and rows["ranks"].notna().all():
        return "All seeds share the test classes; intervals of Recall@K include seeds and test classes."
    return (
        "All seeds share the test classes, and these results have no ranks of queries: **intervals include the "
        "variation over seeds only**."
    )


def lengths_note(results: pd.DataFrame) -> str:
    """The training lengths and the number of runs that are still improving.

    Args:
        results: the table of `hloss.study.results.read_results`.
    """
    lengths = ", ".join(f"{length:,}" for length in lengths_in(results))
    improving = distinct_runs(results[results["complete"] & (results["length"] > 0)])["still_improving"]
    return (
        f"The test is reported after {lengths} iterations, which were named before the runs, each time with the "
        "network that validation chose up to there. Tables and figures show the longest length of each method. "
        f"{improving.sum()} of {len(improving)} trained runs are **still improving** at the end of their training: the "
        "best validation Recall@1 lies in its last tenth."
    )


def repeat_note(results: pd.DataFrame, results_file: str) -> str:
    """The command that repeats or continues the study; empty if several studies made the results.

    Args:
        results: the table of `hloss.study.results.read_results`.
        results_file: its file.
    """
    folder = project_path(results_file).parent.name  # the study's name, except for a renamed folder
    known = project_path(str(Path(STUDIES) / f"{folder}.yaml")).exists()
    names = [folder] if known else list(results["study"].unique())
    if len(names) > 1:
        return ""
    return f"To repeat or continue the study: `make study STUDY={names[0]}`. Complete runs are kept."


def varied_settings(runs: pd.DataFrame) -> tuple[list[str], str]:
    """The settings in which runs differ, and a sentence with the settings that are equal in all runs.

    Args:
        runs: one row per run.

    Returns:
        Names of the settings that differ, and the sentence.
    """
    settings = settings_in(runs)
    varied = [name for name in settings if len(set(map(str, runs[name]))) > 1]
    fixed = ", ".join(f"{name} {runs[name].iloc[0]}" for name in settings if name not in varied)
    return varied, f"Settings of all runs: {fixed}."


def preparation_notes(runs: pd.DataFrame) -> list[str]:
    """How each split was prepared.

    Args:
        runs: one row per run.
    """
    notes = []
    for split, rows in runs.groupby("split", sort=False):
        prepared = json.loads(rows["prepared"].iloc[0])
        notes.append(f"Preparation of `{split}`: {', '.join(f'{k} {v}' for k, v in prepared.items())}.")
    return notes
