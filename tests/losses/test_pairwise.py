"""The forms for CUDA, computed on the CPU, against the CPU's own."""

import pytest
import torch
from torch.nn import functional as F

from hloss.losses.batch import Batch
from hloss.losses.cuda_forms import CudaPairs, FusedSquaredDistances, fused_normalize
from hloss.losses.pairwise import DensePairs, root, squared_within


def embeddings(n=9, d=5, dtype=torch.float64):
    y = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return y.to(dtype).requires_grad_()


def assert_same(form, expected_form, y, atol=1e-12):
    weight = torch.randn(len(y), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    value, expected = form(y), expected_form(y)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=atol)
    gradients = [torch.autograd.grad((weight * v).square().sum(), y)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5 if y.dtype == torch.float32 else 1e-10, atol=atol)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_normalize_is_normalize(dtype, scale):
    y = (scale * embeddings(dtype=dtype).detach()).requires_grad_()
    assert_same(fused_normalize, F.normalize, y, atol=1e-6 / scale if dtype == torch.float32 else 1e-12 / scale)


def test_fused_distances_are_the_plain_ones():
    assert_same(FusedSquaredDistances.apply, squared_within, embeddings())


def test_first_and_second_derivatives():
    y = embeddings(n=4, d=3)
    assert torch.autograd.gradcheck(FusedSquaredDistances.apply, y)
    assert torch.autograd.gradgradcheck(FusedSquaredDistances.apply, y)
    assert torch.autograd.gradgradcheck(fused_normalize, y)


def matrix_of_pairs(n, m):
    """A symmetric matrix of -1, 0 and +1 if n = m, else any."""
    signs = torch.randint(-1, 2, (n, m), generator=torch.Generator().manual_seed(2))
    return signs.triu() + signs.triu(1).T if n == m else signs


@pytest.mark.parametrize("margin", [1.0, 1.5])
@pytest.mark.parametrize("pairs", ["labels", "matrix", "matrix of references"])
def test_the_fused_contrastive_sum_is_the_plain_one(pairs, margin):
    """Also for pairs at distance 0, positive and negative, and for ignored pairs."""
    y, labels, references = embeddings().detach(), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2]), None
    if pairs == "matrix of references":
        references = y[[0, 4, 7, 8]]
    if pairs != "labels":
        labels = matrix_of_pairs(9, 9 if references is None else 4)
    forms = [kind(Batch(y, labels, references)) for kind in (CudaPairs, DensePairs)]
    squared = forms[1].squared_distances(normalize=True)
    squared[:3, :3] = 0
    squared.requires_grad_()
    results = []
    for form in forms:
        total = form.contrastive_sum(squared, margin)
        (slopes,) = torch.autograd.grad(total, squared, create_graph=True)
        (second,) = torch.autograd.grad(slopes.square().sum(), squared)
        results.append((total, slopes, second))
    for fused, plain in zip(*results, strict=True):
        assert fused.count_nonzero() > 0
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)


def test_the_root_has_no_gradient_at_zero():
    squared = torch.tensor([0.0, 4.0], requires_grad=True)
    root(squared).sum().backward()
    assert root(squared).tolist() == [0, 2]
    assert squared.grad.tolist() == [0, 0.25]
