"""`python -m hloss.runs CONFIG.json`: one run from a file of its settings."""

import json
import os
import sys
from pathlib import Path

from torch import distributed as dist

from hloss.runs.config import parse_config
from hloss.runs.errors import ConfigError, DatasetError, RunError
from hloss.runs.launch import stop_with_starter
from hloss.runs.run import run


def main() -> None:
    """`python -m hloss.runs CONFIG.json`: one run from a file of its settings."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hloss.runs CONFIG.json")
    if "HLOSS_STDIN" in os.environ:
        stop_with_starter()
    try:
        config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
        result = run(config)
    except (ConfigError, DatasetError, RunError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"hloss.runs: {error}")
    if dist.is_initialized():  # not after an error: NCCL would wait there for processes that wait for this one
        dist.destroy_process_group()
    if result and "HLOSS_STDIN" not in os.environ:
        print(config.folder / "result.json")


if __name__ == "__main__":
    main()
