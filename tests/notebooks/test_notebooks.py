"""Committed outputs and parameters of the notebooks; what the report and the comparison notebooks show."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from datetime import datetime, timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup

from data_prep.emblems import draw_pictures
from data_prep.prepared import PreparationError
from hloss.runs.config import RunConfig, config_from_notebook
from hloss.runs.errors import ConfigError, DatasetError
from hloss.study.spec import OF_TUNING
from tests.helpers.sample import STUDY, sample_rows, sample_table

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def tagged(notebook, tag):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebook_is_committed_as_a_clean_run_of_its_defaults(file):
    notebook = nbformat.read(file, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert len(code) <= 20
    assert not tagged(notebook, "injected-parameters"), "run with other than the default parameters"
    assert len(tagged(notebook, "parameters")) <= 1
    for cell in code:
        assert not any(output.output_type in ("error",) for output in cell.outputs)
        last = ast.parse(cell.source).body[-1]
        shows = isinstance(last, ast.Expr) or "print(" in cell.source or "display(" in cell.source
        assert bool(cell.outputs) == shows or "nbval-ignore-output" in cell.metadata.get("tags", [])
    assert any(c.outputs for c in code)
    times = [datetime.fromisoformat(time) for c in code for time in c.metadata["execution"].values()]
    assert max(times) - min(times) < timedelta(minutes=1)


def test_readme_lists_every_notebook():
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (ROOT / "notebooks" / "README.md").read_text())
    assert listed == [file.stem for file in NOTEBOOKS]


def test_parameters_cell_equals_run_config():
    (cell,) = tagged(nbformat.read(ROOT / "notebooks" / "20_train.ipynb", as_version=4), "parameters")
    names = {}
    for statement in ast.parse(cell.source).body:
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        names[target.id] = ast.literal_eval(statement.value)
    assert names == {name: field.default for name, field in RunConfig.model_fields.items()}
    assert list(names) == list(RunConfig.model_fields)


@pytest.mark.parametrize("file", [file for file in NOTEBOOKS if file.stem != "20_train"], ids=lambda file: file.stem)
def test_notebook_checks_its_parameters_first(file):
    cells = [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
    place = next(n for n, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    assert cells[place + 1].source.startswith("check_parameters()\n")


def test_papermill_refuses_an_unknown_parameter_of_a_report(tmp_path):
    command = [sys.executable, "-m", "papermill", "notebooks/31_ablation.ipynb", str(tmp_path / "out.ipynb")]
    answer = subprocess.run([*command, "-p", "comparsion", "margin"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "comparsion: unknown parameter (did you mean comparison?); the parameters of this notebook" in answer.stderr


def papermill(out, options=(), **parameters):
    command = [sys.executable, "-m", "papermill", "notebooks/20_train.ipynb", str(out), *options]
    for name, value in parameters.items():
        command += ["-p", name, value]
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_papermill_starts_a_run(tiny_data, tmp_path):
    small = {"dataset": "tiny", "batch_size": "24", "images_per_class": "4", "iterations": "4", "validate_every": "2"}
    small |= {"data_dir": str(tiny_data), "runs_dir": str(tmp_path / "runs")}
    answer = papermill(tmp_path / "out.ipynb", loss="histogram", n_bins="50", **small)
    assert answer.returncode == 0, answer.stderr
    (result,) = (tmp_path / "runs").glob("notebook/*/result.json")
    config = json.loads(result.read_text())["config"]
    assert (config["loss"], config["n_bins"]) == ("histogram", 50)
    before = result.read_bytes()
    loss = {"loss": "pml:TripletMarginLoss", "loss_options": '{"margin": 0.2}', "miner": "TripletMarginMiner"}
    answer = papermill(tmp_path / "out.ipynb", ["-y", "miner_options: {type_of_triplets: semihard}"], **loss, **small)
    assert answer.returncode == 0, answer.stderr
    (new,) = set((tmp_path / "runs").glob("notebook/*/result.json")) - {result}  # another setting, another folder
    config = json.loads(new.read_text())["config"]
    assert (config["loss_options"], config["miner_options"]) == ({"margin": 0.2}, {"type_of_triplets": "semihard"})
    assert result.read_bytes() == before


def test_papermill_refuses_an_unknown_parameter_before_training(tmp_path):
    answer = papermill(tmp_path / "out.ipynb", n_bin="50", runs_dir=str(tmp_path / "runs"))
    assert answer.returncode != 0
    assert "n_bin" in answer.stderr
    assert not list((tmp_path).glob("runs/*/*/result.json"))


@pytest.mark.parametrize(
    ("name", "value", "message"), [("n_bins", 0, "n_bins must be"), ("dataset", "gliphs", "is not prepared")]
)
def test_training_notebook_refuses_a_wrong_value_before_training(name, value, message, tmp_path):
    with pytest.raises((ConfigError, DatasetError), match=message):
        executed("20_train", **{name: value}, runs_dir=str(tmp_path / "runs"))
    assert not list((tmp_path).glob("runs/*/*/result.json"))


def report(folder, results):
    """Execute the report notebook on these results; return its Markdown outputs as one text."""
    results.to_parquet(folder / "results.parquet")
    command = [sys.executable, "-m", "papermill", "notebooks/90_report.ipynb", str(folder / "out.ipynb")]
    command += ["-p", "results_file", str(folder / "results.parquet"), "-p", "report_dir", str(folder)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr)
    return "\n".join(outputs_of(folder, "text/markdown"))


def outputs_of(folder, kind):
    """The outputs of this MIME type in the executed report, in order."""
    outputs = [o for c in nbformat.read(folder / "out.ipynb", as_version=4).cells for o in c.get("outputs", ())]
    return [o["data"][kind] for o in outputs if kind in o.get("data", {})]


def tables(folder):
    """The tables of the executed report: a list of rows per table, each a dict by column name."""
    found = []
    for table in BeautifulSoup("".join(outputs_of(folder, "text/html")), "html.parser").select("table.sortable"):
        header = [cell.text for cell in table.select("th")]
        rows = [[cell.text for cell in row.select("td")] for row in table.select("tbody tr")]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


@pytest.fixture
def sample():
    return sample_table()


def test_report_of_incomplete_study_lists_missing_runs_and_gives_no_verdict_on_them(sample, tmp_path):
    of_bins = sample["comparison"].map(lambda names: "bins" in names)
    sample["complete"] &= ~(of_bins & (sample["seed"] > 2)) & (sample["loss"] != "lifted")
    waiting = sample["comparison"].map(lambda names: "tuned losses" in names) & (sample["loss"] == "semi-hard-triplet")
    sample.loc[waiting, ["complete", "run_id"]] = False, ""  # its setting is not chosen yet
    said = report(tmp_path, sample.assign(threads=sample["complete"].map({True: 1.0, False: math.nan})))
    assert "This study is not complete" in said
    assert "This study is not complete." in "".join(outputs_of(tmp_path, "text/html"))
    shown = tables(tmp_path)
    (gaps,) = (rows for rows in shown if "missing seeds" in rows[0])
    assert len({(row["dataset"], row["comparison"], row["method"]) for row in gaps}) == len(gaps)
    on_glyphs = [row for row in gaps if row["dataset"] == "glyphs"]
    to_come = {(row["comparison"], row["method"]): row["missing seeds"] for row in on_glyphs}
    bins = {method: seeds for (comparison, method), seeds in to_come.items() if comparison == "bins"}
    assert bins == {f"histogram, n_bins {n:g}": "3, 4" for n in sample.loc[of_bins, "n_bins"].unique()}
    assert to_come["losses", "lifted structure"] == to_come["tuned losses", "lifted structure"] == "0, 1, 2, 3, 4"
    board = pd.read_csv(tmp_path / "claims.csv", keep_default_na=False).set_index("claim")
    for claim in ("bins", "lifted structure", "overlap"):
        verdicts = board.loc[[claim]]
        assert set(verdicts["verdict"]) == {"not run"}
        assert verdicts["evidence"].str.contains("runs are missing").all()
    assert "not run" not in set(board.loc[["C matters"], "verdict"])  # its runs are complete
    tuned = board[board["comparison"] == "tuned losses"]["verdict"]
    assert set(tuned[["semi-hard triplet"]]) == {"not run"}
    assert "not run" not in set(tuned[["contrastive, trained here"]])
    table = pd.read_csv(tmp_path / "summary.csv")
    lifted = table[table["method"] == "lifted structure"]
    comparisons = {name for name in lifted["comparison"] if not name.endswith(OF_TUNING)}
    assert comparisons == {"losses", "tuned losses", "difficulty"}
    assert set(lifted["n"]) == {0}
    assert f"make study STUDY={STUDY}" in said
    check_tables(shown, table[table["n"] > 0])


def check_tables(shown, means):
    """Check that each mean is shown with its run ids, and each run with its comparisons.

    The tables of the losses show the longest length, those of other comparisons all lengths.
    """
    stands = defaultdict(set)
    for row in means.itertuples():
        for run_id in row.run_ids.split(", "):
            stands[run_id].add(row.comparison)
    longest = means["length"] == means.groupby(["dataset", "comparison", "method"])["length"].transform("max")
    of_losses = means["comparison"].isin(["losses", "tuned losses"])
    others = ~means["comparison"].str.endswith(OF_TUNING) & (means["comparison"] != "difficulty")
    expected = means[longest & of_losses | others & ~of_losses]
    runs_of = {(row.comparison, row.method, str(row.length)): row.run_ids for row in expected.itertuples()}
    told = {
        (row["comparison"], row["method"], row["length"]): row["runs"].removeprefix("runs")
        for rows in shown
        for row in rows
        if {"comparison", "method", "runs"} <= row.keys() and "at an edge of its grid" not in row
    }
    assert told == runs_of
    assert {"losses", "tuned losses", "bins", "learning rate"} <= {comparison for comparison, *_ in told}
    (grids,) = (rows for rows in shown if "at an edge of its grid" in rows[0])
    for grid in grids:
        of_grid = [grid["comparison"] + ending for ending in (": choice", ", extended: choice")]
        chosen = means[means["comparison"].isin(of_grid)]
        chosen = chosen[chosen["length"] == int(grid["length"])]
        of_method = chosen[chosen["method"].str.startswith(f"{grid['method']}, learning_rate")]
        assert grid["runs"].removeprefix("runs") == ", ".join(of_method["run_ids"])
    (appendix,) = (rows for rows in shown if "validation_recall@1" in rows[0])
    assert {row["run_id"]: set(row["comparison"].split("; ")) for row in appendix} == stands
    (made,) = (rows for rows in shown if "code_sha256" in rows[0])
    assert {row["threads"] for row in made} == {"1"}


def test_report_works_before_any_training_is_complete(sample, tmp_path):
    sample["complete"] &= sample["loss"] == "none"
    collected_earlier = sample.drop(columns="threads", errors="ignore")
    assert "This study is not complete" in report(tmp_path, collected_earlier)
    board = pd.read_csv(tmp_path / "claims.csv", keep_default_na=False)
    assert set(board[board["claim"] != "quadratic cost"]["verdict"]) == {"not run"}


def test_report_separates_published_values_of_other_protocols(sample, tmp_path):
    """The sample is relabelled as CUB, for which values of the histogram loss by two protocols are published."""
    losses = sample[sample["comparison"].map(lambda names: "losses" in names) & (sample["dataset"] == "glyphs")]
    said = report(tmp_path, losses.assign(dataset="cub"))
    assert said.index("Same protocol:") < said.index("Other protocols:")
    same, other = (rows for rows in tables(tmp_path) if "published" in rows[0])
    assert {row["match"] for row in same} == {"same protocol, another network"}
    assert {row["match"] for row in other} == {"other protocol"}
    assert all(row["difference"] for row in same)
    assert not any(row["difference"] for row in other)
    assert all(row["runs"].count(",") == row["n"].count("5") * 4 for row in same + other)
    assert "histogram" in {row["method"] for row in same} & {row["method"] for row in other}


def test_report_of_datasets_with_other_k(sample, tmp_path):
    """The sample is relabelled as CUB with Recall@1, 2, 4, and as Online Products with Recall@1, 10, 100."""
    of_losses = sample["comparison"].map(lambda names: "losses" in names) & (sample["dataset"] == "glyphs")
    losses = sample[of_losses & (sample["seed"] < 2) & sample["loss"].isin(["histogram", "binomial", "none"])]
    losses = losses.drop(columns=["recall@8", "recall@16", "recall@32"])
    products = losses.rename(columns={"recall@2": "recall@10", "recall@4": "recall@100"})
    products = products.assign(run_id=products["run_id"] + "-sop")
    report(tmp_path, pd.concat([losses.assign(dataset="cub"), products.assign(dataset="sop")], ignore_index=True))
    means = pd.read_csv(tmp_path / "summary.csv").set_index("dataset")
    headers = [tuple(rows[0]) for rows in tables(tmp_path)]
    for dataset, metrics in {"cub": ("@1", "@2", "@4"), "sop": ("@1", "@10", "@100")}.items():
        values = means.loc[dataset].filter(like="recall@").dropna(axis="columns", how="all")
        assert set(values) == {f"recall{metric}{bound}" for metric in metrics for bound in ("", " low", " high")}
        assert not values.isna().any(axis=None)
        shown = tuple(f"recall{metric} (%)" for metric in metrics)
        assert shown in [tuple(name for name in header if name.startswith("recall@")) for header in headers]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("protocol", "market1501"),
        ("network", "googlenet"),
        ("card_sha256", "another split"),
        ("chosen_how", "best Recall@1 on test classes"),
    ],
)
def test_report_refuses_results_that_are_not_comparable(name, value, sample, tmp_path, capsys):
    row = sample.index[sample["iterations"] > 0][7]
    sample.loc[row, name] = value
    sample.to_parquet(tmp_path / "results.parquet")
    with pytest.raises(ConfigError, match=f"run {sample.loc[row, 'run_id']} .* has {name}='{value}'"):
        executed("90_report", results_file=str(tmp_path / "results.parquet"), report_dir=str(tmp_path))
    assert not (tmp_path / "claims.csv").exists()
    capsys.readouterr()


def executed(name, **parameters):
    """Execute a notebook's cells in this process with these parameters; return its variables."""
    names = {}
    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    plt.close("all")
    return names


COMPARISONS = [name for name in sample_rows()["comparison"].unique() if not name.endswith(OF_TUNING)]


@pytest.mark.parametrize("comparison", [name for name in COMPARISONS if name not in ("losses", "tuned losses", "bins")])
def test_ablation_notebook_shows_each_comparison(comparison, capsys):
    names = executed("31_ablation", comparison=comparison)
    assert set(names["results"]["comparison"]) == set(names["table"]["comparison"]) == {comparison}
    assert set(names["board"]["claim"])
    capsys.readouterr()


@pytest.mark.parametrize("notebook", ["30_compare_losses", "40_similarity_distributions", "41_retrieval_panels"])
def test_comparison_notebooks_show_tuned_losses(notebook, capsys):
    if notebook != "30_compare_losses":  # which shows all seeds
        assert set(executed(notebook, seed=1)["shown"]["seed"]) == {1}
    names = executed(notebook, comparison="tuned losses")
    assert set(names["results"]["comparison"]) >= {"tuned losses"}
    capsys.readouterr()


def test_training_notebook_runs_again_after_a_change_of_its_parameters(tiny_data, tmp_path, capsys):
    """As in JupyterLab: the kernel keeps the variables of all cells, and none of them is read as a setting."""
    small = {"dataset": "tiny", "batch_size": 24, "images_per_class": 4, "iterations": 2, "validate_every": 2}
    names = executed("20_train", **small, data_dir=str(tiny_data), runs_dir=str(tmp_path))
    changed = config_from_notebook(names | {"n_bins": 50})
    assert changed.run_id != names["config"].run_id
    capsys.readouterr()


def test_retrieval_panels_begin_with_the_chosen_method(capsys):
    shown = executed("41_retrieval_panels", method="lifted structure", others=2)["shown"]["method"].tolist()
    assert shown[0] == "lifted structure"
    assert len(set(shown)) == 3
    capsys.readouterr()


def test_own_images_notebook_takes_a_folder_and_a_csv(tmp_path, capsys):
    draw_pictures(tmp_path / "mine", classes=20, per_class=10)
    names = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "mine").glob("*/*"))
    rows = [f"{name},class {name.split('/')[1]}" for name in names]
    (tmp_path / "mine.csv").write_text("\n".join(["path,label", *rows]))
    given = {"iterations": 8, "data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")}
    by_folder = executed("15_own_images", **given, dataset="a", images_folder=str(tmp_path / "mine"))
    by_csv = executed("15_own_images", **given, dataset="b", images_csv=str(tmp_path / "mine.csv"))
    assert by_folder["result"]["network_sha256"] == by_csv["result"]["network_sha256"]
    assert by_csv["found"][0] == f"class {by_folder['found'][0]}"
    assert by_folder["similarities"][0, 0] > 0.9999  # Its picture is the first test image.
    picture = str(tmp_path / names[-1])
    other = executed("15_own_images", **given, dataset="a", images_folder=str(tmp_path / "mine"), new_picture=picture)
    assert other["result"]["run_id"] == by_folder["result"]["run_id"]
    assert not torch.equal(other["query"], by_folder["query"])
    capsys.readouterr()


def test_own_images_notebook_trains_without_validation_on_few_images(tmp_path, capsys):
    draw_pictures(tmp_path / "mine", classes=8, per_class=5)
    rows = [f"mine/emblem{i:02d}/{n}.jpg,{i},{'train' if i < 4 else 'test'}" for i in range(8) for n in range(5)]
    (tmp_path / "mine.csv").write_text("\n".join(["path,label,split", *rows]))
    source = {"images_csv": str(tmp_path / "mine.csv"), "dataset": "few", "batch_size": 16}
    places = {"data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")}
    with pytest.raises(PreparationError, match="or pass --val-fraction 0: runs train without validation"):
        executed("15_own_images", **source, **places)
    names = executed("15_own_images", **source, **places, iterations=8, val_fraction=0)
    assert names["result"]["chosen"]["how"] == "last iteration, without validation"
    capsys.readouterr()


def test_own_images_notebook_shows_a_picture_that_no_run_has_seen(tmp_path, capsys):
    names = executed("15_own_images", iterations=20, data_dir=str(tmp_path / "data"), runs_dir=str(tmp_path / "runs"))
    assert names["found"][0] == names["emblem"]
    assert names["similarities"][0, 0] < 0.9999
    assert names["result"]["metrics"]["recall@1"] > 0.3  # of 20 classes; a random ranking has about 0.05
    capsys.readouterr()
