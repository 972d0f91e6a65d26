"""Writes made-up people as a BIDS folder, as Clinica's converter of ADNI leaves it.

participants.tsv, dataset_description.json
sub-ADNI001S0001/sub-ADNI001S0001_sessions.tsv
sub-ADNI001S0001/ses-M012/sub-ADNI001S0001_ses-M012_scans.tsv
sub-ADNI001S0001/ses-M012/anat/sub-ADNI001S0001_ses-M012_T1w.nii.gz
"""

import csv
import json
from pathlib import Path

from sharding.people import Exam, SaveImage, Volunteer

SITE = 1


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes images and tables below `folder`."""
    header = "participant_id sex education_level age_bl apoe4 diagnosis_sc marital_status"
    participants = [header.split()]
    for person in people:
        subject, first = subject_id(person), person.exams[0]
        sc = {"CN": "CN", "MCI": "LMCI", "AD": "AD"}[first.diagnosis]
        apoe_e4 = person.apoe.count(4)
        participants.append(
            [subject, person.sex, person.education_years, first.age_years, apoe_e4, sc, "n/a"],
        )
        header = "session_id age diagnosis MMSE cdr_global cdr_sb adas13 moca examination_date"
        sessions = [header.split()]
        for exam in person.exams:
            scores = [exam.mmse, exam.cdr_global, exam.cdr_sb, "n/a", exam.moca, exam.date]
            sessions.append([session_id(exam), exam.age_years, exam.diagnosis, *scores])
            name = f"{subject}_{session_id(exam)}"
            save(folder / subject / session_id(exam) / "anat" / f"{name}_T1w.nii.gz", person, exam, "RAS")
            scans = [["filename", "acq_time"], [f"anat/{name}_T1w.nii.gz", f"{exam.date}T00:00:00"]]
            write_tsv(folder / subject / session_id(exam) / f"{name}_scans.tsv", scans)
        write_tsv(folder / subject / f"{subject}_sessions.tsv", sessions)
    write_tsv(folder / "participants.tsv", participants)
    about = {"Name": "ADNI", "BIDSVersion": "1.7.0", "DatasetType": "raw"}
    (folder / "dataset_description.json").write_text(json.dumps(about))


def subject_id(person: Volunteer) -> str:
    """sub-ADNI001S0001 is the first."""
    return f"sub-ADNI{SITE:03d}S{person.number + 1:04d}"


def session_id(exam: Exam) -> str:
    """ses-M000, ses-M012, and so on."""
    return f"ses-M{exam.months:03d}"


def write_tsv(path: Path, rows: list[list]) -> None:
    """Writes a table as BIDS has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
