"""Writes made-up people as MIRIAD is downloaded from its XNAT.

    images/miriad_188/miriad_188_AD_M_01_MR_1/miriad_188_AD_M_01_MR_1.nii
    tables/mr_sessions.csv, clinical.csv, subjects.csv: what XNAT lists

MIRIAD has no MCI: such people are left out. A person's yearly exams are MIRIAD's visits of weeks 0, 52 and 104.
"""

import csv
from pathlib import Path

from sharding.people import SaveImage, Volunteer

VISITS = (1, 7, 9)
FIRST_NUMBER = 188


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes images and tables of the release below `folder`."""
    sessions = [["MR ID", "Project", "Date", "Subject", "M/F", "Age", "Type", "Scanner", "Scans"]]
    clinical = [["id", "Label", "Subject", "Gender", "MMSE"]]
    subjects = [["Subject", "M/F", "Group"]]
    for person in people:
        number = FIRST_NUMBER + person.number
        subject = f"miriad_{number}"
        group = {"CN": "HC", "AD": "AD", "MCI": None}[person.exams[0].diagnosis]
        if group is None:
            continue
        subjects.append([subject, person.sex, group])
        for visit, exam in zip(VISITS, person.exams, strict=False):
            name = f"miriad_{number}_{group}_{person.sex}_{visit:02d}_MR_1"
            save(folder / "images" / subject / name / f"{name}.nii", person, exam, "LSP")
            label = f"{subject}_{visit}_MR_1"
            sessions.append(
                [label, "miriad", "", subject, person.sex, f"{exam.age_years:.2f}", "MRI", "GE Signa", "T1(1)"]
            )
            gender = {"F": "female", "M": "male"}[person.sex]
            clinical.append([f"MIRIAD_E{len(clinical):05d}", f"{subject}_{visit}_MMSE", subject, gender, exam.mmse])
    for name, rows in (("mr_sessions", sessions), ("clinical", clinical), ("subjects", subjects)):
        path = folder / "tables" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
