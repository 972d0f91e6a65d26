"""One run that is killed again and again, at random, until it ends: the same end, and what the kills cost.

Kills come as a Poisson process over the training steps, and every fifth during a start-up. They hit rank 0, the other
rank or both.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

from faults.cells import LAYOUT, TARGETS, Bench, first_step
from faults.ranks import command, start
from faults.same import differences
from faults.table import Outcome
from medblip import ledger
from medblip.lines import read_records

CHECKPOINT_EVERY = 5
STEPS_PER_KILL = 3


class Killer:
    """Kills some ranks of one start when its time has come."""

    def __init__(self, notes: Path, draw: random.Random, after_steps: int, after_s: float):
        self.notes, self.after_steps, self.after_s = notes, after_steps, after_s
        self.targets = draw.choice(list(TARGETS.values()))
        self.delay_s = draw.uniform(0, 0.5)  # so that it may come anywhere in a step
        self.began_at = time.time()
        self.due_at: float | None = None
        self.killed_at: float | None = None
        self.is_ended = False

    def __call__(self, pids: list[int]) -> None:
        now = time.time()
        if self.killed_at is not None:
            # Ranks that have not met yet wait for a dead one until the launcher ends them.
            if self.after_steps == 0 and now > self.killed_at + 10 and not self.is_ended:
                self.is_ended = True
                for rank, pid in enumerate(pids):
                    if rank not in self.targets and Path(f"/proc/{pid}").exists():
                        os.kill(pid, signal.SIGTERM)
            return
        if self.due_at is None:
            if self.after_steps == 0:
                self.due_at = self.began_at + self.after_s
            elif len(read_records(self.notes / "steps-0.jsonl")) >= self.after_steps:
                self.due_at = now + self.delay_s
            return
        if now >= self.due_at:
            self.killed_at = now
            for target in self.targets:
                os.kill(pids[target], signal.SIGKILL)


def soak(bench: Bench, kills: int, seed: int) -> list[Outcome]:
    """Trains once undisturbed, once with so many kills; an outcome for each kill, and one for the end."""
    draw = random.Random(f"soak/{seed}")
    folder = bench.new_folder("soak")
    steps = max(20, STEPS_PER_KILL * kills)
    how = {"steps": steps, "checkpoint_every": CHECKPOINT_EVERY}
    straight = start(command(bench.shards, folder / "straight", LAYOUT, **how), LAYOUT, folder / "straight-0")
    assert straight.codes == [0, 0], straight.log
    trained_s = straight.ended_at[0] - straight.began_at
    arguments = command(bench.shards, folder / "run", LAYOUT, **how)
    outcomes: list[Outcome] = []
    notes: list[Path] = []
    began_at = time.time()
    done, start_up_s = 0, first_step(folder / "straight-0", straight)
    while True:
        notes.append(folder / f"start-{len(notes)}")
        killer = None
        if len(outcomes) < kills:
            mean = (steps - done) / (kills - len(outcomes))
            after_steps = min(1 + int(draw.expovariate(1 / mean)), steps - done - 1)
            if len(outcomes) % 5 == 4 or after_steps < 1:
                after_steps = 0
            killer = Killer(notes[-1], draw, after_steps, draw.uniform(0.2, 0.9) * start_up_s)
        begun = start(arguments, LAYOUT, notes[-1], meanwhile=killer or (lambda pids: None))
        if killer is None or killer.killed_at is None:
            break
        reached = max([done, *(line["step"] for line in read_records(notes[-1] / "steps-0.jsonl"))])
        saved = ((folder / "run/latest").read_text() if (folder / "run/latest").exists() else "step-0").strip()
        done = int(saved.removeprefix("step-"))
        outcome = Outcome("soak: random kills", f"kill {len(outcomes) + 1} in step {reached + 1}, saved {done}")
        others = [rank for rank in range(LAYOUT.world) if rank not in killer.targets]
        if others and killer.after_steps:
            outcome.detected_s = max(begun.ended_at[rank] for rank in others) - killer.killed_at
        if wrong := [begun.codes[rank] for rank in others if begun.codes[rank] not in (0, 85, 86)]:
            outcome.wrong.append(f"ranks ended with {wrong}:\n{begun.log[-1500:]}")
        outcome.steps_redone = reached - done
        if killer.after_steps:
            outcome.restarted_s = first_step(notes[-1], begun)
        outcomes.append(outcome)
    took_s = time.time() - began_at
    for outcome in outcomes:
        outcome.elapsed_s = took_s / len(outcomes)
    redone = ledger.compare(folder / "run")["steps_done_again"]
    share, every_s = trained_s / took_s, took_s / max(1, len(outcomes))
    last = Outcome(
        "soak: its end",
        f"{len(outcomes)} kills in {took_s:.0f} s, {redone} of {steps} steps done again; an undisturbed run takes "
        f"{trained_s:.0f} s: effective training time {share:.0%}, a kill every {every_s:.0f} s",
    )
    last.steps_redone = redone
    if begun.codes != [0, 0]:
        last.wrong.append(f"the last start ended with {begun.codes}:\n{begun.log[-2000:]}")
    else:
        last.wrong += differences(folder / "run", notes, folder / "straight", [folder / "straight-0"])
    if len(outcomes) < kills:
        last.wrong.append(f"only {len(outcomes)} kills")
    if not any(outcome.wrong for outcome in [*outcomes, last]):
        shutil.rmtree(folder)
    return [*outcomes, last]
