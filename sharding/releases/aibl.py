"""Writes made-up people as AIBL is downloaded from LONI.

    images/AIBL/RID/MPRAGE_ADNI_confirmed/YYYY-MM-DD_hh_mm_ss.0/I123456/AIBL_RID_MR_..._I123456.nii
    tables/Data_extract_3.3.0/aibl_STEM_01-Jun-2018.csv
    tables/AIBL_T1_11_20_2019.csv: the CSV that LONI gives with a collection of images

Visits are 18 months apart (bl, m18, ...); the first has its MRI at 1.5, the others at 3 tesla. EXAMDATE is -4 in
aibl_mmse, as often in the release.
"""

import csv
from pathlib import Path

from sharding.people import Exam, SaveImage, Volunteer

SERIES = "MPRAGE_ADNI_confirmed"
FIRST_RID, FIRST_IMAGE = 2, 100_001
EXTRACT = Path("tables", "Data_extract_3.3.0")


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes images and tables of the release below `folder`."""
    tables = {
        "ptdemog": [["RID", "SITEID", "VISCODE", "PTGENDER", "PTDOB"]],
        "apoeres": [["RID", "SITEID", "VISCODE", "APTESTDT", "APGEN1", "APGEN2"]],
        "pdxconv": [["RID", "SITEID", "VISCODE", "DXCURREN", "DXNORM", "DXMCI", "DXAD", "DXPARK", "DXOTHDEM"]],
        "mmse": [["RID", "SITEID", "VISCODE", "EXAMDATE", "MMSCORE"]],
        "cdr": [["RID", "SITEID", "VISCODE", "EXAMDATE", "CDGLOBAL"]],
        "mrimeta": [["RID", "SITEID", "VISCODE", "EXAMDATE", "MMCONDCT"]],
        "mri3meta": [["RID", "SITEID", "VISCODE", "EXAMDATE", "MMCONDCT"]],
        "flutemeta": [["RID", "SITEID", "VISCODE", "EXAMDATE", "PMCONDCT", "PMMETHOD", "PMSCANNER", "PMQUALITY"]],
        "pibmeta": [["RID", "SITEID", "VISCODE", "EXAMDATE", "PMCONDCT"]],
    }
    header = "Image Data ID,Subject,Group,Sex,Age,Visit,Modality,Description,Type,Acq Date,Format,Downloaded"
    collection = [header.split(",")]
    for person in people:
        rid = FIRST_RID + person.number
        sex = {"M": 1, "F": 2}[person.sex]
        tables["ptdemog"].append([rid, 1, "bl", sex, f"/{person.born.year}"])
        tables["apoeres"].append([rid, 1, "bl", -4, *person.apoe])
        for exam in person.exams:
            _add_visit(tables, rid, exam)
            image = FIRST_IMAGE + 20 * person.number + exam.number
            path = image_path(rid, exam, image)
            save(folder / path, person, exam, "PSR")
            collection.append(
                [image, rid, "Patient", person.sex, int(exam.age_years), exam.number + 1, "MRI", SERIES, "Original"]
                + [f"{exam.date:%m/%d/%Y}", "NiFTI", "11/20/2019"]
            )
    for stem, rows in tables.items():
        _write_csv(folder / EXTRACT / f"aibl_{stem}_01-Jun-2018.csv", rows)
    _write_csv(folder / "tables" / "AIBL_T1_11_20_2019.csv", collection)


def viscode(exam: Exam) -> str:
    """bl, m18, m36, and so on."""
    return f"m{18 * exam.number}" if exam.number else "bl"


def image_path(rid: int, exam: Exam, image: int, series: str = SERIES) -> Path:
    """Where the NIfTI download has the image."""
    name = f"AIBL_{rid}_MR_{series}_Br_{exam.date:%Y%m%d}103100000_S{image + 7}_I{image}.nii"
    return Path("images", "AIBL", str(rid), series, f"{exam.date}_10_31_00.0", f"I{image}", name)


def _add_visit(tables: dict[str, list], rid: int, exam: Exam) -> None:
    visit, date = [rid, 1, viscode(exam)], f"{exam.date:%m/%d/%Y}"
    code = {"CN": 1, "MCI": 2, "AD": 3}[exam.diagnosis]
    tables["pdxconv"].append([*visit, code, *(int(code == each) for each in (1, 2, 3)), 0, 0])
    tables["mmse"].append([*visit, -4, exam.mmse])
    tables["cdr"].append([*visit, date, f"{exam.cdr_global:g}"])
    tables["mri3meta" if exam.number else "mrimeta"].append([*visit, date, 1])
    tables["mrimeta" if exam.number else "mri3meta"].append([*visit, -4, 0])
    tables["flutemeta"].append([*visit, -4, 0, -4, -4, 0])
    tables["pibmeta"].append([*visit, -4, 0])


def _write_csv(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
