"""slurm/*.sh on a real Slurm of two nodes."""

import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT, require_tool
from slurm_cluster import slurm_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    for tool in ("slurmctld", "slurmd", "sbatch", "munged"):
        require_tool(tool, "on Debian: apt-get install slurm-wlm munge")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env:
        # All nodes are this machine, and their names resolve nowhere.
        yield env | {"MEDBLIP_VENV": sys.prefix, "MASTER_ADDR": "127.0.0.1"}


def submit_pretrain(cluster, shards, run, steps) -> str:
    """Submits slurm/pretrain.sh on two nodes without GPUs, logging to `run`.log; returns the job's id."""
    command = ["sbatch", "--parsable", f"--output={run}.log", "-N2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    command += ["--gpus-per-node=0", "slurm/pretrain.sh"]
    command += ["--preset", "tiny", "--data", shards, "--run", run, "--steps", str(steps)]
    return subprocess.run(command, cwd=ROOT, env=cluster, check=True, capture_output=True, text=True).stdout.strip()


def wait_for_state(cluster, job, *wanted, run, timeout_s=240) -> None:
    """Returns when the job is in one of the states; fails with the job's log when it ends in another, or never does."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        shown = subprocess.run(["scontrol", "show", "job", job], env=cluster, capture_output=True, text=True).stdout
        state = shown.split("JobState=")[1].split()[0]
        if state in wanted:
            return
        if state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
            break
        time.sleep(0.5)
    log = run.with_suffix(".log")
    pytest.fail(f"job {job} is {state}, not {wanted}\n{log.read_text() if log.exists() else shown}")


def steps_of(run) -> list[int]:
    """The steps in metrics.jsonl, complete lines only."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def test_pretrain_trains_two_nodes_to_the_end(cluster, made_up_shards, tmp_path):
    run = tmp_path / "run"
    job = submit_pretrain(cluster, made_up_shards, run, steps=4)
    wait_for_state(cluster, job, "COMPLETED", run=run)
    assert steps_of(run) == [1, 2, 3, 4]


def test_signal_before_the_time_limit_saves_requeues_and_goes_on(cluster, made_up_shards, tmp_path):
    run, steps = tmp_path / "run", 60
    job = submit_pretrain(cluster, made_up_shards, run, steps)
    deadline = time.monotonic() + 240
    while not steps_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR1", job], env=cluster, check=True)
    wait_for_state(cluster, job, "PENDING", run=run)
    first = steps_of(run)
    assert 0 < len(first) < steps
    # Slurm holds a requeued job back for two minutes.
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], env=cluster, check=True)
    wait_for_state(cluster, job, "COMPLETED", run=run)
    assert steps_of(run) == list(range(1, steps + 1))
    assert "restart 1 of" in run.with_suffix(".log").read_text()
