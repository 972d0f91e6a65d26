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


class AdamW(torch.optim.AdamW):
    """torch's AdamW, whose `step` does nothing, moments included, while `skip` is set.

    torch's own, because its state continues bit for bit after a resume (DeepSpeed's CPU Adam does not).
    """

    skip = False

    def step(self, closure=None):
        """One update, or none."""
        return None if self.skip else super().step(closure)


class GradientCheck:
    """Notes on the device, without waiting for it, whether a gradient of this rank was not finite."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        for parameter in trainable(model).values():
            parameter.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        self._bad |= ~gradient.isfinite().all()

    def take(self) -> bool:
        """Whether there was one since the last call."""
        found = bool(self._bad)
        self._bad.zero_()
        return found


def build_optimizer(model: nn.Module, schedule: Schedule, device: torch.device) -> AdamW:
    """AdamW over the trainable parameters: matrices decay, vectors do not; LoRA has a rate of its own, no decay."""
    parameters = trainable(model)
    lora = [p for name, p in parameters.items() if ".lora_" in name]
    rest = [p for name, p in parameters.items() if ".lora_" not in name]
    groups = [
        ([p for p in rest if p.dim() > 1], schedule.learning_rate, schedule.weight_decay),
        ([p for p in rest if p.dim() <= 1], schedule.learning_rate, 0.0),
        (lora, schedule.lora_learning_rate, 0.0),
    ]
    return AdamW(
        [{"params": p, "peak_lr": peak_lr, "weight_decay": decay} for p, peak_lr, decay in groups if p],
        lr=0.0,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
