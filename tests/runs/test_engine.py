"""Lightning Fabric without the import of torch's compiler."""

import subprocess
import sys

import pytest

STEP = """
import sys
import hloss.runs.run
import torch

layer = torch.nn.Linear(3, 3)
optimizer = torch.optim.Adam(layer.parameters())
optimizer.load_state_dict(optimizer.state_dict())
layer(torch.ones(2, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert "torch._dynamo.eval_frame" not in sys.modules
"""
USES = {
    "compile": "assert torch.compile(layer, backend='eager')(torch.ones(2, 3)).shape == (2, 3)",
    "submodule": "import torch._dynamo.config as c; assert c is torch._dynamo.config",
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_the_compiler_is_imported_when_it_is_used(use):
    code = f"{STEP}\n{use}\nassert 'torch._dynamo.eval_frame' in sys.modules\noptimizer.zero_grad()"
    slow_guards = "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"
    subprocess.run([sys.executable, "-W", "error", "-W", slow_guards, "-c", code], check=True, timeout=120)


def test_an_imported_compiler_stays():
    code = "import torch._dynamo as compiler, sys, hloss.runs.engine; assert sys.modules['torch._dynamo'] is compiler"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
