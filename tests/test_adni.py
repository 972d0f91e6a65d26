import csv
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sharding.cohorts import adni
from sharding.manifest import COLUMNS
from sharding.people import draw_volunteers, save_tiny
from sharding.release import one_row_per_subject, write_release
from sharding.releases import adni as release_adni
from sharding.releases.adni import image_id_of, phase_of, ptid_of, rid_of, scan_date, write_csv

DAY = datetime.timedelta(days=1)
EXTRA_COLUMNS = "age_source description group image_kind phase scan_visit visit".split()
KINDS = {"ADNI1": "n3-scaled", "ADNI2": "n3", "ADNI3": "accelerated"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A clean release of three people, one of each phase, with two visits."""
    folder = tmp_path_factory.mktemp("adni")
    release_adni.write(draw_volunteers("ADNI", 3, 2, seed=1), folder, touch)
    return folder


@pytest.fixture
def release(small, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(small, tmp_path / "adni"))


def touch(path: Path, *_) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"-")


def people(count: int = 3):
    return draw_volunteers("ADNI", count, 2, seed=1)


def table(folder: Path, name: str) -> Path:
    (path,) = (folder / "tables").glob(f"{name}_*.csv")
    return path


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def rewrite(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(path, columns, rows)


def edit(path: Path, where: dict, **cells) -> int:
    """Changes the one row that has the cells `where`; returns its number, the header being row 1."""
    rows = rows_of(path)
    (at,) = [n for n, row in enumerate(rows) if all(row[name] == str(value) for name, value in where.items())]
    rows[at] |= {name: str(value) for name, value in cells.items()}
    rewrite(path, rows)
    return at + 2


def add(path: Path, where: dict, **cells) -> int:
    """Appends a copy of the one row that has the cells `where`, with other cells; returns its number."""
    rows = rows_of(path)
    (found,) = [row for row in rows if all(row[name] == str(value) for name, value in where.items())]
    rewrite(path, [*rows, found | {name: str(value) for name, value in cells.items()}])
    return len(rows) + 2


def remove(path: Path, **where) -> None:
    rewrite(path, [row for row in rows_of(path) if any(row[name] != str(value) for name, value in where.items())])


def place_of(volunteer, exam) -> str:
    """The image of an exam, below the release's folder of images."""
    (found,) = (
        f"ADNI/{ptid_of(volunteer)}/{folder}/{scan_date(volunteer, exam)}_08_31_00.0/I{image_id_of(volunteer, exam)}/"
        f"ADNI_{ptid_of(volunteer)}_MR_{folder}_{raw}_20070219173850420_"
        f"S{20000 + 20 * volunteer.number + exam.number}_I{image_id_of(volunteer, exam)}.nii"
        for folder, raw in [
            {
                "ADNI1": ("MPR__GradWarp__B1_Correction__N3__Scaled", "Br"),
                "ADNI2": ("MT1__GradWarp__N3m", "Br"),
                "ADNI3": ("Accelerated_Sagittal_MPRAGE", "br_raw"),
            }[phase_of(volunteer)]
        ]
    )
    return found


def add_image(images: Path, volunteer, when, description: str, image_id: int, modality: str = "MR", top="ADNI") -> str:
    """Another image, in no list and without a sidecar."""
    folder, ptid = re.sub(r"[^A-Za-z0-9]", "_", description), ptid_of(volunteer)
    name = f"ADNI_{ptid}_{modality}_{folder}_Br_20070219173850420_S{image_id}_I{image_id}.nii"
    place = f"{top}/{ptid}/{folder}/{when}_09_00_00.0/I{image_id}/{name}"
    touch(images / place)
    return place


def number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def split_of(subject_id: str) -> str:
    share = int(hashlib.sha256(f"medblip-split/ADNI/{subject_id}".encode()).hexdigest()[:16], 16) / 2**64
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def expected_row(volunteer, exam) -> dict[str, str]:
    """The manifest's row of a scan whose tables are as they were written."""
    when, phase = scan_date(volunteer, exam), phase_of(volunteer)
    place = place_of(volunteer, exam)
    born = datetime.date(volunteer.born.year, 7, 2)
    return {
        "scan_id": f"I{image_id_of(volunteer, exam)}",
        "cohort": "ADNI",
        "subject_id": ptid_of(volunteer),
        "session_id": when.isoformat(),
        "image": f"adni/images/{place}",
        "diagnosis": exam.diagnosis,
        "diagnosis_source": f"DXSUM DIAGNOSIS {['', 'CN', 'MCI', 'AD'].index(exam.diagnosis)}",
        "diagnosis_gap_days": str((exam.date - when).days),
        "age_years": f"{round((when - born).days / 365.25, 2):g}",
        "sex": volunteer.sex,
        "education_years": number(volunteer.education_years),
        "apoe_e4": str(volunteer.apoe.count(4)),
        "mmse": number(exam.mmse),
        "moca": number(exam.moca),
        "cdr_global": number(exam.cdr_global),
        "cdr_sb": number(exam.cdr_sb),
        "field_strength_t": "1.5" if phase == "ADNI1" else "3",
        "acquired": when.isoformat(),
        "split": split_of(ptid_of(volunteer)),
        "report": "",
        "age_source": "PTDEMOG year of birth",
        "description": place.split("/")[2],
        "group": volunteer.exams[0].diagnosis,
        "image_kind": KINDS[phase],
        "phase": phase,
        "scan_visit": f"m{exam.months}" if exam.number else "sc",
        "visit": f"m{exam.months}" if exam.number else "bl",
    }


WITHOUT_VISIT = dict.fromkeys(
    ["diagnosis", "diagnosis_gap_days", "mmse", "moca", "cdr_global", "cdr_sb", "phase", "visit"], ""
)


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    folder = tmp_path / "adni"
    volunteers = people(38)
    release_adni.write(volunteers, folder, touch)
    images, tables = folder / "images", folder / "tables"
    dxsum, mmse, cdr, demographics, genes = (table(folder, n) for n in ("DXSUM", "MMSE", "CDR", "PTDEMOG", "APOERES"))
    (collection,) = tables.glob("ADNI_T1_*.csv")
    key_mri = table(folder, "All_Subjects_Key_MRI")

    rows = {(v.number, e.number): expected_row(v, e) for v in volunteers for e in v.exams}
    dropped: dict[str, tuple[str, str]] = {}  # by image: reason, and a part of the detail

    def visit(n: int, exam: int) -> dict:
        return {"RID": rid_of(volunteers[n]), "VISCODE2": "m12" if exam else "bl"}

    def screening(n: int) -> dict:
        return {"RID": rid_of(volunteers[n]), "VISCODE2": "sc"}

    def drop(n: int, exam: int, reason: str, detail: str) -> None:
        dropped[rows.pop((n, exam))["image"]] = reason, detail

    def scanned(n: int, exam: int) -> datetime.date:
        return scan_date(volunteers[n], volunteers[n].exams[exam])

    cell = "a table's cell cannot be used"
    best = "another scan of the same visit was taken"

    # 21: a person of whom no table knows
    for path in (dxsum, mmse, cdr, demographics, genes, table(folder, "MOCA")):
        remove(path, RID=rid_of(volunteers[21]))
    for exam in (0, 1):
        rows[21, exam] |= dict.fromkeys(["age_years", "sex", "education_years", "apoe_e4", "age_source"], "")
        rows[21, exam] |= {**WITHOUT_VISIT, "diagnosis_source": "no visit of this person in the tables"}
    # 1: no visit within 90 days
    edit(dxsum, visit(1, 1), EXAMDATE=volunteers[1].exams[1].date + 200 * DAY)
    rows[1, 1] |= {**WITHOUT_VISIT, "diagnosis_source": "no visit within 90 days"}
    # 2, 3: dementia that is not Alzheimer's
    edit(dxsum, visit(2, 1), DIAGNOSIS=3, DXOTHDEM=1, DXAD=0)
    drop(2, 1, "another diagnosis than CN, MCI or AD", "DXSUM DIAGNOSIS 3, DXOTHDEM 1")
    edit(dxsum, visit(3, 0), DIAGNOSIS=3, DXDDUE=2)
    drop(3, 0, "another diagnosis than CN, MCI or AD", "DXSUM DIAGNOSIS 3, DXDDUE 2")
    # 4: missing codes
    edit(mmse, screening(4), MMSCORE=-4)
    edit(cdr, screening(4), CDGLOBAL=-1, CDRSB=-4)
    edit(genes, screening(4), GENOTYPE=-4)
    rows[4, 0] |= {"mmse": "", "cdr_global": "", "cdr_sb": "", "apoe_e4": ""}
    rows[4, 1] |= {"apoe_e4": ""}
    # 5: the screening says something else than the baseline; 6: only the screening has a diagnosis
    add(dxsum, visit(5, 0), VISCODE="sc", VISCODE2="sc", DIAGNOSIS=2, EXAMDATE=scanned(5, 0))
    day = scanned(6, 0) - 5 * DAY
    add(dxsum, visit(6, 0), VISCODE="sc", VISCODE2="sc", DIAGNOSIS=1, EXAMDATE=day)
    edit(dxsum, visit(6, 0), DIAGNOSIS=-4)
    rows[6, 0] |= {"diagnosis": "CN", "diagnosis_source": "DXSUM DIAGNOSIS 1", "diagnosis_gap_days": "-5"}
    # 7, 8: the codes of older phases, where DIAGNOSIS is empty
    for n, column, code, meaning in [(7, "DXCHANGE", 5, "AD"), (8, "DXCURREN", 1, "CN")]:
        edit(dxsum, visit(n, 1), **{"DIAGNOSIS": "", column: code})
        rows[n, 1] |= {"diagnosis": meaning, "diagnosis_source": f"DXSUM {column} {code}"}
    edit(dxsum, visit(8, 0), DXCHANGE=3)  # DIAGNOSIS is there and decides
    # 9: an unknown code
    line = edit(dxsum, visit(9, 1), DIAGNOSIS=7)
    drop(9, 1, cell, f"{dxsum} row {line}, column 'DIAGNOSIS': '7' is not one of 1, 2, 3")
    # 10, 11: two rows for one visit, contradicting and the same
    again = add(dxsum, visit(10, 0), DIAGNOSIS={"CN": 2, "MCI": 3, "AD": 1}[volunteers[10].exams[0].diagnosis])
    first = 2 * 10 + 2
    drop(10, 0, cell, f"{dxsum} row {first} and row {again} are of the same visit or person and differ: diagnosis")
    add(dxsum, visit(11, 0), USERDATE="2020-01-01")
    add(mmse, visit(11, 1), USERDATE="2020-01-01")
    # 12: education is that of the first visit; 13: sex cannot change
    add(demographics, screening(12), VISCODE="m12", VISCODE2="m12", PTEDUCAT=volunteers[12].education_years + 2)
    line = add(demographics, screening(13), VISCODE2="m12", PTGENDER={"M": 2, "F": 1}[volunteers[13].sex])
    for exam in (0, 1):
        drop(13, exam, cell, f"{demographics} row {13 + 2} and {demographics} row {line} contradict each other: sex")
    # 15 (ADNI1): processed before original, 14 and 17 (ADNI3): accelerated before _ND and processed
    assert [phase_of(volunteers[n]) for n in (15, 14, 17)] == ["ADNI1", "ADNI3", "ADNI3"]
    for n, description, image_id in [
        (15, "MP-RAGE", 70015),
        (15, "MPR-R; GradWarp; B1 Correction; N3; Scaled", 30016),
        (14, "Accelerated Sagittal MPRAGE_ND", 70014),
        (17, "MPR; GradWarp; B1 Correction; N3; Scaled", 70017),
        (17, "MPRAGE", 70018),
    ]:
        extra = add_image(images, volunteers[n], scanned(n, 0), description, image_id)
        dropped[f"adni/images/{extra}"] = best, rows[n, 0]["scan_id"]
    # 16: failed quality control; 18: passed, and not assessed
    quality = [("S20320", 0), ("S20360", 1), ("S20361", -4)]
    write_csv(tables / "MRIQUALITY.csv", ["RID", "LONIUID", "PASS"], [{"LONIUID": s, "PASS": ok} for s, ok in quality])
    drop(16, 0, "failed ADNI's quality control", "MRIQUALITY.csv row 2: PASS 0 for series S20320")
    # 18: what is no whole-head T1
    for n, (description, modality, reason) in enumerate(
        [
            ("MPR; GradWarp; B1 Correction; N3; Scaled; Mask", "MR", "a mask, map or localizer"),
            ("Spatially Normalized, Masked and N3 corrected T1 image", "MR", "a mask, map or localizer"),
            ("HarP 135 final release", "MR", "a mask, map or localizer"),
            ("HHP 6 DOF AC-PC registered MPRAGE", "MR", "a mask, map or localizer"),
            ("3 Plane Localizer", "MR", "a mask, map or localizer"),
            ("3-plane loc MPRAGE", "MR", "a mask, map or localizer"),
            ("Axial PD/T2 FSE", "MR", "not a T1-weighted MRI"),
            ("Sagittal 3D FLAIR", "MR", "not a T1-weighted MRI"),
            ("B1-Calibration Body", "MR", "a mask, map or localizer"),
            ("Coreg, Avg, Standardized Image and Voxel Size", "PT", "not a T1-weighted MRI"),
        ]
    ):
        extra = add_image(images, volunteers[18], scanned(18, 0), description, 71000 + n, modality)
        dropped[f"adni/images/{extra}"] = reason, re.sub(r"[^A-Za-z0-9]", "_", description)
    # 19: one image in two zips
    copy = rows[19, 0]["image"].replace("images/ADNI/", "images/ADNI_2/")
    touch(tmp_path / copy)
    dropped[copy] = "a second copy of the same image", rows[19, 0]["image"].removeprefix("adni/images/")
    # 20: DICOM folders, of one image and of two
    nifti = tmp_path / rows[20, 0]["image"]
    nifti.unlink()
    for slice_number in range(3):
        touch(nifti.parent / f"{nifti.stem.replace('_S20400', f'_{slice_number}_S20400')}.dcm")
    rows[20, 0]["image"] = str(nifti.parent.relative_to(tmp_path))
    nifti = tmp_path / rows[20, 1]["image"]  # and one that is there as NIfTI as well
    touch(nifti.parent / f"{nifti.stem}.dcm")
    dropped[str(nifti.parent.relative_to(tmp_path))] = "a second copy of the same image", nifti.name
    mixed = images / "ADNI" / ptid_of(volunteers[20]) / "MPRAGE" / "2001-01-01_08_00_00.0" / "S5"
    for image_id in (72001, 72002):
        touch(mixed / f"ADNI_{ptid_of(volunteers[20])}_MR_MPRAGE_br_raw_2007_1_S5_I{image_id}.dcm")
    # 22, 23: lists that contradict the folders
    wrong = scanned(22, 0) + 40 * DAY
    edit(collection, {"Image Data ID": rows[22, 0]["scan_id"]}, **{"Acq Date": f"{wrong:%m/%d/%Y}"})
    drop(22, 0, "two dates of acquisition", f"was acquired {wrong}, not {scanned(22, 0)}")
    edit(key_mri, {"image_id": rows[23, 0]["scan_id"][1:]}, subject_id="999_S_9999")
    drop(23, 0, "table and folder name different subjects", "is of 999_S_9999")
    # 24: no folders: the date is the collection's, and not that in the name; 25: no date anywhere
    for n in (24, 25):
        nifti = tmp_path / rows[n, 0]["image"]
        nifti.rename(images / nifti.name)
        rows[n, 0]["image"] = f"adni/images/{nifti.name}"
    edit(collection, {"Image Data ID": rows[25, 0]["scan_id"]}, **{"Image Data ID": "I1"})
    remove(key_mri, image_id=rows[25, 0]["scan_id"][1:])
    (sidecar,) = images.glob(f"ADNI/*_{rows[25, 0]['scan_id']}.xml")
    sidecar.unlink()
    for nameless in ("field_strength_t", "session_id", "acquired", "age_years", "age_source", "group", "scan_visit"):
        rows[25, 0][nameless] = ""
    rows[24, 0]["description"] = {"ADNI1": "MPR__GradWarp__B1_Correction__N3__Scaled"}[phase_of(volunteers[24])]
    rows[25, 0] |= {**WITHOUT_VISIT, "diagnosis_source": "no date of the scan"}
    # 26: a file among another person's; 27: a file of nobody, a format that is not read, an archive
    moved = tmp_path / rows[26, 0]["image"]
    stray = moved.parents[3] / ptid_of(volunteers[27]) / "MPRAGE" / moved.name
    stray.parent.mkdir(parents=True)
    moved.rename(stray)
    rows[26, 0]["image"] = str(stray.relative_to(tmp_path))
    drop(26, 0, "file and folder name different subjects", ptid_of(volunteers[26]))
    touch(images / "average_brain.nii.gz")
    dropped["adni/images/average_brain.nii.gz"] = "no subject in the name", "average_brain.nii.gz"
    minc = images / add_image(images, volunteers[27], scanned(27, 0), "MP-RAGE", 73000)
    minc.rename(minc.with_suffix(".mnc"))
    dropped[f"{minc.with_suffix('.mnc').relative_to(tmp_path)}"] = "MINC files are not read", "NIfTI"
    touch(images / "ADNI" / "ADNI1_Complete_1Yr_1.5T.zip")
    # 28: VISCODE2 is empty, VISCODE is harmonised
    edit(dxsum, visit(28, 1), VISCODE2="", VISCODE="m12")
    # 29: as near on both sides: the earlier one
    other = {"CN": 2, "MCI": 3, "AD": 1}[volunteers[29].exams[1].diagnosis]
    edit(dxsum, visit(29, 1), EXAMDATE=scanned(29, 1) + 10 * DAY)
    add(dxsum, visit(29, 1), VISCODE="m06", VISCODE2="m06", DIAGNOSIS=other, EXAMDATE=scanned(29, 1) - 10 * DAY)
    rows[29, 1] |= {**dict.fromkeys(["mmse", "moca", "cdr_global", "cdr_sb"], ""), "visit": "m06"}
    rows[29, 1] |= {"diagnosis": ["", "CN", "MCI", "AD"][other], "diagnosis_gap_days": "-10"}
    rows[29, 1]["diagnosis_source"] = f"DXSUM DIAGNOSIS {other}"
    # 30: the year of birth in PTDOB; 31: nowhere; 32: unscheduled visits and screen failures do not count
    edit(demographics, screening(30), PTDOBYY="")
    edit(demographics, screening(31), PTDOBYY=-4, PTDOB=-4)
    for exam in (0, 1):
        rows[31, exam] |= {"age_years": "", "age_source": ""}
    for code in ("uns1", "f"):
        add(dxsum, visit(32, 0), VISCODE=code, VISCODE2=code, DIAGNOSIS=3, EXAMDATE=scanned(32, 0))
    # 33: the visit's date is missing in DXSUM: that of the next table
    edit(dxsum, visit(33, 1), EXAMDATE=-4)
    # 34: a score that cannot be
    line = edit(mmse, visit(34, 1), MMSCORE=31)
    drop(34, 1, cell, f"{mmse} row {line}, column 'MMSCORE': '31' is not a whole number within 0..30")
    # 35: RID and PTID of different people: the row is nobody's
    line = edit(dxsum, visit(35, 1), PTID="123_S_4567")
    rows[35, 1] |= {"diagnosis": "", "diagnosis_source": "the visit has no diagnosis"}
    rows[35, 1] |= {"diagnosis_gap_days": "", "phase": ""}
    # 36: a nearer visit without a diagnosis does not hide the one with it
    add(mmse, visit(36, 1), VISCODE="m11", VISCODE2="m11", VISDATE=scanned(36, 1), MMSCORE=1)
    # 37: the group at entry is not a diagnosis
    edit(collection, {"Image Data ID": rows[37, 1]["scan_id"]}, Group="EMCI")
    rows[37, 1]["group"] = "EMCI"

    out = tmp_path / "manifest.csv"
    command = f"-m sharding.manifest adni --images {images} --tables {tables} --out {out}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {row["image"]: row for row in rows_of(out)}
    assert list(rows_of(out)[0]) == [*COLUMNS, *EXTRA_COLUMNS]
    assert found.keys() == {row["image"] for row in rows.values()}
    for row in rows.values():
        assert found[row["image"]] == row

    gone = rows_of(out.with_suffix(".dropped.csv"))
    two = [row for row in gone if row["reason"] == "a DICOM folder with several images"]
    assert [row["scan_id"] for row in two] == ["I72001", "I72002"]
    assert all("I72001, I72002" in row["detail"] and "folder of its own" in row["detail"] for row in two)
    single = {row["image"]: row for row in gone if row not in two}
    assert single.keys() == dropped.keys() and len(single) + len(two) == len(gone)
    for image, (reason, detail) in dropped.items():
        assert single[image]["reason"] == reason and detail in single[image]["detail"]

    total = len(found) + len(gone)
    assert f"ADNI: {total} scans found = {len(found)} kept + {len(gone)} dropped" in done.stderr
    assert total == sum(path.suffix in (".nii", ".gz", ".mnc") for path in images.rglob("*")) + 4
    assert f"{dxsum} row {line}, column 'PTID': '123_S_4567'" in done.stderr
    assert "1 zip files are passed over" in done.stderr


def read(folder: Path, **options):
    options = {"images": folder / "images", "tables": folder / "tables", "out": folder.parent / "m.csv"} | options
    return adni.read(adni.Options(**options))


def by_scan(release) -> dict[str, dict]:
    return {row["scan_id"]: row for row in release.rows}


def test_tables_under_their_old_names_give_the_same(release):
    before = read(release).rows
    for name, old in {"DXSUM": "DXSUM_PDXCONV_ADNIALL", "CDR": "CDR", "MMSE": "MMSE_01Oct2012", "MOCA": "moca"}.items():
        table(release, name).rename(release / "tables" / f"{old}.csv")
    rows = rows_of(release / "tables" / "DXSUM_PDXCONV_ADNIALL.csv")
    for row in rows:  # no PTID, Phase, and a column of codes for each phase
        del row["PTID"]
        row["Phase"] = row.pop("PHASE")
        row["DXCHANGE"], row["DXCURREN"] = "", ""
    rewrite(release / "tables" / "DXSUM_PDXCONV_ADNIALL.csv", rows)
    alleles = rows_of(table(release, "APOERES"))
    for row in alleles:
        row["APGEN1"], row["APGEN2"] = row.pop("GENOTYPE").split("/")
    rewrite(table(release, "APOERES"), alleles)
    assert read(release).rows == before and len(before) == 6


def test_tables_of_all_subjects_give_the_same(release):
    before = read(release).rows
    for path in list((release / "tables").glob("*_21Aug2025.csv")):
        if not path.name.startswith("All_Subjects_"):
            path.rename(path.with_name(f"All_Subjects_{path.name}"))
    assert read(release).rows == before


def merged_row(volunteer, exam, **cells) -> dict:
    names = {"CN": "CN", "MCI": "MCI", "AD": "Dementia"}
    return {
        "RID": rid_of(volunteer),
        "PTID": ptid_of(volunteer),
        "VISCODE": f"m{exam.months}" if exam.number else "bl",
        "COLPROT": phase_of(volunteer),
        "EXAMDATE": exam.date,
        "DX_bl": "EMCI",
        "AGE": volunteer.exams[0].age_years,
        "PTGENDER": {"M": "Male", "F": "Female"}[volunteer.sex],
        "PTEDUCAT": volunteer.education_years,
        "APOE4": volunteer.apoe.count(4),
        "CDRSB": exam.cdr_sb,
        "MMSE": exam.mmse,
        "MOCA": exam.moca,
        "DX": names[exam.diagnosis],
        "EXAMDATE_bl": volunteer.exams[0].date,
    } | cells


def write_merged(folder: Path, **cells) -> Path:
    path = folder / "tables" / "ADNIMERGE_21Aug2025.csv"
    rewrite(path, [merged_row(v, e, **cells) for v in people() for e in v.exams])
    return path


def test_adnimerge_alone_is_enough_but_for_the_global_cdr(release):
    before = by_scan(read(release))
    for path in (release / "tables").glob("*_21Aug2025.csv"):
        path.unlink()
    write_merged(release)
    after = by_scan(read(release))
    assert after.keys() == before.keys()
    for volunteer in people():
        for exam in volunteer.exams:
            row, was = (rows[f"I{image_id_of(volunteer, exam)}"] for rows in (after, before))
            for name in (
                "diagnosis",
                "diagnosis_gap_days",
                "sex",
                "education_years",
                "apoe_e4",
                "mmse",
                "moca",
                "cdr_sb",
            ):
                assert row[name] == was[name], name
            assert row["cdr_global"] is None and row["phase"] == phase_of(volunteer)
            assert row["diagnosis_source"].startswith("ADNIMERGE DX ")
            entered = volunteer.exams[0]
            passed = (scan_date(volunteer, exam) - entered.date).days / 365.25
            assert row["age_years"] == pytest.approx(entered.age_years + passed, abs=0.006)
            assert row["age_source"] == "ADNIMERGE AGE"


def test_adnimerge_fills_in_and_never_overrules(release):
    before = read(release).rows
    write_merged(release, DX="MCI to Dementia", MMSE=3, AGE=99, PTGENDER="Male", APOE4=0)
    assert read(release).rows == before
    volunteer = people()[0]
    edit(table(release, "DXSUM"), {"RID": rid_of(volunteer), "VISCODE2": "m12"}, DIAGNOSIS="")
    row = by_scan(read(release))[f"I{image_id_of(volunteer, volunteer.exams[1])}"]
    assert (row["diagnosis"], row["diagnosis_source"]) == ("AD", "ADNIMERGE DX MCI to Dementia")
    assert row["mmse"] == volunteer.exams[1].mmse


@pytest.mark.parametrize(
    ("told", "meant"),
    [("NL", "CN"), ("NL to MCI", "MCI"), ("MCI to Dementia", "AD"), ("MCI to NL", "CN"), ("Dementia to MCI", "MCI")],
)
def test_changes_in_old_copies_of_adnimerge_mean_the_newer_state(release, told, meant):
    table(release, "DXSUM").unlink()
    write_merged(release, DX=told)
    assert {row["diagnosis"] for row in read(release).rows} == {meant}


def test_the_diagnosis_at_entry_is_never_a_visits_diagnosis(release):
    table(release, "DXSUM").unlink()
    write_merged(release, DX="", DX_bl="AD")
    rows = read(release).rows
    assert [row["diagnosis"] for row in rows] == [None] * 6
    assert {row["diagnosis_source"] for row in rows} == {"the visit has no diagnosis"}


@pytest.mark.parametrize("column,codes", [("DXCHANGE", {"CN": "179", "MCI": "248", "AD": "356"})])
def test_every_code_of_a_change_means_the_newer_state(release, column, codes):
    volunteer = people()[0]
    for meaning, its in codes.items():
        for code in its:
            edit(table(release, "DXSUM"), {"RID": rid_of(volunteer), "VISCODE2": "m12"}, DIAGNOSIS="", DXCHANGE=code)
            row = by_scan(read(release))[f"I{image_id_of(volunteer, volunteer.exams[1])}"]
            assert (row["diagnosis"], row["diagnosis_source"]) == (meaning, f"DXSUM {column} {code}")


def test_field_strength_comes_from_lists_and_decides_between_equals(release):
    volunteer = people()[0]
    exam = volunteer.exams[0]
    assert phase_of(volunteer) == "ADNI1"
    for path in (release / "images").rglob("*.xml"):
        path.unlink()
    when = scan_date(volunteer, exam)
    other = add_image(release / "images", volunteer, when, "MPR; GradWarp; B1 Correction; N3; Scaled", 39000)
    columns = [
        "Orig/Proc",
        "SubjectID",
        "Visit",
        "MagStrength",
        "Sequence",
        "ScanDate",
        "StudyID",
        "SeriesID",
        "ImageUID",
    ]
    listed = {"SubjectID": ptid_of(volunteer), "ScanDate": when, "Sequence": "MPR; GradWarp; B1 Correction; N3; Scaled"}
    of_both = [(39000, "3.0"), (image_id_of(volunteer, exam), "1.5")]
    write_csv(
        release / "tables" / "MPRAGEMETA.csv",
        columns,
        [{**listed, "ImageUID": image_id, "MagStrength": field} for image_id, field in of_both],
    )
    after = read(release)
    assert by_scan(after)[f"I{image_id_of(volunteer, exam)}"]["field_strength_t"] == 1.5
    assert [str(gone.scan.image) for gone in after.dropped] == [str(release / "images" / other)]


def test_the_first_image_of_a_session_is_better_than_its_repeat(release):
    volunteer = people()[0]
    exam = volunteer.exams[0]
    for path in [*(release / "images").rglob("*.xml")]:
        path.unlink()
    when = scan_date(volunteer, exam)
    add_image(release / "images", volunteer, when, "MPR-R; GradWarp; B1 Correction; N3; Scaled", 30000)
    after = read(release)
    assert [gone.scan.scan_id for gone in after.dropped] == ["I30000"]


def test_a_bad_cell_does_not_send_the_scan_to_another_visit(release):
    for name in ("CDR", "MMSE", "MOCA"):
        table(release, name).unlink()
    volunteer = people()[0]
    exam = volunteer.exams[1]
    path, visit = table(release, "DXSUM"), {"RID": rid_of(volunteer), "VISCODE2": "m12"}
    add(path, visit, VISCODE2="m06", VISCODE="m06", EXAMDATE=scan_date(volunteer, exam) - 80 * DAY)
    line = edit(path, visit, DIAGNOSIS="Dementia")
    after = read(release)
    assert [gone.scan.scan_id for gone in after.dropped] == [f"I{image_id_of(volunteer, exam)}"]
    assert f"{path} row {line}, column 'DIAGNOSIS': 'Dementia'" in after.dropped[0].detail


def test_an_analyze_pair_and_a_packed_file_are_one_image_each(release):
    path = next((release / "images").rglob("*.nii"))
    path.rename(path.with_suffix(".img"))
    touch(path.with_suffix(".hdr"))
    other = sorted((release / "images").rglob("*.nii"))[0]
    other.rename(other.with_name(f"{other.name}.gz"))
    after = read(release)
    assert len(after.rows) == 6 and not after.dropped
    assert {row["image"].name.split(".", 1)[1] for row in after.rows} == {"img", "nii.gz", "nii"}


def test_a_damaged_sidecar_is_named_and_the_scan_is_kept(release):
    sidecar = sorted((release / "images").rglob("*.xml"))[0]
    sidecar.write_text("<idaxs><project>")
    after = read(release)
    assert len(after.rows) == 6 and sum(row["field_strength_t"] is None for row in after.rows) == 1
    assert any(str(sidecar) in fault for fault in after.faults)


def test_window_days_is_how_far_a_diagnosis_reaches(release):
    volunteer = people()[0]
    exam = volunteer.exams[1]
    edit(table(release, "DXSUM"), {"RID": rid_of(volunteer), "VISCODE2": "m12"}, EXAMDATE=exam.date + 120 * DAY)
    gap = (exam.date + 120 * DAY - scan_date(volunteer, exam)).days
    for window, diagnosis in [(gap - 1, None), (gap, exam.diagnosis)]:
        row = by_scan(read(release, window_days=window))[f"I{image_id_of(volunteer, exam)}"]
        assert row["diagnosis"] == diagnosis
        assert row["diagnosis_gap_days"] == (gap if diagnosis else None)


def test_one_scan_per_says_what_is_kept(release):
    volunteer = people()[0]
    add_image(release / "images", volunteer, scan_date(volunteer, volunteer.exams[0]), "MP-RAGE", 39000)
    kept = {choice: read(release, one_scan_per=choice) for choice in ("all", "visit", "subject")}
    one_row_per_subject(kept["subject"])  # the command's own step
    assert {choice: len(release.rows) for choice, release in kept.items()} == {"all": 7, "visit": 6, "subject": 3}
    assert {len(release.rows) + len(release.dropped) for release in kept.values()} == {7}
    assert {row["visit"] for row in kept["subject"].rows} == {"bl"}


def swap(old: str, new: str):
    return lambda text: text.replace(old, new, 1)


# What is done to a table's text, and what the error must name.
BROKEN = {
    "a column is missing": ("DXSUM", swap('"VISCODE","VISCODE2"', '"V","V2"'), ["VISCODE", "DXSUM"]),
    "a column is renamed": ("MMSE", swap("MMSCORE", "MMSE_TOTAL"), ["MMSCORE", "MMSE_21Aug2025.csv"]),
    "no column of diagnoses": ("DXSUM", swap("DIAGNOSIS", "DX"), ["DIAGNOSIS or DXCHANGE or DXCURREN"]),
    "no genotype": ("APOERES", swap("GENOTYPE", "APOE"), ["APGEN1 or GENOTYPE"]),
    "the list's date is renamed": ("ADNI_T1", swap("Acq Date", "AcqDate"), ["'Acq Date'", "is it 'AcqDate'"]),
    "semicolons": ("CDR", lambda text: text.replace(",", ";"), ["separated by ','"]),
    "the file is empty": ("PTDEMOG", lambda text: "", ["PTDEMOG_21Aug2025.csv", "empty"]),
    "days come first": (
        "DXSUM",
        lambda text: re.sub(r'"(\d{4})-(\d\d)-(\d\d)"', r'"\3/\2/\1"', text),
        ["EXAMDATE", "day first", "row"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_is_not_what_it_should_be_is_refused(release, name):
    stem, change, named = BROKEN[name]
    path = table(release, stem)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError) as error:
        read(release)
    for part in named:
        assert part in str(error.value)


SPOILT = {
    "unknown code": ("DXSUM", {"DIAGNOSIS": "9"}, "'DIAGNOSIS': '9'"),
    "unknown code of sex": ("PTDEMOG", {"PTGENDER": "3"}, "'PTGENDER': '3'"),
    "a year that cannot be": ("PTDEMOG", {"PTDOBYY": "2019"}, "'PTDOBYY': '2019'"),
    "a genotype that cannot be": ("APOERES", {"GENOTYPE": "3/5"}, "'GENOTYPE': '3/5'"),
    "a grade that cannot be": ("CDR", {"CDGLOBAL": "1.5"}, "'CDGLOBAL': '1.5'"),
    "a flag that cannot be": ("DXSUM", {"DIAGNOSIS": "3", "DXDDUE": "7"}, "'DXDDUE': '7'"),
    "no date": ("DXSUM", {"EXAMDATE": "spring"}, "'EXAMDATE': 'spring'"),
    "latin-1": ("DXSUM", {"PHASE": "M\udcfcnchen"}, "'PHASE'"),
    "a list's date": ("ADNI_T1", {"Acq Date": "2/30/2010"}, "'Acq Date': '2/30/2010'"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_cell_that_means_nothing_drops_what_hangs_on_it(release, name):
    stem, cells, named = SPOILT[name]
    path = table(release, stem)
    rows = rows_of(path)
    rows[0] |= cells
    columns = list(rows[0])
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    after = read(release)
    assert 1 <= len(after.dropped) <= 2 and len(after.rows) + len(after.dropped) == 6
    for gone in after.dropped:
        assert gone.reason == "a table's cell cannot be used"
        assert gone.scan.subject_id == ptid_of(people()[0])
        assert f"{path} row 2, column {named}" in gone.detail
    assert any(named in fault for fault in after.faults)


def test_a_byte_order_mark_and_day_month_swaps_of_excel_are_read(release):
    before = read(release).rows
    for path in (release / "tables").glob("*.csv"):
        text = re.sub(r'"(\d{4})-(\d\d)-(\d\d)"', r'"\2/\3/\1"', path.read_text())  # 12/31/2010, as Excel in the US
        path.write_text("\ufeff" + text, encoding="utf-8")
    assert read(release).rows == before


def test_two_copies_of_a_table_and_no_table_at_all_are_refused(release):
    path = table(release, "DXSUM")
    shutil.copy(path, path.with_name("DXSUM_01Jan2024.csv"))
    with pytest.raises(ValueError, match="2 tables are named DXSUM"):
        read(release)
    path.unlink()
    path.with_name("DXSUM_01Jan2024.csv").unlink()
    (release / "tables" / "XDXSUM_21Aug2025.csv").write_text("RID\n")  # another table's name that ends alike
    with pytest.raises(ValueError, match="neither a table DXSUM nor ADNIMERGE"):
        read(release)


def test_images_of_the_writer_can_be_read_and_the_manifest_again(tmp_path):
    from medblip.image import read_image
    from sharding.manifest import read_manifest, splits_of

    release_adni.write(people()[2:], tmp_path, save_tiny)
    release = read(tmp_path)
    for row in release.rows:
        row["split"] = splits_of([("ADNI", row["subject_id"])], ())["ADNI", row["subject_id"]]
    write_release(release, tmp_path / "m.csv")
    scans = read_manifest(tmp_path / "m.csv")
    assert len(scans) == 2 and all(os.path.isfile(scan.image) for scan in scans)
    assert read_image(scans[0].image)[0].shape == (16, 20, 18)
