"""The baselines against float64 oracles that loop over pairs, triplets and quadruplets as the formulae are printed."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hloss.baselines import BASELINES, BinomialDeviance


def batch(n=14, d=5, classes=4, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = scale * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return embeddings.requires_grad_(), torch.randperm(n, generator=generator) % classes


def unit(embeddings):
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def pairs(labels, same):
    return [(i, j) for i, j in itertools.combinations(range(len(labels)), 2) if (labels[i] == labels[j]) == same]


def binomial_oracle(embeddings, labels, alpha=2.0, beta=0.5, C=10.0):
    y = unit(embeddings)
    positives = [torch.log(1 + torch.exp(-alpha * (y[i] @ y[j] - beta))) for i, j in pairs(labels, True)]
    negatives = [torch.log(1 + torch.exp(alpha * C * (y[i] @ y[j] - beta))) for i, j in pairs(labels, False)]
    return sum(positives) / len(positives) + sum(negatives) / len(negatives)


ORACLES = {
    "binomial": (binomial_oracle, [{}, {"C": 25.0}, {"alpha": 1.0, "beta": 0.0, "C": 2.0}]),
}
CASES = [(name, options) for name, (_, settings_) in ORACLES.items() for options in settings_]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_equal_the_printed_formula(name, options, seed):
    embeddings, labels = batch(seed=seed)
    value, expected = BASELINES[name](**options)(embeddings, labels), ORACLES[name][0](embeddings, labels, **options)
    (gradient,) = torch.autograd.grad(value, embeddings)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10 * expected_gradient.abs().max())


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_batch_and_the_names_of_classes_do_not_matter(name, seed):
    embeddings, labels = batch(seed=seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    loss = BASELINES[name]()
    torch.testing.assert_close(loss(embeddings[order], 7 - labels[order]), loss(embeddings, labels))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["duplicates", "all same", "zeros", "huge", "tiny"])
def test_value_and_gradient_are_finite_at_the_extremes(name, dtype, kind):
    embeddings, labels = batch(n=24, d=16)
    embeddings = embeddings.detach()
    embeddings = {
        "duplicates": embeddings[torch.arange(24) // 2],
        "all same": embeddings[:1].repeat(24, 1),
        "zeros": embeddings * 0,
        "huge": embeddings * 1e4,
        "tiny": embeddings * 1e-6,
    }[kind]
    embeddings = embeddings.to(dtype).requires_grad_()
    value = BASELINES[name]()(embeddings, labels)
    value.backward()
    assert value.dtype == dtype
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"contrastive"}))
@pytest.mark.parametrize("labels", [torch.zeros(6, dtype=torch.int64), torch.arange(6)])
def test_a_batch_without_positive_or_negative_pair_is_undefined(name, labels):
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(ValueError, match="pairs leaves this loss undefined"):
        BASELINES[name]()(embeddings, labels)
    value = BASELINES[name](on_degenerate="zero")(embeddings, labels)
    value.backward()
    assert value == 0
    assert not embeddings.grad.any()


@pytest.mark.parametrize("name", BASELINES)
def test_unusable_input_is_refused_by_name(name):
    embeddings, labels = batch()
    loss = BASELINES[name]()
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(14,\)"):
        loss(embeddings, labels[:-1])
    with pytest.raises(ValueError, match="embeddings must be floating"):
        loss(labels, labels)
    with pytest.raises(ValueError, match=r"rows \[3\] \(1 in all\)"):
        loss(embeddings.detach().index_fill(0, torch.tensor([3]), math.nan), labels)


@pytest.mark.parametrize("name", BASELINES)
def test_autocast_and_half_precision_do_not_change_the_similarities(name):
    embeddings, labels = batch(n=32, d=64)
    embeddings = embeddings.detach().bfloat16()
    expected = BASELINES[name]()(embeddings.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = BASELINES[name]()(embeddings, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (BinomialDeviance, {"alpha": 0}),
        (BinomialDeviance, {"C": -1.0}),
        (BinomialDeviance, {"beta": math.inf}),
        (BinomialDeviance, {"C": "10"}),
        *[(loss, {"on_degenerate": "skip"}) for loss in BASELINES.values()],
    ],
)
def test_an_impossible_option_is_refused_with_its_name_and_value(loss, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        loss(**options)
