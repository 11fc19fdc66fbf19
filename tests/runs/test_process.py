"""Settings of torch that a run changes for its own duration."""

import pytest
import torch

from hloss.runs.process import gpu_arithmetic


def current():
    convolutions = torch.backends.cudnn.conv.fp32_precision
    return convolutions, torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.deterministic


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize(
    ("tf32", "expected"),
    [("none", ("ieee", "ieee", True)), ("convolutions", ("tf32", "ieee", True)), ("all", ("tf32", "tf32", True))],
)
def test_tf32_is_set_for_a_gpu_and_restored(tf32, expected):
    before = current()
    with gpu_arithmetic(torch.device("cuda"), tf32):
        assert current() == expected
    assert current() == before
    with gpu_arithmetic(torch.device("cpu"), tf32):
        assert current() == before
