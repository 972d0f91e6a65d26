"""Writes made-up people as OASIS-3 is downloaded.

    images/OAS30001_MR_d0014/anat1/sub-OAS30001_ses-d0014_T1w.{nii.gz,json}
    tables/OASIS3_data_files/scans/FORM/resources/csv/files/OASIS3_....csv: demographics, forms B4 and D1

There are no dates: days count from a person's first visit, and each scan is two weeks after its visit.
"""

import csv
import json
from pathlib import Path

from sharding.people import Exam, SaveImage, Volunteer

DAYS_TO_SCAN = 14
FORMS = {
    "OASIS3_demographics": "demo-demographics",
    "OASIS3_UDSb4_cdr": "UDSb4-Form_B4__Global_Staging__CDR__Standard_and_Supplemental",
    "OASIS3_UDSd1_diagnoses": "UDSd1-Form_D1__Clinician_Diagnosis___Cognitive_Status_and_Dementia",
}
HEADERS = {
    "OASIS3_demographics": "OASISID,Subject_accession,AgeatEntry,AgeatDeath,GENDER,EDUC,SES,HAND,APOE",
    "OASIS3_UDSb4_cdr": "OASISID,OASIS_session_label,days_to_visit,age at visit,MMSE,memory,orient,judgment,commun,"
    "homehobb,perscare,CDRSUM,CDRTOT,dx1,dx2,dx1_code,dx2_code",
    "OASIS3_UDSd1_diagnoses": "OASISID,OASIS_session_label,days_to_visit,age at visit,WHODIDDX,NORMCOG,DEMENTED,"
    "MCIAMEM,MCIAPLUS,MCINON1,MCINON2,IMPNOMCI,PROBAD,PROBADIF,POSSAD,POSSADIF,DLB,VASC,FTD,alzdis,alzdisif",
}


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes images and tables of the release below `folder`."""
    tables = {stem: [header.split(",")] for stem, header in HEADERS.items()}
    for person in people:
        age = round(person.exams[0].age_years, 2)
        sex, apoe = {"M": 1, "F": 2}[person.sex], f"{person.apoe[0]}{person.apoe[1]}"
        tables["OASIS3_demographics"].append(
            [subject_id(person), f"CENTRAL_S{person.number:05d}", age, "", sex, person.education_years, 2, "R", apoe]
        )
        for exam in person.exams:
            image = folder / image_path(person, exam)
            save(image, person, exam, "PSR")
            sidecar = {"Modality": "MR", "MagneticFieldStrength": 3, "SeriesDescription": "MPRAGE"}
            image.with_name(image.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))
            tables["OASIS3_UDSb4_cdr"].append(_b4(person, exam))
            tables["OASIS3_UDSd1_diagnoses"].append(_d1(person, exam))
    for stem, rows in tables.items():
        path = folder / table_path(stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)


def subject_id(person: Volunteer) -> str:
    """OAS30001, and so on."""
    return f"OAS3{person.number + 1:04d}"


def visit_day(person: Volunteer, exam: Exam) -> int:
    """Days since the first visit."""
    return (exam.date - person.exams[0].date).days


def image_path(person: Volunteer, exam: Exam) -> Path:
    """Where the simplified download has the scan, relative to the release."""
    day = f"d{visit_day(person, exam) + DAYS_TO_SCAN:04d}"
    name = f"sub-{subject_id(person)}_ses-{day}_T1w.nii.gz"
    return Path("images", f"{subject_id(person)}_MR_{day}", "anat1", name)


def table_path(stem: str) -> Path:
    """Where the download of the tables has one of them, relative to the release."""
    return Path("tables", "OASIS3_data_files", "scans", FORMS[stem], "resources", "csv", "files", f"{stem}.csv")


def _visit(person: Volunteer, exam: Exam, form: str) -> list:
    day = visit_day(person, exam)
    return [subject_id(person), f"{subject_id(person)}_{form}_d{day:04d}", day, f"{exam.age_years:.2f}"]


def _b4(person: Volunteer, exam: Exam) -> list:
    text, code = {"CN": ("Cognitively normal", 1), "MCI": ("uncertain dementia", 2), "AD": ("AD Dementia", 3)}[
        exam.diagnosis
    ]
    box = f"{exam.cdr_global:g}"
    scores = [exam.mmse, *[box] * 6, f"{exam.cdr_sb:g}", box]
    return [*_visit(person, exam, "UDSb4"), *scores, text, ".", code, "."]


def _d1(person: Volunteer, exam: Exam) -> list:
    normal, mild, demented = (int(exam.diagnosis == each) for each in ("CN", "MCI", "AD"))
    states = [normal, demented, mild, 0, 0, 0, 0]
    cause = "1" if demented else "."
    return [*_visit(person, exam, "UDSd1"), 2, *states, demented, cause, 0, ".", 0, 0, 0, ".", "."]
