"""A study: the runs a YAML file crosses, and their results as one table.

title: what is asked
fixed: {dataset: glyphs, iterations: 600}       # settings of every run
seeds: [0, 1]
resources: {gpus: 1, memory_gb: 8, hours: 2}    # what a run may use (Resources)
runs:
  - name: histogram                             # the method's name in tables and figures
    set: {loss: histogram}                      # settings of its runs
    cross: {n_bins: [50, 200]}                  # one run per combination and seed
    seeds: [0]                                  # instead of the study's
    resources: {hours: 6}                       # over the study's
"""

import difflib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hloss.experiment import ConfigError, RunConfig, parse_config, read_result

STUDIES = Path("workflow/studies")


class Resources(BaseModel):
    """What one run may use. On one machine the GPUs alone matter; a cluster is asked for all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    partition: str = Field("", description="Slurm partition; empty: the cluster's default")
    account: str = Field("", description="Slurm account; empty: the user's default")
    gpus: int = Field(ge=0, description="GPUs of the run's own; 0: it runs on the CPU. Default: the run's `devices`")
    memory_gb: float = Field(8.0, gt=0, description="main memory of the first attempt, in GiB; a retry asks for more")
    hours: float = Field(4.0, gt=0, description="time limit of the first attempt; a retry asks for more")
    max_hours: float = Field(24.0, gt=0, description="the partition's time limit: no attempt asks for more")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, the method it belongs to ("histogram, n_bins 50"), and what it may use."""

    method: str
    config: RunConfig
    resources: Resources

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.config.seed}"


@dataclass(frozen=True)
class Study:
    """A study's title and runs, in the order of its file."""

    name: str
    title: str
    runs: tuple[StudyRun, ...]


def load_study(name: str, folder: Path = STUDIES) -> Study:
    """Read and check a study: ConfigError names whatever is unknown or out of range in it."""
    file = folder / f"{name}.yaml"
    if not file.exists():
        there = sorted(p.stem for p in folder.glob("*.yaml"))
        near = difflib.get_close_matches(name, there, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"study={name!r} is unknown, allowed are {', '.join(there) or 'none'}{hint}")
    text = yaml.safe_load(file.read_text())
    _check_keys(file, "the study", text, {"title", "seeds", "runs"}, {"fixed", "resources"})
    runs: dict[str, StudyRun] = {}
    for entry in text["runs"]:
        _check_keys(file, f"run {entry.get('name')!r}", entry, {"name", "set"}, {"cross", "seeds", "resources"})
        axes = entry.get("cross") or {}
        for values in itertools.product(*axes.values()):
            axis = dict(zip(axes, values, strict=True))
            method = ", ".join([entry["name"], *(f"{k} {_short(v)}" for k, v in axis.items())])
            for seed in entry.get("seeds", text["seeds"]):
                settings = {**(text.get("fixed") or {}), **entry["set"], **axis, "seed": seed, "study": name}
                try:
                    config = parse_config(settings)
                except ConfigError as error:
                    raise ConfigError(f"{file}, {method}: {error}") from None
                resources = _resources(file, method, config, text.get("resources"), entry.get("resources"))
                runs.setdefault(config.run_id, StudyRun(method, config, resources))
    return Study(name, text["title"], tuple(runs.values()))


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


def _short(value: object) -> str:
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


def stale_runs(study: Study, expected: dict[str, str]) -> list[StudyRun]:
    """Finished runs that other code or other data made."""
    results = ((run, read_result(run.config.folder)) for run in study.runs)
    return [run for run, result in results if result and result["fingerprint"] != expected]


def collect(study: Study, keep: bool = False) -> pd.DataFrame:
    """One row per run of the study. Refuses runs made by different code or data, unless `keep` says to mix them."""
    rows = []
    for run in study.runs:
        result = read_result(run.config.folder)
        if result is None:
            raise ConfigError(f"{run.name} has no result in {run.config.folder}; run the study first")
        history = pd.read_parquet(run.config.folder / "history.parquet")
        rows.append(_row(study, run, result, history))
    table = pd.DataFrame(rows)
    made_by = table[["code_sha256", "card_sha256"]].drop_duplicates()
    if len(made_by.groupby("card_sha256")) > table.dataset.nunique() or (table.code_sha256.nunique() > 1 and not keep):
        raise ConfigError(
            f"the runs of study {study.name!r} were made by {table.code_sha256.nunique()} versions of the code and "
            f"{table.card_sha256.nunique()} of the data; run the study again, or mix them knowingly with KEEP=1"
        )
    return table


def _row(study: Study, run: StudyRun, result: dict[str, Any], history: pd.DataFrame) -> dict[str, Any]:
    validated = history.dropna() if len(history) else pd.DataFrame({"iteration": [], "validation_recall@1": []})
    density = result["similarity_density"]
    return {
        "study": study.name,
        "title": study.title,
        "method": run.method,
        "run_id": result["run_id"],
        **{name: result["config"].get(name) for name in ("dataset", "loss", "network", "n_bins", "C", "iterations")},
        "seed": run.config.seed,
        **result["metrics"],
        "validation_recall@1": result["validation_recall@1"],
        "chosen_iteration": result["chosen"]["iteration"],
        "chosen_how": result["chosen"]["how"],
        "protocol": result["protocol"],
        "n_queries": result["n_queries"],
        "training_seconds": result["training_seconds"],
        "history_iteration": validated["iteration"].astype(int).tolist(),
        "history_recall": validated["validation_recall@1"].tolist(),
        "history_loss": history["loss"].tolist() if len(history) else [],
        "nodes": density["after"]["nodes"],
        **{f"{sign}_{when}": density[when][sign] for sign in ("positive", "negative") for when in ("before", "after")},
        "panel": json.dumps(result["panel"]),
        **result["fingerprint"],
        "git_commit": result["provenance"]["git_commit"],
        "torch": result["provenance"]["packages"]["torch"],
    }
