"""The published per-sample load, what benchmarks are measured against.

Source: Qybc/MedBLIP, medblip/dataset.py, written anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

SIZE = 224


def load_published(image: Path) -> torch.Tensor:
    """Reads a scan with SimpleITK, scales it to its minimum and maximum, resizes and pads it to a cube of 224."""
    import SimpleITK

    volume = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image))).astype(np.float32)
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    return pad(resize(volume))


def resize(volume: np.ndarray) -> torch.Tensor:
    """The longest side to 224, aligned corners."""
    new = [SIZE * n // max(volume.shape) for n in volume.shape]
    return torch.nn.functional.interpolate(
        torch.from_numpy(volume)[None, None], size=new, mode="trilinear", align_corners=True
    )[0, 0]


def pad(volume: torch.Tensor) -> torch.Tensor:
    """The 224^3 float32 grid with the volume in its middle."""
    grid = torch.zeros(SIZE, SIZE, SIZE)
    first = [(SIZE - n) // 2 for n in volume.shape]
    grid[tuple(slice(f, f + n) for f, n in zip(first, volume.shape, strict=True))] = volume
    return grid
