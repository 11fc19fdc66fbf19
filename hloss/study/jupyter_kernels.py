"""Kernels of Jupyter that are forked from this process, and import what a notebook needs while it gets ready."""

import asyncio
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

INLINE = "module://matplotlib_inline.backend_inline"
NOTEBOOK_IMPORTS = ("pandas", "hloss.runs.run", "hloss.study.plots")  # of notebooks that run or report
NAME = "forked"  # of the provisioner


class ForkedKernel:
    """A process that waits for the arguments of a kernel and then becomes it; it has the methods of Popen.

    It must be forked before this process starts threads, event loops or CUDA.

    Args:
        modules: modules that the process imports while it waits.
    """

    stdin = stdout = stderr = None

    def __init__(self, modules: Iterable[str]) -> None:
        reading, self._writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # another thread, which waits for the end of the parent
            self.pid = os.fork()
        if not self.pid:
            os.close(self._writing)
            _become_kernel(reading, modules)
        os.close(reading)
        self.returncode: int | None = None

    def start(self, arguments: list[str], environment: dict[str, str], folder: str) -> None:
        """Start the kernel; its standard error is that of this process now.

        Args:
            arguments: of `python -m ipykernel_launcher`.
            environment: variables of the environment.
            folder: working directory.
        """
        errors = os.path.realpath("/proc/self/fd/2")
        with os.fdopen(self._writing, "w") as pipe:
            json.dump([arguments, environment, folder, errors], pipe)

    def poll(self) -> int | None:
        """The exit status, or None while the kernel runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait for the exit status."""
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the kernel has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def _become_kernel(reading: int, modules: Iterable[str]) -> None:
    """Import modules, wait for the arguments, carry out the kernel, and exit."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        for module in (*modules, "ipykernel.kernelapp"):
            import_module(module)
        with os.fdopen(reading) as pipe:
            message = pipe.read()
        if message:
            _run_kernel(*json.loads(message))
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _run_kernel(arguments: list[str], environment: dict[str, str], folder: str, errors: str) -> None:
    from ipykernel.kernelapp import IPKernelApp

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if Path(errors).is_file():
        os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    if torch.cuda._is_in_bad_fork():  # the forking process used CUDA
        os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *arguments])
    logging.basicConfig(level=logging.WARNING, handlers=[logging.StreamHandler()], force=True)
    if "matplotlib" in sys.modules:  # it read the variable when it was imported
        sys.modules["matplotlib"].rcParams["backend"] = os.environ.get("MPLBACKEND", INLINE)
    asyncio.set_event_loop(asyncio.new_event_loop())  # which newer versions of Python do not create by themselves
    sys.argv = ["ipykernel_launcher", *arguments]
    IPKernelApp.launch_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])


class ForkedProvisioner(LocalProvisioner):
    """Starts the kernel that `prepare_kernel` forked."""

    waiting: list[ForkedKernel] = []  # noqa: RUF012

    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        """Start the kernel that waits, or the usual one if none does.

        Args:
            cmd: command of a kernel.
            **options: options of Popen, of which the environment and the working directory are used.
        """
        if not self.waiting:
            return await super().launch_kernel(cmd, **options)
        kernel = self.waiting.pop()
        self.cwd = options.get("cwd") or os.getcwd()
        kernel.start(cmd[cmd.index("-f") :], options["env"], str(self.cwd))
        self.process = kernel  # type: ignore[assignment]
        self.pid = self.pgid = kernel.pid
        return self.connection_info


def prepare_kernel(modules: Iterable[str]) -> None:
    """Fork a kernel, which the next notebook of this process uses; does nothing if one waits, or not on Linux.

    Libraries of macOS do not work after a fork; its kernels start as usual.

    Args:
        modules: modules that the notebook will import.
    """
    if sys.platform != "linux":
        return
    factory = KernelProvisionerFactory.instance()
    factory.provisioners[NAME] = EntryPoint(NAME, f"{__name__}:{ForkedProvisioner.__name__}", factory.GROUP_NAME)
    factory.default_provisioner_name = NAME
    if not ForkedProvisioner.waiting:
        ForkedProvisioner.waiting.append(ForkedKernel(modules))
