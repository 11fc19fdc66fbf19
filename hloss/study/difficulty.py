"""Compare the losses of a study on easier and harder data.

A study gives these runs the comparison "difficulty". Its file lists the datasets from the easiest to the hardest, and
first the method that is compared with each of the others. Each method has the same settings on all datasets, so that
the difficulty is all that changes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from hloss.study.board import shown_difference
from hloss.study.estimates import Estimate, paired_difference
from hloss.study.results import lengths_in
from hloss.study.spec import DIFFICULTY
from hloss.study.tables import listed

COLUMNS = ["first", "other", "length", "dataset", "first (%)", "other (%)", "difference", "low", "high", "n"]
COLUMNS += ["still improving", "runs", "run_ids"]
Pair = tuple[pd.DataFrame, pd.DataFrame]  # complete runs of two methods with common seeds


def differences(results: pd.DataFrame) -> pd.DataFrame:
    """Differences in test Recall@1 between the first method and each other method.

    Args:
        results: the table of `hloss.study.results.read_results`.

    Returns:
        One row per other method, length and dataset with complete runs of both methods. Columns: first, other (names
        of the methods), length, dataset; "first (%)" and "other (%)" (means over the common seeds); difference (first
        minus other, in points), low and high (95 % interval; NaN for one seed), n (common seeds); still improving and
        runs (numbers of runs of both methods); run_ids.
    """
    rows = []
    for names, of_datasets in _pairs(results):
        for dataset, (a, b) in of_datasets.items():
            means = {"first (%)": a["recall@1"].mean(), "other (%)": b["recall@1"].mean()}
            rows.append(names | {"dataset": dataset} | means | _numbers(paired_difference(a, b), a, b))
    return pd.DataFrame(rows, columns=COLUMNS)


def changes(results: pd.DataFrame) -> pd.DataFrame:
    """Changes of the differences from the easiest to the hardest dataset, paired by seed.

    Args:
        results: the table of `hloss.study.results.read_results`.

    Returns:
        One row per other method and length with two datasets or more. Columns: those of `differences`, without means;
        dataset is "HARDEST minus EASIEST", and difference is the change in points.
    """
    rows = []
    for names, of_datasets in _pairs(results):
        if len(of_datasets) > 1:
            easiest, *_, hardest = of_datasets
            hard, easy = of_datasets[hardest], of_datasets[easiest]
            change = paired_difference(_with_difference(*hard), _with_difference(*easy), "difference")
            rows.append(names | {"dataset": f"{hardest} minus {easiest}"} | _numbers(change, *hard, *easy))
    return pd.DataFrame(rows, columns=COLUMNS)


def _pairs(results: pd.DataFrame) -> Iterator[tuple[dict[str, object], dict[str, Pair]]]:
    """The columns first, other and length, and the runs of both methods on each dataset that has some."""
    compared = results[results["comparison"] == DIFFICULTY]
    first, *others = compared["method"].unique() if len(compared) else [""]
    for other in others:
        for length in lengths_in(compared):
            runs = compared[compared["complete"] & (compared["length"] == length)]
            pairs = {str(name): _common(rows, first, other) for name, rows in runs.groupby("dataset", sort=False)}
            known = {name: pair for name, pair in pairs.items() if len(pair[0])}
            if known:
                yield {"first": first, "other": other, "length": length}, known


def _common(runs: pd.DataFrame, first: str, other: str) -> Pair:
    a, b = (runs[runs["method"] == name] for name in (first, other))
    return a[a["seed"].isin(b["seed"])], b[b["seed"].isin(a["seed"])]


def _with_difference(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    return a.assign(difference=a["recall@1"] - a["seed"].map(b.set_index("seed")["recall@1"]))


def _numbers(found: Estimate, *of_methods: pd.DataFrame) -> dict[str, object]:
    runs, (low, high) = pd.concat(of_methods), found.interval()
    estimate = {"difference": found.mean, "low": low, "high": high, "n": found.n}
    improving = {"still improving": int(runs["still_improving"].sum()), "runs": len(runs)}
    return estimate | improving | {"run_ids": ", ".join(runs["run_id"])}


def in_words(results: pd.DataFrame) -> list[tuple[str, str]]:
    """Say for each other method whether its order with the first method depends on the difficulty.

    Args:
        results: the table of `hloss.study.results.read_results`.

    Returns:
        One pair per other method, at its longest length: the answer in a few words, and its numbers.
    """
    tables, told = (differences(results), changes(results)), []
    for other in tables[0]["other"].unique():
        rows, change = (table[table["other"] == other] for table in tables)
        longest = rows["length"].max()
        rows, change = (table[table["length"] == longest] for table in (rows, change))
        told.append((_verdict(rows), _values(rows, change)))
    return told


def _verdict(rows: pd.DataFrame) -> str:
    first, other = rows["first"].iloc[0], rows["other"].iloc[0]
    outcomes = np.select([rows["low"] > 0, rows["high"] < 0], ["positive", "negative"], "undecided")
    datasets = {str(name): listed(list(of_name)) for name, of_name in rows.groupby(outcomes, sort=False)["dataset"]}
    if len(datasets) > 1:
        what = "sign of" if {"positive", "negative"} <= datasets.keys() else "verdict on"
        kinds = "; ".join(f"{name} on {of_name}" for name, of_name in datasets.items())
        return f"The {what} {first} minus {other} depends on the difficulty: {kinds}."
    if "undecided" in datasets:
        return f"The order of {first} and {other} is undecided on {datasets['undecided']}."
    place = "above" if "positive" in datasets else "below"
    return f"{first[0].upper()}{first[1:]} is {place} {other} on {listed(list(rows['dataset']))}."


def _values(rows: pd.DataFrame, change: pd.DataFrame) -> str:
    first, other, length = rows[["first", "other", "length"]].iloc[0]
    values = [f"{in_points(row)} on {row['dataset']}" for row in rows.to_dict("records")]
    told = f"{first} minus {other} after {length:,} iterations, in points (95 % CI): {listed(values)}."
    told = told[0].upper() + told[1:]
    for row in change.to_dict("records"):
        chance = "" if row["low"] > 0 or row["high"] < 0 else ", which can be chance"
        told += f" The change, {row['dataset']}: {in_points(row)}{chance}."
    improving = rows["still improving"].sum()
    return told + f" {improving} of {rows['runs'].sum()} runs are still improving." * bool(improving)


def in_points(row: Mapping[Any, Any]) -> str:
    """The difference of a row of `differences` or `changes`, as in "−3.7 (−4.5 to −2.9)"."""
    return shown_difference({**row, "unit": "points", "confidence": 95.0}, with_unit=False)
