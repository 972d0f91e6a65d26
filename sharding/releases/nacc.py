"""Writes made-up people as NACC delivers them: sessions of the mixed protocol, and SCAN from LONI.

    images/mri1000.zip                                      NIfTI with JSON, in a folder named like the zip
    images/NACC100001_20100304mri.zip                       the same without the folder
    images/mri1002ni.zip                                    NACCMRFI says mri1002.zip
    images/mri1003/...                                      unpacked
    images/SCAN/NACC100004/MPRAGE_SENSE2/2021-05-04_10_11_12.0/I5004/...nii
    tables/investigator_nacc70.csv, investigator_mri_nacc70.csv
    tables/investigator_scan_mri_nacc70/investigator_scan_mriqc_nacc70.csv

One person after the other comes in one of these five ways. Scans are made three weeks after their visit. From 2015 on
visits have a MoCA and no MMSE, before that the other way round.
"""

import csv
import datetime
import json
import shutil
import zipfile
from pathlib import Path

from sharding.people import Exam, SaveImage, Volunteer

FIRST_PERSON, FIRST_SESSION, FIRST_IMAGE = 100_000, 1000, 5000
DAYS_TO_SCAN = 21
MOCA_SINCE = datetime.date(2015, 3, 1)
SCAN_SERIES = "MPRAGE_SENSE2"
UDS_HEADER = (
    "NACCID NACCADC PACKET FORMVER VISITMO VISITDAY VISITYR NACCVNUM NACCAVST NACCNVST NACCDAYS BIRTHMO BIRTHYR SEX "
    "HISPANIC RACE EDUC MARISTAT NACCAGE HEIGHT WEIGHT NACCBMI MEMORY ORIENT JUDGMENT COMMUN HOMEHOBB PERSCARE CDRSUM "
    "CDRGLOB NACCGDS NACCMMSE TRAILA TRAILB NACCMOCA NORMCOG DEMENTED NACCUDSD IMPNOMCI NACCTMCI NACCETPR NACCALZD "
    "NACCALZP NACCAPOE NACCNE4S"
).split()
MRI_HEADER = (
    "NACCADC NACCID NACCVNUM MRIMO MRIDY MRIYR NACCMRIA NACCMRFI NACCNMRI NACCMNUM NACCMRDY MRIT1 MRIT2 MRIDTI "
    "MRIFLAIR MRIFIELD MRIMANU NACCNIFT NACCDICO NACCMVOL"
).split()
QC_HEADER = "NACCID NACCADC SCANDT STUDYDATE SERIESTYPE SERIESDESCRIPTION SERIESQC SERIESCHOSEN LONIUID".split()
DIAGNOSES = {
    "CN": {"NORMCOG": 1, "DEMENTED": 0, "NACCUDSD": 1, "NACCTMCI": 8, "NACCETPR": 88, "NACCALZD": 8, "NACCALZP": 8},
    "MCI": {"NORMCOG": 0, "DEMENTED": 0, "NACCUDSD": 3, "NACCTMCI": 1, "NACCETPR": 1, "NACCALZD": 1, "NACCALZP": 1},
    "AD": {"NORMCOG": 0, "DEMENTED": 1, "NACCUDSD": 4, "NACCTMCI": 8, "NACCETPR": 1, "NACCALZD": 1, "NACCALZP": 1},
}
NACCAPOE = {(3, 3): 1, (3, 4): 2, (2, 3): 3, (4, 4): 4, (2, 4): 5, (2, 2): 6}


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes images and tables of the release below `folder`."""
    uds, mri, qc = [], [], []
    for person in people:
        for exam in person.exams:
            uds.append(_uds_row(person, exam))
            if person.number % 5 == 4:
                qc.append(_write_scan(person, exam, folder / "images", save))
            else:
                mri.append(_write_session(person, exam, folder / "images", save))
    tables = folder / "tables"
    _write_csv(tables / "investigator_nacc70.csv", UDS_HEADER, uds)
    _write_csv(tables / "investigator_mri_nacc70.csv", MRI_HEADER, mri)
    _write_csv(tables / "investigator_scan_mri_nacc70" / "investigator_scan_mriqc_nacc70.csv", QC_HEADER, qc)


def naccid(person: Volunteer) -> str:
    """NACC and six digits."""
    return f"NACC{FIRST_PERSON + person.number}"


def scan_date(exam: Exam) -> datetime.date:
    """When the MRI of a visit was made."""
    return exam.date + datetime.timedelta(days=DAYS_TO_SCAN)


def session_stem(person: Volunteer, exam: Exam) -> str:
    """The name of the session's zip or folder, without `.zip`."""
    if person.number % 5 == 1:
        return f"{naccid(person)}_{scan_date(exam):%Y%m%d}mri"
    ending = "ni" if person.number % 5 == 2 else ""
    return f"mri{FIRST_SESSION + 20 * exam.number * 1000 + person.number}{ending}"


def image_id(person: Volunteer, exam: Exam) -> str:
    """LONI's id of a SCAN image."""
    return f"I{FIRST_IMAGE + 100_000 * exam.number + person.number}"


def _write_session(person: Volunteer, exam: Exam, images: Path, save: SaveImage) -> dict:
    """Writes a T1 and a FLAIR series with their JSON, zipped but for every fifth person; returns its table row."""
    stem = session_stem(person, exam)
    folder = images / stem
    day = scan_date(exam)
    for number, name, description in ((2, "MPRAGE", "Sag MPRAGE"), (5, "FLAIR", "Ax FLAIR")):
        series = folder / f"{name}_{day:%Y%m%d}_{number}"
        if name == "MPRAGE":
            save(series.with_suffix(".nii.gz"), person, exam, "PSR")
        else:
            _save_flair(series.with_suffix(".nii.gz"))
        sidecar = {"Modality": "MR", "MagneticFieldStrength": 3, "SeriesDescription": description}
        sidecar |= {"ProtocolName": description, "SeriesNumber": number}
        series.with_suffix(".json").write_text(json.dumps(sidecar))
    if person.number % 5 != 3:
        inside = "" if person.number % 5 == 1 else f"{stem}/"
        zip_folder(folder, images / f"{stem}.zip", inside)
    return {
        "NACCADC": 1000, "NACCID": naccid(person), "NACCVNUM": exam.number + 1, "MRIMO": day.month, "MRIDY": day.day,
        "MRIYR": day.year, "NACCMRIA": int(exam.age_years + DAYS_TO_SCAN / 365.25),
        "NACCMRFI": f"{stem.removesuffix('ni')}.zip", "NACCNMRI": len(person.exams),
        "NACCMNUM": exam.number + 1, "NACCMRDY": DAYS_TO_SCAN, "MRIT1": 1, "MRIT2": 0, "MRIDTI": 0,
        "MRIFLAIR": 1, "MRIFIELD": 2, "MRIMANU": 1, "NACCNIFT": 1, "NACCDICO": 0, "NACCMVOL": 0,
    }  # fmt: skip


def zip_folder(folder: Path, path: Path, inside: str) -> None:
    """Moves a folder's files into a zip, below `inside`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, f"{inside}{file.relative_to(folder).as_posix()}")
    shutil.rmtree(folder)


def _save_flair(path: Path) -> None:
    import nibabel as nib
    import numpy as np

    nib.Nifti1Image(np.zeros((16, 16, 8), np.int16), np.diag([4.0, 4, 8, 1])).to_filename(path)


def _write_scan(person: Volunteer, exam: Exam, images: Path, save: SaveImage) -> dict:
    """Writes one SCAN image in LONI's tree; returns its row of the quality table."""
    day, image = scan_date(exam), image_id(person, exam)
    name = f"NACC_{naccid(person)}_MR_{SCAN_SERIES}_br_raw_{day:%Y%m%d}101112_S{image[1:]}_{image}.nii"
    leaf = images / "SCAN" / naccid(person) / SCAN_SERIES / f"{day}_10_11_12.0" / image
    save(leaf / name, person, exam, "PSR")
    return {
        "NACCID": naccid(person), "NACCADC": 1000, "SCANDT": f"{day}", "STUDYDATE": f"{day}", "SERIESTYPE": "T1w",
        "SERIESDESCRIPTION": SCAN_SERIES.replace("_", " "), "SERIESQC": "pass", "SERIESCHOSEN": 1, "LONIUID": image,
    }  # fmt: skip


def _uds_row(person: Volunteer, exam: Exam) -> dict:
    has_moca = exam.date >= MOCA_SINCE
    return {
        "NACCID": naccid(person), "NACCADC": 1000, "PACKET": "F" if exam.number else "I",
        "FORMVER": "3" if has_moca else "2", "VISITMO": exam.date.month, "VISITDAY": exam.date.day,
        "VISITYR": exam.date.year, "NACCVNUM": exam.number + 1, "NACCAVST": len(person.exams),
        "NACCNVST": len(person.exams), "NACCDAYS": (exam.date - person.exams[0].date).days,
        "BIRTHMO": person.born.month, "BIRTHYR": person.born.year, "SEX": {"M": 1, "F": 2}[person.sex],
        "HISPANIC": 0, "RACE": 1, "EDUC": person.education_years, "MARISTAT": 1, "NACCAGE": int(exam.age_years),
        "HEIGHT": 88.8, "WEIGHT": 888, "NACCBMI": 888.8, "MEMORY": exam.cdr_global, "ORIENT": -4, "JUDGMENT": -4,
        "COMMUN": -4, "HOMEHOBB": -4, "PERSCARE": -4, "CDRSUM": f"{exam.cdr_sb:g}", "CDRGLOB": f"{exam.cdr_global:g}",
        "NACCGDS": 88, "NACCMMSE": -4 if has_moca else exam.mmse, "TRAILA": 995, "TRAILB": 998,
        "NACCMOCA": exam.moca if has_moca else -4, "IMPNOMCI": 0, **DIAGNOSES[exam.diagnosis],
        "NACCAPOE": NACCAPOE[person.apoe], "NACCNE4S": person.apoe.count(4),
    }  # fmt: skip


def _write_csv(path: Path, header: list[str], rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
