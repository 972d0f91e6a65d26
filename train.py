"""Trains MedBLIP under deepspeed, torchrun, srun or plain python; goes on where the run folder stopped.

main() reads the options, train() builds and loops, train_step() is one optimizer step of `accumulation` micro-steps.
Sample `(step, micro, rank, j)` stands at position `step * global_batch + (micro * world + rank) * micro_batch + j` of
the stream, so that any number of ranks sees the same global batches. SIGINT, SIGTERM and SIGUSR1 end training after
the step in hand: save, exit code 85.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

import tyro

from medblip.config import TrainConfig, is_url
from medblip.schedule import Schedule, load_deepspeed_config, plan_schedule, positions

SAVED_RUN_ME_AGAIN = 85


def main() -> int:
    """Parses the options and trains; returns the exit code: 0 done, 1 failed, 2 wrong usage, 85 saved and stopped."""
    try:
        config = tyro.cli(TrainConfig, description=TrainConfig.__doc__)
        for option, path in (("--deepspeed_config", config.deepspeed_config), ("--data", config.data)):
            if not is_url(path) and not Path(path).exists():
                raise ValueError(f"{option} {path}: no such file or folder")
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    from medblip import distributed
    from medblip.progress import catch_signals

    distributed.log_to_stderr(int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))
    stopping = catch_signals()
    try:
        return train(config, distributed.setup(), stopping)
    except ValueError as error:
        logging.error("train.py: %s", error)
        return 1


def train(config: TrainConfig, rank, stopping: list[str]) -> int:
    """Builds everything, trains to the last step or until `stopping` holds a signal, and saves."""
    import deepspeed
    import torch

    from medblip import checkpoint
    from medblip.data import Loader, SampleStream
    from medblip.distributed import any_rank, barrier, log
    from medblip.losses import balance
    from medblip.model import MedBLIP
    from medblip.optim import build_optimizer, set_learning_rate
    from medblip.preview import dry_run
    from medblip.progress import Progress, check_same_run, keep_schedule, lock, write_json
    from medblip.shards import Reader, ShardIndex
    from medblip.words import build_words

    run = Path(config.run)
    held = lock(run) if rank.is_main and not config.dry_run else None  # noqa: F841 - held until the process ends
    index = ShardIndex(config.data)
    samples = balance(index.samples("train"), config.balance_classes, config.balance_subjects)
    config = keep_schedule(run, config, rank.world)
    schedule, notes = plan_schedule(config, len(samples), rank.world)
    engine_config = load_deepspeed_config(config.deepspeed_config, schedule)
    for note in notes:
        log.info(note)
    model_config = config.model_config()
    words = build_words(model_config)

    def load_from(step: int) -> Loader:
        return Loader(
            Reader(index, config.read_threads),
            samples,
            SampleStream([sample.shard for sample in samples], config.seed),
            words,
            partial(draw_words, config),
            positions(step, schedule, rank.index, rank.world),
            config.seed,
            pin=rank.device.type == "cuda",
        )

    if config.dry_run:
        return dry_run(config.dry_run, load_from(0), index.grid_size, words, config.seed, run) if rank.is_main else 0

    torch.manual_seed(config.seed)
    bf16 = engine_config.get("bf16", {}).get("enabled", False)
    model = MedBLIP(model_config, index.grid_size, rank.device, torch.bfloat16 if bf16 else torch.float32)
    made_of = {
        "model": dataclasses.asdict(model_config),
        "recipe": index.recipe,
        "frozen": model.frozen_fingerprints(),
        "train_keys": hashlib.sha256(" ".join(sample.key for sample in samples).encode()).hexdigest()[:16],
        "steps": schedule.steps,
        "global_batch": schedule.global_batch,
    }
    folder, step = checkpoint.latest(run), 0
    if folder is not None:
        check_same_run(json.loads((run / "config.json").read_text())["train"], config)
        checkpoint.check_made_of(folder, made_of)
        checkpoint.load_weights(folder, model)
        state = checkpoint.read_state(folder)
        step = state["step"]
        log.info("going on from %s", folder)
        if state["contrastive_batch"] != schedule.contrastive_batch:
            before, now = state["contrastive_batch"], schedule.contrastive_batch
            log.warning("the contrastive batch was %d samples and is now %d: losses will differ", before, now)
    optimizer = build_optimizer(model, schedule, rank.device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config)
    if folder is not None:
        checkpoint.load_engine(folder, engine)

    progress = None
    if rank.is_main:
        settings = {"train": dataclasses.asdict(config), "schedule": dataclasses.asdict(schedule), **made_of}
        if folder is None:
            write_json(run / "config.json", settings)
            (run / "train_subjects.txt").write_text("".join(f"{s}\n" for s in sorted({s.subject for s in samples})))
        write_json(run / "deepspeed.json", engine_config)
        write_json(run / "status.json", {"state": "training", "step": step, "steps": schedule.steps})
        progress = Progress(run, config, step, schedule.steps, schedule.global_batch)

    loader = load_from(step)
    waited_s = 0.0
    while step < schedule.steps and not any_rank(bool(stopping), rank.device):
        lr = set_learning_rate(optimizer, schedule, step)
        losses, step_waited_s = train_step(engine, loader, config, schedule, step, rank, index.grid_size)
        step += 1
        waited_s += step_waited_s
        if progress is not None and (step % config.log_every == 0 or step == schedule.steps):
            progress.step(step, losses, lr, step * schedule.global_batch / len(samples), waited_s)
            waited_s = 0.0
        if step % config.checkpoint_every == 0 or step == schedule.steps:
            save_checkpoint(run, engine, step, schedule, made_of, rank, config.keep_checkpoints)
    loader.close()
    done = step == schedule.steps
    if not done and checkpoint.saved_step(run) != step:
        save_checkpoint(run, engine, step, schedule, made_of, rank, config.keep_checkpoints)
    if progress is not None:
        progress.close()
        write_json(run / "status.json", {"state": "done" if done else "stopped", "step": step, "steps": schedule.steps})
    if done:
        log.info("done: %d steps in %s; medblip evaluate --model %s --data %s is next", step, run, run, config.data)
    else:
        signals = ", ".join(stopping) or "a signal to another rank"
        log.info(
            "stopped by %s after step %d of %d; the same command goes on from there", signals, step, schedule.steps
        )
    barrier()
    return 0 if done else SAVED_RUN_ME_AGAIN


def train_step(engine, loader, config: TrainConfig, schedule: Schedule, step: int, rank, grid_size: int):
    """One optimizer step: returns the losses, averaged over the global batch, and the seconds spent waiting for data.

    Raises:
        ValueError: if the loss is not finite, naming the step, the rank and its sample KEYs.
    """
    import torch

    from medblip.data import to_device
    from medblip.distributed import mean_over_ranks

    dtype = next(engine.module.parameters()).dtype
    waited_s, total = 0.0, 0.0
    keys = []
    for micro in range(schedule.accumulation):
        asked_at = time.monotonic()
        host = next(loader)
        waited_s += time.monotonic() - asked_at
        seed_dropout(config.seed, step, micro, rank.index)
        batch = to_device(host, grid_size, rank.device, dtype, config.seed if config.augment else None)
        losses = engine(batch, config.contrastive)
        engine.backward(losses["loss"])
        engine.step()
        total = total + torch.stack([loss.detach().float() for loss in losses.values()]) / schedule.accumulation
        keys += batch.keys
    means = dict(zip(losses, mean_over_ranks(total).tolist(), strict=True))
    if not all(abs(value) < float("inf") for value in means.values()):
        raise ValueError(
            f"step {step + 1}, rank {rank.index}: a loss is not finite ({means}); samples {' '.join(keys)}"
        )
    return means, waited_s


def save_checkpoint(run: Path, engine, step: int, schedule: Schedule, made_of: dict, rank, keep: int) -> None:
    """Saves where training stands; a collective."""
    from medblip import checkpoint
    from medblip.distributed import log

    state = {
        "step": step,
        "samples": step * schedule.global_batch,
        "contrastive_batch": schedule.contrastive_batch,
        "world_size": rank.world,
        **made_of,
    }
    log.info("saved %s", checkpoint.save(run, engine, state, rank, keep))


def draw_words(config: TrainConfig, record: dict, sample, draw):
    """The words of one sample in one epoch, from its KEY.json."""
    from medblip.text import draw_example

    return draw_example(
        record["fields"],
        record["report"],
        sample.diagnosis,
        config.ehr,
        draw,
        record_dropout=config.record_dropout,
        field_dropout=config.field_dropout,
        query_dropout=config.query_dropout,
        other_questions=config.other_questions,
        extent_mm=[n * edge_mm for n, edge_mm in zip(record["shape"], record["spacing_mm"], strict=True)],
    )


def seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Seeds dropout from where training stands, so that a resumed run needs no stored random state."""
    import torch

    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


if __name__ == "__main__":
    sys.exit(main())
