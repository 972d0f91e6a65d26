"""A run that goes on with other numbers of ranks and ZeRO stages: the same samples, learning rates, and near losses.

Dropout is 0 and the contrastive batch stays, so that the losses of all layouts agree but for rounding.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults.cells import Bench, first_step
from faults.inject import Fault
from faults.ranks import GLOBAL_BATCH, ROOT, Layout, command, start
from faults.table import Outcome
from medblip import ledger
from medblip.lines import read_records

STOPS = (4, 6, 8)
"""Steps in which the run is stopped, and goes on in the next layout with the step done again."""
LEARNING_RATE = 5e-5  # at the preset's, Adam blows rounding up to visible differences within a few steps
TOLERANCE = 1e-4
"""Of a loss, in float32: sums in another order."""
OPTIONS = ("--dropout", 0, "--learning-rate", LEARNING_RATE, "--lora-learning-rate", 4 * LEARNING_RATE)


@dataclass(frozen=True)
class Way:
    """The layouts of a run's four starts: (ranks, DeepSpeed config)."""

    name: str
    layouts: tuple[tuple[int, str], ...]


WAYS = (
    Way("4 -> 2 -> 1 -> 4 ranks, zero2", ((4, "zero2"), (2, "zero2"), (1, "zero2"), (4, "zero2"))),
    Way(
        "zero1 -> zero2 -> zero3 -> zero3_offload, 2 ranks",
        ((2, "zero1"), (2, "zero2"), (2, "zero3"), (2, "zero3_offload")),
    ),
    Way(
        "both: 4 zero3 -> 2 zero1 -> 1 zero3_offload -> 4 zero2",
        ((4, "zero3"), (2, "zero1"), (1, "zero3_offload"), (4, "zero2")),
    ),
    Way(
        "both: 1 zero2 -> 4 zero3_offload -> 2 zero3 -> 1 zero1",
        ((1, "zero2"), (4, "zero3_offload"), (2, "zero3"), (1, "zero1")),
    ),
)


def in_float32(name: str, folder: Path) -> str:
    """A config of ds_configs/ in float32, which a CPU without bf16 units computes several times faster."""
    engine = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    for key in ("bf16", "data_types"):
        engine.pop(key, None)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(engine))
    return str((folder / name).absolute())


def play(bench: Bench, way: Way, number: int) -> Outcome:
    """Trains straight in the first layout, and through all four; compares samples, learning rates and losses."""
    outcome = Outcome("other world sizes and ZeRO stages", way.name)
    folder = bench.new_folder(f"world-{number:03d}")
    layouts = [
        Layout(world, in_float32(engine, folder / "engines"), GLOBAL_BATCH // world) for world, engine in way.layouts
    ]
    straight = start(
        command(bench.shards, folder / "straight", layouts[0], *OPTIONS), layouts[0], folder / "straight-0"
    )
    if any(straight.codes):
        outcome.wrong.append(f"the straight run ended with {straight.codes}:\n{straight.log[-2000:]}")
        return outcome
    rates = {line["step"]: line["lr"] for line in read_records(folder / "straight-0/steps-0.jsonl")}
    run = folder / "run"
    for index, layout in enumerate(layouts):
        hitter = index % layout.world
        fault = Fault("SIGTERM", "forward", STOPS[index], hitter, (hitter,)) if index < len(STOPS) else None
        notes = folder / f"start-{index}"
        begun = start(command(bench.shards, run, layout, *OPTIONS), layout, notes, fault)
        code = 85 if fault else 0
        if begun.codes != [code] * layout.world:
            outcome.wrong.append(f"start {index} ended with {begun.codes} instead of {code}:\n{begun.log[-2000:]}")
            return outcome
        outcome.restarted_s = first_step(notes, begun)
        for rank in range(layout.world):
            lines = read_records(notes / f"steps-{rank}.jsonl")
            if not lines or any(line["lr"] != rates[line["step"]] for line in lines):
                outcome.wrong.append(f"learning rates of rank {rank} in start {index} differ: {lines}")
    proof = ledger.compare(run)
    outcome.wrong += [f"ledger: {fault}" for fault in [*proof["faults"], *proof["skipped"]]]
    if ledger.read(run) != ledger.read(folder / "straight"):
        outcome.wrong.append("the ledgers differ")
    one, other = ([r["loss"] for r in read_records(f / "metrics.jsonl")] for f in (run, folder / "straight"))
    largest = max(abs(a - b) for a, b in zip(one, other, strict=True))
    outcome.name += f" (losses within {largest:.1e})"
    if largest > TOLERANCE:
        outcome.wrong.append(f"losses differ by up to {largest:.2e}: {one} {other}")
    if not outcome.wrong:
        shutil.rmtree(folder)
    return outcome
