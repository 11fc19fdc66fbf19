"""`import hloss` needs torch alone: a training step without NumPy, and with warnings as errors."""

import subprocess
import sys

import pytest

STEP = """
import sys
{before}
import torch
import hloss

images, labels = torch.randn(32, 8), torch.arange(32) // 4
network = torch.nn.Linear(8, 4)
descent = torch.optim.SGD(network.parameters(), lr=0.1)
batch = next(iter(hloss.BalancedSampler(labels, 16, 4, torch.Generator().manual_seed(0))))
losses = (hloss.HistogramLoss, hloss.BinomialDeviance, hloss.LiftedStructure, hloss.Triplet, hloss.Quadruplet)
sum(hloss.global_batch(loss())(network(images[batch]), labels[batch]) for loss in losses).backward()
descent.step()
assert network.weight.grad.any()
assert 0 <= hloss.evaluate("all-vs-rest", network(images), labels, k=(1,)).metrics["recall@1"] <= 1
hloss.reverse_probability(network(images).detach(), labels)
print([name for name in {modules} if sys.modules.get(name)])
"""
OTHERS = [
    "data_prep",
    "hloss.runs",
    "hloss.study",
    "lightning_fabric",
    "matplotlib",
    "pandas",
    "pyarrow",
    "pydantic",
    "scipy",
    "torchvision",
    "yaml",
]


@pytest.mark.parametrize(
    ("before", "options", "absent"),
    [
        ("sys.modules['numpy'] = None", ["-W", "ignore:Failed to initialize NumPy"], ["numpy"]),  # as if not installed
        ("", ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"], []),  # torch 2.6, when Python ends
    ],
    ids=["without NumPy", "warnings are errors"],
)
def test_a_training_step_needs_torch_alone(before, options, absent):
    code = STEP.format(before=before, modules=OTHERS + absent)
    step = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert (step.returncode, step.stdout, step.stderr) == (0, "[]\n", "")
