"""Intervals over seeds."""

import numpy as np
import pandas as pd
from scipy import stats


def t_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, lower and upper bound of Student's t interval; the bounds are NaN for a single value."""
    values = np.asarray(values, dtype=float)
    mean = values.mean()
    if len(values) < 2:
        return float(mean), float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(mean), float(mean - half), float(mean + half)


def summary(results: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """One row per method: mean, 95 % interval over seeds and n of each metric, in the unit of the metric."""
    rows = []
    for method, runs in results.groupby("method", sort=False):
        row: dict[str, object] = {"method": method, "n": len(runs)}
        for metric in metrics:
            mean, low, high = t_interval(runs[metric].to_numpy())
            row |= {metric: mean, f"{metric} low": low, f"{metric} high": high}
        rows.append(row)
    return pd.DataFrame(rows)
