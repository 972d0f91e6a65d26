"""Scans with the size, the axes and the noise of a clinical T1, for timing: made-up patients on a scanner's grid.

Demo scans are small and nearly free of noise in air, so they read and compress several times too well for a benchmark.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from sharding.madeup import draw_patient, draw_scan, load_template, render, write_oriented

IN_PLANE = 256  # voxels of 1 mm, front-back and up-down
SLICES = (166, 176)  # of 1.2 mm, from ear to ear; the last is not included
NOISE = 0.02  # of the image's range, in each channel of the Rician noise
INTENSITY_RANGE = 1000


def write_realistic_scans(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Writes sagittal scans `scan-000.nii.gz`, 256 x 256 x 166..175, 1 x 1 x 1.2 mm, int16, about 12 MB each.

    A pure function of (count, seed).
    """
    folder.mkdir(parents=True, exist_ok=True)
    template = load_template()
    paths = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        patient = draw_patient(seed, "BENCH", number)
        spacing_mm = np.array([1.2, 1.0, 1.0])
        scan = replace(draw_scan(seed, "BENCH", number, 0, "A"), spacing_mm=spacing_mm, noise=0.0)
        head_XYZ = render(template, patient, scan, patient.age_years, effect=1.0)
        shape = (int(rng.integers(*SLICES)), IN_PLANE, IN_PLANE)
        # The scanner's box is wider than the drawn one: air at the sides, and the head near the upper end.
        before = [(shape[0] - head_XYZ.shape[0]) // 2, (shape[1] - head_XYZ.shape[1]) // 2, shape[2] - 10]
        before[2] -= head_XYZ.shape[2]
        image = np.zeros(shape, np.float32)
        image[tuple(slice(b, b + n) for b, n in zip(before, head_XYZ.shape, strict=True))] = head_XYZ
        real, imaginary = rng.standard_normal((2, *shape), dtype=np.float32) * NOISE
        image = np.hypot(image + real, imaginary)
        affine = np.diag([*spacing_mm, 1.0])
        affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing_mm
        stored = nib.Nifti1Image((image * INTENSITY_RANGE).round().astype(np.int16), affine)
        paths.append(folder / f"scan-{number:03d}.nii.gz")
        write_oriented(paths[-1], stored, "PIR")
    return paths
