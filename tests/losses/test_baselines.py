"""The baselines against float64 oracles that loop over pairs, triplets and quadruplets as the formulae are printed."""

import itertools
import math
from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hloss import HistogramLoss
from hloss.losses import baselines
from hloss.losses.baselines import (
    BASELINES,
    BinomialDeviance,
    Contrastive,
    LiftedStructure,
    Quadruplet,
    SemiHardTriplet,
    Triplet,
)
from hloss.losses.batch import Batch
from hloss.losses.cuda_forms import CudaPairs
from hloss.losses.pairwise import DensePairs
from tests.helpers.gpu_waits import counted_waits


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


def lifted_oracle(embeddings, labels, margin=1.0, normalize=False):
    y = unit(embeddings) if normalize else embeddings
    distance = lambda i, j: (y[i] - y[j]).norm()  # noqa: E731
    n, total = len(labels), 0
    for i, j in pairs(labels, True):
        rivals = [torch.exp(margin - distance(i, k)) for k in range(n) if labels[k] != labels[i]]
        rivals += [torch.exp(margin - distance(j, k)) for k in range(n) if labels[k] != labels[j]]
        total = total + torch.clamp(torch.log(sum(rivals)) + distance(i, j), min=0) ** 2
    return total / (2 * len(pairs(labels, True)))


def triplet_oracle(embeddings, labels, margin=0.2, semi_hard=False):
    y, n, active = unit(embeddings), len(labels), []
    for a, p, q in itertools.permutations(range(n), 3):
        if labels[a] == labels[p] and labels[a] != labels[q]:
            d_ap, d_an = (y[a] - y[p]).square().sum(), (y[a] - y[q]).square().sum()
            if d_ap - d_an + margin > 0 and (d_ap < d_an or not semi_hard):
                active.append(d_ap - d_an + margin)
    return sum(active) / len(active)


def semi_hard_oracle(embeddings, labels, margin=0.2):
    return triplet_oracle(embeddings, labels, margin, semi_hard=True)


def contrastive_oracle(embeddings, labels, margin=1.0, normalize=False):
    y = unit(embeddings) if normalize else embeddings
    terms = [(y[i] - y[j]).square().sum() / 2 for i, j in pairs(labels, True)]
    terms += [torch.clamp(margin - (y[i] - y[j]).norm(), min=0) ** 2 / 2 for i, j in pairs(labels, False)]
    return sum(terms) / len(terms)


def quadruplet_oracle(embeddings, labels, margin=0.1):
    y = unit(embeddings)
    hinges = [
        torch.clamp(margin + y[k] @ y[m] - y[i] @ y[j], min=0)
        for i, j in pairs(labels, True)
        for k, m in pairs(labels, False)
    ]
    return sum(hinges) / len(hinges)


ORACLES = {
    "binomial": (binomial_oracle, [{}, {"C": 25.0}, {"alpha": 1.0, "beta": 0.0, "C": 2.0}]),
    "lifted": (lifted_oracle, [{}, {"margin": -2.0}, {"normalize": True}]),
    "triplet": (triplet_oracle, [{}, {"margin": 1.0}]),
    "semi-hard-triplet": (semi_hard_oracle, [{}, {"margin": 1.0}]),
    "contrastive": (contrastive_oracle, [{}, {"margin": 3.0}, {"normalize": True, "margin": 0.8}]),
    "quadruplet": (quadruplet_oracle, [{}, {"margin": 0.0}, {"margin": 0.7}]),
}
CASES = [(name, options) for name, (_, settings_) in ORACLES.items() for options in settings_]


@pytest.fixture(params=[DensePairs, CudaPairs])
def pair_forms(request, monkeypatch):
    """Compute the losses on the CPU by the forms for the CPU, then by those for CUDA."""
    monkeypatch.setattr(baselines, "DensePairs", request.param)


@pytest.mark.usefixtures("pair_forms")
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


def test_every_loss_has_an_oracle():
    assert set(ORACLES) == set(BASELINES)


@pytest.mark.parametrize(
    ("loss", "peer", "miner"),
    [
        # The peers coincide with these settings: theirs normalise and take plain distances by default.
        (LiftedStructure(), ("LiftedStructureLoss", {"normalize_embeddings": False}), None),
        (LiftedStructure(normalize=True), ("LiftedStructureLoss", {}), None),
        (Triplet(), ("TripletMarginLoss", {"power": 2}), None),
        (SemiHardTriplet(), ("TripletMarginLoss", {"power": 2}), "semihard"),
    ],
    ids=["lifted", "lifted, normalised", "triplet", "semi-hard triplet"],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_equal_pytorch_metric_learning(loss, peer, miner, seed):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning import distances, miners

    embeddings, labels = batch(n=40, d=8, classes=7, seed=seed)
    name, distance = peer
    distance = distances.LpDistance(**distance)
    options = {"margin": 0.2} if name == "TripletMarginLoss" else {}
    peer = getattr(losses, name)(distance=distance, **options)
    mined = miners.TripletMarginMiner(0.2, miner, distance=distance)(embeddings, labels) if miner else None
    value, expected = loss(embeddings, labels), peer(embeddings, labels, mined)
    (gradient,) = torch.autograd.grad(value, embeddings)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    assert expected_gradient.abs().max() > 1e-4
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10 * expected_gradient.abs().max())


def test_the_quadruplet_hinge_is_the_limit_of_the_histogram_loss_with_the_linear_cost():
    embeddings, labels = batch(n=40, d=8, classes=7)
    limit = Quadruplet(margin=0.1)(embeddings, labels)
    coarse, fine = (HistogramLoss(n_bins=n, order_cost="linear", margin=0.1)(embeddings, labels) for n in (20, 2000))
    torch.testing.assert_close(fine, limit, rtol=1e-5, atol=0)
    assert (coarse - limit).abs() > 100 * (fine - limit).abs()


@pytest.mark.parametrize("loss", [Triplet(), SemiHardTriplet()], ids=["triplet", "semi-hard"])
def test_a_batch_in_which_no_triplet_violates_the_margin_gives_zero(loss):
    embeddings = torch.eye(3).repeat_interleave(3, 0).requires_grad_()
    value = loss(embeddings, torch.arange(9) // 3)
    value.backward()
    assert value == 0
    assert not embeddings.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_as_near_as_the_positive_is_not_semi_hard(dtype):
    same = torch.randn(1, 37, generator=torch.Generator().manual_seed(0), dtype=dtype).repeat(60, 1)
    assert SemiHardTriplet()(same, torch.arange(60) // 3) == 0
    assert Triplet()(same, torch.arange(60) // 3).item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.usefixtures("pair_forms")
@pytest.mark.parametrize("name", [name for name, loss in BASELINES.items() if "margin" in signature(loss).parameters])
@pytest.mark.parametrize("margin", [1e-9, 1e9])
def test_extreme_margins_are_finite(name, margin):
    for dtype in (torch.float32, torch.float64):
        embeddings, labels = batch(n=24, d=16)
        embeddings = embeddings.detach().to(dtype).requires_grad_()
        value = BASELINES[name](margin=margin)(embeddings, labels)
        value.backward()
        assert value.isfinite()
        assert embeddings.grad.isfinite().all()


def test_the_metric_is_that_of_the_embeddings_a_loss_takes():
    raw = {name for name, loss in BASELINES.items() if loss().metric == "euclidean"}
    assert raw == {"lifted", "contrastive"}
    assert all(BASELINES[name](normalize=True).metric == "cosine" for name in raw)
    for name in set(BASELINES) - raw:
        embeddings, labels = batch()
        scale = 1 + torch.arange(14)[:, None]
        torch.testing.assert_close(BASELINES[name]()(scale * embeddings, labels), BASELINES[name]()(embeddings, labels))


def test_contrastive_is_undefined_for_a_single_image_only():
    with pytest.raises(ValueError, match="the loss of 0 positive and 0 negative pairs is undefined"):
        Contrastive()(torch.ones(1, 2), torch.tensor([0]))
    assert Contrastive(on_degenerate="zero")(torch.ones(1, 2), torch.tensor([0])) == 0
    assert Contrastive()(torch.eye(3), torch.arange(3)) == 0
    assert Contrastive()(torch.eye(3), torch.zeros(3, dtype=torch.int64)) == 1


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_batch_and_the_names_of_classes_do_not_matter(name, seed):
    embeddings, labels = batch(seed=seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    loss = BASELINES[name]()
    torch.testing.assert_close(loss(embeddings[order], 7 - labels[order]), loss(embeddings, labels))


@pytest.mark.usefixtures("pair_forms")
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["duplicates", "all same", "huge", "tiny"])
def test_value_and_gradient_are_finite_at_the_extremes(name, dtype, kind):
    embeddings, labels = batch(n=24, d=16)
    embeddings = embeddings.detach()
    embeddings = {
        "duplicates": embeddings[torch.arange(24) // 2],
        "all same": embeddings[:1].repeat(24, 1),
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
    with pytest.raises(ValueError, match="negative pairs is undefined"):
        BASELINES[name]()(embeddings, labels)
    value = BASELINES[name](on_degenerate="zero")(embeddings, labels)
    value.backward()
    assert value == 0
    assert not embeddings.grad.any()


@pytest.mark.parametrize("name", BASELINES)
def test_unusable_input_is_refused_by_name(name):
    embeddings, labels = batch()
    loss = BASELINES[name]()
    with pytest.raises(
        ValueError, match=r"labels must have shape \(14,\), or \(14, 14\) as a matrix of pairs: got \(13,\)"
    ):
        loss(embeddings, labels[:-1])
    with pytest.raises(ValueError, match=r"embeddings must be floating-point \(n, d\): got torch.int64 \(14,\)"):
        loss(labels, labels)
    with pytest.raises(ValueError, match=r"embeddings rows \[3\] hold NaN or infinity"):
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
        (LiftedStructure, {"margin": math.nan}),
        (LiftedStructure, {"normalize": 1}),
        (Triplet, {"margin": 0.0}),
        (SemiHardTriplet, {"margin": "0.2"}),
        (Contrastive, {"margin": -1.0}),
        (Contrastive, {"normalize": "no"}),
        (Quadruplet, {"margin": -0.1}),
        *[(loss, {"on_degenerate": "skip"}) for loss in BASELINES.values()],
    ],
)
def test_an_impossible_option_is_refused_with_its_name_and_value(loss, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        loss(**options)


def test_the_forms_without_a_wait_equal_those_with_one():
    """What lifted structure and quadruplet compute on CUDA in place of `nonzero` and boolean indexing."""
    distance = torch.rand(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embeddings, labels = batch(n=40, classes=7)
    listed, everything = (kind(Batch(embeddings, labels, None, None)) for kind in (DensePairs, CudaPairs))
    nearest, mask = distance[0] - 1, listed.positive.triu(1)
    hinges, expected = (pairs.lifted_hinges(nearest, nearest, distance) for pairs in (everything, listed))
    torch.testing.assert_close(hinges[mask], expected)
    assert hinges.count_nonzero() == expected.count_nonzero() > 30
    assert torch.equal(*(pairs.listed(distance, mask, int(mask.sum())) for pairs in (everything, listed)))


class ComputingOperators(TorchDispatchMode):
    """Counts the operators within this context that compute, which are all but views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


# The number of operators with torch 2.14, plus 3 for other versions.
MOST_OPERATORS = {
    "binomial": 50,
    "contrastive": 43,
    "triplet": 69,
    "semi-hard-triplet": 73,
    "lifted": 70,
    "quadruplet": 70,
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_on_a_gpu_takes_few_operators(name, monkeypatch):
    """The time of a small batch is the time to launch its kernels. The forms for CUDA are computed on the CPU here."""
    monkeypatch.setattr(baselines, "DensePairs", CudaPairs)
    embeddings, labels = batch(n=64)
    with ComputingOperators() as operators:
        BASELINES[name]()(embeddings.float().detach().requires_grad_(), labels).backward()
    assert 30 < operators.count <= MOST_OPERATORS[name]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 needs a driver to imitate a GPU")
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("kind", ["labels", "matrix", "references", "matrix of references"])
def test_a_call_reads_from_the_device_once(name, kind, monkeypatch):
    """On an imitation of a GPU, whose tensors hold no data: whatever depended on data but the one read would fail."""
    n, reads = 64, []
    norms, n_pairs = [1.0, 2.0], [float(n * 8), float(n * 48)]
    numbers = {
        "labels": [*norms, *n_pairs],
        "matrix": [*norms, 0.0, 0.0, *n_pairs],  # no wrong entry, and symmetric
        "references": [*norms, *norms, *n_pairs],
        "matrix of references": [*norms, *norms, 0.0, *n_pairs],
    }[kind]
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: reads.append(self.shape) or [*numbers])
    monkeypatch.setattr(FakeTensor, "item", lambda self: reads.append(self.shape) or numbers[0], raising=False)
    with FakeTensorMode():
        embeddings = torch.randn(n, 32, device="cuda", requires_grad=True)
        labels = torch.zeros((n, n) if "matrix" in kind else n, dtype=torch.int64)
        references = torch.randn(n, 32, device="cuda") if "references" in kind else None
        value = BASELINES[name]()(embeddings, labels, references, labels if kind == "references" else None)
    assert value.device.type == "cuda"
    assert value.requires_grad
    assert reads == [(len(numbers),)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("labels_on", ["cpu", "cuda"])
def test_on_a_gpu_as_on_the_cpu_with_one_wait_and_always_the_same(name, options, labels_on):
    embeddings, labels = batch(n=96, d=16, classes=12)
    loss = BASELINES[name](**options)
    expected = loss(embeddings, labels)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    there, labels = embeddings.detach().cuda().requires_grad_(), labels.to(labels_on)
    found = []
    for _ in range(2):
        with counted_waits() as waits:
            value = loss(there, labels)
            (gradient,) = torch.autograd.grad(value, there)
        found.append((value, gradient))
    assert len(waits) == 1, waits
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-7, atol=1e-9 * expected_gradient.abs().max())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BASELINES)
def test_float32_on_a_gpu_is_close_to_float64(name):
    embeddings, labels = batch(n=96, d=16, classes=12)
    narrow = embeddings.detach().float().cuda().requires_grad_()
    value, expected = BASELINES[name]()(narrow, labels), BASELINES[name]()(embeddings, labels)
    (gradient,) = torch.autograd.grad(value, narrow)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (gradient.cpu() - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()
