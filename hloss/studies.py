"""A study: the runs a YAML file crosses, and their results as one table.

title: what is asked
extends: other                                  # another study, whose runs these join and whose settings are theirs
include: [one, two]                             # or all runs of other studies, to be reported together
fixed: {dataset: glyphs, iterations: 600}       # settings of every run; cuhk03-{seed}: each seed has a split of its own
seeds: [0, 1]
tuning_seed: 100                                # of the runs that choose settings
resources: {gpus: 1, memory_gb: 8, hours: 2}    # what a run may use (Resources)
runs:
  - name: histogram                             # the method's name in tables and figures
    comparison: bins                            # what its runs are compared in ("losses")
    set: {loss: histogram}                      # settings of its runs
    cross: {n_bins: [50, 200]}                  # one run per combination and seed
    seeds: [0]                                  # instead of the study's
    resources: {hours: 6}                       # over the study's
    tune: true                                  # the cross is a grid on tuning_seed; its best setting on validation
                                                # is run with every seed

A run that several comparisons share is run once and stands in each of them. A run that several studies share stands in
the folder of the one that the others extend or include.
"""

import difflib
import functools
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hloss.datasets import Dataset, open_dataset
from hloss.experiment import ConfigError, RunConfig, code_sha256, parse_config, read_result
from hloss.histogram import reverse_probability
from hloss.outcome import of_known_identity
from hloss.statistics import bootstrap_over_classes

STUDIES = Path("workflow/studies")
COMPARED = ("losses", "tuned losses")  # the comparisons of losses with each other
ALL_ALIKE = ("protocol", "card_sha256", "prepared")  # in all runs: of one dataset, of one split
TRAINED_ALIKE = ("network", "weights", "embedding_dim", "chosen_how", "trained_on")  # in the trained runs of a dataset
CHOICE = ": choice"  # at the end of the comparison of runs that choose settings
SPLIT = "-{seed}"  # at the end of a dataset's name


class Resources(BaseModel):
    """What one run may use. On one machine the GPUs alone matter; a cluster is asked for all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    partition: str = Field("", description="Slurm partition; empty: the cluster's default")
    account: str = Field("", description="Slurm account; empty: the user's default")
    gpus: int = Field(ge=0, description="GPUs of the run's own; 0: it runs on the CPU. Default: the run's `devices`")
    memory_gb: float = Field(8.0, gt=0, description="main memory of the first attempt, in GiB; a retry asks for more")
    hours: float = Field(4.0, gt=0, description="time limit of the first attempt; a retry asks for more")
    max_memory_gb: float = Field(64.0, gt=0, description="what a node has: no retry asks for more")
    max_hours: float = Field(24.0, gt=0, description="the partition's time limit: no retry asks for more")

    def memory_mib(self, attempt: int) -> int:
        """Main memory of an attempt (from 1), in MiB: the first one's times its number, as far as a node goes."""
        return math.ceil(1024 * min(self.memory_gb * attempt, max(self.memory_gb, self.max_memory_gb)))

    def minutes(self, attempt: int) -> int:
        """Time limit of an attempt (from 1): the first one's times its number, as far as the partition goes."""
        return math.ceil(60 * min(self.hours * attempt, max(self.hours, self.max_hours)))


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, what it may use, and what it stands for in its comparisons ("bins": "histogram, n_bins 50").

    `dataset` is that of its results: cuhk03 for all of cuhk03-1, cuhk03-2, ...
    """

    config: RunConfig
    resources: Resources
    methods: dict[str, str]
    dataset: str

    @property
    def method(self) -> str:
        return next(iter(self.methods.values()))

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.config.seed}"


@dataclass(frozen=True)
class Study:
    """A study's title, its files, its runs, and the order in which its files name (dataset, comparison, method).

    `waiting` are runs whose settings are not chosen yet, with the first of the grid in their place: they become known
    when the runs that choose are complete.
    """

    name: str
    title: str
    files: tuple[Path, ...]
    runs: tuple[StudyRun, ...]
    waiting: tuple[StudyRun, ...] = ()
    places: dict[tuple[str, str, str], int] = field(default_factory=dict)


def load_study(name: str, folder: Path = STUDIES) -> Study:
    """Read and check a study: ConfigError names whatever is unknown or out of range in it."""
    text, files = _read(name, folder)
    file, home = files[0], files[-1].stem
    runs: dict[str, StudyRun] = {}
    waiting: list[StudyRun] = []
    places: dict[tuple[str, str, str], int] = {}
    for included in text.get("include", ()):
        if included == name:
            raise ConfigError(f"{file}: a study cannot include itself")
        study = load_study(included, folder)
        files += [file for file in study.files if file not in files]
        _join(runs, study.runs)
        waiting += study.waiting
        for place in study.places:
            places.setdefault(place, len(places))
    for entry in text.get("runs", ()):
        optional = {"comparison", "cross", "seeds", "resources", "tune"}
        _check_keys(file, f"run {entry.get('name')!r}", entry, {"name", "set"}, optional)
        if entry.get("tune"):
            known, unknown = _tuned(home, file, text, entry)
        else:
            known, unknown = _crossed(home, file, text, entry, entry.get("seeds", text["seeds"])), []
        waiting += unknown
        for run in known + unknown:
            for comparison, method in run.methods.items():
                places.setdefault((run.dataset, comparison, method), len(places))
        _join(runs, known)
    return Study(name, text["title"], tuple(files), tuple(runs.values()), tuple(waiting), places)


def _join(runs: dict[str, StudyRun], others: Iterable[StudyRun]) -> None:
    """Add runs; one that is there already stands in the comparisons of both."""
    for run in others:
        same = runs.setdefault(run.config.run_id, run)
        same.methods.update({k: v for k, v in run.methods.items() if k not in same.methods})


def _read(name: str, folder: Path, made_of_others: bool = True) -> tuple[dict[str, Any], list[Path]]:
    """A study's text with what it extends in it, and the files that say so, the study's own first."""
    file = folder / f"{name}.yaml"
    if not file.exists():
        there = sorted(p.stem for p in folder.glob("*.yaml"))
        near = difflib.get_close_matches(name, there, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"study={name!r} is unknown, allowed are {', '.join(there) or 'none'}{hint}")
    text = yaml.safe_load(file.read_text())
    if not made_of_others and isinstance(text, dict) and {"include", "extends"} & text.keys():
        raise ConfigError(
            f"{file}: made of other studies itself, it cannot be extended; extend one with runs of its own"
        )
    if isinstance(text, dict) and "include" in text:
        _check_keys(file, "a study that includes others", text, {"title", "include"}, set())
    elif isinstance(text, dict) and "extends" in text:
        _check_keys(file, "a study that extends another", text, {"title", "extends", "runs"}, set())
        base, files = _read(text["extends"], folder, made_of_others=False)
        return {**base, **text, "runs": [*base["runs"], *text["runs"]]}, [file, *files]
    else:
        _check_keys(file, "the study", text, {"title", "seeds", "runs"}, {"fixed", "resources", "tuning_seed"})
    return text, [file]


def _crossed(home: str, file: Path, text: dict[str, Any], entry: dict[str, Any], seeds: list[int]) -> list[StudyRun]:
    """The runs of an entry, one per combination of its axes and seed."""
    runs, axes = [], entry.get("cross") or {}
    for values in itertools.product(*axes.values()):
        axis = dict(zip(axes, values, strict=True))
        method = ", ".join([entry["name"], *(f"{k} {short(v)}" for k, v in axis.items())])
        for seed in seeds:
            settings = {**(text.get("fixed") or {}), **entry["set"], **axis, "seed": seed, "study": home}
            dataset = str(settings.get("dataset", ""))
            if dataset.endswith(SPLIT):
                settings["dataset"] = dataset.removesuffix(SPLIT) + f"-{seed}"
            try:
                config = parse_config(settings)
            except ConfigError as error:
                raise ConfigError(f"{file}, {method}: {error}") from None
            resources = _resources(file, method, config, text.get("resources"), entry.get("resources"))
            methods = {entry.get("comparison", "losses"): method}
            runs.append(StudyRun(config, resources, methods, dataset.removesuffix(SPLIT) or config.dataset))
    return runs


def _tuned(home: str, file: Path, text: dict[str, Any], entry: dict[str, Any]) -> tuple[list[StudyRun], list[StudyRun]]:
    """The runs that choose among an entry's grid, then those with the chosen setting: as known, or waiting to be."""
    if "tuning_seed" not in text or text["tuning_seed"] in text["seeds"]:
        raise ConfigError(f"{file}, run {entry['name']!r}: tune needs a tuning_seed of the study that is none of seeds")
    comparison = entry.get("comparison", "losses")
    choice = {"comparison": f"{comparison}{CHOICE}", "set": entry["set"] | {"refit": False}}  # it chooses
    grid = _crossed(home, file, text, {**entry, **choice}, [text["tuning_seed"]])
    results = [read_result(run.config.folder) for run in grid]
    recalls = [result["validation_recall@1"] for result in results if result]
    chosen = grid[recalls.index(max(recalls)) if len(recalls) == len(grid) else 0].config
    settings = entry["set"] | {axis: getattr(chosen, axis) for axis in entry["cross"]}
    final = {**entry, "set": settings, "cross": {}}
    runs = _crossed(home, file, text, final, entry.get("seeds", text["seeds"]))
    return (grid + runs, []) if len(recalls) == len(grid) else (grid, runs)


def _resources(file: Path, method: str, config: RunConfig, *given: dict[str, Any] | None) -> Resources:
    """The resources of a run, later mappings over earlier ones."""
    settings: dict[str, Any] = {"gpus": 0 if config.device == "cpu" else config.devices}
    for mapping in given:
        _check_keys(file, "resources", mapping or {}, set(), set(Resources.model_fields))
        settings |= mapping or {}
    try:
        resources = Resources(**settings)
    except ValidationError as error:
        wrong = (f"resources {e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{file}, {method}: {'; '.join(wrong)}") from None
    allowed = {"cpu": (0,), "cuda": (config.devices,), "auto": (0, config.devices)}[config.device]
    if resources.gpus not in allowed:
        raise ConfigError(
            f"{file}, {method}: resources gpus={resources.gpus}, but a run with device={config.device!r} and "
            f"devices={config.devices} takes {' or '.join(map(str, allowed))}"
        )
    return resources


def short(value: object) -> str:
    """A value as names of methods and evidence show it: 50 for 50.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_keys(file: Path, what: str, mapping: object, needed: set[str], optional: set[str]) -> None:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{file}: {what} must be a mapping of {', '.join(sorted(needed | optional))}")
    missing, unknown = needed - mapping.keys(), mapping.keys() - needed - optional
    if missing or unknown:
        raise ConfigError(
            f"{file}: {what} lacks {sorted(missing)} and has the unknown {sorted(unknown)}; "
            f"it takes {', '.join(sorted(needed | optional))}"
        )


def stale_runs(study: Study, cards: dict[str, str]) -> list[StudyRun]:
    """Finished runs that other code made, or other data than that of `cards`: dataset -> hash of its card, if known."""
    code, stale = code_sha256(), []
    for run in study.runs:
        if result := read_result(run.config.folder):
            made_by = result["fingerprint"]
            known_card = cards.get(run.config.dataset, made_by["card_sha256"])
            if made_by != {"code_sha256": code, "card_sha256": known_card}:
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
            row = _of_result(run, result, dataset, run.config.seed == first[run.dataset])
        rows.append(_of_study(study, run) | row)
    rows += [_of_study(study, run) | {"run_id": "", "complete": False} for run in study.waiting]
    table = pd.DataFrame(rows)
    if not table["complete"].any():
        raise ConfigError(f"study {study.name!r} has no result yet; run it first")
    if table.code_sha256.nunique() > 1 and not keep:
        raise ConfigError(
            f"the runs of study {study.name!r} were made by {table.code_sha256.nunique()} versions of the code; "
            "run the study again, or mix them knowingly with KEEP=1"
        )
    refuse_mixed(table)
    return table


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


def _of_result(run: StudyRun, result: dict[str, Any], dataset: Dataset, first: bool) -> dict[str, Any]:
    """What the run's folder says of it."""
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
        **_provenance(result["provenance"]),
    }


def _provenance(told: dict[str, Any]) -> dict[str, Any]:
    """Where a result came from, as far as the table of all says it."""
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
    if not set(COMPARED) & set(run.methods):
        return math.nan
    known = of_known_identity(dataset)
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
                    f"run {run['run_id']} ({run['method'][0]}) on {dataset} has {name}={short(run[name])!r}, the "
                    f"others {short(usual)!r}: such results are not compared; run it again, or take it out of the study"
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


def part_of(results: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows with these values (dataset, comparison, method, seed); ConfigError if there is none with one of them."""
    for name, value in wanted.items():
        there = [v for v in results[name].unique() if not str(v).endswith(CHOICE)]
        if value not in results[name].unique():
            raise ConfigError(f"{name}={value!r} is none of these results', which have {', '.join(map(str, there))}")
        results = results[results[name] == value]
    return results


def chosen_settings(results: pd.DataFrame) -> pd.DataFrame:
    """What tuning chose: dataset, method, settings that its grid crossed, which lie at an edge of it, the grid's runs.

    results: of `read_results`. Only of methods whose runs are known.
    """
    rows = []
    tuned = results[results["comparison"] == COMPARED[1]]
    for (dataset, method), runs in tuned.groupby(["dataset", "method"], sort=False):
        first = runs.iloc[0]
        grid = results[(results["dataset"] == dataset) & (results["comparison"] == COMPARED[1] + CHOICE)]
        grid = grid[grid["loss"] == first["loss"]]
        axes = [name for name in RunConfig.model_fields if name in grid and grid[name].nunique() > 1]
        edges = [name for name in axes if first["run_id"] and first[name] in (grid[name].min(), grid[name].max())]
        shown = ", ".join(f"{name} {first[name]:g}" for name in axes) if first["run_id"] else "not chosen yet"
        at_edge, run_ids = ", ".join(edges), ", ".join(grid.loc[grid["complete"], "run_id"])
        told = {"dataset": dataset, "method": method, "chosen": shown, "at an edge of its grid": at_edge}
        rows.append(told | {"run_ids": run_ids})
    return pd.DataFrame(rows)


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
