"""Start a run on its devices: Fabric in each process, torchrun for several processes."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from hloss.runs.checkpoints import forward_signals, read_status
from hloss.runs.config import RunConfig
from hloss.runs.errors import ConfigError, RunError, RunStopped
from hloss.runs.files import atomic_write, read_result


def build_fabric(config: RunConfig) -> Fabric:
    """Fabric on the devices of the run. ConfigError if the machine does not have them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != config.devices:
        raise ConfigError(f"devices={config.devices}, but this run was started as {processes} processes")
    found = torch.cuda.device_count()
    if config.device == "cuda" and found < config.devices:
        raise ConfigError(f'device="cuda" with devices={config.devices}: torch finds {found} CUDA devices here')
    # The processes' shares may differ in their number of slices, so no forward pass may exchange anything.
    name = max({"forward_sync_buffers", "broadcast_buffers"} & set(signature(DistributedDataParallel).parameters))
    exchange: dict[str, Any] = {name: False}
    strategy = DDPStrategy(**exchange) if config.devices > 1 else "auto"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    kind: dict[str, Any] = {"accelerator": config.device, "precision": config.precision}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")  # torchrun starts the processes of a run
        fabric = Fabric(devices=config.devices, strategy=strategy, **kind)
        fabric.launch()
    return fabric


def run_on_devices(config: RunConfig, report: Callable[[str], None]) -> dict[str, Any]:
    """Start the command of this run under torchrun, one process per device, and pass on its reports.

    The processes' standard error goes to `devices.log` in the run's folder. Returns the result. Raises RunStopped after
    a signal and RunError if a process fails.
    """
    file = config.folder / "config.json"
    atomic_write(file, lambda part: part.write_text(config.model_dump_json(indent=1) + "\n"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.devices}"]
    command = [*torchrun, "-m", "hloss.runs", str(file)]
    environment = {"OMP_NUM_THREADS": str(config.threads), **os.environ, "HLOSS_STDIN": "open while the starter lives"}
    log = config.folder / "devices.log"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        _opened_log(log, config.devices) as errors,
        subprocess.Popen(command, env=environment, text=True, stderr=errors, **pipes) as child,
        forward_signals(child),
    ):
        assert child.stdout is not None
        for line in child.stdout:
            report(line.rstrip())
    result = read_result(config.folder)
    if child.returncode == 0 and result:
        return result
    status = read_status(config.folder) or {"state": "failed", "message": ""}
    if status["state"] == "stopped":
        raise RunStopped(status["message"])
    raise RunError(f"the run on {config.devices} devices ended with {child.returncode}, see {log}. {status['message']}")


@contextmanager
def _opened_log(log: Path, devices: int) -> Iterator[IO[str]]:
    """The log, with a new line for this attempt. It is never emptied: another process may be writing to it."""
    with open(log, "a") as errors:
        errors.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} started on {devices} devices\n")
        errors.flush()  # before the processes write
        yield errors


def stop_with_starter() -> None:
    """Send this process SIGTERM when the process that started torchrun ends, which closes the other end of stdin."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written: this returns at the end of the file
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
