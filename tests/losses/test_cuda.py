"""The loss on a GPU: equal to the CPU's at any global precision, the same every time, with one synchronisation."""

from contextlib import nullcontext

import pytest
import torch

from hloss import HistogramLoss
from hloss.losses import fused, passes
from hloss.losses.checks import deferred_checks
from tests.helpers.gpu_waits import counted_waits

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VARIANTS = [
    {},
    {"kernel": "gaussian", "bandwidth": 2.0},
    {"order_cost": "linear", "margin": 0.1},
    {"order_cost": "softplus", "alpha": 3.0},
    {"density": "beta"},
]


@pytest.fixture(autouse=True)
def own_plans():
    """Tests change what plans are made of."""
    passes._find_plan.cache_clear()
    yield
    passes._find_plan.cache_clear()


def outcome(options, device, dtype=torch.float64, n=700, d=64):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(n, d, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    labels = torch.randint(n // 8, (n,), generator=generator).to(device)
    loss = HistogramLoss(**options)(embeddings, labels)
    loss.backward()
    return loss.detach().cpu().double(), embeddings.grad.cpu().double()


@pytest.mark.parametrize("n", [700, 3000], ids=["one block", "several blocks"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_float64_equals_the_cpu(options, n):
    (value, gradient), (expected_value, expected) = outcome(options, "cuda", n=n), outcome(options, "cpu", n=n)
    assert value.item() == pytest.approx(expected_value.item(), abs=1e-12)
    assert (gradient - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_float32_is_float32_under_tf32_and_autocast(options, precision, autocast):
    """A pair within rounding of a node may fall to its other side: at most 1e-4 of the gradient; TF32 gives 1e-3."""
    expected_value, expected = outcome(options, "cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            value, gradient = outcome(options, "cuda", torch.float32)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert value.item() == pytest.approx(expected_value.item(), abs=1e-6)
    assert (gradient - expected).norm() <= 5e-4 * expected.norm()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_result_is_the_same_every_time(options):
    first = outcome(options, "cuda", torch.float32)
    for _ in range(5):
        again = outcome(options, "cuda", torch.float32)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def waits(options, n, labels_device="cuda", deferred=False):
    """Number of synchronisations of the forward pass and of the backward pass."""
    embeddings = torch.randn(n, 32, device="cuda").requires_grad_()
    labels = (torch.arange(n) // 8).to(labels_device)
    loss = HistogramLoss(**options)
    loss(embeddings, labels).backward()  # compiles and fills caches
    with deferred_checks() if deferred else nullcontext():
        with counted_waits() as forward:
            value = loss(embeddings, labels)
        with counted_waits() as backward:
            value.backward()
    return len(forward), len(backward)


@pytest.mark.parametrize("labels_device", ["cuda", "cpu"])
@pytest.mark.parametrize("n", [256, 8192])
def test_the_fused_loss_waits_once(n, labels_device):
    assert waits({}, n, labels_device) == (1, 0)
    assert waits({"kernel": "gaussian", "bandwidth": 2.0}, n, labels_device) == (1, 0)
    assert waits({}, n, labels_device, deferred=True) == (0, 0)


def test_the_synchronisations_of_the_plain_path_do_not_grow_with_the_batch():
    assert waits({"density": "beta"}, 256) == waits({"density": "beta"}, 8192)


def test_memory_of_a_large_batch():
    embeddings = torch.randn(32_768, 128, device="cuda").requires_grad_()
    labels = torch.arange(32_768, device="cuda") // 8
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    HistogramLoss()(embeddings, labels).backward()
    assert torch.cuda.max_memory_allocated() - before <= 2**30


def close(found, expected, tolerance=5e-4):
    assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-6)
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        assert (gradient.cpu().double() - wanted).norm() <= tolerance * wanted.norm()


def full_outcome(options, inputs, dtype, device):
    inputs = [x if x is None else x.to(device, dtype if x.is_floating_point() else None) for x in inputs]
    leaves = [x.requires_grad_() for x in (inputs[0], inputs[2]) if x is not None]
    loss = HistogramLoss(**options)(*inputs)
    (3 * loss).backward()
    return [loss.detach().cpu().double(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize("kind", ["labels", "references", "matrix", "matrix of references"])
@pytest.mark.parametrize(("n", "d"), [(33, 7), (600, 128), (1111, 100)])
def test_all_kinds_of_pairs(monkeypatch, n, d, kind, precision, kept):
    monkeypatch.setattr(fused, "PRECISION", precision)
    if not kept:
        monkeypatch.setattr(passes, "KEPT_PAIRS", 0)
        monkeypatch.setattr(passes, "BLOCK_PAIRS", 2**19)
    generator = torch.Generator().manual_seed(n)
    x, z = (torch.randn(size, d, generator=generator) for size in (n, n + 71))
    labels, reference_labels = (torch.randint(n // 6, (size,), generator=generator) for size in (n, n + 71))
    if kind.startswith("matrix"):
        labels = torch.randint(-1, 2, (n, n + 71), generator=generator, dtype=torch.int8)
    if kind == "matrix":
        labels = labels[:, :n].triu(1) + labels[:, :n].triu(1).T
    inputs = {
        "labels": (x, labels, None, None),
        "references": (x, labels, z, reference_labels),
        "matrix": (x, labels, None, None),
        "matrix of references": (x, labels, z, None),
    }[kind]
    expected = full_outcome({}, inputs, torch.float64, "cpu")
    close(full_outcome({}, inputs, torch.float32, "cuda"), expected, 5e-3 if n < 100 else 1e-3)
    first, again = (full_outcome({}, inputs, torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=str)
def test_half_precision(options, dtype):
    x = 0.99 * torch.nn.functional.normalize(torch.randn(500, 96, generator=torch.Generator().manual_seed(0)))
    inputs = (x.to(dtype).float(), torch.arange(500) // 5, None, None)
    found = full_outcome(options, inputs, dtype, "cuda")
    assert found[1].dtype == dtype
    close(found, full_outcome(options, inputs, torch.float64, "cpu"), 1e-2)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_inputs_may_begin_anywhere(monkeypatch, kept):
    """The programs are compiled for tensors that begin at multiples of 16 bytes."""
    if not kept:
        monkeypatch.setattr(passes, "KEPT_PAIRS", 0)
    loss = HistogramLoss(normalize=False)
    x = 0.9 * torch.nn.functional.normalize(torch.randn(301, 33, device="cuda"))
    labels = torch.arange(301, device="cuda") // 4
    found = []
    for y, classes in ((x[1:].clone(), labels[1:].clone()), (x[1:], labels[1:])):
        leaf = y.detach().requires_grad_()
        (torch.stack([leaf.new_zeros(()), loss(leaf, classes)]) * leaf.new_tensor([1.0, 2.0])).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_refused_rows_are_named():
    x, labels = torch.randn(300, 16, device="cuda"), torch.arange(300, device="cuda") // 4
    for value, reason in ((float("nan"), "hold NaN or infinity"), (0.0, "are zero and have no direction")):
        bad = x.clone()
        bad[7] = bad[280] = value
        with pytest.raises(ValueError, match=rf"^embeddings rows \[7, 280\] {reason}"):
            HistogramLoss()(bad, labels)
        with pytest.raises(ValueError, match=reason), deferred_checks():
            HistogramLoss()(bad, labels)
    with pytest.raises(ValueError, match="0 negative pairs"):
        HistogramLoss()(x, labels * 0)


def test_torch_compile_keeps_it_whole():
    x = torch.randn(300, 64, device="cuda").requires_grad_()
    labels, loss = torch.arange(300, device="cuda") // 4, HistogramLoss()
    value = torch.compile(lambda e: loss(2 * e, labels), fullgraph=True, backend="aot_eager")(x)
    value.backward()
    compiled, x.grad = x.grad, None
    expected = loss(2 * x, labels)
    expected.backward()
    assert value.item() == expected.item()
    torch.testing.assert_close(compiled, x.grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current():
    x, labels = torch.randn(300, 64), torch.arange(300) // 4
    inputs = (x, labels, None, None)
    first, second = (full_outcome({}, inputs, torch.float32, device) for device in ("cuda:0", "cuda:1"))
    assert first[0] == second[0]


def exact_batch(n, d=128):
    """Embeddings whose similarities are multiples of 1/256: exact in float32, tf32x3 and float64."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    return torch.randint(-1, 2, (n, d), generator=generator, device="cuda") / 16, torch.arange(n, device="cuda") // 8


def counts_by_blocks(embeddings, labels, n_bins):
    """Counts and sums of 24-bit fractions, in float64: (2, 2, n_bins + 1) by table and group."""
    table = torch.zeros(2, 2 * (n_bins + 1), dtype=torch.float64, device="cuda")
    column = torch.arange(len(labels), device="cuda")
    wide = embeddings.double()
    for rows in column.split(512):
        position = ((wide[rows] @ wide.T) * (n_bins / 2)).add_(n_bins / 2)
        interval = position.floor()
        code = (interval + (n_bins + 1) * (labels[rows][:, None] == labels)).long()
        upper = rows[:, None] < column
        table[0] += torch.bincount(code[upper], minlength=2 * (n_bins + 1))
        table[1] += torch.bincount(code[upper], weights=(position - interval)[upper], minlength=2 * (n_bins + 1))
    table[1] *= 2**24
    return table.long().view(2, 2, n_bins + 1)


def test_131072_embeddings(monkeypatch):
    """Counts and sums exactly, 512 rows of the gradient against float64, and memory."""
    n_bins, found = 200, []
    finish = passes._finish
    monkeypatch.setattr(passes, "_finish", lambda table, plan: found.append(table.clone()) or finish(table, plan))
    embeddings, labels = exact_batch(131_072)
    embeddings.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    HistogramLoss(normalize=False)(embeddings, labels).backward()
    assert torch.cuda.max_memory_allocated() - before <= 2**30
    table = counts_by_blocks(embeddings.detach(), labels, n_bins)
    assert torch.equal(found[0][: table.numel()], table.flatten())

    counts = table[0].double()
    mass = counts - table[1] / 2.0**24
    mass[:, 1:] += table[1, :, :-1] / 2.0**24
    density, pairs = mass / counts.sum(1, keepdim=True), counts.sum(1)
    slopes = torch.stack([density[1, 1:] / pairs[0], -density[0, :-1] / pairs[1]]) * (n_bins / 2)
    wide = embeddings.detach().double()
    interval = ((wide[:512] @ wide.T) * (n_bins / 2) + n_bins / 2).long().clamp(max=n_bins - 1)
    slope = slopes[(labels[:512, None] == labels).long(), interval].fill_diagonal_(0)
    expected = slope @ wide
    assert (embeddings.grad[:512].double() - expected).norm() <= 1e-4 * expected.norm()
