"""The committed studies: their runs and settings are those of the paper."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from hloss.study.plan import plan_runs, read_costs
from hloss.study.results import at_length, read_results
from hloss.study.spec import CHOICE, EXTENDED, LOSS_COMPARISONS, STUDIES, load_study

SAMPLE = Path("reports/sample")
GRID_AXES = ("learning_rate", "n_bins", "C", "margin")
GRIDS = [f"{LOSS_COMPARISONS[1]}{suffix}" for suffix in (CHOICE, EXTENDED + CHOICE)]


def test_every_committed_study_loads():
    for file in STUDIES.glob("*.yaml"):
        assert load_study(file.stem).runs


DATASETS = ("cub", "sop", "cuhk03", "market1501")


def tuned_grids(name):
    """The grid of each loss of a study without learning rates, which differ between datasets."""
    entries = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())["runs"]
    crosses = {entry["name"]: dict(entry["cross"]) for entry in entries if entry.get("tune")}
    return {loss: (len(cross.pop("learning_rate")), cross) for loss, cross in crosses.items()}


@pytest.mark.parametrize("name", DATASETS)
def test_ablations_of_every_dataset_have_equal_grids_and_numbers_of_images(name):
    assert tuned_grids(f"{name}-ablations") == tuned_grids("glyphs")
    runs = load_study(f"{name}-ablations").runs
    equal = [run.config for run in runs if "batch at equal images" in run.methods]
    assert {c.batch_size for c in equal} == {32, 64, 128, 256}
    for setting in ("iterations", "validate_every", "lr_step"):
        assert len({c.batch_size * (getattr(c, setting) or 0) for c in equal}) == 1, setting


def test_paper_ablations_contain_all_runs_of_the_paper():
    everything, paper = load_study("paper-ablations"), load_study("paper")
    assert {run.config.folder for run in paper.runs} < {run.config.folder for run in everything.runs}
    assert {run.dataset for run in everything.waiting} == set(DATASETS)


PARTS = yaml.safe_load((STUDIES / "sample.yaml").read_text())["include"]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_sample_takes_at_most_150_minutes_on_two_cores(name):
    study = load_study(name)
    assert study.part_of == "sample"
    known = [entry.need.hours for entry in plan_runs(study, 0, read_costs())]
    longest = max(known)
    assert 60 * (sum(known) + longest * len(study.waiting)) / 2 < 150
    trained = [run.config for run in study.runs + study.waiting if run.config.iterations]
    images = {tuple(length * config.batch_size for length in config.lengths) for config in trained}
    assert (25_600, 76_800, 256_000) in images
    drawings = {"glyphs-easy", "glyphs", "glyphs-hard"} if name == "glyphs-difficulty" else {"glyphs"}
    assert {run.dataset for run in study.runs} == drawings
    assert all(run.config.dataset == f"{run.dataset}-{run.config.seed}" for run in study.runs)


def test_the_sample_has_five_seeds_for_what_a_claim_asks():
    study, seeds = load_study("sample"), {}
    for run in study.runs + study.waiting:
        for comparison, method in run.methods.items():
            seeds.setdefault(comparison, {}).setdefault(method, set()).add(run.config.seed)
    three = {
        (comparison, method) for comparison, methods in seeds.items() for method, of in methods.items() if len(of) == 3
    }
    bandwidths = [
        f"kernel {name}, bandwidth {b}" for name in ("gaussian", "epanechnikov", "uniform") for b in (0.5, 20)
    ]
    samplers = [f"sampler {name}" for name in ("class-shuffle", "balanced", "random-class")]
    rates = [f"learning_rate {rate}" for rate in (0.0001, 0.0003, 0.001, 0.003, 0.01)]
    no_claim = {("learning rate", f"binomial deviance, {rate}") for rate in rates} | {("order cost", "Beta density")}
    no_claim |= {("kernel", f"histogram, {value}") for value in bandwidths}
    assert three == no_claim | {("sampler", f"histogram, {value}") for value in samplers}
    assert {len(of) for methods in seeds.values() for of in methods.values()} == {1, 3, 5}  # 1: a grid
    seeds = {comparison: set().union(*methods.values()) for comparison, methods in seeds.items()}
    grids = {name: found for name, found in seeds.items() if name.endswith(CHOICE)}
    assert grids == {f"{name}: choice": {5} for name in ("tuned losses", "batch at equal images")}


def test_the_study_of_difficulty_changes_the_drawing_alone():
    runs = load_study("glyphs-difficulty").runs
    assert list(dict.fromkeys(run.dataset for run in runs)) == ["glyphs-easy", "glyphs", "glyphs-hard"]
    of_methods = {}
    for run in runs:
        (method,) = run.methods.values()
        settings = run.config.resolved()
        del settings["dataset"]
        of_methods.setdefault((method, run.config.seed), []).append(settings)
    assert [method for method, seed in of_methods if seed == 0][:2] == ["histogram", "binomial deviance"]
    assert len(of_methods) == 3 * 5
    assert all(len(of_three) == 3 and of_three[0] == of_three[1] == of_three[2] for of_three in of_methods.values())


def settings_of_difficulty():
    """Method -> settings in the file of the study of difficulty."""
    return {next(iter(run.methods.values())): run.config.resolved() for run in load_study("glyphs-difficulty").runs}


def differing_settings(results):
    """Where the file of the study of difficulty differs from what the grids of a table chose at the longest length."""
    grids = at_length(results[results["comparison"].isin(GRIDS) & (results["dataset"] == "glyphs")])
    grids = grids.assign(name=grids["method"].str.partition(",")[0])
    ordered = grids.sort_values("validation_recall@1", ascending=False, kind="stable")
    best, runs = ordered.drop_duplicates("name").set_index("name"), settings_of_difficulty()
    rival = next(name for name in best.index if name not in ("histogram", "binomial deviance"))
    wanted = ["histogram", "binomial deviance", rival]
    if list(runs) != wanted:
        return [f"methods: got {list(runs)}; the grids chose {wanted}"]
    return [
        f"{name}: {axis}: got {runs[name][axis]:g}; the grid chose {best.loc[name, axis]:g}"
        for name in wanted
        for axis in GRID_AXES
        if axis in runs[name] and runs[name][axis] != best.loc[name, axis]
    ]


def test_the_study_of_difficulty_has_the_settings_that_the_grids_of_the_sample_chose():
    if not (SAMPLE / "parts" / "glyphs-difficulty.parquet").exists():
        pytest.skip("the sample has no part glyphs-difficulty")
    assert differing_settings(read_results(SAMPLE / "results.parquet")) == []


def grid_run(method, recall, settings):
    named = {"dataset": "glyphs", "comparison": GRIDS[0], "method": f"{method}, x", "length": 2000}
    return named | {"validation_recall@1": recall} | {axis: settings.get(axis) for axis in GRID_AXES}


def test_a_difference_from_the_chosen_settings_is_named():
    known = settings_of_difficulty()
    rows = [grid_run(method, 60.0, settings) for method, settings in known.items()]
    rows += [grid_run("another loss", 59.0, {"margin": 3.0}), grid_run("histogram", 59.0, {"n_bins": 3})]
    assert differing_settings(pd.DataFrame(rows)) == []
    better = grid_run("histogram", 61.0, known["histogram"] | {"n_bins": 3})
    assert differing_settings(pd.DataFrame([*rows, better])) == [
        f"histogram: n_bins: got {known['histogram']['n_bins']}; the grid chose 3"
    ]
    (line,) = differing_settings(pd.DataFrame([*rows, grid_run("another loss", 61.0, {})]))
    assert line.endswith("the grids chose ['histogram', 'binomial deviance', 'another loss']")


def test_every_grid_of_the_sample_has_the_rate_of_the_paper_and_the_same_size():
    entries = [entry for name in PARTS for entry in yaml.safe_load((STUDIES / f"{name}.yaml").read_text())["runs"]]
    grids = [entry["cross"] for entry in entries if entry.get("tune")]
    assert all(0.0001 in grid["learning_rate"] for grid in grids)
    of_losses = [entry["cross"] for entry in entries if entry.get("comparison") == LOSS_COMPARISONS[1]]
    assert {tuple(map(len, grid.values())) for grid in of_losses} == {(5, 4)}
    assert len(of_losses) == 7


HISTOGRAM = {"kernel": "triangular", "margin": 0.0, "order_cost": "step", "density": "histogram", "metric": "cosine"}


ADAPTED = {  # from the paper: pretrained layers at a tenth of the learning rate; other values from Song et al. (2016)
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


REIDENTIFIED = {  # network and solver of the authors for CUHK03
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
    "images_per_class": 10,  # no identity of CUHK03 has more
    "sampler": "class-shuffle",
}


PAPER = {
    "cub": ADAPTED | {"learning_rate": 1e-5, "images_per_class": 10},
    "sop": ADAPTED | {"learning_rate": 1e-4},
    "cuhk03": REIDENTIFIED,
    "market1501": REIDENTIFIED,
}


def configs_of(name, comparison, loss):
    """The resolved settings of the runs of one loss in a comparison of a study."""
    runs = [run.config for run in load_study(name).runs if comparison in run.methods]
    return [config.resolved() for config in runs if config.loss == loss]


@pytest.mark.parametrize("name", DATASETS)
def test_histogram_loss_has_the_settings_of_the_paper(name):
    expected = HISTOGRAM | PAPER[name]
    for made in load_study(name).runs:
        if made.config.loss == "histogram":
            config = made.config.resolved()
            assert {setting: config[setting] for setting in expected} == expected
    for config in configs_of(name, "losses", "histogram"):
        assert (config["batch_size"], config["n_bins"]) == (128, 200)


def test_studies_cross_the_values_of_the_figures_and_table_1():
    assert {c["n_bins"] for c in configs_of("cub", "bins", "histogram")} == {50, 100, 200, 400}
    for name in ("cuhk03", "market1501"):
        assert {128, 256} <= {c["batch_size"] for c in configs_of(name, "batch", "histogram")}
    splits = {(c["seed"], c["dataset"]) for c in configs_of("cuhk03", "losses", "histogram")}
    assert splits == {(n, f"cuhk03-{n}") for n in (1, 2, 3, 4, 5)}


@pytest.mark.parametrize(("name", "slope"), [("cub", 25.0), ("sop", 25.0), ("cuhk03", 10.0), ("market1501", 25.0)])
def test_baseline_losses_have_the_settings_of_the_paper(name, slope):
    deviances = configs_of(name, "losses", "binomial")
    assert slope in {c["C"] for c in deviances}
    assert {(c["alpha"], c["beta"]) for c in deviances} == {(2.0, 0.5)}
    lifted = configs_of(name, "losses", "lifted")
    assert {(c["margin"], c["normalize"], c["metric"]) for c in lifted} == {(1.0, False, "euclidean")}
