"""Published values, and the comparison of a study's results with them.

`reports/published_values.csv` has one row per published value: dataset, method (a loss of ours where it is one),
settings (those stated that make it another method, as `name=value; ...`), network (ours where it is that one), dim,
protocol (ours, or in words what is different), selection (by what the published iteration was chosen), metric (a name
of ours), value in %, source, place in the source, url, note.
"""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hloss.runs.config import RunConfig
from hloss.runs.errors import ConfigError
from hloss.runs.files import project_path
from hloss.study.spec import LOSS_COMPARISONS
from hloss.study.statistics import t_interval

PUBLISHED = "reports/published_values.csv"
NEEDED = ("dataset", "method", "network", "protocol", "selection", "metric", "value", "source", "place", "url")
COLUMNS = (*NEEDED, "settings", "dim", "note")
DATASETS = ("cub", "sop", "cuhk03", "market1501")
SELECTIONS = ("validation classes", "not stated", "test set", "nothing to choose")
EXACT, NETWORK, PROTOCOL = "exact", "same protocol, another network", "other protocol"
SHOWN = (*LOSS_COMPARISONS, "batch", "C")  # the comparisons that hold the methods of the publications
PREPARED = {"cuhk03-single-shot": {"boxes": "labeled", "camera_pairs": 3}}  # other boxes or pairs: another protocol
SAME_IN_A_METHOD = ("loss", "network", "embedding_dim", "protocol")  # what the runs of one method must share


def read_published(file: str | Path = PUBLISHED) -> pd.DataFrame:
    """The published values, `settings` as mappings. ConfigError names the line and what is wrong with it."""
    file = project_path(str(file))
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    if set(table.columns) != set(COLUMNS):
        raise ConfigError(f"{file} has the columns {list(table.columns)}, expected are {list(COLUMNS)}")
    rows = [_read_row(f"{file}, line {line}", row) for line, row in enumerate(table.to_dict("records"), start=2)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _read_row(where: str, row: dict[Any, str]) -> dict[str, Any]:
    for column in NEEDED:
        if not row[column].strip():
            raise ConfigError(f"{where}: {column} is empty")
    for column, allowed in (("dataset", DATASETS), ("selection", SELECTIONS)):
        if row[column] not in allowed:
            raise ConfigError(f"{where}: {column}={row[column]!r} is unknown, allowed are {', '.join(allowed)}")
    kind, _, k = row["metric"].partition("@")
    if row["metric"] != "map" and not (kind == "recall" and k.isdigit() and int(k) > 0):
        raise ConfigError(f"{where}: metric={row['metric']!r} is neither recall@K nor map")
    value, dim = _number(where, "value", row["value"]), _number(where, "dim", row["dim"] or "nan")
    if not 0 < value <= 100:
        raise ConfigError(f"{where}: value={row['value']!r} is not a percentage above 0 and up to 100")
    return row | {"value": value, "dim": dim, "settings": _settings(where, row["settings"])}


def _number(where: str, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{where}: {column}={text!r} is no number") from None


def _settings(where: str, text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(";") if part.strip()]
    settings = {name.strip(): yaml.safe_load(value) for name, _, value in pairs}
    unknown = [name for name in settings if name not in RunConfig.model_fields]
    if unknown:
        raise ConfigError(f"{where}: settings={text!r}: {', '.join(unknown)} is no setting of a run")
    return settings


def compare_with_published(results: pd.DataFrame, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """A study's methods beside the published values of the same dataset, loss and stated settings.

    One row per method and published value: dataset, method, metric, ours (mean over runs, %), low and high (95 %
    interval, %), n, run_ids, published (%), difference (points), match, source, place, url, note. `match` is "exact"
    (the same protocol, network and dimensions), "same protocol, another network", or "other protocol" (what was chosen
    on the test set is one): the last is to be shown apart, and has no difference. Nor has a method whose runs are not
    all complete. Empty where nothing was published.

    results: one row per run and comparison, of the comparisons that hold the methods of the publications (SHOWN);
    metrics in %, as of `hloss.study.results.read_results`. ConfigError where the runs of one method differ in loss,
    network, dimensions or protocol.
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


def _check_one_method(dataset: str, method: str, runs: pd.DataFrame) -> None:
    for column in SAME_IN_A_METHOD:
        found = runs[column].unique()
        if len(found) > 1:
            raise ConfigError(
                f"the runs of {method!r} on {dataset} differ in {column} ({', '.join(map(str, found))}): "
                "they are not repetitions of one method and cannot be compared with published values"
            )


def _is_published(run: pd.Series, value: dict[str, Any]) -> bool:
    """Whether a published value is of this run's loss and settings, and the run measured its metric."""
    same = run["loss"] == value["method"] and all(run.get(k) == v for k, v in value["settings"].items())
    return same and pd.notna(run.get(value["metric"]))


def _comparison_row(
    dataset: str, method: str, runs: pd.DataFrame, value: dict[str, Any], whole: bool
) -> dict[str, Any]:
    ours, low, high = t_interval(runs[value["metric"]].to_numpy())
    match = _match(runs.iloc[0], value)
    return {
        "dataset": dataset,
        "method": method,
        "metric": value["metric"],
        "ours": ours,
        "low": low,
        "high": high,
        "n": len(runs),
        "run_ids": ", ".join(runs.run_id),
        "published": value["value"],
        "difference": ours - value["value"] if whole and match != PROTOCOL else math.nan,
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
