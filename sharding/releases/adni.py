"""ADNI as it is downloaded today, of made-up people: without ADNIMERGE.

    images/ADNI/002_S_0100/MPR__GradWarp__B1_Correction__N3__Scaled/2007-02-19_08_31_00.0/I40966/ADNI_002_S_0100_MR_..._I40966.nii
    images/ADNI/ADNI_002_S_0100_MPR__..._S21856_I40966.xml                    a sidecar for each image
    tables/DXSUM_21Aug2025.csv, CDR, MMSE, MOCA, PTDEMOG, APOERES             study data
    tables/All_Subjects_Key_MRI_21Aug2025.csv                                 a list of images
    tables/ADNI_T1_8_21_2025.csv                                              the collection

People are of ADNI1, ADNI2 and ADNI3 in turn, which differ in visit codes, field strength and images.
"""

import csv
import datetime
from collections.abc import Iterable
from pathlib import Path

from sharding.people import Exam, SaveImage, Volunteer

DOWNLOADED = "21Aug2025"
CODES = {"CN": 1, "MCI": 2, "AD": 3}
PHASES = ("ADNI1", "ADNI2", "ADNI3")
DESCRIPTIONS = {
    "ADNI1": "MPR; GradWarp; B1 Correction; N3; Scaled",
    "ADNI2": "MT1; GradWarp; N3m",
    "ADNI3": "Accelerated Sagittal MPRAGE",
}
FIELD_STRENGTH_T = {"ADNI1": "1.5", "ADNI2": "3.0", "ADNI3": "3.0"}

VISIT = "PHASE PTID RID VISCODE VISCODE2".split()
AT_END = "ID SITEID USERDATE USERDATE2 DD_CRF_VERSION_LABEL LANGUAGE_CODE HAS_QC_ERROR update_stamp".split()
HEADERS = {
    "DXSUM": [
        *VISIT,
        *"EXAMDATE DIAGNOSIS DXNORM DXNODEP DXMCI DXMDES DXMPTR1 DXMPTR2 DXMDUE DXMOTHET DXDSEV DXDDUE DXAD".split(),
        *"DXAPP DXAPROB DXAPOSS DXPARK DXPDES DXDEP DXOTHDEM DXODES DXCONFID".split(),
        *AT_END,
    ],
    "MMSE": [*VISIT, *"VISDATE DONE NDREASON SOURCE MMDATE MMYEAR MMSCORE".split(), *AT_END],
    "CDR": [
        *VISIT,
        *"VISDATE CDSOURCE CDVERSION SPID CDMEMORY CDORIENT CDJUDGE CDCOMMUN CDHOME CDCARE CDGLOBAL CDRSB".split(),
        *AT_END,
    ],
    "MOCA": [*VISIT, *"VISDATE DONE NDREASON SOURCE TRAILS CUBE CLOCKCON MOCA".split(), *AT_END],
    "PTDEMOG": [
        *VISIT,
        *"VISDATE PTSOURCE PTGENDER PTDOB PTDOBYY PTHAND PTMARRY PTEDUCAT PTWORKHS PTNOTRT PTRTYR PTHOME".split(),
        *"PTETHCAT PTRACCAT".split(),
        *AT_END,
    ],
    "APOERES": [*VISIT, *"GENOTYPE APTESTDT APVOLUME APRECEIVE APAMBTEMP APRESAMP APUSABLE".split(), *AT_END],
}
COLLECTION = "Image Data ID,Subject,Group,Sex,Age,Visit,Modality,Description,Type,Acq Date,Format,Downloaded".split(",")
KEY_MRI = "image_id subject_id study_id series_id image_visit image_date series_description series_type".split()

SIDECAR = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<idaxs xmlns="http://ida.loni.usc.edu"><project><projectIdentifier>ADNI</projectIdentifier><subject>
<subjectIdentifier>{ptid}</subjectIdentifier><researchGroup>{group}</researchGroup><subjectSex>{sex}</subjectSex>
<visit><visitIdentifier>{visit}</visitIdentifier></visit><study><subjectAge>{age_years}</subjectAge><series>
<seriesIdentifier>{series}</seriesIdentifier><modality>MRI</modality><dateAcquired>{date} 08:31:00.0</dateAcquired>
<imagingProtocol><imageUID>{image}</imageUID><description>{description}</description><protocolTerm>
<protocol term="Field Strength">{field_strength}</protocol><protocol term="Weighting">T1</protocol></protocolTerm>
</imagingProtocol></series></study></subject></project></idaxs>
"""


def write(people: list[Volunteer], folder: Path, save: SaveImage) -> None:
    """Writes the images and tables of `people` below `folder`."""
    tables: dict[str, list[dict]] = {name: [] for name in HEADERS}
    collection, key_mri = [], []
    for volunteer in people:
        _write_person(tables, volunteer)
        for exam in volunteer.exams:
            _write_visit(tables, volunteer, exam)
            listed, key = _write_image(folder / "images" / "ADNI", volunteer, exam, save)
            collection.append(listed)
            key_mri.append(key)
    for name, rows in tables.items():
        write_csv(folder / "tables" / f"{name}_{DOWNLOADED}.csv", HEADERS[name], rows)
    write_csv(folder / "tables" / f"All_Subjects_Key_MRI_{DOWNLOADED}.csv", KEY_MRI, key_mri)
    write_csv(folder / "tables" / "ADNI_T1_8_21_2025.csv", COLLECTION, collection)


def phase_of(volunteer: Volunteer) -> str:
    """The phase that a person takes part in."""
    return PHASES[volunteer.number % len(PHASES)]


def rid_of(volunteer: Volunteer) -> int:
    """The person's number in the tables."""
    return 100 + volunteer.number


def ptid_of(volunteer: Volunteer) -> str:
    """The person's name: site and number."""
    return f"{2 + volunteer.number % 60:03d}_S_{rid_of(volunteer):04d}"


def image_id_of(volunteer: Volunteer, exam: Exam) -> str:
    """Digits of the image id."""
    return str(40000 + 20 * volunteer.number + exam.number)


def scan_date(volunteer: Volunteer, exam: Exam) -> datetime.date:
    """The scan is made up to three weeks before the exam."""
    return exam.date - datetime.timedelta(days=1 + volunteer.number % 21)


def visit_code(exam: Exam) -> str:
    """The harmonised code, VISCODE2."""
    return f"m{exam.months:02d}" if exam.months else "bl"


def write_csv(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    """Every cell in quotation marks, as the archive writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, quoting=csv.QUOTE_ALL, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _local_code(volunteer: Volunteer, exam: Exam | None) -> str:
    """VISCODE as the phase has it; without an exam, of the screening."""
    phase = phase_of(volunteer)
    if exam is None:
        return "v01" if phase == "ADNI2" else "sc"
    if phase == "ADNI1" or not exam.months:
        return "v03" if phase == "ADNI2" else visit_code(exam)
    return f"v{10 * exam.number + 1}" if phase == "ADNI2" else f"y{exam.number}"


def _visit(volunteer: Volunteer, exam: Exam | None) -> dict:
    """The cells that name person and visit; without an exam, the screening four weeks before the first."""
    when = exam.date if exam else volunteer.exams[0].date - datetime.timedelta(days=28)
    return {
        "PHASE": phase_of(volunteer),
        "PTID": ptid_of(volunteer),
        "RID": rid_of(volunteer),
        "VISCODE": _local_code(volunteer, exam),
        "VISCODE2": visit_code(exam) if exam else "sc",
        "VISDATE": when,
        "SITEID": 2 + volunteer.number % 60,
        "USERDATE": when + datetime.timedelta(days=9),
        "LANGUAGE_CODE": "en_US",
    }


def _for(name: str, **cells: object) -> dict:
    return {column: cells[column] for column in HEADERS[name] if column in cells}


def _write_person(tables: dict[str, list[dict]], volunteer: Volunteer) -> None:
    born = volunteer.born
    demographics = {
        "PTSOURCE": 1,
        "PTGENDER": {"M": 1, "F": 2}[volunteer.sex],
        "PTDOB": f"{born.month:02d}/{born.year}",
        "PTDOBYY": born.year,
        "PTHAND": 1,
        "PTEDUCAT": volunteer.education_years,
        "PTRTYR": -4,
    }
    screening = _visit(volunteer, None)
    tables["PTDEMOG"].append(_for("PTDEMOG", **screening, **demographics))
    genotype = "/".join(map(str, volunteer.apoe))
    tables["APOERES"].append(_for("APOERES", **screening, GENOTYPE=genotype, APVOLUME=-4))


def _write_visit(tables: dict[str, list[dict]], volunteer: Volunteer, exam: Exam) -> None:
    """The screening has MMSE and CDR, the baseline diagnosis and MoCA, each later visit all of them."""
    visit = _visit(volunteer, exam)
    tested = visit if exam.number else _visit(volunteer, None)
    is_demented = exam.diagnosis == "AD"
    tables["DXSUM"].append(
        _for(
            "DXSUM",
            **visit,
            EXAMDATE=exam.date,
            DIAGNOSIS=CODES[exam.diagnosis],
            DXNORM=1 if exam.diagnosis == "CN" else -4,
            DXDDUE=1 if is_demented else -4,
            DXAD=1 if is_demented else -4,
            DXOTHDEM=0 if is_demented else -4,
        )
    )
    tables["MMSE"].append(_for("MMSE", **tested, DONE=1, NDREASON=-4, MMSCORE=exam.mmse))
    boxes = dict(zip(HEADERS["CDR"][9:15], _boxes(exam.cdr_sb), strict=True))
    scores = {"CDGLOBAL": exam.cdr_global, "CDRSB": exam.cdr_sb}
    tables["CDR"].append(_for("CDR", **tested, CDSOURCE=1, **boxes, **scores))
    tables["MOCA"].append(_for("MOCA", **visit, DONE=1, NDREASON=-4, MOCA=exam.moca))


def _boxes(total: float) -> list[float]:
    """Six grades that add up to the sum of boxes."""
    boxes = []
    for _ in range(6):
        boxes.append(max(grade for grade in (0, 0.5, 1, 2, 3) if grade <= total - sum(boxes)))
    return boxes


def _write_image(folder: Path, volunteer: Volunteer, exam: Exam, save: SaveImage) -> tuple[dict, dict]:
    """Writes one image with its sidecar; returns its rows in the collection and in Key_MRI."""
    phase, ptid, when = phase_of(volunteer), ptid_of(volunteer), scan_date(volunteer, exam)
    image, series = image_id_of(volunteer, exam), str(20000 + 20 * volunteer.number + exam.number)
    description = DESCRIPTIONS[phase]
    in_path = "".join(letter if letter.isalnum() else "_" for letter in description)
    is_processed = phase != "ADNI3"
    group = volunteer.exams[0].diagnosis
    visit = visit_code(exam) if exam.number else "sc"
    raw = "Br" if is_processed else "br_raw"
    name = f"{in_path}_{raw}_20070219173850420_S{series}_I{image}"
    scanned = folder / ptid / in_path / f"{when}_08_31_00.0" / f"I{image}"
    save(scanned / f"ADNI_{ptid}_MR_{name}.nii", volunteer, exam, "PSR" if phase == "ADNI3" else "ASR")
    sidecar = SIDECAR.format(
        ptid=ptid,
        group=group,
        sex=volunteer.sex,
        visit=f"{phase} {'Screening' if visit == 'sc' else f'Month {exam.months}'}",
        age_years=f"{exam.age_years:.1f}",
        series=series,
        date=when,
        image=image,
        description=description,
        field_strength=FIELD_STRENGTH_T[phase],
    )
    (folder / f"ADNI_{ptid}_{in_path}_S{series}_I{image}.xml").write_text(sidecar, encoding="utf-8")
    listed = {
        "Image Data ID": f"I{image}",
        "Subject": ptid,
        "Group": group,
        "Sex": volunteer.sex,
        "Age": int(exam.age_years),
        "Visit": visit,
        "Modality": "MRI",
        "Description": description,
        "Type": "Processed" if is_processed else "Original",
        "Acq Date": f"{when.month}/{when.day}/{when.year}",
        "Format": "NiFTI",
        "Downloaded": "8/21/2025",
    }
    key = {
        "image_id": image,
        "subject_id": ptid,
        "series_id": series,
        "image_visit": visit,
        "image_date": when,
        "series_description": description,
        "series_type": "T1w",
    }
    return listed, key
