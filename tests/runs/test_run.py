"""One run: repeatable, resumable, chosen on validation, refused before any work when it cannot be."""

import json
import math
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision import models

from data_prep.prepared import create_images, finish, new_folder
from hloss.runs.checkpoints import read_status, write_status
from hloss.runs.config import PRECISIONS, RunConfig, parse_config
from hloss.runs.datasets import open_dataset
from hloss.runs.errors import ConfigError, DatasetError, GPUMemoryError, RunError
from hloss.runs.evaluation import evaluate_test
from hloss.runs.files import run_lock
from hloss.runs.loop import Loop
from hloss.runs.run import run
from tests.helpers.gpu_waits import counted_waits


def quiet(line):
    pass


def outcome(result):
    return {k: result[k] for k in ("metrics", "chosen", "validation_recall@1", "similarity_density", "panel")}


def test_the_same_config_gives_the_same_result_bit_for_bit(settings, tmp_path):
    first = run(parse_config(settings), quiet)
    second = run(parse_config({**settings, "runs_dir": str(tmp_path / "again")}), quiet)
    other_seed = run(parse_config({**settings, "seed": 1}), quiet)
    assert outcome(first) == outcome(second)
    assert outcome(first) != outcome(other_seed)


def test_a_killed_run_continues_to_the_same_result(settings, tmp_path):
    whole = run(parse_config(settings), quiet)
    broken = parse_config({**settings, "runs_dir": str(tmp_path / "broken")})

    def killed_after_the_second_validation(line):
        if line.startswith("iteration 12/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, killed_after_the_second_validation)
    assert not (broken.folder / "result.json").exists()
    lines = []
    assert outcome(run(broken, lines.append)) == outcome(whole)
    assert lines[0] == "continued from iteration 11 (stage choose)"
    assert not list(broken.folder.glob("checkpoint*"))


LENGTHS = {"report_at": [10, 40], "iterations": 60, "validate_every": 5, "checkpoint_seconds": 1e6}


def without_seconds(entry):
    return {name: value for name, value in entry.items() if name != "training_seconds"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"crop": 16, "horizontal_flip": True, "dropout": 0.3},
        {"loss": "semi-hard-triplet", "sampler": "balanced"},
        {"micro_batch": 8, "batchnorm": "slices", "weight_decay": 0.01},
        {"pytorch-metric-learning": True, "loss": "pml:ProxyAnchorLoss"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # of pytorch-metric-learning
def test_the_result_at_a_length_is_that_of_a_run_of_so_many_iterations(given, settings, tmp_path):
    if given.pop("pytorch-metric-learning", False):
        pytest.importorskip("pytorch_metric_learning")
    settings = {**settings, **LENGTHS, **given}
    config = parse_config(settings)
    result = run(config, quiet)
    ranks = np.load(config.folder / "ranks.npy")
    assert [entry["iterations"] for entry in result["lengths"]] == [10, 40, 60]
    assert given or len({entry["network_sha256"] for entry in result["lengths"]}) > 1
    for row, entry in zip(ranks, result["lengths"], strict=True):
        shorter = parse_config({**settings, "report_at": None, "iterations": entry["iterations"]})
        alone = run(shorter, quiet)
        assert [without_seconds(entry)] == [without_seconds(own) for own in alone["lengths"]]
        assert alone["network_sha256"] == entry["network_sha256"]
        assert outcome(alone)["metrics"] == entry["metrics"]
        assert alone["chosen"]["iteration"] == entry["chosen_iteration"]
        assert np.array_equal(np.load(shorter.folder / "ranks.npy"), row[None])
    assert outcome(alone) == outcome(result)


def test_a_run_that_was_killed_reports_the_same_at_every_length(settings, tmp_path):
    whole = run(parse_config({**settings, **LENGTHS}), quiet)
    broken = parse_config({**settings, **LENGTHS, "checkpoint_seconds": 0.0, "runs_dir": str(tmp_path / "broken")})
    for last in (10, 40, 60):  # at the validation of each length

        def killed(line, last=last):
            if line.startswith(f"iteration {last}/"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(broken, killed)
    again = run(broken, quiet)
    assert list(map(without_seconds, again["lengths"])) == list(map(without_seconds, whole["lengths"]))
    assert outcome(again) == outcome(whole)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_loss_with_weights_of_its_own_continues_to_the_same_bits(settings, tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    settings = {**settings, "loss": "pml:ArcFaceLoss", "miner": "DistanceWeightedMiner", "learning_rate": 1e-2}
    whole = run(parse_config(settings), quiet)
    broken = parse_config({**settings, "runs_dir": str(tmp_path / "broken")})

    def killed(line):
        if line.startswith("iteration 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, killed)
    lines = []
    again = run(broken, lines.append)
    assert lines[0] == "continued from iteration 3 (stage choose)"
    assert again["network_sha256"] == whole["network_sha256"]
    assert outcome(again) == outcome(whole)


def test_the_status_tells_the_iteration_that_a_run_continues_from(settings):
    config = parse_config(settings)
    told = []

    def killed(line):
        told.append((line.split()[0], read_status(config.folder)))
        if line.startswith("iteration 8/"):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(config, killed)
    (status,) = (status for word, status in told if word == "continued")
    assert (status["state"], status["iteration"]) == ("running", 7)


def test_a_report_is_in_the_log_at_once(settings, tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        run(parse_config(settings))
        assert "test Recall@1" in (tmp_path / "log").read_text()


def test_several_gpus_that_a_run_does_not_use_are_left_alone(settings, monkeypatch):
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.get_rng_state()
    parse_config({**settings, "loss": "pml:ArcFaceLoss"}).build_loss(5)
    run(parse_config({**settings, "iterations": 0, "loss": "none"}), quiet)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_refusal_is_noted_in_a_folder_that_exists_and_makes_none(settings, tmp_path):
    config = parse_config({**settings, "data_dir": str(tmp_path)})
    with pytest.raises(DatasetError):
        run(config, quiet)
    assert not config.folder.exists()
    config.folder.mkdir(parents=True)
    write_status(config.folder, "running", 5)
    with run_lock(config.folder), pytest.raises(DatasetError):
        run(config, quiet)
    assert read_status(config.folder)["state"] == "running", "it is another process's"
    with pytest.raises(DatasetError):
        run(config, quiet)
    status = read_status(config.folder)
    assert (status["state"], status["iteration"], status["retry"]) == ("failed", 5, False)
    assert "dataset 'tiny' is not prepared" in status["message"]


def test_devices_that_are_not_there_are_noted_too(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = parse_config({**settings, "device": "cuda"})
    with pytest.raises(ConfigError, match="requires one GPU per process: torch finds 0"):
        run(config, quiet)
    assert read_status(config.folder)["state"] == "failed"
    assert read_status(config.folder)["retry"] is False


def test_a_finished_run_is_returned_and_one_of_other_code_redone(settings, monkeypatch):
    config = parse_config(settings)
    lines = []
    run(config, quiet)
    run(config, lines.append)
    assert lines == []
    monkeypatch.setattr("hloss.runs.provenance.code_sha256", lambda: "other")
    assert run(config, lines.append)["fingerprint"]["code_sha256"] == "other"
    assert lines


def test_training_beats_no_training(settings):
    trained = run(parse_config({**settings, "iterations": 60, "validate_every": 20}), quiet)
    untrained = run(parse_config({**settings, "iterations": 0, "loss": "none"}), quiet)
    assert untrained["metrics"]["recall@1"] < trained["metrics"]["recall@1"]


def test_refit_trains_again_on_all_classes_for_the_chosen_iterations(settings, tiny_data):
    config = parse_config({**settings, "refit": True})
    lines = []
    result = run(config, lines.append)
    plain = run(parse_config(settings), quiet)
    assert plain["trained_on"] == "training classes"
    assert result["trained_on"] == "training and validation classes (refit)"
    assert result["chosen"] == plain["chosen"]
    assert result["validation_recall@1"] == plain["validation_recall@1"]
    assert result["network_sha256"] != plain["network_sha256"]
    history = pd.read_parquet(config.folder / "history.parquet")
    assert history["refit_loss"].notna().sum() == result["chosen"]["iteration"]
    assert history["loss"].notna().all()
    assert lines[-1].startswith("test Recall@1")
    refit = [line for line in lines if line.startswith("refit iteration")]
    assert len(refit) == result["chosen"]["iteration"] // config.validate_every
    assert all("images/s" in line and "s left" in line and "validation" not in line for line in refit)


def test_refit_is_refused_where_validation_was_never_part_of_training(settings, tiny_data, tmp_path):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    card = json.loads((tmp_path / "tiny" / "card.json").read_text())
    (tmp_path / "tiny" / "card.json").write_text(json.dumps({**card, "val_from_train": False}))
    config = parse_config({**settings, "refit": True, "data_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="refit=True: the validation classes of 'tiny' are not drawn from its"):
        run(config, quiet)
    assert read_status(config.folder)["state"] == "failed"
    assert read_status(config.folder)["retry"] is False


def test_bf16_mixed_trains_about_as_32_bit_does(settings):
    longer = {**settings, "iterations": 40, "validate_every": 40}
    whole = run(parse_config(longer), quiet)
    mixed = run(parse_config({**longer, "precision": "bf16-mixed"}), quiet)
    assert mixed["network_sha256"] != whole["network_sha256"]
    losses = [
        pd.read_parquet(parse_config({**longer, "precision": p}).folder / "history.parquet")["loss"]
        for p in PRECISIONS[:2]
    ]
    assert losses[1].iloc[0] == pytest.approx(losses[0].iloc[0], abs=0.02)
    assert losses[1].tail(10).mean() == pytest.approx(losses[0].tail(10).mean(), abs=0.1)
    assert losses[1].tail(10).mean() < losses[1].head(5).mean()


def test_when_checkpoints_are_written_does_not_change_a_result(settings, tmp_path):
    often = run(parse_config(settings), quiet)
    never = run(parse_config({**settings, "checkpoint_seconds": 1e6, "runs_dir": str(tmp_path / "never")}), quiet)
    assert outcome(often) == outcome(never)
    assert often["network_sha256"] == never["network_sha256"]


@pytest.mark.parametrize("loss", ["histogram", "binomial", "lifted", "semi-hard-triplet", "pml:ArcFaceLoss"])
@pytest.mark.filterwarnings("ignore")  # of pytorch-metric-learning
def test_a_record_of_pairs_does_not_change_a_bit_of_the_run(loss, settings, tmp_path):
    if loss.startswith("pml:"):
        pytest.importorskip("pytorch_metric_learning")
    settings = {**settings, "loss": loss, "dropout": 0.3, "horizontal_flip": True, "checkpoint_seconds": 1e6}
    plain = run(parse_config(settings), quiet)
    config = parse_config({**settings, "record_pairs": True, "runs_dir": str(tmp_path / "recorded")})
    recorded = run(config, quiet)
    assert config.run_id == parse_config(settings).run_id
    assert outcome(recorded) == outcome(plain)
    assert recorded["network_sha256"] == plain["network_sha256"]
    history = pd.read_parquet(config.folder / "history.parquet")
    names = ["iteration", "loss", "validation_recall@1"]
    before = pd.read_parquet(parse_config(settings).folder / "history.parquet")
    pd.testing.assert_frame_equal(history[names], before, check_exact=True)
    shares = [f"{of}_{name}" for of in ("batch", "validation") for name in ("overlap", "reverse")]
    shares += [] if loss.startswith("pml:") else ["pairs_with_slope"]
    assert history[shares].notna().all(axis=1).tolist() == [n % 4 == 0 for n in history["iteration"]]
    assert history[shares].dropna().stack().between(0, 1).all()
    assert ("positive_slope" in history) == (not loss.startswith("pml:"))


def test_a_record_of_pairs_continues_after_a_kill(settings, tmp_path):
    whole = parse_config({**settings, "record_pairs": True})
    run(whole, quiet)
    broken = parse_config({**settings, "record_pairs": True, "runs_dir": str(tmp_path / "broken")})

    def killed(line):
        if line.startswith("iteration 8/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, killed)
    run(broken, quiet)
    histories = [pd.read_parquet(config.folder / "history.parquet") for config in (whole, broken)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


def test_pretrained_weights_decide_a_result_by_their_content(settings, tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "weights.pth"
    torch.save(models.resnet18(weights=None).state_dict(), file)
    given = {**settings, "network": "torchvision:resnet18", "weights": str(file), "iterations": 1, "batch_size": 8}
    first = run(parse_config(given), quiet)
    assert first["config"]["batchnorm"] == "frozen"
    torch.save(models.resnet18(weights=None).state_dict(), file)
    lines = []
    second = run(parse_config(given), lines.append)
    assert lines, "the run was made anew"
    assert first["pretrained_sha256"] != second["pretrained_sha256"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": 17}, "crop=17 is larger than the images of tiny, 16 x 16 pixels; allowed are 1 to 16"),
        ({"network": "parts"}, r"requires images of shape \(160, 60, 3\)"),
        ({"micro_batch": 8}, 'set batchnorm to "frozen" .* or "slices"'),
        ({"network": "torchvision:resnet18", "weights": "nowhere.pth"}, "nor a file that exists"),
        ({"network": "googlenet", "crop": 16, "weights": __file__}, "is not a readable state dict"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_data_are_refused_before_training(wrong, message, settings):
    lines = []
    with pytest.raises(ConfigError, match=message):
        run(parse_config({**settings, **wrong}), lines.append)
    assert lines == []


def test_images_on_the_device_give_the_bits_of_those_on_the_host(settings, tmp_path):
    settings = {**settings, "horizontal_flip": True, "refit": True}
    results = {}
    for where in ("host", "device"):
        config = parse_config({**settings, "images": where, "runs_dir": str(tmp_path / where)})
        results[where] = run(config, quiet)
    assert outcome(results["device"]) == outcome(results["host"])
    assert results["device"]["network_sha256"] == results["host"]["network_sha256"]


@pytest.mark.parametrize(
    ("images", "advice"), [("host", "share the GPU. CUDA"), ("device", r'or set images="host", which')]
)
def test_a_gpu_without_enough_memory_is_answered_with_advice(images, advice, settings, monkeypatch):
    class Filling(torch.nn.Module):
        def forward(self, embeddings, labels):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: Filling())
    config = parse_config({**settings, "images": images})
    with pytest.raises(GPUMemoryError, match=f"24 images embedded at once: set micro_batch .*{advice}"):
        run(config, quiet)
    status = read_status(config.folder)
    assert (status["state"], status["retry"]) == ("failed", True)
    assert status["message"].endswith("Tried to allocate 2.00 GiB.")


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_CUDA = {"device": "cuda", "iterations": 45, "validate_every": 15, "checkpoint_seconds": 1e6, "horizontal_flip": True}
SMALL_NETWORKS = [
    {},
    {"precision": "bf16-mixed"},
    {"tf32": "all", "dropout": 0.3},
    {"network": "torchvision:resnet18", "batchnorm": "live", "iterations": 15, "validate_every": 5},
]


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("network", SMALL_NETWORKS, ids=str)
def test_a_run_on_a_gpu_that_was_killed_continues_to_the_same_bits(network, settings, tmp_path):
    settings = {**settings, **ON_CUDA, **network}
    whole = run(parse_config(settings), quiet)
    broken = parse_config({**settings, "checkpoint_seconds": 0.0, "runs_dir": str(tmp_path / "broken")})
    last = 2 * broken.validate_every

    def killed(line):
        if line.startswith(f"iteration {last}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, killed)
    lines = []
    again = run(broken, lines.append)
    assert lines[0] == f"continued from iteration {last - 1} (stage choose)"
    assert again["network_sha256"] == whole["network_sha256"]
    assert outcome(again) == outcome(whole)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("network", SMALL_NETWORKS, ids=str)
def test_images_on_the_gpu_give_the_losses_of_those_on_the_host(network, settings, tmp_path):
    results, losses = {}, {}
    for where in ("host", "device"):
        given = {**settings, **ON_CUDA, **network, "images": where, "runs_dir": str(tmp_path / where)}
        results[where] = run(parse_config(given), quiet)
        losses[where] = pd.read_parquet(parse_config(given).folder / "history.parquet")
    pd.testing.assert_frame_equal(losses["device"], losses["host"], check_exact=True)
    assert outcome(results["device"]) == outcome(results["host"])
    assert results["device"]["network_sha256"] == results["host"]["network_sha256"]
    assert results["device"]["provenance"]["tf32"] == network.get("tf32", "convolutions")


class MeanSquare(torch.nn.Module):
    """A loss that reads nothing from the device."""

    def forward(self, embeddings, labels):
        return embeddings.float().square().mean()


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("images", ["host", "device"])
def test_steps_on_a_gpu_do_not_wait_for_it(images, settings, monkeypatch):
    """Between two readings of the losses; the second reading waits once."""
    monkeypatch.setattr(RunConfig, "build_loss", lambda self, n_classes=2: MeanSquare())
    step, waits = Loop.step, []

    def counted(self):
        with counted_waits() as found:
            step(self)
        waits.append(len(found))

    monkeypatch.setattr(Loop, "step", counted)
    run(parse_config({**settings, **ON_CUDA, "iterations": 30, "validate_every": 30, "images": images}), quiet)
    assert waits[11:20] == [0] * 8 + [1]


def variant(tiny_data, folder, change, **card):
    """Write the dataset `tiny` with another index to `folder`; `change` maps the index to the new one."""
    tiny = open_dataset(tiny_data / "tiny")
    index = change(tiny.index.copy())
    with new_folder(folder / "tiny") as new:
        images = create_images(new, len(index), *tiny.images.shape[1:])
        images[:] = tiny.images[index.index]
        images.flush()
        written = {name: tiny.card[name] for name in ("name", "protocol", "recall_at", "val_from_train")}
        finish(new, index, written | card)
    return folder


def one_class_per_split(index, split):
    """Keep one class of a split, so that no query has a non-match."""
    rows = index[index.split == split]
    return index.drop(rows.index[rows.label > rows.label.min()])


def one_image_per_class(index, split):
    return index.drop(index.index[(index.split == split) & index.duplicated(["split", "label"])])


def one_camera(index, split):
    """Give each image a camera, and all images of a split the same."""
    return index.assign(camera=np.where(index.split == split, 0, np.arange(len(index)) % 2))


UNUSABLE = [
    (one_class_per_split, "all-vs-rest", r"got 6 queries, of which 6 have a match and 0 a non-match"),
    (one_image_per_class, "all-vs-rest", r"got [68] queries, of which 0 have a match and [68] a non-match"),
    (one_camera, "market1501", r"got (36|48) queries, of which 0 have a match and (36|48) a non-match"),
    (one_camera, "cuhk03-single-shot", r"got 0 queries, of which 0 have a match and 0 a non-match"),
    (lambda index, split: index[index.split != split], "all-vs-rest", r"got 0 queries"),
]


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("change", "protocol", "counts"), UNUSABLE)
def test_a_split_that_cannot_be_evaluated_is_refused_before_training(
    split, change, protocol, counts, settings, tiny_data, tmp_path
):
    data = variant(tiny_data, tmp_path / "data", lambda index: change(index, split), protocol=protocol)
    lines = []
    config = parse_config({**settings, "data_dir": str(data)})
    message = f"no query of split {split} has both a match and a non-match by protocol '{protocol}': {counts}"
    with pytest.raises(ConfigError, match=message):
        run(config, lines.append)
    assert lines == []
    assert read_status(config.folder)["state"] == "failed"
    assert not (config.folder / "result.json").exists()


def test_last_trains_without_validation_and_tests_the_last_network(settings, tiny_data, tmp_path):
    data = variant(tiny_data, tmp_path / "data", lambda index: index[index.split != "val"])
    config = parse_config({**settings, "choose": "last", "data_dir": str(data)})
    lines = []
    result = run(config, lines.append)
    assert result["chosen"] == {"iteration": 12, "how": "last iteration, without validation"}
    assert result["validation_recall@1"] is None
    assert "validation" not in "".join(lines)
    assert pd.read_parquet(config.folder / "history.parquet")["validation_recall@1"].isna().all()
    # With the validation classes there, but unused, the network is that of the last iteration of any run.
    best = run(parse_config({**settings, "validate_every": 12}), quiet)
    last = run(parse_config({**settings, "choose": "last"}), quiet)
    assert best["chosen"]["iteration"] == 12
    assert last["network_sha256"] == best["network_sha256"] == result["network_sha256"]
    assert last["metrics"] == best["metrics"]
    untrained = parse_config({**settings, "choose": "last", "loss": "none", "iterations": 0, "data_dir": str(data)})
    assert run(untrained, quiet)["validation_recall@1"] is None


def test_a_killed_run_without_validation_continues_to_the_same_result(settings, tmp_path):
    settings |= {"choose": "last"}
    whole = run(parse_config(settings), quiet)
    broken = parse_config({**settings, "runs_dir": str(tmp_path / "broken")})

    def killed(line):
        if line.startswith("iteration 8/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, killed)
    lines = []
    assert outcome(run(broken, lines.append)) == outcome(whole)
    assert lines[0] == "continued from iteration 7 (stage choose)"


def test_validations_that_are_all_equal_are_reported(settings, monkeypatch):
    monkeypatch.setattr("hloss.runs.loop.validation_recall", lambda *given: 1.0)
    lines = []
    assert run(parse_config(settings), lines.append)["chosen"]["iteration"] == 4
    assert lines[-2].startswith("all 3 validations have Recall@1 100.0 %, so the first is chosen; use more")


def test_a_result_with_a_number_that_is_not_finite_is_not_written(settings, monkeypatch):
    def evaluated(*given):
        retrieval = evaluate_test(*given)
        retrieval.metrics["map"] = math.nan
        return retrieval

    monkeypatch.setattr("hloss.runs.run.evaluate_test", evaluated)
    config = parse_config(settings)
    with pytest.raises(RunError, match=r"numbers of result.json must be finite: got metrics\.map=nan"):
        run(config, quiet)
    assert not (config.folder / "result.json").exists()
    assert read_status(config.folder)["retry"] is False
