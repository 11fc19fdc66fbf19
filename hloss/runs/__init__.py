"""One run: train, choose the iteration on validation classes, evaluate on the test set once, write the run's folder.

`hloss.runs.run.run` carries out a run; `load_run(folder)` loads a complete one with its network.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_run":  # on first use and by name: importing this package imports nothing of it
        return import_module("hloss.runs.load").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
