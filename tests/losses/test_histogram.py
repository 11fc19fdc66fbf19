"""The histogram loss against the authors' layer, against the reference, and its invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hloss import HistogramLoss, histogram_loss, pair_histograms, pair_slopes, reverse_probability
from hloss.losses import pairs, reference, streaming
from tests.losses import oracles
from tests.losses.cases import GOLDEN, GOLDEN_CASES, KERNELS, VARIANTS, batch, check_against_golden, signs


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_value_and_gradient_equal_the_authors_layer(case):
    embeddings, labels, options = check_against_golden(case, histogram_loss)
    densities = pair_histograms(embeddings, labels, **options)
    np.testing.assert_allclose(densities.positive, GOLDEN[f"{case}/positive"], atol=1e-12)
    np.testing.assert_allclose(densities.negative, GOLDEN[f"{case}/negative"], atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [*VARIANTS, {"n_bins": 1}, {"n_bins": 7, "kernel": "gaussian", "bandwidth": 9.0}, {"margin": 3.0}],
    ids=str,
)
def test_value_and_gradient_equal_the_reference(options):
    embeddings, labels = batch(n=70)
    embeddings.requires_grad_()
    loss = HistogramLoss(**options)(embeddings, labels)
    expected = oracles.histogram_loss(embeddings, labels, **options)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradient_equals_finite_differences(options):
    embeddings, labels = batch(n=12, d=4, classes=3, seed=3)
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: HistogramLoss(**options)(e, labels), embeddings, eps=1e-8, atol=1e-5)


@settings(max_examples=60)
@given(
    n_bins=st.integers(1, 1000),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["random", "duplicates", "all same", "opposite", "singletons"]),
)
def test_invariants(n_bins, kernel, seed, kind):
    embeddings, labels = batch(n=20, d=3, classes=6, seed=seed)
    labels[:2], labels[2] = 0, 1  # at least one pair of each sign
    if kind == "duplicates":
        embeddings = embeddings[torch.arange(20) // 2]
    elif kind == "all same":
        embeddings = embeddings[:1].expand(20, 3)
    elif kind == "opposite":
        embeddings = torch.tensor([[1.0, 0, 0]], dtype=torch.float64) * (1 - 2 * (torch.arange(20) % 2))[:, None]
    elif kind == "singletons":
        labels[3:] = torch.arange(3, 20)
    options = {"n_bins": n_bins, "kernel": kernel[0], "bandwidth": kernel[1]}
    h = pair_histograms(embeddings, labels, **options)
    assert h.positive.sum().item() == pytest.approx(1, abs=1e-12)
    assert h.negative.sum().item() == pytest.approx(1, abs=1e-12)
    loss = histogram_loss(embeddings, labels, **options).item()
    assert -1e-12 <= loss <= 1 + 1e-12
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert histogram_loss(embeddings[order], labels[order], **options).item() == pytest.approx(loss, abs=1e-9)
    assert histogram_loss(embeddings, labels, **options, margin=0.0).item() == loss
    if kernel[1]:
        narrow = histogram_loss(embeddings, labels, n_bins=n_bins, kernel=kernel[0], bandwidth=1e-9).item()
        assert narrow == pytest.approx(histogram_loss(embeddings, labels, n_bins=n_bins).item(), abs=1e-12)


def test_all_embeddings_equal_is_one_with_a_zero_gradient():
    embeddings = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)
    loss = HistogramLoss()(embeddings, torch.arange(8) // 2)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-12)
    assert embeddings.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("kernel", "bandwidth"), [("gaussian", 4.0), ("epanechnikov", 6.0), ("uniform", 5.0)])
def test_kernels_at_fine_bins_meet_the_kernel_density(kernel, bandwidth):
    embeddings, labels = batch(n=16, d=8, classes=4, seed=2)
    n_bins = 2000
    h = pair_histograms(embeddings, labels, n_bins=n_bins, kernel=kernel, bandwidth=bandwidth * 10)
    positive, _ = reference.pair_similarities(embeddings, labels)
    sigma = bandwidth * 10 * 2 / n_bins
    z = (h.nodes[:, None] - positive) / sigma
    shapes = {
        "gaussian": torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
        "epanechnikov": (0.75 / 5**0.5 * (1 - z**2 / 5)).clamp(min=0),
        "uniform": (z.abs() <= 3**0.5) / (2 * 3**0.5),
    }
    density = shapes[kernel].mean(1) / sigma * (2 / n_bins)
    inner = (h.nodes > -0.7) & (h.nodes < 0.7)  # away from the reflected ends
    error = (h.positive - density)[inner].abs().sum()
    assert error < (0.02 if kernel == "uniform" else 2e-4)


def test_a_matrix_of_pairs_equals_labels_and_leaves_out_the_ignored():
    embeddings, labels = batch()
    embeddings.requires_grad_()
    matrix = signs(labels)
    by_labels = torch.autograd.grad(HistogramLoss()(embeddings, labels), embeddings)[0]
    by_matrix = torch.autograd.grad(HistogramLoss()(embeddings, matrix), embeddings)[0]
    torch.testing.assert_close(by_labels, by_matrix, atol=1e-14, rtol=1e-12)
    ignored = torch.rand(24, 24, generator=torch.Generator().manual_seed(1)) < 0.3
    matrix[ignored | ignored.T] = 0
    expected = reference.histogram_loss(embeddings, matrix, n_bins=30)
    assert HistogramLoss(n_bins=30)(embeddings, matrix).item() == pytest.approx(expected.item(), abs=1e-13)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_references_are_the_pairs_between_two_sets(options):
    embeddings, labels = batch(n=20)
    references, reference_labels = batch(n=33, seed=5)
    embeddings.requires_grad_()
    references.requires_grad_()
    loss = HistogramLoss(**options)(embeddings, labels, references, reference_labels)
    gradients = torch.autograd.grad(loss, [embeddings, references])
    # The same pairs as one batch with a matrix that ignores the pairs within each side.
    both = torch.cat([embeddings, references])
    matrix = torch.zeros(53, 53, dtype=torch.int64)
    matrix[:20, 20:] = torch.where(labels[:, None] == reference_labels, 1, -1)
    together = HistogramLoss(**options)(both, matrix + matrix.T)
    expected = torch.autograd.grad(together, [embeddings, references])
    assert loss.item() == pytest.approx(together.item(), abs=1e-13)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-13, rtol=1e-9)
    half = matrix[:20, 20:]
    assert HistogramLoss(**options)(embeddings, half, references).item() == pytest.approx(loss.item(), abs=1e-13)


def test_gradient_flows_only_where_it_is_asked():
    embeddings, labels = batch()
    references = embeddings.clone().requires_grad_()
    HistogramLoss()(embeddings, labels, references, labels).backward()
    assert embeddings.grad is None
    assert references.grad.abs().sum() > 0


def test_the_result_does_not_depend_on_the_blocks(monkeypatch):
    embeddings, labels = batch(n=70, classes=9)
    embeddings.requires_grad_()
    loss = HistogramLoss()(embeddings, labels)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    monkeypatch.setattr(pairs, "ROWS", 7)
    monkeypatch.setattr(pairs, "COLUMNS", 13)
    blocked = HistogramLoss()(embeddings, labels)
    assert blocked.item() == pytest.approx(loss.item(), abs=1e-14)
    torch.testing.assert_close(torch.autograd.grad(blocked, embeddings)[0], gradient, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"kernel": "gaussian", "bandwidth": 2.0}, {"density": "beta"}])
def test_pairs_kept_and_pairs_recomputed_give_the_same_gradient(monkeypatch, options):
    embeddings, labels = batch(n=300, d=16, classes=40, dtype=torch.float32)
    embeddings.requires_grad_()
    kept = HistogramLoss(**options)(embeddings, labels)
    gradients = [torch.autograd.grad(kept, embeddings, retain_graph=True)[0] for _ in range(2)]
    monkeypatch.setattr(streaming, "KEPT_PAIRS", 0)
    recomputed = HistogramLoss(**options)(embeddings, labels)
    (wanted,) = torch.autograd.grad(recomputed, embeddings)
    assert kept.item() == recomputed.item()
    assert all(torch.equal(gradient, wanted) for gradient in gradients)


def test_float32_is_close_to_float64():
    embeddings, labels = batch(n=300, d=32, classes=40)
    wide, narrow = embeddings.clone().requires_grad_(), embeddings.float().requires_grad_()
    loss, loss32 = HistogramLoss()(wide, labels), HistogramLoss()(narrow, labels)
    (loss + loss32.double()).backward()
    assert loss32.item() == pytest.approx(loss.item(), abs=1e-5)
    assert (narrow.grad - wide.grad).norm() <= 1e-2 * wide.grad.norm()


def test_half_precision_and_autocast_are_computed_in_float32():
    embeddings, labels = batch(n=64, d=16, dtype=torch.float32)
    half = embeddings.bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    loss = HistogramLoss()(full, labels)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss16 = HistogramLoss()(half, labels)
        loss16.backward()
    assert loss16.dtype == torch.float32
    assert loss16.item() == loss.item()
    assert torch.equal(half.grad, full.grad.bfloat16())


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_global_precision_neither_matters_nor_changes(precision):
    embeddings, labels = batch(n=64, d=64, dtype=torch.float32)
    expected = HistogramLoss()(embeddings, labels).item()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert HistogramLoss()(embeddings, labels).item() == expected
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "labels", [torch.arange(6), torch.zeros(6, dtype=torch.int64)], ids=["no positive", "no negative"]
)
@pytest.mark.parametrize("density", ["histogram", "beta"])
def test_a_batch_without_one_kind_of_pair_is_refused_or_zero(labels, density):
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(ValueError, match=r"of (0|15) positive and (0|15) negative pairs is undefined"):
        HistogramLoss(density=density)(embeddings, labels)
    loss = HistogramLoss(density=density, on_degenerate="zero")(embeddings, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(embeddings.grad, torch.zeros(6, 3))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda e, y: (e.index_fill(0, torch.tensor([3]), float("nan")), y), {}, r"rows \[3\] hold NaN or infinity"),
        (lambda e, y: (e.index_fill(0, torch.tensor([4]), 0), y), {}, r"rows \[4\] are zero"),
        (
            lambda e, y: (e * 0.1 + 2 * (torch.arange(24) == 5)[:, None], y),
            {"normalize": False},
            r"rows \[5\] are longer",
        ),
        (lambda e, y: (e, torch.triu(torch.ones_like(signs(y)))), {}, r"must be symmetric: rows \[0, 1"),
        (lambda e, y: (e, signs(y) * 2), {}, "must contain only \\+1, -1 and 0"),
        (lambda e, y: (e, y[1:]), {}, r"labels must have shape \(24,\)"),
        (lambda e, y: (e, y.double()), {}, "labels must be integers"),
        (lambda e, y: (e[0], y), {}, r"embeddings must be floating-point \(n, d\)"),
    ],
)
def test_unusable_input_is_refused_by_row(spoil, options, message):
    embeddings, labels = spoil(*batch())
    with pytest.raises(ValueError, match=message):
        HistogramLoss(**options)(embeddings, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bins": 0}, "n_bins must be a whole number of at least 1: got 0"),
        ({"n_bins": 10.0}, "n_bins"),
        ({"kernel": "cosine"}, "kernel must be one of triangular, gaussian, epanechnikov, uniform: got 'cosine'"),
        ({"kernel": "gaussian"}, "bandwidth of the gaussian kernel .* must be a finite number above 0: got None"),
        ({"bandwidth": 1.0}, "bandwidth of the triangular kernel must be None: got 1.0"),
        ({"margin": 0.015}, "a multiple of the bin width 0.01 .*got 0.015"),
        ({"margin": -0.1}, "margin must be a finite number of at least 0"),
        ({"alpha": 2.0}, "alpha is only for order_cost .softplus.: got 2.0 with order_cost 'step'"),
        (
            {"density": "beta", "kernel": "uniform", "bandwidth": 1.0},
            "kernel must be .triangular. with density .beta.: got 'uniform'",
        ),
        ({"on_degenerate": "ignore"}, "on_degenerate must be one of raise, zero"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        HistogramLoss(**options)


def test_second_derivatives_are_refused():
    embeddings, labels = batch()
    embeddings.requires_grad_()
    loss = HistogramLoss()(embeddings, labels)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000))
def test_reverse_probability_is_the_share_of_reversed_pairs_of_pairs(seed):
    _, labels = batch(n=12, classes=3, seed=seed)
    axes = torch.cat([torch.eye(3), -torch.eye(3)]).double()  # similarities of -1, 0 and 1: ties
    embeddings = axes[torch.randint(6, (12,), generator=torch.Generator().manual_seed(seed))]
    labels[:2], labels[2] = 0, 1
    positive, negative = reference.pair_similarities(embeddings, labels)
    for ties, weight in (("half", 0.5), ("count", 1.0)):
        costs = [float(n > p) + weight * float(n == p) for p in positive for n in negative]
        found = reverse_probability(embeddings, labels, ties=ties)
        assert found == pytest.approx(sum(costs) / len(costs), abs=1e-12)


@pytest.mark.parametrize("n", [40, 1500])  # one block of pairs, and many, some of negatives alone
def test_reverse_probability_is_one_minus_the_area_under_the_roc_curve(n):
    metrics = pytest.importorskip("sklearn.metrics")
    embeddings, labels = batch(n=n)
    positive, negative = reference.pair_similarities(embeddings, labels)
    is_positive = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
    area = metrics.roc_auc_score(is_positive, torch.cat([positive, negative]))
    assert reverse_probability(embeddings, labels) == pytest.approx(1 - area, abs=1e-12)


def test_the_loss_exceeds_the_reverse_probability_by_half_the_common_mass():
    embeddings, labels = batch(n=60, d=5)
    exact = reverse_probability(embeddings, labels)
    errors = []
    for n_bins in (20, 100, 1000, 10_000):
        h = pair_histograms(embeddings, labels, n_bins=n_bins)
        excess = (h.positive * h.negative).sum().item() / 2
        errors.append(abs(histogram_loss(embeddings, labels, n_bins=n_bins).item() - excess - exact))
    assert errors[0] < 0.01
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_slopes_are_the_derivative_by_one_similarity(options):
    embeddings, labels = batch(n=16, d=6, classes=3, seed=4)
    slopes = pair_slopes(embeddings, labels, **options)
    unit = torch.nn.functional.normalize(embeddings)
    n_bins = len(slopes.similarities)
    n_positive, n_negative = map(len, reference.pair_similarities(embeddings, labels))
    gradient = torch.zeros_like(unit)
    for i in range(16):
        for j in range(16):
            if i != j:
                at = int((unit[i] @ unit[j] + 1) * n_bins / 2)
                positive = labels[i] == labels[j]
                slope = slopes.positive[at] / n_positive if positive else slopes.negative[at] / n_negative
                gradient[i] += slope * unit[j]
    unit.requires_grad_()
    HistogramLoss(**options, normalize=False)(unit, labels).backward()
    tolerance = 1e-2 if options.get("density") == "beta" else 1e-9  # the Beta slope is not constant in an interval
    assert (unit.grad - gradient).norm() <= tolerance * gradient.norm()


def test_the_loss_draws_positives_together_and_drives_negatives_apart():
    slopes = pair_slopes(*batch(n=60))
    assert slopes.positive.max() <= 0
    assert slopes.negative.min() >= 0
    assert (slopes.negative - slopes.positive).max() > 0


def test_float32_equals_float64_bit_for_bit_on_the_same_similarities():
    """References that are the axes make the similarities the embeddings' own numbers, here exact in both."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(-700, 701, (40, 24), generator=generator) / 4096
    matrix = torch.randint(-1, 2, (40, 24), generator=generator)
    gradients, losses = [], []
    for dtype in (torch.float32, torch.float64):
        embeddings = similarity.detach().to(dtype, copy=True).requires_grad_()
        loss = HistogramLoss(n_bins=128, normalize=False)(embeddings, matrix, torch.eye(24, dtype=dtype))
        loss.backward()
        losses.append(loss.float())
        gradients.append(embeddings.grad.float())
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    assert gradients[0].unique().numel() > 30
