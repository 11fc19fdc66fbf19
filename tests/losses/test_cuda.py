"""The loss on a GPU: what the CPU says at any global precision, the same every time, without waiting in the loop."""

import warnings

import pytest
import torch

from hloss import HistogramLoss

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VARIANTS = [
    {},
    {"kernel": "gaussian", "bandwidth": 2.0},
    {"order_cost": "linear", "margin": 0.1},
    {"order_cost": "softplus", "alpha": 3.0},
    {"density": "beta"},
]


def outcome(options, device, dtype=torch.float64, n=700, d=64):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(n, d, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    labels = torch.randint(n // 8, (n,), generator=generator).to(device)
    loss = HistogramLoss(**options)(embeddings, labels)
    loss.backward()
    return loss.detach().cpu().double(), embeddings.grad.cpu().double()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_float64_equals_the_cpu(options):
    (value, gradient), (expected_value, expected) = outcome(options, "cuda"), outcome(options, "cpu")
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


def waits(n):
    embeddings = torch.randn(n, 32, device="cuda").requires_grad_()
    labels = torch.arange(n, device="cuda") // 8
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            HistogramLoss()(embeddings, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(caught)


def test_the_number_of_synchronisations_does_not_grow_with_the_batch():
    assert waits(256) == waits(8192)


def test_memory_of_a_large_batch():
    embeddings = torch.randn(32_768, 128, device="cuda").requires_grad_()
    labels = torch.arange(32_768, device="cuda") // 8
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    HistogramLoss()(embeddings, labels).backward()
    assert torch.cuda.max_memory_allocated() - before <= 2**30
