"""Says why a rank ends, to the person, to status.json and to the other ranks, and with which exit code."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch

from medblip.config import TrainConfig
from medblip.distributed import log
from medblip.progress import RunIsLocked, read_json, write_json
from medblip.watch import RUN_ME_AGAIN, Watch

FAILED = 1

LESS_MEMORY = (
    "a smaller --micro-batch (the global batch stays), --activation-checkpointing True, or a config of ds_configs/ "
    "that holds less on each GPU (zero3, zero3_offload); `medblip plan` says what fits"
)


def report(error: Exception, config: TrainConfig, watch: Watch | None) -> int:
    """Logs one clear message, leaves word for the other ranks, updates status.json; returns the exit code.

    1: it would fail again (data, options, memory); 86: another rank is the cause, or a fault that may pass.
    Without a watch the ranks have not met yet: nobody can be told, and the run folder is not this job's yet.
    """
    message, code = explain(error, watch)
    if watch is not None:
        watch.failed(message, code)
    if code == FAILED:
        log.error("train.py: %s", message)
    else:
        log.error(
            "train.py: %s; ending with code %d: start it again, it goes on from the last checkpoint", message, code
        )
    if watch is not None and watch.rank.is_main and not isinstance(error, RunIsLocked):
        path = Path(config.run) / "status.json"
        try:
            write_json(path, (read_json(path) or {}) | {"state": "failed", "error": message, "exit_code": code})
        except OSError:
            pass  # the disk may be what failed; the log has it
    return code


def explain(error: Exception, watch: Watch | None) -> tuple[str, int]:
    """A sentence for the person, without any text of a record, and the exit code."""
    where = f"rank {watch.rank.index} was {watch.doing_now}" if watch else "while the ranks met"
    if isinstance(error, ValueError):
        return str(error), FAILED
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory, {where} ({str(error).splitlines()[0]}): try {LESS_MEMORY}", FAILED
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"out of host memory, {where}: try {LESS_MEMORY}, or fewer ranks a node, each builds the model", FAILED
    if isinstance(error, OSError):
        return f"{error} ({where})", RUN_ME_AGAIN
    if watch is None and isinstance(error, torch.distributed.DistError):
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"the ranks did not meet at {address}: {str(error).splitlines()[0]}", RUN_ME_AGAIN
    if watch and isinstance(error, RuntimeError) and watch.rank.world > 1 and _is_lost_peer(error):
        why, code = watch.explain()
        return f"{why}; {where}", code
    log.error("%s", "".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error} ({where})", RUN_ME_AGAIN


def _is_lost_peer(error: RuntimeError) -> bool:
    signs = ("closed by peer", "Connection reset", "gloo", "NCCL", "Timed out", "Broken pipe", "recvValue", "store")
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs)
