"""train.py as a user runs it: it resumes exactly, stops politely, and tells nobody's record."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, free_port

STATE_FILES = ("weights.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors")
UNINTERRUPTED = ("--steps", "8", "--checkpoint-every", "3", "--ehr", "staging")
CHANGES_WITH_TIME = {"samples_per_s", "data_wait_fraction", "save_stall_s"}


def train_command(shards, run, *options, launcher=(sys.executable,), engine="zero2_fp32"):
    command = [*launcher, "train.py", "--deepspeed_config", f"ds_configs/{engine}.json", "--preset", "tiny"]
    return [*command, "--data", str(shards), "--run", str(run), "--global-batch", "4", "--micro-batch", "2", *options]


def run_training(shards, run, *options, code=0, environment=None, **how):
    command = train_command(shards, run, *map(str, options), **how)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | (environment or {}))
    assert done.returncode == code, done.stderr[-3000:]
    return done


def metrics(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in CHANGES_WITH_TIME} for record in records]


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before the moment came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(made_up_shards, tmp_path_factory):
    """Of the highest tier, so that there is most that it must not tell; `printed` beside it is what it printed."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = run_training(made_up_shards, run, *UNINTERRUPTED)
    run.with_name("printed").write_text(done.stdout + done.stderr)
    return run


def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(made_up_shards, uninterrupted, tmp_path):
    run = tmp_path / "killed"
    process = subprocess.Popen(
        train_command(made_up_shards, run, *UNINTERRUPTED), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    # Past the checkpoint of step 3, so that steps are redone, with a torn line at the end of the metrics.
    wait_for(lambda: (run / "latest").exists() and len(metrics_lines(run)) >= 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "los')
    again = run_training(made_up_shards, run, *UNINTERRUPTED)
    assert "going on from" in again.stderr
    assert metrics(run) == metrics(uninterrupted)
    assert [record["step"] for record in metrics(run)] == list(range(1, 9))
    for name in STATE_FILES:
        one, other = (folder / "checkpoints" / "step-8" / name for folder in (run, uninterrupted))
        assert one.read_bytes() == other.read_bytes(), f"{name} differs"


def metrics_lines(run):
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_training_ends_with_a_save_and_a_finished_run_stays_as_it_is(made_up_shards, uninterrupted):
    assert (uninterrupted / "latest").read_text().strip() == "step-8"
    assert json.loads((uninterrupted / "status.json").read_text())["state"] == "done"
    weights = uninterrupted / "checkpoints/step-8/weights.safetensors"
    before = (weights.read_bytes(), metrics(uninterrupted))
    run_training(made_up_shards, uninterrupted, *UNINTERRUPTED)
    assert (weights.read_bytes(), metrics(uninterrupted)) == before


def test_the_checkpoint_holds_what_training_changed_and_nothing_else(uninterrupted):
    from safetensors import safe_open

    folder = uninterrupted / "checkpoints/step-8"
    num_values = 0
    for name in STATE_FILES:
        with safe_open(folder / name, "pt") as file:
            num_values += sum(file.get_tensor(key).numel() for key in file.keys())
            assert not any("encoder.layers" in key or "wte" in key or "lm_head" in key for key in file.keys())
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert size_bytes <= 1.05 * 4 * num_values


def test_other_options_on_resume_are_refused_by_name_and_value(made_up_shards, uninterrupted):
    refused = run_training(made_up_shards, uninterrupted, "--steps", 8, "--ehr", "cognition", code=1)
    assert "--ehr was staging, now cognition" in refused.stderr


@pytest.mark.parametrize("content", [None, '{"train": {"data'])
def test_without_the_options_of_the_checkpoints_nothing_goes_on(content, tmp_path):
    from medblip.config import TrainConfig
    from medblip.progress import keep_schedule

    (tmp_path / "checkpoints/step-3").mkdir(parents=True)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: missing or damaged"):
        keep_schedule(tmp_path, TrainConfig(data="", run=str(tmp_path), deepspeed_config=""), 1)


def test_after_a_damaged_checkpoint_the_one_before_is_used_out_loud_and_the_end_is_the_same(
    made_up_shards, uninterrupted, tmp_path
):
    run = tmp_path / "damaged"
    shutil.copytree(uninterrupted, run)
    flip_a_bit(run / "checkpoints/step-8/weights.safetensors")
    (run / "latest").unlink()
    log = run_training(made_up_shards, run, *UNINTERRUPTED).stderr
    assert "not used: " in log and "step-8/weights.safetensors: missing or damaged" in log
    assert "latest is missing" in log and "going on from the newest whole checkpoint, step-6" in log
    assert metrics(run) == metrics(uninterrupted)
    for name in STATE_FILES:
        assert (run / "checkpoints/step-8" / name).read_bytes() == (
            uninterrupted / "checkpoints/step-8" / name
        ).read_bytes()
    ledger = json.loads(
        subprocess.run(
            [sys.executable, "-m", "medblip.cli", "ledger", str(run), "--json"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert (ledger["steps"], ledger["restarts"], ledger["steps_done_again"], ledger["faults"]) == (8, 1, 2, [])
    for folder in (run / "checkpoints").iterdir():
        flip_a_bit(folder / "state.json")
    refused = run_training(made_up_shards, run, *UNINTERRUPTED, code=1).stderr
    assert "step-8/state.json" in refused and "step-6/state.json" in refused and "take another --run" in refused
    shutil.rmtree(run / "checkpoints")
    assert "once saved a checkpoint" in run_training(made_up_shards, run, *UNINTERRUPTED, code=1).stderr


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# The volumes of the second step are not numbers.
POISONED = """
import train
from medblip import data
real, calls = data.to_device, []
def to_device(*rest):
    batch = real(*rest)
    calls.append(0)
    if len(calls) == 3:  # accumulation is 2: the first micro-step of step 2
        batch.volume_BXYZ.fill_(float("nan"))
    return batch
data.to_device = to_device
raise SystemExit(train.main())
"""


def test_a_step_that_is_not_finite_changes_nothing_is_named_and_only_that_step_is_skipped(made_up_shards, tmp_path):
    run = tmp_path / "poisoned"
    command = train_command(made_up_shards, run, "--steps", "4", "--checkpoint-every", "1", "--keep-checkpoints", "9")
    command[1:2] = ["-c", POISONED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2 is skipped: a loss or a gradient is not finite" in done.stderr
    assert [record.get("steps_skipped", 0) for record in metrics(run)] == [0, 1, 1, 1]
    saved = [[(run / f"checkpoints/step-{step}" / name).read_bytes() for name in STATE_FILES] for step in range(1, 5)]
    assert saved[0] == saved[1] and saved[1] != saved[2] and saved[2] != saved[3]
    events = [json.loads(line) for line in (run / "ledger/events.jsonl").read_text().splitlines()]
    assert [(event["step"], len(event["keys"])) for event in events if event["what"] == "step skipped"] == [(2, 4)]


@pytest.mark.parametrize("received", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_saves_and_says_how_to_go_on(made_up_shards, tmp_path, received):
    run = tmp_path / "stopped"
    process = subprocess.Popen(
        train_command(made_up_shards, run, "--steps", "5000"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(metrics_lines(run)) >= 2, process)
    process.send_signal(received)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 85, log[-2000:]
    assert f"stopped by {received.name}" in log and "the same command goes on from there" in log
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (run / "latest").read_text().strip() == f"step-{status['step']}" == f"step-{metrics(run)[-1]['step']}"


def test_no_text_of_a_record_is_written_or_shown(made_up_shards, uninterrupted):
    from medblip.shards import Reader, ShardIndex
    from medblip.text import render_record

    index = ShardIndex(made_up_shards)
    reader = Reader(index, 1)
    sentences = set()
    for sample in index.samples("train"):
        record = reader.record(sample)
        sentences |= set(render_record(record["fields"], record["report"], "staging").split(". "))
    assert sentences
    everything = uninterrupted.with_name("printed").read_text()
    assert "step 8/8" in everything
    everything += "".join(p.read_text(errors="replace") for p in uninterrupted.rglob("*") if p.is_file())
    assert not [sentence for sentence in sentences if sentence in everything]


def test_a_dry_run_shows_samples_and_trains_nothing(made_up_shards, tmp_path):
    run = tmp_path / "dry"
    done = run_training(made_up_shards, run, "--dry-run", 3, "--ehr", "cognition")
    assert done.stdout.count("prompt:") == done.stdout.count("tokens:") == 6  # two questions a scan
    assert "counts in the loss" in done.stdout and "Question:" in done.stdout
    pictures = list((run / "dry-run").glob("*.png"))
    assert len(pictures) == 3 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert not (run / "checkpoints").exists()


def test_two_jobs_never_train_in_one_run_folder(made_up_shards, tmp_path):
    from medblip.progress import lock

    held = lock(tmp_path / "run")
    refused = run_training(made_up_shards, tmp_path / "run", "--steps", 2, code=1)
    assert "another job is training here" in refused.stderr
    held.close()


def test_ranks_that_cannot_meet_say_where_and_end_with_86(made_up_shards, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        done = run_training(made_up_shards, tmp_path / "run", code=86, environment=ranks | address)
    assert f"the ranks did not meet at 127.0.0.1:{address['MASTER_PORT']}" in done.stderr
    assert "in use" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_wrong_usage_is_exit_code_2_with_the_nearest_name(made_up_shards, tmp_path):
    done = run_training(made_up_shards, tmp_path / "run", "--step", 2, code=2)
    assert "--steps" in done.stderr
    assert "did you mean 'tiny'" in run_training(made_up_shards, tmp_path / "run", "--preset", "tinny", code=2).stderr


@pytest.mark.slow
def test_deepspeed_and_torchrun_start_the_same_training(made_up_shards, tmp_path):
    bin_folder = Path(sys.executable).parent
    launchers = {
        "deepspeed": (bin_folder / "deepspeed", "--num_gpus", "2", "--master_port", free_port()),
        "torchrun": (bin_folder / "torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "--"),
    }
    for name, launcher in launchers.items():
        run_training(made_up_shards, tmp_path / name, "--steps", 4, launcher=[*map(str, launcher)])
    assert metrics(tmp_path / "deepspeed") == metrics(tmp_path / "torchrun")


@pytest.mark.slow
def test_wandb_keeps_numbers_offline_and_is_off_without_a_key(made_up_shards, tmp_path):
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run_training(made_up_shards, tmp_path / "offline", "--steps", 2, "--wandb", "medblip-test", environment=quiet)
    assert list((tmp_path / "offline").glob("wandb/offline-run-*/*.wandb"))
    no_key = {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_API_KEY": ""}
    home = {"MEDBLIP_HOME": os.environ.get("MEDBLIP_HOME", str(Path.home() / ".cache/medblip"))}
    done = run_training(
        made_up_shards, tmp_path / "off", "--steps", 2, "--wandb", "medblip-test", environment=no_key | home
    )
    assert "wandb is off" in done.stderr and not (tmp_path / "off/wandb").exists()
