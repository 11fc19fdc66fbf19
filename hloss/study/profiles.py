"""Snakemake profiles: where a study executes its runs."""

from pathlib import Path

from hloss.runs.errors import ConfigError
from hloss.study.input_files import read_yaml, shown

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

    Raises:
        ConfigError: if the profile is not a mapping in YAML.
    """
    file = profile / "config.yaml"
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: got {shown(content)}; must be a mapping of Snakemake's options, such as `cores: 2`")
    return content.get("executor") == "slurm"
