"""The import rules in pyproject.toml hold, and each notices that it is broken."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BROKEN = {
    "a run imports a study": ("hloss/runs/files.py", "import hloss.study.spec", "layers"),
    "the library imports a run": ("hloss/numerics.py", "from hloss.runs import errors", "layers"),
    "two modules import each other": ("hloss/runs/files.py", "from hloss.runs import run", "cycles"),
    "the library imports an integration": ("hloss/samplers.py", "import hloss.integrations.pml_losses", "layers"),
    "the library needs NumPy": ("hloss/samplers.py", "import numpy", "torch-alone"),
    "the public names need NumPy": ("hloss/__init__.py", "import numpy", "torch-alone"),
    "a second module needs faiss": ("hloss/retrieval/ranks.py", "import faiss", "torch-alone"),
    "an integration needs NumPy": ("hloss/integrations/pml_losses.py", "import numpy", "integrations"),
    "data_prep imports a config": ("data_prep/cub.py", "from hloss.runs import config", "data-prep"),
    "a script is imported": ("hloss/study/plots.py", "import run_study", "leaves"),
    "workflow is imported": ("data_prep/cub.py", "import workflow.scripts", "leaves"),
    "a test is imported": ("hloss/runs/run.py", "from tests.helpers import killing", "leaves"),
}


def lint(folder, *options):
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for part in ("hloss", "data_prep", "tests/helpers"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/__init__.py", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_import_rules_hold(copy):
    answer = lint(copy)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("case", BROKEN)
def test_an_import_that_breaks_a_rule_is_noticed_within_functions_too(case, copy):
    name, line, rule = BROKEN[case]
    file = copy / name
    before = file.read_text()
    file.write_text(f"{before}\n\ndef _lazily():\n    {line}\n")
    answer = lint(copy, "--contract", rule)
    file.write_text(before)
    assert (answer.returncode, "1 broken" in answer.stdout) == (1, True)


def test_the_rules_name_every_script():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (forbidden,) = (contract["forbidden_modules"] for contract in contracts if contract["type"] == "forbidden")
    scripts = {file.stem for file in (ROOT / "workflow/scripts").glob("*.py")}
    assert set(forbidden) == scripts | {"notebooks", "tests", "workflow"}
