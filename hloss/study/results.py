"""Collect the results of a study into one table, read the table, and find stale runs."""

import functools
import json
import math
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hloss.losses.histogram import histogram_loss, reverse_probability
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset, open_dataset
from hloss.runs.errors import ConfigError, DatasetError
from hloss.runs.evaluation import identified_rows
from hloss.runs.files import atomic_write, non_finite, read_result
from hloss.runs.provenance import NAMED_PACKAGES, fingerprint
from hloss.study.spec import CHOICE, LOSS_COMPARISONS, Study, StudyRun, short_value
from hloss.study.statistics import bootstrap_over_classes

SAME_IN_ALL_RUNS = ("protocol", "card_sha256", "prepared")  # within a dataset; card_sha256 within a split
MADE_BY = ("git_commit", "code_sha256", "card_sha256", "torch", *NAMED_PACKAGES, "device", "processor", "threads")
SAME_IN_TRAINED_RUNS = ("network", "weights", "embedding_dim", "chosen_how", "trained_on")  # within a dataset


def stale_runs(study: Study, cards: dict[str, str]) -> list[StudyRun]:
    """Runs with a result whose fingerprint differs from that of a new run.

    Args:
        study: with its tuning resolved.
        cards: dataset -> hash of its card; the card of a dataset that is missing here is not compared.

    Returns:
        The stale runs in the order of the study.
    """
    stale = []
    for run in study.runs:
        if result := read_result(run.config.folder):
            made_by = result["fingerprint"]
            known_card = cards.get(run.config.dataset, made_by["card_sha256"])
            if made_by != fingerprint(run.config, known_card):
                stale.append(run)
    return stale


def card_hashes(study: Study, skip_missing: bool = False) -> dict[str, str]:
    """Hashes of the cards of a study's datasets.

    Args:
        study: with its tuning resolved.
        skip_missing: leave out datasets that are not prepared.

    Returns:
        Dataset -> hash of its card.

    Raises:
        DatasetError: if a dataset is not prepared, unless `skip_missing`.
    """
    hashes = {}
    for folder in {run.config.data_folder for run in study.runs}:
        with suppress(DatasetError) if skip_missing else nullcontext():
            hashes[folder.name] = open_dataset(folder).card_sha256
    return hashes


def write_results(study: Study, keep: bool) -> None:
    """Write results.parquet (`collect`) and loss_cost.csv (`measured_loss_cost`) to reports/STUDY.

    Args:
        study: with its tuning resolved.
        keep: as in `collect`.

    Raises:
        ConfigError: as in `collect`.
    """
    file = Path("reports") / study.name / "results.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table, cost = collect(study, keep), measured_loss_cost()
    atomic_write(file.with_name("loss_cost.csv"), lambda part: cost.to_csv(part, index=False))
    atomic_write(file, lambda part: table.to_parquet(part, index=False))


def measured_loss_cost() -> pd.DataFrame:
    """Measure the time of the histogram loss, forward and backward, on this machine's CPU.

    Returns:
        One row per batch size. Columns: batch_size, seconds (the fastest of three calls, 128 dimensions).
    """
    rows = []
    for n in (1024, 2048, 4096, 8192):
        embeddings = torch.randn(n, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            histogram_loss(embeddings, torch.arange(n) // 8).backward()
            seconds.append(time.perf_counter() - start)
        rows.append({"batch_size": n, "seconds": min(seconds)})
    return pd.DataFrame(rows)


def collect(study: Study, keep: bool = False) -> pd.DataFrame:
    """Collect the results of a study.

    Args:
        study: with its tuning resolved.
        keep: accept results of several versions of the code or of a package.

    Returns:
        One row per run; `complete` is False for a run without a result. Columns: those of the study (study, title,
        comparison, method, place, settings of the run), of the result (metrics as fractions) and of its provenance.

    Raises:
        ConfigError: if there is no result; if several versions of the code or of a package that settings name made the
            results, unless `keep`; or if results cannot be compared (`refuse_mixed`).
    """
    rows, first = [], {run.dataset: run.config.seed for run in sorted(study.runs, key=lambda r: -r.config.seed)}
    opened = functools.cache(open_dataset)
    for run in study.runs:
        row: dict[str, Any] = {"complete": False}
        if result := read_result(run.config.folder):
            dataset = opened(run.config.data_folder)
            exact = run.config.seed == first[run.dataset] and bool(set(LOSS_COMPARISONS) & set(run.methods))
            row = result_columns(run.config, result, dataset, exact)
        rows.append(_study_columns(study, run) | row)
    rows += [_study_columns(study, run) | {"run_id": "", "complete": False} for run in study.waiting]
    table = pd.DataFrame(rows)
    if not table["complete"].any():
        raise ConfigError(f"study {study.name!r} has no result; run `make study STUDY={study.name}` first")
    if not keep:
        _refuse_versions(study.name, table)
    refuse_mixed(table)
    return table


def _refuse_versions(study: str, table: pd.DataFrame) -> None:
    """Refuse results of several versions of the code, or of a package that settings name."""
    for column in ("code_sha256", *NAMED_PACKAGES):
        if column in table and (versions := table[column].nunique()) > 1:
            what = "the code" if column == "code_sha256" else column
            raise ConfigError(
                f"the runs of study {study!r} were made by {versions} versions of {what}; run the study again, or "
                "accept this with KEEP=1"
            )


def _study_columns(study: Study, run: StudyRun) -> dict[str, Any]:
    """The columns of a run that follow from the study."""
    return {
        "study": run.config.study,
        "title": study.title,
        "comparison": list(run.methods),
        "method": list(run.methods.values()),
        "place": [study.order[run.dataset, *pair] for pair in run.methods.items()],
        "run_id": run.config.run_id,
        **run.config.resolved(),
        "dataset": run.dataset,
        "split": run.config.dataset,
    }


def result_columns(config: RunConfig, result: dict[str, Any], dataset: Dataset, exact: bool) -> dict[str, Any]:
    """The columns of a run that follow from its result.

    Args:
        config: settings of the run.
        result: content of its result.json.
        dataset: the dataset of the run.
        exact: compute the exact probability of reverse, which is slow; otherwise it is NaN.

    Returns:
        Column -> value; metrics are fractions. A run without validation has no validation_recall@1 (NaN).

    Raises:
        ConfigError: if a number of the result is NaN or infinite.
    """
    if wrong := non_finite(result):
        raise ConfigError(
            f"{config.folder / 'result.json'} has a number that is not finite: got {wrong}; delete this folder and run "
            "the study again"
        )
    history = pd.read_parquet(config.folder / "history.parquet")
    validated = history.dropna() if len(history) else pd.DataFrame({"iteration": [], "validation_recall@1": []})
    density = result["similarity_density"]
    return {
        "complete": True,
        "network": result["config"]["network"],
        **result["metrics"],
        **_class_interval(config.folder, dataset),
        "validation_recall@1": math.nan if result["validation_recall@1"] is None else result["validation_recall@1"],
        "chosen_iteration": result["chosen"]["iteration"],
        "chosen_how": result["chosen"]["how"],
        "trained_on": result["trained_on"],
        "protocol": result["protocol"],
        "n_queries": result["n_queries"],
        "n_unmatched": result["n_unmatched"],
        "prepared": json.dumps(dataset.card.get("settings", {})),
        "training_seconds": result["training_seconds"],
        "history_iteration": validated["iteration"].astype(int).tolist(),
        "history_recall": validated["validation_recall@1"].tolist(),
        "nodes": density["after"]["nodes"],
        **{f"{sign}_{when}": density[when][sign] for sign in ("positive", "negative") for when in ("before", "after")},
        "reverse_probability": _reverse_probability(config.folder, dataset) if exact else math.nan,
        "panel": json.dumps(result["panel"]),
        **result["fingerprint"],
        **_provenance_columns(result["provenance"]),
    }


def _provenance_columns(provenance: dict[str, Any]) -> dict[str, Any]:
    return {
        "git_commit": f"{provenance['git_commit'] or 'no git'}{' with changes' * provenance['git_dirty']}",
        "device": provenance["device"],
        "processor": provenance.get("processor", ""),  # older results lack it
        "threads": provenance["threads"],
        "torch": provenance["packages"]["torch"],
    }


def _class_interval(folder: Path, dataset: Dataset) -> dict[str, float]:
    """The 95 % bootstrap interval over test classes of a run's Recall@1, as fractions."""
    ranks, queries = (np.load(folder / f"{name}.npy") for name in ("ranks", "queries"))
    classes = dataset.index.label.to_numpy()[dataset.rows("test")][queries]
    matched = ranks > 0
    _, low, high = bootstrap_over_classes(ranks[matched] == 1, classes[matched], np.random.default_rng(0))
    return {"classes_low": low, "classes_high": high}


def _reverse_probability(folder: Path, dataset: Dataset) -> float:
    """The exact probability of reverse over a run's query and gallery images, in [0, 1]."""
    known = identified_rows(dataset)
    labels = dataset.labels(dataset.rows("test"))[known]
    return reverse_probability(torch.from_numpy(np.load(folder / "embeddings.npy")[known]), labels)


def refuse_mixed(table: pd.DataFrame) -> None:
    """Refuse results that cannot be compared with each other.

    All results of a dataset need the same protocol and data. Trained runs also need the same network and the same way
    of choosing the iteration. Exempt from the second rule are runs without training, which are baselines, and runs of a
    grid, which are compared only with each other.

    Args:
        table: the table of `collect`.

    Raises:
        ConfigError: if results differ in one of these; the message names the run.
    """
    complete = table[table["complete"]]
    complete = complete.assign(prepared=complete["prepared"].map(_without_test_set))
    of_grid = complete["comparison"].map(lambda names: all(name.endswith(CHOICE) for name in names))
    trained = complete[(complete["iterations"] > 0) & ~of_grid]
    for name in (*SAME_IN_ALL_RUNS, *SAME_IN_TRAINED_RUNS):
        checked = complete if name in SAME_IN_ALL_RUNS else trained
        for dataset, runs in checked.groupby("split" if name == "card_sha256" else "dataset"):
            usual = runs[name].mode()[0]
            other = runs[runs[name] != usual]
            if len(other):
                run = other.iloc[0]
                raise ConfigError(
                    f"run {run['run_id']} ({run['method'][0]}) on {dataset} has {name}={short_value(run[name])!r}, the "
                    f"other runs have {short_value(usual)!r}; such results cannot be compared: run it again, or remove "
                    "it from the study"
                )
    splits = complete.drop_duplicates("split")
    for (dataset, _), same in splits.groupby(["dataset", "card_sha256"]):
        if len(same) > 1:
            raise ConfigError(f"{' and '.join(same['split'])} are the same split of {dataset}; prepare them again")


def _without_test_set(settings: str) -> str:
    """The settings of a card without `test_set`, which differs between the splits of a dataset."""
    return json.dumps({name: value for name, value in json.loads(settings).items() if name != "test_set"})


def read_results(file: Path) -> pd.DataFrame:
    """Read a study's table of results.

    Args:
        file: a results.parquet.

    Returns:
        One row per run and comparison in the order of the study, metrics in %. `complete` is False for a run without a
        result.

    Raises:
        ConfigError: if results cannot be compared (`refuse_mixed`).
    """
    table = pd.read_parquet(file)
    refuse_mixed(table)
    fractions = ("recall@", "validation_recall@", "map", "r_precision", "classes_")
    metrics = [name for name in table.columns if name.startswith(fractions)]
    table[metrics] *= 100
    table = table.explode(["comparison", "method", "place"])
    return table.sort_values("place", kind="stable", ignore_index=True)


def select_results(results: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows of a table of results that have these values.

    Args:
        results: the table of `read_results`.
        **wanted: column -> value, as in `dataset="glyphs", seed=0`.

    Returns:
        The matching rows.

    Raises:
        ConfigError: if no row has one of the values.
    """
    for name, value in wanted.items():
        known = [v for v in results[name].unique() if not str(v).endswith(CHOICE)]
        if value not in results[name].unique():
            raise ConfigError(f"{name} is unknown: got {value!r}; allowed are {', '.join(map(str, known))}")
        results = results[results[name] == value]
    return results


def recall_names(results: pd.DataFrame) -> list[str]:
    """Names of the Recall@K columns that have a value.

    Args:
        results: the table of `read_results`.

    Returns:
        Names such as "recall@1", sorted by K.
    """
    names = [name for name in results.columns if name.startswith("recall@") and results[name].notna().any()]
    return sorted(names, key=lambda name: int(name.removeprefix("recall@")))


def recalls_over_k(results: pd.DataFrame) -> pd.DataFrame:
    """Test Recall@K in long form.

    Args:
        results: complete runs of `read_results`.

    Returns:
        One row per run and K. Columns: method, seed, K, recall (%).
    """
    recalls = results.melt(["method", "seed"], recall_names(results), var_name="K", value_name="recall").dropna()
    return recalls.assign(K=recalls["K"].str.removeprefix("recall@").astype(int))


def histories(results: pd.DataFrame) -> pd.DataFrame:
    """Validation Recall@1 during training in long form.

    Args:
        results: complete runs of `read_results`; runs without training or without validation are left out.

    Returns:
        One row per run and validation. Columns: method, seed, iteration, recall (%).
    """
    trained = results[results["iterations"] > 0]
    validations = trained[["method", "seed", "history_iteration", "history_recall"]].set_axis(
        ["method", "seed", "iteration", "recall"], axis=1
    )
    validations = (
        validations.explode(["iteration", "recall"], ignore_index=True)
        .dropna()
        .astype({"iteration": int, "recall": float})
    )
    return validations.assign(recall=100 * validations["recall"])


def chosen_settings(results: pd.DataFrame) -> pd.DataFrame:
    """The settings that tuning chose.

    Args:
        results: the table of `read_results`.

    Returns:
        One row per dataset and method. Columns: dataset, method, chosen (values of the settings in the grid), "at an
        edge of its grid" (settings whose value is the smallest or largest of the grid), run_ids (of the grid). If runs
        of a grid are equally good, also "equally good runs" (their number where it is above 1); the first is chosen.
    """
    rows = []
    tuned = results[results["comparison"] == LOSS_COMPARISONS[1]]
    for (dataset, method), runs in tuned.groupby(["dataset", "method"], sort=False):
        first = runs.iloc[0]
        grid = results[(results["dataset"] == dataset) & (results["comparison"] == LOSS_COMPARISONS[1] + CHOICE)]
        grid = grid[grid["loss"] == first["loss"]]
        axes = [name for name in RunConfig.model_fields if name in grid and grid[name].nunique() > 1]
        edges = [name for name in axes if first["run_id"] and first[name] in (grid[name].min(), grid[name].max())]
        shown = ", ".join(f"{name} {first[name]:g}" for name in axes) if first["run_id"] else "not chosen yet"
        recalls = grid.loc[grid["complete"], "validation_recall@1"]
        best = int((recalls == recalls.max()).sum())
        at_edge, run_ids = ", ".join(edges), ", ".join(grid.loc[grid["complete"], "run_id"])
        rows.append(
            {
                "dataset": dataset,
                "method": method,
                "chosen": shown,
                "at an edge of its grid": at_edge,
                "run_ids": run_ids,
                "equally good runs": best if best > 1 and first["run_id"] else None,
            }
        )
    return pd.DataFrame(rows).dropna(axis="columns", how="all")
