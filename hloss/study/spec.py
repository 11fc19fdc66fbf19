"""Load a study: the runs that a YAML file in workflow/studies declares.

A file looks like this::

    title: title of the report
    extends: other                                # add runs to another study, with its fixed settings and seeds
    include: [one, two]                           # or report all runs of other studies together
    fixed: {dataset: glyphs, iterations: 600}     # settings of every run; dataset: cuhk03-{seed} is one split per seed
    seeds: [0, 1]                                 # one run per seed
    tuning_seed: 100                              # seed of the runs that choose settings
    part_of: sample                               # write the table to reports/sample/parts, the runs to runs/sample
    resources: {gpus: 1, memory_gb: 8, hours: 2}  # resources of each run (Resources)
    runs:
      - name: histogram                           # name of the method in tables and figures
        comparison: bins                          # comparison of the method (default: losses)
        set: {loss: histogram}                    # settings of its runs
        cross: {n_bins: [50, 200]}                # one run per combination and seed
        seeds: [0]                                # replaces the seeds of the study
        resources: {hours: 6}                     # replaces resources of the study
        tune: true                                # the combinations are a grid that is run with tuning_seed; the best
                                                  # on the validation classes is run with every seed; a grid
                                                  # whose best is at an edge is extended (hloss.study.tuning)

A run that belongs to several comparisons is run once. A run is left out if a longer run with the same settings reports
at its length (`report_at`): the result of the longer run at this length is used. A grid chooses at each length, so a
tuned method can have other settings after 200 iterations than after 2,000. A run of several studies is written to the
folder of the study that the others extend or include. `load_study` reads only the YAML files;
`hloss.study.tuning.resolve_tuning` reads from results which settings a grid chose.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hloss.names import did_you_mean
from hloss.runs.checkpoints import read_status
from hloss.runs.config import BEST, LAST, RunConfig, parse_config
from hloss.runs.errors import ConfigError, GPUMemoryError
from hloss.study.devices import SLOTS
from hloss.study.input_files import checked, read_yaml, shown

STUDIES = Path("workflow/studies")
LOSS_COMPARISONS = ("losses", "tuned losses")  # comparisons between losses
DIFFICULTY = "difficulty"  # comparison of datasets of different difficulty; no claim is judged by it
CHOICE = ": choice"  # suffix of the comparison that contains the runs of a grid
SMALL_NETWORKS = ("glyphnet", "pixels")  # with few multiplications: a run leaves most of a GPU idle
EXTENDED = ", extended"  # before CHOICE: the runs that were added to a grid
INITIAL = ", initial grid"  # suffix of the comparison with the settings that a grid had chosen before it was extended
OF_TUNING = (CHOICE, INITIAL)  # endings of comparisons that only show how settings were chosen
OF_THE_FILE = {  # settings of a run that follow from the study's file -> the key to use instead
    "seed": "list it in `seeds`",
    "study": "rename the study's file, or use `part_of`",
}
SPLIT = "-{seed}"  # suffix of the name of a dataset with one split per seed
Values = Annotated[list[Any], Field(min_length=1)]
Seeds = Annotated[list[int], Field(min_length=1)]


class _Strict(BaseModel):
    """Settings of a study's file or of a part of it, which `hloss.study.input_files.checked` checks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _OwnRuns(_Strict):
    """The file of a study that neither includes nor extends others."""

    title: str
    seeds: Seeds
    runs: Values
    fixed: dict[str, Any] | None = None
    resources: dict[str, Any] | None = None
    tuning_seed: int | None = None
    part_of: str = ""


class _Including(_Strict):
    """The file of a study that includes others."""

    title: str
    include: Annotated[list[str], Field(min_length=1)]


class _Extending(_Strict):
    """The file of a study that extends another."""

    title: str
    extends: str
    runs: list[Any]


class _Runs(_Strict):
    """An entry of `runs`."""

    name: str
    set: dict[str, Any]
    comparison: str = LOSS_COMPARISONS[0]
    cross: dict[str, Values] | None = None
    seeds: Seeds | None = None
    resources: dict[str, Any] | None = None
    tune: bool = False


class Resources(_Strict):
    """Resources of one run. A cluster uses all of them, this machine only `gpus` and `runs_per_gpu`."""

    partition: str = Field("", description="Slurm partition; empty: the cluster's default")
    account: str = Field("", description="Slurm account; empty: the user's default")
    gpus: int = Field(ge=0, description="GPUs of the run; 0: it runs on the CPU. Default: the run's `devices`")
    runs_per_gpu: Literal[1, 2, 4, 8, 16] = Field(
        1, description=f"runs that may share a GPU. Default: {SLOTS} for {' and '.join(SMALL_NETWORKS)}, else 1"
    )
    gpu_parts: str = Field(
        "",
        description="Slurm's generic resource for a part of a GPU, and the parts of each GPU: shard:16 or mps:100. "
        "Empty: the cluster has none, and a run gets whole GPUs",
    )
    memory_gb: float = Field(8.0, gt=0, description="main memory of the first attempt, in GiB; a retry asks for more")
    hours: float = Field(4.0, gt=0, description="time limit of the first attempt; a retry asks for more")
    max_memory_gb: float = Field(64.0, gt=0, description="memory of a node: no retry asks for more")
    max_hours: float = Field(24.0, gt=0, description="the partition's time limit: no retry asks for more")

    @field_validator("gpu_parts")
    @classmethod
    def _check_parts(cls, value: str) -> str:
        if not re.fullmatch(r"(\w+:[1-9]\d*)?", value):
            raise ValueError("must be a name and a number, such as 'shard:16', or ''")
        return value

    def gpu_slots(self, alone: bool) -> int:
        """Number of slots of this machine's GPUs that the run takes; a whole GPU has `SLOTS`.

        Args:
            alone: the run shares no GPU.
        """
        return self.gpus * SLOTS // (1 if alone else self.runs_per_gpu)

    def slurm_gpus(self, alone: bool) -> tuple[int, str]:
        """Resources of a Slurm job: whole GPUs, or parts of a GPU.

        Args:
            alone: as in `gpu_slots`.

        Returns:
            Number of whole GPUs and "", or 0 and the generic resource, as in "shard:2".
        """
        if alone or self.runs_per_gpu == 1 or not (self.gpus and self.gpu_parts):
            return self.gpus, ""
        name, _, parts = self.gpu_parts.partition(":")
        return 0, f"{name}:{max(int(parts) // self.runs_per_gpu, 1)}"

    def memory_mib(self, attempt: int) -> int:
        """Main memory of an attempt in MiB: memory_gb × attempt, at most max_memory_gb.

        Args:
            attempt: number of the attempt, from 1.
        """
        return math.ceil(1024 * min(self.memory_gb * attempt, max(self.memory_gb, self.max_memory_gb)))

    def minutes(self, attempt: int) -> int:
        """Time limit of an attempt in minutes: hours × attempt, at most max_hours.

        Args:
            attempt: number of the attempt, from 1.
        """
        return math.ceil(60 * min(self.hours * attempt, max(self.hours, self.max_hours)))


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        config: settings.
        resources: requested resources.
        methods: comparison -> method, as in {"bins": "histogram, n_bins 50"}.
        dataset: name of the dataset in results: "cuhk03" for cuhk03-1, cuhk03-2, ...
        only_at: comparison -> lengths at which the run belongs to it; a comparison that is missing has all lengths.
    """

    config: RunConfig
    resources: Resources
    methods: dict[str, str]
    dataset: str
    only_at: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def lengths_in(self, comparison: str) -> tuple[int, ...]:
        """Lengths at which the run belongs to a comparison, in iterations.

        Args:
            comparison: name of the comparison.
        """
        return self.only_at.get(comparison, self.config.lengths)

    @property
    def method(self) -> str:
        """The method of its first comparison."""
        return next(iter(self.methods.values()))

    @property
    def name(self) -> str:
        """Its method and seed."""
        return f"{self.method}, seed {self.config.seed}"

    def needs_own_gpu(self) -> bool:
        """Whether its last attempt ran out of GPU memory, so that the next one gets a GPU of its own."""
        status = read_status(self.config.folder) or {}
        return status.get("message", "").startswith(GPUMemoryError.__name__)


@dataclass(frozen=True)
class Grid:
    """The grid of an entry with `tune`.

    Attributes:
        axes: values of each setting in the file.
        runs_on: returns the runs of a grid with these axes, in the comparison with this suffix.
        runs_with: returns the runs of every seed for the chosen run of the grid at each length, in the comparison with
            this suffix.
    """

    axes: dict[str, list[Any]]
    runs_on: Callable[[dict[str, list[Any]], str], tuple[StudyRun, ...]]
    runs_with: Callable[[Mapping[int, RunConfig], str], tuple[StudyRun, ...]]


@dataclass(frozen=True)
class Entry:
    """The runs of an entry of a study's file.

    Attributes:
        runs: known runs. An entry with `tune` has the runs of its grid and, after the choice, those of every seed.
        waiting: runs whose settings are not chosen; they have the settings of the grid's first run as placeholders.
        grid: the grid of an entry with `tune`; None: nothing to choose.
    """

    runs: tuple[StudyRun, ...]
    waiting: tuple[StudyRun, ...] = ()
    grid: Grid | None = None


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: name of its file without .yaml.
        title: title of its report.
        files: files that declare it, its own first.
        entries: entries of these files.
        part_of: name of the folder in reports that gets the table as a part; "": none.
    """

    name: str
    title: str
    files: tuple[Path, ...]
    entries: tuple[Entry, ...]
    part_of: str = ""

    @cached_property
    def runs(self) -> tuple[StudyRun, ...]:
        """The known runs without repetitions."""
        return _merged(run for entry in self.entries for run in entry.runs)

    @cached_property
    def waiting(self) -> tuple[StudyRun, ...]:
        """The runs whose settings are not chosen."""
        return tuple(run for entry in self.entries for run in entry.waiting)

    @cached_property
    def order(self) -> dict[tuple[str, str, str], int]:
        """(dataset, comparison, method) -> its position in the study's files."""
        runs = (run for entry in self.entries for run in entry.runs + entry.waiting)
        named = ((run.dataset, *pair) for run in runs for pair in run.methods.items())
        return {key: position for position, key in enumerate(dict.fromkeys(named))}


def _merged(runs: Iterable[StudyRun]) -> tuple[StudyRun, ...]:
    """The runs without repetitions; a repeated run belongs to the comparisons of all of its repetitions."""
    given, merged = list(runs), dict[str, StudyRun]()
    same_settings = defaultdict(list)
    for run in given:
        same_settings[_settings_without_length(run.config)].append(run)
    for run in given:
        moved = _moved(run, same_settings[_settings_without_length(run.config)])
        first = merged.setdefault(moved.config.run_id, moved)
        if first is not moved:
            merged[moved.config.run_id] = _joined(first, moved)
    return tuple(merged.values())


def _settings_without_length(config: RunConfig) -> str:
    settings = config.resolved()
    return repr(sorted((name, settings[name]) for name in settings.keys() - {"iterations", "report_at"}))


def _moved(run: StudyRun, others: list[StudyRun]) -> StudyRun:
    """The longest run that reports at all lengths of `run`, with the comparisons of `run`.

    A run of a grid stays as it is: its entry reads its result by its run id.
    """
    if any(name.endswith(CHOICE) for name in run.methods):
        return run
    lengths = set(run.config.lengths)
    longer = max(
        (other for other in others if lengths <= set(other.config.lengths)),
        key=lambda other: (other.config.iterations, len(other.config.lengths)),
    )
    return _only_at(replace(longer, methods=run.methods), {name: run.lengths_in(name) for name in run.methods})


def _joined(first: StudyRun, again: StudyRun) -> StudyRun:
    """One run for two with the same settings; comparisons in this order, each with its first method."""
    methods = first.methods | again.methods | first.methods
    lengths = {
        name: tuple(sorted({n for run in (first, again) if name in run.methods for n in run.lengths_in(name)}))
        for name in methods
    }
    return _only_at(replace(first, methods=methods), lengths)


def _only_at(run: StudyRun, lengths: dict[str, tuple[int, ...]]) -> StudyRun:
    return replace(run, only_at={name: at for name, at in lengths.items() if at != run.config.lengths})


@dataclass(frozen=True)
class StudyFile:
    """A study's file.

    Attributes:
        path: the file.
        folder: name of the study whose folder gets the runs: that of `part_of`, the extended study, or the study
            itself.
        content: content of the file, merged with that of the extended study.
    """

    path: Path
    folder: str
    content: dict[str, Any]


def load_study(name: str, folder: Path = STUDIES) -> Study:
    """Load a study from its YAML files.

    Args:
        name: name of the file without .yaml.
        folder: folder with the files of all studies.

    Returns:
        The study; settings to be chosen by a grid are open.

    Raises:
        ConfigError: if the study or a setting is unknown or out of range, or a method has two settings in a
            comparison; the message names the file and the run.
    """
    study = _load(name, folder, ())
    _refuse_ambiguous(study)
    return study


def _refuse_ambiguous(study: Study) -> None:
    """Refuse a method that has two settings in one comparison, because their results would be mixed."""
    first: dict[tuple[Any, ...], StudyRun] = {}
    for run in study.runs:
        for comparison, method in run.methods.items():
            for length in run.lengths_in(comparison):
                other = first.setdefault((run.dataset, comparison, method, run.config.seed, length), run)
                if other is not run:
                    raise ConfigError(
                        f"{study.files[0]}: method {method!r} of the comparison {comparison!r} must have one value of "
                        f"each setting: got {_differing(other, run)}; give the entries different names"
                    )


def _differing(a: StudyRun, b: StudyRun) -> str:
    """The first setting in which two runs differ, with both values."""
    first, second = a.config.resolved(), b.config.resolved()
    name = next(name for name in first | second if first.get(name) != second.get(name))
    return f"{name}={shown(first.get(name))} and {name}={shown(second.get(name))}"


def _load(name: str, folder: Path, including: tuple[str, ...]) -> Study:
    """Load a study that the studies in `including` include, the outermost first."""
    where = f"{folder / including[-1]}.yaml: include: " if including else ""
    content, files = _read_yaml(name, folder, where)
    file = StudyFile(files[0], content.get("part_of", files[-1].stem), content)
    entries: list[Entry] = []
    for included in content.get("include", ()):
        if included in (*including, name):
            circle = " -> ".join((*including, name, included))
            raise ConfigError(f"{file.path}: include must not lead back to the same study: got {circle}; remove one")
        study = _load(included, folder, (*including, name))
        files += [path for path in study.files if path not in files]
        entries += study.entries
    entries += [_load_entry(file, entry, number) for number, entry in enumerate(content.get("runs", ()), start=1)]
    return Study(name, content["title"], tuple(files), tuple(entries), content.get("part_of", ""))


def _read_yaml(name: str, folder: Path, where: str, may_be_combined: bool = True) -> tuple[dict[str, Any], list[Path]]:
    """The content of a study's file, merged with that of the extended study, and the paths of both, its own first.

    where: beginning of the error for an unknown study.
    may_be_combined: whether the study may include or extend others.
    """
    file = folder / f"{name}.yaml"
    if not file.exists() or file.parent != folder:
        known = tuple(sorted(path.stem for path in folder.glob("*.yaml")))
        if not known:
            raise ConfigError(f"{folder} has no study: run the command in the root folder of the project")
        raise ConfigError(
            f"{where}study is unknown: got {name!r}; allowed are {', '.join(known)}"
            f"{did_you_mean(Path(name).stem, known)}"
        )
    content = read_yaml(file)
    keys = content.keys() if isinstance(content, dict) else set()
    if not may_be_combined and {"include", "extends"} & keys:
        raise ConfigError(
            f"{file}: a study that includes or extends others cannot be extended; extend a study with only its own runs"
        )
    if "extends" not in keys or "include" in keys:
        checked(_Including if "include" in keys else _OwnRuns, content, str(file))
        return content, [file]
    checked(_Extending, content, str(file))
    base, files = _read_yaml(content["extends"], folder, f"{file}: extends: ", may_be_combined=False)
    return {**base, **content, "runs": [*base["runs"], *content["runs"]]}, [file, *files]


def _load_entry(file: StudyFile, entry: Any, number: int) -> Entry:
    name = entry.get("name", number) if isinstance(entry, dict) else number
    checked(_Runs, entry, f"{file.path}, run {shown(name)}")
    if both := entry["set"].keys() & (entry.get("cross") or {}).keys():
        raise ConfigError(
            f"{file.path}, run {entry['name']!r}: {both.pop()} must be in set or in cross: got both; remove one of them"
        )
    seeds = entry.get("seeds") or file.content["seeds"]
    return _tuned_entry(file, entry, seeds) if entry.get("tune") else Entry(_crossed_runs(file, entry, seeds))


def _tuned_entry(file: StudyFile, entry: dict[str, Any], seeds: list[int]) -> Entry:
    """The grid of an entry with the tuning seed, and its runs with the chosen settings.

    Settings that are chosen at some lengths only are run for the longest of these lengths. The runs of the grid choose
    on the validation classes, so they never train on them: `refit` is False.
    """
    tuning_seed = file.content.get("tuning_seed")
    if tuning_seed is None or tuning_seed in file.content["seeds"]:
        raise ConfigError(
            f"{file.path}, run {entry['name']!r}: tune needs a tuning_seed that is not one of seeds: got "
            f"{shown(tuning_seed)}; add the line `tuning_seed: NUMBER` to the study"
        )
    if not entry.get("cross"):
        raise ConfigError(
            f"{file.path}, run {entry['name']!r}: tune chooses among the values of cross: got none; add cross, or "
            "remove tune"
        )
    if wrong := {"iterations", "report_at"} & entry["cross"].keys():
        raise ConfigError(
            f"{file.path}, run {entry['name']!r}: a grid cannot choose {wrong.pop()}, because it chooses at each "
            "length; move it to set, or remove tune"
        )
    comparison = entry.get("comparison", LOSS_COMPARISONS[0])

    def runs_on(axes: dict[str, list[Any]], suffix: str) -> tuple[StudyRun, ...]:
        settings = {"comparison": comparison + suffix, "set": entry["set"] | {"refit": False}, "cross": axes}
        return _crossed_runs(file, entry | settings, [tuning_seed])

    def runs_with(chosen: Mapping[int, RunConfig], suffix: str) -> tuple[StudyRun, ...]:
        runs: list[StudyRun] = []
        for config in dict.fromkeys(config.run_id for config in chosen.values()):
            lengths = [length for length, other in chosen.items() if other.run_id == config]
            axes = {axis: getattr(chosen[lengths[0]], axis) for axis in entry["cross"]}
            until = {} if len(lengths) == len(chosen) else {"iterations": max(lengths), "report_at": lengths}
            settings = {"comparison": comparison + suffix, "set": entry["set"] | axes | until, "cross": {}}
            runs += _crossed_runs(file, entry | settings, seeds)
        return tuple(runs)

    first = runs_on(entry["cross"], CHOICE)
    if LAST in {run.config.choose for run in first}:
        raise ConfigError(
            f"{file.path}, run {entry['name']!r}: tune does not fit choose={LAST!r}, because a run without validation "
            f"gives nothing to choose by; set choose to {BEST!r}, or remove tune"
        )
    waiting = runs_with(dict.fromkeys(first[0].config.lengths, first[0].config), "")
    return Entry(first, waiting, Grid(entry["cross"], runs_on, runs_with))


def _crossed_runs(file: StudyFile, entry: dict[str, Any], seeds: Sequence[int]) -> tuple[StudyRun, ...]:
    """The runs of an entry, one per combination of its axes and seed."""
    axes = entry.get("cross") or {}
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return tuple(_study_run(file, entry, combination, seed) for combination in combinations for seed in seeds)


def _study_run(file: StudyFile, entry: dict[str, Any], combination: dict[str, Any], seed: int) -> StudyRun:
    """The run of an entry with these values of its axes."""
    method = ", ".join([entry["name"], *(f"{axis} {short_value(value)}" for axis, value in combination.items())])
    settings = {**(file.content.get("fixed") or {}), **entry["set"], **combination}
    if wrong := OF_THE_FILE.keys() & settings.keys():
        name = wrong.pop()
        raise ConfigError(
            f"{file.path}, {method}: fixed, set and cross cannot have {name}: got {shown(settings[name])}; remove it "
            f"and {OF_THE_FILE[name]}"
        )
    settings |= {"seed": seed, "study": file.folder}
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
    """The resources of a run; later mappings replace values of earlier ones."""
    small = config.network in SMALL_NETWORKS and config.devices == 1
    settings: dict[str, Any] = {
        "gpus": 0 if config.device == "cpu" else config.devices,
        "runs_per_gpu": SLOTS if small else 1,
    }
    for mapping in mappings:
        settings |= mapping or {}
    resources = checked(Resources, settings, f"{file}, {method}", "resources.")
    allowed = {"cpu": (0,), "cuda": (config.devices,), "auto": (0, config.devices)}[config.device]
    if resources.gpus not in allowed:
        raise ConfigError(
            f"{file}, {method}: resources gpus does not fit the run: got {resources.gpus}; with "
            f"device={config.device!r} and devices={config.devices} allowed are {' or '.join(map(str, allowed))}"
        )
    if resources.gpus > 1 and resources.runs_per_gpu > 1:
        raise ConfigError(
            f"{file}, {method}: a run on several GPUs shares none: got runs_per_gpu={resources.runs_per_gpu} with "
            f"gpus={resources.gpus}; set runs_per_gpu to 1"
        )
    return resources


def short_value(value: object) -> str:
    """A value as text for names of methods: 50 for 50.0.

    Args:
        value: value of a setting.
    """
    return f"{value:g}" if isinstance(value, float) else str(value)
