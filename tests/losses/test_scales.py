"""Embeddings of any scale: every loss is exact over the range of its dtype, or refuses rows, with the same words."""

import math

import pytest
import torch

from hloss import HistogramLoss, pair_histograms, reverse_probability
from hloss.losses.baselines import BASELINES
from tests.losses.cases import batch

LOSSES = {
    **BASELINES,
    "lifted, normalised": lambda: BASELINES["lifted"](normalize=True),
    "contrastive, normalised": lambda: BASELINES["contrastive"](normalize=True),
    "histogram": HistogramLoss,
    "beta": lambda: HistogramLoss(density="beta"),
}
RAW = {"lifted", "contrastive"}
NORMALISED = sorted(set(LOSSES) - RAW)
TINY = {torch.float16: 6e-8, torch.bfloat16: 1e-40, torch.float32: 1e-45, torch.float64: 5e-324}
DTYPES = list(TINY)


def unit(embeddings):
    """Unit rows in float64, exact for subnormal and huge numbers."""
    wide = embeddings.detach().double()
    wide = wide / wide.abs().amax(1, keepdim=True)
    norm = wide.norm(dim=1, keepdim=True)
    return wide / norm


def scaled(exponents, dtype, n=24, d=8):
    """A batch whose row i has about the norm 10^exponents[i mod ...]."""
    embeddings, labels = batch(n=n, d=d, classes=6)
    factors = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
    return (embeddings * factors[torch.arange(n) % len(factors), None]).to(dtype), labels


SCALES = [
    *[(torch.float32, [e]) for e in (-41, -38, -30, -20, -13, -9, 9, 15, 19, 25, 37)],
    (torch.float32, [0, 0, 0, 0, 0, -30]),
    (torch.float32, [0, 6, -12, -38, 37]),
    *[(torch.float64, [e]) for e in (-310, -300, -170, -13, 12, 160, 300)],
    (torch.float64, [0, 1, -200, 200, -305, 305]),
    (torch.bfloat16, [-30, 0, 30]),
    (torch.float16, [-5, 0, 3]),
]


@pytest.mark.parametrize(("dtype", "exponents"), SCALES, ids=str)
@pytest.mark.parametrize("name", NORMALISED)
def test_a_loss_of_directions_does_not_depend_on_the_norms(name, dtype, exponents):
    embeddings, labels = scaled(exponents, dtype)
    embeddings.requires_grad_()
    rows = unit(embeddings).requires_grad_()
    value, expected = LOSSES[name]()(embeddings, labels), LOSSES[name]()(rows, labels)
    (gradient,) = torch.autograd.grad(value, embeddings)
    (by_unit,) = torch.autograd.grad(expected, rows)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12 if dtype == torch.float64 else 1e-5)
    largest = embeddings.detach().double().abs().amax(1, keepdim=True)
    # The gradient times the norm; one that is too large or too small for the dtype has no digits to compare.
    found = gradient.double() * largest * (embeddings.detach().double() / largest).norm(dim=1, keepdim=True)
    spaced = (embeddings.detach().double().abs().amax(1) > 1e-36) & (embeddings.detach().double().abs().amax(1) < 1e30)
    spaced |= torch.tensor(dtype == torch.float64) & (largest[:, 0] > 1e-300) & (largest[:, 0] < 1e290)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-2}.get(dtype, 5e-2)
    assert (found - by_unit)[spaced].norm() <= tolerance * by_unit.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-25, -13, 0, 8])
@pytest.mark.parametrize("name", sorted(RAW))
def test_a_loss_of_raw_embeddings_is_exact_for_small_and_large_ones(name, dtype, exponent):
    embeddings, labels = scaled([exponent, exponent + 1], dtype)
    embeddings.requires_grad_()
    wide = embeddings.detach().double()
    same = labels[:, None] == labels
    loss = BASELINES[name](margin=10.0**exponent)
    distance = (wide[:, None] - wide).square().sum(2).sqrt()
    if name == "contrastive":
        terms = torch.where(same, distance.square(), (10.0**exponent - distance).clamp(min=0).square()) / 2
        expected = terms.triu(1).sum() / (24 * 23 / 2)
    else:
        rivals = (10.0**exponent - distance).masked_fill(same, -torch.inf).logsumexp(1)
        hinges = (torch.logaddexp(rivals[:, None], rivals) + distance).clamp(min=0).square()
        expected = (hinges * same).triu(1).sum() / (2 * same.triu(1).sum())
    value = loss(embeddings, labels)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12 if dtype == torch.float64 else 1e-6, abs=1e-45)
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMALISED)
def test_zero_rows_are_refused_with_the_same_words(name, dtype):
    embeddings, labels = scaled([0], dtype)
    embeddings[[3, 5]] = 0
    with pytest.raises(ValueError, match=r"^embeddings rows \[3, 5\] are zero and have no direction$"):
        LOSSES[name]()(embeddings, labels)
    fine = embeddings.index_fill(0, torch.tensor([3, 5]), TINY[dtype])
    assert LOSSES[name]()(fine, labels).isfinite()
    with pytest.raises(ValueError, match=r"^reference_embeddings rows \[3, 5\] are zero and have no direction$"):
        LOSSES[name]()(fine, labels, embeddings, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_numbers_that_are_not_finite_are_refused_with_the_same_words(name, dtype, value):
    embeddings, labels = scaled([0], dtype)
    spoilt = embeddings.index_put((torch.tensor([2, 7]), torch.tensor([1, 0])), torch.tensor(value, dtype=dtype))
    with pytest.raises(ValueError, match=r"^embeddings rows \[2, 7\] hold NaN or infinity$"):
        LOSSES[name]()(spoilt, labels)
    with pytest.raises(ValueError, match=r"^reference_embeddings rows \[2, 7\] hold NaN or infinity$"):
        LOSSES[name]()(embeddings, labels, spoilt, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_overflow_are_refused(name, dtype):
    embeddings, labels = scaled([0], dtype)
    embeddings[4] = torch.finfo(dtype).max
    with pytest.raises(ValueError, match=r"^embeddings rows \[4\] have norms above "):
        LOSSES[name]()(embeddings, labels)


def test_the_statistics_of_pairs_do_not_depend_on_the_norms():
    embeddings, labels = scaled([0, -30, 25, -40], torch.float32)
    rows = unit(embeddings)
    assert reverse_probability(embeddings, labels) == reverse_probability(rows, labels)
    found, expected = pair_histograms(embeddings, labels), pair_histograms(rows, labels)
    torch.testing.assert_close(found.positive, expected.positive, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_an_undefined_loss_of_large_embeddings_is_zero(name):
    """The sum of the embeddings overflows."""
    loss = BASELINES[name](on_degenerate="zero") if name in BASELINES else HistogramLoss(on_degenerate="zero")
    embeddings = torch.full((1, 4), 1e12).requires_grad_()
    value = loss(embeddings, torch.zeros(1, dtype=torch.int64))
    value.backward()
    assert value == 0
    assert not embeddings.grad.any()
