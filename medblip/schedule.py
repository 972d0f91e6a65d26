"""How a run divides its data into steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from medblip.config import PRESETS, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run divides its data into steps; worked out once, stored, and kept on resume."""

    steps: int
    global_batch: int
    micro_batch: int
    accumulation: int
    warmup_steps: int
    learning_rate: float
    lora_learning_rate: float
    weight_decay: float
    questions_per_scan: int = 1

    @property
    def contrastive_batch(self) -> int:
        """Samples contrasted with each other: those of one micro-step over all ranks."""
        return self.global_batch // self.accumulation


def plan_schedule(config: TrainConfig, num_samples: int, world_size: int) -> tuple[Schedule, list[str]]:
    """Divides `num_samples` into optimizer steps for `world_size` ranks.

    Returns the schedule and what a person should be told about it.

    Raises:
        ValueError: if the ranks and the micro-batch do not divide the global batch.
    """
    preset = PRESETS[config.preset]
    notes = []
    global_batch = config.global_batch
    if global_batch is None:
        unit = world_size * (config.micro_batch or 1)
        global_batch = max(unit, preset.global_batch - preset.global_batch % unit)
        if global_batch > num_samples:
            global_batch = max(unit, num_samples - num_samples % unit)
            notes.append(f"global batch {global_batch}: the data has only {num_samples} training samples")
    if global_batch % world_size:
        raise ValueError(f"--global-batch {global_batch} is not a multiple of the {world_size} ranks")
    per_rank = global_batch // world_size
    micro = config.micro_batch
    if micro is None:
        micro = max(size for size in range(1, min(preset.micro_batch, per_rank) + 1) if per_rank % size == 0)
    elif per_rank % micro:
        raise ValueError(
            f"--global-batch {global_batch} over {world_size} ranks is {per_rank} samples a rank, "
            f"which --micro-batch {micro} does not divide"
        )
    steps = config.steps or -(-preset.epochs * num_samples // global_batch)
    if config.steps is None:
        notes.append(f"{steps} steps: {preset.epochs} epochs of {num_samples} samples in batches of {global_batch}")
    return (
        Schedule(
            steps=steps,
            global_batch=global_batch,
            micro_batch=micro,
            accumulation=per_rank // micro,
            warmup_steps=max(1, round(config.warmup_fraction * steps)),
            **{
                name: getattr(preset if getattr(config, name) is None else config, name)
                for name in ("learning_rate", "lora_learning_rate", "weight_decay", "questions_per_scan")
            },
        ),
        notes,
    )


def positions(first_step: int, schedule: Schedule, rank: int, world: int) -> Iterator[list[int]]:
    """Stream positions of each micro-batch of one rank, from a step on."""
    for step in range(first_step, schedule.steps):
        for micro in range(schedule.accumulation):
            first = step * schedule.global_batch + (micro * world + rank) * schedule.micro_batch
            yield list(range(first, first + schedule.micro_batch))
