"""All losses with matrices of pairs and with references, against float64 oracles that loop over the pairs given."""

import itertools

import numpy as np
import pytest
import torch

from hloss import HistogramLoss, pair_matrix
from hloss.losses.baselines import BASELINES
from tests.losses.cases import batch, signs
from tests.losses.oracles import histogram_loss

LOSSES = {**BASELINES, "histogram": HistogramLoss}


def listed(sign, group, within):
    n, m = sign.shape
    return [(i, j) for i in range(n) for j in range(i + 1 if within else 0, m) if sign[i, j] == group]


def sides(y, z):
    unit_rows = [x / x.norm(dim=1, keepdim=True) for x in (y, y if z is None else z)]
    return *unit_rows, y, y if z is None else z


def binomial(y, sign, z=None):
    u, v, *_ = sides(y, z)
    positives = [torch.log(1 + torch.exp(-2 * (u[i] @ v[j] - 0.5))) for i, j in listed(sign, 1, z is None)]
    negatives = [torch.log(1 + torch.exp(20 * (u[i] @ v[j] - 0.5))) for i, j in listed(sign, -1, z is None)]
    return sum(positives) / len(positives) + sum(negatives) / len(negatives)


def contrastive(y, sign, z=None):
    *_, y, v = sides(y, z)
    terms = [(y[i] - v[j]).square().sum() / 2 for i, j in listed(sign, 1, z is None)]
    terms += [torch.clamp(1 - (y[i] - v[j]).norm(), min=0) ** 2 / 2 for i, j in listed(sign, -1, z is None)]
    return sum(terms) / len(terms)


def lifted(y, sign, z=None):
    *_, y, v = sides(y, z)
    n, m = sign.shape
    off = [[z is not None or i != j for j in range(m)] for i in range(n)]
    total, positives = 0, listed(sign, 1, z is None)
    for i, j in positives:
        rivals = [torch.exp(1 - (y[i] - v[k]).norm()) for k in range(m) if sign[i, k] == -1 and off[i][k]]
        rivals += [torch.exp(1 - (y[k] - v[j]).norm()) for k in range(n) if sign[k, j] == -1 and off[k][j]]
        if rivals:  # The logarithm of an empty sum is minus infinity.
            total = total + torch.clamp(torch.log(sum(rivals)) + (y[i] - v[j]).norm(), min=0) ** 2
    return total / (2 * len(positives))


def triplet(y, sign, z=None, semi_hard=False):
    u, v, *_ = sides(y, z)
    n, m = sign.shape
    active = []
    for a, p, q in itertools.product(range(n), range(m), range(m)):
        if sign[a, p] == 1 and sign[a, q] == -1 and (z is not None or a not in (p, q)):
            d_ap, d_an = (u[a] - v[p]).square().sum(), (u[a] - v[q]).square().sum()
            if d_ap - d_an + 0.2 > 0 and (d_ap < d_an or not semi_hard):
                active.append(d_ap - d_an + 0.2)
    return sum(active) / max(len(active), 1)


def quadruplet(y, sign, z=None):
    u, v, *_ = sides(y, z)
    positives, negatives = (listed(sign, group, z is None) for group in (1, -1))
    hinges = [torch.clamp(0.1 + u[k] @ v[m] - u[i] @ v[j], min=0) for i, j in positives for k, m in negatives]
    return sum(hinges) / len(hinges)


def histogram(y, sign, z=None):
    if z is None:
        return histogram_loss(y, sign)
    n = len(y)
    both = torch.zeros(n + len(z), n + len(z), dtype=sign.dtype)
    both[:n, n:] = sign
    return histogram_loss(torch.cat([y, z]), both + both.T)


ORACLES = {
    "binomial": binomial,
    "contrastive": contrastive,
    "lifted": lifted,
    "triplet": triplet,
    "semi-hard-triplet": lambda *given: triplet(*given, semi_hard=True),
    "quadruplet": quadruplet,
    "histogram": histogram,
}


def random_signs(n, m, seed, within, dtype=torch.int64):
    """A matrix with a fifth of positive and a third of ignored pairs; row 0 has no negative and row 1 no positive."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.tensor([-1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1])[
        torch.randint(15, (n, m), generator=generator)
    ]
    sign[0] = sign[0].clamp(min=0)
    sign[1] = sign[1].clamp(max=0)
    if within:
        sign = sign.triu() + sign.triu(1).T
    return sign.to(dtype)


def check(loss, oracle, y, sign, z=None):
    given = [x for x in (y, z) if x is not None]
    value, expected = loss(y, sign, *given[1:]), oracle(y, sign, *given[1:])
    gradients = torch.autograd.grad(value, given)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, given), strict=True):
        assert wanted.abs().max() > 1e-5
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_every_loss_has_an_oracle():
    assert set(ORACLES) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_a_matrix_of_pairs_equals_the_loop_over_its_pairs(name, seed, dtype):
    y = batch(n=13, d=4, seed=seed)[0].requires_grad_()
    sign = random_signs(13, 13, seed, within=True)
    check(LOSSES[name](), ORACLES[name], y, sign.to(dtype))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_a_matrix_with_references_equals_the_loop_over_its_pairs(name, seed):
    y, z = (batch(n=n, d=4, seed=seed + n)[0].requires_grad_() for n in (9, 12))
    check(LOSSES[name](), ORACLES[name], y, random_signs(9, 12, seed, within=False), z)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_references_are_the_matrix_that_says_the_same(name):
    (y, labels), (z, others) = batch(n=11, d=4, classes=3), batch(n=7, d=4, classes=4, seed=9)
    y.requires_grad_()
    sign = torch.where(labels[:, None] == others, 1, -1)
    by_labels, by_matrix = LOSSES[name]()(y, labels, z, others), LOSSES[name]()(y, sign, z)
    assert torch.equal(by_labels, by_matrix)
    assert torch.equal(*(torch.autograd.grad(value, y)[0] for value in (by_labels, by_matrix)))
    check(lambda y, sign, z: LOSSES[name]()(y, labels, z, others), ORACLES[name], y, sign, z.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_that_says_what_the_labels_say_gives_the_same_loss(name, dtype):
    embeddings, labels = batch(n=40, d=6, classes=7)
    embeddings = embeddings.to(dtype).requires_grad_()
    values = [LOSSES[name]()(embeddings, given) for given in (labels, signs(labels), signs(labels).fill_diagonal_(0))]
    gradients = [torch.autograd.grad(value, embeddings)[0] for value in values]
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-2, atol=1e-2 * gradients[0].abs().max().item())
        if name != "histogram":  # Its pairs come in another order.
            assert torch.equal(value, values[0])
            assert torch.equal(gradient, gradients[0])


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_matrix_is_refused_by_row(name):
    embeddings, labels = batch(n=6)
    sign, loss = signs(labels), LOSSES[name]()
    with pytest.raises(ValueError, match=r"pairs must contain only \+1, -1 and 0: rows \[2\] contain other"):
        loss(embeddings, sign.index_fill(0, torch.tensor([2]), 3))
    with pytest.raises(ValueError, match=r"must contain only \+1, -1 and 0: rows \[0\]"):  # Its absolute value is -128.
        loss(
            embeddings, sign.to(torch.int8).index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(-128).char())
        )
    with pytest.raises(ValueError, match=r"the matrix of pairs must be symmetric: rows \[0, 1\] differ"):
        loss(embeddings, sign.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(0)))
    with pytest.raises(ValueError, match=r"must have shape \(6,\), or \(6, 6\) as a matrix of pairs: got \(6, 5\)"):
        loss(embeddings, sign[:, :5])
    with pytest.raises(ValueError, match="reference_labels must be None with a matrix of pairs"):
        loss(embeddings, sign, embeddings, labels)
    with pytest.raises(ValueError, match=r"reference_labels must be integers: got NoneType"):
        loss(embeddings, labels, embeddings)


@pytest.mark.parametrize("name", LOSSES)
def test_a_matrix_without_one_kind_of_pair_is_undefined(name):
    embeddings = batch(n=6)[0].requires_grad_()
    nothing = torch.zeros(6, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="0 positive and 0 negative pairs"):
        LOSSES[name]()(embeddings, nothing)
    with pytest.raises(ValueError, match="0 positive and 0 negative pairs"):  # The diagonal is no pair.
        LOSSES[name]()(embeddings, nothing + torch.eye(6, dtype=torch.int64))
    value = LOSSES[name](on_degenerate="zero")(embeddings, nothing)
    value.backward()
    assert value == 0
    assert not embeddings.grad.any()


@pytest.mark.parametrize("at_least", [1, 2, 3])
def test_pair_matrix_counts_common_labels(at_least):
    multi_hot = np.random.default_rng(0).integers(0, 2, (20, 6))
    expected = [[1 if (a & b).sum() >= at_least else -1 for b in multi_hot] for a in multi_hot]
    for given in (torch.tensor(multi_hot), torch.tensor(multi_hot).bool(), multi_hot, torch.tensor(multi_hot).float()):
        assert pair_matrix(given, at_least).tolist() == expected
    one_hot = torch.nn.functional.one_hot(torch.arange(12) % 5)
    assert torch.equal(pair_matrix(one_hot), signs(torch.arange(12) % 5).char())


def test_pair_matrix_refuses_other_numbers():
    with pytest.raises(ValueError, match=r"multi_hot must contain only 0 and 1: rows \[1\] contain other numbers"):
        pair_matrix(torch.tensor([[1, 0], [2, 0]]))
    with pytest.raises(ValueError, match=r"multi_hot must have shape \(n, labels\): got \(3,\)"):
        pair_matrix(torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="at_least must be a whole number of at least 1: got 0"):
        pair_matrix(torch.eye(3), 0)
