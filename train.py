"""Trains MedBLIP under deepspeed, torchrun, srun or plain python; goes on where the run folder stopped.

main() reads the options, train() builds and loops, train_step() is one optimizer step of `accumulation` micro-steps.
Sample `(step, micro, rank, j)` stands at position `step * global_batch + (micro * world + rank) * micro_batch + j` of
the stream, so that any number of ranks sees the same global batches. SIGINT, SIGTERM, SIGUSR1 and a file `stop` in the
run folder end training at the next micro-step: save, exit code 85. A rank that dies or hangs ends the others with 86.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from medblip.config import TrainConfig, is_url
from medblip.ds_config import load_deepspeed_config
from medblip.schedule import Schedule, plan_schedule, positions


def main() -> int:
    """Parses the options and trains; returns the exit code.

    0 done, 1 failed for good, 2 wrong usage, 85 saved and stopped, 86 another rank died or hangs: run it again.
    """
    try:
        config = tyro.cli(TrainConfig, description=TrainConfig.__doc__)
        for option, path in (("--deepspeed_config", config.deepspeed_config), ("--data", config.data)):
            if not is_url(path) and not Path(path).exists():
                raise ValueError(f"{option} {path}: no such file or folder")
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    from medblip.stopping import Stopping

    stopping = Stopping()
    from medblip import distributed
    from medblip.failure import report
    from medblip.watch import Watch

    distributed.log_to_stderr(int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))
    watch = None
    try:
        rank = distributed.setup()
        watch = Watch(rank, config.step_timeout_s)
        code = train(config, rank, stopping, watch)
        watch.doing("leaving", 0, is_slow=True)  # rank 0 may still send its curves
        distributed.barrier()
        watch.close()
        return code
    except Exception as error:
        # Not a plain return: other ranks may be in a collective that never ends, and torch's clean-up waits for it.
        distributed.leave(report(error, config, watch))


def train(config: TrainConfig, rank, stopping, watch) -> int:
    """Builds everything, trains to the last step or until `stopping` is wanted, and saves."""
    import deepspeed
    import torch
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from medblip import checkpoint, ledger
    from medblip.data import Loader, SampleStream
    from medblip.distributed import Control, barrier, log, set_timeouts
    from medblip.doctor import check
    from medblip.losses import balance
    from medblip.model import MedBLIP
    from medblip.optim import GradientCheck, build_optimizer, set_learning_rate
    from medblip.preview import dry_run
    from medblip.progress import Progress, Status, keep_schedule, lock, write_json
    from medblip.shards import Reader, ShardIndex
    from medblip.stopping import SAVED_RUN_ME_AGAIN
    from medblip.tally import Tally
    from medblip.validation import Validation
    from medblip.watch import SLOW_S
    from medblip.words import build_words

    run = Path(config.run)
    held = lock(run) if rank.is_main and not config.dry_run else None  # noqa: F841 - held until the process ends
    control = Control(rank)
    check(config, rank, control)
    index = ShardIndex(config.data)
    samples = balance(index.samples("train"), config.balance_classes, config.balance_subjects)
    config = keep_schedule(run, config, rank.world)
    schedule, notes = plan_schedule(config, len(samples), rank.world)
    engine_config = load_deepspeed_config(config.deepspeed_config, schedule, run)
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
            questions=schedule.questions_per_scan,
        )

    if config.dry_run:
        return dry_run(config.dry_run, load_from(0), index.grid_size, words, config.seed, run) if rank.is_main else 0

    status = Status(run, rank, schedule.steps)
    if rank.is_main:
        stopping.watch_file(run)
    stopping.at_once = False

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
    folder, step, state = control.from_main(checkpoint.newest_whole(run, made_of) if rank.is_main else None), 0, {}
    if folder is not None:
        checkpoint.load_weights(folder, model)
        state = checkpoint.read_state(folder)
        step = state["step"]
        log.info("going on from %s", folder)
        if state["contrastive_batch"] != schedule.contrastive_batch:
            before, now = state["contrastive_batch"], schedule.contrastive_batch
            log.warning("the contrastive batch was %d samples and is now %d: losses will differ", before, now)
    gradients = GradientCheck(model, rank.device)
    optimizer = build_optimizer(model, schedule, rank.device)
    if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))  # torch's AdamW, under a class of our own
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config)
    set_timeouts(2 * max(config.step_timeout_s, SLOW_S))  # the watch speaks first, and names the culprit
    if folder is not None:
        checkpoint.load_engine(folder, engine)
    if control.any(stopping.wanted)[0]:
        stopping.take_file()
        log.info("stopped by %s before the first step: nothing to save", stopping.reasons or "another rank's signal")
        status.write("stopped", step, stopped_by=stopping.reasons)
        return SAVED_RUN_ME_AGAIN

    progress = None
    if rank.is_main:
        settings = {"train": dataclasses.asdict(config), "schedule": dataclasses.asdict(schedule)}
        settings |= {"scans": len(samples), **made_of}
        if folder is None:
            write_json(run / "config.json", settings)
            (run / "train_subjects.txt").write_text("".join(f"{s}\n" for s in sorted({s.subject for s in samples})))
        write_json(run / "deepspeed.json", engine_config)
        ledger.cut_back(run, step)
        progress = Progress(run, config, step, schedule.steps, schedule.global_batch)
    status.saved = step or None
    status.write("training", step)
    barrier()  # nobody writes into the ledger before it is cut back
    layout = {"rank": rank.index, "world": rank.world}
    layout |= {"micro_batch": schedule.micro_batch, "accumulation": schedule.accumulation}
    account = ledger.Ledger(run, step, layout)
    writer = checkpoint.Writer(run, rank, config.keep_checkpoints, config.keep_every, step or None)
    parts = Parts(engine, optimizer, gradients, control, stopping, watch, rank, index.grid_size)
    validation = Validation(config, index, words, parts, schedule.micro_batch, state)
    tally = Tally(math.ceil(config.max_skipped * len(samples)), config.max_nonfinite)

    def save() -> float:
        watch.doing("saving", step, is_slow=True)
        account.sync()
        state = {
            "step": step,
            "samples": step * schedule.global_batch,
            "contrastive_batch": schedule.contrastive_batch,
            "world_size": rank.world,
            **validation.state,
            **made_of,
        }
        return writer.save(engine, state)

    missed = validation.catch_up(step)
    if progress is not None:
        progress.add_to_last(step, missed)
    loader = load_from(step)
    waited_s, stalled_s = 0.0, 0.0
    while step < schedule.steps:
        lr = set_learning_rate(optimizer, schedule, step)
        result = train_step(parts, loader, config, schedule, step)
        if result is None:
            break
        step += 1
        waited_s += result.waited_s
        account.step(step, result.keys)
        tally.add(step, result, control, account)
        found = validation.after(step)
        if step % config.checkpoint_every == 0 or step == schedule.steps or validation.is_best(step):
            stalled_s += save()
        if progress is not None and (step % config.log_every == 0 or step == schedule.steps or found):
            epoch = step * schedule.global_batch / len(samples)
            progress.step(step, result.losses, lr, epoch, waited_s, tally.counts() | found, stalled_s)
            waited_s, stalled_s = 0.0, 0.0
        status.saved = writer.saved_step
        status.write("training", step)
    loader.close()
    done = step == schedule.steps
    watch.doing("saving", step, is_slow=True)
    writer.wait()
    if step and control.any(rank.is_main and writer.saved_step != step)[0]:  # also a save that failed before
        save()
    is_saved = control.from_main(writer.wait())
    account.close()
    if progress is not None:
        progress.close()
    status.saved = writer.saved_step
    if not is_saved:
        raise OSError(f"the last checkpoint, of step {step}, could not be written: {writer.error or 'see rank 0'}")
    if done:
        status.write("done", step)
        log.info("done: %d steps in %s; medblip evaluate --model %s --data %s is next", step, run, run, config.data)
        return 0
    stopping.take_file()
    reasons = sorted({reason for some in control.gather(stopping.reasons) for reason in some})
    status.write("stopped", step, stopped_by=reasons)
    log.info(
        "stopped by %s after step %d of %d; the same command goes on from there",
        *(", ".join(reasons), step, schedule.steps),
    )
    return SAVED_RUN_ME_AGAIN


@dataclass(frozen=True)
class Parts:
    """What a training step works with."""

    engine: object
    optimizer: object
    gradients: object
    control: object
    stopping: object
    watch: object
    rank: object
    grid_size: int


def train_step(parts: Parts, loader, config: TrainConfig, schedule: Schedule, step: int):
    """One optimizer step: a StepResult; None, with nothing changed, if a rank was asked to stop before its end.

    A step in which any rank met a loss or a gradient that is not finite changes no weight and no moment.
    """
    import torch

    from medblip.data import to_device
    from medblip.distributed import mean_over_ranks
    from medblip.tally import StepResult

    engine, rank, watch = parts.engine, parts.rank, parts.watch
    dtype = next(engine.module.parameters()).dtype
    waited_s, total = 0.0, 0.0
    keys, unreadable = [], {}
    for micro in range(schedule.accumulation):
        watch.doing("waiting for data", step + 1)
        asked_at = time.monotonic()
        host = loader.next_unless(lambda: parts.stopping.wanted)
        waited_s += time.monotonic() - asked_at
        watch.doing("agreeing", step + 1)
        if parts.control.any(host is None or parts.stopping.wanted)[0]:
            return None
        seed_dropout(config.seed, step, micro, rank.index)
        watch.doing("in the forward pass", step + 1)
        batch = to_device(host, parts.grid_size, rank.device, dtype, config.seed if config.augment else None)
        losses = engine(batch, config.contrastive)
        watch.doing("in the backward pass", step + 1)
        engine.backward(losses["loss"])
        total = total + torch.stack([loss.detach().float() for loss in losses.values()]) / schedule.accumulation
        keys += batch.keys
        unreadable |= host.unreadable
        if micro + 1 < schedule.accumulation:
            engine.step()
    watch.doing("in the optimizer step", step + 1)
    means = dict(zip(losses, mean_over_ranks(total).tolist(), strict=True))
    is_bad = parts.gradients.take() or not all(map(math.isfinite, means.values()))
    is_bad, is_unreadable = parts.control.any(is_bad, bool(unreadable))
    parts.optimizer.skip = is_bad
    engine.step()
    return StepResult(means, keys, waited_s, unreadable, is_unreadable, is_bad)


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
