"""Exports to TensorBoard, MLflow and CSV files, read back by the readers of those tools."""

import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hloss.runs.errors import ConfigError
from hloss.runs.run import run
from hloss.study.export import export, exported_runs, main


@pytest.fixture
def complete(study, monkeypatch, tmp_path):
    """A study of which two runs, one of them trained, are complete, and which has one figure."""
    loaded = study.load()
    trained = next(r for r in loaded.runs if r.config.iterations)
    untrained = next(r for r in loaded.runs if not r.config.iterations)
    for one in (trained, untrained):
        run(one.config, lambda line: None)
    monkeypatch.chdir(tmp_path)
    figures = tmp_path / "reports" / loaded.name / "figures"
    figures.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8)).save(figures / "recall.png")
    return loaded


def trained_run(study):
    return next(r for r in exported_runs(study) if r.settings["iterations"])


def test_csv(complete, tmp_path):
    assert export(complete, "csv", tmp_path / "out") == 2
    runs = pd.read_csv(tmp_path / "out" / "runs.csv").set_index("run_id")
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    expected = trained_run(complete)
    assert set(runs.index) == {r.run_id for r in exported_runs(complete)}
    assert runs.loc[expected.run_id, "recall@1"] == expected.metrics["recall@1"]
    assert runs.loc[expected.run_id, "learning_rate"] == expected.settings["learning_rate"]
    assert (history["run_id"] == expected.run_id).all()
    np.testing.assert_allclose(history["loss"], expected.history["loss"], rtol=1e-12)


def test_tensorboard(complete, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert export(complete, "tensorboard", tmp_path / "out") == 2
    expected = trained_run(complete)
    (folder,) = (tmp_path / "out").glob(f"*({expected.run_id})")
    events = EventAccumulator(str(folder)).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == expected.history["iteration"].tolist()
    np.testing.assert_allclose([event.value for event in losses], expected.history["loss"], rtol=1e-6)
    assert events.Scalars("test/recall@1")[0].value == pytest.approx(expected.metrics["recall@1"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    figures = EventAccumulator(str(tmp_path / "out" / "figures")).Reload()
    assert (figures.Images("recall")[0].width, figures.Images("recall")[0].height) == (6, 4)


def test_mlflow(complete, tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient
    assert export(complete, "mlflow", tmp_path / "out") == 2
    expected = trained_run(complete)
    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(complete.name)
    found = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(found) == {r.name for r in exported_runs(complete)} | {"figures"}
    run_found = found[expected.name]
    assert run_found.data.params["loss"] == expected.settings["loss"]
    assert run_found.data.metrics["test/recall_at_1"] == expected.metrics["recall@1"]
    history = client.get_metric_history(run_found.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == list(
        zip(expected.history["iteration"], expected.history["loss"], strict=True)
    )
    assert [a.path for a in client.list_artifacts(found["figures"].info.run_id)] == ["recall.png"]


def test_refuses_a_folder_with_files_and_a_study_without_results(complete, study, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="out is not an empty folder; remove it, or choose another folder with --out"):
        export(complete, "csv", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"mine.txt is not an empty folder"):
        export(complete, "csv", tmp_path / "out" / "mine.txt")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(SystemExit, match="study nothing: "):
        main(["nothing", "--to", "csv"])


def test_says_which_package_is_missing(complete, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"--to tensorboard needs the package .*pip install 'hloss\[export\]'"):
        export(complete, "tensorboard", tmp_path / "out")
