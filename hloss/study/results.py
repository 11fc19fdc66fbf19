"""The results of a study as one table."""

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
from hloss.runs.files import atomic_write, read_result
from hloss.runs.provenance import NAMED_PACKAGES, fingerprint
from hloss.study.spec import CHOICE, LOSS_COMPARISONS, Study, StudyRun, short_value
from hloss.study.statistics import bootstrap_over_classes

SAME_IN_ALL_RUNS = ("protocol", "card_sha256", "prepared")  # of a dataset; the card: of a split
MADE_BY = ("git_commit", "code_sha256", "card_sha256", "torch", *NAMED_PACKAGES, "device", "processor", "threads")
SAME_IN_TRAINED_RUNS = ("network", "weights", "embedding_dim", "chosen_how", "trained_on")  # of a dataset


def stale_runs(study: Study, cards: dict[str, str]) -> list[StudyRun]:
    """Runs whose result has not the fingerprint of a new one. cards: dataset -> hash of its card, if known."""
    stale = []
    for run in study.runs:
        if result := read_result(run.config.folder):
            made_by = result["fingerprint"]
            known_card = cards.get(run.config.dataset, made_by["card_sha256"])
            if made_by != fingerprint(run.config, known_card):
                stale.append(run)
    return stale


def card_hashes(study: Study, skip_missing: bool = False) -> dict[str, str]:
    """Dataset -> hash of its card, of the datasets of a study. DatasetError for one that is not prepared here.

    skip_missing: leave such datasets out.
    """
    hashes = {}
    for folder in {run.config.data_folder for run in study.runs}:
        with suppress(DatasetError) if skip_missing else nullcontext():
            hashes[folder.name] = open_dataset(folder).card_sha256
    return hashes


def write_results(study: Study, keep: bool) -> None:
    """Write results.parquet (`collect`) and loss_cost.csv (`measured_loss_cost`) to the folder of a study's report."""
    file = Path("reports") / study.name / "results.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table, cost = collect(study, keep), measured_loss_cost()
    atomic_write(file.with_name("loss_cost.csv"), lambda part: cost.to_csv(part, index=False))
    atomic_write(file, lambda part: table.to_parquet(part, index=False))


def measured_loss_cost() -> pd.DataFrame:
    """Seconds of the loss, forward and backward, by batch size: the best of three, D = 128, on this machine's CPU."""
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
    """The results of a study, one row per run; `complete` is False for a run without a result.

    ConfigError if there is no result, if several versions of the code or of a package that settings name made them
    (unless `keep`), or if they must not be compared (`refuse_mixed`).
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
        raise ConfigError(f"study {study.name!r} has no result yet; run it first")
    if not keep:
        _refuse_versions(study.name, table)
    refuse_mixed(table)
    return table


def _refuse_versions(study: str, table: pd.DataFrame) -> None:
    """ConfigError if several versions of the code or of a package that settings name made the results."""
    for column in ("code_sha256", *NAMED_PACKAGES):
        if column in table and (versions := table[column].nunique()) > 1:
            what = "the code" if column == "code_sha256" else column
            raise ConfigError(
                f"the runs of study {study!r} were made by {versions} versions of {what}; "
                "run the study again, or mix them knowingly with KEEP=1"
            )


def _study_columns(study: Study, run: StudyRun) -> dict[str, Any]:
    """The columns of the table that the study decides."""
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
    """The columns of the table that the result decides. exact: with the exact probability of reverse, which is slow."""
    history = pd.read_parquet(config.folder / "history.parquet")
    validated = history.dropna() if len(history) else pd.DataFrame({"iteration": [], "validation_recall@1": []})
    density = result["similarity_density"]
    return {
        "complete": True,
        "network": result["config"]["network"],
        **result["metrics"],
        **_class_interval(config.folder, dataset),
        "validation_recall@1": result["validation_recall@1"],
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
        "processor": provenance.get("processor", ""),  # older results do not name it
        "threads": provenance["threads"],
        "torch": provenance["packages"]["torch"],
    }


def _class_interval(folder: Path, dataset: Dataset) -> dict[str, float]:
    """The 95 % interval of a run's Recall@1 over its test classes, by bootstrap."""
    ranks, queries = (np.load(folder / f"{name}.npy") for name in ("ranks", "queries"))
    classes = dataset.index.label.to_numpy()[dataset.rows("test")][queries]
    matched = ranks > 0
    _, low, high = bootstrap_over_classes(ranks[matched] == 1, classes[matched], np.random.default_rng(0))
    return {"classes_low": low, "classes_high": high}


def _reverse_probability(folder: Path, dataset: Dataset) -> float:
    """The exact probability of reverse of a run's query and gallery images, in [0, 1]."""
    known = identified_rows(dataset)
    labels = dataset.labels(dataset.rows("test"))[known]
    return reverse_probability(torch.from_numpy(np.load(folder / "embeddings.npy")[known]), labels)


def refuse_mixed(table: pd.DataFrame) -> None:
    """ConfigError, naming the run, if results of one dataset differ in protocol, data, network or choice.

    Runs without training may have another network: they are the baselines of all others. Runs of a grid are compared
    with none of the others, but are on the same data.
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
                    f"others {short_value(usual)!r}: such results are not compared; run it again, or take it out of "
                    "the study"
                )
    splits = complete.drop_duplicates("split")
    for (dataset, _), same in splits.groupby(["dataset", "card_sha256"]):
        if len(same) > 1:
            raise ConfigError(f"{' and '.join(same['split'])} are the same split of {dataset}: prepare each anew")


def _without_test_set(settings: str) -> str:
    """The settings of a card without `test_set`, in which the splits of a dataset differ."""
    return json.dumps({name: value for name, value in json.loads(settings).items() if name != "test_set"})


def read_results(file: Path) -> pd.DataFrame:
    """A study's table of results: one row per run and comparison, in the study's order, metrics in %.

    `complete` is False for runs without a result. ConfigError if results are mixed (`refuse_mixed`).
    """
    table = pd.read_parquet(file)
    refuse_mixed(table)
    fractions = ("recall@", "validation_recall@", "map", "r_precision", "classes_")
    metrics = [name for name in table.columns if name.startswith(fractions)]
    table[metrics] *= 100
    table = table.explode(["comparison", "method", "place"])
    return table.sort_values("place", kind="stable", ignore_index=True)


def select_results(results: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows with these values (dataset, comparison, method, seed). ConfigError if no row has one of them."""
    for name, value in wanted.items():
        known = [v for v in results[name].unique() if not str(v).endswith(CHOICE)]
        if value not in results[name].unique():
            raise ConfigError(f"{name}={value!r} is none of these results', which have {', '.join(map(str, known))}")
        results = results[results[name] == value]
    return results


def recall_names(results: pd.DataFrame) -> list[str]:
    """The Recall@K that any of these runs has, by K: recall@1, recall@2, ..."""
    names = [name for name in results.columns if name.startswith("recall@") and results[name].notna().any()]
    return sorted(names, key=lambda name: int(name.removeprefix("recall@")))


def recalls_over_k(results: pd.DataFrame) -> pd.DataFrame:
    """Test Recall@K of complete runs, one row per run and K: method, seed, K, recall (%)."""
    recalls = results.melt(["method", "seed"], recall_names(results), var_name="K", value_name="recall").dropna()
    return recalls.assign(K=recalls["K"].str.removeprefix("recall@").astype(int))


def histories(results: pd.DataFrame) -> pd.DataFrame:
    """Validations of complete runs that trained: method, seed, iteration, recall (%)."""
    trained = results[results["iterations"] > 0]
    validations = trained[["method", "seed", "history_iteration", "history_recall"]].set_axis(
        ["method", "seed", "iteration", "recall"], axis=1
    )
    validations = validations.explode(["iteration", "recall"], ignore_index=True).astype(
        {"iteration": int, "recall": float}
    )
    return validations.assign(recall=100 * validations["recall"])


def chosen_settings(results: pd.DataFrame) -> pd.DataFrame:
    """The settings that tuning chose, one row per dataset and method.

    Columns: dataset, method, chosen (the settings that the grid crossed), "at an edge of its grid" (those of them that
    are), run_ids (of the grid).

    Args:
        results: of `read_results`.
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
        at_edge, run_ids = ", ".join(edges), ", ".join(grid.loc[grid["complete"], "run_id"])
        rows.append(
            {
                "dataset": dataset,
                "method": method,
                "chosen": shown,
                "at an edge of its grid": at_edge,
                "run_ids": run_ids,
            }
        )
    return pd.DataFrame(rows)
