"""Hashes of the code and the data that a result depends on, and the origin of a result."""

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def code_sha256() -> str:
    """Hash of the sources that decide a result."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(f for f in package.rglob("*.py") if "study" not in f.parts):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def fingerprint(card_sha256: str) -> dict[str, str]:
    """Hashes of the code and the data, on which a result depends besides its settings."""
    return {"code_sha256": code_sha256(), "card_sha256": card_sha256}


def provenance(device: torch.device, threads: int) -> dict[str, Any]:
    """Describe how a result was made; for information only, no code depends on it.

    Args:
        device: the device of the run.
        threads: CPU threads of torch.

    Returns:
        Git commit, whether the working tree was changed, versions of Python and packages, device, processor and
        threads; the commit is None outside a repository.
    """
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
    """Name and number of cores of the CPU; the architecture replaces the name where Linux does not give it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
