"""Ranks: where this process stands among the others, and the few collectives the model and the loop need."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import socket
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

log = logging.getLogger("medblip")


@dataclass(frozen=True)
class Rank:
    """This process among all: `index` of `world`, on `device`."""

    index: int
    world: int
    local: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.index == 0


def setup(timeout_s: float = 1800) -> Rank:
    """Joins the process group under deepspeed, torchrun, srun or no launcher at all.

    Slurm starts tasks without torch's variables, so they are worked out from SLURM_*.
    Call before DeepSpeed is imported anywhere: the accelerator is chosen on import.
    """
    _read_slurm()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # One DeepSpeed "device" per rank of this node, else it counts NUMA nodes.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    import deepspeed

    if not cuda:
        # Plain gloo: the shared-memory collectives would be compiled at start and need a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            verbose=False,
        )
    return Rank(dist.get_rank(), dist.get_world_size(), local, device)


def join_launched() -> Rank:
    """As `setup` if a launcher started several processes; else this process alone, without a process group."""
    _read_slurm()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return setup()
    return Rank(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _read_slurm() -> None:
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or "SLURM_STEP_NODELIST" not in os.environ:
        return
    nodes = []
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        nodes = subprocess.run(command, capture_output=True, text=True).stdout.split()
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
    )
    os.environ.setdefault("MASTER_ADDR", nodes[0] if nodes else os.environ["SLURM_LAUNCH_NODE_IPADDR"])
    # Every task must pick the same free port without talking: derive it from the job.
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def world_size() -> int:
    """Ranks in the process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _GatherWithGradient(torch.autograd.Function):
    """all_gather along the first axis whose backward sums every rank's gradient for the local part."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.num_local = tensor.shape[0]
        gathered = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.num_local
        return gradient[first : first + ctx.num_local]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks, in rank order: `B ...` to `G ...`. The gradient of every rank flows back."""
    return tensor if world_size() == 1 else _GatherWithGradient.apply(tensor)


class Control:
    """What the ranks agree on between steps, over the CPU, so that no GPU has to be waited for. All are collectives."""

    def __init__(self, rank: Rank):
        self._world = rank.world
        self._group = dist.new_group(backend="gloo") if rank.world > 1 and rank.device.type == "cuda" else None

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self._world == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values.bool().tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self._world == 1:
            return [value]
        values = [None] * self._world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value)[0]


def set_timeouts(timeout_s: float) -> None:
    """Sets how long a collective may take in every process group, also in those that DeepSpeed makes.

    DeepSpeed's groups do not take over the time-out that was given at start. The setter is private in torch; without
    it the groups keep theirs (10 minutes for NCCL, 30 for gloo).
    """
    from torch.distributed import distributed_c10d

    setter = getattr(distributed_c10d, "_set_pg_timeout", None)
    if setter is not None and dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            setter(datetime.timedelta(seconds=timeout_s), group)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of a small tensor over the ranks; a collective."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def leave(code: int) -> NoReturn:
    """Ends this rank without the interpreter's clean-up, which may wait for others or abort.

    It aborted now and then ("terminate called without an active exception") in a rank that was done before the others,
    and its launcher then killed them.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def locked(path: str | Path):
    """Holds an exclusive lock on a file, waiting for it; used where several processes may make the same thing."""
    import fcntl

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def log_to_stderr(rank: int) -> None:
    """Rank 0 reports progress on stderr; the others only warnings. Libraries' chatter is left out."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.basicConfig(
        stream=sys.stderr,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
        level=logging.WARNING,
        force=True,
    )
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
