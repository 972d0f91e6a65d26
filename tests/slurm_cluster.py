"""A real Slurm on this machine for the tests of slurm/: one-CPU nodes on loopback, everything in one folder."""

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# `high` preempts `low`, as an urgent job does on a shared cluster.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 State=UP
"""


@contextmanager
def slurm_cluster(folder: Path, num_nodes: int = 2) -> Iterator[dict[str, str]]:
    """Run a cluster and yield the environment that makes sbatch, squeue and scontrol talk to it."""
    host = socket.gethostname().split(".")[0]
    nodes = [f"n{i + 1}" for i in range(num_nodes)]
    ports = _free_ports(num_nodes + 1)
    conf = SLURM_CONF.format(folder=folder, user=getpass.getuser(), host=host, ports=ports)
    for node, port in zip(nodes, ports[1:], strict=True):
        conf += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=2000\n"
    (folder / "state").mkdir(parents=True)
    for node in nodes:
        (folder / node).mkdir()
    (folder / "slurm.conf").write_text(conf)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    own = {name: f"{folder}/munge.{name}" for name in ("socket", "key", "log", "pid", "seed")}
    munged = f"""munged --foreground --force --socket={own["socket"]} --key-file={own["key"]}
        --log-file={own["log"]} --pid-file={own["pid"]} --seed-file={own["seed"]}""".split()
    with ExitStack() as daemons:
        for command in [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in nodes)]:
            daemons.enter_context(_daemon(command, env, folder / "daemons.log"))
        _wait_for_nodes(env, num_nodes, folder)
        try:
            yield env
        finally:
            subprocess.run(["scancel", "--full", f"--user={getpass.getuser()}"], env=env)
            _wait_for_nodes(env, num_nodes, folder)


@contextmanager
def _daemon(command: list[str], env: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("a") as file:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for_nodes(env: dict[str, str], num_nodes: int, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        idle = subprocess.run(["sinfo", "-hN", "-plow", "-tidle"], env=env, capture_output=True, text=True).stdout
        if idle.count("\n") == num_nodes:
            return
        time.sleep(0.2)
    raise TimeoutError(f"the Slurm nodes did not come up; see the logs in {folder}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for s in opened:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in opened]
