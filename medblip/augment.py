"""Augmentation of volumes on the device: another pose, another scanner, the same brain.

All that is drawn about a sample comes from (seed, epoch, KEY), so that it is the same on any number of ranks and
after a resume. Voxels that are 0 are background (air, or what was stripped or padded) and stay 0 but for the pose.

B samples, X Y Z voxels (RAS+).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

ROTATION_DEG = 8.0
SCALE = 0.08
SHIFT = 0.04
"""Share of the grid's edge, along each axis."""
LOG_GAIN = 0.15
LOG_GAMMA = 0.3
BIAS = 0.15
"""Of the logarithm of the field, the largest amplitude of each wave."""
NOISE = 0.03
"""Largest standard deviation, where 1 is the range of the volume."""
NUM_WAVES = 2


@dataclass(frozen=True)
class Change:
    """What happens to one volume."""

    matrix: tuple[tuple[float, ...], ...]
    """3 x 4, from the new volume's coordinates to the old one's; both run from -1 to 1, in the order X Y Z."""
    gain: float
    gamma: float
    bias: tuple[tuple[float, ...], ...]
    """Amplitudes of the cosine waves of the logarithm of the bias field, for each axis."""
    noise: float
    noise_seed: int


def draw_change(draw: random.Random) -> Change:
    """Draws a left-right flip, a pose, a contrast, a bias field and noise."""
    flip = -1.0 if draw.random() < 0.5 else 1.0
    scales = [math.exp(draw.uniform(-SCALE, SCALE)) for _ in range(3)]
    shifts = [2 * draw.uniform(-SHIFT, SHIFT) for _ in range(3)]
    turn = _rotation([math.radians(draw.uniform(-ROTATION_DEG, ROTATION_DEG)) for _ in range(3)])
    matrix = tuple(
        (turn[row][0] * scales[0] * flip, turn[row][1] * scales[1], turn[row][2] * scales[2], shifts[row])
        for row in range(3)
    )
    return Change(
        matrix=matrix,
        gain=math.exp(draw.uniform(-LOG_GAIN, LOG_GAIN)),
        gamma=math.exp(draw.uniform(-LOG_GAMMA, LOG_GAMMA)),
        bias=tuple(tuple(draw.uniform(-BIAS, BIAS) for _ in range(NUM_WAVES)) for _ in range(3)),
        noise=draw.uniform(0, NOISE),
        noise_seed=draw.getrandbits(62),
    )


def _rotation(angles: list[float]) -> list[list[float]]:
    """The rotation matrix about X, then Y, then Z."""
    (cx, cy, cz), (sx, sy, sz) = [[f(a) for a in angles] for f in (math.cos, math.sin)]
    return [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]


def apply_change(volume_XYZ: Tensor, change: Change) -> Tensor:
    """Changes a float32 volume whose voxels lie in [0, 1], 0 outside the head; nothing becomes negative."""
    device = volume_XYZ.device
    # grid_sample counts axes from the last one.
    matrix_34 = torch.tensor(change.matrix, device=device)
    matrix_34 = torch.cat([matrix_34[:, :3].flip(0, 1), matrix_34[:, 3:].flip(0)], dim=1)
    grid = affine_grid(matrix_34[None], [1, 1, *volume_XYZ.shape], align_corners=False)
    volume_XYZ = grid_sample(volume_XYZ[None, None], grid, align_corners=False)[0, 0]
    is_inside_XYZ = volume_XYZ > 0
    field_X, field_Y, field_Z = (
        _bias(amplitudes, size, device) for amplitudes, size in zip(change.bias, volume_XYZ.shape, strict=True)
    )
    volume_XYZ = volume_XYZ.pow(change.gamma) * (change.gain * field_X[:, None, None] * field_Y[:, None] * field_Z)
    source = torch.Generator(device).manual_seed(change.noise_seed)
    volume_XYZ += change.noise * torch.randn(volume_XYZ.shape, generator=source, device=device)
    return volume_XYZ.clamp(min=0) * is_inside_XYZ


def _bias(amplitudes: tuple[float, ...], size: int, device: torch.device) -> Tensor:
    """One axis' factor of the bias field: the exponential of a sum of cosine waves."""
    place_N = (torch.arange(size, device=device) + 0.5) / size
    waves = (a * torch.cos(math.pi * (wave + 1) * place_N) for wave, a in enumerate(amplitudes))
    return sum(waves, torch.zeros(size, device=device)).exp()
