"""Snakemake profiles: where the runs of a study are executed."""

from pathlib import Path

import yaml

from hloss.runs.errors import ConfigError

PROFILES = Path("workflow/profiles")


def profile_folder(name: str) -> Path:
    """The folder of a profile. ConfigError if there is none."""
    known = sorted(path.parent.name for path in PROFILES.glob("*/config.yaml"))
    if name not in known:
        raise ConfigError(f"PROFILE={name} is unknown, allowed are {', '.join(known)}")
    return PROFILES / name


def uses_slurm(profile: Path) -> bool:
    """Whether the profile hands runs to Slurm."""
    return (yaml.safe_load((profile / "config.yaml").read_text()) or {}).get("executor") == "slurm"
