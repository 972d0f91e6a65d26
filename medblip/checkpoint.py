"""One checkpoint format, free of world size and ZeRO stage: what training changed, and nothing else.

`checkpoints/step-N/` holds the float32 master weights and both moments of AdamW of every trainable parameter
(safetensors), `state.json` (step, position in the data, what the run was made of) and, written last, `manifest.json`
with the size and sha256 of each file. DeepSpeed's own save is not used: it is bound to the world size and the stage,
and at stages 1 and 2 it also writes frozen weights that are tied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medblip.distributed import Rank, barrier
from medblip.model import trainable

TENSORS = {"master": "weights.safetensors", "exp_avg": "exp_avg.safetensors", "exp_avg_sq": "exp_avg_sq.safetensors"}


def save(run: Path, engine, state: dict[str, Any], rank: Rank, keep: int) -> Path:
    """Writes `checkpoints/step-N` and points `latest` at it; all ranks call it, between optimizer steps.

    The folder gets its name only when everything in it is on the disk.

    Args:
        run: folder of the run.
        engine: the DeepSpeed engine.
        state: what `state.json` shall hold; `step` names the folder.
        keep: newest checkpoints kept.
    """
    tensors = _collect(engine, rank)
    folder = run / "checkpoints" / f"step-{state['step']}"
    if rank.is_main:
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for kind, name in TENSORS.items():
            save_file(tensors[kind], unfinished / name)
        (unfinished / "state.json").write_text(json.dumps(state | {"adam_step": _adam_step(engine)}, indent=1))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in unfinished.iterdir()}
        (unfinished / "manifest.json").write_text(json.dumps(files, indent=1))
        for path in (*unfinished.iterdir(), unfinished):
            _fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        _fsync(folder.parent)
        pointer = run / ".latest.unfinished"
        pointer.write_text(folder.name + "\n")
        _fsync(pointer)
        os.replace(pointer, run / "latest")
        _fsync(run)
        for old in sorted(_steps(run))[:-keep]:
            shutil.rmtree(run / "checkpoints" / f"step-{old}")
    barrier()
    return folder


def latest(run: Path) -> Path | None:
    """The checkpoint that a run goes on from, verified; None where the run has none yet.

    Raises:
        ValueError: if checkpoints exist but `latest` does not name a whole one. Never a silent fresh start.
    """
    pointer = run / "latest"
    if not pointer.exists():
        if _steps(run):
            raise ValueError(
                f"{pointer} is missing, but {run / 'checkpoints'} holds checkpoints: write the name of one into it"
            )
        return None
    folder = run / "checkpoints" / pointer.read_text().strip()
    verify(folder)
    return folder


def saved_step(run: Path) -> int | None:
    """The step of the checkpoint that `latest` names."""
    pointer = run / "latest"
    return int(pointer.read_text().strip().removeprefix("step-")) if pointer.exists() else None


def verify(folder: Path) -> None:
    """Checks that a checkpoint is whole.

    Raises:
        ValueError: naming the first file that is missing or differs from the manifest.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{folder}: not a whole checkpoint: manifest.json is missing")
    for name, expected in json.loads(manifest.read_text()).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise ValueError(f"{path}: missing or damaged (size or sha256 differs from manifest.json)")


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    return json.loads((folder / "state.json").read_text())


def check_made_of(folder: Path, now: dict[str, Any]) -> None:
    """Compares what a checkpoint was made of (model, recipe, frozen towers, data) with what there is now.

    Raises:
        ValueError: naming every differing value, old and new.
    """
    state = read_state(folder)
    differing = [
        f"{name} was {_brief(state.get(name), value)}, now {_brief(value, state.get(name))}"
        for name, value in now.items()
        if state.get(name) != value
    ]
    if differing:
        raise ValueError(f"{folder} does not fit: {'; '.join(differing)}")


def _brief(value: Any, other: Any) -> Any:
    """Of two dictionaries, only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {name: entry for name, entry in value.items() if other.get(name) != entry}
    return value


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads the master weights into a model that is not wrapped by DeepSpeed yet.

    Raises:
        ValueError: if a trainable weight is missing, has another shape, or a stored one is unknown.
    """
    stored = load_file(folder / TENSORS["master"])
    expected = trainable(model)
    if differing := sorted(stored.keys() ^ expected.keys()):
        raise ValueError(
            f"{folder}: the model's trainable weights differ from the stored ones: {', '.join(differing[:5])}"
        )
    for name, parameter in expected.items():
        if parameter.shape != stored[name].shape:
            raise ValueError(
                f"{folder}: {name} is {tuple(stored[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
        parameter.data.copy_(stored[name])


def load_engine(folder: Path, engine) -> None:
    """Puts master weights, moments and counters into an engine; all ranks call it.

    The model's own (bf16) weights must have been loaded before by `load_weights`: the engine copies the master
    into them only after the next step.
    """
    state = read_state(folder)
    tensors = {kind: load_file(folder / name) for kind, name in TENSORS.items()}
    inner = engine.optimizer.optimizer
    for flat in _flat_partitions(engine.optimizer):
        moments = inner.state[flat]
        moments["step"] = torch.tensor(float(state["adam_step"]))
        for key in ("exp_avg", "exp_avg_sq"):
            moments.setdefault(key, torch.zeros_like(flat.data))
    _link_states(engine.optimizer)
    for name, parameter in trainable(engine.module).items():
        _put(parameter, tensors["master"][name], None)
        for key in ("exp_avg", "exp_avg_sq"):
            _put(parameter, tensors[key][name], key)
    engine.global_steps = state["step"]
    engine.global_samples = state["step"] * engine.train_batch_size()
    engine.micro_steps = state["step"] * engine.gradient_accumulation_steps()


def _collect(engine, rank: Rank) -> dict[str, dict[str, Tensor]]:
    """Full float32 tensors of every trainable parameter, on rank 0; a collective per tensor."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_states(engine.optimizer)
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in TENSORS}
    for name, parameter in trainable(engine.module).items():
        for kind in TENSORS:
            if kind == "master":
                full = safe_get_full_fp32_param(parameter)
            else:
                full = safe_get_full_optimizer_state(parameter, kind)
            if rank.is_main:
                tensors[kind][name] = full.detach().cpu().clone().contiguous()
    return tensors


def _flat_partitions(optimizer) -> list[Tensor]:
    """The flat float32 tensors by which the inner AdamW keeps its state, in each of DeepSpeed's optimizers."""
    for attribute in (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 with float32 accumulation (BF16_Optimizer)
    ):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise ValueError(f"{type(optimizer).__name__}: this DeepSpeed optimizer cannot be saved; use ZeRO stage 1, 2 or 3")


def _link_states(optimizer) -> None:
    # DeepSpeed links parameters to their moments after the first group's first step, so that every other group
    # raises on access; linking again covers all groups.
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _put(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):
        # ZeRO-3: the full setters fail where the ranks do not divide the size, so set this rank's padded part.
        size = parameter.ds_tensor.numel()
        group = parameter.ds_process_group
        index, world = dist.get_rank(group=group), dist.get_world_size(group=group)
        flat = torch.nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
        part = flat[index * size : (index + 1) * size]
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _adam_step(engine) -> int:
    inner = engine.optimizer.optimizer
    steps = {int(inner.state[flat]["step"]) for flat in _flat_partitions(engine.optimizer)}
    assert len(steps) == 1, f"parameter groups at different Adam steps: {steps}"
    return steps.pop()


def _steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
