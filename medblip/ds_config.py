"""The DeepSpeed JSON of a run: read, checked before anything is built, and told the batch sizes.

DeepSpeed ignores a misspelt key at the top of its file and stops at one further down with a traceback on every rank;
here each is named with the nearest right one, all faults of the file at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medblip.config import unknown
from medblip.schedule import Schedule

TOP_KEYS = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type
    communication_sparse_gradients compile csv_monitor curriculum_learning data_efficiency data_types
    disable_allgather disable_python_gc dump_state elasticity eigenvalue flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor graph_harvesting log_level memory_breakdown
    nebula prescale_gradients seq_parallel_communication_data_type sparse_gradients steps_per_print tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_node_local_storage wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
ZERO_KEYS = frozenset(
    """
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload
    cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
    model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm
    override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint
    prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory
    stage stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance
    stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_param_persistence_threshold
    stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
    use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
    zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    """.split()
)
OFFLOAD_KEYS = frozenset("buffer_count buffer_size device max_in_cpu nvme_path pin_memory".split())
BF16_KEYS = frozenset(
    "bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled immediate_grad_update".split()
)
DATA_TYPE_KEYS = frozenset("buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype".split())
AIO_KEYS = frozenset("block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds".split())
KNOWN_KEYS = {
    "": TOP_KEYS,
    "zero_optimization": ZERO_KEYS,
    "zero_optimization.offload_param": OFFLOAD_KEYS,
    "bf16": BF16_KEYS,
    "data_types": DATA_TYPE_KEYS,
    "aio": AIO_KEYS,
}
"""Of DeepSpeed 0.19, by section; other sections are DeepSpeed's to check."""

OWNED = {
    "optimizer": "train.py owns the optimizer and the learning rate",
    "scheduler": "train.py owns the optimizer and the learning rate",
    "zero_optimization.offload_optimizer": "its moments are divided among the ranks already, and DeepSpeed would put "
    "an optimizer of its own in the place of train.py's",
}


def load_deepspeed_config(path: str | Path, schedule: Schedule, run: str | Path | None = None) -> dict[str, Any]:
    """Reads a DeepSpeed JSON, writes the batch sizes into it, and gives NVMe offload a folder of the run's own.

    Args:
        path: the file.
        schedule: the run's batch sizes.
        run: the run folder, which one job at a time locks; None where nothing will be trained.

    Raises:
        ValueError: if the file is not a JSON object, or naming all that is wrong in it.
    """
    try:
        engine = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--deepspeed_config {path}: cannot be read as JSON ({error})") from None
    if not isinstance(engine, dict):
        raise ValueError(f"--deepspeed_config {path}: not a JSON object")
    if faults := list(_faults(engine, schedule)):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    engine |= _batch_sizes(schedule)
    if run is not None and (nvme := nvme_of(engine)):
        # DeepSpeed empties a folder under it at the start, so that two jobs with the same one destroy each other.
        owner = hashlib.sha256(str(Path(run).resolve()).encode()).hexdigest()[:12]
        engine["zero_optimization"]["offload_param"]["nvme_path"] = str(nvme / f"medblip-{owner}")
    return engine


def nvme_of(engine: dict[str, Any]) -> Path | None:
    """The folder that frozen weights are swapped to; None without NVMe offload."""
    offload = engine.get("zero_optimization", {}).get("offload_param", {})
    return Path(offload["nvme_path"]) if offload.get("device") == "nvme" else None


def _batch_sizes(schedule: Schedule) -> dict[str, int]:
    return {
        "train_batch_size": schedule.global_batch,
        "train_micro_batch_size_per_gpu": schedule.micro_batch,
        "gradient_accumulation_steps": schedule.accumulation,
    }


def _faults(engine: dict[str, Any], schedule: Schedule) -> Iterator[str]:
    for name, why in OWNED.items():
        if _at(engine, name) is not None:
            yield f"remove '{name}': {why}"
    for section, known in KNOWN_KEYS.items():
        content = _at(engine, section) if section else engine
        if content is not None and not isinstance(content, dict):
            yield f"'{section}' must be an object, not {json.dumps(content)}"
            continue
        inside = f" in '{section}'" if section else ""
        for key, value in (content or {}).items():
            full = f"{section}.{key}".lstrip(".")
            if full not in OWNED and key not in known:
                yield unknown("key", key, sorted(known)).split(" (known")[0] + inside
            if value == "auto" and key not in _batch_sizes(schedule):
                yield f"'{full}' is \"auto\", which only other trainers fill in: write a value, or remove it"
    for key, value in _batch_sizes(schedule).items():
        if engine.get(key, value) != value:
            micro, accumulation = schedule.micro_batch, schedule.accumulation
            ranks = schedule.global_batch // micro // accumulation
            yield (
                f"{key} is {engine[key]}, but this run needs {value} (global batch {schedule.global_batch} = "
                f"micro-batch {micro} x accumulation {accumulation} x {ranks} ranks); remove it from the file"
            )
    if _at(engine, "fp16.enabled"):
        yield "fp16 is not supported: its loss scale skips steps by itself; take bf16, or neither for float32"
    zero = engine.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage is {stage}: 0, 1, 2 or 3"
    offload = zero.get("offload_param") or {}
    if not isinstance(offload, dict):
        return
    device = offload.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        yield f"zero_optimization.offload_param.device is {device}: cpu, nvme or none"
    if device != "none" and stage != 3:
        yield f"offload_param works at ZeRO stage 3 only, and the stage is {stage}"
    if device == "nvme" and not offload.get("nvme_path"):
        yield "offload_param to nvme needs nvme_path: a folder on a disk of the node itself"
    if device == "nvme" and zero.get("zero_hpz_partition_size", 1) > 1:
        yield "zero_hpz_partition_size keeps a second copy on the GPUs, offload to nvme cannot: remove one of them"


def _at(engine: Any, name: str) -> Any:
    for key in name.split("."):
        engine = engine.get(key) if isinstance(engine, dict) else None
    return engine
