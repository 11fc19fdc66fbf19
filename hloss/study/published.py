"""Published values, and comparison of a study's results with them.

`reports/published_values.csv` has one row per published value. Columns:

- dataset: one of `DATASETS`.
- method: the name of the loss in this package, or the published name if the package lacks it.
- settings: published settings that define the method, as `name=value; ...`.
- network, protocol: the name in this package, or a description if the package lacks it.
- dim: dimensions of the embedding.
- selection: the data on which the published iteration was chosen; one of `SELECTIONS`.
- metric, value: "recall@K" or "map", in %.
- source, place, url, note: publication, place in it, address, remarks.
"""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from hloss.runs.config import RunConfig
from hloss.runs.errors import ConfigError
from hloss.runs.files import project_path
from hloss.study.estimates import mean_over_runs
from hloss.study.input_files import parse_yaml, read_csv
from hloss.study.spec import LOSS_COMPARISONS

PUBLISHED = "reports/published_values.csv"
NEEDED = ("dataset", "method", "network", "protocol", "selection", "metric", "value", "source", "place", "url")
COLUMNS = (*NEEDED, "settings", "dim", "note")
DATASETS = ("cub", "sop", "cuhk03", "market1501")
SELECTIONS = ("validation classes", "not stated", "test set", "nothing to choose")
EXACT, NETWORK, PROTOCOL = "exact", "same protocol, another network", "other protocol"
SHOWN = (*LOSS_COMPARISONS, "batch", "C")  # comparisons with methods that have published values
PREPARED = {"cuhk03-single-shot": {"boxes": "labeled", "camera_pairs": 3}}  # preparation that a protocol requires
SAME_IN_A_METHOD = ("loss", "network", "embedding_dim", "protocol")  # must be equal in the runs of one method


def read_published(file: str | Path = PUBLISHED) -> pd.DataFrame:
    """Read the published values.

    Args:
        file: path from the project's root or from the current folder.

    Returns:
        One row per value; `settings` are dictionaries, value and dim are floats.

    Raises:
        ConfigError: if the file, a column or a value is invalid; the message names the line.
    """
    file = project_path(str(file))
    table = read_csv(file, COLUMNS)
    rows = [_read_row(f"{file}, line {line}", row) for line, row in enumerate(table.to_dict("records"), start=2)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _read_row(where: str, row: dict[Any, str]) -> dict[str, Any]:
    for column in NEEDED:
        if not row[column].strip():
            raise ConfigError(f"{where}: {column} is empty")
    for column, allowed in (("dataset", DATASETS), ("selection", SELECTIONS)):
        if row[column] not in allowed:
            raise ConfigError(f"{where}: {column} is unknown: got {row[column]!r}; allowed are {', '.join(allowed)}")
    kind, _, k = row["metric"].partition("@")
    if row["metric"] != "map" and not (kind == "recall" and k.isdigit() and int(k) > 0):
        raise ConfigError(f"{where}: metric must be recall@K or map: got {row['metric']!r}")
    value, dim = _number(where, "value", row["value"]), _number(where, "dim", row["dim"] or "nan")
    if not 0 < value <= 100:
        raise ConfigError(f"{where}: value must be above 0 and at most 100 (%): got {row['value']!r}")
    return row | {"value": value, "dim": dim, "settings": _settings(where, row["settings"])}


def _number(where: str, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{where}: {column} must be a number: got {text!r}") from None


def _settings(where: str, text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(";") if part.strip()]
    settings = {name.strip(): parse_yaml(value, f"{where}: settings={text!r}") for name, _, value in pairs}
    unknown = [name for name in settings if name not in RunConfig.model_fields]
    if unknown:
        raise ConfigError(f"{where}: settings={text!r} names unknown settings of a run: {', '.join(unknown)}")
    return settings


def compare_with_published(results: pd.DataFrame, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """Compare a study's methods with published values for the same dataset, loss and settings.

    Results on a part of the original dataset (`--partial` of data_prep) are not compared.

    `match` says how close the published experiment is: "exact" (same protocol, network and dimensions), "same protocol,
    another network" or "other protocol" (also used for values chosen on the test set).

    Args:
        results: runs of the comparisons `SHOWN`, from `hloss.study.results.read_results`.
        published: the table of `read_published`; None: read it.

    Returns:
        One row per method and published value, none without published values. Columns: dataset, method, metric, ours
        (mean over runs, %), low and high (95 % interval, %), n, run_ids, published (%), difference (ours minus
        published, in points; NaN for another protocol or a method with missing runs), match, source, place, url, note.

    Raises:
        ConfigError: if the runs of one method differ in loss, network, dimensions or protocol.
    """
    published = read_published() if published is None else published
    rows = []
    for (dataset, method), runs in results.groupby(["dataset", "method"], sort=False):
        whole, runs = runs["complete"].all(), runs[runs["complete"]]
        _check_one_method(dataset, method, runs)
        for value in published[published.dataset == dataset].to_dict("records"):
            if len(runs) and _is_published(runs.iloc[0], value):
                rows.append(_comparison_row(dataset, method, runs, value, whole))
    columns = "dataset method metric ours low high n run_ids published difference match source place url note"
    return pd.DataFrame(rows, columns=columns.split())


def published_points(beside: pd.DataFrame) -> pd.DataFrame:
    """The published Recall@K of exact matches: same protocol, network and dimensions.

    Args:
        beside: rows of one dataset of the table of `compare_with_published`.

    Returns:
        One row per value. Columns: method, k, value (%), source.
    """
    exact = beside[(beside["match"] == EXACT) & beside["metric"].str.startswith("recall@")]
    points = pd.DataFrame(
        {
            "method": exact["method"],
            "k": exact["metric"].str.removeprefix("recall@").astype(int),
            "value": exact["published"],
            "source": exact["source"],
        }
    )
    return points.drop_duplicates(ignore_index=True)


def _check_one_method(dataset: str, method: str, runs: pd.DataFrame) -> None:
    for column in SAME_IN_A_METHOD:
        found = runs[column].unique()
        if len(found) > 1:
            raise ConfigError(
                f"the runs of {method!r} on {dataset} differ in {column}: got {', '.join(map(str, found))}; "
                "repetitions of one method must have one value"
            )


def _is_published(run: pd.Series, value: dict[str, Any]) -> bool:
    """Whether a published value is for this run's loss, settings and whole dataset, and the run has its metric."""
    if "partial" in json.loads(run["prepared"]):
        return False
    same = run["loss"] == value["method"] and all(run.get(k) == v for k, v in value["settings"].items())
    return same and pd.notna(run.get(value["metric"]))


def _comparison_row(
    dataset: str, method: str, runs: pd.DataFrame, value: dict[str, Any], whole: bool
) -> dict[str, Any]:
    ours = mean_over_runs(runs, value["metric"])
    low, high = ours.interval()
    match = _match(runs.iloc[0], value)
    return {
        "dataset": dataset,
        "method": method,
        "metric": value["metric"],
        "ours": ours.mean,
        "low": low,
        "high": high,
        "n": len(runs),
        "run_ids": ", ".join(runs.run_id),
        "published": value["value"],
        "difference": ours.mean - value["value"] if whole and match != PROTOCOL else math.nan,
        "match": match,
        **{name: value[name] for name in ("source", "place", "url", "note")},
    }


def _match(run: pd.Series, value: dict[str, Any]) -> str:
    if run["protocol"] != value["protocol"] or value["selection"] == "test set":
        return PROTOCOL
    if expected := PREPARED.get(value["protocol"]):
        prepared = json.loads(run["prepared"])
        if any(prepared.get(name) != setting for name, setting in expected.items()):
            return PROTOCOL
    same = run["network"] == value["network"] and run["embedding_dim"] == value["dim"]
    return EXACT if same else NETWORK
