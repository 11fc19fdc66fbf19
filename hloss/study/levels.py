"""Find the settings in which the methods of a comparison differ, to draw them as curves, a grid or categories."""

import numbers
from collections.abc import Collection
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from hloss.runs.config import EXECUTION, RunConfig
from hloss.study.spec import short_value

CATEGORIES, CURVES, GRID = "categories", "curves", "grid"
MANY = 3  # least number of levels of a curve, and of curves of a grid
UNITS = {  # setting -> label of its axis
    "n_bins": "bins (intervals of [-1, 1])",
    "batch_size": "batch size (images)",
    "bandwidth": "bandwidth (standard deviation of the kernel in nodes)",
    "learning_rate": "initial learning rate of Adam",
    "C": "C (factor on the slope for negative pairs)",
    "alpha": "alpha (steepness)",
    "beta": "beta (cosine similarity)",
    "embedding_dim": "embedding (dimensions)",
    "images_per_class": "images per class in a batch (at most)",
    "micro_batch": "slice (images)",
    "iterations": "training length (iterations)",
    "memory_batches": "memory (batches)",
    "dropout": "dropout (probability)",
}
MARGINS = {  # loss -> quantity in which its margin is given
    "histogram": "cosine similarity",
    "quadruplet": "cosine similarity",
    "lifted": "distance",
    "contrastive": "distance",
    "triplet": "squared distance",
    "semi-hard-triplet": "squared distance",
}


@dataclass(frozen=True)
class Levels:
    """The settings in which the methods of a comparison differ.

    Attributes:
        kind: CURVES: lines of levels of one setting; GRID: two settings, each level of one with each of the other;
            CATEGORIES: neither.
        setting: the setting with levels, a number; "" for categories.
        other: the setting in which lines differ; "" if they differ in several, or there is one line.
        label: label of the axis of `setting`, with its unit; "" for categories.
        places: one row per method. Columns: comparison, method, line (its label) and level (NaN: the setting has no
            meaning for this method).
    """

    kind: str
    setting: str
    other: str
    label: str
    places: pd.DataFrame

    def means(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a summary that belong to the methods and have complete runs, with the columns of `places`.

        Args:
            table: the table of `hloss.study.statistics.summary`.
        """
        return table[table["n"] > 0].merge(self.places, on=["comparison", "method"])


def levels_of(runs: pd.DataFrame) -> Levels:
    """Find the settings in which the methods of a comparison differ.

    The axis is a number with three or more levels on a line. Methods of one line have equal values of all settings that
    are not numbers, and different levels. One method may be outside of the lines if a line has its loss, such as the
    triangular kernel beside kernels with three bandwidths. If several settings can be the axis, it is the one whose
    value is in the names of most methods.

    Args:
        runs: runs of one comparison, or of several that are drawn as one, from `hloss.study.results.read_results`.

    Returns:
        The levels. Three or more lines, or two crossed numbers, are a grid.
    """
    first = runs.sort_values("complete", ascending=False, kind="stable").drop_duplicates(["comparison", "method"])
    methods = _with_texts(first.sort_index().reset_index(drop=True))
    numeric, texts = _differing(methods)
    by_name = sorted(numeric, key=lambda setting: -_named(methods, setting))
    for setting in by_name:
        if (found := _curves(methods, texts, setting)) is not None:
            return found
    several = len(_lines(methods, texts).unique()) > 1
    pairs = () if several else permutations(by_name, 2)
    for setting, other in sorted(pairs, key=lambda pair: -methods[pair[0]].nunique()):
        crossed = not methods.duplicated([setting, other]).any() and methods[[setting, other]].notna().all(axis=None)
        if crossed and methods[setting].nunique() >= MANY and methods[other].nunique() > 1:
            return _levels(GRID, methods, setting, _lines(methods, [other]))
    return Levels(
        CATEGORIES, "", "", "", methods[["comparison", "method"]].assign(line=methods["method"], level=np.nan)
    )


def settings_in(runs: pd.DataFrame) -> list[str]:
    """Names of the columns that are settings of the runs.

    The dataset, the seed and settings that do not affect results are left out.

    Args:
        runs: the table of `hloss.study.results.read_results`.
    """
    left_out = (*EXECUTION, "dataset", "seed")
    return [name for name in RunConfig.model_fields if name in runs and name not in left_out]


def _with_texts(methods: pd.DataFrame) -> pd.DataFrame:
    """The methods; settings that are not numbers are converted to text."""
    settings = methods[[name for name in RunConfig.model_fields if name in methods]]
    texts = settings[
        [name for name in settings if not is_numeric_dtype(settings[name]) or is_bool_dtype(settings[name])]
    ]
    return methods.assign(**texts.astype(object).where(texts.notna(), "none").map(str))


def _differing(methods: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Names of the settings in which methods differ: numbers, and others."""
    differing = [name for name in settings_in(methods) if methods[name].nunique(dropna=False) > 1]
    numeric = [name for name in differing if is_numeric_dtype(methods[name])]
    return numeric, [name for name in differing if name not in numeric]


def _named(methods: pd.DataFrame, setting: str) -> int:
    """Number of methods with the value of a setting in their name."""
    values = methods[setting].astype(float).map(short_value)
    words = methods["method"].str.replace(",", "").str.split()
    return sum(value in of_method for value, of_method in zip(values, words, strict=True))


def _lines(methods: pd.DataFrame, settings: list[str]) -> pd.Series:
    """The number of the line of each method: that of the comparison and these settings."""
    return methods.groupby(["comparison", *settings], sort=False, dropna=False).ngroup()


def _curves(methods: pd.DataFrame, texts: list[str], setting: str) -> Levels | None:
    """The lines over a setting, if it has levels."""
    line, level = _lines(methods, texts), methods[setting].astype(float)
    sizes = level.groupby(line).nunique()
    on_lines = line.map(sizes) >= MANY
    if pd.DataFrame({"line": line, "level": level}).duplicated().any() or (~on_lines).sum() > 1 or not on_lines.any():
        return None
    if not set(methods["loss"]) <= set(methods.loc[on_lines, "loss"]):
        return None
    return _levels(GRID if (sizes >= MANY).sum() >= MANY else CURVES, methods, setting, line)


def _levels(kind: str, methods: pd.DataFrame, setting: str, line: pd.Series) -> Levels:
    numeric, texts = _differing(methods)
    own = [name for name in (*texts, *numeric) if (methods[name].groupby(line).nunique(dropna=False) == 1).all()]
    other = own[0] if len(own) == 1 and own != ["loss"] and line.nunique() > 1 else ""  # methods name their loss
    if other:
        labels = methods[other].map(_shown)
    else:
        labels = line.map(methods["method"].groupby(line).agg(_common_parts))
        if labels.groupby(line).first().duplicated().any():
            several = methods["comparison"].nunique() > 1
            labels = methods["comparison"] if several else methods[own].map(_shown).agg(", ".join, axis=1)
    places = methods[["comparison", "method"]].assign(line=labels, level=methods[setting].astype(float))
    return Levels(kind, setting, other, setting_label(setting, methods["loss"]), places)


def _shown(value: object) -> str:
    """The value of a setting as text: "50" for 50.0."""
    return short_value(float(value)) if isinstance(value, numbers.Real) else str(value)


def _common_parts(names: pd.Series) -> str:
    """The common parts of names of methods: "histogram" for "histogram, C 2" and "histogram, C 5"."""
    parts = [name.split(", ") for name in names]
    return ", ".join(part for part in parts[0] if all(part in other for other in parts))


def setting_label(setting: str, losses: Collection[str] = ()) -> str:
    """Label of the axis of a setting, with its unit: "batch size (images)".

    Args:
        setting: name of the setting.
        losses: losses of the runs, on which the quantity of a margin depends.
    """
    if setting == "margin":
        meanings = {MARGINS.get(loss, "") for loss in losses} or {""}
        return f"margin ({meanings.pop()})".replace(" ()", "") if len(meanings) == 1 else "margin"
    return UNITS.get(setting, setting.replace("_", " "))


def scale_of(levels: ArrayLike) -> str:
    """The scale on which levels are spaced most evenly.

    Args:
        levels: values of a setting, in any order.

    Returns:
        "log" for geometric levels, "symlog" for geometric levels and zero (linear up to the smallest positive one), or
        "linear".
    """
    values = np.unique(np.asarray(levels, dtype=float))
    positive = values[values > 0]
    if len(positive) < 3 or values[0] < 0 or _unevenness(np.log(positive)) >= _unevenness(positive):
        return "linear"
    return "log" if len(positive) == len(values) else "symlog"


def _unevenness(values: np.ndarray) -> float:
    """Standard deviation of the steps between values, divided by their mean."""
    steps = np.diff(values)
    return float(steps.std() / steps.mean())
