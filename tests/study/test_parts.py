"""Parts of a table of results: merged and refused parts."""

import runpy
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from hloss.runs.errors import ConfigError
from hloss.runs.run import run
from hloss.study.parts import merged_parts, parts_of, write_part
from hloss.study.results import read_results, write_results
from hloss.study.spec import load_study
from hloss.study.verify import origin, verify

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tiny_data, tmp_path_factory):
    """A folder with the files, runs and parts of two studies, "losses" and "bins", which share two runs."""
    folder = tmp_path_factory.mktemp("parts")
    fixed = {"dataset": "tiny", "batch_size": 24, "images_per_class": 4, "iterations": 4, "validate_every": 2}
    where = {"data_dir": str(tiny_data), "runs_dir": str(folder / "runs"), "device": "cpu"}
    bins = [{"name": "histogram", "comparison": "bins", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 100]}}]
    pixels = {"loss": "none", "iterations": 0, "network": "pixels", "report_at": None}
    losses = [{"name": "histogram", "set": {"loss": "histogram", "n_bins": 50}}, {"name": "raw pixels", "set": pixels}]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("hloss.study.results.measured_loss_cost", pd.DataFrame)
        for name, runs in {"bins": bins, "losses": losses}.items():
            content = {"title": name, "part_of": "sample", "seeds": [0, 1], "runs": runs}
            content["fixed"] = {**fixed, **where, "report_at": [2]}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
            loaded = load_study(name, folder)
            for r in loaded.runs:
                run(r.config, lambda line: None)
            write_results(loaded, keep=False)
    return folder


@pytest.fixture
def parts(made, tmp_path, monkeypatch):
    """The file of a table with the two parts, in a copy of their folder without runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(tmp_path)
    return Path("reports/sample/results.parquet")


def changed(file, **columns):
    pd.read_parquet(file).assign(**columns).to_parquet(file)


def test_parts_are_merged_and_a_run_of_both_stands_in_the_comparisons_of_both(parts, made):
    assert [file.stem for file in parts_of(parts)] == ["bins", "losses"]
    assert not parts.exists()
    assert {path.parent.name for path in made.glob("runs/*/*")} == {"sample"}
    table = read_results(parts)
    assert table["comparison"].unique().tolist() == ["losses", "bins"]
    counts = table.groupby(["comparison", "method", "length"], sort=False)["seed"].nunique()
    assert counts.to_dict() == {
        ("losses", "histogram", 2): 2,
        ("losses", "histogram", 4): 2,
        ("losses", "raw pixels", 0): 2,
        ("bins", "histogram, n_bins 50", 2): 2,
        ("bins", "histogram, n_bins 50", 4): 2,
        ("bins", "histogram, n_bins 100", 2): 2,
        ("bins", "histogram, n_bins 100", 4): 2,
    }
    assert table["run_id"].nunique() == 6
    assert set(table["title"]) == {"Studies losses, bins"}
    assert len(merged_parts(parts)) == 10
    study = Path("workflow/studies/sample.yaml")
    study.parent.mkdir(parents=True)
    for name in ("losses", "bins"):
        shutil.copy(f"{name}.yaml", study.parent)
    study.write_text(yaml.safe_dump({"title": "Losses and bins", "include": ["losses", "bins"]}))
    assert set(read_results(parts)["title"]) == {"Losses and bins"}
    shared = table[(table["n_bins"] == 50) & (table["length"] == 4)]
    assert shared.groupby("seed")["recall@1"].nunique().tolist() == [1, 1]


def test_a_setting_that_one_part_never_has_stays_a_number(parts):
    bins, losses = parts_of(parts)
    changed(bins, bandwidth=2.0)
    changed(losses, bandwidth=None)
    assert merged_parts(parts)["bandwidth"].dtype == "float64"


def test_an_incomplete_study_does_not_replace_its_part(parts):
    bins, _ = parts_of(parts)
    before, table = bins.read_bytes(), pd.read_parquet(bins)
    assert write_part("bins", "sample", table.assign(complete=[False, *table["complete"][1:]])) is None
    assert bins.read_bytes() == before
    assert write_part("bins", "sample", table.head(2)) == bins
    assert len(pd.read_parquet(bins)) == 2


def test_the_table_of_a_study_with_parts_is_merged_from_them(parts, monkeypatch):
    Path("sample.yaml").write_text(yaml.safe_dump({"title": "all", "include": ["losses", "bins"]}))
    monkeypatch.setattr("hloss.study.results.measured_loss_cost", pd.DataFrame)
    monkeypatch.setattr("hloss.study.results.pair_records", lambda study: pd.DataFrame())
    monkeypatch.delattr("hloss.study.results.collect")
    write_results(load_study("sample", Path()), keep=False)
    written, merged = pd.read_parquet(parts), merged_parts(parts)
    assert len(written) == 10
    for name in ("run_id", "length", "recall@1"):
        assert written[name].tolist() == merged[name].tolist()


def test_parts_of_other_code_are_refused_unless_verified(parts):
    bins, _ = parts_of(parts)
    columns = {"data_dir": parse_data_dir()}
    changed(bins, code_sha256="other", **columns)
    with pytest.raises(ConfigError, match=r"parts of 2 versions of the code .* bins: other; losses: .*make verify"):
        read_results(parts)
    verify(bins, n=1, report=lambda line: None)
    assert bins.with_name("bins.verified.json").exists()
    table = read_results(parts)
    assert table["code_sha256"].nunique() == 2
    assert "; bins verified at code" in origin(table, parts)
    changed(bins, title="changed since")
    with pytest.raises(ConfigError, match="parts of 2 versions of the code"):
        read_results(parts)


def parse_data_dir():
    return yaml.safe_load(Path("bins.yaml").read_text())["fixed"]["data_dir"]


def test_a_part_that_verify_found_different_is_refused(parts):
    bins, _ = parts_of(parts)
    changed(bins, code_sha256="other", data_dir=parse_data_dir(), n_queries=3)
    verify(bins, n=1, report=lambda line: None)
    with pytest.raises(ConfigError, match="parts of 2 versions of the code"):
        read_results(parts)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("torch", "0.0", "parts of several versions of torch cannot be merged: got bins: 0.0; losses: "),
        ("card_sha256", "other", "differs between two parts in its dataset"),
        ("recall@1", 0.5, "differs between two parts in recall@1"),
        ("protocol", "market1501", "has protocol="),
    ],
)
def test_parts_that_cannot_be_compared_are_always_refused(column, value, message, parts):
    bins, _ = parts_of(parts)
    changed(bins, data_dir=parse_data_dir(), **{column: value})
    if column == "protocol":
        table = pd.read_parquet(bins)
        table[table["n_bins"] == 100].to_parquet(bins)
    verify(bins, n=1, report=lambda line: None) if column == "torch" else None
    with pytest.raises(ConfigError, match=message):
        read_results(parts)


def test_the_command_verifies_each_part(parts, monkeypatch, capsys):
    for file in parts_of(parts):
        changed(file, data_dir=parse_data_dir())
    script = str(ROOT / "workflow/scripts/verify_results.py")
    monkeypatch.setattr("sys.argv", [script, "reports/sample", "--runs", "1"])
    runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out.count("1 runs agree with reports/sample/parts/") == 2
    monkeypatch.setattr("sys.argv", [script, "reports/none"])
    with pytest.raises(SystemExit, match=r"must be a folder with results\.parquet or parts"):
        runpy.run_path(script, run_name="__main__")
