"""Data of the notebook `35_explore`: curves over any axis, neighbours of a query, a 2-D map of the embeddings.

`hloss.study.explore_widgets` shows them. Curves need only the results of a study. Neighbours and the map also need the
prepared dataset and `embeddings.npy`, which every complete run has in its folder. Without this file, only the few
queries whose neighbours are in the results can be shown.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hloss.retrieval.neighbors import neighbors
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset
from hloss.runs.evaluation import PANEL_NEIGHBORS, identified_rows
from hloss.runs.files import project_path, read_result
from hloss.study.parts import parts_of
from hloss.study.results import at_length, histories, recall_names
from hloss.study.spec import OF_TUNING
from hloss.study.statistics import summary

OVER_K, LENGTH, ITERATION, METHOD = "K", "training length", "iteration", "method"
RECALL, VALIDATION = "Recall@K", "validation Recall@1"
OTHER_METRICS = {"map": "MAP", "map_trapezoid": "MAP (trapezoid)", "r_precision": "R-precision", "map@r": "MAP@R"}
MOST_POINTS = 3000  # of a map; a browser draws this number without a delay


def studies(reports: Path) -> dict[str, Path]:
    """List the studies that have results.

    Args:
        reports: the folder `reports`.

    Returns:
        Name of the study's folder -> its results.parquet, which need not exist if there are parts.
    """
    files = [folder / "results.parquet" for folder in sorted(reports.glob("*/"))]
    return {file.parent.name: file for file in files if file.exists() or parts_of(file)}


def comparisons(results: pd.DataFrame) -> list[str]:
    """Names of the comparisons with a complete run, in the order of the study; grids of tuning are left out.

    Args:
        results: rows of one dataset, from `hloss.study.results.read_results`.
    """
    names = results.loc[results["complete"], "comparison"].unique()
    return [name for name in names if not name.endswith(OF_TUNING)]


def settings_varied(results: pd.DataFrame) -> list[str]:
    """Numeric settings with several values that at least half of the methods name, as in "histogram, n_bins 50".

    Args:
        results: rows of one dataset and comparison, from `hloss.study.results.read_results`.
    """
    methods = results.drop_duplicates("method")
    numeric = [name for name in RunConfig.model_fields if name in methods and methods[name].dtype.kind in "if"]
    named = {name: methods.loc[_named(methods, name), name] for name in numeric}
    return [name for name, values in named.items() if values.nunique() > 1 and 2 * len(values) >= len(methods)]


def _named(rows: pd.DataFrame, setting: str) -> pd.Series:
    """Whether the method of each row names the setting."""
    return rows["method"].str.contains(rf", {setting} ")


def axes(results: pd.DataFrame) -> list[str]:
    """Names of the axes over which the methods of a comparison can be drawn, settings that vary first.

    Args:
        results: rows of one dataset and comparison, from `hloss.study.results.read_results`.
    """
    lengths = results.loc[results["complete"] & (results["length"] > 0), "length"]
    several = [LENGTH] if lengths.nunique() > 1 else []
    validated = [ITERATION] if len(lengths) else []
    return [*settings_varied(results), OVER_K, METHOD, *several, *validated]


def metric_columns(results: pd.DataFrame) -> dict[str, dict[int | None, str]]:
    """Columns of the test metrics that have a value.

    Args:
        results: the table of `hloss.study.results.read_results`.

    Returns:
        Name of the metric -> K -> column; K is None for a metric without K.
    """
    recalls: dict[int | None, str] = {int(name.removeprefix("recall@")): name for name in recall_names(results)}
    known = {label: name for name, label in OTHER_METRICS.items() if name in results and results[name].notna().any()}
    return {RECALL: recalls} | {label: {None: name} for label, name in known.items()}


def curves(results: pd.DataFrame, axis: str, column: str) -> pd.DataFrame:
    """Points of the curves of a comparison: means over seeds with their spread.

    The curves have the results at the longest length of each run, except on the axis `LENGTH`.

    Args:
        results: rows of one dataset and comparison, from `hloss.study.results.read_results`.
        axis: one of `axes`.
        column: metric to draw, from `metric_columns`; ignored on the axes `OVER_K` and `ITERATION`.

    Returns:
        One row per point, in the order of the study, x ascending. Columns: curve (its name), x, mean, low, high (in %)
        and n (seeds). low and high bound the 95 % interval; on the axis `ITERATION`, the range over seeds.
    """
    complete = results[results["complete"]]
    if axis == ITERATION:
        return _validation_curves(at_length(complete))
    drawn = recall_names(complete) if axis == OVER_K else [column]
    table = summary(complete if axis == LENGTH else at_length(complete), drawn)
    if axis == OVER_K:
        parts = [_points(table, table["method"], k, name) for k, name in metric_columns(complete)[RECALL].items()]
        return _in_order(pd.concat(parts))
    if axis == LENGTH:
        table = table[table["length"] > 0]
        return _in_order(_points(table, table["method"], table["length"], column))
    if axis == METHOD:
        return _points(table, "", table["method"], column).reset_index(drop=True)
    table = table[_named(table, axis)]
    values = complete.drop_duplicates("method").set_index("method")[axis]
    names = table["method"].map(lambda method: re.sub(rf", {axis} [^,]+", "", method))
    return _in_order(_points(table, names, table["method"].map(values), column))


def _points(table: pd.DataFrame, curve: Any, x: Any, column: str) -> pd.DataFrame:
    """The columns of `curves` from those of `hloss.study.statistics.summary`."""
    bounds = {"mean": table[column], "low": table[f"{column} low"], "high": table[f"{column} high"]}
    return (
        pd.DataFrame({"x": x, **bounds, "n": table["n"]}, index=table.index).assign(curve=curve).dropna(subset="mean")
    )


def _in_order(points: pd.DataFrame) -> pd.DataFrame:
    """Sort by curve, in the order of their first points, and x."""
    place = {name: n for n, name in enumerate(points["curve"].unique())}
    order = points.assign(place=points["curve"].map(place)).sort_values(["place", "x"], kind="stable")
    return order.drop(columns="place").reset_index(drop=True)


def _validation_curves(results: pd.DataFrame) -> pd.DataFrame:
    """The columns of `curves` over the iterations of training."""
    grouped = histories(results).groupby(["method", "iteration"], sort=False)["recall"]
    table = grouped.agg(mean="mean", low="min", high="max", n="count").reset_index()
    return _in_order(table.rename(columns={"method": "curve", "iteration": "x"}))


class Neighborhood(NamedTuple):
    """The nearest images of a query, nearest first.

    Attributes:
        query: row of the query in the dataset's index.
        rows: rows of the nearest images.
        hits: whether they have the class of the query.
    """

    query: int
    rows: list[int]
    hits: list[bool]


@dataclass(frozen=True)
class Gallery:
    """The embedded test images of a run: queries and gallery, without images of other roles.

    Attributes:
        rows: rows in the dataset's index, int64 (n,).
        labels: classes, int64 (n,).
        embeddings: float32 (n, d).
        metric: "cosine" or "euclidean", by which the run is tested.
        ranks: row of a query -> rank of its first match in the test of the run.
    """

    rows: np.ndarray
    labels: Tensor
    embeddings: Tensor
    metric: str
    ranks: dict[int, int]

    def nearest(self, query: int, k: int = PANEL_NEIGHBORS) -> Neighborhood:
        """The k nearest images of a query.

        Args:
            query: one of `rows`; it is not its own neighbour.
            k: number of images, at most n - 1.
        """
        place = torch.from_numpy(np.flatnonzero(self.rows == query))
        _, found = neighbors(self.embeddings[place], self.embeddings, k, self.metric, own=place)
        hits = self.labels[found[0]] == self.labels[place]
        return Neighborhood(query, self.rows[found[0].numpy()].tolist(), hits.tolist())

    def shown(self) -> np.ndarray:
        """Positions of the images of a map: all, or `MOST_POINTS` of them at equal distances."""
        n = len(self.rows)
        return np.arange(n) if n <= MOST_POINTS else np.linspace(0, n - 1, MOST_POINTS).astype(int)


def run_folder(run: Mapping[str, Any]) -> Path:
    """Folder of a run, whether it exists or not.

    Args:
        run: a row of `hloss.study.results.read_results`.
    """
    return project_path("runs") / run["study"] / run["run_id"]


def open_gallery(dataset: Dataset, run: Mapping[str, Any]) -> Gallery | None:
    """Read the embeddings of a run at its longest length.

    Args:
        dataset: the dataset of the run.
        run: a row of `hloss.study.results.read_results`.

    Returns:
        The embedded test images; None if the folder of the run has no embeddings of these images.
    """
    folder = run_folder(run)
    test = dataset.rows("test")
    if read_result(folder) is None or not (folder / "embeddings.npy").exists():
        return None
    embeddings, ranks, queries = (np.load(folder / f"{name}.npy") for name in ("embeddings", "ranks", "queries"))
    if len(embeddings) != len(test):
        return None
    known = identified_rows(dataset)
    of_queries = dict(zip(test[queries].tolist(), np.atleast_2d(ranks)[-1].tolist(), strict=True))
    metric = str(run["metric"])
    return Gallery(test[known], dataset.labels(test[known]), torch.from_numpy(embeddings[known]), metric, of_queries)


def stored_neighborhoods(run: Mapping[str, Any]) -> dict[int, Neighborhood]:
    """The neighbourhoods that the results contain: those of a few queries, the same for every run.

    Args:
        run: a row of a complete run, from `hloss.study.results.read_results`.

    Returns:
        Row of a query -> its neighbourhood.
    """
    panel = json.loads(run["panel"])
    found = map(Neighborhood, panel["queries"], panel["neighbors"], panel["hits"])
    return {neighborhood.query: neighborhood for neighborhood in found}


def projection(gallery: Gallery) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of embeddings.

    Args:
        gallery: its embeddings are normalised first if its metric is the cosine.

    Returns:
        Coordinates of all images on the first two components, float64 (n, 2), and the shares of the variance that these
        explain (2,). The largest loading of a component is positive.
    """
    points = gallery.embeddings.double()
    if gallery.metric == "cosine":
        points = torch.nn.functional.normalize(points)
    centred = (points - points.mean(0)).numpy()
    variances, components = np.linalg.eigh(centred.T @ centred)
    first = components[:, [-1, -2]]
    first = first * np.sign(first[np.abs(first).argmax(0), [0, 1]])
    return centred @ first, variances[[-1, -2]] / max(variances.sum(), np.finfo(float).tiny)
