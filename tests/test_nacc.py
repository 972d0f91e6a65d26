"""NACC: a made-up release with every trap that is known of the real one, and what must become of each scan."""

import csv
import datetime
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from sharding.cohorts.nacc import Options, read
from sharding.cohorts.nacc_images import read_nifti_header
from sharding.people import Exam, Volunteer, draw_volunteers, save_tiny
from sharding.release import Release, write_release
from sharding.releases import nacc

NOT_T1 = "no T1 by its name"
NO_HEAD = "no T1 volume of a head"
BAD_CELL = "a table's cell cannot be used"
BAD_ZIP = "a broken or unsafe zip"
OTHER = "another diagnosis than CN, MCI or AD"
TWICE = "found twice"
SAME_SERIES = "the series was delivered twice"
SAME_VISIT = "another scan of the same visit was taken"
SOURCES = {"CN": "UDS NACCUDSD 1", "MCI": "UDS NACCUDSD 3", "AD": "UDS NACCUDSD 4, NACCALZD 1 -> AD (--ad any)"}


@dataclass
class Scene:
    """A written release, its tables as they can be edited, and what is expected of it."""

    folder: Path
    people: list[Volunteer]
    tables: dict[str, list[dict]] = field(default_factory=dict)
    kept: dict[str, dict] = field(default_factory=dict)
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    """scan_id, reason, a part of the detail."""

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def uds(self, person: int, exam: int = 0) -> dict:
        return self._row("uds", f"NACC{100_000 + person}", exam)

    def mri(self, person: int, exam: int = 0) -> dict:
        return self._row("mri", f"NACC{100_000 + person}", exam)

    def _row(self, table: str, naccid: str, exam: int) -> dict:
        return [row for row in self.tables[table] if row["NACCID"] == naccid][exam]

    def line(self, table: str, row: dict) -> int:
        return next(n for n, other in enumerate(self.tables[table], start=2) if other is row)

    def stem(self, person: int, exam: int = 0) -> str:
        return nacc.session_stem(self.people[person], self.people[person].exams[exam])

    @property
    def kept_unsplit(self) -> dict[str, dict]:
        return {scan_id: {k: v for k, v in row.items() if k != "split"} for scan_id, row in self.kept.items()}

    def scan_id(self, person: int, exam: int = 0) -> str:
        if person % 5 == 4:
            return nacc.image_id(self.people[person], self.people[person].exams[exam])
        day = self.people[person].exams[exam].date + datetime.timedelta(days=21)
        return f"{self.stem(person, exam)}/MPRAGE_{day:%Y%m%d}_2"

    def drop(self, scan_id: str, reason: str, detail: str) -> None:
        """The scan is expected among the dropped, and no more among the kept."""
        self.kept.pop(scan_id, None)
        self.dropped.append((scan_id, reason, detail))

    def session_is_dropped_whole(self, person: int, exam: int, reason: str, detail: str) -> None:
        stem = self.stem(person, exam)
        self.dropped = [drop for drop in self.dropped if not drop[0].startswith(f"{stem}/")]
        self.kept.pop(self.scan_id(person, exam))
        self.dropped.append((stem, reason, detail))

    def change(self, person: int, exam: int = 0, **cells) -> None:
        """Other cells than those of the clean release are expected of the scan's row."""
        self.kept[self.scan_id(person, exam)].update(cells)

    def write_tables(self) -> None:
        for name, rows in self.tables.items():
            with open(TABLE[name](self.folder), "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


TABLE = {
    "uds": lambda folder: folder / "tables/investigator_nacc70.csv",
    "mri": lambda folder: folder / "tables/investigator_mri_nacc70.csv",
    "qc": lambda folder: folder / "tables/investigator_scan_mri_nacc70/investigator_scan_mriqc_nacc70.csv",
}
NO_DIAGNOSIS = {"diagnosis": "", "diagnosis_gap_days": ""}
NO_VISIT = {**NO_DIAGNOSIS, **dict.fromkeys("mmse moca cdr_global cdr_sb".split(), "")}
NO_VISIT |= dict.fromkeys("form_version linked_by packet visit visit_age_years".split(), "")


def clean_scene(folder: Path, num_people: int, exams: int = 2) -> Scene:
    people = draw_volunteers("NACC", num_people, exams, seed=5)
    nacc.write(people, folder, save_tiny)
    scene = Scene(folder, people)
    for name, place in TABLE.items():
        with open(place(folder), newline="") as file:
            scene.tables[name] = list(csv.DictReader(file))
    for person in people:
        for exam in person.exams:
            scene.kept[scene.scan_id(person.number, exam.number)] = clean_row(scene, person, exam)
            if person.number % 5 != 4:
                stem, name = scene.scan_id(person.number, exam.number).split("/")
                flair = f"{stem}/FLAIR_{name.split('_')[1]}_5"
                scene.dropped.append((flair, NOT_T1, "Ax FLAIR"))
    return scene


def clean_row(scene: Scene, person: Volunteer, exam: Exam) -> dict:
    """What a scan of the clean release becomes, as text."""
    day = exam.date + datetime.timedelta(days=21)
    subject = f"NACC{100_000 + person.number}"
    share = int(hashlib.sha256(f"medblip-split/NACC/{subject}".encode()).hexdigest()[:16], 16) / 2**64
    is_scan = person.number % 5 == 4
    has_moca = exam.date >= datetime.date(2015, 3, 1)
    scan_id = scene.scan_id(person.number, exam.number)
    stem, _, name = scan_id.partition("/")
    if is_scan:
        number = scan_id[1:]
        file = f"NACC_{subject}_MR_MPRAGE_SENSE2_br_raw_{day:%Y%m%d}101112_S{number}_I{number}.nii"
        image = f"images/SCAN/{subject}/MPRAGE_SENSE2/{day}_10_11_12.0/I{number}/{file}"
        age = f"{int(exam.age_years) + 21 / 365.25:.2f}"
    else:
        image = f"{'images' if person.number % 5 == 3 else 'unpacked'}/{stem}/{name}.nii.gz"
        age = str(int(exam.age_years + 21 / 365.25))
    return {
        "scan_id": scan_id, "cohort": "NACC", "subject_id": subject, "session_id": str(day), "image": image,
        "diagnosis": exam.diagnosis, "diagnosis_source": SOURCES[exam.diagnosis], "diagnosis_gap_days": "-21",
        "age_years": age, "sex": person.sex, "education_years": str(person.education_years),
        "apoe_e4": str(person.apoe.count(4)), "mmse": "" if has_moca else str(exam.mmse),
        "moca": str(exam.moca) if has_moca else "", "cdr_global": f"{exam.cdr_global:g}", "cdr_sb": f"{exam.cdr_sb:g}",
        "field_strength_t": "" if is_scan else "3", "acquired": str(day),
        "split": "train" if share < 0.8 else "val" if share < 0.9 else "test", "report": "",
        "form_version": "3" if has_moca else "2", "linked_by": "date" if is_scan else "NACCVNUM",
        "packet": "F" if exam.number else "I", "protocol": "SCAN" if is_scan else "mixed",
        "series": "MPRAGE_SENSE2" if is_scan else "Sag MPRAGE", "series_chosen": "1" if is_scan else "",
        "series_qc": "pass" if is_scan else "", "visit": str(exam.number + 1),
        "visit_age_years": str(int(exam.age_years)),
    }  # fmt: skip


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(folder: Path, **flags) -> tuple[Release, dict[str, dict], list[dict]]:
    """The release, the manifest's rows by scan, and the dropped."""
    out = folder / "nacc.csv"
    options = {"images": folder / "images", "tables": folder / "tables", "out": out, **flags}
    release = read(Options(**options))
    write_release(release, out)
    rows = {row["scan_id"]: row for row in read_csv(out)}
    for row in rows.values():
        assert row.pop("split") == ""  # the command draws it
    return release, rows, read_csv(folder / "nacc.dropped.csv")


def write_dicom(folder: Path, series: str, number: int, count: int, start: int = 0, spacing_mm: float = 4) -> None:
    """`count` slices of 16 x 20 voxels, as files without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = f"1.2.826.{abs(hash((folder, series))) % 10**9}.{number}"
    for index in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, f"{uid}.{index + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        file.SeriesDescription, file.SeriesNumber, file.SeriesInstanceUID = series, number, uid
        file.ProtocolName, file.MagneticFieldStrength, file.SliceThickness = series, 3, spacing_mm
        file.Rows, file.Columns, file.PixelSpacing = 20, 16, [4, 4]
        file.BitsAllocated, file.SamplesPerPixel, file.PixelRepresentation = 16, 1, 0
        file.PixelData = np.full(320, index, np.uint16).tobytes()
        file.save_as(folder / f"IM{start + index:04d}", enforce_file_format=True)


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def nifti(shape=(16, 20, 18), spacing_mm=(4, 4, 4)) -> bytes:
    return nib.Nifti1Image(np.ones(shape, np.int16), np.diag([*spacing_mm, 1])).to_bytes()


def json_of(description: str, number: int) -> bytes:
    return json.dumps({"SeriesDescription": description, "SeriesNumber": number}).encode()


def add_members(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


# --- the traps, each on its own people ---


def codes(scene: Scene) -> None:
    """Missing codes differ by column, and what 88 means depends on it."""
    scene.uds(0).update(NACCMMSE="88", NACCMOCA="99", CDRGLOB="-4", CDRSUM="-4", NACCAGE="88")
    scene.change(0, mmse="", moca="", cdr_global="", cdr_sb="", visit_age_years="88")
    scene.uds(0, 1).update(NACCMMSE="98", NACCMOCA="-4.0", EDUC="99")
    scene.change(0, 1, mmse="", moca="")
    scene.mri(5)["NACCMRIA"] = "888"  # then from the visit's age
    scene.change(5, age_years=f"{int(scene.people[5].exams[0].age_years) + 21 / 365.25:.2f}")
    scene.uds(7).update(NACCUDSD="3.0", SEX=f"0{scene.uds(7)['SEX']}")  # as spreadsheets write them
    scene.change(7, diagnosis="MCI", diagnosis_source=SOURCES["MCI"])


def diagnoses(scene: Scene) -> None:
    scene.uds(1)["NACCUDSD"] = "2"
    scene.drop(scene.scan_id(1), OTHER, "UDS NACCUDSD 2: impaired, not MCI")
    scene.uds(1, 1).update(NACCUDSD="4", NACCALZD="0")
    scene.drop(scene.scan_id(1, 1), OTHER, "UDS NACCUDSD 4, NACCALZD 0: dementia, not AD")
    scene.uds(2).update(NACCUDSD="4", NACCALZD="1")
    scene.change(2, diagnosis="AD", diagnosis_source=SOURCES["AD"])
    scene.uds(2, 1).update(NACCUDSD="4", NACCALZD="-4")
    scene.change(2, 1, **NO_DIAGNOSIS, diagnosis_source="UDS NACCUDSD 4, NACCALZD not given")
    scene.uds(3).update(NACCUDSD="4", NACCALZD="8")
    line = scene.line("uds", scene.uds(3))
    scene.drop(scene.scan_id(3), BAD_CELL, f"investigator_nacc70.csv row {line}, column 'NACCALZD': '8' is not")
    scene.uds(3, 1)["NACCUDSD"] = "5"
    line = scene.line("uds", scene.uds(3, 1))
    scene.drop(scene.scan_id(3, 1), BAD_CELL, f"investigator_nacc70.csv row {line}, column 'NACCUDSD': '5' is not")


def apoe(scene: Scene) -> None:
    """Stray values and changes: the first valid value holds for the person."""
    scene.uds(4).update(NACCNE4S="NG00", NACCAPOE="0")
    scene.uds(4, 1).update(NACCNE4S="2", NACCAPOE="4")
    scene.uds(6).update(NACCNE4S="9", NACCAPOE="88")
    scene.uds(6, 1).update(NACCNE4S="9", NACCAPOE="5")  # e4e2
    scene.uds(8).update(NACCNE4S="1", NACCAPOE="2")
    scene.uds(8, 1).update(NACCNE4S="0", NACCAPOE="1")
    for person, count in ((4, "2"), (6, "1"), (8, "1")):
        scene.change(person, 0, apoe_e4=count)
        scene.change(person, 1, apoe_e4=count)


def links(scene: Scene) -> None:
    """Named visit, wrong visit, no visit, none near, ties."""
    scene.tables["uds"] = [row for row in scene.tables["uds"] if row["NACCID"] not in ("NACC100010", "NACC100029")]
    for person in (10, 29):
        for exam in (0, 1):
            unknown = dict.fromkeys(("sex", "education_years", "apoe_e4"), "")
            scene.change(person, exam, **NO_VISIT, **unknown)
            scene.change(person, exam, diagnosis_source="no UDS visit of this NACCID in the table")
    for exam in (0, 1):
        scene.kept[scene.scan_id(29, exam)]["age_years"] = ""  # SCAN's age comes from visits
        scene.mri(11, exam)["NACCVNUM"] = "88"
        scene.change(11, exam, linked_by="date")
    scene.mri(12)["NACCVNUM"] = "2"  # a year from the scan
    scene.change(12, linked_by="date")
    day = scene.people[13].exams[1].date + datetime.timedelta(days=200)
    scene.mri(13, 1).update(MRIYR=str(day.year), MRIMO=str(day.month), MRIDY=str(day.day))
    far = "no UDS visit within 180 days (--window-days)"
    scene.change(13, 1, **NO_VISIT, diagnosis_source=far, session_id=str(day), acquired=str(day))

    first, second = (scene.uds(14, exam) for exam in (0, 1))  # both 100 days from the first scan, none near the second
    scan_day = scene.people[14].exams[0].date + datetime.timedelta(days=21)
    for row, days in ((first, -100), (second, 100)):
        day = scan_day + datetime.timedelta(days=days)
        row.update(VISITYR=str(day.year), VISITMO=str(day.month), VISITDAY=str(day.day))
    first.update(NACCUDSD="1", NACCAGE="70")
    second.update(NACCUDSD="4", NACCALZD="1", NACCAGE="70")
    scene.change(14, 0, diagnosis="CN", diagnosis_source=SOURCES["CN"], diagnosis_gap_days="-100")
    scene.change(14, 0, age_years="70.27", visit_age_years="70")
    scene.change(14, 1, **NO_VISIT, diagnosis_source=far, age_years=f"{70 + 265 / 365.25:.2f}")
    scene.mri(15)["MRIYR"] = "8888"
    scene.change(15, **NO_VISIT, diagnosis_source="the scan's date is not known", acquired="")
    scene.change(15, session_id=scene.stem(15))
    scene.mri(16, 1).update(MRIMO="99", MRIDY="88")
    scene.change(16, 1, **NO_VISIT, diagnosis_source="the scan's date is not known", acquired="")
    scene.change(16, 1, session_id=scene.stem(16, 1))

    later = scene.people[33].exams[0].date + datetime.timedelta(days=21 + 100)  # farther, but the table names it
    scene.mri(33)["NACCVNUM"] = "2"
    scene.uds(33, 1).update(VISITYR=str(later.year), VISITMO=str(later.month), VISITDAY=str(later.day))
    second = scene.kept[scene.scan_id(33, 1)]
    of_visit = (
        "diagnosis diagnosis_source mmse moca cdr_global cdr_sb form_version packet visit visit_age_years".split()
    )
    scene.change(33, 0, **{name: second[name] for name in of_visit}, diagnosis_gap_days="100")
    scene.change(33, 1, **NO_VISIT, diagnosis_source=far)


def rows_twice(scene: Scene) -> None:
    uds, mri = scene.tables["uds"], scene.tables["mri"]
    uds.append(dict(scene.uds(16)))  # the same again: nothing happens
    uds.append({**scene.uds(17), "NACCMMSE": "3", "NACCMOCA": "3"})
    lines = scene.line("uds", scene.uds(17)), len(uds) + 1
    scene.drop(scene.scan_id(17), BAD_CELL, f"investigator_nacc70.csv row {lines[0]} and row {lines[1]}: both are")
    other_sex = {"1": "2", "2": "1"}[scene.uds(18)["SEX"]]
    scene.uds(18, 1)["SEX"] = other_sex
    lines = scene.line("uds", scene.uds(18)), scene.line("uds", scene.uds(18, 1))
    for exam in (0, 1):
        scene.drop(scene.scan_id(18, exam), BAD_CELL, f"row {lines[0]} and row {lines[1]}, column 'SEX'")
    mri.append(dict(scene.mri(20)))
    mri.append({**scene.mri(20, 1), "MRIYR": "2001"})
    lines = scene.line("mri", scene.mri(20, 1)), len(mri) + 1
    scene.session_is_dropped_whole(20, 1, BAD_CELL, f"row {lines[0]} and row {lines[1]}: they differ for NACCMRFI")


def bad_cells(scene: Scene) -> None:
    scene.uds(21)["SEX"] = "3"
    line = scene.line("uds", scene.uds(21))
    scene.drop(scene.scan_id(21), BAD_CELL, f"investigator_nacc70.csv row {line}, column 'SEX': '3' is not one of 1, 2")
    scene.uds(21, 1)["EDUC"] = "55"
    scene.drop(scene.scan_id(21, 1), BAD_CELL, "column 'EDUC': '55' is not a whole number within 0..36")
    scene.uds(22)["NACCMMSE"] = "31"
    scene.drop(scene.scan_id(22), BAD_CELL, "column 'NACCMMSE': '31' is not")
    scene.uds(22, 1).update(VISITMO="2", VISITDAY="30")  # the visit that the MRI table names has no date
    scene.drop(scene.scan_id(22, 1), BAD_CELL, "column 'VISITDAY': '30' is not a day of")
    scene.uds(23)["CDRGLOB"] = "0.7"
    scene.drop(scene.scan_id(23), BAD_CELL, "column 'CDRGLOB': '0.7' is not one of 0, 0.5, 1, 2, 3")
    scene.mri(23, 1)["MRIMO"] = "13"
    line = scene.line("mri", scene.mri(23, 1))
    scene.session_is_dropped_whole(23, 1, BAD_CELL, f"investigator_mri_nacc70.csv row {line}, column 'MRIMO': '13'")
    for exam in (0, 1):  # two visits without a number are two visits
        scene.uds(24, exam)["NACCVNUM"] = ""
        scene.drop(scene.scan_id(24, exam), BAD_CELL, "column 'NACCVNUM': '' is not the number of a visit")
    scene.mri(26)["NACCID"] = "NACC100999"  # the file's name says NACC100026
    scene.session_is_dropped_whole(26, 0, BAD_CELL, "column 'NACCID': 'NACC100999' is not 'NACC100026'")


def zips(scene: Scene) -> None:
    images = scene.images
    whole = images / f"{scene.stem(25)}.zip"
    whole.write_bytes(whole.read_bytes()[:-200])
    scene.session_is_dropped_whole(25, 0, BAD_ZIP, f"{scene.stem(25)}.zip: not a whole zip")
    stem, name = scene.scan_id(25, 1).split("/")  # listed well, but late bytes are not what the list says
    voxels = nifti()
    damaged = images / f"{stem}.zip"
    write_zip(damaged, {f"{stem}/{name}.nii": voxels, f"{stem}/{name}.json": json_of("Sag MPRAGE", 2)})
    damaged.write_bytes(damaged.read_bytes().replace(voxels, voxels[:-9] + bytes(9)))
    scene.dropped.remove((f"{stem}/{name.replace('MPRAGE', 'FLAIR')[:-1]}5", NOT_T1, "Ax FLAIR"))
    scene.drop(scene.scan_id(25, 1), BAD_ZIP, "cannot be unpacked")

    add_members(images / f"{scene.stem(27)}.zip", {"../../escaped.nii.gz": nifti()})
    scene.session_is_dropped_whole(27, 0, BAD_ZIP, "'../../escaped.nii.gz' leads out of the folder (..)")
    link = zipfile.ZipInfo(f"{scene.stem(27, 1)}/link.nii")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(images / f"{scene.stem(27, 1)}.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    scene.session_is_dropped_whole(27, 1, BAD_ZIP, "is a link or a device")

    name = "NACC100031_pizzip"  # str.strip(".zip") would leave NACC100031_
    (images / f"{scene.stem(31)}.zip").rename(images / f"{name}.zip")
    scene.mri(31)["NACCMRFI"] = f"{name}.zip"
    _rename(scene, 31, name)
    (images / f"{scene.stem(31, 1)}.zip").rename(images / "NACC100031_unlisted.zip")
    scene.mri(31, 1)["NACCMRFI"] = "mri77.zip"
    _rename(scene, 31, "NACC100031_unlisted", 1)
    row = scene.kept[f"NACC100031_unlisted/{scene.scan_id(31, 1).split('/')[1]}"]
    row.update(**NO_VISIT, session_id="NACC100031_unlisted", acquired="", age_years="")
    row.update(diagnosis_source="no row of the MRI table has it in NACCMRFI, so its date is not known")

    write_zip(images / "mri9999.zip", {"T1.nii": nifti()})
    scene.drop("mri9999", "whose session it is, is not known", "no row of the MRI table")
    write_zip(images / "download.zip", {"T1.nii": nifti()})
    scene.drop("download", "not where NACC's scans are", "a zip whose name is not that of a session")
    (images / "loose").mkdir()
    (images / "loose" / "brain.nii").write_bytes(nifti())
    (images / "loose" / "preview.gif").write_bytes(b"GIF89a")
    scene.drop("loose/brain.nii", "not where NACC's scans are", "neither in a session's folder nor in SCAN's tree")


def _rename(scene: Scene, person: int, stem: str, exam: int = 0) -> None:
    """The session's rows move to another name of its zip."""
    old, name = scene.scan_id(person, exam).split("/")
    row = scene.kept.pop(f"{old}/{name}")
    scene.kept[f"{stem}/{name}"] = {**row, "scan_id": f"{stem}/{name}", "image": f"unpacked/{stem}/{name}.nii.gz"}
    scene.dropped = [(scan_id.replace(f"{old}/", f"{stem}/"), *rest) for scan_id, *rest in scene.dropped]


def deliveries(scene: Scene) -> None:
    """What comes twice: a zip beside its folder, a session under two names, DICOM and NIfTI, copies of a zip."""
    images = scene.images
    stem = scene.stem(28)  # an unpacked session
    write_zip(images / f"{stem}.zip", {f"{stem}/T1.nii": nifti()})
    scene.drop(stem, TWICE, f"{stem} is used")

    stem, name = scene.scan_id(30).split("/")
    shutil.copy(images / f"{stem}.zip", images / "NACC100030_again.zip")
    scene.tables["mri"].append({**scene.mri(30), "NACCMRFI": "NACC100030_again.zip"})
    # The first by name stays; the zip has its folder inside, which is not that of its new name.
    again = f"NACC100030_again/{stem}/{name}"
    scene.kept[again] = {
        **scene.kept[f"{stem}/{name}"], "scan_id": again, "image": f"unpacked/NACC100030_again/{stem}__{name}.nii.gz"
    }  # fmt: skip
    scene.drop(f"{stem}/{name}", SAME_SERIES, again)
    scene.dropped.append((f"{again.replace('MPRAGE', 'FLAIR')[:-1]}5", NOT_T1, "Ax FLAIR"))

    stem = scene.stem(32).removesuffix("ni")  # NACCMRFI names both flavours
    write_dicom(images / stem / "series2", "Sag MPRAGE", 2, 18)
    nacc.zip_folder(images / stem, images / f"{stem}.zip", f"{stem}/")
    scene.drop(f"{stem}/series2", "the session's T1 is there as NIfTI as well", scene.scan_id(32))

    stem = scene.stem(35, 1)
    (images / "copy").mkdir()
    shutil.copy(images / f"{stem}.zip", images / "copy" / f"{stem}.zip")
    scene.dropped.append((stem, TWICE, f"copy/{stem}.zip is used"))  # the first by name


def series(scene: Scene) -> None:
    """Sessions with many series, in both formats."""
    images = scene.images
    stem = scene.stem(36)
    add_members(
        images / f"{stem}.zip",
        {
            "T1_SE.nii": nifti((64, 64, 24), (3.5, 3.5, 5.5)), "T1_SE.json": json_of("Ax T1 SE", 3),
            "slab.nii": nifti((64, 64, 20), (1, 1, 1)), "slab.json": json_of("T1 slab hippocampus", 4),
            "rest.nii": nifti((16, 16, 16, 3)), "rest.json": json_of("T1 dynamic", 6),
            "scout.nii": nifti(), "scout.json": json_of("AAScout T1", 1),
            "again.nii": nifti(), "again.json": json_of("Sag MPRAGE repeat", 7),
            "torn.nii.gz": nifti()[:100], "torn.json": json_of("MPRAGE", 8),
            "__MACOSX/._again.nii": b"\0",
        },
    )  # fmt: skip
    scene.drop(f"{stem}/T1_SE", NO_HEAD, "slices of 5.5 mm")
    scene.drop(f"{stem}/slab", NO_HEAD, "it covers 20 mm only")
    scene.drop(f"{stem}/rest", NO_HEAD, "16x16x16x3, not one volume")
    scene.drop(f"{stem}/scout", NOT_T1, "AAScout T1")
    scene.drop(f"{stem}/again", SAME_VISIT, scene.scan_id(36))
    scene.drop(f"{stem}/torn", "not one readable series", "torn.nii.gz: no whole NIfTI header")

    stem, name = scene.scan_id(38).split("/")  # unpacked: DICOM instead
    day = scene.people[38].exams[0].date + datetime.timedelta(days=21)
    shutil.rmtree(images / stem)
    write_dicom(images / stem / stem / "scans" / "2", "Sag MPRAGE", 2, 18)
    write_dicom(images / stem / stem / "scans" / "4", "Ax FLAIR", 4, 18)
    write_dicom(images / stem / stem / "mixed", "Sag MPRAGE", 2, 9)
    write_dicom(images / stem / stem / "mixed", "Ax T2", 5, 9, start=9)
    row = scene.kept.pop(f"{stem}/{name}")
    scene.kept[f"{stem}/scans/2"] = {**row, "scan_id": f"{stem}/scans/2", "image": f"images/{stem}/{stem}/scans/2"}
    scene.dropped.remove((f"{stem}/FLAIR_{day:%Y%m%d}_5", NOT_T1, "Ax FLAIR"))
    scene.drop(f"{stem}/scans/4", NOT_T1, "Ax FLAIR")
    scene.drop(f"{stem}/mixed", "not one readable series", "mixed: its 18 DICOM files are of several series")

    stem, name = scene.scan_id(37).split("/")  # zipped DICOM
    day = scene.people[37].exams[0].date + datetime.timedelta(days=21)
    (images / f"{stem}.zip").unlink()
    write_dicom(images / "session" / "DICOM" / "2", "IR-FSPGR", 2, 18)
    nacc.zip_folder(images / "session", images / f"{stem}.zip", "")
    row = scene.kept.pop(f"{stem}/{name}")
    scene.kept[f"{stem}/DICOM/2"] = {
        **row, "scan_id": f"{stem}/DICOM/2", "image": f"unpacked/{stem}/DICOM__2", "series": "IR-FSPGR"
    }  # fmt: skip
    scene.dropped.remove((f"{stem}/FLAIR_{day:%Y%m%d}_5", NOT_T1, "Ax FLAIR"))


def scan_tree(scene: Scene) -> None:
    """SCAN: a repeat that its centre chose, other series, DICOM, no row in the quality table."""
    first = Path(scene.kept[scene.scan_id(34)]["image"])
    row = next(row for row in scene.tables["qc"] if row["LONIUID"] == scene.scan_id(34))
    row["SERIESCHOSEN"] = "0"
    scene.tables["qc"].append({**row, "SERIESCHOSEN": "1", "LONIUID": "I7777"})
    leaf = scene.folder / first.parent.parent / "I7777"
    leaf.mkdir()
    (leaf / "repeat.nii").write_bytes(nifti())
    scene.kept["I7777"] = {
        **scene.kept[scene.scan_id(34)], "scan_id": "I7777", "image": str(leaf.relative_to(scene.folder) / "repeat.nii")
    }  # fmt: skip
    scene.drop(scene.scan_id(34), SAME_VISIT, "I7777")
    flair = scene.images / "SCAN/NACC100034/T2_FLAIR/2021-05-04_10_11_12.0/I7778"
    flair.mkdir(parents=True)
    (flair / "flair.nii").write_bytes(nifti())
    scene.drop("I7778", NOT_T1, "T2_FLAIR")

    scene.tables["qc"] = [row for row in scene.tables["qc"] if row["LONIUID"] != scene.scan_id(39)]
    scene.change(39, series_chosen="", series_qc="")
    dicom = scene.kept[scene.scan_id(39)]
    file = scene.folder / dicom["image"]
    file.unlink()
    write_dicom(file.parent, "MPRAGE_SENSE2", 2, 3)
    dicom["image"] = str(Path(dicom["image"]).parent)


TRAPS = (codes, diagnoses, apoe, links, rows_twice, bad_cells, zips, deliveries, series, scan_tree)


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    scene = clean_scene(tmp_path, 42)
    for trap in TRAPS:
        trap(scene)
    scene.write_tables()
    command = [sys.executable, "-m", "sharding.manifest", "nacc", "--images", str(scene.images)]
    command += ["--tables", str(tmp_path / "tables"), "--out", str(tmp_path / "nacc.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    rows = {row["scan_id"]: row for row in read_csv(tmp_path / "nacc.csv")}
    assert sorted(rows) == sorted(scene.kept)
    for scan_id, expected in scene.kept.items():
        assert rows[scan_id] == expected
    dropped = sorted(read_csv(tmp_path / "nacc.dropped.csv"), key=lambda row: (row["scan_id"], row["reason"]))
    expected = sorted(scene.dropped)
    assert [(row["scan_id"], row["reason"]) for row in dropped] == [drop[:2] for drop in expected]
    for row, (_, _, detail) in zip(dropped, expected, strict=True):
        assert detail in row["detail"]
    assert f"{len(rows) + len(dropped)} scans found = {len(rows)} kept + {len(dropped)} dropped" in done.stderr
    assert "column 'NACCNE4S': 'NG00' is not" in done.stderr or "column 'NACCAPOE': '0' is not" in done.stderr
    for row in rows.values():
        assert (tmp_path / row["image"]).exists()
    assert not list(tmp_path.rglob("escaped*"))


# --- tables ---


@pytest.mark.parametrize("table", ["uds", "mri", "qc"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text, name: text.replace(name, "X" + name, 1), "no column '{name}' (is it 'X{name}'?)"),
        (lambda text, name: text.replace(name, "", 1), "no column '{name}'"),
        (lambda text, name: text.replace(",", ";"), "columns must be separated by ','"),
        (lambda text, name: "", "the file is empty"),
        (lambda text, name: text.replace("NACCADC", "NACCID", 1), "column 'NACCID' appears twice"),
    ],
    ids=["renamed", "missing", "semicolons", "empty", "twice"],
)
def test_a_table_that_is_not_as_expected_is_refused_by_name(tmp_path, table, damage, message):
    clean_scene(tmp_path, 5, exams=1)
    name = {"uds": "NACCUDSD", "mri": "NACCMRFI", "qc": "STUDYDATE"}[table]
    path = TABLE[table](tmp_path)
    path.write_text(damage(path.read_text(), name))
    with pytest.raises(ValueError) as refusal:
        run(tmp_path)
    assert str(path) in str(refusal.value)
    assert message.format(name=name) in str(refusal.value)


def test_a_byte_order_mark_and_columns_in_another_order_change_nothing(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    for table, rows in scene.tables.items():
        scene.tables[table] = [dict(reversed(row.items())) for row in rows]
    scene.write_tables()
    for place in TABLE.values():
        place(tmp_path).write_bytes(b"\xef\xbb\xbf" + place(tmp_path).read_bytes())
    _, rows, _ = run(tmp_path)
    assert rows == scene.kept_unsplit


def test_latin_1_matters_only_in_a_cell_that_is_used(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    for row in scene.tables["uds"]:
        row["HISPANIC"] = "sí"  # not used
    scene.uds(0)["PACKET"] = "é"
    scene.write_tables()
    TABLE["uds"](tmp_path).write_bytes(TABLE["uds"](tmp_path).read_text().encode("latin-1"))
    _, rows, dropped = run(tmp_path)
    assert set(rows) == set(scene.kept) - {scene.scan_id(0)}
    assert [row["detail"] for row in dropped if row["reason"] == BAD_CELL] == [
        f"{TABLE['uds'](tmp_path)} row 2, column 'PACKET': '\\udce9' is not UTF-8; save the table as UTF-8"
    ]


def test_a_day_of_scan_that_can_be_read_in_no_order_leaves_the_scan_and_is_noted(tmp_path):
    scene = clean_scene(tmp_path, 10, exams=1)
    day = datetime.date.fromisoformat(scene.tables["qc"][0]["STUDYDATE"])
    scene.tables["qc"][0].update(STUDYDATE=f"{day:%m/%d/%Y}", LONIUID="")  # found by day and description
    scene.tables["qc"][1]["STUDYDATE"] = "31/31/2020"
    scene.write_tables()
    scene.change(9, series_chosen="", series_qc="")
    release, rows, _ = run(tmp_path)
    assert rows == scene.kept_unsplit
    assert release.faults == [
        f"{TABLE['qc'](tmp_path)} row 3, column 'STUDYDATE': '31/31/2020' is not a date like %Y-%m-%d or %m/%d/%Y"
    ]


@pytest.mark.parametrize("names", [("investigator_ftldlbd_nacc63.csv", "commercial_mri_nacc63.csv"), None])
def test_tables_have_several_names(tmp_path, names):
    scene = clean_scene(tmp_path, 5, exams=1)
    uds, mri = names or ("smith07042021.csv", "smithmri07042021.csv")
    TABLE["uds"](tmp_path).rename(tmp_path / "tables" / uds)
    TABLE["mri"](tmp_path).rename(tmp_path / "tables" / mri)
    if names is None:
        with pytest.raises(ValueError, match="no table investigator_mri_nacc<NN>.csv; download it, or give --mri FILE"):
            run(tmp_path)
        with pytest.raises(ValueError, match="no table investigator_nacc<NN>.csv; download it, or give --uds FILE"):
            run(tmp_path, mri=tmp_path / "tables" / mri)
    flags = {} if names else {"uds": tmp_path / "tables" / uds, "mri": tmp_path / "tables" / mri}
    _, rows, _ = run(tmp_path, **flags)
    assert rows == scene.kept_unsplit


def test_rows_are_counted_as_a_spreadsheet_does_though_most_are_skipped(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    others = [{**scene.uds(0), "NACCID": f"NACC{900_000 + n}", "NACCADC": text} for n, text in enumerate(("1", "a\nb"))]
    scene.tables["uds"] = [*others, *others, *scene.tables["uds"]]
    scene.uds(2)["SEX"] = "7"
    scene.write_tables()
    release, rows, _ = run(tmp_path)
    assert set(rows) == set(scene.kept) - {scene.scan_id(2)}
    assert release.faults == [f"{TABLE['uds'](tmp_path)} row 8, column 'SEX': '7' is not one of 1, 2"]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_headers_of_every_nifti_are_read_from_a_few_bytes(kind, endian):
    header = kind.header_class(endianness=endian)
    header.set_data_dtype(np.int16)
    image = kind(np.ones((16, 20, 18), np.int16), np.diag([1, 2, 3, 1]), header)
    for data in (image.to_bytes(), gzip.compress(image.to_bytes())):
        assert read_nifti_header(data[:4096]) == ((16, 20, 18), (1, 2, 3))


def test_two_releases_of_a_table_are_refused(tmp_path):
    clean_scene(tmp_path, 5, exams=1)
    shutil.copy(TABLE["uds"](tmp_path), tmp_path / "tables" / "investigator_nacc71.csv")
    with pytest.raises(ValueError, match="2 tables are named .*keep the newest"):
        run(tmp_path)


# --- policies ---


@pytest.mark.parametrize(
    ("cells", "flags", "diagnosis", "source"),
    [
        ({"NACCUDSD": "3", "NACCALZD": "0"}, {}, "MCI", "UDS NACCUDSD 3"),
        ({"NACCUDSD": "3", "NACCALZD": "1"}, {"mci_due_to_ad": True}, "MCI", "NACCALZD 1 -> MCI (--mci-due-to-ad)"),
        ({"NACCUDSD": "3", "NACCALZD": "0"}, {"mci_due_to_ad": True}, None, "NACCALZD 0 -> not AD (--mci-due-to-ad)"),
        ({"NACCALZP": "2", "NACCETPR": "2"}, {}, "AD", "UDS NACCUDSD 4, NACCALZD 1 -> AD (--ad any)"),
        ({"NACCALZP": "1", "NACCETPR": "2"}, {"ad": "primary"}, "AD", "NACCALZP 1 -> AD (--ad primary)"),
        ({"NACCALZP": "2", "NACCETPR": "1"}, {"ad": "primary"}, None, "NACCALZP 2 -> AD not primary (--ad primary)"),
        ({"NACCALZP": "2", "NACCETPR": "1"}, {"ad": "etiology"}, "AD", "NACCETPR 1 -> AD (--ad etiology)"),
        ({"NACCALZP": "1", "NACCETPR": "2"}, {"ad": "etiology"}, None, "NACCETPR 2 -> AD not primary (--ad etiology)"),
    ],
)
def test_what_decided_on_a_diagnosis_is_said(tmp_path, cells, flags, diagnosis, source):
    scene = clean_scene(tmp_path, 5, exams=1)
    scene.uds(0).update({"NACCUDSD": "4", "NACCALZD": "1", **cells})
    scene.write_tables()
    _, rows, dropped = run(tmp_path, **flags)
    if diagnosis:
        assert rows[scene.scan_id(0)]["diagnosis"] == diagnosis
        assert rows[scene.scan_id(0)]["diagnosis_source"].endswith(source)
    else:
        [row] = [row for row in dropped if row["scan_id"] == scene.scan_id(0)]
        assert row["reason"] == OTHER
        assert row["detail"].endswith(source)


def test_the_window_is_a_flag(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=2)
    _, rows, _ = run(tmp_path, window_days=20)
    assert {row["diagnosis_source"] for row in rows.values()} == {"no UDS visit within 20 days (--window-days)"}
    _, rows, _ = run(tmp_path, window_days=21)
    assert rows == scene.kept_unsplit


def test_one_scan_per_subject_is_the_first_with_a_diagnosis_and_alone_is_unpacked(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=2)
    scene.uds(0)["NACCUDSD"] = "-4"
    scene.write_tables()
    _, rows, _ = run(tmp_path, one_scan_per="subject")
    assert set(rows) == {scene.scan_id(person, person == 0) for person in range(5)}
    unpacked = {path.parent.name for path in (tmp_path / "unpacked").rglob("*.nii.gz")}
    assert unpacked == {scene.stem(0, 1), scene.stem(1), scene.stem(2)}


def test_all_scans_of_a_visit_are_kept_on_demand(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    stem = scene.stem(0)
    add_members(tmp_path / f"images/{stem}.zip", {"r.nii": nifti(), "r.json": json_of("Sag MPRAGE", 7)})
    assert set(run(tmp_path, one_scan_per="all")[1]) == {*scene.kept, f"{stem}/r"}
    assert set(run(tmp_path, one_scan_per="visit")[1]) == {*scene.kept}


def test_what_counts_as_a_t1_is_a_flag(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    stem = scene.stem(0)
    add_members(tmp_path / f"images/{stem}.zip", {"f.nii": nifti((16, 20, 9), (4, 4, 8)), "f.json": json_of("FFE", 1)})
    assert f"{stem}/f" not in run(tmp_path, one_scan_per="all")[1]
    flags = {"t1_names": "mprage|ffe", "max_slice_mm": 8.0, "one_scan_per": "all"}
    assert f"{stem}/f" in run(tmp_path, **flags)[1]
    assert f"{stem}/f" not in run(tmp_path, **flags, other_names="flair|ffe")[1]
    assert f"{stem}/f" not in run(tmp_path, **flags, min_cover_mm=73)[1]
    assert scene.scan_id(0) in run(tmp_path, **flags, min_cover_mm=64)[1]
    with pytest.raises(ValueError, match=r"--other-names '\(' is no regular expression"):
        run(tmp_path, other_names="(")


# --- zips ---


def test_what_is_unpacked_is_what_the_zip_holds_and_a_second_run_leaves_it(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    dicom = tmp_path / f"images/{scene.stem(0)}.zip"
    dicom.unlink()
    write_dicom(tmp_path / "session", "MPRAGE", 2, 18)
    originals = {path.name: path.read_bytes() for path in (tmp_path / "session").iterdir()}
    nacc.zip_folder(tmp_path / "session", dicom, "")
    elsewhere = tmp_path / "elsewhere"

    _, first, _ = run(tmp_path, unpack=elsewhere)
    unpacked = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*") if path.is_file()}
    assert {path.name: path.read_bytes() for path in (elsewhere / scene.stem(0) / "dicom").iterdir()} == originals
    for person in (1, 2):
        [image] = (elsewhere / scene.stem(person)).iterdir()
        with zipfile.ZipFile(tmp_path / f"images/{scene.stem(person)}.zip") as archive:
            member = next(name for name in archive.namelist() if name.endswith(image.name))
            assert image.read_bytes() == archive.read(member)
        assert first[scene.scan_id(person)]["image"] == str(image.relative_to(tmp_path))
    assert len(unpacked) == 18 + 2  # one series of each zip, and nothing temporary

    _, second, _ = run(tmp_path, unpack=elsewhere)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*") if path.is_file()} == unpacked

    (elsewhere / scene.stem(0) / "dicom" / "IM0003").unlink()  # by hand: the series is written again
    assert run(tmp_path, unpack=elsewhere)[1] == first
    assert len(list((elsewhere / scene.stem(0) / "dicom").iterdir())) == 18


def test_a_zip_that_was_downloaded_again_is_unpacked_again(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    path, image = tmp_path / f"images/{scene.stem(1)}.zip", tmp_path / f"unpacked/{scene.stem(1)}/T1.nii"
    for voxels in (nifti(), nifti()[:-1] + b"7"):  # of one size
        write_zip(path, {"T1.nii": voxels})
        os.utime(path, ns=(time.time_ns() + 1000,) * 2)  # clocks of files may be coarse
        time.sleep(0.02)
        assert f"{scene.stem(1)}/T1" in run(tmp_path)[1]
        assert image.read_bytes() == voxels


def test_the_folder_of_unpacked_series_may_lie_among_the_images(tmp_path):
    scene = clean_scene(tmp_path, 5, exams=1)
    first = run(tmp_path, unpack=tmp_path / "images" / "unpacked")
    second = run(tmp_path, unpack=tmp_path / "images" / "unpacked")
    assert set(first[1]) == set(scene.kept)
    assert first[1:] == second[1:]


def _patch(path: Path, marks: list[tuple[bytes, int]], value: bytes) -> None:
    """Writes `value` at an offset from each record's signature, in the first record of the kind."""
    data = bytearray(path.read_bytes())
    for mark, offset in marks:
        place = data.index(mark) + offset
        data[place : place + len(value)] = value
    path.write_bytes(data)


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("/tmp/T1.nii", "has an absolute name"),
        ("C:/T1.nii", "has an absolute name"),
        ("\\\\server\\T1.nii", "has an absolute name"),
        ("T1/../../T1.nii", "leads out of the folder (..)"),
        ("..\\T1.nii", "leads out of the folder (..)"),
        ("a\\b.nii", "has a name with backslashes or control characters"),
        ("T1\n.nii", "has a name with backslashes or control characters"),
    ],
)
def test_a_member_that_would_land_elsewhere_is_refused_with_its_zip(tmp_path, name, fault):
    folder = tmp_path / "release" / "nacc"
    scene = clean_scene(folder, 5, exams=1)
    add_members(folder / f"images/{scene.stem(1)}.zip", {name: nifti()})
    before = set(tmp_path.rglob("*"))
    _, rows, dropped = run(folder)
    assert set(rows) == set(scene.kept) - {scene.scan_id(1)}
    [row] = [row for row in dropped if row["reason"] == BAD_ZIP]
    assert f"{scene.stem(1)}.zip: its member {name!r} {fault}" in row["detail"]
    new = {path.relative_to(folder).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert new == {"nacc.csv", "nacc.dropped.csv", "unpacked"}


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.write_bytes(b"<html>log in first</html>"), "not a whole zip"),
        (lambda path: path.write_bytes(b""), "not a whole zip"),
        (lambda path: _patch(path, [(LOCAL, 6), (CENTRAL, 8)], b"\x01"), "is encrypted"),
        (lambda path: _patch(path, [(LOCAL, 22), (CENTRAL, 24)], b"\x40\x1f\x00\x00"), "cannot be unpacked"),  # 8,000
        (lambda path: _patch(path, [(LOCAL, 8), (CENTRAL, 10)], b"\x63"), "not one readable series"),  # unknown method
        (lambda path: _patch(path, [(LOCAL, 30), (CENTRAL, 46)], b"U1.nii"), "is there twice"),
    ],
    ids=["no zip", "empty", "encrypted", "larger than it says", "unknown compression", "twice"],
)
def test_a_broken_zip_costs_its_own_scan_and_says_why(tmp_path, damage, fault):
    scene = clean_scene(tmp_path, 5, exams=1)
    path = tmp_path / f"images/{scene.stem(1)}.zip"
    write_zip(path, {"T1.nii": nifti(), "U1.nii": nifti()})
    damage(path)
    _, rows, dropped = run(tmp_path)
    assert set(rows) - {f"{scene.stem(1)}/U1"} == set(scene.kept) - {scene.scan_id(1)}
    assert any(fault in row["reason"] + row["detail"] for row in dropped if row["scan_id"].startswith(scene.stem(1)))
    assert not list((tmp_path / "unpacked").rglob("*.tmp"))


def test_a_series_of_more_than_4_gib_is_not_unpacked(tmp_path, monkeypatch):
    scene = clean_scene(tmp_path, 5, exams=1)
    monkeypatch.setattr("sharding.cohorts.nacc_zips.MAX_SERIES_BYTES", 10_000)
    write_zip(tmp_path / f"images/{scene.stem(1)}.zip", {"T1.nii": nifti()})
    _, rows, dropped = run(tmp_path)
    assert set(rows) == set(scene.kept) - {scene.scan_id(1)}
    assert [row["scan_id"] for row in dropped if "GiB, more than 4" in row["detail"]] == [f"{scene.stem(1)}/T1"]
