"""Settings of a run: checks before training; losses, miners, samplers and metrics that they select."""

import dataclasses
import inspect
import json
import math
import re
from datetime import date

import pandas as pd
import pytest
import torch
from torch import nn

from hloss.integrations.pml_losses import PMLLoss, available, pml_metric
from hloss.losses.baselines import BASELINES
from hloss.losses.histogram import HistogramLoss
from hloss.runs.config import LOSS_SETTINGS, LOSSES, PML_SETTINGS, RunConfig, config_from_notebook, parse_config
from hloss.runs.errors import ConfigError
from hloss.runs.run import run
from hloss.samplers import SAMPLERS
from hloss.study.spec import load_study

MULTI_SIMILARITY = {"loss": "pml:MultiSimilarityLoss", "loss_options": {"alpha": 3.0}, "miner": "MultiSimilarityMiner"}
DEFAULT_RUN_ID = "96c7caab16b4"  # of every version since settings have their present names
OPTIONS = {
    "binomial": {"alpha": 1.0, "beta": 0.4, "C": 5.0},
    "lifted": {"margin": 0.5, "normalize": True},
    "triplet": {"margin": 0.3},
    "semi-hard-triplet": {"margin": 0.3},
    "contrastive": {"margin": 0.5, "normalize": True},
    "quadruplet": {"margin": 0.3},
}


@pytest.fixture
def settings(tiny_data, tmp_path):
    small = {"batch_size": 24, "images_per_class": 4, "iterations": 6, "validate_every": 3}
    places = {"dataset": "tiny", "data_dir": str(tiny_data), "runs_dir": str(tmp_path / "runs"), "device": "cpu"}
    return small | places


def quiet(line):
    pass


@pytest.mark.parametrize("loss", BASELINES)
def test_every_argument_of_a_baseline_is_a_setting(loss):
    options = OPTIONS[loss] | {"on_degenerate": "zero"}
    built = parse_config({"loss": loss, **options}).build_loss()
    assert isinstance(built, BASELINES[loss])
    assert {name: getattr(built, name) for name in options} == options
    assert set(options) == set(inspect.signature(BASELINES[loss]).parameters)


def test_histogram_loss_arguments_are_settings_with_the_same_defaults():
    arguments = {name: p.default for name, p in inspect.signature(HistogramLoss).parameters.items()}
    assert set(arguments) == {field.name for field in dataclasses.fields(HistogramLoss().settings)}
    assert RunConfig().loss_settings() == dataclasses.asdict(HistogramLoss().settings) == arguments


def test_every_setting_has_a_description_and_loss_settings_default_to_none():
    assert all(field.description for field in RunConfig.model_fields.values())
    assert {RunConfig.model_fields[name].default for name in LOSS_SETTINGS + PML_SETTINGS} == {None}
    taken = [set(inspect.signature(loss).parameters) for loss in LOSSES.values()]
    assert set(LOSS_SETTINGS) == set().union(*taken)


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_trained_metric_equals_the_metric_of_the_loss(loss, normalize):
    if normalize is None or "normalize" in inspect.signature(LOSSES[loss]).parameters:
        config = parse_config({"loss": loss, "normalize": normalize})
        assert config.trained_metric == getattr(config.build_loss(), "metric", "cosine")


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # LargeMarginSoftmaxLoss
@pytest.mark.parametrize("normalize", [None, True, False])
def test_trained_metric_of_a_pml_loss_follows_from_its_options(normalize):
    options = {} if normalize is None else {"distance": {"LpDistance": {"normalize_embeddings": normalize}}}
    metrics = set()
    for name in available("losses"):
        try:
            built = PMLLoss(name, options)
        except ValueError:  # It requires other options or does not accept this distance.
            continue
        assert pml_metric(options) == built.metric, name
        metrics.add(built.metric)
    assert metrics == {"euclidean" if normalize is False else "cosine"}


@pytest.mark.parametrize("loss", ["histogram", "lifted", "pml:MultiSimilarityLoss"])
def test_run_id_and_folder_do_not_build_the_loss(monkeypatch, loss):
    config = parse_config({"loss": loss})
    monkeypatch.setattr(nn.Module, "__init__", lambda self: pytest.fail("a loss was built"))
    assert config.folder.name == config.run_id
    assert config.resolved()["metric"] == ("euclidean" if loss == "lifted" else "cosine")


@pytest.mark.parametrize("loss", ["histogram", *BASELINES])
def test_every_loss_trains(settings, loss):
    result = run(parse_config({**settings, "loss": loss}), quiet)
    assert result["chosen"]["iteration"] > 0
    metric = "euclidean" if loss in ("lifted", "contrastive") else "cosine"
    assert result["config"]["metric"] == metric
    assert result["config"]["normalize_embeddings"] == (metric == "cosine")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_trains(settings, sampler):
    own = {"min_images_per_class": 3} if sampler == "random-class" else {}
    result = run(parse_config({**settings, "sampler": sampler, **own}), quiet)
    assert result["config"].get("min_images_per_class") == own.get("min_images_per_class")
    assert (
        len(pd.read_parquet(next(parse_config({**settings, "sampler": sampler, **own}).folder.glob("*.parquet")))) == 6
    )


def test_pml_losses_and_miners_train(settings):
    config = parse_config({**settings, **MULTI_SIMILARITY, "miner_options": {"epsilon": 0.2}})
    loss = config.build_loss()
    assert isinstance(loss, PMLLoss)
    assert (loss.loss.alpha, loss.miner.epsilon) == (3.0, 0.2)
    result = run(config, quiet)
    assert result["config"]["loss_options"] == {"alpha": 3.0}
    assert "pytorch-metric-learning" in result["provenance"]["packages"]
    assert re.fullmatch(r".*\S, [1-9]\d* cores", result["provenance"]["processor"])
    assert parse_config({**settings, **MULTI_SIMILARITY}).run_id != config.run_id


@pytest.mark.parametrize("micro_batch", [None, 10])
def test_weights_of_a_loss_are_trained_and_resumed(settings, tmp_path, micro_batch):
    proxies = {"loss": "pml:ProxyAnchorLoss", "micro_batch": micro_batch, "batchnorm": "slices"}
    config = parse_config({**settings, **proxies})
    whole = run(config, quiet)
    often = {"runs_dir": str(tmp_path / "broken"), "checkpoint_seconds": 0.0}
    broken = parse_config({**settings, **proxies, **often})

    def killed_at_the_last_validation(line):
        if line.startswith("iteration 6/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, killed_at_the_last_validation)
    saved = torch.load(broken.folder / "checkpoint.pt", weights_only=True)
    (learned,) = saved["loss"].values()
    (drawn,) = config.build_loss(n_classes=16).state_dict().values()
    assert learned.shape == drawn.shape == (16, 128)
    assert (learned - drawn).abs().max() > 1e-3
    again = run(broken, quiet)
    assert again["network_sha256"] == whole["network_sha256"]


@pytest.mark.parametrize(
    "given",
    [
        {"loss_options": {"alpha": 3.0}},
        {"loss_options": json.dumps({"alpha": 3.0})},  # papermill -p
    ],
)
def test_options_are_accepted_as_a_mapping_or_json(given):
    config = config_from_notebook({"loss": "pml:MultiSimilarityLoss", **given})
    assert config.loss_options == {"alpha": 3.0}


def test_a_study_crosses_loss_options(tmp_path):
    (tmp_path / "peers.yaml").write_text("""
title: options in a study
fixed: {loss: "pml:TripletMarginLoss", miner: TripletMarginMiner, miner_options: {type_of_triplets: semihard}}
seeds: [0]
runs:
  - name: triplet
    set: {}
    cross: {loss_options: [{margin: 0.1}, {margin: 0.2, distance: {LpDistance: {power: 2}}}]}
""")
    runs = load_study("peers", tmp_path).runs
    assert [run.config.loss_options["margin"] for run in runs] == [0.1, 0.2]
    assert {run.config.miner_options["type_of_triplets"] for run in runs} == {"semihard"}
    (tmp_path / "peers.yaml").write_text((tmp_path / "peers.yaml").read_text().replace("power", "pover"))
    with pytest.raises(ConfigError, match=r"pover=2 is unknown to LpDistance.*did you mean power"):
        load_study("peers", tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "pml:MultiSimilarityLos"}, r"pml:MultiSimilarityLos is unknown .*did you mean MultiSimilarityLoss"),
        ({**MULTI_SIMILARITY, "loss_options": {"alfa": 1}}, r"alfa=1 is unknown .*\(did you mean alpha\?\)"),
        ({**MULTI_SIMILARITY, "miner": "MultiSimilarityMinr"}, r"MultiSimilarityMinr .*did you mean MultiSimilarityMi"),
        ({**MULTI_SIMILARITY, "miner_options": {"eps": 1}}, "eps=1 is unknown to MultiSimilarityMiner"),
        ({**MULTI_SIMILARITY, "margin": 0.1}, "has no setting margin; it has loss_options, miner, miner_options"),
        ({**MULTI_SIMILARITY, "loss_options": "alpha: 1"}, "loss_options='alpha: 1': must be a mapping"),
        (
            {"loss": "triplet", "miner": "BatchHardMiner"},
            "loss 'triplet' has no setting miner; it has margin, on_degenerate",
        ),
        ({"loss": "triplet", "margin": 0.0}, "margin must be a finite number above 0: got 0.0"),
        ({"loss": "lifted", "normalize": 1}, "normalize=1: must be true or false"),
        ({"loss": "pml"}, "loss='pml' is unknown; allowed are histogram, binomial, lifted"),
        ({"metric": "cosin"}, r"metric='cosin' is unknown; allowed are cosine, euclidean \(did you mean cosine\?\)"),
        ({"sampler": "balance"}, r"allowed are class-shuffle, .*\(did you mean balanced\?\)"),
        (
            {"min_images_per_class": 5},
            "min_images_per_class=5: sampler 'class-shuffle' has no setting min_images_per_class",
        ),
        (
            {"sampler": "balanced", "batch_size": 128, "images_per_class": 10},
            'batch_size=128: sampler "balanced" requires a multiple of images_per_class=10',
        ),
    ],
    ids=str,
)
def test_refuses_wrong_settings_of_losses_and_samplers(wrong, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(wrong)


def test_refuses_batches_that_the_dataset_cannot_fill(settings):
    with pytest.raises(
        ConfigError, match="sampler='balanced': each class needs at least images_per_class=8 images: got 16 of 16"
    ):
        run(parse_config({**settings, "sampler": "balanced", "images_per_class": 8}), quiet)


def test_building_a_loss_keeps_the_state_of_the_generator():
    before = torch.get_rng_state()
    parse_config({"loss": "pml:ArcFaceLoss"})
    assert torch.equal(before, torch.get_rng_state())
    one, two = (parse_config({"loss": "pml:ArcFaceLoss", "seed": seed}).build_loss(5) for seed in (0, 1))
    again = parse_config({"loss": "pml:ArcFaceLoss"}).build_loss(5)
    assert torch.equal(one.loss.W, again.loss.W)
    assert not torch.equal(one.loss.W, two.loss.W)


def test_baselines_have_no_parameters():
    assert not any(isinstance(p, nn.Parameter) for loss in BASELINES.values() for p in loss().parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_bin": 50}, r"n_bin=50 is not a setting of a run \(did you mean n_bins\?\)"),
        ({"n_bins": 0}, "n_bins must be a whole number of at least 1: got 0"),
        ({"n_bins": "fifty"}, "n_bins='fifty': must be a whole number"),
        (
            {"loss": "histogramm"},
            r"loss='histogramm' is unknown; allowed are .*\(did you mean histogram\?\)",
        ),
        ({"loss": "binomial", "n_bins": 50}, "loss 'binomial' has no setting n_bins; it has alpha, beta, C"),
        ({"iterations": 0}, "iterations=0 does not fit loss='histogram'; loss \"none\" requires 0"),
        ({"network": "pixels"}, 'iterations=60: network "pixels" has no parameters; set iterations to 0'),
        ({"batch_size": 1}, "batch_size=1"),
        ({"loss": date(2020, 1, 2)}, "loss=2020-01-02: must be text; put it in quotes"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"study": "../escape"}, "study='../escape' must be a name"),
    ],
    ids=str,
)
def test_refuses_wrong_settings_of_a_run(wrong, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(wrong)


def test_refuses_notebook_variables_that_are_not_settings():
    assert config_from_notebook({"loss": "binomial", "_hidden": 1, "json": json}).loss == "binomial"
    with pytest.raises(ConfigError, match="bins=5 is not a setting of a run"):
        config_from_notebook({"loss": "histogram", "bins": 5})


def test_run_id_changes_only_with_settings_that_affect_the_result():
    default = parse_config({})
    assert parse_config({"n_bins": 200, "kernel": "triangular"}).run_id == default.run_id
    assert parse_config({"device": "cpu", "study": "other", "threads": 2}).run_id == default.run_id
    assert parse_config({"n_bins": 100}).run_id != default.run_id
    assert parse_config({"seed": 1}).run_id != default.run_id


def test_report_at_changes_a_run_id_if_it_adds_a_length():
    assert parse_config({"iterations": 60, "report_at": [60]}).run_id == parse_config({"iterations": 60}).run_id
    added = parse_config({"iterations": 60, "report_at": [20, 40]})
    assert added.run_id != parse_config({"iterations": 60}).run_id
    assert added.run_id == parse_config({"iterations": 60, "report_at": [20, 40, 60]}).run_id
    assert added.lengths == (20, 40, 60)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_at": []}, "must be at least one length, in increasing order; allowed are 1 to iterations=60"),
        ({"report_at": [0]}, "must be at least one length, in increasing order"),
        ({"report_at": [40, 20]}, "must be at least one length, in increasing order"),
        ({"report_at": [20, 20]}, "must be at least one length, in increasing order"),
        ({"report_at": [80]}, "allowed are 1 to iterations=60"),
        ({"report_at": [30]}, "no validation takes place after 30 iterations; allowed are multiples of validate_every"),
        ({"report_at": [20], "refit": True}, "does not fit refit=True: .* differs from that of a run of this length"),
        ({"report_at": [20], "lr_step": 10}, "does not fit lr_step=10"),
        ({"report_at": [20], "iterations": 0, "loss": "none"}, "allowed are 1 to iterations=0"),
        ({"report_at": 20}, "report_at=20"),
    ],
    ids=str,
)
def test_refuses_lengths_that_a_shorter_run_would_not_give(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"iterations": 60, "validate_every": 20, **settings})


def test_only_another_tf32_than_the_default_changes_a_run_id():
    default = parse_config({})
    assert "tf32" not in default.resolved()
    assert parse_config({"tf32": "convolutions", "images": "host"}).run_id == default.run_id
    changed = {parse_config({"tf32": value}).run_id for value in ("none", "all")}
    assert len(changed | {default.run_id}) == 3
    with pytest.raises(ConfigError, match="tf32='yes' is unknown; allowed are none, convolutions, all"):
        parse_config({"tf32": "yes"})


def test_only_the_last_iteration_changes_a_run_id():
    default = parse_config({})
    assert "choose" not in default.resolved()
    assert default.run_id == parse_config({"choose": "best"}).run_id == DEFAULT_RUN_ID
    assert parse_config({"choose": "last"}).resolved()["choose"] == "last"
    with pytest.raises(ConfigError, match="choose='first' is unknown; allowed are best, last"):
        parse_config({"choose": "first"})
    with pytest.raises(ConfigError, match='refit=True does not fit choose="last"'):
        parse_config({"choose": "last", "refit": True})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(ConfigError, match=r"margin=.*: must be a finite number"):
        parse_config({"margin": value})
    pml = {"loss": "pml:MultiSimilarityLoss", "miner": "MultiSimilarityMiner"}
    with pytest.raises(ConfigError, match=f"loss_options.a.1={value}: all numbers must be finite"):
        parse_config({**pml, "loss_options": {"a": [1, value]}})
    with pytest.raises(ConfigError, match=f"miner_options.epsilon={value}: all numbers must be finite"):
        parse_config({**pml, "miner_options": {"epsilon": value}})
