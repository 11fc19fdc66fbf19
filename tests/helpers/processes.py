"""Execute a run on several devices in processes that are forked from one with all modules imported.

torchrun starts each process anew, and importing takes most of the time of a short run. Tests of torchrun start it.
"""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hloss.runs.__main__ import run_file

FORKSERVER = multiprocessing.get_context("forkserver")  # conftest.py names the modules to import


class Ended(NamedTuple):
    """How processes ended: the largest absolute exit code, what process 0 printed, and the errors of all."""

    code: int
    printed: str
    errors: str


def execute(settings: dict[str, Any], folder: Path, prepare: Callable[[], None] | None = None, **given: str) -> Ended:
    """Execute a run in as many processes as it has devices, as `python -m hloss.runs` in torchrun does.

    Args:
        settings: the settings of the run.
        folder: where to write the settings and the output.
        prepare: called in each process before the run; a function of a module.
        **given: further environment variables.
    """
    file = folder / "config.json"
    file.write_text(json.dumps(settings))
    devices = settings.get("devices", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **given}
    common |= {"TORCHELASTIC_RUN_ID": "test"} if devices > 1 else {}
    processes = []
    for rank in range(devices):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(FORKSERVER.Process(target=_execute, args=(file, rank, prepare, own)))
        processes[-1].start()
    for process in processes:
        process.join(timeout=120)
    for process in processes:
        process.kill()
        process.join()
    printed = file.with_name("0.out").read_text()
    errors = "".join(file.with_name(f"{rank}.err").read_text() for rank in range(devices))
    return Ended(max(abs(process.exitcode) for process in processes), printed, errors)


def _execute(file: Path, rank: int, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        with open(file.with_name(f"{rank}.{end}"), "wb") as output:
            os.dup2(output.fileno(), stream.fileno())
    torch.set_num_threads(1)
    if prepare:
        prepare()
    run_file(file)
