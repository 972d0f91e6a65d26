"""Augmentation of volumes on the device: another pose, another scanner, the same brain.

Each volume is flipped or not, shifted by whole voxels and made brighter or darker; a share of them is also turned and
scaled, gets another contrast and bias field, or noise. The shares keep the costly changes rare, as nnU-Net does.
All that is drawn about a sample comes from (seed, epoch, KEY), so that it is the same on any number of ranks and
after a resume. Voxels that are 0 are background (air, or what was stripped or padded) and stay 0 but for the pose.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

GRID_PER_SHIFT = 48
"""Voxels of the grid's edge for each voxel of shift; one voxel at least."""
LOG_GAIN = 0.1
POSE_SHARE, ROTATION_DEG, LOG_SCALE = 0.15, 6.0, 0.05
CONTRAST_SHARE, LOG_GAMMA, BIAS, NUM_WAVES = 0.15, 0.2, 0.1, 2
"""BIAS: of the logarithm of the bias field, the largest amplitude of each wave along each axis."""
NOISE_SHARE, NOISE = 0.1, 0.03
"""NOISE: largest standard deviation, where 1 is the range of the volume."""


@dataclass(frozen=True)
class Change:
    """What happens to one volume, in this order."""

    is_flipped: bool = False
    shift_voxels: tuple[int, int, int] = (0, 0, 0)
    matrix: tuple[tuple[float, float, float], ...] | None = None
    """From the new volume's coordinates to the old one's, about the centre, in the order X Y Z; None: as it is."""
    gamma: float = 1.0
    gain: float = 1.0
    bias: tuple[tuple[float, ...], ...] | None = None
    """For each axis the amplitudes of the cosine waves of the logarithm of the field; None: no field."""
    noise: float = 0.0
    noise_seed: int = 0


def draw_change(draw: random.Random, grid_size: int) -> Change:
    """Draws what happens to one volume of a grid."""
    most = max(1, grid_size // GRID_PER_SHIFT)
    change = {
        "is_flipped": draw.random() < 0.5,
        "shift_voxels": tuple(draw.randint(-most, most) for _ in range(3)),
        "gain": math.exp(draw.uniform(-LOG_GAIN, LOG_GAIN)),
    }
    if draw.random() < POSE_SHARE:
        angles_deg = [draw.uniform(-ROTATION_DEG, ROTATION_DEG) for _ in range(3)]
        turn = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix().tolist()
        scales = [math.exp(draw.uniform(-LOG_SCALE, LOG_SCALE)) for _ in range(3)]
        change["matrix"] = tuple(tuple(t * scale for t, scale in zip(row, scales, strict=True)) for row in turn)
    if draw.random() < CONTRAST_SHARE:
        change["gamma"] = math.exp(draw.uniform(-LOG_GAMMA, LOG_GAMMA))
        change["bias"] = tuple(tuple(draw.uniform(-BIAS, BIAS) for _ in range(NUM_WAVES)) for _ in range(3))
    if draw.random() < NOISE_SHARE:
        change |= {"noise": draw.uniform(0, NOISE), "noise_seed": draw.getrandbits(62)}
    return Change(**change)


def apply_change(volume_XYZ: Tensor, change: Change) -> Tensor:
    """Changes a float32 volume (RAS+) whose voxels lie in [0, 1], 0 outside the head; none becomes negative."""
    if change.is_flipped:
        volume_XYZ = volume_XYZ.flip(0)
    if any(change.shift_voxels):
        volume_XYZ = _shifted(volume_XYZ, change.shift_voxels)
    if change.matrix is not None:
        volume_XYZ = _posed(volume_XYZ, change.matrix)
    if change.gamma != 1:
        volume_XYZ = volume_XYZ.pow(change.gamma)
    volume_XYZ = volume_XYZ * change.gain
    if change.bias is not None:
        for axis, amplitudes in enumerate(change.bias):
            volume_XYZ *= _field(amplitudes, volume_XYZ, axis)
    if change.noise:
        is_background_XYZ = volume_XYZ == 0
        source = torch.Generator(volume_XYZ.device).manual_seed(change.noise_seed)
        volume_XYZ += change.noise * torch.randn(volume_XYZ.shape, generator=source, device=volume_XYZ.device)
        volume_XYZ = volume_XYZ.clamp_(min=0).masked_fill_(is_background_XYZ, 0)
    return volume_XYZ


def _shifted(volume_XYZ: Tensor, shift_voxels: tuple[int, int, int]) -> Tensor:
    """Moved by whole voxels; what leaves the grid is lost and what enters it is 0."""
    shifts_and_sizes = list(zip(shift_voxels, volume_XYZ.shape, strict=True))
    source = tuple(slice(max(0, -shift), size - max(0, shift)) for shift, size in shifts_and_sizes)
    target = tuple(slice(max(0, shift), size - max(0, -shift)) for shift, size in shifts_and_sizes)
    shifted_XYZ = torch.zeros_like(volume_XYZ)
    shifted_XYZ[target] = volume_XYZ[source]
    return shifted_XYZ


def _posed(volume_XYZ: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Resampled by trilinear interpolation. grid_sample counts axes from the last one."""
    matrix_33 = torch.tensor(matrix, device=volume_XYZ.device).flip(0, 1)
    matrix_134 = torch.nn.functional.pad(matrix_33, (0, 1))[None]
    grid = affine_grid(matrix_134, [1, 1, *volume_XYZ.shape], align_corners=False)
    return grid_sample(volume_XYZ[None, None], grid, align_corners=False)[0, 0]


def _field(amplitudes: tuple[float, ...], volume_XYZ: Tensor, axis: int) -> Tensor:
    """One axis' factor of the bias field: the exponential of a sum of cosine waves."""
    place_N = (torch.arange(volume_XYZ.shape[axis], device=volume_XYZ.device) + 0.5) / volume_XYZ.shape[axis]
    log_field_N = sum(a * torch.cos(math.pi * (wave + 1) * place_N) for wave, a in enumerate(amplitudes))
    return log_field_N.exp().view([-1 if other == axis else 1 for other in range(3)])
