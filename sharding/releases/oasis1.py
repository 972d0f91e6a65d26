"""Writes made-up people as OASIS-1 is downloaded.

    images/disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.{hdr,img}
    images/disc1/OAS1_0001_MR1/OAS1_0001_MR1.txt: some fields of the session again
    tables/oasis_cross-sectional.csv: a row per session

Of each session only the gain-field corrected atlas image is written. Everyone has a CDR, the young as well; the second
exam of a person is `_MR2`, of which `Delay` says the days.
"""

import csv
from pathlib import Path

from sharding.people import Exam, SaveImage, Volunteer

HEADER = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay".split(",")
SUBJECTS_PER_DISC = 35


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes images and the table of the release below `folder`."""
    rows = []
    for person in people:
        for exam in person.exams:
            session = session_id(person, exam)
            image = folder / image_path(person, exam)
            save(image, person, exam, "LAS")
            rows.append(_row(person, exam))
            text = "".join(f"{name}: {value}\n" for name, value in zip(HEADER, rows[-1], strict=True))
            (session_folder(folder, person, exam) / f"{session}.txt").write_text(text)
    table = folder / "tables" / "oasis_cross-sectional.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])


def session_id(person: Volunteer, exam: Exam) -> str:
    """OAS1_0001_MR1, and so on."""
    return f"OAS1_{person.number + 1:04d}_MR{exam.number + 1}"


def session_folder(folder: Path, person: Volunteer, exam: Exam) -> Path:
    """The folder of a session in its disc."""
    return folder / "images" / f"disc{1 + person.number // SUBJECTS_PER_DISC}" / session_id(person, exam)


def image_path(person: Volunteer, exam: Exam) -> Path:
    """The header of the atlas image, relative to the release."""
    session = session_id(person, exam)
    name = f"{session}_mpr_n4_anon_111_t88_gfc.hdr"
    return session_folder(Path(), person, exam) / "PROCESSED" / "MPRAGE" / "T88_111" / name


def education_code(years: int) -> int:
    """1 below high school, 2 high school, 3 some college, 4 college, 5 beyond."""
    return 1 + sum(years >= least for least in (12, 13, 16, 17))


def _row(person: Volunteer, exam: Exam) -> list:
    brain_fraction = {"CN": 0.781, "MCI": 0.752, "AD": 0.719}[exam.diagnosis]
    delay = (exam.date - person.exams[0].date).days if exam.number else "N/A"
    code = education_code(person.education_years)
    cells = [session_id(person, exam), person.sex, "R", int(exam.age_years), code, 6 - code]
    return [*cells, exam.mmse, f"{exam.cdr_global:g}", 1480, brain_fraction, 1.186, delay]
