"""Runs: train a network, choose the iteration on validation classes, evaluate on test classes, write files.

`hloss.runs.run.run` executes a run; `load_run(folder)` loads a complete run with its trained network.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_run":  # Imported on first use, so that `import hloss.runs` stays fast.
        return import_module("hloss.runs.load").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
