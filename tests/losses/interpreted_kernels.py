"""The fused kernels in Triton's interpreter. `test_fused` runs these tests in a process with TRITON_INTERPRET=1."""

import pytest
import torch

from hloss import HistogramLoss, global_batch
from hloss.losses import fused, passes
from hloss.losses.checks import deferred_checks

# The interpreter of Triton 3.2 reads scalars in a way that NumPy 1.25 and newer warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
VARIANTS = [
    {},
    {"n_bins": 1},
    {"n_bins": 50, "margin": 0.2},
    {"n_bins": 37, "normalize": False},
    {"n_bins": 1100, "margin": 2.4},
    {"kernel": "gaussian", "bandwidth": 2.0},
    {"kernel": "epanechnikov", "bandwidth": 1.0, "n_bins": 40, "margin": 0.1},
    {"order_cost": "linear", "margin": 0.1},
    {"order_cost": "softplus", "margin": 0.2, "alpha": 3.0, "kernel": "uniform", "bandwidth": 1.3, "n_bins": 60},
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """HistogramLoss takes the fused path for CPU tensors, but not for float64; each test makes its own plans."""
    passes._find_plan.cache_clear()
    monkeypatch.setattr(fused, "_obstacle", lambda device: "")
    monkeypatch.setattr(
        fused, "serves", lambda *inputs: fused._fits(*inputs[:4]) and fused.is_available(inputs[0].device)
    )


def rows(n, d, seed, normalize=True, dtype=torch.float32):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return (x if normalize else 0.99 * torch.nn.functional.normalize(x)).to(dtype)


def unit(x):
    return torch.nn.functional.normalize(x.double())


def apart_from_nodes(similarity, n_bins):
    """Whether rounding to float32 moves no pair into another interval: the gradient is exact then."""
    position = (similarity + 1) * n_bins / 2
    outside_diagonal = ~torch.eye(len(position), position.shape[1], dtype=torch.bool)
    return ((position - position.round()).abs() > 1e-6 * max(n_bins, 30))[outside_diagonal].all()


def batch(n, d=24, m=None, n_bins=200, normalize=True, dtype=torch.float32):
    """Embeddings and references, the first by seed whose pairs lie apart from the nodes."""
    for seed in range(1000):
        x = rows(n, d, 2 * seed, normalize, dtype)
        z = None if m is None else rows(m, d, 2 * seed + 1, normalize, dtype)
        one, other = (
            (unit(x), unit(x if z is None else z)) if normalize else (x.double(), (x if z is None else z).double())
        )
        if apart_from_nodes(one @ other.T, n_bins):
            return x, z
    raise AssertionError(f"no seed keeps {n} embeddings apart from {n_bins} intervals")


def classes(n, seed=0, dtype=torch.int64):
    return torch.randint(max(2, n // 5), (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair_matrix(n, m=None):
    matrix = torch.randint(-1, 2, (n, m or n), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
    return matrix if m else matrix.triu(1) + matrix.triu(1).T


def outcome(options, x, labels, z=None, reference_labels=None):
    x = x.clone().requires_grad_()
    z = None if z is None else z.clone().requires_grad_()
    loss = HistogramLoss(**options)(x, labels, z, reference_labels)
    (3 * loss).backward()
    return [loss.detach(), x.grad] + ([] if z is None else [z.grad])


def naive(options, x, labels, z=None, reference_labels=None):
    """Equations 2, 4 and 6 as dense float64 tensors of all pairs by all nodes, differentiated by autograd."""
    s = HistogramLoss(**options).settings
    leaves = [t.double().requires_grad_() for t in (x, z) if t is not None]
    sides = [torch.nn.functional.normalize(t) if s.normalize else t for t in leaves]
    similarity = sides[0] @ sides[-1].T
    sign = labels
    if labels.ndim == 1:
        columns = labels if reference_labels is None else reference_labels
        sign = torch.where(labels[:, None] == columns, 1, -1)
    if z is None:
        sign = sign.triu(1)
    nodes = torch.linspace(-1, 1, s.n_bins + 1, dtype=torch.float64)

    def histogram(similarities):
        return (1 - (similarities[:, None] - nodes).abs() / s.delta).clamp(min=0).mean(0)

    reach = s.margin + nodes[:, None] - nodes
    cost = {
        "step": (reach > -s.delta / 4).double(),
        "linear": reach.clamp(min=0),
        "softplus": (s.alpha * reach).exp().log1p(),
    }[s.order_cost]
    loss = histogram(similarity[sign == -1]) @ cost @ histogram(similarity[sign == 1])
    (3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def agree(found, expected, tolerance=2e-5):
    assert found[0].item() == pytest.approx(expected[0].item(), abs=2e-7)
    assert len(found) == len(expected)
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        assert (gradient.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()


def in_float64(options, x, labels, z=None, reference_labels=None):
    """The plain path, which is tested by itself."""
    return outcome(options, x.double(), labels, None if z is None else z.double(), reference_labels)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_against_the_plain_path_in_float64(options):
    s = HistogramLoss(**options).settings
    x, _ = batch(45 if s.n_bins > 200 else 75, n_bins=s.n_bins, normalize=s.normalize)
    agree(outcome(options, x, classes(len(x))), in_float64(options, x, classes(len(x))))


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[2], VARIANTS[7]], ids=str)
def test_against_the_printed_equations(options):
    x, _ = batch(70, n_bins=options.get("n_bins", 200))
    agree(outcome(options, x, classes(70)), naive(options, x, classes(70)))


@pytest.mark.parametrize(("n", "d"), [(2, 2), (3, 64), (31, 5), (32, 65), (33, 128), (64, 2), (65, 40), (130, 5)])
def test_sizes_off_the_tile_grid(n, d):
    x, _ = batch(n, d, n_bins=20)
    labels = torch.arange(n) // 2
    options = {"n_bins": 20, "on_degenerate": "zero"}
    agree(outcome(options, x, labels), in_float64(options, x, labels))


def test_one_dimension():
    x = 0.9 * torch.rand(21, 1, generator=torch.Generator().manual_seed(0))
    options = {"n_bins": 20, "normalize": False}
    agree(outcome(options, x, classes(21)), in_float64(options, x, classes(21)))


def test_the_larger_tiles(monkeypatch):
    monkeypatch.setattr(passes, "SMALL", 0)
    x, z = batch(130, 40, m=70, n_bins=50)
    agree(outcome({"n_bins": 50}, x, classes(130)), in_float64({"n_bins": 50}, x, classes(130)))
    labels = classes(130), z, classes(70, 1)
    agree(outcome({"n_bins": 50}, x, *labels), in_float64({"n_bins": 50}, x, *labels))


@pytest.mark.parametrize("matrix", [False, True], ids=["labels", "matrix"])
@pytest.mark.parametrize("m", [None, 70, 170], ids=["within", "few", "many"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_references_and_matrices(monkeypatch, matrix, m, kept):
    if not kept:  # several blocks
        monkeypatch.setattr(passes, "KEPT_PAIRS", 0)
        monkeypatch.setattr(passes, "BLOCK_ROWS", 64)
        monkeypatch.setattr(passes, "BLOCK_PAIRS", 64 * 129)  # not in whole tiles
    x, z = batch(100, m=m, n_bins=60)
    inputs = (pair_matrix(100, m), z) if matrix else (classes(100), z, None if m is None else classes(m, 1))
    found = outcome({"n_bins": 60}, x, *inputs)
    agree(found, in_float64({"n_bins": 60}, x, *inputs))
    agree(found, naive({"n_bins": 60}, x, *inputs))


def test_only_the_gradients_that_are_wanted():
    x, z = batch(40, m=50, n_bins=60)
    expected = outcome({"n_bins": 60}, x, classes(40), z, classes(50, 1))
    z.requires_grad_()
    (3 * HistogramLoss(n_bins=60)(x, classes(40), z, classes(50, 1))).backward()
    assert x.grad is None
    torch.testing.assert_close(z.grad, expected[2])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_types(dtype):
    x, _ = batch(40, n_bins=60)
    labels = classes(40, dtype=dtype) - 3
    assert fused._fits(x, labels, None, None)
    agree(outcome({"n_bins": 60}, x, labels), in_float64({"n_bins": 60}, x, labels.long()))
    matrix = pair_matrix(40).to(dtype)
    agree(outcome({"n_bins": 60}, x, matrix), in_float64({"n_bins": 60}, x, matrix.long()))


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as they are"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, normalize):
    x, _ = batch(60, n_bins=60, normalize=normalize, dtype=dtype)
    options = {"n_bins": 60, "normalize": normalize}
    found = outcome(options, x, classes(60))
    assert (found[0].dtype, found[1].dtype) == (torch.float32, dtype)
    agree(found, in_float64(options, x, classes(60)), tolerance=1e-2)


def test_views_and_other_layouts():
    x, _ = batch(60, n_bins=60)
    wide = torch.randn(60, 2 * x.shape[1])
    wide[:, ::2] = x
    labels = classes(120)[::2]
    agree(outcome({"n_bins": 60}, wide[:, ::2], labels), in_float64({"n_bins": 60}, x, labels))
    agree(
        outcome({"n_bins": 60}, x.T.contiguous().T, pair_matrix(60).T), in_float64({"n_bins": 60}, x, pair_matrix(60))
    )


def test_ties_duplicates_and_both_ends():
    """All similarities are -1, 0 or 1, on nodes."""
    axes = torch.cat([torch.eye(6), -torch.eye(6), torch.eye(6), torch.eye(6)[:3]])
    for options in ({"n_bins": 4}, {"n_bins": 3}, {"n_bins": 200, "margin": 0.01}):
        options |= {"normalize": False}
        agree(
            outcome(options, axes, torch.arange(len(axes)) % 4), in_float64(options, axes, torch.arange(len(axes)) % 4)
        )


def test_all_embeddings_equal():
    loss, gradient = outcome({}, torch.ones(70, 3), torch.arange(70) // 2)
    assert loss.item() == 1
    assert gradient.abs().max() <= 1e-6


def test_extreme_norms():
    x, _ = batch(40, n_bins=60)
    scaled = x.clone()
    scaled[0], scaled[1] = x[0] * 2.0**100, x[1] * 2.0**-100
    loss, gradient = outcome({"n_bins": 60}, scaled, classes(40))
    expected, wanted = outcome({"n_bins": 60}, x, classes(40))
    assert loss == expected
    torch.testing.assert_close(gradient[1] * 2.0**-100, wanted[1])
    torch.testing.assert_close(gradient[0] * 2.0**100, wanted[0])


def one_full_interval():
    """2^19 positive pairs of one interval, with the largest fraction that float32 holds, and some negatives."""
    x, z = torch.ones(512, 1), torch.full((1100, 1), 1 - 2.0**-23)
    z[1024:] = 0.5
    return x, torch.zeros(512, dtype=torch.int64), z, (torch.arange(1100) >= 1024).long()


@pytest.mark.parametrize(("lane_pairs", "holds"), [(2**18, True), (2**20, False)])
def test_tables_at_their_bound(monkeypatch, lane_pairs, holds):
    monkeypatch.setattr(passes, "LANE_PAIRS", lane_pairs)
    monkeypatch.setattr(passes, "PROGRAMS_PER_PROCESSOR", 1)
    passes._programs.cache_clear()
    passes._find_plan.cache_clear()
    options = {"n_bins": 1, "normalize": False, "order_cost": "linear", "margin": 0.5}
    loss = HistogramLoss(**options)(*one_full_interval())
    expected = HistogramLoss(**options)(*(t.double() if t.is_floating_point() else t for t in one_full_interval()))
    passes._programs.cache_clear()
    assert (abs(loss.item() - expected.item()) < 1e-6) is holds


def test_the_tables_do_not_depend_on_programs_and_flushes(monkeypatch):
    x, _ = batch(150, n_bins=60)
    expected = outcome({"n_bins": 60}, x, classes(150))
    for programs, lane_pairs in ((1, 32**2), (3, 2 * 32**2), (1000, 2**18)):
        monkeypatch.setattr(passes, "_programs", lambda device, n=programs: n)
        monkeypatch.setattr(passes, "LANE_PAIRS", lane_pairs)
        passes._find_plan.cache_clear()
        assert outcome({"n_bins": 60}, x, classes(150))[0] == expected[0]


def test_the_result_is_the_same_every_time():
    x, z = batch(90, m=80, n_bins=60)
    first, again = (outcome({"n_bins": 60}, x, classes(90), z, classes(80, 1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_embedding_and_missing_groups():
    for n, labels in ((1, [0]), (5, [1] * 5), (5, [1, 2, 3, 4, 5])):
        x = rows(n, 4, 0)
        with pytest.raises(ValueError, match=r"\d+ positive and \d+ negative pairs is undefined"):
            HistogramLoss()(x, torch.tensor(labels))
        loss, gradient = outcome({"on_degenerate": "zero"}, x, torch.tensor(labels))
        assert loss == 0
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("device_path", [True, False], ids=["fused", "plain"])
def test_refused_inputs_are_named_as_on_the_plain_path(monkeypatch, device_path):
    if not device_path:
        monkeypatch.setattr(fused, "serves", lambda *inputs: False)
    x, labels = rows(40, 8, 0), classes(40)
    bad = x.clone()
    bad[7, 2], bad[33] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"^embeddings rows \[7, 33\] hold NaN or infinity$"):
        HistogramLoss()(bad, labels)
    bad = x.clone()
    bad[5] = 0
    with pytest.raises(ValueError, match=r"^embeddings rows \[5\] are zero and have no direction$"):
        HistogramLoss()(bad, labels)
    with pytest.raises(ValueError, match=r"^reference_embeddings rows \[5\] are zero"):
        HistogramLoss()(x, labels, bad, labels)
    with pytest.raises(ValueError, match=r"^embeddings rows \[0, 1, .* are longer than 1"):
        HistogramLoss(normalize=False)(x, labels)
    matrix = pair_matrix(40)
    matrix[3, 9] = matrix[9, 3] = 2
    with pytest.raises(ValueError, match=r"only \+1, -1 and 0: rows \[3, 9\] contain other values$"):
        HistogramLoss()(x, matrix)
    with pytest.raises(ValueError, match=r"only \+1, -1 and 0: rows \[3, 9\] contain other values$"):
        HistogramLoss()(x, matrix, x)
    matrix[3, 9], matrix[9, 3] = 1, 0
    with pytest.raises(ValueError, match=r"symmetric: rows \[3, 9\] differ from the columns of the same index$"):
        HistogramLoss()(x, matrix)
    with pytest.raises(ValueError, match="labels must have shape"):
        HistogramLoss()(x, labels[:5])


def test_checks_may_wait():
    good, labels = rows(40, 8, 0), classes(40)
    bad = good.clone()
    bad[5] = 0
    with deferred_checks() as checks:
        HistogramLoss()(bad.requires_grad_(), labels).backward()
        HistogramLoss()(good, labels)
        assert len(checks.pending) == 2
        with pytest.raises(ValueError, match=r"rows \[5\] are zero"):
            checks.raise_if_bad()
        checks.raise_if_bad()
    with deferred_checks(every=3):
        HistogramLoss()(good, labels * 0)
        HistogramLoss()(good, labels)
        with pytest.raises(ValueError, match="0 negative pairs"):
            HistogramLoss()(good, labels)
    with pytest.raises(ValueError, match="0 negative pairs"), deferred_checks():
        HistogramLoss()(good, labels * 0)
    with pytest.raises(ValueError, match=r"rows \[5\] are zero"):
        HistogramLoss()(bad, labels)


def test_second_derivatives_are_refused():
    x = rows(20, 4, 0).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(HistogramLoss()(x, classes(20)), x, create_graph=True)


def test_surroundings_do_not_matter():
    """Autocast, a default device, and a global batch of one process."""
    x, _ = batch(40, n_bins=60)
    expected = outcome({"n_bins": 60}, x, classes(40))
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        found = x.clone().requires_grad_()
        loss = global_batch(HistogramLoss(n_bins=60))(found, LABELS)
        (3 * loss).backward()
    assert loss == expected[0]
    assert torch.equal(found.grad, expected[1])


LABELS = classes(40)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck reads it
@pytest.mark.parametrize(
    ("options", "m", "kept"),
    [
        ({}, None, True),
        ({"normalize": False}, 10, False),
        ({"kernel": "gaussian", "bandwidth": 2.0, "order_cost": "linear"}, 10, True),
    ],
    ids=str,
)
def test_the_operator_passes_torchs_checks(monkeypatch, options, m, kept):
    if not kept:
        monkeypatch.setattr(passes, "KEPT_PAIRS", 0)
    s = HistogramLoss(**options).settings
    x = rows(20, 8, 0, s.normalize).requires_grad_()
    z = None if m is None else rows(m, 8, 1, s.normalize).requires_grad_()
    costs = s.n_bins, s.kernel, s.bandwidth, s.order_cost, s.margin, s.alpha, s.normalize, s.on_degenerate
    reference_labels = None if m is None else classes(m)
    torch.library.opcheck(fused._operator, (x, classes(20), z, reference_labels, *costs, "tf32x3"))


@pytest.mark.parametrize("m", [None, 30], ids=["within", "references"])
def test_torch_compile_keeps_it_whole(m):
    x, z = batch(40, m=m, n_bins=60)
    reference_labels = None if m is None else classes(m)
    loss = HistogramLoss(n_bins=60)
    compiled = torch.compile(
        lambda a, b: 3 * loss(a * 2, LABELS, b, reference_labels), fullgraph=True, backend="aot_eager"
    )
    expected = outcome({"n_bins": 60}, x * 2, LABELS, z, reference_labels)
    x.requires_grad_()
    if z is not None:
        z.requires_grad_()
    value = compiled(x, z)
    value.backward()
    assert value.item() == pytest.approx(3 * expected[0].item())
    torch.testing.assert_close(x.grad, 2 * expected[1])
    if z is not None:
        torch.testing.assert_close(z.grad, expected[2])
    bad = torch.zeros_like(x)
    with pytest.raises(ValueError, match="are zero and have no direction"):
        compiled(bad, z)
