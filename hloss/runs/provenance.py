"""Hashes of the code and the data that a result depends on, and where a result came from."""

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

from hloss.losses.pml import PREFIX
from hloss.runs.config import RunConfig
from hloss.runs.models import has_pretrained_part

PACKAGE = Path(__file__).parents[1]
NAMED_PACKAGES = ("torchvision", "pytorch-metric-learning")  # which networks and losses a setting can name
LEFT_OUT = ("ctx", "kind", "type_comment")  # fields of syntax trees that are spelling, or follow from other fields


def fingerprint(config: RunConfig, card_sha256: str) -> dict[str, str]:
    """Hashes of the code and the data, and the versions of the other packages that the settings name."""
    is_named = (has_pretrained_part(config.network), config.loss.startswith(PREFIX))
    versions = {name: found for name in compress(NAMED_PACKAGES, is_named) if (found := _version(name))}
    return {"code_sha256": code_sha256(), "card_sha256": card_sha256} | versions


@lru_cache
def code_sha256(package: Path = PACKAGE) -> str:
    """Hash of the code that a run executes: syntax trees of `runs.run` and all modules of the package that it imports.

    Imports within functions count. Docstrings, comments and layout do not. Every Python version gives the same hash.
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
    """The file of a module; None if it is not in the package, or if the name is not a module's."""
    if module.partition(".")[0] != package.name:
        return None
    path = package.parent.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _imports(module: str, file: Path, tree: ast.Module) -> Iterator[str]:
    """The names that a module imports, each with the packages that contain it."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = ""
            if isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), package) + "."
            for alias in node.names:
                yield from accumulate(f"{source}{alias.name}".split("."), "{}.{}".format)


def _parts(tree: ast.AST) -> list[str]:
    """The types of a syntax tree's nodes, from its root down, with their fields and constants."""
    parts: list[str] = []

    def add(value: object) -> None:
        if isinstance(value, ast.AST):
            parts.append(type(value).__name__)
            for name in value._fields:
                field = getattr(value, name, None)
                if field is not None and field != [] and name not in LEFT_OUT:
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
            parts.append(ascii(value))  # repr would depend on the Unicode version that Python knows

    add(tree)
    return parts


def _is_text(statement: object) -> bool:
    """Whether a statement is a string alone, like a docstring, which does nothing."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def provenance(device: torch.device, threads: int) -> dict[str, Any]:
    """Where a result came from, for the reader; nothing is decided by it."""
    packages = ("torch", "torchvision", "lightning-fabric", "numpy", "pandas", "pytorch-metric-learning", "faiss-cpu")
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processor": _processor(),
        "threads": threads,
    }


def _processor() -> str:
    """The name of this machine's CPU and its cores; where only Linux tells the name, its architecture."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", told.read_text()) if told.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git answers about the project; None where the project is not the root of a repository."""
    if not (PACKAGE.parent / ".git").exists():  # a folder, or a file in a worktree; git would look further up
        return None
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
