"""The studies of the paper's datasets in miniature, from the original archives to the reports of `make study`.

And the ablations of one of them, run by run.
"""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from hloss.runs.run import run as carry_out
from hloss.study.results import chosen_settings, collect, read_results
from hloss.study.spec import STUDIES, load_study
from hloss.study.tuning import resolve_tuning
from tests.data_prep.test_four_datasets import PROTOCOLS, cub_dataset, cuhk03_dataset, market1501_dataset, sop_dataset
from tests.helpers.copied_project import projects

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SPLITS = (1, 2)  # of the five splits of CUHK03
RUNS = {"cub": 12, "sop": 9, "cuhk03": 2 * 11, "market1501": 9}


def shrink(file, seeds):
    """The entries of the study with few small batches and few seeds."""
    study = yaml.safe_load(file.read_text())
    study["fixed"] |= {"batch_size": 8, "images_per_class": 3, "iterations": 2, "validate_every": 1}
    if "weights" in study["fixed"]:
        study["fixed"]["weights"] = "none"
    study |= {"seeds": seeds, "resources": {"gpus": 0, "memory_gb": 4, "hours": 1}}
    for entry in study["runs"]:
        entry.pop("resources", None)
        if "batch_size" in entry.get("cross", {}):
            entry["cross"]["batch_size"] = [4, 6, 8, 10][-len(entry["cross"]["batch_size"]) :]
    file.write_text(yaml.safe_dump(study, sort_keys=False))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project with prepared small copies of the four datasets."""
    with projects(tmp_path) as new:
        project = new("project", {"title": "unused", "include": ["paper"]}, "unused")
        data = project.folder / "data"
        data.unlink()
        data.mkdir()
        (data / "glyphs").symlink_to(ROOT / "data" / "glyphs")
        for prepare in (cub_dataset, sop_dataset, market1501_dataset):
            prepare(project.folder, monkeypatch)
        for split in SPLITS:
            cuhk03_dataset(project.folder, monkeypatch, f"cuhk03-{split}", split)
        for name in PROTOCOLS:
            shrink(project.folder / "workflow" / "studies" / f"{name}.yaml", list(SPLITS) if name == "cuhk03" else [0])
        yield project


def test_each_study_gives_a_report_and_paper_reports_all_without_new_runs(project):
    reports = project.folder / "reports"
    for name, runs in RUNS.items():
        assert project.finish(project.start(f"STUDY={name}", "CORES=2")) == 0, project.printed()
        results = pd.read_parquet(reports / name / "results.parquet")
        assert (len(results), results["complete"].all()) == (runs, True)
        assert set(results["dataset"]) == {name}
        assert set(results["protocol"]) == {PROTOCOLS[name]}
        assert len(list((project.folder / "runs" / name).glob("*/run.ipynb"))) == runs
        assert "Claims of the paper" in (reports / name / "report.html").read_text()
    made = {file: file.stat().st_mtime_ns for file in project.folder.glob("runs/*/*/result.json")}

    assert project.finish(project.start("STUDY=paper")) == 0, project.printed()
    assert f"study paper: {len(made)} of {sum(RUNS.values())} runs are complete" in project.printed()
    assert {file: file.stat().st_mtime_ns for file in project.folder.glob("runs/*/*/result.json")} == made
    summary = pd.read_csv(reports / "paper" / "summary.csv")
    assert list(summary["dataset"].unique()) == list(RUNS)
    assert set(summary[summary["dataset"] == "cuhk03"]["n"]) == {len(SPLITS)}
    claims = pd.read_csv(reports / "paper" / "claims.csv")
    assert set(RUNS) <= set(claims["dataset"])
    assert "has no such runs" in claims[claims["claim"] == "Table 1"]["evidence"].iloc[0]  # needs batches of 256
    for name in RUNS:
        own = pd.read_csv(reports / name / "summary.csv")
        pooled = summary[summary["dataset"] == name]
        assert pooled["recall@1"].tolist() == own["recall@1"].tolist()
        assert (reports / "paper" / f"{name}_losses.svg").exists()
    page = (reports / "paper" / "report.html").read_text()
    assert page.count("data-beside=") >= len(made)  # links to the notebooks of all runs


SMALL = {32: 4, 64: 6, 128: 8, 256: 10, 1024: 12}  # batches of the ablations, and of their miniature
BRIEF = {"iterations": 2, "validate_every": 1}


def shrink_ablation(entry):
    """An entry with few small batches, two values of its last axis and one of each other axis."""
    entry.pop("resources", None)
    settings, axes = entry["set"], entry.get("cross", {})
    settings |= {name: value for name, value in BRIEF.items() if name in settings}
    if "batch_size" in settings:
        settings["batch_size"] = SMALL[settings["batch_size"]]
    if "micro_batch" in settings:
        settings |= {"micro_batch": 4, "batchnorm": "slices"}
    if "sampler" in axes:
        settings["images_per_class"] = 5  # the minimum of the random-class sampler
    for n, axis in enumerate(axes, 1):
        axes[axis] = axes[axis][: 2 if n == len(axes) else 1]
    if "batch_size" in axes:
        axes["batch_size"] = [SMALL[size] for size in axes["batch_size"]]


def test_ablations_on_splits_choose_settings_and_give_one_table(tmp_path, monkeypatch):
    for split in (1, 6):  # the splits of the first seed and of the tuning seed
        cuhk03_dataset(tmp_path, monkeypatch, f"cuhk03-{split}", split)
    for name in ("cuhk03", "cuhk03-ablations"):
        (tmp_path / f"{name}.yaml").write_text((STUDIES / f"{name}.yaml").read_text())
    shrink(tmp_path / "cuhk03.yaml", [1])
    base = yaml.safe_load((tmp_path / "cuhk03.yaml").read_text())
    base["fixed"] |= {"network": "glyphnet", "embedding_dim": 16}  # ten times as fast as the network of the paper
    base["fixed"] |= {"data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")}
    (tmp_path / "cuhk03.yaml").write_text(yaml.safe_dump(base))
    ablations = yaml.safe_load((tmp_path / "cuhk03-ablations.yaml").read_text())
    for entry in ablations["runs"]:
        shrink_ablation(entry)
    (tmp_path / "cuhk03-ablations.yaml").write_text(yaml.safe_dump(ablations))

    study = load_study("cuhk03-ablations", tmp_path)
    assert {run.config.loss for run in study.waiting} == {entry["set"]["loss"] for entry in tuned(ablations)}
    for _ in range(2):
        for run in study.runs:
            carry_out(run.config, lambda line: None)
        study = resolve_tuning(study)
    assert study.waiting == ()
    collect(study).to_parquet(tmp_path / "results.parquet")
    results = read_results(tmp_path / "results.parquet")
    assert results["complete"].all()
    assert set(results["comparison"]) >= {entry["comparison"] for entry in ablations["runs"]}
    assert len(chosen_settings(results)) == len(tuned(ablations)) == 7


def tuned(study):
    return [entry for entry in study["runs"] if entry.get("tune")]
