"""Tables of results: columns, stale runs and refused mixtures."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from hloss.retrieval.ranks import first_match_ranks
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import ConfigError, DamagedError
from hloss.runs.provenance import NAMED_PACKAGES
from hloss.runs.run import run
from hloss.study.results import (
    at_length,
    better_settings,
    chosen_settings,
    collect,
    histories,
    lengths_in,
    pair_records,
    read_results,
    refuse_mixed_settings,
    select_results,
    stale_runs,
)
from hloss.study.spec import OF_TUNING, load_study
from hloss.study.statistics import bootstrap_over_classes, headline, summary
from hloss.study.tuning import resolve_tuning
from tests.helpers.sample import PARTS, RESULTS, SAMPLE, STUDY, sample_table


def test_refuses_results_of_different_code(study, monkeypatch):
    loaded = study.load()
    for r in loaded.runs[1:]:
        run(r.config, lambda line: None)
    assert collect(loaded)["complete"].tolist() == [False, True, True, True, True]
    with monkeypatch.context() as context:
        context.setattr("hloss.runs.provenance.code_sha256", lambda: "other")
        made = run(loaded.runs[0].config, lambda line: None)
    card = made["fingerprint"]["card_sha256"]
    assert stale_runs(loaded, {"tiny": card}) == stale_runs(loaded, {}) == [loaded.runs[0]]
    assert stale_runs(loaded, {"tiny": "other"}) == list(loaded.runs)
    with pytest.raises(ConfigError, match="2 versions of the code"):
        collect(loaded)
    file = loaded.runs[0].config.folder / "result.json"
    told = json.loads(file.read_text())
    told["provenance"] |= {"git_commit": "abc", "git_dirty": True}
    del told["provenance"]["processor"]
    file.write_text(json.dumps(told))
    mixed = collect(loaded, keep=True)
    assert mixed["code_sha256"].nunique() == 2
    assert (mixed["git_commit"][0], mixed["processor"][0]) == ("abc with changes", "")
    assert mixed["processor"][1].endswith("cores")
    assert mixed["method"].tolist()[-1] == ["raw pixels"]


@pytest.mark.parametrize("name", ["ranks.npy", "queries.npy", "history.parquet"])
@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_file_of_a_complete_run_that_cannot_be_read_is_named(name, fault, study):
    study.content["seeds"] = [0]
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    file = loaded.runs[1].config.folder / name
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:60])
    reader = pair_records if name == "history.parquet" else collect
    with pytest.raises(DamagedError, match=rf"{name} is {fault}.*; delete the folder {file.parent} and start"):
        reader(loaded)


def test_records_of_pairs_have_a_row_per_comparison_without_grids(study):
    study.content["fixed"]["record_pairs"] = True
    same = {"name": "same run", "comparison": "other", "set": {"loss": "histogram", "n_bins": 20}}
    study.content["runs"].append(same)
    study.tune()
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    records = pair_records(loaded)
    assert list(records.columns[:5]) == ["dataset", "comparison", "method", "seed", "run_id"]
    sizes = records.groupby(["comparison", "method", "seed"]).size().to_dict()
    assert sizes == {("other", "same run", seed): 2 for seed in (0, 1)}
    assert records["pairs_with_slope"].between(0, 1).all()


def test_result_of_another_package_version_is_stale(study, monkeypatch):
    study.content["runs"] = [{"name": "multi-similarity", "set": {"loss": "pml:MultiSimilarityLoss"}}]
    loaded = study.load()
    (package,) = (name for name in NAMED_PACKAGES if name != "torchvision")
    with monkeypatch.context() as context:
        context.setattr("hloss.runs.provenance.version", lambda name: "0.0")
        made = run(loaded.runs[0].config, lambda line: None)
        assert stale_runs(loaded, {}) == []
    assert made["fingerprint"][package] == "0.0"
    assert stale_runs(loaded, {}) == [loaded.runs[0]]
    run(loaded.runs[1].config, lambda line: None)
    assert collect(loaded, keep=True)[package].nunique() == 2
    with pytest.raises(ConfigError, match=f"2 versions of {package}"):
        collect(loaded)
    made = run(loaded.runs[0].config, lambda line: None)
    assert made["fingerprint"][package] != "0.0", "a stale run is made anew"
    assert stale_runs(loaded, {}) == []


def test_result_without_a_package_version_is_stale_if_settings_name_the_package(study):
    study.content["runs"] = [{"name": "multi-similarity", "set": {"loss": "pml:MultiSimilarityLoss"}}]
    loaded = study.load()
    run(loaded.runs[0].config, lambda line: None)
    file = loaded.runs[0].config.folder / "result.json"
    told = json.loads(file.read_text())
    told["fingerprint"] = {name: told["fingerprint"][name] for name in ("code_sha256", "card_sha256")}
    file.write_text(json.dumps(told))
    assert stale_runs(loaded, {}) == [loaded.runs[0]]


def test_refuses_results_of_different_data_even_with_keep(study):
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    file = loaded.runs[0].config.folder / "result.json"
    card = run(loaded.runs[0].config)["fingerprint"]["card_sha256"]
    file.write_text(file.read_text().replace(card, "other"))
    with pytest.raises(ConfigError, match=f"run {loaded.runs[0].config.run_id} .* has card_sha256='other'"):
        collect(loaded, keep=True)


def test_table_has_every_run_and_summary_its_means(study):
    loaded = study.load()
    results = {r.config.run_id: run(r.config, lambda line: None) for r in loaded.runs}
    table = collect(loaded).explode(["comparison", "method"])
    for row in table.itertuples():
        assert row.chosen_iteration == results[row.run_id]["chosen"]["iteration"]
    means = summary(table, ["recall@1"]).set_index("method")
    values = table[table.method == "histogram, n_bins 20"]["recall@1"]
    assert means.loc["histogram, n_bins 20", "recall@1"] == pytest.approx(values.mean())
    assert means.loc["histogram, n_bins 20", "n"] == 2
    assert means["recall@1 low"].isna().tolist() == [False, False, True]


def test_committed_sample_is_its_complete_study():
    table = read_results(RESULTS)
    runs = load_study(STUDY).runs  # recorded run ids hash earlier names of settings
    known = {
        (r.dataset, comparison, method, r.config.seed, length)
        for r in runs
        for comparison, method in r.methods.items()
        for length in r.lengths_in(comparison)
    }
    columns = ["dataset", "comparison", "method", "seed", "length"]
    assert known <= set(table[columns].itertuples(index=False, name=None))
    assert table["complete"].all()
    trained = table[(table["comparison"] == "losses") & (table["length"] > 0)]
    tuned_runs = table[table["comparison"] == "tuned losses"].groupby(["loss", "length"])["seed"].nunique()
    assert tuned_runs.tolist() == [5] * 7 * trained["length"].nunique()
    limit = 8e6 if PARTS else 5e6  # parts have three lengths and the ranks of the queries
    committed = subprocess.run(["git", "ls-files", "."], cwd=SAMPLE, capture_output=True, text=True, check=True)
    assert sum((SAMPLE / name).stat().st_size for name in committed.stdout.splitlines()) < limit
    assert all(pd.read_parquet(file)["code_sha256"].nunique() == 1 for file in PARTS or [RESULTS])
    longest = table[table["length"].isin([0, trained["length"].max()])]
    recall = longest[longest["comparison"] == "losses"].groupby("method")["recall@1"].agg(["min", "max"])
    assert recall.loc["untrained network", "max"] < 5
    assert recall.loc["histogram", "min"] > 5 * recall.loc["untrained network", "max"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "parts"}, "network must be the same .* on tiny, .*: got 'glyphnet' for 'histogram, n_bins 20' and "
         "'parts' for 'other'; set network in fixed"),
        ({"embedding_dim": 64}, "embedding_dim .*: got 128 for 'histogram, n_bins 20' and 64 for 'other'"),
        ({"choose": "last"}, "choose .* and 'last' for 'other'"),
        ({"refit": True}, "refit .* and True for 'other'"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_settings_that_cannot_be_compared_before_the_runs(settings, message, study):
    refuse_mixed_settings(study.load())  # the baseline of raw pixels is not trained
    study.content["runs"].append({"name": "other", "set": {"loss": "binomial"} | settings})
    with pytest.raises(ConfigError, match=message):
        refuse_mixed_settings(study.load())
    study.content["runs"][-1]["set"]["dataset"] = "other"
    refuse_mixed_settings(study.load())


def test_runs_of_grids_may_differ_in_refit_from_those_that_are_compared(study):
    study.tune()
    study.content["fixed"]["refit"] = True
    study.content["runs"].pop()  # raw pixels have no training to repeat
    refuse_mixed_settings(study.load())


def test_no_committed_study_mixes_results_that_cannot_be_compared():
    for file in Path("workflow/studies").glob("*.yaml"):
        refuse_mixed_settings(load_study(file.stem))


def test_refuses_results_that_cannot_be_compared(tmp_path):
    table = sample_table()
    row = table.index[table["complete"] & (table["iterations"] > 0)][3]
    for name, value in {
        "protocol": "market1501",
        "card_sha256": "another split",
        "prepared": '{"boxes": "detected"}',
        "network": "googlenet",
        "weights": "imagenet",
        "embedding_dim": 64,
        "chosen_how": "best Recall@1 on test classes",
        "trained_on": "training and validation classes (refit)",
    }.items():
        planted = table.copy()
        planted.loc[row, name] = value
        planted.to_parquet(tmp_path / "results.parquet")
        with pytest.raises(
            ConfigError, match=f"run {table.loc[row, 'run_id']} .* has {name}={re.escape(repr(str(value)))}"
        ):
            read_results(tmp_path / "results.parquet")


def test_refuses_splits_that_differ_in_preparation_or_repeat(tmp_path):
    table = sample_table()
    table = table[table["seed"].isin([0, 1]) & (table["dataset"] == "glyphs")]
    table = table.assign(dataset="cuhk03", split="cuhk03-" + table["seed"].map(str))
    second = table["seed"] == 1
    first_card = table.loc[~second, "card_sha256"].iloc[0]

    def written_with(*prepared, card="second"):
        for rows, settings in zip((~second, second), prepared, strict=True):
            table.loc[rows, "prepared"] = json.dumps(settings)
        table.loc[second, "card_sha256"] = card
        table.to_parquet(tmp_path / "results.parquet")
        return tmp_path / "results.parquet"

    first_set = {"boxes": "labeled", "test_set": 1}
    assert len(read_results(written_with(first_set, {"boxes": "labeled", "test_set": 2})))
    with pytest.raises(ConfigError, match="detected"):
        read_results(written_with(first_set, {"boxes": "detected", "test_set": 2}))
    with pytest.raises(ConfigError, match="cuhk03-0 and cuhk03-1 are the same split of cuhk03"):
        read_results(written_with(first_set, first_set, card=first_card))


def test_refuses_a_grid_of_other_data_or_protocol(tmp_path):
    table = sample_table()
    row = table.index[table["comparison"].map(lambda names: names[0].endswith(": choice"))][3]
    for name in ("protocol", "card_sha256"):
        table.assign(**{name: table[name].where(table.index != row, "another")}).to_parquet(tmp_path / "r.parquet")
        with pytest.raises(ConfigError, match=f"run {table.loc[row, 'run_id']} .* has {name}='another'"):
            read_results(tmp_path / "r.parquet")


def test_each_seed_has_its_split_of_one_dataset(study, tiny_data):
    text, folder = study
    for seed in (1, 2):
        shutil.copytree(tiny_data / "tiny", folder / "data" / f"tiny-{seed}")
    card = folder / "data" / "tiny-2" / "card.json"
    card.write_text(card.read_text() + " ")  # another split has another card
    text["fixed"] |= {"dataset": "tiny-{seed}", "data_dir": str(folder / "data")}
    text["seeds"], text["runs"][1]["seeds"] = [1, 2], [1]
    loaded = study.load()
    assert [r.config.dataset for r in loaded.runs] == ["tiny-1", "tiny-2", "tiny-1", "tiny-2", "tiny-1"]
    for r in loaded.runs:
        run(r.config, lambda line: None)
    collect(loaded).to_parquet(folder / "results.parquet")
    results = read_results(folder / "results.parquet")
    assert set(results["dataset"]) == {"tiny"}
    assert set(results["split"]) == {"tiny-1", "tiny-2"}
    assert summary(results, ["recall@1"])["n"].tolist() == [2, 2, 1]
    assert results["reverse_probability"].notna().tolist() == [True, False, True, False, True]


def test_interval_over_classes_equals_the_bootstrap_of_the_queries(study):
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    table = collect(loaded).set_index("run_id")
    config = loaded.runs[0].config
    dataset = open_dataset(Path(config.data_dir) / config.dataset)
    labels = dataset.labels(dataset.rows("test")).numpy()
    hits = first_match_ranks(torch.from_numpy(np.load(config.folder / "embeddings.npy")), torch.tensor(labels)) == 1
    mean, low, high = bootstrap_over_classes(hits.numpy(), labels, np.random.default_rng(0))
    row = table.loc[config.run_id]
    assert (row["recall@1"], row["classes_low"], row["classes_high"]) == pytest.approx((mean, low, high))
    assert low < mean < high


def test_a_part_that_is_not_there_is_refused_with_what_is():
    results = read_results(RESULTS)
    assert set(select_results(results, comparison="bins", seed=1)["seed"]) == {1}
    with pytest.raises(ConfigError, match=r"comparison is unknown: got 'bin'; allowed are losses, ") as refused:
        select_results(results, dataset="glyphs", comparison="bin")
    names = str(refused.value).partition("allowed are ")[2].split(", ")
    known = results.loc[results["dataset"] == "glyphs", "comparison"]
    assert set(names) == {name for name in known if not name.endswith(OF_TUNING)}


def test_results_stand_in_the_order_of_the_study(study):
    text, folder = study
    text["runs"].append(
        {"name": "histogram", "comparison": "bins", "set": {"loss": "histogram"}, "cross": {"n_bins": [10, 20]}}
    )
    loaded = study.load()  # the run with 20 bins belongs to both comparisons
    for r in loaded.runs:
        run(r.config, lambda line: None)
    collect(loaded).to_parquet(folder / "results.parquet")
    results = read_results(folder / "results.parquet")
    assert select_results(results, comparison="bins")["n_bins"].tolist() == [10, 10, 20, 20]
    assert results["comparison"].unique().tolist() == ["losses", "bins"]


def test_runs_that_choose_are_not_trained_again_on_all_classes(study):
    text = study.tune()
    text["fixed"]["refit"] = True
    text["runs"][1]["set"]["refit"] = False
    loaded = study.load()
    assert {r.config.refit for r in loaded.runs if r.config.seed == 9} == {False}
    assert {r.config.refit for r in loaded.waiting} == {True}
    for r in loaded.runs:
        run(r.config, lambda line: None)
    for r in (known := resolve_tuning(loaded)).runs:
        run(r.config, lambda line: None)
    table = collect(known)  # `trained_on` may differ between runs of a grid and others
    assert table[table["seed"] == 9]["trained_on"].unique().tolist() == ["training classes"]
    table.to_parquet(study[1] / "results.parquet")
    (chosen,) = chosen_settings(read_results(study[1] / "results.parquet")).to_dict("records")
    assert re.fullmatch(r"n_bins (20|50)", chosen["chosen"])
    assert chosen["at an edge of its grid"] == "n_bins"  # both of two values are edges


def test_rows_of_a_length_are_those_of_a_shorter_study(study):
    study.content["fixed"]["report_at"] = [2]
    study.content["runs"][1]["set"]["report_at"] = None
    study.content["runs"][0]["cross"] = {"n_bins": [20]}
    tables = {}
    for name, changes in {"both": {}, "short": {"iterations": 2, "report_at": None}}.items():
        study.content["fixed"] |= changes
        loaded = study.load()
        for r in loaded.runs:
            run(r.config, lambda line: None)
        collect(loaded).to_parquet(study.folder / "results.parquet")
        tables[name] = read_results(study.folder / "results.parquet")
    both, short = tables["both"], tables["short"]
    assert both[["method", "seed", "length"]].to_numpy().tolist() == [
        ["histogram, n_bins 20", 0, 2],
        ["histogram, n_bins 20", 0, 4],
        ["histogram, n_bins 20", 1, 2],
        ["histogram, n_bins 20", 1, 4],
        ["raw pixels", 0, 0],
    ]
    assert lengths_in(both) == [2, 4]
    same = [name for name in both if name not in ("run_id", "iterations", "training_seconds", "reverse_probability")]
    for (_, a), (_, b) in zip(at_length(both, 2).iterrows(), short.iterrows(), strict=True):
        for name in same:
            assert np.array_equal(a[name], b[name]) or (a[name] != a[name] and b[name] != b[name]), name
    assert at_length(both)["length"].tolist() == [4, 4, 0]
    assert both["still_improving"].tolist() == (both["chosen_iteration"] > 0.9 * both["length"]).tolist()
    means = summary(both, ["recall@1"])
    assert means[["length", "n"]].to_numpy().tolist() == [[2, 2], [4, 2], [0, 1]]
    with pytest.raises(ConfigError, match="length is unknown: got 3; allowed are 2, 4"):
        at_length(both, 3)


def test_ranks_of_the_queries_give_the_recall_of_each_length(study):
    study.content["fixed"]["report_at"] = [2]
    study.content["runs"][1]["set"]["report_at"] = None
    study.tune()
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    for r in (known := resolve_tuning(loaded)).runs:
        run(r.config, lambda line: None)
    collect(known).to_parquet(study.folder / "results.parquet")
    results = read_results(study.folder / "results.parquet")
    of_grid = results["comparison"].str.endswith(": choice")
    assert of_grid.sum() == 4
    assert results["ranks"].isna().equals(of_grid)
    for row in results[~of_grid].itertuples():
        assert (row.ranks.dtype, row.query_classes.dtype) == (np.uint16, np.int32)
        for k in (1, 2, 4):
            assert 100 * np.mean(row.ranks <= k) == pytest.approx(results.loc[row.Index, f"recall@{k}"])
    assert set(np.concatenate(results.loc[~of_grid, "ranks"].tolist())) == {1, 2, 3, 4, 5}  # up to recall@4
    chosen = chosen_settings(results)
    assert chosen["length"].tolist() == [2, 4]


def runs_at(comparison, method, recalls, first_seed=0, **settings):
    """Runs of one setting, one per Recall@1, with seeds from `first_seed`."""
    common = {"dataset": "glyphs", "comparison": comparison, "method": method, "length": 100, "complete": True,
              "loss": "histogram", "batch_size": 128, "bandwidth": np.nan} | settings  # fmt: skip
    rows = enumerate(recalls, first_seed)
    return [common | {"seed": seed, "recall@1": r, "validation_recall@1": r, "run_id": f"{method} {seed}"}
            for seed, r in rows]  # fmt: skip


def test_settings_that_a_grid_did_not_choose_are_better_if_the_interval_of_the_difference_is():
    chosen, others = {"learning_rate": 0.1, "n_bins": 50}, {"learning_rate": 0.01, "n_bins": 100}
    rows = runs_at("tuned losses", "histogram", [50.0, 51, 52], **chosen)
    for i, settings in enumerate((chosen, others)):
        rows += runs_at("tuned losses: choice", f"histogram, {i}", [60.0], first_seed=9, **settings)
    rows += runs_at("rate", "b", [53.0, 54.5, 55.5], **others)
    rows += runs_at("rate", "surely worse than b", [51.5, 52.4, 53.6], **others | {"n_bins": 50})
    rows += runs_at("rate", "too variable", [45.0, 60, 75], **others | {"n_bins": 25})
    rows += runs_at("rate", "one seed less", [70.0, 71], **others | {"n_bins": 200})
    rows += runs_at("batch", "larger batch", [70.0, 71, 72], **others | {"batch_size": 256})
    (row,) = better_settings(pd.DataFrame(rows)).to_dict("records")
    low, high = stats.t.interval(0.95, 2, 10 / 3, stats.sem([3.0, 3.5, 3.5]))
    assert row == {
        "dataset": "glyphs", "comparison": "tuned losses", "method": "histogram", "length": 100,
        "chosen": "n_bins 50, learning_rate 0.1", "chosen: recall@1 (%)": 51.0,
        "better": "n_bins 100, learning_rate 0.01", "better: recall@1 (%)": 54.3,
        "difference": pytest.approx(10 / 3), "low": pytest.approx(low), "high": pytest.approx(high),
    }  # fmt: skip
    assert better_settings(pd.DataFrame(rows[:3])).empty


def test_older_tables_have_one_length(tmp_path):
    table = sample_table()
    if "length" in table:
        longest = table["length"] == table.groupby("run_id")["length"].transform("max")
        table = table[longest].drop(columns=["length", "still_improving"])
    table.to_parquet(tmp_path / "results.parquet")
    results = read_results(tmp_path / "results.parquet")
    trained = results[results["iterations"] > 0]
    assert (results["length"] == results["iterations"]).all()
    assert lengths_in(results) == sorted(trained["iterations"].unique())
    late = trained["chosen_iteration"] / trained["iterations"] > 0.9
    assert trained["still_improving"].equals(late)
    assert set(late) == {False, True}
    assert not results.loc[results["iterations"] == 0, "still_improving"].any()


def test_table_names_runs_without_validation(study):
    study.content["fixed"]["choose"] = "last"
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    collect(loaded).to_parquet(study.folder / "results.parquet")
    results = read_results(study.folder / "results.parquet")
    assert results["validation_recall@1"].isna().all()
    assert len(histories(results)) == 0
    shown = headline(summary(results, ["recall@1"]), ["losses"], ["recall@1"])
    assert shown["tested iteration"].tolist() == ["last iteration, without validation"] * 2 + ["no training"]
    del study.content["fixed"]["choose"]
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    table = summary(collect(loaded).explode(["comparison", "method"]), ["recall@1"])
    assert "tested iteration" not in headline(table, ["losses"], ["recall@1"])


def test_refuses_mixed_choices_of_the_iteration(study):
    study.content["runs"][0]["cross"] = {"choose": ["best", "last"]}
    loaded = study.load()
    for r in loaded.runs:
        run(r.config, lambda line: None)
    with pytest.raises(ConfigError, match="has chosen_how='last iteration, without validation'"):
        collect(loaded)


def test_refuses_a_result_with_a_number_that_is_not_finite(study):
    loaded = study.load()
    result = run(loaded.runs[0].config, lambda line: None)
    file = loaded.runs[0].config.folder / "result.json"
    file.write_text(json.dumps(result | {"metrics": result["metrics"] | {"map": float("nan")}}))
    with pytest.raises(ConfigError, match=r"a number that is not finite: got metrics.map=nan; delete this folder"):
        collect(loaded, keep=True)
