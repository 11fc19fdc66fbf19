"""The examples in docs/examples: each trains, copied into an empty folder, without a download."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs/examples"
NEEDS = {  # packages beside torch; those that `make test` does not install make the test slow
    "plain_pytorch": (),
    "pml_trainer": ("pytorch_metric_learning",),
    "lightning_module": ("lightning",),
    "sentence_transformers_loss": ("sentence_transformers", "datasets", "accelerate"),
    "hugging_face_trainer": ("transformers", "accelerate"),
}
SLOW = {"lightning_module", "sentence_transformers_loss", "hugging_face_trainer"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


def test_each_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NEEDS])
def test_an_example_trains(name, tmp_path):
    missing = [package for package in NEEDS[name] if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'hloss[examples]'")
    shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    strict = ["-W", "error"] if name == "plain_pytorch" else []  # the others warn of themselves
    answer = subprocess.run(
        [sys.executable, *strict, f"{name}.py"],
        cwd=tmp_path,
        env=os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    first, last, recall = re.search(r"^loss (\S+) -> (\S+), Recall@1 of .* (\d+) %$", answer.stdout, re.M).groups()
    assert float(last) < float(first) / 10
    assert int(recall) > 90
