"""A made-up study like the small public ones: few people, skull-stripped 2 mm brains, a disease that is hard to see.

198 people above 60 with a diagnosis (98 CN, 100 "AD": very mild to moderate) and 240 younger people without one, a scan
each, in the order of the study: which is whose is a function of (seed, number). The brains are those of
`sharding.madeup`, without scalp, in a common pose as after an affine registration, with more of their own shape and
own atrophy. Strength is set so that simple models score what they score on a real study of this size: a linear SVM on
4 mm voxels an AUC of about 0.69, the MMSE alone about 0.87, age nothing.
"""

from __future__ import annotations

import csv
import datetime
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from sharding.madeup import Patient, Scan, generator, load_template, render

NUM_CN, NUM_AD, NUM_YOUNG = 98, 100, 240
NUM_FOLDS = 5
SPACING_MM = 2.0
EFFECT = 0.25
OWN_ATROPHY_SD = 1.6
"""In the unit of sharding.madeup, where it is 1."""
WARP_WAVES, WARP_RMS_MM = 9, 1.6
"""The shortest half-wave of a personal warp is about 23 mm."""


def draw_person(seed: int, number: int) -> dict:
    """Everything about one person but the scan: the fields of the manifest, and the hidden `severity`."""
    draw = generator(seed, "SMALL", "person", number)
    order = generator(seed, "SMALL", "order").permutation(NUM_CN + NUM_AD + NUM_YOUNG)
    place = order[number]
    person = {
        "sex": str(draw.choice(["F", "M"], p=[0.62, 0.38])),
        "education_years": int(draw.choice([9, 12, 14, 16, 18])),
    }
    if place >= NUM_CN + NUM_AD:
        age = draw.uniform(18, 30) if draw.random() < 0.6 else draw.uniform(30, 60)
        return person | {"diagnosis": "", "age_years": int(age), "severity": 0.0}
    age = int(np.clip(draw.normal(76, 8), 60, 96))
    if place < NUM_CN:
        mmse = draw.normal(29.0, 1.2)
        return person | {"diagnosis": "CN", "age_years": age, "severity": 0.0, "mmse": _mmse(mmse), "cdr_global": 0}
    severity = float(draw.gamma(4, 0.25))  # 1 on the average
    mmse = 29.0 - 4.3 * severity + draw.normal(0, 2.6)
    stage = 0.5 if severity < 1.15 else 1 if severity < 2.3 else 2
    hidden = {"severity": severity, "mmse": _mmse(mmse), "cdr_global": stage}
    return person | {"diagnosis": "AD", "age_years": age} | hidden


def _mmse(score: float) -> int:
    return int(np.clip(np.round(score), 0, 30))


def draw_brain(seed: int, number: int) -> np.ndarray:
    """The person's brain, int16 X Y Z at 2 mm in RAS+; 0 outside the brain."""
    person, draw = draw_person(seed, number), generator(seed, "SMALL", "scan", number)
    # The young differ by age alone; sharding.madeup's atrophy begins in middle age, this one at 20.
    own_atrophy = OWN_ATROPHY_SD * draw.normal(0, 1, 3) + 3
    patient = Patient(
        diagnosis=person["diagnosis"] or "CN",
        severity=person["severity"],
        age_years=person["age_years"],
        sex=person["sex"],
        education_years=0,
        apoe_e4=0,
        scanned_first=datetime.date(2000, 1, 1),
        own_atrophy=own_atrophy,
        head_scale=draw.normal(1.0, 0.012, 3),
        warp_mm=draw.normal(0, WARP_RMS_MM / WARP_WAVES**1.5, (3, *[WARP_WAVES] * 3)),
    )
    gm, wm, csf = draw.normal((0.62, 0.88, 0.24), (0.03, 0.025, 0.03)).tolist()
    scan = Scan(
        rotation_deg=draw.normal(0, 1, 3),
        translation_mm=draw.normal(0, 0.7, 3),
        spacing_mm=np.full(3, SPACING_MM),
        orientation="RAS",
        gm=gm,
        wm=wm,
        csf=csf,
        scalp=0.0,
        gamma=draw.uniform(0.85, 1.2),
        bias=draw.normal(0, 0.06 / 3**1.5, [3] * 3),
        noise=0.0,
        noise_seed=0,
        intensity_range=1000.0,
        field_strength_t=1.5,
    )
    brain_XYZ = render(load_template(), patient, scan, person["age_years"], EFFECT)
    return stripped(brain_XYZ, 0.03, draw)


def stripped(brain_XYZ: np.ndarray, noise: float, draw: np.random.Generator) -> np.ndarray:
    """A rendered scan without scalp as int16, with Rician noise inside the brain and 0 outside it."""
    from scipy import ndimage

    inside_XYZ = ndimage.binary_fill_holes(brain_XYZ > 0.1)
    real_XYZ, imaginary_XYZ = (noise * draw.normal(size=brain_XYZ.shape) for _ in range(2))
    noisy_XYZ = np.hypot(brain_XYZ + real_XYZ, imaginary_XYZ)
    return np.where(inside_XYZ, 1000 * noisy_XYZ, 0).round().astype(np.int16)


def write_images(folder: Path, seed: int, workers: int = 2) -> list[dict]:
    """Writes every scan as NIfTI; returns the manifest's rows, without split, in the order of the study."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    numbers = range(NUM_CN + NUM_AD + NUM_YOUNG)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_write, [(folder, seed, number) for number in numbers], chunksize=10))
    rows = []
    for number in numbers:
        person = draw_person(seed, number)
        del person["severity"]
        rows.append({"image": _name(number), "subject_id": f"S{number:04d}", "cohort": "SMALL", **person})
    return rows


def write_manifest(path: Path, rows: list[dict], fold: int) -> None:
    """A manifest in which one fold of the people with a diagnosis is the test split, and all others train."""
    columns = "image subject_id cohort diagnosis age_years sex education_years mmse cdr_global split".split()
    seen: dict[str, int] = {}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            place = seen.get(row["diagnosis"], 0)
            seen[row["diagnosis"]] = place + 1
            is_tested = row["diagnosis"] and place % NUM_FOLDS == fold
            writer.writerow(row | {"split": "test" if is_tested else "train"})


def _name(number: int) -> str:
    return f"images/S{number:04d}.nii.gz"


def _write(job: tuple[Path, int, int]) -> None:
    import torch

    torch.set_num_threads(1)
    folder, seed, number = job
    write_brain(folder / _name(number), draw_brain(seed, number))


def write_brain(path: Path, brain_XYZ: np.ndarray) -> None:
    """Writes a brain as NIfTI, its middle at 0 mm."""
    import nibabel as nib

    affine = np.diag([SPACING_MM] * 3 + [1.0])
    affine[:3, 3] = -(np.array(brain_XYZ.shape) - 1) / 2 * SPACING_MM
    nib.Nifti1Image(brain_XYZ, affine).to_filename(path)
