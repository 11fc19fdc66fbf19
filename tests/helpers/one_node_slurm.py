"""A real Slurm of one node for the tests: munged, slurmctld and slurmd on loopback, with two simulated GPUs.

Each GPU has two shards.

The GPUs are character devices: Slurm counts them, hands them out and sets CUDA_VISIBLE_DEVICES. There are no cgroups,
so memory is watched by polling. The node claims one CPU more than GPUs, so that GPUs run out first.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
DAEMONS = ("slurmd", "slurmctld", "munged")  # in the order in which they are stopped
ETC = Path("/etc/slurm")  # a job step without SLURM_CONF reads this folder
CPUS = 3

CONF = """
ClusterName=onenode
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
MessageTimeout=100
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
ReturnToService=2
MinJobAge=3600
KillWait=5
GresTypes=gpu,shard
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:2,shard:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
PartitionName=second Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP
"""


def why_not() -> str | None:
    """The reason why Slurm cannot be started on this machine, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "the daemons need root"
    if (ETC / "slurm.conf").exists() and not is_ours(ETC / "slurm.conf"):
        return f"{ETC / 'slurm.conf'} configures another Slurm"
    return None


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def is_ours(link: Path) -> bool:
    return link.is_symlink() and "one-node-slurm" in str(link.readlink())


@contextmanager
def one_node_slurm(parent: Path) -> Iterator[dict[str, str]]:
    """Start the daemons in `parent`/one-node-slurm, yield the variables that reach them, stop them.

    One at a time on a machine: another one is waited for; what a killed one left is stopped first.
    """
    folder = parent / "one-node-slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    with open("/tmp/one-node-slurm.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ours(ETC / "slurm.conf"):
            stop((ETC / "slurm.conf").readlink().parent)
        write_configuration(folder)
        try:
            yield start(folder)
        finally:
            stop(folder)


def write_configuration(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 - 1024
    controller, node = free_ports(2)
    text = CONF.format(host=host, folder=folder, controller=controller, node=node, cpus=CPUS, memory=memory)
    (folder / "slurm.conf").write_text(text)
    for number in (0, 1):
        os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    devices = f"NodeName={host} Name=gpu File={folder}/gpu[0-1]\nNodeName={host} Name=shard Count=4\n"
    (folder / "gres.conf").write_text(devices)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    ETC.mkdir(exist_ok=True)
    for name in ("slurm.conf", "gres.conf"):
        (ETC / name).unlink(missing_ok=True)
        (ETC / name).symlink_to(folder / name)


def free_ports(n: int) -> list[int]:
    """Different free ports."""
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(folder: Path) -> dict[str, str]:
    """Start the daemons and wait for an idle node; RuntimeError with the ends of their logs otherwise."""
    ours = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
    environment = os.environ | ours
    munged = ["munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    for command in (munged, ["slurmctld"], ["slurmd", "-N", socket.gethostname().split(".")[0]]):
        with open(folder / "start.log", "a") as log:  # a pipe would stay open in the daemon
            subprocess.run(command, env=environment, check=True, timeout=60, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True, timeout=30)
        if "idle" in state.stdout:
            return ours
        time.sleep(0.5)
    logs = [f"{file.name}:\n{file.read_text()[-2000:]}" for file in folder.glob("*.log")]
    raise RuntimeError("the node did not become idle\n" + "\n".join(logs))


def stop(folder: Path) -> None:
    """Stop the daemons with pid files in the folder, and their descendants; remove the links."""
    for daemon in DAEMONS:
        file = folder / f"{daemon}.pid"
        if file.exists() and (pid := file.read_text().strip()) and is_running(pid, daemon):
            os.kill(int(pid), signal.SIGTERM)
            deadline = time.monotonic() + 20
            while is_running(pid, daemon) and time.monotonic() < deadline:
                time.sleep(0.1)
    for process in psutil.process_iter():  # without cgroups Slurm does not find a process whose parent it killed
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                process.kill()
    for name in ("slurm.conf", "gres.conf"):
        if (ETC / name).is_symlink() and (ETC / name).readlink().parent == folder:
            (ETC / name).unlink()


def is_running(pid: str, daemon: str) -> bool:
    comm = Path("/proc") / pid / "comm"
    try:
        return daemon in comm.read_text()
    except OSError:
        return False
