"""One forward and backward of full-size towers with random weights on the CPU, in bf16, and the memory it takes.

- vision: EVA-ViT-g as deep and wide as published, with a small MedQFormer and language model;
- language: a GPT-2 of BioMedLM's size with LoRA, with a small vision tower.

Each in a process of its own. Checkpoints are written to a temporary folder (2 and 5 GB) and read as any other. What is
found must be finite; the resident memory is set beside what the shapes say: weights, gradients, and the activations of
`medblip plan`. On a CPU without bf16 units it takes some minutes.

    python bench/full_size.py [--cases vision language] [--json full_size.json]
"""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

EVA = dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224)
BIOMEDLM = dict(n_embd=2560, n_layer=32, n_head=20, n_positions=1024)
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which towers to run at full size."""

    cases: tuple[str, ...] = ("vision", "language")
    """vision, language."""
    json: Path | None = None
    """File for the table."""
    one: str = ""
    """Run one case in this process, with the checkpoints in this folder (what the bench calls itself with)."""


def main(options: Options) -> int:
    """Runs each case in a process and prints the table."""
    if options.one:
        print(json.dumps(measure(options.cases[0], Path(options.one))))
        return 0
    rows = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoints(case, Path(folder))
            command = [sys.executable, __file__, "--cases", case, "--one", folder]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print("\n".join(f"{case:<10}{name:<34}{value}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def write_checkpoints(case: str, folder: Path) -> None:
    """The full-size tower in bf16 with random weights; for vision also a MedQFormer that reads its width."""
    from transformers import (
        AutoTokenizer,
        Blip2QFormerModel,
        Blip2VisionConfig,
        Blip2VisionModel,
        GPT2Config,
        GPT2LMHeadModel,
    )

    from medblip import towers

    torch.set_default_dtype(torch.bfloat16)
    if case == "vision":
        Blip2VisionModel(Blip2VisionConfig(**EVA, patch_size=14, qkv_bias=True)).save_pretrained(folder / "vision")
        small = towers.locate("tiny/qformer")
        config = Blip2QFormerModel.from_pretrained(small).config
        config.encoder_hidden_size = EVA["hidden_size"]
        Blip2QFormerModel(config).save_pretrained(folder / "qformer")
        AutoTokenizer.from_pretrained(small).save_pretrained(folder / "qformer")
    else:
        tokenizer = AutoTokenizer.from_pretrained(towers.locate("tiny/gpt2"))
        ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
        GPT2LMHeadModel(GPT2Config(**BIOMEDLM, vocab_size=28896, **ids)).save_pretrained(folder / "language")
        tokenizer.save_pretrained(folder / "language")


def measure(case: str, folder: Path) -> dict:
    """Loads, runs forward and backward of one sample, and returns losses, seconds and memory."""
    from medblip.config import PRESETS
    from medblip.data import Batch
    from medblip.model import MedBLIP
    from medblip.text import draw_example
    from medblip.words import build_words

    torch.manual_seed(0)
    grid, edge = (224, 32) if case == "vision" else (96, 16)
    parts = {name.name: str(name) for name in folder.iterdir()}
    config = dataclasses.replace(PRESETS["tiny"].model, patch_edge=edge, **parts)
    model = MedBLIP(config, grid, torch.device("cpu"), torch.bfloat16).to(torch.bfloat16).train()
    examples = [draw_example({"age_years": 71, "sex": "F"}, "", "AD", "demographics", random.Random(0))]
    words = build_words(config).batch(examples, ["somebody"], ["key"])
    volume_BXYZ = torch.randn(1, grid, grid, grid, dtype=torch.bfloat16)
    batch = Batch(keys=["key"], volume_BXYZ=volume_BXYZ, weight_B=torch.ones(1), **words)
    planned = by_the_plan(config, grid)
    loaded = resident_gb()
    started_at = time.perf_counter()
    losses = model(batch)
    after_forward, forward_s = resident_gb(), time.perf_counter() - started_at
    losses["loss"].backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    finite = all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trained)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / GB
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None) / GB
    assert losses["loss"].isfinite() and finite, "not finite"
    return {
        "loss": round(losses["loss"].item(), 3),
        "all gradients finite": bool(finite),
        "parameters, M": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1),
        "trained, M": round(sum(parameter.numel() for parameter in trained) / 1e6, 1),
        "weights, GB": round(weights, 3),
        "gradients, GB": round(gradients, 3),
        "resident when loaded, GB": round(loaded, 3),
        "resident after forward, GB": round(after_forward, 3),
        "activations seen, GB": round(after_forward - loaded, 3),
        "activations by the plan, GB": round(sum(planned[:-1]) / GB, 3),
        "peak by the plan, GB": round(weights + gradients + sum(planned) / GB, 3),
        "peak resident, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 3),
        "forward, s": round(forward_s, 1),
        "forward and backward, s": round(time.perf_counter() - started_at, 1),
    }


def by_the_plan(config, grid: int):
    """The plan's activations of one sample: for the longest texts, and with fused attention, which a CPU lacks."""
    from medblip.plan import activations, build

    return activations(build(config, grid, 2), config, grid, 1)[False]


def resident_gb() -> float:
    """Memory of this process that is not a file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / GB
    raise AssertionError("no RssAnon in /proc/self/status")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
