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

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hloss.losses.settings import did_you_mean
from hloss.runs.config import RunConfig, parse_config
from hloss.runs.errors import ConfigError

STUDIES = Path("workflow/studies")
LOSS_COMPARISONS = ("losses", "tuned losses")  # the comparisons of losses with each other
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
            from hloss.study.tuning import tuned_runs

            known, unknown = tuned_runs(home, file, text, entry)
        else:
            known, unknown = crossed_runs(home, file, text, entry, entry.get("seeds", text["seeds"])), []
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
        known = ", ".join(there) or "none"
        raise ConfigError(f"study={name!r} is unknown, allowed are {known}{did_you_mean(name, there)}")
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


def crossed_runs(
    home: str, file: Path, text: dict[str, Any], entry: dict[str, Any], seeds: list[int]
) -> list[StudyRun]:
    """The runs of an entry, one per combination of its axes and seed."""
    runs, axes = [], entry.get("cross") or {}
    for values in itertools.product(*axes.values()):
        axis = dict(zip(axes, values, strict=True))
        method = ", ".join([entry["name"], *(f"{k} {short_value(v)}" for k, v in axis.items())])
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


def short_value(value: object) -> str:
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
