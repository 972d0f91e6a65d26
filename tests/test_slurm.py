"""slurm/*.sh on a real Slurm of two nodes: whatever ends a job early, it goes on as if nothing had happened.

What is disturbed is compared with a run that was not: the same steps with the same losses, the same bytes of weights
and moments, a ledger in which every sample stands once.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, require_tool
from csv_files import edit
from slurm_cluster import slurm_cluster

from medblip.checkpoint import TENSORS

pytestmark = pytest.mark.slow

STEPS = 24
CHANGES_WITH_TIME = {"samples_per_s", "data_wait_fraction", "save_stall_s"}
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    for tool in ("slurmctld", "slurmd", "sbatch", "munged"):
        require_tool(tool, "on Debian: apt-get install slurm-wlm munge")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env:
        path = f"{ROOT / 'tests/slow_disk'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        # All nodes are this machine, and their names resolve nowhere.
        yield env | {"MEDBLIP_VENV": sys.prefix, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path}


@dataclass
class Job:
    """A job of slurm/pretrain.sh; `log` is the job's own."""

    env: dict[str, str]
    run: Path
    log: Path
    id: str

    def slurm(self, *command) -> str:
        return slurm(self.env, *command)

    @property
    def shown(self) -> dict[str, str]:
        words = self.slurm("scontrol", "-o", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, *states, timeout_s=240) -> None:
        """Returns when the job is in one of the states; fails with its log when it ends in another, or never does."""
        self.wait_until(lambda: self.shown["JobState"] in states, timeout_s, but_not=set(ENDED) - set(states))

    def wait_until(self, condition, timeout_s=240, but_not=ENDED) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            state = self.shown["JobState"]
            if (state in but_not and not condition()) or time.monotonic() > deadline:
                logs = [self.log, *sorted(self.run.glob("logs/*.log"))]
                pytest.fail(f"{state}\n" + "\n".join(path.read_text()[-3000:] for path in logs if path.exists()))
            time.sleep(0.3)

    def wait_until_it_trains(self, steps=5) -> None:
        """Until a checkpoint is there, and training is past it."""
        self.wait_until(lambda: len(steps_of(self.run)) >= steps and (self.run / "latest").exists())

    def start_again(self, *changes) -> None:
        """Waits until the job is back in the queue, where Slurm would hold it for two minutes, and lets it go."""
        self.wait_for("PENDING")
        self.slurm("scontrol", "update", f"jobid={self.id}", "starttime=now", *changes)


def slurm(env, *command, cwd=ROOT) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def python(*command) -> str:
    """What a command of the product prints, here and not as a job."""
    done = subprocess.run([*map(str, (sys.executable, *command))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(cluster, shards, run, *sbatch_options, cwd=ROOT, **variables) -> Job:
    """`sbatch slurm/pretrain.sh` from the folder `cwd`, for two nodes without GPUs."""
    command = ["sbatch", "--parsable", f"--output={run}.log", "-N2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    command += ["--gpus-per-node=0", *sbatch_options, ROOT / "slurm/pretrain.sh", "--preset", "tiny"]
    command += ["--data", shards, "--run", run, "--steps", STEPS, "--checkpoint-every", 4]
    return Job(cluster, cwd / run, cwd / f"{run}.log", slurm(cluster | variables, *command, cwd=cwd))


def steps_of(run) -> list[int]:
    """The steps in metrics.jsonl, complete lines only."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def losses_of(run) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in CHANGES_WITH_TIME} for record in records]


def ledger_of(run) -> dict:
    return json.loads(python("-m", "medblip.cli", "ledger", run, "--json"))


def assert_same(run, undisturbed) -> None:
    """Each step once, the same numbers, the same bytes in the end."""
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert losses_of(run) == losses_of(undisturbed)
    ledger = ledger_of(run)
    assert ledger["steps"] == STEPS and not ledger["faults"] and not ledger["skipped"]
    for name in TENSORS.values():
        one, other = (folder / f"checkpoints/step-{STEPS}" / name for folder in (run, undisturbed))
        assert one.read_bytes() == other.read_bytes(), f"{name} differs"


@pytest.fixture
def slow_disk(tmp_path):
    """Reading is slow until `read` is removed, so that there is time to disturb the run."""
    switches = tmp_path / "switches"
    switches.mkdir()
    (switches / "read").write_text("0.2")
    yield switches
    shutil.rmtree(switches)


@pytest.fixture(scope="module")
def undisturbed(cluster, made_up_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    submit(cluster, made_up_shards, run).wait_for("COMPLETED")
    return run


@pytest.fixture
def job(cluster, made_up_shards, tmp_path, slow_disk):
    job = submit(cluster, made_up_shards, tmp_path / "run", "--signal=USR1@120", SLOW_DISK=str(slow_disk))
    yield job
    subprocess.run(["scancel", "--full", job.id], env=cluster)
    subprocess.run(["scontrol", "update", "PartitionName=low", "GraceTime=60"], env=cluster)


def test_it_trains_two_nodes_to_the_end_with_a_log_for_each_rank(cluster, undisturbed):
    assert_same(undisturbed, undisturbed)
    log = undisturbed.with_suffix(".log").read_text()
    assert "newest checkpoint: none" in log and f"done: {STEPS} steps" in log
    assert [path.name.split("-")[1] for path in sorted(undisturbed.glob("logs/*.log"))] == ["rank0.log", "rank1.log"]


def test_an_evaluation_on_two_nodes_says_what_one_process_says(cluster, undisturbed, medblip, tmp_path):
    python("-m", "sharding.madeup", "--out", tmp_path, "--subjects", 6, "--cohort", "OTHERS", "--workers", 1)
    edit(tmp_path / "manifest.csv", lambda rows: [row | {"split": "test"} for row in rows])
    manifest, size = ["--manifest", tmp_path / "manifest.csv"], ["--size", 48, "--spacing-mm", 4.5]
    python("-m", "sharding.build", *manifest, "--out", tmp_path / "shards", *size)
    asked = ["--model", undisturbed, "--data", tmp_path / "shards", "--split", "test", "--seed", 1]
    job = ["sbatch", "--wait", f"--output={tmp_path}/job.log", "-N2", "--cpus-per-task=1", "--gpus-per-node=0"]
    slurm(cluster, *job, ROOT / "slurm/evaluate.sh", *asked, "--out", tmp_path / "nodes")
    code, _, stderr = medblip("evaluate", *asked, "--out", tmp_path / "one")
    assert code == 0, stderr
    for name in ("report.json", "predictions.csv"):
        assert (tmp_path / "nodes" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_preempted_job_saves_makes_room_and_goes_on(job, undisturbed, slow_disk):
    job.wait_until_it_trains()
    urgent = job.slurm("sbatch", "--parsable", "-phigh", "-N2", "--output=/dev/null", "--wrap=sleep 3")
    job.start_again()
    (slow_disk / "read").unlink()
    stopped_after = steps_of(job.run)[-1]
    assert (job.run / "latest").read_text().strip() == f"step-{stopped_after}" and stopped_after < STEPS
    assert json.loads((job.run / "status.json").read_text())["stopped_by"] == ["SIGTERM"]
    job.wait_for("COMPLETED")
    assert "JobState=COMPLETED" in job.slurm("scontrol", "show", "job", urgent)
    assert f"ended early with 85, newest checkpoint: step-{stopped_after}; back into the queue" in job.log.read_text()
    assert_same(job.run, undisturbed)
    assert ledger_of(job.run)["restarts"] == 1 and ledger_of(job.run)["steps_done_again"] == 0


def test_a_grace_time_that_ends_within_a_save_costs_no_more_than_the_steps_since_the_last(job, undisturbed, slow_disk):
    job.slurm("scontrol", "update", "PartitionName=low", "GraceTime=15")
    job.wait_until_it_trains()
    (slow_disk / "save").touch()
    job.slurm("sbatch", "-phigh", "-N2", "--output=/dev/null", "--wrap=sleep 3")
    job.start_again()
    before = (job.run / "latest").read_text().strip()
    assert list(job.run.glob("checkpoints/.step-*.unfinished")), "the kill did not come within the save"
    for switch in ("save", "read"):
        (slow_disk / switch).unlink()
    job.wait_for("COMPLETED")
    assert f"start 2 on n[1-2], newest checkpoint: {before}" in job.log.read_text()
    assert_same(job.run, undisturbed)
    assert ledger_of(job.run)["steps_done_again"] > 0


def test_a_job_at_its_time_limit_saves_and_goes_on(job, undisturbed, slow_disk):
    job.wait_until_it_trains()
    (slow_disk / "read").write_text("3")  # Slurm looks twice a minute at the time
    hours, minutes, _ = job.shown["RunTime"].split(":")
    job.slurm("scontrol", "update", f"jobid={job.id}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")
    job.start_again("TimeLimit=30")
    (slow_disk / "read").unlink()
    assert json.loads((job.run / "status.json").read_text())["stopped_by"] == ["SIGUSR1"]
    assert steps_of(job.run)[-1] < STEPS
    job.wait_for("COMPLETED")
    assert_same(job.run, undisturbed)
    assert ledger_of(job.run)["steps_done_again"] == 0


def test_scontrol_requeue_goes_on(job, undisturbed, slow_disk):
    job.wait_until_it_trains()
    job.slurm("scontrol", "requeue", job.id)
    job.start_again()
    (slow_disk / "read").unlink()
    job.wait_for("COMPLETED")
    assert job.shown["Restarts"] == "1"
    assert_same(job.run, undisturbed)


def test_a_rank_that_is_killed_brings_the_job_back(job, undisturbed, slow_disk):
    job.wait_until_it_trains()
    os.kill(process_of(job.id, rank=1), signal.SIGKILL)
    job.start_again()
    (slow_disk / "read").unlink()
    job.wait_for("COMPLETED")
    assert_same(job.run, undisturbed)


def process_of(job_id, rank) -> int:
    """The process of a rank of a job on this machine."""
    wanted = {f"SLURM_JOB_ID={job_id}", f"SLURM_PROCID={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((process / "environ").read_text().split("\0"))
            if wanted <= variables and "train.py" in (process / "cmdline").read_text():
                return int(process.name)
        except OSError:
            continue
    raise LookupError(f"no process of rank {rank} of job {job_id}")


def test_scancel_is_the_last_word(job):
    job.wait_until_it_trains()
    job.slurm("scancel", job.id)
    job.wait_for("CANCELLED")
    time.sleep(3)
    assert job.shown["JobState"] == "CANCELLED" and job.shown["Restarts"] == "0"
    assert "back into the queue" not in job.log.read_text()


def test_the_stop_file_is_no_reason_to_queue_again_and_another_submit_goes_on_from_there(
    cluster, made_up_shards, job, undisturbed, slow_disk, tmp_path
):
    job.wait_until_it_trains()
    (job.run / "stop").touch()
    job.slurm("scancel", "--signal=USR1", job.id)  # whichever the ranks notice first
    job.wait_for("COMPLETED")
    (slow_disk / "read").unlink()
    assert job.shown["Restarts"] == "0" and job.shown["ExitCode"] == "0:0"
    assert f"stopped by the file {job.run}/stop" in job.log.read_text()
    assert steps_of(job.run)[-1] < STEPS
    # From another folder, in a container and with shards on the node's own disk.
    stage, folder = tmp_path / "stage", tmp_path / "elsewhere"
    folder.mkdir()
    again = submit(
        cluster,
        os.path.relpath(made_up_shards, folder),
        Path("../run"),
        cwd=folder,
        MEDBLIP_STAGE=str(stage),
        **container(tmp_path, 'shift 3; echo "in the container"; exec "$@"'),
    )
    again.wait_for("COMPLETED")
    assert_same(job.run, undisturbed)
    (copied,) = stage.iterdir()
    assert {path.name: path.stat().st_size for path in made_up_shards.iterdir()} == {
        path.name: path.stat().st_size for path in copied.iterdir() if path.name != ".lock"
    }
    assert "in the container" in (job.run / f"logs/{again.id}-rank1.log").read_text()


def container(folder, script) -> dict[str, str]:
    """Variables of a job whose `apptainer` is a shell script."""
    program = folder / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    path = f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"MEDBLIP_CONTAINER": "medblip.sif", "PATH": path}


def test_starts_that_lead_nowhere_end_and_those_that_get_on_do_not(cluster, tmp_path):
    # A repository whose env.sh a user has edited; `bash` takes nodes and container from there.
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    with open(tmp_path / "slurm/env.sh", "a") as file:
        file.write("MEDBLIP_SIZE=(-N2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0)\n")
        file.write("MEDBLIP_CLUSTER=(--partition=low --job-name=mine)\n")
    # Every start is ended early; the third has saved something.
    script = 'if [ "${SLURM_RESTART_COUNT:-0}" -eq 2 ]; then echo step-4 > run/latest; fi; exit 85'
    # As left by an earlier job; ranks that are stopped before they meet do not touch it.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/status.json").write_text(json.dumps({"state": "stopped", "stopped_by": ["the stop file"]}))
    command = ["bash", "slurm/pretrain.sh", "--preset", "tiny", "--data=shards", "--run=run"]
    submitted = slurm(cluster | container(tmp_path, script), *command, cwd=tmp_path)
    number = submitted.split()[-1]
    job = Job(cluster, tmp_path / "run", tmp_path / f"mine-{number}.log", number)
    for restarts in "12345":
        job.wait_until(lambda restarts=restarts: job.shown["Restarts"] == restarts)
        job.start_again()
    job.wait_for("FAILED")
    assert job.shown["Restarts"] == "5" and job.shown["ExitCode"] == "85:0"
    assert "3 starts in a row without a new checkpoint (newest: step-4)" in job.log.read_text()


def test_starts_that_slurm_ends_itself_count_too(cluster, made_up_shards, tmp_path):
    job = submit(cluster, made_up_shards, tmp_path / "run", **container(tmp_path, "exec sleep 600"))
    for restarts in "123":
        starts = tmp_path / f"run/logs/{job.id}.starts"
        job.wait_until(lambda n=int(restarts), path=starts: path.exists() and len(path.read_text().splitlines()) == n)
        job.slurm("scontrol", "requeue", job.id)
        job.wait_until(lambda restarts=restarts: job.shown["Restarts"] == restarts)
        job.start_again()
    job.wait_for("FAILED")
    assert job.shown["ExitCode"] == "1:0" and "3 starts in a row without a new checkpoint" in job.log.read_text()
