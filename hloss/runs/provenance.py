"""Hashes of the code and the data that a result depends on, and the origin of a result."""

import ast
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import resolve_name
from itertools import accumulate, compress
from pathlib import Path
from typing import Any

import torch

from hloss.integrations.pml_losses import PREFIX
from hloss.runs.config import RunConfig
from hloss.runs.models import has_pretrained_part

PACKAGE = Path(__file__).parents[1]
FAISS = ("faiss", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")  # packages of the module faiss
NAMED_PACKAGES = ("torchvision", "pytorch-metric-learning")  # settings can select their networks and losses
# fields of syntax trees that depend on spelling only, or follow from other fields
IGNORED_FIELDS = ("ctx", "kind", "type_comment")


def fingerprint(config: RunConfig, card_sha256: str) -> dict[str, str]:
    """Hashes and versions on which a result depends, in addition to its settings.

    Args:
        config: the settings of the run.
        card_sha256: SHA-256 hash of the dataset's card.

    Returns:
        `code_sha256` and `card_sha256`; also the versions of torchvision and pytorch-metric-learning if the settings
        select a network or a loss of these packages.
    """
    is_named = (has_pretrained_part(config.network), config.loss.startswith(PREFIX))
    versions = {name: found for name in compress(NAMED_PACKAGES, is_named) if (found := _version(name))}
    return {"code_sha256": code_sha256(), "card_sha256": card_sha256} | versions


@lru_cache
def code_sha256(package: Path = PACKAGE) -> str:
    """Hash the code that a run executes: the syntax trees of `runs.run` and of all modules that it imports.

    Only modules of the package are hashed, including those imported inside functions. Docstrings, comments and layout
    do not change the hash. All Python versions compute the same hash.

    Args:
        package: the folder of the package.

    Returns:
        SHA-256 hash, as 64 hex digits.
    """
    hashes: dict[str, str] = {}
    waiting = [f"{package.name}.runs.run"]
    while waiting:
        name = waiting.pop()
        file = _file(package, name)
        if file and name not in hashes:
            tree = ast.parse(file.read_bytes())
            hashes[name] = sha256("\0".join(_parts(tree)).encode()).hexdigest()
            waiting += _imports(name, file, tree)
    return sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _file(package: Path, module: str) -> Path | None:
    """File of a module; None if the name is not that of a module in the package."""
    if module.partition(".")[0] != package.name:
        return None
    path = package.parent.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _imports(module: str, file: Path, tree: ast.Module) -> Iterator[str]:
    """Names that a module imports, and the packages that contain them."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = ""
            if isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), package) + "."
            for alias in node.names:
                yield from accumulate(f"{source}{alias.name}".split("."), "{}.{}".format)


def _parts(tree: ast.AST) -> list[str]:
    """Node types, field names and constants of a syntax tree, from its root downwards."""
    parts: list[str] = []

    def add(value: object) -> None:
        if isinstance(value, ast.AST):
            parts.append(type(value).__name__)
            for name in value._fields:
                field = getattr(value, name, None)
                if field is not None and field != [] and name not in IGNORED_FIELDS:
                    parts.append(name)
                    add(field)
            parts.append(".")
        elif isinstance(value, list):
            parts.append("[")
            for item in value:
                if not _is_text(item):
                    add(item)
            parts.append("]")
        else:
            parts.append(ascii(value))  # repr would depend on the Unicode version of Python.

    add(tree)
    return parts


def _is_text(statement: object) -> bool:
    """Whether a statement is only a string, such as a docstring. Such a statement has no effect."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def provenance(device: torch.device, threads: int) -> dict[str, Any]:
    """Describe the software and hardware of a run; the description does not decide whether a result is up to date.

    Args:
        device: the device of the run.
        threads: CPU threads of torch.

    Returns:
        Git commit, whether the working tree was changed outside `reports`, versions of Python and packages, device,
        processor and threads; the commit is None outside a repository.
    """
    # `reports` contains results: their writing and verification must not mark later runs as made by changed code.
    changes = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)reports")
    packages = ("torch", "torchvision", "lightning-fabric", "numpy", "pandas", "pytorch-metric-learning", *FAISS)
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git(*changes)),
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processor": _processor(),
        "threads": threads,
    }


def _processor() -> str:
    """Name and number of cores of the CPU; the architecture instead of the name if Linux does not report a name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project's root; None if the root is not the root of a repository."""
    # Without this test, git would search parent folders. In a worktree, .git is a file.
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
