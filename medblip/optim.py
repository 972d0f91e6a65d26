"""Optimizer groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from medblip.model import trainable
from medblip.schedule import Schedule


def learning_rate_factor(step: float, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up from 0 to 1, then a cosine down to 0 at `total_steps`."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Sets the learning rates of a step (counted from 0), above 0 from the first to the last; returns the base one."""
    factor = learning_rate_factor(step + 1, schedule.steps + 1, schedule.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return schedule.learning_rate * factor


def build_optimizer(model: nn.Module, schedule: Schedule, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trainable parameters only: matrices decay, vectors do not; LoRA has a rate of its own, no decay.

    torch's own AdamW, because its state continues bit for bit after a resume (DeepSpeed's CPU Adam does not).
    """
    parameters = trainable(model)
    lora = [p for name, p in parameters.items() if ".lora_" in name]
    rest = [p for name, p in parameters.items() if ".lora_" not in name]
    groups = [
        ([p for p in rest if p.dim() > 1], schedule.learning_rate, schedule.weight_decay),
        ([p for p in rest if p.dim() <= 1], schedule.learning_rate, 0.0),
        (lora, schedule.lora_learning_rate, 0.0),
    ]
    return torch.optim.AdamW(
        [{"params": p, "peak_lr": peak_lr, "weight_decay": decay} for p, peak_lr, decay in groups if p],
        lr=0.0,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
