"""Snakemake profiles: where a study executes its runs."""

from pathlib import Path

import yaml

from hloss.runs.errors import ConfigError

PROFILES = Path("workflow/profiles")


def profile_folder(name: str) -> Path:
    """The folder of a profile.

    Args:
        name: name of a folder in workflow/profiles.

    Raises:
        ConfigError: if the profile does not exist.
    """
    known = sorted(path.parent.name for path in PROFILES.glob("*/config.yaml"))
    if name not in known:
        raise ConfigError(f"PROFILE is unknown: got {name!r}; allowed are {', '.join(known)}")
    return PROFILES / name


def uses_slurm(profile: Path) -> bool:
    """Whether a profile submits runs to Slurm.

    Args:
        profile: folder of the profile.
    """
    return (yaml.safe_load((profile / "config.yaml").read_text()) or {}).get("executor") == "slurm"
