"""The results of a study as one table."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hloss.losses.histogram import reverse_probability
from hloss.runs.datasets import Dataset, open_dataset
from hloss.runs.errors import ConfigError
from hloss.runs.evaluation import identified_rows
from hloss.runs.files import read_result
from hloss.runs.provenance import NAMED_PACKAGES, fingerprint
from hloss.study.spec import CHOICE, LOSS_COMPARISONS, Study, StudyRun, short_value
from hloss.study.statistics import bootstrap_over_classes

ALL_ALIKE = ("protocol", "card_sha256", "prepared")  # in all runs: of one dataset, of one split
MAKERS = ("git_commit", "code_sha256", "card_sha256", "torch", *NAMED_PACKAGES, "device", "processor", "threads")
TRAINED_ALIKE = ("network", "weights", "embedding_dim", "chosen_how", "trained_on")  # in the trained runs of a dataset


def stale_runs(study: Study, cards: dict[str, str]) -> list[StudyRun]:
    """Finished runs whose fingerprint is not the present one. cards: hash of each dataset's card, where it is known."""
    stale = []
    for run in study.runs:
        if result := read_result(run.config.folder):
            made_by = result["fingerprint"]
            known_card = cards.get(run.config.dataset, made_by["card_sha256"])
            if made_by != fingerprint(run.config, known_card):
                stale.append(run)
    return stale


def collect(study: Study, keep: bool = False) -> pd.DataFrame:
    """One row per run of the study; runs without a result are rows too, whose `complete` is False.

    Refuses runs made by different code or data, unless `keep` says to mix them, and runs that differ in what must be
    alike (`refuse_mixed`).
    """
    rows, first = [], {run.dataset: run.config.seed for run in sorted(study.runs, key=lambda r: -r.config.seed)}
    opened = functools.cache(open_dataset)
    for run in study.runs:
        row: dict[str, Any] = {"complete": False}
        if result := read_result(run.config.folder):
            dataset = opened(run.config.data_folder)
            row = result_row(run, result, dataset, run.config.seed == first[run.dataset])
        rows.append(_of_study(study, run) | row)
    rows += [_of_study(study, run) | {"run_id": "", "complete": False} for run in study.waiting]
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


def _of_study(study: Study, run: StudyRun) -> dict[str, Any]:
    """What the study says of a run."""
    return {
        "study": run.config.study,
        "title": study.title,
        "comparison": list(run.methods),
        "method": list(run.methods.values()),
        "place": [study.places[run.dataset, *pair] for pair in run.methods.items()],
        "run_id": run.config.run_id,
        **run.config.resolved(),
        "dataset": run.dataset,
        "split": run.config.dataset,
    }


def result_row(run: StudyRun, result: dict[str, Any], dataset: Dataset, first: bool) -> dict[str, Any]:
    """What the run's folder says of it. first: also the exact probability of reverse, of a run that compares losses."""
    history = pd.read_parquet(run.config.folder / "history.parquet")
    validated = history.dropna() if len(history) else pd.DataFrame({"iteration": [], "validation_recall@1": []})
    density = result["similarity_density"]
    return {
        "complete": True,
        "network": result["config"]["network"],
        **result["metrics"],
        **_over_classes(run, dataset),
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
        "reverse_probability": _reverse_probability(run, dataset) if first else math.nan,
        "panel": json.dumps(result["panel"]),
        **result["fingerprint"],
        **provenance_columns(result["provenance"]),
    }


def provenance_columns(told: dict[str, Any]) -> dict[str, Any]:
    """Where a result came from, as columns of the table."""
    return {
        "git_commit": f"{told['git_commit'] or 'no git'}{' with changes' * told['git_dirty']}",
        "device": told["device"],
        "processor": told.get("processor", ""),  # unknown of results made earlier
        "threads": told["threads"],
        "torch": told["packages"]["torch"],
    }


def _over_classes(run: StudyRun, dataset: Dataset) -> dict[str, float]:
    """The interval of a run's Recall@1 over its test classes: whole classes of queries are drawn again."""
    ranks, queries = (np.load(run.config.folder / f"{name}.npy") for name in ("ranks", "queries"))
    classes = dataset.index.label.to_numpy()[dataset.rows("test")][queries]
    matched = ranks > 0
    _, low, high = bootstrap_over_classes(ranks[matched] == 1, classes[matched], np.random.default_rng(0))
    return {"classes_low": low, "classes_high": high}


def _reverse_probability(run: StudyRun, dataset: Dataset) -> float:
    """The exact probability of reverse of the test images of a run that compares losses, in [0, 1].

    Of all that are query or gallery, as the densities are. NaN for other runs.
    """
    if not set(LOSS_COMPARISONS) & set(run.methods):
        return math.nan
    known = identified_rows(dataset)
    labels = dataset.labels(dataset.rows("test"))[known]
    return reverse_probability(torch.from_numpy(np.load(run.config.folder / "embeddings.npy")[known]), labels)


def refuse_mixed(table: pd.DataFrame) -> None:
    """ConfigError, naming the run, if results of one dataset differ in protocol, data, network or choice.

    Networks without training stand beside the others as what there is without learning: they choose nothing, and may be
    another network. Runs that choose settings stand beside nothing, and do so on the same data.
    """
    complete = table[table["complete"]]
    complete = complete.assign(prepared=complete["prepared"].map(_prepared_alike))
    chooses = complete["comparison"].map(lambda names: all(name.endswith(CHOICE) for name in names))
    trained = complete[(complete["iterations"] > 0) & ~chooses]
    for name in (*ALL_ALIKE, *TRAINED_ALIKE):
        alike = complete if name in ALL_ALIKE else trained
        for dataset, runs in alike.groupby("split" if name == "card_sha256" else "dataset"):
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


def _prepared_alike(settings: str) -> str:
    """The settings of a card without the one by which splits of a dataset differ."""
    return json.dumps({name: value for name, value in json.loads(settings).items() if name != "test_set"})


def read_results(file: Path) -> pd.DataFrame:
    """A study's table, one row per run and comparison it stands in, in the study's order; metrics in %.

    ConfigError if results are mixed.
    """
    table = pd.read_parquet(file)
    refuse_mixed(table)
    fractions = ("recall@", "validation_recall@", "map", "r_precision", "classes_")
    metrics = [name for name in table.columns if name.startswith(fractions)]
    table[metrics] *= 100
    table = table.explode(["comparison", "method", "place"])
    return table.sort_values("place", kind="stable", ignore_index=True)


def select_results(results: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows with these values (dataset, comparison, method, seed); ConfigError if there is none with one of them."""
    for name, value in wanted.items():
        there = [v for v in results[name].unique() if not str(v).endswith(CHOICE)]
        if value not in results[name].unique():
            raise ConfigError(f"{name}={value!r} is none of these results', which have {', '.join(map(str, there))}")
        results = results[results[name] == value]
    return results


def recall_names(results: pd.DataFrame) -> list[str]:
    """The Recall@K that any of these runs has, by K: recall@1, recall@2, ..."""
    there = [name for name in results.columns if name.startswith("recall@") and results[name].notna().any()]
    return sorted(there, key=lambda name: int(name.removeprefix("recall@")))


def recalls_over_k(results: pd.DataFrame) -> pd.DataFrame:
    """Test Recall@K of complete runs, one row per run and K: method, seed, K, recall (%)."""
    recalls = results.melt(["method", "seed"], recall_names(results), var_name="K", value_name="recall").dropna()
    return recalls.assign(K=recalls["K"].str.removeprefix("recall@").astype(int))


def histories(results: pd.DataFrame) -> pd.DataFrame:
    """Validations of complete runs that trained: method, seed, iteration, recall (%)."""
    trained = results[results["iterations"] > 0]
    found = trained[["method", "seed", "history_iteration", "history_recall"]].set_axis(
        ["method", "seed", "iteration", "recall"], axis=1
    )
    found = found.explode(["iteration", "recall"], ignore_index=True).astype({"iteration": int, "recall": float})
    return found.assign(recall=100 * found["recall"])
