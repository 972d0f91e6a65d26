"""Makes a fault happen inside a rank, at a chosen point of a chosen step, by wrapping the product's functions there.

The product has no hook for it: `install` is called in the rank's process before `train.main()`. `observe` writes down,
after each step, the rank's random state and learning rates, which no file of a run holds.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGSTOP": signal.SIGSTOP}
KINDS = (*SIGNALS, "exception", "loader death", "launcher death")

START_UP = ("start-up: meeting", "start-up: model", "start-up: engine")
STEP = (
    "waiting for data",
    "agreeing",
    "forward",
    "forward, second micro-step",
    "backward",
    "optimizer",
    "optimizer, between its groups",
    "ledger",
    "metrics",
    "epoch edge",
)
SAVE = (
    "save: collecting",
    "save: before the folder",
    "save: in the data",
    "save: before the manifest",
    "save: before the rename",
    "save: before latest",
    "save: in latest",
    "save: after latest",
)
PRUNE = ("prune",)
EVALUATION = ("evaluation",)
LOAD = ("load: search", "load: weights", "load: engine", "load: ledger")
END = ("last save", "leaving")
POINTS = (*START_UP, *STEP, *SAVE, *PRUNE, *EVALUATION, *LOAD, *END)

ONLY_RANK_0 = {"metrics", "load: search", "load: ledger", "leaving", *SAVE[1:], *PRUNE, "last save"}
"""Points to which only rank 0 comes; what happens there can still happen to the others."""
IN_THE_WRITER = {*SAVE[1:], *PRUNE, "last save"}
"""Points in the thread that writes a checkpoint beside the training."""


@dataclass(frozen=True)
class Fault:
    """What happens (`kind`) to which ranks (`targets`) when rank `hitter` comes to `point` of `step` (0: of any)."""

    kind: str
    point: str
    step: int
    hitter: int
    targets: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Fault:
        return Fault(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})


class InjectedError(RuntimeError):
    """The exception of the fault suite."""


class Injector:
    """One fault, which happens once."""

    def __init__(self, fault: Fault, rank: int, folder: Path):
        self.fault, self.rank, self.folder = fault, rank, folder
        self.is_over = rank != fault.hitter
        self.is_loader_dead = False
        self.step = 0  # that is being trained, from 1
        self.saving = 0  # step of the checkpoint that is being written

    def hit(self, step: int = 0) -> None:
        """The point was come to; the fault happens if it is the right step and has not happened yet."""
        if self.is_over or (self.fault.step and step != self.fault.step):
            return
        self.is_over = True
        (self.folder / "hit").write_text(json.dumps({"at": time.time(), "step": step}))
        kind = self.fault.kind
        if kind in SIGNALS:
            # Itself last: it does not come back from a SIGKILL.
            for target in sorted(self.fault.targets, key=lambda target: target == self.rank):
                os.kill(_pid_of(self.folder, target), SIGNALS[kind])
            if self.rank in self.fault.targets and kind != "SIGTERM":
                time.sleep(3600)
        elif kind == "exception":
            raise InjectedError(f"made to fail at '{self.fault.point}'")
        elif kind == "loader death":
            self.is_loader_dead = True
        elif kind == "launcher death":
            from medblip.stopping import launchers

            for pid in launchers():
                os.kill(pid, signal.SIGKILL)
        else:
            raise AssertionError(kind)


def _pid_of(folder: Path, rank: int) -> int:
    path = folder / f"pid-{rank}"
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())


def before(owner, name: str, act) -> None:
    """`act(*arguments)` is called before each call of owner.name."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*arguments, **named):
        act(*arguments, **named)
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


def install(fault: Fault, rank: int, folder: Path) -> Injector:
    """Wraps the product so that the fault happens in this process, and returns what watches for it."""
    import deepspeed

    import train
    from medblip import checkpoint, data, distributed, ledger, lines, model, optim, progress, validation

    injector = Injector(fault, rank, folder)
    point = fault.point
    forwards, groups = [0], [0]

    def step_begins(parts, loader, config, schedule, step):
        injector.step, forwards[0], groups[0] = step + 1, 0, 0

    def save_begins(run, tensors, state):
        injector.saving = state["step"]

    def in_step(*_, **__):
        injector.hit(injector.step)

    def in_save(*_, **__):
        injector.hit(injector.saving)

    def at_start(*_, **__):
        injector.hit()

    before(train, "train_step", step_begins)
    before(checkpoint, "write_folder", save_begins)
    if fault.kind == "loader death":
        _let_the_loader_die(injector)

    if point == "start-up: meeting":
        before(distributed, "setup", at_start)
    elif point == "start-up: model":
        before(model.MedBLIP, "__init__", at_start)
    elif point == "start-up: engine":
        before(deepspeed, "initialize", at_start)
    elif point == "waiting for data":
        before(data.Loader, "next_unless", in_step)
    elif point == "agreeing":
        before(distributed.Control, "any", in_step)
    elif point in ("forward", "epoch edge"):
        before(model.MedBLIP, "forward", in_step)
    elif point == "forward, second micro-step":

        def count(*_, **__):
            forwards[0] += 1
            if forwards[0] == 2:
                in_step()

        before(model.MedBLIP, "forward", count)
    elif point == "backward":  # in its midst: when the first gradient is there
        before(optim.GradientCheck, "_look", in_step)
    elif point == "optimizer":
        before(optim.AdamW, "step", in_step)
    elif point == "optimizer, between its groups":  # ZeRO steps group by group: some weights are new, some old

        def second(*_, **__):
            groups[0] += 1
            if groups[0] == 2:
                in_step()

        before(optim.AdamW, "step", second)
    elif point in ("ledger", "metrics"):
        suffix = ".bin" if point == "ledger" else "metrics.jsonl"

        def torn(appender, content):
            if str(appender.path).endswith(suffix) and injector.step == fault.step:
                if not injector.is_over and fault.kind == "SIGKILL":
                    appender._file.write(content[: len(content) // 2])
                in_step()

        before(lines.Appender, "append", torn)
    elif point == "save: collecting":
        real_collect = checkpoint._collect

        def collect(engine, rank):
            injector.hit(injector.step)
            return real_collect(engine, rank)

        checkpoint._collect = collect
    elif point in ("save: before the folder", "last save"):
        before(checkpoint, "write_folder", lambda run, tensors, state: injector.hit(state["step"]))
    elif point == "save: in the data":
        real_tensors = checkpoint._save_tensors

        def half(tensors, path):
            real_tensors(tensors, path)
            if "exp_avg.safetensors" in path.name and injector.saving == fault.step and not injector.is_over:
                os.truncate(path, path.stat().st_size // 2)
                in_save()
                real_tensors(tensors, path)

        checkpoint._save_tensors = half
    elif point in ("save: before the manifest", "save: in latest"):
        name = "state.json" if point == "save: before the manifest" else ".latest.unfinished"

        def at_file(path):
            if path.name == name:
                in_save()

        before(checkpoint, "_fsync", at_file)
    elif point == "save: before the rename":

        def at_rename(old, new):
            if Path(new).name == f"step-{fault.step}":
                in_save()

        before(os, "replace", at_rename)
    elif point == "save: before latest":
        before(checkpoint, "point_latest", in_save)
    elif point == "save: after latest":
        before(checkpoint, "prune", in_save)
    elif point == "prune":  # in its midst: the manifest and one file are gone
        real_rmtree = checkpoint.shutil.rmtree

        def half_gone(path, *rest, **named):
            is_old = Path(path).name.startswith("step-") and Path(path).name != f"step-{fault.step}"
            if is_old and injector.saving == fault.step and not injector.is_over:
                (Path(path) / "exp_avg.safetensors").unlink()
                in_save()
            return real_rmtree(path, *rest, **named)

        checkpoint.shutil.rmtree = half_gone
    elif point == "evaluation":  # in its midst: the images are encoded, the answers are not scored
        before(validation, "measure", in_step)
    elif point == "load: search":
        before(checkpoint, "newest_whole", at_start)
    elif point == "load: weights":
        before(checkpoint, "load_weights", at_start)
    elif point == "load: engine":
        before(checkpoint, "_put", at_start)
    elif point == "load: ledger":  # some files are cut back, some are not
        before(ledger.lines, "cut_back", at_start)
    elif point == "leaving":
        before(progress.Progress, "close", at_start)
    else:
        raise AssertionError(point)
    return injector


def _let_the_loader_die(injector: Injector) -> None:
    """Its thread ends without a word, as a thread does that meets a fault of the interpreter."""
    from medblip.data import Loader

    def die(*_, **__):
        if injector.is_loader_dead:
            raise SystemExit

    before(Loader, "_read", die)
    before(Loader, "_put", die)


def observe(rank: int, folder: Path) -> None:
    """From now on a line per step in `folder`/steps-RANK.jsonl: step, random state, learning rates, time.

    And in `folder`/unsynced-RANK whatever of a checkpoint gets its name before its bytes are on the disk.
    """
    import torch

    import train

    real = train.train_step

    def observed(parts, loader, config, schedule, step):
        result = real(parts, loader, config, schedule, step)
        if result is not None:
            state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16]
            rates = [group["lr"] for group in parts.optimizer.param_groups]
            line = {"step": step + 1, "random": state, "lr": rates, "at": time.time()}
            with open(folder / f"steps-{rank}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        return result

    train.train_step = observed
    _observe_renames(folder / f"unsynced-{rank}")


def _observe_renames(notes: Path) -> None:
    """A kill loses nothing that was written; that a loss of power would not either, the order of calls must show."""
    synced = set()

    def fsync(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))

    def rename(old, new):
        old = Path(old).absolute()
        if old.name.startswith((".step-", ".latest")):
            parts = {str(old), *(str(path) for path in old.glob("*"))}
            if early := sorted(Path(path).name for path in parts - synced):
                notes.write_text(f"{Path(new).name} got its name before these were on the disk: {', '.join(early)}")
            synced.difference_update(parts)

    before(os, "fsync", fsync)
    before(os, "replace", rename)
