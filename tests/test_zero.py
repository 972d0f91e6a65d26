"""Every ZeRO stage trains the same model: same losses, frozen weights untouched, every trainable weight moved."""

import copy
import functools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_port, require_tool
from safetensors.torch import load_file

import train
from medblip.config import TrainConfig
from medblip.data import Loader, SampleStream, to_device
from medblip.doctor import LIBAIO_HEADERS
from medblip.model import MedBLIP, trainable
from medblip.optim import build_optimizer, set_learning_rate
from medblip.schedule import plan_schedule, positions
from medblip.shards import Reader, ShardIndex
from medblip.words import build_words

STEPS, GLOBAL_BATCH = 20, 4
LEARNING_RATE = 5e-5  # at the preset's, Adam blows rounding up to visible differences within a few steps
# Largest difference of a loss from the plain loop in the same precision, over 20 steps. Measured: float32 5e-6 (sums in
# another order), bf16 0.03 to 0.08 (every product is rounded, and Adam makes more of it from step to step).
# Half of the steps must stay within a third of the tolerance.
TOLERANCE_FP32, TOLERANCE_BF16 = 1e-4, 0.3
BF16 = ["zero1", "zero2", "zero3", "zero3_offload"]


def train_on_ranks(shards, run, engine, steps=STEPS, ranks=2, stop_after=0, options=(), **variables):
    path = engine if isinstance(engine, Path) else f"ds_configs/{engine}.json"
    launcher = Path(sys.executable).with_name("deepspeed")
    command = (
        f"{launcher} --num_gpus {ranks} --master_port {free_port()} tests/zero_worker.py --preset tiny --dropout 0"
    )
    command += f" --deepspeed_config {path} --data {shards} --run {run} --steps {steps}"
    command += f" --learning-rate {LEARNING_RATE} --lora-learning-rate {LEARNING_RATE}"
    command += f" --global-batch {GLOBAL_BATCH} --micro-batch {GLOBAL_BATCH // ranks}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "STOP_AFTER": str(stop_after)} | variables
    done = subprocess.run([*command.split(), *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (stop_after == 0), done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(Path(run).glob("frozen-rank*.json"))]


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@functools.cache
def plain_losses(shards, precision, learning_rate=LEARNING_RATE):
    """One process, torch's AdamW on float32 weights, no DeepSpeed; forward and backward on a copy in `precision`."""
    config = TrainConfig(
        data=str(shards),
        run="",
        deepspeed_config="",
        steps=STEPS,
        global_batch=GLOBAL_BATCH,
        micro_batch=GLOBAL_BATCH,
        dropout=0.0,
        learning_rate=learning_rate,
        lora_learning_rate=learning_rate,
    )
    index = ShardIndex(shards)
    samples = index.samples("train")
    schedule, _ = plan_schedule(config, len(samples), 1)
    torch.manual_seed(config.seed)
    copy_of = MedBLIP(config.model_config(), index.grid_size, torch.device("cpu")).to(precision)
    master = copy.deepcopy(copy_of).float()
    optimizer = build_optimizer(master, schedule, torch.device("cpu"))
    loader = Loader(
        Reader(index, 1),
        samples,
        SampleStream([sample.shard for sample in samples], config.seed),
        build_words(config.model_config()),
        partial(train.draw_words, config),
        positions(0, schedule, 0, 1),
        config.seed,
        pin=False,
        questions=schedule.questions_per_scan,
    )
    losses = []
    pairs = [(trainable(master)[name], parameter) for name, parameter in trainable(copy_of).items()]
    for step in range(STEPS):
        set_learning_rate(optimizer, schedule, step)
        batch = to_device(next(loader), index.grid_size, torch.device("cpu"), precision, config.seed)
        copy_of.zero_grad()
        loss = copy_of(batch)["loss"]
        loss.backward()
        for weight, copied in pairs:
            weight.grad = copied.grad.float()
        torch.nn.utils.clip_grad_norm_(trainable(master).values(), 1.0)
        optimizer.step()
        for weight, copied in pairs:
            copied.data.copy_(weight.data)
        losses.append(loss.item())
    loader.close()
    return losses


def check(run, fingerprints, plain, tolerance, shards):
    frozen = json.loads((run / "config.json").read_text())["frozen"]
    assert fingerprints == [frozen, frozen], "a frozen weight changed"
    moments = load_file(run / f"checkpoints/step-{STEPS}/exp_avg.safetensors")
    assert len(moments) > 50
    for name, moment in moments.items():
        assert moment.isfinite().all(), f"{name}: a gradient was not finite"
        assert moment.abs().sum() > 0, f"{name}: never had a gradient"
    found = losses_of(run)
    differences = [abs(a - b) for a, b in zip(found, plain, strict=True)]
    assert max(differences) < tolerance and max(differences[: STEPS // 2]) < tolerance / 3
    untrained = plain_losses(shards, torch.float32, 0.0)
    assert sum(found[-5:]) < sum(untrained[-5:]), "the same samples cost as much as without training"


def test_two_ranks_in_float32_follow_the_plain_loop(made_up_shards, tmp_path):
    fingerprints = train_on_ranks(made_up_shards, tmp_path / "run", "zero2_fp32")
    check(tmp_path / "run", fingerprints, plain_losses(made_up_shards, torch.float32), TOLERANCE_FP32, made_up_shards)


@pytest.mark.slow
@pytest.mark.parametrize("engine", BF16)
def test_every_ds_config_follows_the_plain_loop(made_up_shards, tmp_path, engine):
    fingerprints = train_on_ranks(made_up_shards, tmp_path / "run", engine)
    check(tmp_path / "run", fingerprints, plain_losses(made_up_shards, torch.bfloat16), TOLERANCE_BF16, made_up_shards)


@pytest.fixture(scope="module")
def undisturbed(made_up_shards, tmp_path_factory):
    """The run of 12 steps with an engine, made once."""

    @functools.cache
    def run(engine):
        folder = tmp_path_factory.mktemp("undisturbed") / engine
        train_on_ranks(made_up_shards, folder, engine, steps=12)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "ranks"), [("zero2", "zero3", 2), ("zero3_offload", "zero1", 2), ("zero2", "zero2", 1)]
)
def test_a_run_goes_on_at_another_stage_or_world_size(made_up_shards, undisturbed, tmp_path, first, then, ranks):
    whole, changed = undisturbed(first), tmp_path / "changed"
    train_on_ranks(made_up_shards, changed, first, steps=12, stop_after=6)
    assert (changed / "latest").read_text().strip() == "step-6"
    train_on_ranks(made_up_shards, changed, then, steps=12, ranks=ranks)
    one, other = losses_of(whole), losses_of(changed)
    assert one[:6] == other[:6], "two equal runs differ"
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < TOLERANCE_BF16
    assert abs(one[6] - other[6]) < 0.01, "the first step after the change starts from other weights"


def small(engine, folder, **zero) -> Path:
    """A stage 3 config that divides the tiny preset's weights too; as it is, nearly all are small enough to stay."""
    content = json.loads((ROOT / f"ds_configs/{engine}.json").read_text())
    content["zero_optimization"] |= {"stage3_param_persistence_threshold": 1000} | zero
    if "aio" in content:
        content["aio"]["block_size"] = 4096
    (folder / f"{engine}.json").write_text(json.dumps(content))
    return folder / f"{engine}.json"


def trained(run, steps) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / f"checkpoints/step-{steps}").glob("*.safetensors")}


def assert_same_training(one, other, steps):
    assert losses_of(one) == losses_of(other)
    assert len(trained(one, steps)) == 3 and trained(one, steps) == trained(other, steps)


@pytest.mark.slow
def test_weights_on_a_second_copy_in_each_node_train_alike(made_up_shards, tmp_path):
    """Two groups of two ranks each, as two nodes."""
    whole, copied = tmp_path / "whole", tmp_path / "copied"
    train_on_ranks(made_up_shards, whole, small("zero3", tmp_path), steps=8, ranks=4)
    engine = small("zero3_hpz", tmp_path, zero_hpz_partition_size=2)
    train_on_ranks(made_up_shards, copied, engine, steps=8, ranks=4)
    assert_same_training(whole, copied, 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a new machine DeepSpeed compiles its op first: minutes
@pytest.mark.parametrize("checkpointing", [(), ("--activation-checkpointing", "True")], ids=["kept", "recomputed"])
def test_weights_on_a_disk_train_as_those_in_memory_do(made_up_shards, tmp_path, checkpointing):
    require_tool("c++", "apt-get install g++")
    if not any(map(os.path.exists, LIBAIO_HEADERS)):
        message = "libaio.h is not here (apt-get install libaio-dev)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    train_on_ranks(made_up_shards, memory, small("zero3_offload", tmp_path), steps=8, options=checkpointing)
    nvme = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())["zero_optimization"]["offload_param"]
    nvme |= {"nvme_path": str(tmp_path / "nvme"), "buffer_size": 1_000_000}  # as many buffers as in the file
    engine = small("zero3_nvme", tmp_path, offload_param=nvme)
    train_on_ranks(made_up_shards, disk, engine, steps=8, options=checkpointing, SWAP_FROM_BYTES="4096")
    swapped = [path.stat().st_size for path in (tmp_path / "nvme").rglob("*") if path.is_file()]
    assert len(swapped) > 50 and min(swapped) >= 4096, "nothing was on the disk"
    assert_same_training(memory, disk, 8)
