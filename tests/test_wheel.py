"""The wheel holds all of `hloss` and nothing else, and works where it alone is installed beside its requirements."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / "hloss").rglob("*.py"))
IMPORT_ALL = """
import importlib, json, sys
import hloss
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps([hloss.__version__, hloss.__file__]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources: setuptools leaves a build folder behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in ("hloss", "data_prep"):
        shutil.copytree(ROOT / part, folder / "source" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_hloss_alone_with_its_types(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    suffixes = (".py", ".css", ".js")
    expected = {f.relative_to(ROOT).as_posix() for f in (ROOT / "hloss").rglob("*") if f.suffix in suffixes}
    assert held == expected | {"hloss/py.typed"}


def test_every_module_of_an_installed_wheel_can_be_imported(wheel, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel],
        check=True,
    )
    # The requirements come from this environment, by its folder's name alone: its .pth files would bring this project.
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [tmp_path / "venv/bin/python", "-W", "error", "-c", IMPORT_ALL, json.dumps(MODULES)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    version, file = json.loads(answer.stdout)
    assert version == wheel.name.split("-")[1]
    assert Path(file).is_relative_to(site)
