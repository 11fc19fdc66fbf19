"""Command line of runs.

`python -m hloss.runs CONFIG.json` executes one run. `python -m hloss.runs networks STUDY` lists or deletes the saved
networks of a study.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from hloss.runs.config import parse_config
from hloss.runs.errors import ConfigError, DatasetError, RunError
from hloss.runs.files import project_path, read_result
from hloss.runs.launch import stop_with_starter
from hloss.runs.run import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Execute the command line.

    Args:
        arguments: the arguments; None for those of the process.

    Raises:
        SystemExit: the arguments are invalid, or the run failed; the message says why.
    """
    command = sys.argv[1:] if arguments is None else list(arguments)
    if command[:1] == ["networks"]:
        return show_networks(command[1:])
    parser = argparse.ArgumentParser(
        prog="python -m hloss.runs",
        description="Execute one run and print the path of its result.",
        epilog="`python -m hloss.runs networks STUDY` lists or deletes the saved networks of a study.",
    )
    parser.add_argument("config", metavar="CONFIG.json", type=Path, help="JSON file with the settings of the run")
    return run_file(parser.parse_args(command).config)


def run_file(file: Path) -> None:
    """Execute the run whose settings are in a file, and print the path of its result.

    Args:
        file: JSON file with the settings by the names of RunConfig's fields.

    Raises:
        SystemExit: the file cannot be read, a setting is wrong, or the run failed; the message says why.
    """
    if "HLOSS_STDIN" in os.environ:
        stop_with_starter()
    try:
        config = parse_config(_settings(file))
        result = run(config)
    except (ConfigError, DatasetError, RunError, OSError) as error:
        sys.exit(f"hloss.runs: {error}")
    if dist.is_initialized():  # After an error, NCCL would wait for processes that wait for this one.
        dist.destroy_process_group()
    if result and "HLOSS_STDIN" not in os.environ:
        print(config.folder / "result.json")


def _settings(file: Path) -> dict[str, Any]:
    """Read a JSON file with a mapping; ConfigError if it cannot be read or has other content."""
    try:
        settings = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"CONFIG.json={file}: the file cannot be read: {error.strerror}; give a JSON file of settings"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f'{file} must contain a mapping such as {{"loss": "histogram"}}: got {settings!r:.80}')
    return settings


def show_networks(arguments: Sequence[str]) -> None:
    """List the saved networks of a study; with `--delete`, delete them.

    Args:
        arguments: the arguments after `networks`.

    Raises:
        SystemExit: the arguments are invalid, or the study does not exist.
    """
    from hloss.runs.load import kept_networks

    parser = argparse.ArgumentParser(
        prog="python -m hloss.runs networks",
        description="List the trained networks that the complete runs of a study saved, with their sizes.",
    )
    parser.add_argument("study", metavar="STUDY", help="name of the study, a folder in RUNS_DIR")
    parser.add_argument("--runs-dir", default="runs", help="folder of all studies' runs (default: runs)")
    parser.add_argument("--delete", action="store_true", help="delete the listed networks and keep the results")
    options = parser.parse_args(arguments)
    if options.study in ("", "..") or Path(options.study).name != options.study:
        parser.error(f"STUDY must be the name of a folder in {options.runs_dir}: got {options.study!r}")
    folder = project_path(options.runs_dir) / options.study
    if not folder.is_dir():
        sys.exit(f"hloss.runs: study {options.study!r} does not exist: {folder.parent} has no folder of this name")
    total = 0
    files = kept_networks(folder)
    for file in files:
        size = file.stat().st_size
        print(_network_line(file, size))
        total += size
        if options.delete:
            file.unlink()
    print(
        f"{len(files)} network{'s' * (len(files) != 1)}, {total / 2**20:.1f} MiB{', deleted' if options.delete else ''}"
    )


def _network_line(file: Path, size: int) -> str:
    """Run id, loss, network, seed and size in MiB of a saved network, on one line."""
    result = read_result(file.parent)
    assert result is not None
    config = result["config"]
    settings = f"{config['loss']:<28} {config['network']:<24} seed {config['seed']:<4}"
    return f"{result['run_id']}  {settings} {size / 2**20:8.1f} MiB"


if __name__ == "__main__":
    main()
