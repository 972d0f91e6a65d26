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
    """Sets and returns the learning rate of a step (counted from 0); it is above 0 from the first to the last."""
    lr = schedule.learning_rate * learning_rate_factor(step + 1, schedule.steps + 1, schedule.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters only; vectors (biases, norms, temperature) are not decayed.

    torch's own AdamW, because its state continues bit for bit after a resume (DeepSpeed's CPU Adam does not).
    """
    parameters = trainable(model).values()
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = next(iter(decayed)).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)
