"""The project's own files agree with each other."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NAMES_IN_CONDA = {"torch": "pytorch", "snakemake": "snakemake-minimal"}


def requirements(*extras: str) -> dict[str, str]:
    """Package -> bound, of the package itself and some extras, without those for some versions of Python only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [*project["dependencies"], *(r for name in extras for r in project["optional-dependencies"][name])]
    unconditional = [r for r in found if ";" not in r and not r.startswith("hloss[")]
    return dict(re.fullmatch(r"([\w-]+)(.*)", r).groups() for r in unconditional)


@pytest.mark.parametrize(
    ("file", "build", "faiss"), [("environment", "cuda*", "gpu"), ("environment-cpu", "cpu*", "cpu")]
)
def test_the_conda_environments_hold_what_the_package_needs(file, build, faiss):
    environment = yaml.safe_load((ROOT / f"{file}.yml").read_text())
    assert environment["channels"] == ["conda-forge", "bioconda", "nodefaults"]
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    listed = dict(re.fullmatch(r"([\w-]+)(.*)", d).groups() for d in [*conda, *pip])
    assert listed.pop("python") == ">=3.11"
    assert listed.pop("pip") == ""
    assert listed.pop(f"faiss-{faiss}") == ">=1.8"
    needed = requirements("study", "cuhk03", "pml", "test")
    assert listed.pop("pytorch") == f'[version="{needed.pop("torch")}",build="{build}"]'
    assert listed == {NAMES_IN_CONDA.get(name, name): bound for name, bound in needed.items()}


def test_one_faiss_at_a_time():
    """faiss-cpu and faiss-gpu are two packages of one module."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with_faiss = {
        name: [r for r in listed if "faiss" in r] for name, listed in project["optional-dependencies"].items()
    }
    assert {name: found for name, found in with_faiss.items() if found} == {
        "faiss": ["faiss-cpu>=1.8"],
        "faiss-gpu": ["faiss-gpu>=1.14.3"],
    }


def test_torch_is_imported_before_faiss():
    """Both bring OpenMP and CUDA libraries; with faiss first, torch has failed to load its own."""
    pytest.importorskip("faiss")
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "faiss":
            assert "torch" in sys.modules
            print("torch came first")
sys.meta_path.insert(0, Finder())
from hloss.retrieval.neighbors import neighbors
import torch
neighbors(torch.eye(3), torch.eye(3), 1, backend="faiss")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "torch came first\n", done.stderr


@pytest.mark.parametrize(
    ("target", "drawings"),
    [
        (["study"], []),
        (["plan"], []),
        (["study", "STUDY=sample"], ["easy", "hard"]),
        (["verify"], ["easy", "hard"]),
        (["verify", "RESULTS=reports/quick"], []),
    ],
    ids=str,
)
def test_only_studies_and_results_with_other_drawings_prepare_them(target, drawings):
    command = ["make", "--dry-run", "--always-make", *target, f"BIN={sys.prefix}/bin"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert re.findall(r"--difficulty (\w+)", answer.stdout) == drawings
