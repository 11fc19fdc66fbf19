"""Repeat runs of a table of results and compare the measured values."""

import json
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hloss.runs.config import OLD_NAMES, RunConfig, parse_config
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import ConfigError
from hloss.runs.files import atomic_write
from hloss.runs.models import has_pretrained_part
from hloss.runs.provenance import code_sha256
from hloss.runs.run import run
from hloss.study.devices import CPU_NAMES
from hloss.study.input_files import read_table
from hloss.study.parts import parts_of
from hloss.study.results import MADE_BY, OF_QUERIES, reported, result_rows
from hloss.study.tables import listed
from hloss.study.verified import DIFFERENT, RESULTS, is_confirmed, read_verified, verified_file

# Processors round differently, and training amplifies these differences. 25 runs of the glyphs study (24 of 200
# iterations, one of 800) were repeated on another processor: Recall@1 changed by 0.7 points (root mean square), and no
# fraction by more than 2.0. Another seed changes Recall@1 by 1.8 points (root mean square).
TOLERANCE_POINTS = 4.0
EXACT, CLOSE = "bit for bit", f"within {TOLERANCE_POINTS:g} points"
OF_THE_STUDY = {"title", "comparison", "method", "place", "run_id", "split", "length"}
NOT_COMPARED = {*MADE_BY, *RunConfig.model_fields, *OF_THE_STUDY, "training_seconds"}
# Rounding can change these columns and those of several numbers by any amount.
ROUNDING_DECIDES = ("chosen_iteration", "still_improving", "panel")


def verify(results: Path, n: int = 5, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Repeat randomly drawn runs of a table of results, and write the outcome to its `verified_file`.

    On a machine of the same kind (processor or GPU, and version of torch) all measured values must be equal bit for
    bit. On another machine every fraction must lie within `TOLERANCE_POINTS` (see `differing_columns`).

    Args:
        results: the results.parquet of a study, or a part.
        n: number of runs to repeat; all if the table has fewer.
        seed: seed of the draw.
        report: called with one line per run.

    Returns:
        The content of verified.json; `runs` has the outcome and the differing columns of each repeated run.

    Raises:
        ConfigError: if `n` or `seed` is out of range; if the table cannot be read, has old names of settings, was made
            from other data, or needs a missing GPU.
    """
    if n < 1:
        raise ConfigError(f"the number of runs to repeat must be at least 1: got {n}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"the seed of the draw must be from 0 to 2^32 - 1: got {seed}")
    table = read_table(results)
    if old := sorted(set(OLD_NAMES) & set(table.columns)):
        raise ConfigError(
            f"{results} has old names of settings: got {', '.join(old)}; rename them with "
            "`python workflow/scripts/rename_results.py`"
        )
    complete = table[table["complete"]]
    of_runs = complete.drop_duplicates("run_id")
    drawn = of_runs.sample(min(n, len(of_runs)), random_state=seed)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="hloss-verify-") as folder:
        for number, (_, row) in enumerate(drawn.iterrows(), 1):
            lengths = complete[complete["run_id"] == row["run_id"]]
            again = repeated(lengths, folder)
            runs[row["run_id"]] = outcome = compared(lengths, again)
            told = " ".join([outcome["outcome"], *outcome["columns"]])
            report(f"{number} of {len(drawn)}: run {row['run_id']} ({row['method'][0]}, seed {row['seed']}): {told}")
    verified = {
        "results_sha256": sha256(results.read_bytes()).hexdigest(),
        "date": datetime.now(UTC).date().isoformat(),
        "code_sha256": code_sha256(),
        **{name: again[0][name] for name in ("git_commit", "device", "processor", "torch")},
        "seed": seed,
        "tolerance_points": TOLERANCE_POINTS,
        "runs": runs,
    }
    text = json.dumps(verified, indent=1) + "\n"
    atomic_write(verified_file(results), lambda part: part.write_text(text))
    return verified


def repeated(rows: pd.DataFrame, folder: str) -> list[dict[str, Any]]:
    """Repeat a run.

    Args:
        rows: the rows of the run in a results.parquet, one per length.
        folder: folder for the repeated run.

    Returns:
        The columns of the new result at each of these lengths.

    Raises:
        ConfigError: if the dataset differs from that of the results, or a GPU is missing.
    """
    config, row = config_of(rows, folder), rows.iloc[0]
    dataset = open_dataset(config.data_folder)
    if dataset.card_sha256 != row["card_sha256"]:
        raise ConfigError(
            f"run {row['run_id']}: dataset {config.dataset} differs from that of the results: got card "
            f"{dataset.card_sha256[:8]}; the results have {row['card_sha256'][:8]}: prepare the dataset again"
        )
    result = run(config, lambda line: None)
    again = result_rows(config, result, dataset, exact=bool(rows["reverse_probability"].notna().any()))
    columns = dict(zip((at["iterations"] for at in reported(result)), again, strict=True))
    return [columns[length] for length in _lengths(rows)]


def _lengths(rows: pd.DataFrame) -> list[int]:
    """The lengths of a run's rows; older tables have one, the run's iterations."""
    return rows["length" if "length" in rows else "iterations"].astype(int).tolist()


def config_of(rows: pd.DataFrame, runs_dir: str) -> RunConfig:
    """The config of a run, which reports at the lengths of its rows.

    Args:
        rows: the rows of the run in a results.parquet, one per length.
        runs_dir: folder for the repeated run.

    Raises:
        ConfigError: if the run was made on a GPU and torch finds none.
    """
    row = rows.iloc[0]
    on_gpu = row["device"] not in CPU_NAMES
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"run {row['run_id']} needs a GPU ({row['device']}): torch finds none on this machine")
    names = [name for name in RunConfig.model_fields if name in row and not _is_missing(row[name])]
    settings = {name: _plain(name, row[name]) for name in names}
    if not has_pretrained_part(row["network"]):
        settings.pop("pretrained_lr_factor", None)  # the row has its default, which such a network refuses
    if settings["iterations"]:
        settings["report_at"] = _lengths(rows)
    where = {"dataset": row["split"], "device": "cuda" if on_gpu else "cpu", "study": "verify", "runs_dir": runs_dir}
    return parse_config(settings | where)


def _is_missing(value: object) -> bool:
    return value is None or value is pd.NA or value != value


def _plain(name: str, value: Any) -> Any:
    """A value of a table, converted to the type of the setting `name`."""
    if isinstance(value, dict):  # it has the keys of all rows
        return {key: _plain("", inner) for key, inner in value.items() if not _is_missing(inner)}
    if name and RunConfig.model_fields[name].annotation in (int, int | None):
        return int(value)  # a column with missing values has floats
    return value.item() if isinstance(value, np.generic) else value


def compared(rows: pd.DataFrame, again: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare a repeated run with its rows.

    Args:
        rows: the rows of the run in a results.parquet, one per length.
        again: the columns of the repeated run at these lengths, from `repeated`.

    Returns:
        "outcome" (`EXACT`, `CLOSE` or `DIFFERENT`), "columns" (names of columns that differ too much at any length) and
        "largest_difference_points" (of all fractions).
    """
    bits: list[str] = []
    columns: list[str] = []
    points = 0.0
    for (_, row), new in zip(rows.iterrows(), again, strict=True):
        differing = differing_columns(row, new)
        is_same_machine = machine_kind(row) == machine_kind(new)
        bits += differing
        columns += differing if is_same_machine else differing_columns(row, new, exactly=False)
        fractions = [name for name in differing if isinstance(row[name], float) and name not in ROUNDING_DECIDES]
        points = max([points, *(100 * abs(row[name] - new.get(name, np.nan)) for name in fractions)])
    outcome = DIFFERENT if columns else CLOSE if bits else EXACT
    return {"outcome": outcome, "columns": list(dict.fromkeys(columns)), "largest_difference_points": points}


def machine_kind(made: Mapping[Any, Any]) -> tuple[str, ...]:
    """Device, name of the processor ("" if not recorded) and version of torch.

    Args:
        made: a row of a results.parquet, or the columns of a repeated run.
    """
    return made["device"], str(made.get("processor", "")).rpartition(", ")[0], made["torch"]


def differing_columns(row: pd.Series, again: dict[str, Any], exactly: bool = True) -> list[str]:
    """Names of measured columns in which a row and its repetition differ.

    Args:
        row: a row of a results.parquet.
        again: the columns of the repeated run.
        exactly: compare bit for bit. Otherwise fractions may differ by `TOLERANCE_POINTS`, and densities, histories,
            the chosen iteration and the panel are not compared.
    """
    same = _is_same if exactly else _is_close
    left_out = NOT_COMPARED | {name for name in OF_QUERIES if name in row and row[name] is None}  # of a grid's run
    return [name for name in row.index if name not in left_out and not same(name, row[name], again.get(name))]


def _is_same(name: str, a: Any, b: Any) -> bool:
    if np.ndim(a) or np.ndim(b):
        return np.array_equal(a, b)
    return bool(a == b) or (_is_missing(a) and _is_missing(b))


def _is_close(name: str, a: Any, b: Any) -> bool:
    if np.ndim(a) or name in ROUNDING_DECIDES:
        return True
    if isinstance(a, float) and isinstance(b, float) and a == a:
        return abs(a - b) <= TOLERANCE_POINTS / 100
    return _is_same(name, a, b)


def origin(runs: pd.DataFrame, results: Path) -> str:
    """Describe in Markdown the code that made the runs of a table, and the code that verified them.

    Args:
        runs: rows with the columns code_sha256 and git_commit.
        results: the results.parquet; its parts, if it has any, are described instead.
    """
    of_code = runs.groupby("code_sha256", sort=False)["git_commit"].unique()
    versions = [_version(str(code), *commits) for code, commits in of_code.items()]
    made = f"Made by {' and '.join(versions)}"
    if len(versions) > 1:
        made = f"**Made by {len(versions)} versions of the code**: {', '.join(versions)}"
    files = parts_of(results) or [results]
    checked = [_verification(file, verified) for file in files if (verified := read_verified(file))]
    return "; ".join([made, *checked]) + "."


def _verification(results: Path, verified: dict[str, Any]) -> str:
    outcomes = pd.Series([run["outcome"] for run in verified["runs"].values()]).value_counts()
    told = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
    by = _version(verified["code_sha256"], verified["git_commit"])
    word = "verified" if is_confirmed(verified) else "**not confirmed**"
    of = "" if results.name == RESULTS else f"{results.stem} "
    return f"{of}{word} at {by} by {len(verified['runs'])} runs repeated on {verified['date']}: {told}"


def _version(code_sha256: str, *git_commits: str) -> str:
    """The code and its commits; commits that change only what decides no result have the same code."""
    parts = (git_commit.partition(" ") for git_commit in git_commits)
    shown = listed([f"{commit[:8]}{space}{state}" for commit, space, state in parts])
    return f"code `{code_sha256[:8]}` (commit{'s' * (len(git_commits) > 1)} {shown})"
