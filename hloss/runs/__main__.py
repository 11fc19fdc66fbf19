"""`python -m hloss.runs CONFIG.json`: one run; `python -m hloss.runs networks STUDY`: the networks that runs kept."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import distributed as dist

from hloss.runs.config import parse_config
from hloss.runs.errors import ConfigError, DatasetError, RunError
from hloss.runs.files import project_path, read_result
from hloss.runs.launch import stop_with_starter
from hloss.runs.run import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out the command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["networks"]:
        return show_networks(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m hloss.runs",
        description="Carry out one run.",
        epilog="`python -m hloss.runs networks STUDY` lists or deletes the networks that the runs of a study kept.",
    )
    parser.add_argument("config", metavar="CONFIG.json", type=Path, help="file of the run's settings")
    return run_file(parser.parse_args(given).config)


def run_file(file: Path) -> None:
    """Carry out the run whose settings are in a file, and print where its result is."""
    if "HLOSS_STDIN" in os.environ:
        stop_with_starter()
    try:
        config = parse_config(json.loads(file.read_text()))
        result = run(config)
    except (ConfigError, DatasetError, RunError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"hloss.runs: {error}")
    if dist.is_initialized():  # not after an error: NCCL would wait there for processes that wait for this one
        dist.destroy_process_group()
    if result and "HLOSS_STDIN" not in os.environ:
        print(config.folder / "result.json")


def show_networks(arguments: Sequence[str]) -> None:
    """List the networks that the runs of a study kept; with `--delete`, delete them."""
    from hloss.runs.load import kept_networks

    parser = argparse.ArgumentParser(
        prog="python -m hloss.runs networks", description="List the networks that the complete runs of a study kept."
    )
    parser.add_argument("study", metavar="STUDY", help="folder of the study in runs_dir")
    parser.add_argument("--runs-dir", default="runs", help="folder of the studies' runs (default: runs)")
    parser.add_argument("--delete", action="store_true", help="delete them; results stay as they are")
    options = parser.parse_args(arguments)
    folder = project_path(options.runs_dir) / options.study
    if not folder.is_dir():
        sys.exit(f"hloss.runs: there is no study {options.study!r} in {folder.parent}")
    total = 0
    files = kept_networks(folder)
    for file in files:
        size = file.stat().st_size
        print(_described(file, size))
        total += size
        if options.delete:
            file.unlink()
    print(f"{len(files)} networks, {total / 2**20:.1f} MiB{', deleted' if options.delete else ''}")


def _described(file: Path, size: int) -> str:
    """A line on a kept network: run id, loss, network, seed, size."""
    result = read_result(file.parent)
    assert result is not None
    config = result["config"]
    what = f"{config['loss']:<28} {config['network']:<24} seed {config['seed']:<4}"
    return f"{result['run_id']}  {what} {size / 2**20:8.1f} MiB"


if __name__ == "__main__":
    main()
