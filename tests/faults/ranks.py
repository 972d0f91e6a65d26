"""Starts the ranks of a run and plays the scheduler: the same command again until it is done.

The process that runs the suite has everything imported and forks a child for each rank, which takes a fraction of a
second where a bare start takes ten. `start_launched` starts them through the real launchers.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.inject import Fault, install, observe

ROOT = Path(__file__).parent.parent.parent
STEPS, CHECKPOINT_EVERY, GLOBAL_BATCH = 10, 3, 4
TIMEOUT_S = 60.0
"""--step-timeout-s where nothing hangs."""
HANG_TIMEOUT_S = 8.0
"""--step-timeout-s where a rank is stopped."""
START_S = 300.0
"""The longest that one start may take in all; more is a hang."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what must be alike for two runs to be bitwise equal."""

    world: int = 2
    engine: str = "zero2_fp32"
    micro_batch: int | None = 1
    validate_every: int = 0
    """A run that is scored on the split val while it trains; it also saves what is best."""


@dataclass
class Start:
    """What came of one start of a run."""

    codes: list[int]
    logs: list[str]
    began_at: float
    ended_at: list[float]
    hit_at: float | None
    stopped: list[int]
    """Ranks that did not end by themselves, and had to be killed as a launcher kills them."""

    @property
    def log(self) -> str:
        return "\n".join(self.logs)


def preload() -> None:
    """Imports what a rank imports, so that its forked children need not."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    from medblip import towers

    torch.set_num_threads(1)
    towers._corpus()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"


PRELOADED = (
    "torch", "deepspeed", "deepspeed.runtime.zero.utils", "deepspeed.utils", "transformers", "peft",
    "safetensors.torch", "deepspeed.runtime.zero.muon.muon_optimizer", "train",
    "transformers.models.blip_2.modeling_blip_2", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto.modeling_auto", "huggingface_hub", "tokenizers", "tqdm", "torch._dynamo",
    *(f"medblip.{name}" for name in (
        "checkpoint", "data", "distributed", "failure", "language", "ledger", "losses", "model", "optim", "preview",
        "progress", "qformer", "shards", "stopping", "tally", "towers", "validation", "vision", "watch", "words",
    )),
)  # fmt: skip


def command(
    shards: Path,
    run: Path,
    layout: Layout,
    *options: object,
    timeout_s: float = TIMEOUT_S,
    steps: int = STEPS,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> list[str]:
    """The arguments of train.py."""
    words = ["--deepspeed_config", ROOT / "ds_configs" / f"{layout.engine}.json", "--data", shards, "--run", run]
    words += ["--steps", steps, "--checkpoint-every", checkpoint_every, "--global-batch", GLOBAL_BATCH]
    words += ["--micro-batch", layout.micro_batch] if layout.micro_batch else []
    words += ["--validate-every", layout.validate_every] if layout.validate_every else []
    words += ["--step-timeout-s", timeout_s, "--read-threads", 1, *options]
    return [str(word) for word in words]


def start(
    arguments: list[str],
    layout: Layout,
    folder: Path,
    fault: Fault | None = None,
    prepare: Callable[[int], None] = lambda rank: None,
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
) -> Start:
    """Forks the ranks, waits until all have ended, and says how.

    Args:
        arguments: of train.py.
        layout: how many ranks.
        folder: for logs and notes of this start; new.
        fault: to happen in one of the ranks.
        prepare: called in each rank's process with its number, before anything else.
        meanwhile: called again and again with the ranks' process ids until all have ended.
    """
    folder.mkdir(parents=True)
    port = str(free_port())
    began_at = time.time()
    pids = []
    for rank in range(layout.world):
        pid = os.fork()
        if pid == 0:
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.world, "LOCAL_SIZE": layout.world}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            _be_a_rank(arguments, {k: str(v) for k, v in environment.items()}, folder, rank, fault, prepare)
        (folder / f".pid-{rank}").write_text(str(pid))
        os.replace(folder / f".pid-{rank}", folder / f"pid-{rank}")
        pids.append(pid)
    return _wait(pids, folder, fault, began_at, meanwhile)


def _be_a_rank(arguments, environment, folder, rank, fault, prepare) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(environment)
        os.chdir(ROOT)
        import train

        sys.argv = ["train.py", *arguments]
        prepare(rank)
        observe(rank, folder)
        if fault is not None:
            install(fault, rank, folder)
        code = train.main()
        threading._shutdown()  # what the interpreter does before it ends
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], folder: Path, fault: Fault | None, began_at: float, meanwhile) -> Start:
    """Waits for the ranks; kills what cannot end by itself as a launcher does, and what hangs."""
    codes: dict[int, int] = {}
    ended_at: dict[int, float] = {}
    killed: list[int] = []
    hit = folder / "hit"
    # The ranks meet without a time-out of ours: there the launcher ends those that wait for one that died.
    is_before_meeting = fault is not None and fault.point == "start-up: meeting"
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[rank], ended_at[rank] = os.waitstatus_to_exitcode(status), time.time()
        now = time.time()
        left = [rank for rank in range(len(pids)) if rank not in codes]
        frozen = [rank for rank in left if _is_stopped(pids[rank])]
        if left and frozen == left or now - began_at > START_S:
            # What srun --kill-on-bad-exit or a launcher does with a task that does not react.
            for rank in left:
                os.kill(pids[rank], signal.SIGKILL)
            killed += left
        elif is_before_meeting and hit.exists() and now - json.loads(hit.read_text() or '{"at": 0}')["at"] > 2:
            for rank in left:
                os.kill(pids[rank], signal.SIGTERM)
            if frozen and now - json.loads(hit.read_text())["at"] > 4:
                for rank in frozen:
                    os.kill(pids[rank], signal.SIGKILL)
        meanwhile(pids)
        time.sleep(0.01)
    return Start(
        codes=[codes[rank] for rank in range(len(pids))],
        logs=[(folder / f"log-{rank}").read_text(errors="replace") for rank in range(len(pids))],
        began_at=began_at,
        ended_at=[ended_at[rank] for rank in range(len(pids))],
        hit_at=json.loads(hit.read_text())["at"] if hit.exists() else None,
        stopped=killed,
    )


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def make_shards(folder: Path) -> Path:
    """Shards of made-up patients at 32^3, two a shard: six to train on, one and a half steps an epoch, four in val."""
    shards = folder / "shards"
    if not (shards / "index.json").exists():
        _run(f"sharding.madeup --out {folder}/release --subjects 10 --workers 1")
        manifest = folder / "release/manifest.csv"
        with open(manifest, newline="") as file:
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows):
            row["split"] = "train" if number < 6 else "val"
        with open(manifest, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        _run(f"sharding.build --manifest {manifest} --out {shards} --size 32 --spacing-mm 7 --shard-samples 2")
    return shards


def _run(words: str) -> None:
    subprocess.run([sys.executable, "-m", *words.split()], cwd=ROOT, check=True, capture_output=True)


def middle(values: Sequence[float]) -> float:
    """The median; nan of nothing."""
    return sorted(values)[len(values) // 2] if values else float("nan")
