"""One rank of two: trains a step in each of the given cells and reports the bytes of the checkpoint that it leaves.

Called as `checkpoint_worker.py FOLDER PRESET,ENGINE,LORA ...`, with torch's variables in the environment; rank 0 writes
FOLDER/sizes.json: cell -> bytes of the checkpoint's folder, trainable weights, weights that share their memory.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from tiny import GRID, make_batch, model_config, tiny_words

from medblip import checkpoint, distributed
from medblip.config import TrainConfig
from medblip.ds_config import load_deepspeed_config
from medblip.model import MedBLIP, trainable
from medblip.optim import AdamW, build_optimizer
from medblip.schedule import plan_schedule


def train_and_save(run: Path, preset: str, engine_name: str, lora: bool, rank) -> list[int]:
    import deepspeed  # after distributed.setup

    config = TrainConfig(
        data="", run=str(run), deepspeed_config=f"ds_configs/{engine_name}.json", preset=preset, steps=1
    )
    schedule, _ = plan_schedule(config, 6, rank.world)
    engine_config = load_deepspeed_config(config.deepspeed_config, schedule)
    precision = torch.bfloat16 if engine_config.get("bf16", {}).get("enabled", False) else torch.float32
    model = MedBLIP(model_config(preset, lora), GRID, rank.device, precision)
    num_trainable = sum(parameter.numel() for parameter in trainable(model).values())
    num_tied = len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, schedule, rank.device), config=engine_config
    )
    batch = make_batch(tiny_words(preset), 3 * rank.index, 3 * rank.index + 3)
    batch = dataclasses.replace(batch, volume_BXYZ=batch.volume_BXYZ.to(precision))
    engine.backward(engine(batch)["loss"])
    engine.step()
    writer = checkpoint.Writer(run, rank, keep=1)
    writer.save(engine, {"step": 1})
    assert writer.wait()
    size_bytes = sum(path.stat().st_size for path in (run / "checkpoints/step-1").glob("*")) if rank.is_main else 0
    return [size_bytes, num_trainable, num_tied]


def main() -> None:
    folder, cells = Path(sys.argv[1]), sys.argv[2:]
    rank = distributed.setup()
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    sizes = {}
    for cell in cells:
        preset, engine, lora = cell.split(",")
        sizes[cell] = train_and_save(folder / cell, preset, engine, lora == "lora", rank)
    if rank.is_main:
        (folder / "sizes.json").write_text(json.dumps(sizes))


main()
