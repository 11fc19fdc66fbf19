"""Studies: what they cross, what they refuse, and that results of different code are never mixed silently."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from hloss.retrieval.ranks import first_match_ranks
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import ConfigError
from hloss.runs.provenance import NAMED_PACKAGES
from hloss.runs.run import run
from hloss.study.results import collect, read_results, select_results, stale_runs
from hloss.study.spec import STUDIES, load_study
from hloss.study.statistics import bootstrap_over_classes, summary, t_interval
from hloss.study.tuning import chosen_settings


@pytest.fixture
def study(tiny_data, tmp_path):
    text = {
        "title": "a test",
        "fixed": {
            "dataset": "tiny",
            "batch_size": 24,
            "images_per_class": 4,
            "iterations": 4,
            "validate_every": 2,
            "data_dir": str(tiny_data),
            "runs_dir": str(tmp_path / "runs"),
        },
        "seeds": [0, 1],
        "runs": [
            {"name": "histogram", "set": {"loss": "histogram"}, "cross": {"n_bins": [20, 50]}},
            {"name": "raw pixels", "set": {"loss": "none", "iterations": 0, "network": "pixels"}, "seeds": [0]},
        ],
    }
    return text, tmp_path


def written(study):
    text, folder = study
    (folder / "small.yaml").write_text(yaml.safe_dump(text))
    return load_study("small", folder)


def test_axes_and_seeds_are_crossed(study):
    runs = written(study).runs
    assert [r.name for r in runs] == [
        "histogram, n_bins 20, seed 0",
        "histogram, n_bins 20, seed 1",
        "histogram, n_bins 50, seed 0",
        "histogram, n_bins 50, seed 1",
        "raw pixels, seed 0",
    ]
    assert len({r.config.run_id for r in runs}) == 5
    assert all(r.config.folder.parent.name == "small" for r in runs)


def test_resources_are_the_studys_and_over_them_the_runs_own(study):
    text, _ = study
    text["resources"] = {"partition": "gpu", "memory_gb": 16, "hours": 2}
    text["runs"][0]["resources"] = {"hours": 6.5}
    text["runs"][1]["resources"] = {"gpus": 0}
    runs = {r.name: r.resources for r in written(study).runs}
    histogram, pixels = runs["histogram, n_bins 50, seed 1"], runs["raw pixels, seed 0"]
    assert (histogram.partition, histogram.memory_gb, histogram.hours, histogram.gpus) == ("gpu", 16, 6.5, 1)
    assert (pixels.partition, pixels.memory_gb, pixels.hours, pixels.gpus) == ("gpu", 16, 2, 0)


def test_a_retry_asks_for_more_as_far_as_node_and_partition_go(study):
    text, _ = study
    text["resources"] = {"memory_gb": 24, "max_memory_gb": 60, "hours": 10, "max_hours": 24}
    asked = written(study).runs[0].resources
    assert [asked.memory_mib(attempt) for attempt in (1, 2, 3, 4)] == [24 * 1024, 48 * 1024, 60 * 1024, 60 * 1024]
    assert [asked.minutes(attempt) for attempt in (1, 2, 3)] == [600, 1200, 1440]
    text["resources"] |= {"memory_gb": 100.5, "hours": 48}  # what a study asks for is asked for
    asked = written(study).runs[0].resources
    assert [asked.memory_mib(attempt) for attempt in (1, 2)] == [102_912] * 2
    assert [asked.minutes(attempt) for attempt in (1, 2)] == [48 * 60] * 2


def test_resources_do_not_change_what_a_run_is(study):
    before = [r.config.run_id for r in written(study).runs]
    study[0]["resources"] = {"hours": 1}
    assert [r.config.run_id for r in written(study).runs] == before


@pytest.mark.parametrize(
    ("resources", "device", "message"),
    [
        ({"gpu": 1}, "auto", r"resources lacks \[\] and has the unknown \['gpu'\]; it takes account, gpus, hours"),
        ({"hours": 0}, "auto", "histogram, n_bins 20: resources hours=0: Input should be greater than 0"),
        ({"memory_gb": "much"}, "auto", "resources memory_gb='much'"),
        ({"gpus": 1}, "cpu", "gpus=1, but a run with device='cpu' and devices=1 takes 0"),
        ({"gpus": 0}, "cuda", "gpus=0, but a run with device='cuda' and devices=1 takes 1"),
        ({"gpus": 3}, "auto", "takes 0 or 1"),
    ],
    ids=str,
)
def test_wrong_resources_are_refused_by_name(study, resources, device, message):
    text, _ = study
    text["fixed"]["device"], text["resources"] = device, resources
    with pytest.raises(ConfigError, match=message):
        written(study)


def test_every_committed_study_loads():
    for file in STUDIES.glob("*.yaml"):
        assert load_study(file.stem).runs


DATASETS = ("cub", "sop", "cuhk03", "market1501")


def tuned_grids(name):
    """What each loss of a study is tuned over, but for the rates, which are the dataset's own."""
    entries = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())["runs"]
    crosses = {entry["name"]: dict(entry["cross"]) for entry in entries if entry.get("tune")}
    return {loss: (len(cross.pop("learning_rate")), cross) for loss, cross in crosses.items()}


@pytest.mark.parametrize("name", DATASETS)
def test_the_ablations_of_every_dataset_tune_the_same_losses_and_see_as_many_images(name):
    assert tuned_grids(f"{name}-ablations") == tuned_grids("glyphs")
    runs = load_study(f"{name}-ablations").runs
    equal = [run.config for run in runs if "batch at equal images" in run.methods]
    assert {c.batch_size for c in equal} == {32, 64, 128, 256}
    for setting in ("iterations", "validate_every", "lr_step"):
        assert len({c.batch_size * (getattr(c, setting) or 0) for c in equal}) == 1, setting


def test_the_papers_studies_with_their_ablations_hold_all_of_its_runs():
    everything, paper = load_study("paper-ablations"), load_study("paper")
    assert {run.config.folder for run in paper.runs} < {run.config.folder for run in everything.runs}
    assert {run.dataset for run in everything.waiting} == set(DATASETS)


HISTOGRAM = {"kernel": "triangular", "margin": 0.0, "order_cost": "step", "density": "histogram", "metric": "cosine"}
ADAPTED = {  # the paper's: layers that come trained at a tenth of the rate; the rest is Song et al.'s (2016)
    "network": "googlenet",
    "weights": "imagenet",
    "embedding_dim": 512,
    "pretrained_lr_factor": 0.1,
    "lr_step": None,
    "dropout": 0.4,
    "weight_decay": 2e-4,
    "crop": 227,
    "horizontal_flip": True,
    "iterations": 20_000,
    "sampler": "class-shuffle",
}
REIDENTIFIED = {  # the authors' network and solver for CUHK03
    "network": "parts",
    "embedding_dim": 500,
    "learning_rate": 1e-4,
    "lr_step": 100_000,
    "lr_step_factor": 0.1,
    "dropout": 0.5,
    "weight_decay": 5e-4,
    "crop": None,
    "horizontal_flip": False,
    "iterations": 150_000,
    "images_per_class": 10,  # no cap on CUHK03, where nobody has more
    "sampler": "class-shuffle",
}
PAPER = {
    "cub": ADAPTED | {"learning_rate": 1e-5, "images_per_class": 10},
    "sop": ADAPTED | {"learning_rate": 1e-4},
    "cuhk03": REIDENTIFIED,
    "market1501": REIDENTIFIED,
}


def configs_of(name, comparison, loss):
    """The resolved settings of one loss's runs in a comparison of a study."""
    runs = [run.config for run in load_study(name).runs if comparison in run.methods]
    return [config.resolved() for config in runs if config.loss == loss]


@pytest.mark.parametrize("name", DATASETS)
def test_the_paper_studies_train_the_histogram_loss_as_the_paper_does(name):
    expected = HISTOGRAM | PAPER[name]
    for made in load_study(name).runs:
        if made.config.loss == "histogram":
            config = made.config.resolved()
            assert {setting: config[setting] for setting in expected} == expected
    for config in configs_of(name, "losses", "histogram"):
        assert (config["batch_size"], config["n_bins"]) == (128, 200)


def test_the_paper_studies_cross_what_the_papers_figures_and_table_1_do():
    assert {c["n_bins"] for c in configs_of("cub", "bins", "histogram")} == {50, 100, 200, 400}
    for name in ("cuhk03", "market1501"):
        assert {128, 256} <= {c["batch_size"] for c in configs_of(name, "batch", "histogram")}
    splits = {(c["seed"], c["dataset"]) for c in configs_of("cuhk03", "losses", "histogram")}
    assert splits == {(n, f"cuhk03-{n}") for n in (1, 2, 3, 4, 5)}


@pytest.mark.parametrize(("name", "slope"), [("cub", 25.0), ("sop", 25.0), ("cuhk03", 10.0), ("market1501", 25.0)])
def test_the_paper_studies_hold_the_rivals_settings(name, slope):
    deviances = configs_of(name, "losses", "binomial")
    assert slope in {c["C"] for c in deviances}
    assert {(c["alpha"], c["beta"]) for c in deviances} == {(2.0, 0.5)}
    lifted = configs_of(name, "losses", "lifted")
    assert {(c["margin"], c["normalize"], c["metric"]) for c in lifted} == {(1.0, False, "euclidean")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(seed=[1]), r"has the unknown \['seed'\]"),
        (lambda t: t["runs"][0].pop("set"), r"run 'histogram' lacks \['set'\]"),
        (lambda t: t["runs"][0]["cross"].update(n_bins=[0]), "histogram, n_bins 0: n_bins must be a whole number"),
        (lambda t: t["fixed"].update(lr=1.0), "lr=1.0 is no setting"),
    ],
)
def test_a_wrong_study_is_refused_by_name(study, change, message):
    change(study[0])
    with pytest.raises(ConfigError, match=message):
        written(study)


def test_an_unknown_study_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"study='quik' is unknown, allowed are .*\(did you mean quick\?\)"):
        load_study("quik")


def test_results_of_different_code_are_never_mixed_silently(study, monkeypatch):
    loaded = written(study)
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


def test_a_result_of_another_version_of_a_package_that_its_settings_name_is_stale(study, monkeypatch):
    study[0]["runs"] = [{"name": "multi-similarity", "set": {"loss": "pml:MultiSimilarityLoss"}}]
    loaded = written(study)
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


def test_a_result_made_before_packages_counted_is_stale_if_its_settings_name_one(study):
    study[0]["runs"] = [{"name": "multi-similarity", "set": {"loss": "pml:MultiSimilarityLoss"}}]
    loaded = written(study)
    run(loaded.runs[0].config, lambda line: None)
    file = loaded.runs[0].config.folder / "result.json"
    told = json.loads(file.read_text())
    told["fingerprint"] = {name: told["fingerprint"][name] for name in ("code_sha256", "card_sha256")}
    file.write_text(json.dumps(told))
    assert stale_runs(loaded, {}) == [loaded.runs[0]]


def test_results_of_different_data_are_refused_even_when_kept(study):
    loaded = written(study)
    for r in loaded.runs:
        run(r.config, lambda line: None)
    file = loaded.runs[0].config.folder / "result.json"
    card = run(loaded.runs[0].config)["fingerprint"]["card_sha256"]
    file.write_text(file.read_text().replace(card, "other"))
    with pytest.raises(ConfigError, match=f"run {loaded.runs[0].config.run_id} .* has card_sha256='other'"):
        collect(loaded, keep=True)


def test_the_table_holds_every_run_and_its_summary(study):
    loaded = written(study)
    results = {r.config.run_id: run(r.config, lambda line: None) for r in loaded.runs}
    table = collect(loaded).explode(["comparison", "method"])
    for row in table.itertuples():
        assert row.chosen_iteration == results[row.run_id]["chosen"]["iteration"]
    means = summary(table, ["recall@1"]).set_index("method")
    values = table[table.method == "histogram, n_bins 20"]["recall@1"]
    assert means.loc["histogram, n_bins 20", "recall@1"] == pytest.approx(values.mean())
    assert means.loc["histogram, n_bins 20", "n"] == 2
    assert means["recall@1 low"].isna().tolist() == [False, False, True]


def test_t_interval_is_the_textbook_one():
    mean, low, high = t_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * 1.290994 / 2  # t quantile for 3 degrees of freedom, standard deviation, root of n
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)


def test_the_committed_sample_is_the_glyphs_study_and_learned():
    table = read_results(Path("reports/sample/results.parquet"))
    known = {r.config.run_id for r in load_study("glyphs").runs}
    assert known <= set(table["run_id"])
    assert table["complete"].all()
    tuned_runs = table[table["comparison"] == "tuned losses"].groupby("loss")["seed"].nunique()
    assert tuned_runs.tolist() == [5] * 7
    assert sum(file.stat().st_size for file in Path("reports/sample").iterdir()) < 5e6
    assert table["code_sha256"].nunique() == 1
    recall = table[table["comparison"] == "losses"].groupby("method")["recall@1"].agg(["min", "max"])
    assert recall.loc["untrained network", "max"] < 5
    assert recall.loc["histogram", "min"] > 5 * recall.loc["untrained network", "max"]


def test_results_that_must_not_be_compared_are_refused_by_name(tmp_path):
    table = pd.read_parquet(Path("reports/sample/results.parquet"))
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


def test_splits_are_alike_but_for_their_test_set_and_each_is_another(tmp_path):
    table = pd.read_parquet(Path("reports/sample/results.parquet"))
    table = table[table["seed"].isin([0, 1])].assign(dataset="cuhk03", split=lambda t: "cuhk03-" + t["seed"].map(str))
    second = table["seed"] == 1

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
        read_results(written_with(first_set, first_set, card=table["card_sha256"].iloc[0]))


def test_a_run_that_chooses_is_of_the_same_data_and_protocol(tmp_path):
    table = pd.read_parquet(Path("reports/sample/results.parquet"))
    row = table.index[table["comparison"].map(lambda names: names[0].endswith(": choice"))][3]
    for name in ("protocol", "card_sha256"):
        table.assign(**{name: table[name].where(table.index != row, "another")}).to_parquet(tmp_path / "r.parquet")
        with pytest.raises(ConfigError, match=f"run {table.loc[row, 'run_id']} .* has {name}='another'"):
            read_results(tmp_path / "r.parquet")


def tuned(study):
    text, _ = study
    text["tuning_seed"] = 9
    text["runs"][0] |= {"tune": True, "comparison": "tuned"}
    return text


def test_a_tuned_setting_is_the_best_on_validation_and_only_then_known(study):
    tuned(study)
    waiting = written(study)
    assert [(r.methods, r.config.seed) for r in waiting.runs[:2]] == [
        ({"tuned: choice": "histogram, n_bins 20"}, 9),
        ({"tuned: choice": "histogram, n_bins 50"}, 9),
    ]
    assert [r.name for r in waiting.waiting] == ["histogram, seed 0", "histogram, seed 1"]
    results = {r.config.n_bins: run(r.config, lambda line: None)["validation_recall@1"] for r in waiting.runs[:2]}
    known = written(study)
    assert known.waiting == ()
    chosen = [r.config.n_bins for r in known.runs if r.methods == {"tuned": "histogram"}]
    assert chosen == [max(results, key=results.get)] * 2


def test_tuning_on_a_seed_of_the_comparison_is_refused(study):
    tuned(study)["tuning_seed"] = 0
    with pytest.raises(
        ConfigError, match="run 'histogram': tune needs a tuning_seed of the study that is none of seeds"
    ):
        written(study)


def test_a_run_of_two_comparisons_is_run_once(study):
    text, _ = study
    text["runs"].append({"name": "histogram, coarse", "comparison": "bins", "set": {"loss": "histogram", "n_bins": 20}})
    loaded = written(study)
    assert len(loaded.runs) == 5
    assert loaded.runs[0].methods == {"losses": "histogram, n_bins 20", "bins": "histogram, coarse"}


def test_a_study_that_extends_another_adds_runs_to_its_folder(study):
    _, folder = study
    base = written(study)
    more = {"name": "histogram", "comparison": "bins", "set": {"loss": "histogram"}, "cross": {"n_bins": [50, 100]}}
    (folder / "more.yaml").write_text(yaml.safe_dump({"title": "more", "extends": "small", "runs": [more]}))
    loaded = load_study("more", folder)
    assert (loaded.title, [f.name for f in loaded.files]) == ("more", ["more.yaml", "small.yaml"])
    assert [r.config for r in loaded.runs[:5]] == [r.config for r in base.runs]
    assert [r.name for r in loaded.runs[5:]] == [f"histogram, n_bins 100, seed {seed}" for seed in (0, 1)]
    assert {r.config.folder.parent.name for r in loaded.runs} == {"small"}
    shared = loaded.runs[2]
    assert shared.methods == {"losses": "histogram, n_bins 50", "bins": "histogram, n_bins 50"}


def test_a_study_that_includes_others_has_their_runs_and_those_that_wait(study, tiny_data):
    text, folder = study
    tuned(study)
    written(study)
    shutil.copytree(tiny_data / "tiny", folder / "data" / "tiny-1")
    other = text | {"seeds": [1], "fixed": text["fixed"] | {"dataset": "tiny-{seed}"}, "runs": text["runs"][1:]}
    other["runs"][0]["seeds"] = [1]
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    (folder / "both.yaml").write_text(yaml.safe_dump({"title": "both", "include": ["small", "other"]}))
    loaded = load_study("both", folder)
    assert [r.config.folder.parent.name for r in loaded.runs] == ["small"] * 3 + ["other"]
    assert [r.name for r in loaded.waiting] == ["histogram, seed 0", "histogram, seed 1"]
    assert [f.name for f in loaded.files] == ["both.yaml", "small.yaml", "other.yaml"]


def test_each_seed_of_a_split_dataset_has_its_own_and_results_are_of_one_dataset(study, tiny_data):
    text, folder = study
    for seed in (1, 2):
        shutil.copytree(tiny_data / "tiny", folder / "data" / f"tiny-{seed}")
    card = folder / "data" / "tiny-2" / "card.json"
    card.write_text(card.read_text() + " ")  # another split has another card
    text["fixed"] |= {"dataset": "tiny-{seed}", "data_dir": str(folder / "data")}
    text["seeds"], text["runs"][1]["seeds"] = [1, 2], [1]
    loaded = written(study)
    assert [r.config.dataset for r in loaded.runs] == ["tiny-1", "tiny-2", "tiny-1", "tiny-2", "tiny-1"]
    for r in loaded.runs:
        run(r.config, lambda line: None)
    collect(loaded).to_parquet(folder / "results.parquet")
    results = read_results(folder / "results.parquet")
    assert set(results["dataset"]) == {"tiny"}
    assert set(results["split"]) == {"tiny-1", "tiny-2"}
    assert summary(results, ["recall@1"])["n"].tolist() == [2, 2, 1]
    assert results["reverse_probability"].notna().tolist() == [True, False, True, False, True]


def test_the_interval_over_classes_is_of_the_runs_own_queries(study):
    loaded = written(study)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"title": "t", "include": ["small"], "seeds": [0]}, r"includes others lacks \[\] and has the unknown"),
        ({"title": "t", "extends": "small"}, r"extends another lacks \['runs'\]"),
        ({"title": "t", "extends": "smal", "runs": []}, r"study='smal' is unknown.*did you mean small"),
        ({"title": "t", "extends": "more", "runs": []}, r"more.yaml: made of other studies itself, it cannot be exten"),
    ],
)
def test_a_wrong_combination_of_studies_is_refused_by_name(study, text, message):
    written(study)
    (study[1] / "more.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(ConfigError, match=message):
        load_study("more", study[1])


def test_a_dataset_with_a_split_in_its_middle_is_refused(study):
    study[0]["fixed"]["dataset"] = "tiny-{seed}-labeled"
    with pytest.raises(ConfigError, match="must be a name of letters"):
        written(study)


def test_a_part_that_is_not_there_is_refused_with_what_is():
    results = read_results(Path("reports/sample/results.parquet"))
    assert set(select_results(results, comparison="bins", seed=1)["seed"]) == {1}
    with pytest.raises(
        ConfigError, match=r"comparison='bin' is none of these results', which have losses, tuned losses"
    ):
        select_results(results, dataset="glyphs", comparison="bin")


def test_results_stand_in_the_order_of_the_study(study):
    text, folder = study
    text["runs"].append(
        {"name": "histogram", "comparison": "bins", "set": {"loss": "histogram"}, "cross": {"n_bins": [10, 20]}}
    )
    loaded = written(study)  # its first run, with 20 bins, stands in both
    for r in loaded.runs:
        run(r.config, lambda line: None)
    collect(loaded).to_parquet(folder / "results.parquet")
    results = read_results(folder / "results.parquet")
    assert select_results(results, comparison="bins")["n_bins"].tolist() == [10, 10, 20, 20]
    assert results["comparison"].unique().tolist() == ["losses", "bins"]


def test_a_run_of_two_included_studies_stands_in_the_comparisons_of_both(study):
    _, folder = study
    written(study)
    bins = {"name": "histogram", "comparison": "bins", "set": {"loss": "histogram", "n_bins": 20}}
    (folder / "more.yaml").write_text(yaml.safe_dump({"title": "m", "extends": "small", "runs": [bins]}))
    (folder / "both.yaml").write_text(yaml.safe_dump({"title": "b", "include": ["small", "more"]}))
    loaded = load_study("both", folder)
    assert len(loaded.runs) == 5
    assert loaded.runs[0].methods == {"losses": "histogram, n_bins 20", "bins": "histogram"}


def test_runs_that_choose_are_not_trained_again_on_all_classes(study):
    text = tuned(study)
    text["fixed"]["refit"] = True
    text["runs"][0]["comparison"] = "tuned losses"
    text["runs"][1]["set"]["refit"] = False
    loaded = written(study)
    assert {r.config.refit for r in loaded.runs if r.config.seed == 9} == {False}
    assert {r.config.refit for r in loaded.waiting} == {True}
    for r in loaded.runs:
        run(r.config, lambda line: None)
    for r in (known := written(study)).runs:
        run(r.config, lambda line: None)
    table = collect(known)  # trained on other classes than those that choose, and not refused for it
    assert table[table["seed"] == 9]["trained_on"].unique().tolist() == ["training classes"]
    table.to_parquet(study[1] / "results.parquet")
    (chosen,) = chosen_settings(read_results(study[1] / "results.parquet")).to_dict("records")
    assert re.fullmatch(r"n_bins (20|50)", chosen["chosen"])
    assert chosen["at an edge of its grid"] == "n_bins"  # of two values both are
