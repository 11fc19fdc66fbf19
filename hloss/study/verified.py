"""Read the outcome of repeated runs of a table of results, which `hloss.study.verify` writes."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from hloss.runs.errors import ConfigError

RESULTS = "results.parquet"  # name of a study's table; parts have other names
DIFFERENT = "different"  # outcome of a run whose repetition differs


def verified_file(results: Path) -> Path:
    """File with the outcome of repeated runs: verified.json beside results.parquet, NAME.verified.json beside a part.

    Args:
        results: a results.parquet or a part.
    """
    return results.with_name("verified.json" if results.name == RESULTS else f"{results.stem}.verified.json")


def read_verified(results: Path) -> dict[str, Any] | None:
    """Read the outcome of repeated runs of a table of results.

    Args:
        results: a results.parquet or a part.

    Returns:
        The content of its `verified_file`; None if the file is missing or belongs to another version of the table.

    Raises:
        ConfigError: if the file is damaged.
    """
    file = verified_file(results)
    if not file.exists():
        return None
    try:
        verified = json.loads(file.read_text())
        table_sha256 = verified["results_sha256"]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{file}: the file is damaged; delete it, and write it again with `make verify`") from None
    return verified if table_sha256 == sha256(results.read_bytes()).hexdigest() else None


def is_confirmed(verified: dict[str, Any]) -> bool:
    """Whether no repeated run differs.

    Args:
        verified: the content of a `verified_file`.
    """
    return all(run["outcome"] != DIFFERENT for run in verified["runs"].values())
