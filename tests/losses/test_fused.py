"""The fused CUDA kernels without a GPU: in Triton's interpreter, compiled ahead of time, and when they are not used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hloss import HistogramLoss
from hloss.losses import densities, fused, pairs, passes

HERE = Path(__file__).parent
NEEDS_TRITON = pytest.mark.skipif(not fused.TRITON, reason="needs Triton")


def run(arguments, **environment):
    """A process of its own: Triton interprets or compiles, as it is told when it is imported."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@NEEDS_TRITON
def test_the_kernels_in_the_interpreter():
    module = HERE / "interpreted_kernels.py"
    said = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(module)], TRITON_INTERPRET="1")
    assert " passed" in said


@NEEDS_TRITON
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="Triton 3.2 describes a kernel's arguments otherwise")
def test_the_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    said = run(["-m", "tests.losses.compiled_kernels"], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert said.count("sm_80") == said.count("sm_90") > 10


def test_the_cpu_does_not_use_them():
    embeddings = torch.randn(8, 4)
    assert not fused.serves(embeddings, torch.arange(8) // 2, None, None, HistogramLoss().settings)
    code = "import sys, hloss; print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    assert run(["-c", code]).strip() == "[]"


@pytest.mark.parametrize(
    "labels", [torch.zeros(5), torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.bool)]
)
def test_wrong_labels_are_left_to_the_plain_path(labels):
    assert fused._fits(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64), None, None)
    assert not fused._fits(torch.randn(5, 4), labels, None, None)


def test_float64_wrong_references_and_no_rows_are_left_to_the_plain_path():
    embeddings, labels = torch.randn(5, 4), torch.arange(5)
    assert fused._fits(embeddings, labels, embeddings, labels)
    assert not fused._fits(embeddings.double(), labels, None, None)
    assert not fused._fits(embeddings, labels, embeddings.half(), labels)
    assert not fused._fits(embeddings, labels, embeddings[:, :3], labels)
    assert not fused._fits(embeddings, labels, embeddings, None)
    assert not fused._fits(embeddings, labels, None, labels)
    assert not fused._fits(embeddings, labels, embeddings, labels.int())
    assert not fused._fits(embeddings[:0], labels[:0], None, None)
    assert not fused._fits(torch.empty(2**20, 1, device="meta"), torch.empty(2**20, device="meta").long(), None, None)


def test_compiled_programs_get_tensors_that_begin_at_16_bytes():
    whole = torch.arange(40)
    assert passes.ready(whole, whole.device) is whole
    for view in (whole[1:], whole[::2], whole.view(4, 10)[:, 1:]):
        copy = passes.ready(view, whole.device)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, view)


def test_missing_kernels_are_told_of_once(monkeypatch):
    monkeypatch.setattr(fused, "TRITON", False)
    fused._is_available.cache_clear()
    with pytest.warns(
        UserWarning, match="without its fused CUDA kernels, several times slower: Triton is not installed"
    ):
        assert not fused.is_available(torch.device("cuda", 0))
    assert not fused.is_available(torch.device("cuda", 0))
    fused._is_available.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("lane_pairs", "holds"), [(densities.LANE_PAIRS, True), (2**30, False)])
def test_the_plain_path_with_the_blocks_of_a_gpu(monkeypatch, dtype, lane_pairs, holds):
    """A GPU's block holds more pairs of one interval than a packed number can count."""
    embeddings = torch.randn(2500, 8, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    labels = torch.arange(2500) // 8
    loss = HistogramLoss(n_bins=1, order_cost="linear", margin=0.5)
    expected = loss(embeddings, labels)
    (gradient,) = torch.autograd.grad(expected, embeddings)
    monkeypatch.setattr(pairs, "ROWS", pairs.GPU_ROWS)
    monkeypatch.setattr(pairs, "COLUMNS", pairs.GPU_COLUMNS)
    monkeypatch.setattr(densities, "LANE_PAIRS", lane_pairs)
    found = loss(embeddings, labels)
    (found_gradient,) = torch.autograd.grad(found, embeddings)
    assert (abs(found.item() - expected.item()) <= 1e-6) is holds
    assert ((found_gradient - gradient).norm() <= 1e-4 * gradient.norm()).item() is holds
