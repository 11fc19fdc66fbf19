"""One step: the rates of the paper, batches that can be shared and continued, the exact gradient in slices."""

import copy
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hloss.numerics import NotFiniteError
from hloss.runs.config import LOSSES, parse_config
from hloss.runs.datasets import Dataset
from hloss.runs.images import channels_last
from hloss.runs.launch import build_fabric
from hloss.runs.models import Embedder, Scale, build_network, training_mode
from hloss.runs.resident import ResidentDataset, fits, place_images
from hloss.runs.step import Batches, build_optimizer, gradient, parameter_groups, seed_of, set_learning_rates

# The settings of the paper's text and the authors' released solver, per dataset.
PAPER = {
    "cub": {"network": "googlenet", "weights": "imagenet", "learning_rate": 1e-5, "crop": 227, "horizontal_flip": True},
    "sop": {"network": "googlenet", "weights": "imagenet", "learning_rate": 1e-4, "crop": 227, "horizontal_flip": True},
    "cuhk03": {"network": "parts", "learning_rate": 1e-4, "weight_decay": 5e-4, "lr_step": 100_000},
    "market1501": {"network": "parts", "learning_rate": 1e-4, "weight_decay": 5e-4, "lr_step": 100_000},
}


@pytest.fixture(scope="module")
def fabric():
    return build_fabric(parse_config({"device": "cpu"}))


def small_network(dropout=0.0):
    """Two convolutions without BatchNorm, on 3 x 12 x 12 images, in float64."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU())
    return Embedder(Scale((0.5,) * 3, (0.5,) * 3), backbone, 8 * 16, 10, dropout, normalize=True).double()


def a_batch(n, height=12, width=12):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    return images, torch.arange(n) // 4


def gradients(fabric, network, criterion, images, labels, micro_batch, batchnorm="live"):
    network = copy.deepcopy(network)
    training_mode(network, batchnorm)
    wrapped = fabric.setup(network)
    value = gradient(fabric, wrapped, criterion, images, labels, micro_batch, lambda part: seed_of(7, part))
    return value.item(), {name: p.grad for name, p in network.named_parameters()}, network


def assert_same(found, expected, tolerance):
    """Tensor by tensor, each by its own largest entry."""
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("micro_batch", [5, 8])
def test_slices_give_the_gradient_of_the_whole_batch(name, micro_batch, fabric):
    criterion = LOSSES[name]()
    plain = gradients(fabric, small_network(), criterion, *a_batch(16), None)
    sliced = gradients(fabric, small_network(), criterion, *a_batch(16), micro_batch)
    assert sliced[0] == pytest.approx(plain[0], rel=1e-10)
    assert_same(sliced[1], plain[1], 1e-10)


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "ArcFaceLoss"])  # of pairs, and with weights of its own
def test_slices_give_the_gradient_of_a_loss_of_pytorch_metric_learning(name, fabric):
    pytest.importorskip("pytorch_metric_learning")
    torch.manual_seed(0)
    criterion = parse_config({"loss": f"pml:{name}", "embedding_dim": 10}).build_loss(n_classes=4).double()
    plain = gradients(fabric, small_network(), criterion, *a_batch(16), None)
    own = [p.grad.clone() for p in criterion.parameters()]
    criterion.zero_grad()
    sliced = gradients(fabric, small_network(), criterion, *a_batch(16), 5)
    assert sliced[0] == pytest.approx(plain[0], rel=1e-10)
    assert_same(sliced[1], plain[1], 1e-10)
    for found, expected in zip(criterion.parameters(), own, strict=True):
        assert_same({"own": found.grad}, {"own": expected}, 1e-10)


def test_slices_give_the_gradient_of_the_parts_network(fabric):
    torch.manual_seed(0)
    network = build_network("parts", (160, 60, 3), 500).double()
    images, labels = a_batch(8, 160, 60)
    plain = gradients(fabric, network, LOSSES["histogram"](), images, labels, None)
    sliced = gradients(fabric, network, LOSSES["histogram"](), images, labels, 3)
    assert_same(sliced[1], plain[1], 1e-10)


class Recorded(nn.Module):
    """Dropout that keeps the masks it drew, or applies one it was given."""

    def __init__(self, mask=None):
        super().__init__()
        self.mask, self.drawn = mask, []

    def forward(self, features):
        if self.mask is not None:
            return features * self.mask
        mask = nn.functional.dropout(torch.ones_like(features), 0.5)
        self.drawn.append(mask)
        return features * mask


def test_dropout_is_replayed_slice_by_slice(fabric):
    """Both passes meet the same masks, and the gradient is that of the whole batch under these masks."""
    images, labels = a_batch(16)
    criterion = LOSSES["histogram"]()
    network = small_network()
    network.dropout = Recorded()
    _, found, used = gradients(fabric, network, criterion, images, labels, 5)
    first, second = used.dropout.drawn[:4], used.dropout.drawn[4:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]), "each slice has a mask of its own"
    network.dropout = Recorded(torch.cat(first))
    _, expected, _ = gradients(fabric, network, criterion, images, labels, None)
    assert_same(found, expected, 1e-10)


def test_torchs_own_dropout_is_replayed(fabric):
    """The loss from the pass without a graph is the loss of the embeddings that carry the gradient."""
    network = small_network(dropout=0.5)
    training_mode(network, "live")
    wrapped = fabric.setup(network)
    passes = []
    wrapped.register_forward_hook(lambda module, inputs, output: passes.append(output.detach()))
    gradient(fabric, wrapped, LOSSES["histogram"](), *a_batch(16), 5, lambda part: seed_of(7, part))
    assert all(torch.equal(a, b) for a, b in zip(passes[:4], passes[4:], strict=True))


def test_batchnorm_in_slices_normalises_each_by_itself_and_remembers_it_once(fabric):
    torch.manual_seed(0)
    network = build_network("glyphnet", (16, 16, 3), 10).double()
    images, labels = a_batch(16, 16, 16)
    criterion = LOSSES["histogram"]()
    _, found, used = gradients(fabric, network, criterion, images, labels, 8, "slices")
    whole = copy.deepcopy(network).train()
    criterion(torch.cat([whole(part) for part in images.split(8)]), labels).backward()
    assert_same(found, {name: p.grad for name, p in whole.named_parameters()}, 1e-10)
    for name, value in whole.named_buffers():
        if "running" in name:
            torch.testing.assert_close(used.get_buffer(name), value)


def test_frozen_batchnorm_makes_slices_exact(fabric):
    torch.manual_seed(0)
    network = build_network("glyphnet", (16, 16, 3), 10).double()
    plain = gradients(fabric, network, LOSSES["histogram"](), *a_batch(16, 16, 16), None, "frozen")
    sliced = gradients(fabric, network, LOSSES["histogram"](), *a_batch(16, 16, 16), 5, "frozen")
    assert_same(sliced[1], plain[1], 1e-10)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_loss_that_is_not_finite_leaves_no_gradient(micro_batch, fabric):
    network = small_network()
    wrapped = fabric.setup(network)
    with pytest.raises(NotFiniteError, match=r"the loss is -?inf"):
        gradient(fabric, wrapped, lambda e, labels: e.sum() / 0, *a_batch(16), micro_batch, lambda part: 0)
    assert all(p.grad is None for p in network.parameters())


def test_a_loss_that_is_not_checked_is_returned(fabric):
    network = small_network()
    found = gradient(fabric, fabric.setup(network), lambda e, _: e.sum() / 0, *a_batch(8), None, hash, check=False)
    assert found.isinf()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("dataset", PAPER)
def test_the_rates_are_those_of_the_paper(dataset):
    """The last layer at the full rate, GoogLeNet's others at a tenth; re-ID a tenth of it after 100,000 iterations."""
    config = parse_config({"dataset": dataset, "batch_size": 128, **PAPER[dataset]})
    network = build_network(config.network, (160, 60, 3), 500)
    optimizer = build_optimizer(network, config)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    full = PAPER[dataset]["learning_rate"]
    factor = 0.1 if config.network == "googlenet" else 1.0
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == pytest.approx(full * (factor if name.startswith("backbone") else 1.0))
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    for iteration, expected in [(1, 1.0), (100_000, 1.0), (100_001, 0.1), (150_000, 0.1)]:
        set_learning_rates(optimizer, config, iteration)
        stepped = expected if config.lr_step else 1.0
        assert max(g["lr"] for g in optimizer.param_groups) == pytest.approx(full * stepped)


@pytest.mark.parametrize(("exempt", "decayed"), [("biases", {"weight"}), ("none", {"weight", "bias"})])
def test_weight_decay_spares_biases_unless_told_otherwise(exempt, decayed):
    config = parse_config({"network": "parts", "weight_decay": 5e-4, "decay_exempt": exempt})
    network = small_network()
    groups = parameter_groups(network, config)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        assert decay[id(parameter)] == (5e-4 if name.rsplit(".", 1)[1] in decayed else 0)


@pytest.fixture
def dataset(tmp_path):
    """20 classes of 5 images of 14 x 14, each of one colour of its own."""
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 14, 14, 3), np.uint8)
    images[:, :, 0] = 200 + np.arange(14, dtype=np.uint8)[None, :, None]  # what tells places and mirrors apart
    index = pd.DataFrame({"label": np.arange(100) // 5, "split": "train", "role": "both", "camera": -1})
    return Dataset(tmp_path, {}, "", index, images)


def drawn(batches, n):
    taken = [next(batches) for _ in range(n)]
    batches.close()
    return taken


@pytest.mark.parametrize("view", [{}, {"crop": 9, "horizontal_flip": True}])
def test_the_shares_of_a_batch_make_up_the_batch(view, dataset):
    config = parse_config({"batch_size": 10, "images_per_class": 4, **view})
    whole = drawn(Batches(dataset, dataset.rows("train"), config), 3)
    shares = [drawn(Batches(dataset, dataset.rows("train"), config, (i, 3)), 3) for i in range(3)]
    for iteration, (images, labels) in enumerate(whole):
        assert images.shape == (10, 3, view.get("crop", 14), view.get("crop", 14))
        assert torch.equal(torch.cat([share[iteration][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[iteration][1] for share in shares]), labels)
        assert torch.equal(images[:, 0, 4, 4].long() // 5, labels)


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_continue_where_their_state_was_taken(ahead, dataset):
    config = parse_config({"batch_size": 10, "images_per_class": 4, "crop": 9, "horizontal_flip": True})
    whole = drawn(Batches(dataset, dataset.rows("train"), config), 8)
    first = Batches(dataset, dataset.rows("train"), config, ahead=ahead)
    for _ in range(3):
        next(first)
    state = first.state_dict()
    first.close()
    assert [len(batch) for batch in state["drawn"]] == ([10] if ahead else [])
    second = Batches(dataset, dataset.rows("train"), config, ahead=ahead)
    json.dumps(state["drawn"])  # the batch fetched ahead is part of it, in plain numbers
    second.load_state_dict(state)
    for (images, labels), (expected, expected_labels) in zip(drawn(second, 5), whole[3:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("view", [{}, {"crop": 9}, {"horizontal_flip": True}, {"crop": 9, "horizontal_flip": True}])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_of_resident_images_equal_those_of_the_host(view, channels, dataset):
    """Also in shares, drawn several at once, and continued from a state."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (100, 14, 11, channels), dtype=np.uint8)
    host = dataclasses.replace(dataset, images=images)
    resident = place_images(host, "device", torch.device("cpu"))
    assert isinstance(resident, ResidentDataset)
    config = parse_config({"batch_size": 10, "images_per_class": 4, **view})
    rows = np.arange(15, 90)
    for share, at_once in [((0, 1), 1), ((1, 3), 1), ((0, 1), 4), ((2, 3), 4)]:
        expected = drawn(Batches(host, rows, config, share), 9)
        first, second = (Batches(resident, rows, config, share, at_once=at_once) for _ in range(2))
        found = drawn(first, 3)
        second.load_state_dict(first.state_dict())
        assert len(second.state_dict()["drawn"]) == (1 if at_once == 4 else 0)
        found += drawn(second, 6)
        for (images, labels), (host_images, host_labels) in zip(found, expected, strict=True):
            assert torch.equal(images, host_images)
            assert torch.equal(labels, host_labels)
            assert images.stride() == channels_last(host_images).stride()
    assert torch.equal(resident.pixels(rows), host.pixels(rows))


def test_auto_keeps_images_on_a_gpu_only_if_they_fit(dataset, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * dataset.images.nbytes, 10**12))
    assert fits(dataset.images.nbytes, gpu)
    assert not fits(dataset.images.nbytes + 1, gpu)
    assert place_images(dataset, "auto", torch.device("cpu")) is dataset
    assert place_images(dataset, "host", gpu) is dataset


def test_seeds_differ_for_every_tuple():
    assert len({seed_of(a, b, c) for a in range(5) for b in range(20) for c in range(5)}) == 500
    assert seed_of(1, 2) == seed_of(1, 2)
    torch.manual_seed(seed_of(1, 2))
