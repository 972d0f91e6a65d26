"""slurm/build_shards.sh as an array on a real Slurm of two nodes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, require_tool
from slurm_cluster import slurm_cluster
from test_build import StuckFile, content

from sharding.manifest import read_manifest
from sharding.shard import cut_into_shards

pytestmark = pytest.mark.slow

BUILD = ["--size", "48", "--spacing-mm", "4.5", "--shard-samples", "2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    for tool in ("slurmctld", "slurmd", "sbatch", "munged"):
        require_tool(tool, "on Debian: apt-get install slurm-wlm munge")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env | {"MEDBLIP_VENV": sys.prefix}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    out = tmp_path_factory.mktemp("patients")
    command = [sys.executable, "-m", "sharding.madeup", "--out", out, "--subjects", "13", "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True)
    return out / "manifest.csv"


@pytest.fixture(scope="module")
def whole(manifest, tmp_path_factory):
    """What one build on one machine writes."""
    out = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "sharding.build", "--manifest", manifest, "--out", out, *BUILD]
    subprocess.run(command, cwd=ROOT, check=True)
    return content(out)


def submit(cluster, manifest, out, *array: str) -> str:
    command = ["sbatch", "--parsable", f"--output={out}-%a.log", "--cpus-per-task=1", *array, "slurm/build_shards.sh"]
    command += ["--manifest", manifest, "--out", out, *BUILD]
    return subprocess.run(command, cwd=ROOT, env=cluster, check=True, capture_output=True, text=True).stdout.strip()


def states(cluster, job: str) -> dict[str, str]:
    """State of every task of an array; tasks that wait together are one."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], env=cluster, capture_output=True, text=True).stdout
    tasks = [dict(pair.partition("=")[::2] for pair in line.split()) for line in shown.splitlines() if line]
    return {task.get("ArrayTaskId", "0"): task["JobState"] for task in tasks}


def wait_until(what, timeout_s: float = 180):
    """What `what` returns as soon as it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing came of waiting"
        time.sleep(0.3)
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def logs(out) -> dict[str, str]:
    return {log.name: log.read_text() for log in sorted(out.parent.glob(f"{out.name}-*.log"))}


def test_an_array_on_two_nodes_with_a_task_killed_and_requeued_is_the_build_of_one_machine(
    cluster, manifest, whole, tmp_path
):
    out = tmp_path / "shards"
    shards = cut_into_shards(read_manifest(manifest), 2)
    shard = shards[len(shards) // 4]  # the first one of part 2
    stuck = StuckFile(shard.scans[1].image)
    job = submit(cluster, manifest, out, "--array=1-4")
    temporary = wait_until(lambda: list(out.glob(f".{shard.name}.tar.*.tmp")))[0]
    worker = int(temporary.name.split("-")[-1].split(".")[0])
    os.kill(parent(parent(worker)), signal.SIGKILL)  # above the worker is the fork server, then the build
    wait_until(lambda: states(cluster, job).get("2") == "FAILED")
    assert not (out / "index.json").exists() and not (out / f"{shard.name}.tar").exists()
    stuck.mend()
    subprocess.run(["scontrol", "requeue", f"{job}_2"], env=cluster, check=True)
    # Slurm holds a requeued job back for two minutes.
    subprocess.run(["scontrol", "update", f"jobid={job}_2", "starttime=now"], env=cluster, check=True)
    wait_until(lambda: set(states(cluster, job).values()) == {"COMPLETED"})
    assert content(out) == whole, logs(out)
    told = logs(out)
    assert len(told) == 4
    assert sum("in the manifest)" in log for log in told.values()) >= 1
    for part, log in enumerate(told.values(), start=1):
        assert f"part {part}/4: packed " in log


@pytest.mark.parametrize("array", [(), ("--array=0-1",), ("--array=1-7:3",)], ids=["none", "from 0", "in steps"])
def test_an_array_may_be_numbered_in_any_way(cluster, manifest, whole, tmp_path, array):
    out = tmp_path / "shards"
    job = submit(cluster, manifest, out, *array)
    wait_until(lambda: set(states(cluster, job).values()) == {"COMPLETED"})
    assert content(out) == whole, logs(out)
