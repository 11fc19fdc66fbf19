"""A study: the runs that a YAML file declares.

title: what is asked
extends: other                                  # another study, whose runs these join and whose settings are theirs
include: [one, two]                             # or all runs of other studies, to be reported together
fixed: {dataset: glyphs, iterations: 600}       # settings of every run; cuhk03-{seed}: each seed has a split of its own
seeds: [0, 1]
tuning_seed: 100                                # of the runs that choose settings
resources: {gpus: 1, memory_gb: 8, hours: 2}    # of each run (Resources)
runs:
  - name: histogram                             # the method's name in tables and figures
    comparison: bins                            # the comparison that its runs belong to (default: losses)
    set: {loss: histogram}                      # settings of its runs
    cross: {n_bins: [50, 200]}                  # one run per combination and seed
    seeds: [0]                                  # instead of the study's
    resources: {hours: 6}                       # over the study's
    tune: true                                  # the cross is a grid on tuning_seed; its best setting on validation
                                                # is run with every seed

A run that several comparisons share is run once and belongs to each of them. A run that several studies share is
written to the folder of the study that the others extend or include. `load_study` reads YAML alone; which setting a
grid chose is read from results by `hloss.study.tuning.resolve_tuning`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hloss.losses.settings import did_you_mean
from hloss.runs.config import RunConfig, parse_config
from hloss.runs.errors import ConfigError

STUDIES = Path("workflow/studies")
LOSS_COMPARISONS = ("losses", "tuned losses")  # the comparisons of losses with each other
CHOICE = ": choice"  # suffix of the comparison of the runs of a grid
SPLIT = "-{seed}"  # suffix of the name of a dataset with a split per seed


class Resources(BaseModel):
    """Resources of one run. On this machine only `gpus` is used; a cluster is asked for all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    partition: str = Field("", description="Slurm partition; empty: the cluster's default")
    account: str = Field("", description="Slurm account; empty: the user's default")
    gpus: int = Field(ge=0, description="GPUs of the run; 0: it runs on the CPU. Default: the run's `devices`")
    memory_gb: float = Field(8.0, gt=0, description="main memory of the first attempt, in GiB; a retry asks for more")
    hours: float = Field(4.0, gt=0, description="time limit of the first attempt; a retry asks for more")
    max_memory_gb: float = Field(64.0, gt=0, description="memory of a node: no retry asks for more")
    max_hours: float = Field(24.0, gt=0, description="the partition's time limit: no retry asks for more")

    def memory_mib(self, attempt: int) -> int:
        """Main memory of an attempt (from 1), in MiB: memory_gb × attempt, at most what a node has."""
        return math.ceil(1024 * min(self.memory_gb * attempt, max(self.memory_gb, self.max_memory_gb)))

    def minutes(self, attempt: int) -> int:
        """Time limit of an attempt (from 1), in minutes: hours × attempt, at most the partition's limit."""
        return math.ceil(60 * min(self.hours * attempt, max(self.hours, self.max_hours)))


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        config: its settings.
        resources: what it may use.
        methods: comparison -> the method it is a run of, as in {"bins": "histogram, n_bins 50"}.
        dataset: the dataset of its results: "cuhk03" for cuhk03-1, cuhk03-2, ...
    """

    config: RunConfig
    resources: Resources
    methods: dict[str, str]
    dataset: str

    @property
    def method(self) -> str:
        """The method of its first comparison."""
        return next(iter(self.methods.values()))

    @property
    def name(self) -> str:
        """Its method and seed."""
        return f"{self.method}, seed {self.config.seed}"


@dataclass(frozen=True)
class Entry:
    """The runs of an entry of a study's file.

    Attributes:
        runs: the known runs. Of an entry with `tune`: its grid and, once that has chosen, the runs of every seed.
        waiting: the runs whose settings are not chosen yet, with those of the grid's first run in their place.
        runs_with: the runs of every seed with the settings of a run of the grid; None: there is nothing to choose.
    """

    runs: tuple[StudyRun, ...]
    waiting: tuple[StudyRun, ...] = ()
    runs_with: Callable[[RunConfig], tuple[StudyRun, ...]] | None = None


@dataclass(frozen=True)
class Study:
    """A study: its title, the files that declare it (its own first) and their entries."""

    name: str
    title: str
    files: tuple[Path, ...]
    entries: tuple[Entry, ...]

    @cached_property
    def runs(self) -> tuple[StudyRun, ...]:
        """The known runs, each once."""
        return _merged(run for entry in self.entries for run in entry.runs)

    @cached_property
    def waiting(self) -> tuple[StudyRun, ...]:
        """The runs whose settings are not chosen yet."""
        return tuple(run for entry in self.entries for run in entry.waiting)

    @cached_property
    def order(self) -> dict[tuple[str, str, str], int]:
        """(dataset, comparison, method) -> its position in the study's files."""
        runs = (run for entry in self.entries for run in entry.runs + entry.waiting)
        named = ((run.dataset, *pair) for run in runs for pair in run.methods.items())
        return {key: position for position, key in enumerate(dict.fromkeys(named))}


def _merged(runs: Iterable[StudyRun]) -> tuple[StudyRun, ...]:
    """The runs without repetitions; a repeated run belongs to the comparisons of all of its repetitions."""
    merged: dict[str, StudyRun] = {}
    for run in runs:
        first = merged.setdefault(run.config.run_id, run)
        if first is not run:
            methods = first.methods | run.methods | first.methods  # in this order, and the first name of each
            merged[run.config.run_id] = replace(first, methods=methods)
    return tuple(merged.values())


@dataclass(frozen=True)
class StudyFile:
    """A study's file.

    Attributes:
        path: the file.
        folder: name of the study in whose folder its runs are written: the one that it extends, or its own.
        content: its YAML, with that of the study that it extends.
    """

    path: Path
    folder: str
    content: dict[str, Any]


def load_study(name: str, folder: Path = STUDIES) -> Study:
    """A study as its YAML files declare it. ConfigError names what is unknown or out of range in them."""
    content, files = _read_yaml(name, folder)
    file = StudyFile(files[0], files[-1].stem, content)
    entries: list[Entry] = []
    for included in content.get("include", ()):
        if included == name:
            raise ConfigError(f"{file.path}: a study cannot include itself")
        study = load_study(included, folder)
        files += [path for path in study.files if path not in files]
        entries += study.entries
    entries += [_load_entry(file, entry) for entry in content.get("runs", ())]
    return Study(name, content["title"], tuple(files), tuple(entries))


def _read_yaml(name: str, folder: Path, may_be_combined: bool = True) -> tuple[dict[str, Any], list[Path]]:
    """The content of a study's file merged with that of the study it extends, and the paths of both, its own first.

    may_be_combined: whether the study itself may include or extend others.
    """
    file = folder / f"{name}.yaml"
    if not file.exists():
        known = tuple(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(
            f"study={name!r} is unknown, allowed are {', '.join(known) or 'none'}{did_you_mean(name, known)}"
        )
    content = yaml.safe_load(file.read_text())
    if not may_be_combined and isinstance(content, dict) and {"include", "extends"} & content.keys():
        raise ConfigError(
            f"{file}: made of other studies itself, it cannot be extended; extend one with runs of its own"
        )
    if isinstance(content, dict) and "include" in content:
        _check_keys(file, "a study that includes others", content, {"title", "include"}, set())
    elif isinstance(content, dict) and "extends" in content:
        _check_keys(file, "a study that extends another", content, {"title", "extends", "runs"}, set())
        base, files = _read_yaml(content["extends"], folder, may_be_combined=False)
        return {**base, **content, "runs": [*base["runs"], *content["runs"]]}, [file, *files]
    else:
        _check_keys(file, "the study", content, {"title", "seeds", "runs"}, {"fixed", "resources", "tuning_seed"})
    return content, [file]


def _load_entry(file: StudyFile, entry: dict[str, Any]) -> Entry:
    optional = {"comparison", "cross", "seeds", "resources", "tune"}
    _check_keys(file.path, f"run {entry.get('name')!r}", entry, {"name", "set"}, optional)
    seeds = entry.get("seeds", file.content["seeds"])
    return _tuned_entry(file, entry, seeds) if entry.get("tune") else Entry(_crossed_runs(file, entry, seeds))


def _tuned_entry(file: StudyFile, entry: dict[str, Any], seeds: list[int]) -> Entry:
    """The grid of an entry on the tuning seed, and its runs with a setting of the grid.

    The runs of the grid choose on validation classes, so that they never train on those (`refit`).
    """
    tuning_seed = file.content.get("tuning_seed")
    if tuning_seed is None or tuning_seed in file.content["seeds"]:
        raise ConfigError(
            f"{file.path}, run {entry['name']!r}: tune needs a tuning_seed of the study that is none of seeds"
        )
    comparison = entry.get("comparison", LOSS_COMPARISONS[0])
    choice = {"comparison": f"{comparison}{CHOICE}", "set": entry["set"] | {"refit": False}}
    grid = _crossed_runs(file, entry | choice, [tuning_seed])

    def runs_with(chosen: RunConfig) -> tuple[StudyRun, ...]:
        settings = entry["set"] | {axis: getattr(chosen, axis) for axis in entry["cross"]}
        return _crossed_runs(file, entry | {"set": settings, "cross": {}}, seeds)

    return Entry(grid, runs_with(grid[0].config), runs_with)


def _crossed_runs(file: StudyFile, entry: dict[str, Any], seeds: Sequence[int]) -> tuple[StudyRun, ...]:
    """The runs of an entry, one per combination of its axes and seed."""
    axes = entry.get("cross") or {}
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return tuple(_study_run(file, entry, combination, seed) for combination in combinations for seed in seeds)


def _study_run(file: StudyFile, entry: dict[str, Any], combination: dict[str, Any], seed: int) -> StudyRun:
    """The run of an entry with these values of its axes."""
    method = ", ".join([entry["name"], *(f"{axis} {short_value(value)}" for axis, value in combination.items())])
    settings = {**(file.content.get("fixed") or {}), **entry["set"], **combination, "seed": seed, "study": file.folder}
    dataset = str(settings.get("dataset", ""))
    if dataset.endswith(SPLIT):
        settings["dataset"] = dataset.removesuffix(SPLIT) + f"-{seed}"
    try:
        config = parse_config(settings)
    except ConfigError as error:
        raise ConfigError(f"{file.path}, {method}: {error}") from None
    resources = _checked_resources(file.path, method, config, file.content.get("resources"), entry.get("resources"))
    methods = {entry.get("comparison", LOSS_COMPARISONS[0]): method}
    return StudyRun(config, resources, methods, dataset.removesuffix(SPLIT) or config.dataset)


def _checked_resources(file: Path, method: str, config: RunConfig, *mappings: dict[str, Any] | None) -> Resources:
    """The resources of a run, later mappings over earlier ones."""
    settings: dict[str, Any] = {"gpus": 0 if config.device == "cpu" else config.devices}
    for mapping in mappings:
        _check_keys(file, "resources", mapping or {}, set(), set(Resources.model_fields))
        settings |= mapping or {}
    try:
        resources = Resources(**settings)
    except ValidationError as error:
        problems = (f"resources {e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{file}, {method}: {'; '.join(problems)}") from None
    allowed = {"cpu": (0,), "cuda": (config.devices,), "auto": (0, config.devices)}[config.device]
    if resources.gpus not in allowed:
        raise ConfigError(
            f"{file}, {method}: resources gpus={resources.gpus}, but a run with device={config.device!r} and "
            f"devices={config.devices} takes {' or '.join(map(str, allowed))}"
        )
    return resources


def short_value(value: object) -> str:
    """A value as the names of methods show it: 50 for 50.0."""
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
