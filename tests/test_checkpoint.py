"""Which checkpoint is used, which are kept, and what a disk that fails does."""

import hashlib
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, free_port

from medblip import checkpoint
from medblip.distributed import Rank

MADE_OF = {"recipe": {"size": 48}, "global_batch": 4}
RANK = Rank(0, 1, 0, torch.device("cpu"))


def write(run, step, **state):
    tensors = {kind: {"w": torch.full((3,), float(step))} for kind in checkpoint.TENSORS}
    folder = checkpoint.write_folder(run, tensors, {"step": step, "adam_step": step, **MADE_OF, **state})
    checkpoint.point_latest(run, folder.name)
    return folder


@pytest.fixture
def run(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    return tmp_path


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def whole_files(run):
    """Contents of all files but those of an unfinished checkpoint."""
    paths = [path for path in run.rglob("*") if path.is_file() and ".unfinished" not in str(path)]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)


def truncate(path, _):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path, _):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", *checkpoint.TENSORS.values()])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(run, name, damage, caplog):
    for at in (0, 7, -1):
        path = run / "checkpoints/step-6" / name
        before = path.read_bytes()
        damage(path, at)
        caplog.clear()
        assert checkpoint.newest_whole(run, MADE_OF).name == "step-4"
        assert f"step-6/{name}" in caplog.text or (
            name == "manifest.json" and "manifest.json is missing" in caplog.text
        )
        assert "says 'step-6'; going on from step-4" in caplog.text
        path.write_bytes(before)
    assert checkpoint.newest_whole(run, MADE_OF).name == "step-6"


@pytest.mark.parametrize("content", [None, b"", b"step-2\n", b"step-99\n", b"nonsense", b"\xf3tep-6\n"])
def test_latest_missing_empty_stale_or_wrong_is_said_and_the_newest_is_used(run, content, caplog):
    (run / "latest").unlink()
    if content is not None:
        (run / "latest").write_bytes(content)
    assert checkpoint.newest_whole(run, MADE_OF).name == "step-6"
    assert str(run / "latest") in caplog.text and "step-6" in caplog.text


def test_a_checkpoint_of_another_config_is_named_with_both_values_and_the_one_before_is_used(run, caplog):
    write(run, 8, recipe={"size": 96})
    assert checkpoint.newest_whole(run, MADE_OF).name == "step-6"
    assert "step-8 does not fit: recipe was {'size': 96}, now {'size': 48}" in caplog.text


def test_there_is_never_a_silent_fresh_start(run):
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "state.json", 3)
    with pytest.raises(ValueError, match="step-6/state.json.*step-2/state.json.*another --run"):
        checkpoint.newest_whole(run, MADE_OF)
    for folder in (run / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with pytest.raises(ValueError, match="once saved a checkpoint"):
        checkpoint.newest_whole(run, MADE_OF)
    (run / "latest").unlink()
    (run / "status.json").write_text(json.dumps({"saved": 6}))
    with pytest.raises(ValueError, match="once saved a checkpoint"):
        checkpoint.newest_whole(run, MADE_OF)
    (run / "status.json").write_text(json.dumps({"saved": None}))
    assert checkpoint.newest_whole(run, MADE_OF) is None


def test_the_newest_and_every_mth_are_kept(run):
    for step in (8, 10, 12):
        write(run, step)
    (run / "checkpoints/.step-14.unfinished").mkdir()
    checkpoint.prune(run, keep=2, keep_every=4)
    assert files_of(run / "checkpoints") == ["step-10", "step-12", "step-4", "step-8"]
    checkpoint.prune(run, keep=1, keep_every=0)
    assert files_of(run / "checkpoints") == ["step-12"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("a fault of a library")])
def test_a_write_that_fails_is_a_warning_and_leaves_what_was_there(run, monkeypatch, caplog, failure):
    real, broken = checkpoint.save_file, [True]

    def save_file(tensors, path):
        real(tensors, path)
        if broken[0] and "exp_avg" in str(path):
            raise failure

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(
        checkpoint, "_collect", lambda engine, rank: {k: {"w": torch.ones(3)} for k in checkpoint.TENSORS}
    )
    monkeypatch.setattr(checkpoint, "_adam_step", lambda engine: 8)
    before = whole_files(run)
    writer = checkpoint.Writer(run, RANK, keep=2, saved_step=6)
    with caplog.at_level(logging.INFO):
        writer.save(None, {"step": 8, **MADE_OF})
        assert not writer.wait() and writer.saved_step == 6
    assert str(failure) in caplog.text and "training goes on" in caplog.text
    assert whole_files(run) == before
    assert checkpoint.newest_whole(run, MADE_OF).name == "step-6"
    broken[0] = False
    writer.save(None, {"step": 8, **MADE_OF})
    assert writer.wait() and checkpoint.newest_whole(run, MADE_OF).name == "step-8"


ENGINES = ("zero1", "zero2", "zero3", "zero3_offload")


def sizes_on_two_ranks(folder, cells):
    """Cell -> (bytes of its checkpoint, trainable weights, weights that share their memory with another)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["tests/checkpoint_worker.py", str(folder), *cells]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "sizes.json").read_text())


def assert_no_more_than_what_is_trained(sizes, cells):
    assert list(sizes) == cells
    for cell, (size_bytes, num_trainable, num_tied) in sizes.items():
        assert num_tied > 0, f"{cell}: no tied weight, so nothing is shown"
        needed_bytes = 3 * 4 * num_trainable  # float32: weights and two moments
        assert needed_bytes < size_bytes <= 1.05 * needed_bytes, f"{cell}: {size_bytes / needed_bytes:.3f} x"


def test_a_checkpoint_is_no_larger_than_what_is_trained(tmp_path):
    cells = ["tiny,zero2,lora", "tiny,zero3,frozen"]
    assert_no_more_than_what_is_trained(sizes_on_two_ranks(tmp_path, cells), cells)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "tiny-t5"])
@pytest.mark.parametrize("lora", ["lora", "frozen"])
def test_a_checkpoint_is_no_larger_than_what_is_trained_at_every_stage(tmp_path, preset, lora):
    cells = [f"{preset},{engine},{lora}" for engine in ENGINES]
    assert_no_more_than_what_is_trained(sizes_on_two_ranks(tmp_path, cells), cells)
