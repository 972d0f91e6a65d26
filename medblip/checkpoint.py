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
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medblip.distributed import Rank, log
from medblip.model import trainable

TENSORS = {"master": "weights.safetensors", "exp_avg": "exp_avg.safetensors", "exp_avg_sq": "exp_avg_sq.safetensors"}


class Writer:
    """Writes checkpoints of a run beside the training, one at a time; on rank 0 only the files, on all the collecting.

    A folder gets its name only when everything in it is on the disk, `latest` only then. A write that fails (disk
    full, read-only, I/O error, out of memory) is said as a warning, training goes on, and the older checkpoints stay.

    Args:
        run: folder of the run.
        rank: this one.
        keep: newest checkpoints kept.
        keep_every: checkpoints whose step is a multiple of this are kept for good; 0 keeps none so.
        saved_step: of the checkpoint that the run went on from.
    """

    def __init__(self, run: Path, rank: Rank, keep: int, keep_every: int = 0, saved_step: int | None = None):
        self.run, self.rank, self.keep, self.keep_every = run, rank, keep, keep_every
        self.saved_step = saved_step
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, engine, state: dict[str, Any]) -> float:
        """Takes what training changed from all ranks (a collective, between optimizer steps) and begins to write it.

        Waits for the write before it. Returns the seconds for which training stood still.

        Args:
            engine: the DeepSpeed engine.
            state: what `state.json` shall hold; `step` names the folder.
        """
        began_at = time.monotonic()
        self.wait()
        state = state | {"adam_step": _adam_step(engine)}
        tensors = _collect(engine, self.rank)
        if self.rank.is_main:
            self._thread = threading.Thread(target=self._write, args=(tensors, state), name="checkpoint")
            self._thread.start()
        return time.monotonic() - began_at

    def wait(self) -> bool:
        """Waits for the write in hand; whether the last one went well. On rank 0; elsewhere nothing is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.error is None

    def _write(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            folder = write_folder(self.run, tensors, state)
            point_latest(self.run, folder.name)
            self.saved_step, self.error = state["step"], None
            log.info("saved %s", folder)
            if (state.get("best") or {}).get("step") == state["step"]:
                point_best(self.run, state["best"])
            prune(self.run, self.keep, self.keep_every)
        except Exception as error:  # of any kind: what a thread raises is lost, and the run would end as if saved
            self.error = error
            newest = f"that of step {self.saved_step}" if self.saved_step else "an older one or none"
            log.warning(
                "the checkpoint of step %d could not be written (%s): training goes on; the newest checkpoint is %s",
                *(state["step"], str(error) or type(error).__name__, newest),
            )


def write_folder(run: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Writes `checkpoints/step-N` under a temporary name, brings it to the disk, then gives it its name."""
    folder = run / "checkpoints" / f"step-{state['step']}"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for kind, name in TENSORS.items():
            _save_tensors(tensors[kind], unfinished / name)
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in unfinished.iterdir()}
        for name in files:
            _fsync(unfinished / name)
        (unfinished / "manifest.json").write_text(json.dumps(files, indent=1))
        _fsync(unfinished / "manifest.json")
        _fsync(unfinished)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk must not stay full because of it
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    _fsync(folder.parent)
    return folder


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the library's own name for a disk that is full
        raise OSError(f"{path}: {error}") from None


def point_latest(run: Path, name: str) -> None:
    """Writes `latest`, whole or not at all."""
    _point(run, "latest", name)


def point_best(run: Path, best: dict[str, Any] | None) -> None:
    """Writes `best.json`: step, metric and value of the best checkpoint, whole or not at all; None: there is none."""
    if best is None:
        (run / "best.json").unlink(missing_ok=True)
    else:
        _point(run, "best.json", json.dumps(best))


def _point(run: Path, pointer: str, content: str) -> None:
    unfinished = run / f".{pointer}.unfinished"
    unfinished.write_text(content + "\n")
    _fsync(unfinished)
    os.replace(unfinished, run / pointer)
    _fsync(run)


def prune(run: Path, keep: int, keep_every: int) -> None:
    """Removes checkpoints but the newest `keep`, every `keep_every`-th and the best one; and unfinished ones."""
    best = json.loads((run / "best.json").read_text())["step"] if (run / "best.json").is_file() else None
    for step in sorted(_steps(run))[:-keep]:
        if step != best and not (keep_every and step % keep_every == 0):
            # Its manifest goes first: what a kill leaves of it is then no checkpoint.
            (run / "checkpoints" / f"step-{step}" / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(run / "checkpoints" / f"step-{step}", ignore_errors=True)
    for unfinished in (run / "checkpoints").glob(".step-*.unfinished"):
        shutil.rmtree(unfinished, ignore_errors=True)


def newest_whole(run: Path, made_of: dict[str, Any] | None = None) -> Path | None:
    """The checkpoint that a run goes on from: the newest that is whole and fits; None where the run has none yet.

    Each newer one that is damaged or does not fit is named in a warning, and so is a `latest` that is missing, empty
    or names another.

    Args:
        run: folder of the run.
        made_of: what the model and data are made of now, see `check_made_of`; not compared if None.

    Raises:
        ValueError: if there are checkpoints, or the run once saved one, but none can be used. Never a silent fresh
            start.
    """
    steps = sorted(_steps(run), reverse=True)
    pointer = run / "latest"
    named = pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else None
    faults = []
    for step in steps:
        folder = run / "checkpoints" / f"step-{step}"
        try:
            verify(folder)
            if made_of is not None:
                check_made_of(folder, made_of)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            log.warning("not used: %s", fault)
        if named is None:
            log.warning("%s is missing; going on from the newest whole checkpoint, %s", pointer, folder.name)
        elif named != folder.name:
            log.warning("%s says '%s'; going on from %s, the newest whole checkpoint", pointer, named, folder.name)
        return folder
    if faults:
        raise ValueError(f"{'; '.join(faults)}: no checkpoint can be used; take another --run to begin anew")
    if named is not None or _once_saved(run):
        raise ValueError(
            f"{run} once saved a checkpoint, but {run / 'checkpoints'} holds none: bring it back, or take another "
            "--run to begin anew"
        )
    return None


def best(run: Path) -> Path:
    """The checkpoint that validation during training found best.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    pointer = run / "best.json"
    if not pointer.is_file():
        raise ValueError(f"{pointer} is missing: the run was not validated (--validate-every of train.py)")
    folder = run / "checkpoints" / f"step-{json.loads(pointer.read_text())['step']}"
    verify(folder)
    return folder


def _once_saved(run: Path) -> bool:
    try:
        return json.loads((run / "status.json").read_text()).get("saved") is not None
    except (OSError, ValueError):
        return False


def verify(folder: Path) -> None:
    """Checks that a checkpoint is whole.

    Raises:
        ValueError: naming the first file that is missing or differs from the manifest.
    """
    manifest = folder / "manifest.json"
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(manifest.read_text()).items()}
        missing = {"state.json", *TENSORS.values()} - expected.keys()
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a whole checkpoint: manifest.json is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):  # a flipped bit can make anything of it
        raise ValueError(f"{manifest}: damaged, it is not the list of the checkpoint's files") from None
    if missing:
        raise ValueError(f"{manifest}: damaged, it does not list {', '.join(sorted(missing))}")
    for name, (size_bytes, sha256) in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size_bytes or _sha256(path) != sha256:
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
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return [int(name) for name in names if name.isdigit()]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
