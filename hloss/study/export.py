"""Export the results of a study to TensorBoard, MLflow or CSV files.

`python -m hloss.study.export STUDY --to tensorboard|mlflow|csv [--out FOLDER]` reads the runs that are complete.
TensorBoard and MLflow come with the extra `export` and are imported only here: no run depends on them.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from hloss.runs.errors import ConfigError, RunError
from hloss.runs.files import read_result
from hloss.study.results import read_history
from hloss.study.spec import Study, StudyRun, load_study
from hloss.study.tuning import resolve_tuning

MOST_VALUES = 1000  # values in one request to MLflow
MOST_LETTERS = 500  # characters of a setting in MLflow


class ExportedRun(NamedTuple):
    """A complete run.

    Attributes:
        run_id: id of the run.
        name: its methods, dataset and seed as text.
        settings: the settings of the run.
        metrics: test metrics as fractions, with `validation_recall@1` and `training_seconds`.
        history: one row per iteration: `iteration`, and numbers that are NaN where nothing was measured.
    """

    run_id: str
    name: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    history: pd.DataFrame

    def series(self) -> Iterator[tuple[str, pd.Series]]:
        """Yield the name of each measured number and its values, indexed by iteration."""
        if len(self.history):
            numbers = self.history.set_index("iteration").select_dtypes("number")
            for name in numbers:
                yield str(name), numbers[name].dropna()


class Exported(NamedTuple):
    """The exported data of a study: its name, its complete runs, and its figures (PNG files)."""

    study: str
    runs: list[ExportedRun]
    figures: list[Path]


def exported_runs(study: Study) -> list[ExportedRun]:
    """Read the complete runs of a study.

    Args:
        study: with its tuning resolved.

    Returns:
        The complete runs in the order of the study.

    Raises:
        ConfigError: no run is complete.
    """
    found = [(run, result) for run in study.runs if (result := read_result(run.config.folder))]
    if not found:
        raise ConfigError(f"study {study.name!r} has no result; run `make study STUDY={study.name}` first")
    return [_exported(run, result) for run, result in found]


def _exported(run: StudyRun, result: dict[str, Any]) -> ExportedRun:
    methods = " / ".join(dict.fromkeys(run.methods.values()))
    measured = {name: result[name] for name in ("validation_recall@1", "training_seconds")}
    metrics = {**result["metrics"], **measured}
    return ExportedRun(
        result["run_id"],
        f"{methods}, {run.config.dataset}, seed {run.config.seed}",
        result["config"],
        {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)},
        read_history(run.config.folder),
    )


def study_figures(study: str) -> list[Path]:
    """List the figures (PNG) that the reports of a study saved, sorted by name.

    Args:
        study: name of the study.
    """
    return sorted((Path("reports") / study).rglob("*.png"))


def export_csv(exported: Exported, out: Path) -> None:
    """Write runs.csv, one row per run with settings and metrics, and history.csv, one row per run and iteration.

    Args:
        exported: runs to export; the figures are not copied.
        out: an existing folder.
    """
    runs = exported.runs
    table = [{"run_id": run.run_id, "name": run.name, **run.settings, **run.metrics} for run in runs]
    pd.DataFrame(table).to_csv(out / "runs.csv", index=False)
    histories = [run.history.assign(run_id=run.run_id) for run in runs if len(run.history)]
    none = pd.DataFrame(columns=["run_id", "iteration"])
    history = pd.concat(histories) if histories else none
    history.set_index(["run_id", "iteration"]).to_csv(out / "history.csv")


def export_tensorboard(exported: Exported, out: Path) -> None:
    """Write one event folder per run, with its scalars and its settings as hyperparameters, and one with the figures.

    Args:
        exported: runs and figures to export.
        out: an existing folder, for `tensorboard --logdir`.
    """
    from torch.utils.tensorboard import SummaryWriter

    for run in exported.runs:
        folder = f"{run.name} ({run.run_id})".replace("/", "-")
        with SummaryWriter(str(out / folder)) as writer:
            for name, values in run.series():
                for iteration, value in values.items():
                    writer.add_scalar(name, value, iteration)
            settings = {name: _hyperparameter(value) for name, value in run.settings.items()}
            metrics = {f"test/{name}": value for name, value in run.metrics.items()}
            writer.add_hparams(settings, metrics, run_name=".")
    if exported.figures:
        with SummaryWriter(str(out / "figures")) as writer:
            for file in exported.figures:
                writer.add_image(file.stem, np.asarray(Image.open(file).convert("RGB")), dataformats="HWC")


def _hyperparameter(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def export_mlflow(exported: Exported, out: Path) -> None:
    """Write an MLflow store: mlflow.db (SQLite) and a folder of artifacts. The experiment is named as the study.

    Args:
        exported: runs and figures to export; the figures are artifacts of a run named "figures".
        out: an existing folder. `mlflow ui --backend-store-uri sqlite:///OUT/mlflow.db` shows it.
    """
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{(out / 'mlflow.db').resolve()}")
    experiment = client.create_experiment(exported.study, artifact_location=(out / "artifacts").resolve().as_uri())
    for run in exported.runs:
        created = client.create_run(experiment, run_name=run.name, tags={"run_id": run.run_id}).info.run_id
        settings = [Param(name, str(value)[:MOST_LETTERS]) for name, value in run.settings.items()]
        scalars = [
            Metric(_mlflow_name(name), float(value), 0, int(iteration))
            for name, values in run.series()
            for iteration, value in values.items()
        ]
        scalars += [Metric(_mlflow_name(f"test/{name}"), value, 0, 0) for name, value in run.metrics.items()]
        client.log_batch(created, params=settings)
        for start in range(0, len(scalars), MOST_VALUES):
            client.log_batch(created, metrics=scalars[start : start + MOST_VALUES])
        client.set_terminated(created)
    if exported.figures:
        created = client.create_run(experiment, run_name="figures").info.run_id
        for file in exported.figures:
            client.log_artifact(created, str(file))
        client.set_terminated(created)


def _mlflow_name(name: str) -> str:
    """A name without @, which MLflow does not allow."""
    return name.replace("@", "_at_")


EXPORTS: dict[str, Callable[[Exported, Path], None]] = {
    "tensorboard": export_tensorboard,
    "mlflow": export_mlflow,
    "csv": export_csv,
}


def export(study: Study, to: str, out: Path) -> int:
    """Export the complete runs of a study.

    Args:
        study: with its tuning resolved.
        to: "tensorboard", "mlflow" or "csv".
        out: folder to write; it must be empty or missing.

    Returns:
        Number of runs exported.

    Raises:
        ConfigError: no run is complete, `out` is not an empty folder, or the package of `to` is not installed.
    """
    runs = exported_runs(study)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder; remove it, or choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        EXPORTS[to](Exported(study.name, runs, study_figures(study.name)), out)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--to {to} needs the package {error.name}; pip install 'hloss[export]'") from error
    return len(runs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Execute the command line.

    Args:
        arguments: the arguments; None for those of the process.

    Raises:
        SystemExit: the arguments are invalid, or `export` refuses; the message says why.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hloss.study.export", description="Export the complete runs of a study to other tools."
    )
    parser.add_argument("study", metavar="STUDY", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("--to", choices=list(EXPORTS), required=True, help="format of the export")
    parser.add_argument("--out", type=Path, help="folder to write (default: reports/STUDY/TO)")
    options = parser.parse_args(arguments)
    out = options.out or Path("reports") / options.study / options.to
    try:
        n_runs = export(resolve_tuning(load_study(options.study)), options.to, out)
    except (ConfigError, RunError) as error:
        sys.exit(f"study {options.study}: {error}")
    print(f"{n_runs} runs of {options.study} exported to {out}")


if __name__ == "__main__":
    main()
