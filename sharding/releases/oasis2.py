"""Writes made-up people as OASIS-2 is downloaded.

    images/OAS2_RAW_PART1/OAS2_0001_MR1/RAW/mpr-1.nifti.{hdr,img}
    tables/oasis_longitudinal.csv: a row per session

Of each session only the first of the repeated images is written.
"""

import csv
from pathlib import Path

from sharding.people import Exam, SaveImage, Volunteer

HEADER = "Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF".split(",")
SUBJECTS_PER_PART = 75


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes images and the table of the release below `folder`."""
    rows = []
    for person in people:
        for exam in person.exams:
            save(folder / image_path(person, exam), person, exam, "ASL")
            rows.append(_row(person, exam))
    table = folder / "tables" / "oasis_longitudinal.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])


def subject_id(person: Volunteer) -> str:
    """OAS2_0001, and so on."""
    return f"OAS2_{person.number + 1:04d}"


def session_id(person: Volunteer, exam: Exam) -> str:
    """OAS2_0001_MR1, and so on."""
    return f"{subject_id(person)}_MR{exam.number + 1}"


def image_path(person: Volunteer, exam: Exam) -> Path:
    """The header of the first repeat, relative to the release."""
    part = f"OAS2_RAW_PART{1 + person.number // SUBJECTS_PER_PART}"
    return Path("images", part, session_id(person, exam), "RAW", "mpr-1.nifti.hdr")


def group(person: Volunteer) -> str:
    """What the release says of a person, with all visits in view."""
    demented = {exam.diagnosis != "CN" for exam in person.exams}
    return "Converted" if len(demented) == 2 else "Demented" if demented == {True} else "Nondemented"


def _row(person: Volunteer, exam: Exam) -> list:
    brain_fraction = {"CN": 0.761, "MCI": 0.732, "AD": 0.708}[exam.diagnosis]
    delay = (exam.date - person.exams[0].date).days
    cells = [subject_id(person), session_id(person, exam), group(person), exam.number + 1, delay]
    cells += [person.sex, "R", int(exam.age_years), person.education_years, 2]
    return [*cells, exam.mmse, f"{exam.cdr_global:g}", 1480, brain_fraction, 1.186]
