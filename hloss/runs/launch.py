"""Start the processes of a run: torchrun for several devices, Lightning Fabric in each process."""

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
from torch.nn.parallel import DistributedDataParallel

from hloss.runs.checkpoints import forward_signals, read_status
from hloss.runs.config import RunConfig
from hloss.runs.engine import DDPStrategy, Fabric, LightningEnvironment
from hloss.runs.errors import ConfigError, RunError, RunStopped
from hloss.runs.files import atomic_write, read_result


def build_fabric(config: RunConfig) -> Fabric:
    """Start Fabric on the devices of a run.

    Args:
        config: the settings of the run.

    Returns:
        Fabric, connected to the other processes of the run.

    Raises:
        ConfigError: `devices` differs from the number of processes, or torch finds fewer CUDA devices.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != config.devices:
        raise ConfigError(
            f"devices={config.devices} requires one process per device: got {processes}; `python -m hloss.runs` starts "
            "these processes"
        )
    check_devices(config)
    # Processes may have different numbers of slices, so a forward pass must not communicate.
    name = max({"forward_sync_buffers", "broadcast_buffers"} & set(signature(DistributedDataParallel).parameters))
    exchange: dict[str, Any] = {name: False}
    strategy = DDPStrategy(**exchange) if config.devices > 1 else "auto"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    kind: dict[str, Any] = {"accelerator": config.device, "precision": config.precision}
    if config.devices == 1:
        kind["plugins"] = LightningEnvironment()  # otherwise Fabric imports MPI and asks Slurm for other processes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")  # hloss uses torchrun instead
        fabric = Fabric(devices=config.devices, strategy=strategy, **kind)
        fabric.launch()
    return fabric


def check_devices(config: RunConfig) -> None:
    """Check that torch finds one GPU per process.

    Args:
        config: the settings of the run.

    Raises:
        ConfigError: `device` is "cuda", or "auto" on a machine with GPUs, and there are fewer GPUs than `devices`.
    """
    found = torch.cuda.device_count()
    if found < config.devices and (config.device == "cuda" or (config.device == "auto" and found)):
        raise ConfigError(
            f'device="{config.device}" with devices={config.devices} requires one GPU per process: torch finds '
            f'{found}; lower devices or set device to "cpu"'
        )


def run_on_devices(config: RunConfig, report: Callable[[str], None]) -> dict[str, Any]:
    """Execute a run under torchrun, one process per device.

    The standard error of the processes is appended to `devices.log` in the run's folder.

    Args:
        config: the settings of the run.
        report: called with each line that the processes print.

    Returns:
        The content of `result.json`.

    Raises:
        RunStopped: a signal stopped the run.
        RunError: a process failed.
    """
    file = config.folder / "config.json"
    atomic_write(file, lambda part: part.write_text(config.model_dump_json(indent=1) + "\n"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.devices}"]
    command = [*torchrun, "-m", "hloss.runs", str(file)]
    environment = {
        "OMP_NUM_THREADS": str(config.threads),
        **os.environ,
        "HLOSS_STDIN": "closes when the parent process ends",
    }
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
    message = status["message"] or "no message"
    raise RunError(
        f"the run on {config.devices} devices failed: got exit code {child.returncode} ({message}); see {log}"
    )


@contextmanager
def _opened_log(log: Path, devices: int) -> Iterator[IO[str]]:
    """Open the log and append a line for this attempt; the file is not emptied, as another process may write to it."""
    with open(log, "a") as errors:
        errors.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} started on {devices} devices\n")
        errors.flush()  # The line must precede the output of the processes.
        yield errors


def stop_with_starter() -> None:
    """Send SIGTERM to this process as soon as the process that started torchrun ends.

    The standard input of this process is a pipe from the process that started torchrun. When that process ends, the
    pipe closes, and a background thread sends the signal.
    """

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # Nothing is ever written, so this returns when the input is closed.
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
