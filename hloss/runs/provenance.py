"""Hashes of the code and the data that a result depends on, and where a result came from."""

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
    """What else than the config decides a result: the code and the data."""
    return {"code_sha256": code_sha256(), "card_sha256": card_sha256}


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
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
