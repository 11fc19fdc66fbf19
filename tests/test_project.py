"""The project's own files agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"torch": "pytorch", "snakemake": "snakemake-minimal", "faiss-cpu": "faiss-gpu"}


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = [
        *project["dependencies"],
        *(r for name in ("study", "faiss", "cuhk03", "pml", "test") for r in extras[name]),
    ]
    return dict(re.fullmatch(r"([\w-]+)(.*)", r).groups() for r in found if not r.startswith("hloss["))


def test_the_conda_environment_holds_what_the_package_needs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    listed = dict(re.fullmatch(r"([\w-]+)(.*)", d).groups() for d in [*conda, *pip])
    assert listed.pop("python") == ">=3.11"
    assert listed.pop("pip") == ""
    assert listed == {CONDA_NAMES.get(name, name): bound for name, bound in requirements().items()}


def test_the_readme_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{extra}`" in readme for extra in project["optional-dependencies"])
    assert all(f"`{folder.name}/`" in readme for folder in ROOT.iterdir() if (folder / "__init__.py").exists())
