"""Made-up people with their visits: what the writers of made-up releases (sharding/releases) put into tables.

They are the patients of sharding.madeup, so that the scan that is written for a visit shows the disease of its record.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sharding.madeup import draw_patient, draw_scores, generator, write_oriented


@dataclass(frozen=True)
class Exam:
    """One visit."""

    number: int
    """0 is the first."""
    months: int
    """Since the first."""
    date: datetime.date
    age_years: float
    diagnosis: str
    """CN, MCI or AD."""
    mmse: int
    moca: int
    cdr_global: float
    cdr_sb: float


@dataclass(frozen=True)
class Volunteer:
    """A person and their visits, in the order of time."""

    number: int
    sex: str
    """F or M."""
    born: datetime.date
    education_years: int
    apoe: tuple[int, int]
    """The two alleles, e.g. (3, 4)."""
    exams: tuple[Exam, ...]


SaveImage = Callable[[Path, Volunteer, Exam, str], None]
"""save(path, volunteer, exam, axes): writes the scan of that visit with voxel axes such as LAS, PSR or ASL.

The name decides the format: `.nii`, `.nii.gz`, or `.hdr` for an Analyze 7.5 pair, whose header has no orientation.
"""


def draw_volunteers(cohort: str, count: int, exams: int, seed: int) -> list[Volunteer]:
    """`count` people of a cohort with yearly visits, a third of them each of CN, MCI and AD at every visit."""
    return [_draw(cohort, number, exams, seed) for number in range(count)]


def _draw(cohort: str, number: int, num_exams: int, seed: int) -> Volunteer:
    patient = draw_patient(seed, cohort, number)
    exams = []
    for index in range(num_exams):
        scores = draw_scores(patient, generator(seed, cohort, "visit", number, index))
        if patient.diagnosis == "AD":  # several releases know the diagnosis as CDR of 1 and above only
            scores["cdr_global"] = max(scores["cdr_global"], 1)
        exams.append(
            Exam(
                number=index,
                months=12 * index,
                date=patient.scanned_first + datetime.timedelta(days=365 * index),
                age_years=round(patient.age_years + index, 2),
                diagnosis=patient.diagnosis,
                **scores,
            )
        )
    alleles = [4] * patient.apoe_e4 + [3] * (2 - patient.apoe_e4)
    if patient.apoe_e4 == 0 and generator(seed, cohort, "apoe", number).random() < 0.15:
        alleles[0] = 2
    return Volunteer(
        number=number,
        sex=patient.sex,
        born=patient.scanned_first - datetime.timedelta(days=round(patient.age_years * 365.25)),
        education_years=patient.education_years,
        apoe=tuple(sorted(alleles)),
        exams=tuple(exams),
    )


def save_tiny(path: Path, volunteer: Volunteer, exam: Exam, axes: str) -> None:
    """A few thousand voxels in place of a scan: for tests of names and tables. See `SaveImage`."""
    import nibabel as nib

    voxels_XYZ = np.zeros((16, 20, 18), np.int16)
    voxels_XYZ[3:13, 4:16, 3:15] = np.random.default_rng([volunteer.number, exam.number]).integers(
        50, 200, (10, 12, 12)
    )
    write_oriented(path, nib.Nifti1Image(voxels_XYZ, np.diag([4.0, 4, 4, 1])), axes)
