"""Types of labels, numbers and embeddings that losses, samplers and retrieval accept, or refuse in the same words."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hloss import HistogramLoss, evaluate, global_batch, pair_histograms, recall_at_k, reverse_probability
from hloss.losses.baselines import BASELINES
from hloss.losses.checks import deferred_checks, is_deferred
from hloss.samplers import SAMPLERS
from tests.losses.cases import batch, signs

LOSSES = {**BASELINES, "histogram": HistogramLoss, "global": lambda: global_batch(HistogramLoss())}


def sampler(labels):
    return lambda: SAMPLERS["class-shuffle"](labels, 8, 2, torch.Generator().manual_seed(0))


def takers(embeddings, labels):
    """Whatever takes labels, as functions without arguments that return something to compare."""
    for name, loss in LOSSES.items():
        yield name, lambda loss=loss: loss()(embeddings, labels).item()
    yield "references", lambda: HistogramLoss()(embeddings, labels, embeddings, labels).item()
    yield "pair_histograms", lambda: pair_histograms(embeddings, labels).positive.tolist()
    yield "reverse_probability", lambda: reverse_probability(embeddings, labels)
    yield "recall_at_k", lambda: recall_at_k(embeddings, labels, (1, 2))
    yield "evaluate", lambda: evaluate("all-vs-rest", embeddings, labels).metrics
    yield "sampler", lambda: next(iter(sampler(labels)()))


TORCH_TYPES = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64]


@pytest.mark.parametrize(
    "convert",
    [
        *[lambda y, t=t: y.to(t) for t in TORCH_TYPES],
        *[
            lambda y, t=t: y.numpy().astype(t)
            for t in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64")
        ],
        torch.Tensor.tolist,
        lambda y: tuple(y.tolist()),
        lambda y: list(y.numpy()),
    ],
)
def test_labels_of_any_integer_type_are_accepted(convert):
    embeddings, labels = batch(n=16, classes=4)
    expected = dict(takers(embeddings, labels))
    for name, call in takers(embeddings, convert(labels)):
        assert call() == expected[name](), name


@pytest.mark.parametrize(
    ("convert", "got"),
    [
        (lambda y: y.float(), r"torch.float32; convert them by .long\(\)"),
        (lambda y: y > 1, r"torch.bool; convert them by .long\(\)"),
        (lambda y: y.numpy().astype(float), r"torch.float64; convert them by .long\(\)"),
        (lambda y: [f"class {i}" for i in y.tolist()], "list"),
        (lambda y: [None] * len(y), "list"),
        (lambda y: None, "NoneType"),
    ],
)
def test_labels_of_other_types_are_refused_in_the_same_words(convert, got):
    embeddings, labels = batch(n=16, classes=4)
    for name, call in takers(embeddings, convert(labels)):
        with pytest.raises(ValueError, match=f"^labels must be integers: got {got}") as caught:
            call()
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"global"}))
@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, lambda y: y.to(torch.int16)])
def test_matrices_of_pairs_of_any_integer_type_are_accepted(name, convert):
    embeddings, labels = batch(n=16, classes=4)
    expected = LOSSES[name]()(embeddings, signs(labels))
    assert torch.equal(LOSSES[name]()(embeddings, convert(signs(labels))), expected)


def test_a_matrix_of_unsigned_integers_has_positive_pairs():
    embeddings, labels = batch(n=16, classes=4)
    positive = (labels[:, None] == labels).to(torch.uint8)
    for dtype in (torch.uint8, torch.uint16):
        found = BASELINES["contrastive"]()(embeddings, positive.to(dtype))
        assert torch.equal(found, BASELINES["contrastive"]()(embeddings, positive.long()))


def test_embeddings_that_are_no_tensor_are_refused_in_one_line():
    embeddings, labels = batch(n=16, classes=4)
    for given, kind in ((embeddings.numpy(), "ndarray"), (embeddings.tolist(), "list")):
        for name, call in takers(given, labels):
            if name not in ("sampler", "global"):
                with pytest.raises(
                    ValueError, match=f"^embeddings must be a tensor: got {kind}; convert it by torch.as"
                ):
                    call()


@pytest.mark.parametrize("number", [int, np.int64, np.uint8, np.int32])
def test_whole_numbers_of_any_library_are_accepted(number):
    embeddings, labels = batch(n=16, classes=4)
    found, expected = HistogramLoss(n_bins=number(100)), HistogramLoss(n_bins=100)
    assert found(embeddings, labels) == expected(embeddings, labels)
    assert found.settings == expected.settings
    assert type(found.settings.n_bins) is int
    assert recall_at_k(embeddings, labels, [number(2)]) == recall_at_k(embeddings, labels, [2])
    assert recall_at_k(embeddings, labels, np.array([1, 2])) == recall_at_k(embeddings, labels, (1, 2))
    make = SAMPLERS["balanced"]
    draws = [next(iter(make([0, 0, 1, 1], n(4), n(2), torch.Generator().manual_seed(0)))) for n in (number, int)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16])
def test_numbers_of_any_library_are_accepted(number):
    embeddings, labels = batch(n=16, classes=4)
    found = HistogramLoss(order_cost="softplus", margin=number(0.5), alpha=number(2))
    expected = HistogramLoss(order_cost="softplus", margin=0.5, alpha=2.0)
    assert found(embeddings, labels) == expected(embeddings, labels)
    assert {type(value) for value in (found.settings.margin, found.settings.alpha)} == {float}
    assert type(BASELINES["triplet"](margin=number(0.5)).margin) is float


@pytest.mark.parametrize("k", [(0,), (1.5,), (-1,), (True,), ("1",), 0, (1, None), (np.float64(2),)])
def test_a_wrong_k_is_refused(k):
    embeddings, labels = batch(n=16, classes=4)
    for call in (recall_at_k, lambda *given: evaluate("all-vs-rest", *given)):
        with pytest.raises(ValueError, match=r"^k must be a whole number of at least 1: got"):
            call(embeddings, labels, k)


def test_a_k_alone_is_accepted():
    embeddings, labels = batch(n=16, classes=4)
    assert recall_at_k(embeddings, labels, 2) == recall_at_k(embeddings, labels, [2])


@pytest.mark.parametrize("value", ["no", 1, None])
@pytest.mark.parametrize("loss", [HistogramLoss, BASELINES["contrastive"], BASELINES["lifted"]])
def test_normalize_must_be_a_truth_value(loss, value):
    with pytest.raises(ValueError, match=f"^normalize must be True or False: got {value!r}$"):
        loss(normalize=value)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "10", None])
def test_the_number_of_losses_between_deferred_checks_is_checked(value):
    with pytest.raises(ValueError, match=f"^every must be a whole number of at least 1: got {value!r}$"):
        deferred_checks(value).__enter__()
    assert not is_deferred()


def test_numbers_are_checked_without_numpy():
    code = """
import sys
sys.modules["numpy"] = None
import torch
from hloss import HistogramLoss
print(HistogramLoss(n_bins=10)(torch.eye(3), [0, 0, 1]).item())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 1.0
