"""What a run writes down and shows while it trains: the run folder, metrics.jsonl, a line to read, wandb.

Numbers and sample KEYs only; never the text of a record.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from medblip.config import TrainConfig
from medblip.distributed import Rank, log
from medblip.lines import Appender, cut_back, read_records
from medblip.stopping import how_to_stop

# Options that may change when a run goes on: none of them changes what is learned. Steps and global batch are
# compared as they came out, with the checkpoint.
FREE_ON_RESUME = {
    "data", "run", "deepspeed_config", "steps", "global_batch", "micro_batch", "checkpoint_every", "keep_checkpoints",
    "keep_every", "step_timeout_s", "max_skipped", "max_nonfinite",
    "validate_every", "validate_scans", "best_metric",
    "log_every", "read_threads", "wandb", "dry_run", "local_rank",
}  # fmt: skip


class RunIsLocked(ValueError):
    """Another job trains in the run folder, and what stands there is that job's."""


def lock(run: Path):
    """Locks a run folder for this job; the lock lives as long as the returned file is open.

    Raises:
        RunIsLocked: if another job holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "w")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunIsLocked(f"{run}: another job is training here; wait for it, stop it, or take another --run") from None
    return file


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is never seen half-written."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none or it is damaged."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def check_same_run(stored: dict[str, Any], config: TrainConfig) -> None:
    """Refuses to go on with a run under options that change what is learned.

    Raises:
        ValueError: naming each option with its old and new value.
    """
    now = dataclasses.asdict(config)
    differing = [
        f"--{name.replace('_', '-')} was {stored.get(name)}, now {now[name]}"
        for name in now
        if name not in FREE_ON_RESUME and stored.get(name) != now[name]
    ]
    if differing:
        raise ValueError(f"{config.run} was begun with other options: {'; '.join(differing)}; take another --run")


class Status:
    """status.json: how a run is doing, for people and scripts; only rank 0 writes.

    `state` is training, done, stopped or failed; a process that is killed cannot change it, and leaves `training`.
    """

    def __init__(self, run: Path, rank: Rank, steps: int):
        self.path, self.is_main, self.steps = run / "status.json", rank.is_main, steps
        self.saved: int | None = None
        self._fixed = {"world_size": rank.world, "host": socket.gethostname(), "pid": os.getpid()}
        self._fixed |= {"how_to_stop": how_to_stop()}
        self._written_at = 0.0

    def write(self, state: str, step: int, **more: Any) -> None:
        """Writes it, while training at most once a second."""
        now = time.monotonic()
        if not self.is_main or (state == "training" and now - self._written_at < 1):
            return
        self._written_at = now
        content = {"state": state, "step": step, "steps": self.steps, "saved": self.saved, **more, **self._fixed}
        try:
            write_json(self.path, content | {"updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.path, error)


def keep_schedule(run: Path, config: TrainConfig, world_size: int) -> TrainConfig:
    """For a run that goes on: its steps, its global batch and, where the ranks allow it, its contrastive batch.

    Raises:
        ValueError: if it was begun under options that change what is learned; see `check_same_run`.
    """
    if not any((run / "checkpoints").glob("step-*")):
        return config
    try:
        stored = json.loads((run / "config.json").read_bytes())
        train, before = stored["train"], stored["schedule"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{run / 'config.json'}: missing or damaged, so that nothing says with which options the checkpoints were "
            "made; bring it back, or take another --run"
        ) from None
    check_same_run(train, config)
    kept = {name: before[name] for name in ("steps", "global_batch") if getattr(config, name) is None}
    contrastive_batch = before["global_batch"] // before["accumulation"]
    if config.micro_batch is None and contrastive_batch % world_size == 0:
        kept["micro_batch"] = contrastive_batch // world_size
    return dataclasses.replace(config, **kept)


class Progress:
    """The record of a run's steps, on rank 0; the other ranks have none."""

    def __init__(self, run: Path, config: TrainConfig, first_step: int, steps: int, global_batch: int):
        """Cuts metrics.jsonl back to the steps before `first_step`, so that each step stands in it once."""
        self.steps, self.global_batch = steps, global_batch
        self._path = run / "metrics.jsonl"
        cut_back(self._path, first_step)
        self._file = Appender(self._path)
        self._first_step, self._started_at = first_step, time.monotonic()
        self._logged_at, self._logged_step = self._started_at, first_step
        self._shown_at = 0.0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, leave=True)
        self._wandb = _start_wandb(run, config, first_step) if config.wandb else None

    def step(
        self,
        step: int,
        losses: dict[str, float],
        lr: float,
        epoch: float,
        waited_s: float,
        more: dict[str, float],
        stalled_s: float,
    ) -> None:
        """Writes down one optimizer step (counted from 1).

        `waited_s` is the time spent waiting for data, `stalled_s` that for which saving held training up.
        """
        now = time.monotonic()
        elapsed_s = now - self._logged_at
        record = {
            "step": step,
            **losses,
            "lr": lr,
            "samples_per_s": round((step - self._logged_step) * self.global_batch / elapsed_s, 3),
            "data_wait_fraction": round(min(1.0, waited_s / elapsed_s), 4),
            "epoch": round(epoch, 4),
            **more,
        }
        if stalled_s:
            record["save_stall_s"] = round(stalled_s, 4)
        self._logged_at, self._logged_step = now, step
        self._file.append((json.dumps(record) + "\n").encode())
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in record.items() if name != "step"}, step=step)
        left_s = (now - self._started_at) / (step - self._first_step) * (self.steps - step)
        parts = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        line = f"{parts} | {record['samples_per_s']:.1f} samples/s, waiting for data {record['data_wait_fraction']:.0%}"
        if self._bar is not None:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._shown_at > 10 or step in (self._first_step + 1, self.steps):
            # A log file needs a line now and then, not one a step.
            self._shown_at = now
            log.info("step %d/%d | %s | %s left", step, self.steps, line, _duration(left_s))

    def add_to_last(self, step: int, more: dict[str, float | None]) -> None:
        """Adds numbers to the line of the step that the run goes on from."""
        if more:
            self._file.close()
            record = next(
                (record for record in read_records(self._path)[-1:] if record["step"] == step), {"step": step}
            )
            cut_back(self._path, step - 1)
            self._file = Appender(self._path)
            self._file.append((json.dumps(record | more) + "\n").encode())

    def close(self) -> None:
        """Flushes everything."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{seconds:02d} min"


def _start_wandb(run: Path, config: TrainConfig, first_step: int):
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the wandb extra: pip install 'medblip[wandb]'") from None
    if os.environ.get("WANDB_MODE") != "offline" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        log.warning("wandb is off: no WANDB_API_KEY (WANDB_MODE=offline keeps the curves in the run folder)")
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    shown = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("data", "run", "local_rank")}
    return wandb.init(
        project=config.wandb, dir=run, name=run.name, id=run.name, resume="allow" if first_step else None, config=shown
    )
