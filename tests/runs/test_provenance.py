"""Hash of the code that a run executes, and the recorded origin of a result."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

import hloss.runs.provenance as module
from hloss.runs.config import parse_config
from hloss.runs.provenance import PACKAGE, code_sha256, fingerprint, provenance

SOURCE = '''"""Module."""

from {name} import numbers

FACTOR = 2


class Model:
    """Class."""

    size: int = 3
    "of something"

    def scaled(self, x, factor=1.5):
        if x > 0:
            return x * factor
        from {name}.tools import lazy

        return lazy.value(f"{{x!r:>{{factor}}}} \\u00e9")
'''


@pytest.fixture
def package(tmp_path):
    """A package whose `runs.run` imports `numbers` and, inside a function, `tools.lazy`, which imports `tools.far`."""
    folder = tmp_path / "small"
    files = {
        "__init__.py": "",
        "numbers.py": "ONE = 1\n",
        "runs/__init__.py": "",
        "runs/run.py": SOURCE.format(name="small"),
        "tools/__init__.py": "",
        "tools/lazy.py": "from . import far\nfrom .far import value\n",
        "tools/far.py": "def value(x):\n    return x\n",
        "tools/other.py": "import small.runs.run\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def fresh_hash(package):
    return code_sha256.__wrapped__(package)


WORDS = {
    "module docstring": ('"""Module."""', '"""Another."""'),
    "no docstring": ('    """Class."""\n', ""),
    "a docstring more": ("factor=1.5):", 'factor=1.5):\n        """Scaled."""'),
    "attribute docstring": ('"of something"', '"of something else"'),
    "comment": ("FACTOR = 2", "FACTOR = 2  # twice"),
    "layout": ("self, x, factor=1.5", "\n        self,\n        x,\n        factor = 1.50,\n    "),
    "quotes and parentheses": ("return x * factor", "return (x * factor)"),
    "spelling of a string": ("\\u00e9", "é"),
}
CODE = {
    "constant": ("FACTOR = 2", "FACTOR = 3"),
    "type of a constant": ("FACTOR = 2", "FACTOR = 2.0"),
    "default": ("factor=1.5", "factor=1.6"),
    "no default": ("factor=1.5", "factor"),
    "operator": ("x * factor", "x / factor"),
    "new branch": ("if x > 0:", "if x < -9:\n            return 0\n        if x > 0:"),
    "name": ("class Model", "class Models"),
    "text in an expression": ("\\u00e9", "e"),
    "format": ("x!r", "x!s"),
}


@pytest.mark.parametrize("change", WORDS)
def test_docstrings_and_layout_do_not_change_the_code_hash(package, change):
    before, file = fresh_hash(package), package / "runs/run.py"
    old, new = WORDS[change]
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert fresh_hash(package) == before


@pytest.mark.parametrize("change", CODE)
def test_code_changes_the_code_hash(package, change):
    before, file = fresh_hash(package), package / "runs/run.py"
    old, new = CODE[change]
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert fresh_hash(package) != before


@pytest.mark.parametrize("file", ["__init__.py", "tools/__init__.py", "numbers.py", "tools/lazy.py", "tools/far.py"])
def test_every_imported_module_changes_the_code_hash(package, file):
    before = fresh_hash(package)
    with open(package / file, "a") as opened:
        opened.write("\nMORE = 1\n")
    assert fresh_hash(package) != before


def test_other_modules_and_the_location_do_not_change_the_code_hash(package, tmp_path):
    before = fresh_hash(package)
    (package / "tools/other.py").write_text("MORE = 1\n")
    (package.parent / "numbers.py").write_text("MORE = 1\n")
    assert fresh_hash(package) == before
    assert fresh_hash(shutil.copytree(package, tmp_path / "elsewhere/small")) == before


def test_renamed_module_changes_the_code_hash(package):
    before = fresh_hash(package)
    (package / "numbers.py").rename(package / "figures.py")
    (package / "runs/run.py").write_text(SOURCE.format(name="small").replace("import numbers", "import figures"))
    assert fresh_hash(package) != before


def test_code_hash_equals_the_value_of_other_python_versions(package):
    """The value was computed by CPython 3.11.3, 3.12.7, 3.13.2 and 3.14.2."""
    assert fresh_hash(package) == "b863c3a8268064a703a84585ff3ea276bce0b9da34f7209258ced2cb57ea222b"


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("__init__.py", True),
        ("integrations/pml_losses.py", True),
        ("retrieval/neighbors.py", True),
        ("runs/evaluation.py", True),
        ("study/results.py", False),
        ("study/statistics.py", False),
    ],
)
def test_library_and_runs_change_the_code_hash_and_studies_do_not(file, counts, tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert fresh_hash(copy) == code_sha256()
    with open(copy / file, "a") as opened:
        opened.write("\nMORE = 1\n")
    assert (fresh_hash(copy) != code_sha256()) == counts


def test_code_hash_takes_less_than_a_second_and_is_cached():
    start = time.process_time()
    fresh_hash(PACKAGE)
    assert time.process_time() - start < 1, "it takes 0.1 s on an idle machine"
    code_sha256()
    start = time.process_time()
    code_sha256()
    assert time.process_time() - start < 0.01


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({}, None),
        ({"network": "parts"}, None),
        ({"network": "googlenet"}, "torchvision"),
        ({"network": "torchvision:resnet18"}, "torchvision"),
        ({"loss": "pml:MultiSimilarityLoss"}, "pytorch-metric-learning"),
    ],
)
def test_fingerprint_has_the_versions_of_selected_packages(settings, package, monkeypatch):
    config = parse_config(settings)
    here = fingerprint(config, "card")
    assert set(here) == {"code_sha256", "card_sha256", *([package] if package else [])}
    monkeypatch.setattr(module, "version", lambda name: "0.0")
    assert (fingerprint(config, "card") != here) == (package is not None)


def repository(folder: Path) -> str:
    """Initialise a git repository with one commit of the files in a folder, and return its hash."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "First"], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_git_commit_is_that_of_the_project_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "outer/unpacked/hloss")
    module.PACKAGE.mkdir(parents=True)
    repository(tmp_path / "outer")
    told = provenance(torch.device("cpu"), threads=1)
    assert (told["git_commit"], told["git_dirty"]) == (None, False)
    own = repository(tmp_path / "outer/unpacked")
    assert provenance(torch.device("cpu"), threads=1)["git_commit"] == own


def test_changed_results_are_no_changes_of_the_working_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "hloss")
    code, results = tmp_path / "hloss/code.py", tmp_path / "reports/sample/verified.json"
    for file in (code, results):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    repository(tmp_path)
    dirty = []
    for file in (results, code):
        file.write_text("2")
        dirty.append(provenance(torch.device("cpu"), threads=1)["git_dirty"])
    assert dirty == [False, True]


def test_provenance_names_every_installed_faiss(monkeypatch):
    installed = {"torch": "2.6", "faiss-cpu": "1.9", "faiss-gpu": "1.14.3"}
    monkeypatch.setattr("hloss.runs.provenance._version", installed.get)
    assert provenance(torch.device("cpu"), 1)["packages"] == installed
