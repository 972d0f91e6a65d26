"""`medblip doctor` finds what would stop a job, all of it at once; train.py asks the same before it builds anything."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from medblip import doctor
from medblip.config import TrainConfig
from medblip.doctor import FAIL, OK, WARNING, Finding
from medblip.progress import lock


@pytest.fixture
def job(made_up_shards, tmp_path) -> TrainConfig:
    """A job that nothing is wrong with."""
    return TrainConfig(
        data=str(made_up_shards),
        run=str(tmp_path / "run"),
        deepspeed_config=str(ROOT / "ds_configs/zero2_fp32.json"),
        global_batch=4,
        micro_batch=2,
    )


def examine(config: TrainConfig, ranks: int = 1) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in doctor.examine(config, ranks, is_ours=True):
        found.setdefault(finding.about, []).append(finding)
    return found


def faults(config: TrainConfig, ranks: int = 1) -> str:
    findings = doctor.examine(config, ranks, is_ours=True)
    return "\n".join(f"{f.about}: {f.found}: {f.advice}" for f in findings if f.state == FAIL)


def test_nothing_is_wrong_with_a_good_job(job):
    found = examine(job)
    assert not faults(job)
    assert {"device", "shards", "batches", "DeepSpeed config", "run folder", "disk", "network"} <= found.keys()
    assert "global batch 4 = micro-batch 2 x accumulation 2 x 1 ranks" in found["batches"][0].found


def test_all_faults_are_told_at_once(job, tmp_path):
    engine = tmp_path / "engine.json"
    engine.write_text('{"zero_optimization": {"stagge": 2}}')
    wrong = dataclasses.replace(job, deepspeed_config=str(engine), patch_edge=20, lm=str(tmp_path / "nowhere"))
    told = faults(wrong)
    assert "unknown key 'stagge'; did you mean 'stage'" in told
    assert "volumes of 48 voxels are not divided by patches of 20" in told
    assert "nowhere: no such folder" in told


def test_a_shard_of_another_size_is_named(job, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(job.data, shards)
    with open(shards / "train-00000.tar", "ab") as file:
        file.write(b"\0")
    assert "train-00000.tar" in faults(dataclasses.replace(job, data=str(shards)))


def test_batches_that_the_ranks_do_not_divide_are_refused(job):
    assert "--global-batch 4 is not a multiple of the 3 ranks" in faults(job, ranks=3)


def test_a_full_disk_is_told_before_the_first_checkpoint(job, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    told = faults(job)
    assert "disk: 0.0 GB free, checkpoints of" in told and "--keep-checkpoints" in told


def test_a_run_folder_that_cannot_be_written_is_told(job, tmp_path):
    (tmp_path / "file").write_text("")
    assert "run folder" in faults(dataclasses.replace(job, run=str(tmp_path / "file/run")))


@pytest.mark.parametrize("content", ['{"state": "trai', "[1, 2]", "\0\xff"])
def test_a_damaged_status_is_said_and_stops_nothing(job, content):
    Path(job.run).mkdir()
    (Path(job.run) / "status.json").write_text(content)
    assert not faults(job)
    (told,) = examine(job)["run folder"]
    assert told.state == WARNING and "status.json is damaged" in told.found


def test_a_check_that_breaks_is_named_and_the_others_are_made(job, monkeypatch):
    def broken(config):
        yield Finding("network", OK, "so far")
        raise KeyError("rack")

    monkeypatch.setattr(doctor, "_network", broken)
    found = examine(job)
    assert (
        found["network"][1].state == WARNING
        and "could not be looked at (KeyError: 'rack')" in found["network"][1].found
    )
    assert "disk" in found


def test_other_shards_than_the_runs_are_named_with_both_values(job, made_up_shards):
    recipe = json.loads((made_up_shards / "index.json").read_text())["recipe"]
    Path(job.run).mkdir()
    before = {"recipe": recipe | {"spacing_mm": 9.0}}
    (Path(job.run) / "config.json").write_text(json.dumps(before))
    told = faults(job)
    assert f"spacing_mm is {recipe['spacing_mm']} in the shards and 9.0 in the model" in told
    assert "give the shards that the run was trained on, or a new --run" in told


def test_a_begun_runs_preset_is_known_and_another_is_refused_also_if_it_is_tiny(job, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_fingerprints", lambda config: iter(()))  # they take a trained run
    (Path(job.run) / "checkpoints/step-1").mkdir(parents=True)
    begun = {
        "train": dataclasses.asdict(job) | {"preset": "tiny-t5"},
        "schedule": {"steps": 2, "global_batch": 4, "accumulation": 2},
        "recipe": json.loads((Path(job.data) / "index.json").read_text())["recipe"],
    }
    (Path(job.run) / "config.json").write_text(json.dumps(begun))
    assert doctor.doctor(doctor.DoctorOptions(run=job.run)) == 0
    assert "global batch 4" in capsys.readouterr().out
    assert doctor.doctor(doctor.DoctorOptions(run=job.run, preset="tiny")) == 1
    assert "--preset was tiny-t5, now tiny" in capsys.readouterr().out


def test_looking_makes_no_folder(job, tmp_path):
    engine = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())
    engine["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "local/nvme")
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    found = examine(dataclasses.replace(job, deepspeed_config=str(tmp_path / "engine.json")))
    assert found["NVMe offload"][0].state == OK and found["run folder"][0].found.endswith("new")
    assert [path.name for path in tmp_path.iterdir()] == ["engine.json"]


def test_the_lowest_memory_limit_of_all_groups_above_counts(tmp_path):
    (tmp_path / "one/two").mkdir(parents=True)
    (tmp_path / "memory/job_7/step_0").mkdir(parents=True)
    (tmp_path / "one/memory.max").write_text("5000\n")
    (tmp_path / "one/two/memory.max").write_text("max\n")
    (tmp_path / "memory/job_7/memory.limit_in_bytes").write_text("3000\n")
    (tmp_path / "memory/job_7/step_0/memory.limit_in_bytes").write_text("9223372036854771712\n")
    groups = tmp_path / "cgroup"
    for lines, limits in (
        ("0::/one/two\n", [5000]),
        ("4:cpu,memory:/job_7/step_0\n1:name=systemd:/one/two\n", [9223372036854771712, 3000]),
        ("0::/not/seen/in/a/container\n", []),
    ):
        groups.write_text(lines)
        assert list(doctor._memory_limits(groups, tmp_path)) == limits


def test_weights_that_are_not_here_are_named_with_the_command_that_fetches_them(job, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDBLIP_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    told = faults(dataclasses.replace(job, preset="biomedlm", patch_edge=16))
    assert told.count("medblip fetch --preset biomedlm") == 3


def test_half_a_checkpoint_is_found_without_loading_it(job, tmp_path):
    folder = tmp_path / "lm"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    weights = {"weight_map": {"wte.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    assert "model-00002-of-00002.safetensors" in faults(dataclasses.replace(job, lm=str(folder)))


def test_what_needs_a_network_is_said(job):
    [network] = examine(dataclasses.replace(job, wandb="project"))["network"]
    assert network.state == WARNING and "WANDB_MODE=offline" in network.found
    assert examine(job)["network"][0].state == OK


def test_nvme_offload_needs_libaio_and_a_folder_that_can_be_written(job, tmp_path, monkeypatch):
    engine = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())
    (tmp_path / "file").write_text("")
    engine["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "file")
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    assert "NVMe offload" in faults(dataclasses.replace(job, deepspeed_config=str(tmp_path / "engine.json")))
    engine["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    monkeypatch.setattr(doctor, "LIBAIO_HEADERS", (str(tmp_path / "libaio.h"),))
    told = faults(dataclasses.replace(job, deepspeed_config=str(tmp_path / "engine.json")))
    assert "libaio.h" in told and "apt-get install libaio-dev" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPUs here")
def test_a_gpu_that_torch_does_not_see_ends_a_job_unless_it_is_hidden(job, monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "sees no GPU" in faults(job)
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not faults(job)
        first = examine(job)["device"][0]
        assert first.state == WARNING and f"CUDA_VISIBLE_DEVICES={hidden} hides" in first.found


def test_too_few_open_files_and_too_little_shared_memory_are_warned_of(job, monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 4096))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    found = examine(job, ranks=2)
    assert found["open files"][0].state == WARNING and "ulimit" in found["open files"][0].advice
    assert found["/dev/shm"][0].state == WARNING and "shm-size" in found["/dev/shm"][0].advice


def test_train_refuses_a_job_with_several_faults_in_one_message(job, tmp_path):
    engine = tmp_path / "engine.json"
    engine.write_text('{"bf16": {"enabeld": true}}')
    command = [sys.executable, "train.py", "--deepspeed_config", engine, "--data", job.data, "--run", job.run]
    command += ["--lm", tmp_path / "nowhere"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "2 things would stop this job" in done.stderr and "Traceback" not in done.stderr
    assert "enabeld" in done.stderr and "nowhere" in done.stderr
    assert not (Path(job.run) / "checkpoints").exists()


def test_the_command_compares_the_frozen_towers_and_sees_another_job(job, medblip):
    command = [sys.executable, "train.py", "--deepspeed_config", job.deepspeed_config, "--data", job.data]
    command += ["--run", job.run, "--steps", "1", "--global-batch", "4"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    code, stdout, stderr = medblip("doctor", "--run", job.run, "--json")
    found = json.loads(stdout)
    assert code == 0 and all(finding["state"] != FAIL for finding in found), stdout + stderr
    assert sum(finding["about"] == "frozen towers" for finding in found) == 2

    settings = json.loads((Path(job.run) / "config.json").read_text())
    settings["frozen"]["vision"] = "0" * 16
    (Path(job.run) / "config.json").write_text(json.dumps(settings))
    with lock(Path(job.run)):
        code, stdout, _ = medblip("doctor", "--run", job.run)
    assert code == 1
    assert f"vision was {'0' * 16} at the start of the run, now" in stdout
    assert "another job is training here" in stdout


def test_it_answers_where_nothing_is_given(medblip):
    code, stdout, stderr = medblip("doctor")
    assert code == 0 and "0 FAIL" in stdout, stdout + stderr
    assert "made here once from a seed" in stdout
