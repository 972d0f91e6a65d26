"""AIBL: from its download to rows and dropped scans, trap by trap."""

import csv
import datetime
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from csv_files import edit

from sharding.cohorts import aibl
from sharding.people import draw_volunteers, save_tiny
from sharding.releases.aibl import image_path, viscode, write

PEOPLE = draw_volunteers("AIBL", 26, 4, seed=1)
PEOPLE[24] = replace(PEOPLE[24], number=340)  # RID 342
PEOPLE[25] = replace(PEOPLE[25], number=555)  # RID 557
EXTRACT = "tables/Data_extract_3.3.0"


def rid_of(person) -> int:
    return person.number + 2


def image_of(person, exam) -> int:
    return 100_001 + 20 * person.number + exam.number


def table(folder: Path, stem: str) -> Path:
    return folder / EXTRACT / f"aibl_{stem}_01-Jun-2018.csv"


def set_cell(folder: Path, stem: str, person, code: str, **cells) -> None:
    """Sets cells of one person's visit."""

    def change(rows):
        found = [row for row in rows if row["RID"] == str(rid_of(person)) and row["VISCODE"] == code]
        assert len(found) == 1
        found[0].update({name: str(value) for name, value in cells.items()})

    edit(table(folder, stem), change)


def no_mri_dates(folder: Path, person, code: str) -> None:
    for stem in ("mrimeta", "mri3meta"):
        set_cell(folder, stem, person, code, EXAMDATE=-4)


def not_listed(folder: Path, image: int) -> None:
    path = folder / "tables" / "AIBL_T1_11_20_2019.csv"
    edit(path, lambda rows: [row for row in rows if row["Image Data ID"] != str(image)])


def move_series(folder: Path, person, exam, series: str) -> Path:
    """Renames the series of a scan; returns the new path below `folder`."""
    old = image_path(rid_of(person), exam, image_of(person, exam))
    new = image_path(rid_of(person), exam, image_of(person, exam), series)
    (folder / new).parent.mkdir(parents=True)
    (folder / old).rename(folder / new)
    return new


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def us(date: datetime.date) -> str:
    return date.strftime("%m/%d/%Y")


def clean_rows(people) -> dict[str, dict[str, str]]:
    """The rows that a release without any trap must give."""
    rows = {}
    for person in people:
        for exam in person.exams:
            code = {"CN": 1, "MCI": 2, "AD": 3}[exam.diagnosis]
            table_name, tesla = ("aibl_mri3meta", "3") if exam.number else ("aibl_mrimeta", "1.5")
            rows[f"I{image_of(person, exam)}"] = {
                "scan_id": f"I{image_of(person, exam)}",
                "cohort": "AIBL",
                "subject_id": str(rid_of(person)),
                "session_id": viscode(exam),
                "image": str(image_path(rid_of(person), exam, image_of(person, exam))),
                "diagnosis": exam.diagnosis,
                "diagnosis_source": f"aibl_pdxconv DXCURREN {code}",
                "diagnosis_gap_days": "0",
                "age_years": str(exam.date.year - person.born.year),
                "sex": person.sex,
                "education_years": "",
                "apoe_e4": str(person.apoe.count(4)),
                "mmse": str(exam.mmse),
                "moca": "",
                "cdr_global": f"{exam.cdr_global:g}",
                "cdr_sb": "",
                "field_strength_t": tesla,
                "acquired": str(exam.date),
                "split": "test",
                "report": "",
                "series": "MPRAGE_ADNI_confirmed",
                "visit": viscode(exam),
                "visit_from": f"{table_name} EXAMDATE",
            }
    return rows


def read_csv(path: Path) -> dict[str, dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["scan_id"] for row in rows}) == len(rows)
    return {row["scan_id"]: row for row in rows}


def manifest(folder: Path, *flags: str) -> tuple[dict, list[dict], str]:
    """The command's rows by scan_id, its dropped scans, and its log."""
    command = f"-m sharding.manifest aibl --images {folder}/images --tables {folder}/tables --out {folder}/aibl.csv"
    done = subprocess.run([sys.executable, *command.split(), *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(folder / "aibl.dropped.csv", encoding="utf-8", newline="") as file:
        return read_csv(folder / "aibl.csv"), list(csv.DictReader(file)), done.stderr


def read_release(folder: Path, **flags):
    return aibl.read(aibl.Options(images=folder / "images", tables=folder / "tables", out=folder / "x.csv", **flags))


@pytest.fixture
def small(tmp_path) -> Path:
    """A release of three people without traps."""
    write(PEOPLE[:3], tmp_path, save_tiny)
    return tmp_path


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    write(PEOPLE, tmp_path, save_tiny)
    rows, dropped = clean_rows(PEOPLE), {}
    bad_cell, same_visit = "a table's cell cannot be used", "another scan of the same visit was taken"

    def scan(person, number: int) -> str:
        return f"I{image_of(person, person.exams[number])}"

    def drop(scan_id: str, reason: str, *told: str) -> None:
        rows.pop(scan_id, None)
        dropped[scan_id] = reason, told

    # Diagnoses: other diseases, an unknown code, missing ones, rows twice.
    a, b, c, d, e = PEOPLE[1:6]
    set_cell(tmp_path, "pdxconv", a, "bl", DXOTHDEM=1)
    drop(scan(a, 0), "another diagnosis than CN, MCI or AD", "aibl_pdxconv DXOTHDEM 1")
    set_cell(tmp_path, "pdxconv", b, "m18", DXPARK=1)
    drop(scan(b, 1), "another diagnosis than CN, MCI or AD", "aibl_pdxconv DXPARK 1")
    set_cell(tmp_path, "pdxconv", c, "bl", DXCURREN=7)
    drop(scan(c, 0), bad_cell, "aibl_pdxconv_01-Jun-2018.csv row 14", "DXCURREN", "'7'")
    set_cell(tmp_path, "pdxconv", d, "bl", DXCURREN=-4)
    missing = {"diagnosis": "", "diagnosis_source": "aibl_pdxconv DXCURREN is missing", "diagnosis_gap_days": ""}
    rows[scan(d, 0)] |= missing
    set_cell(tmp_path, "mmse", e, "bl", MMSCORE=-4)
    set_cell(tmp_path, "cdr", e, "bl", CDGLOBAL=-4)
    rows[scan(e, 0)] |= {"mmse": "", "cdr_global": ""}
    edit(table(tmp_path, "pdxconv"), lambda rows: [*rows, dict(rows[-1])])  # the same row again is one
    twice = PEOPLE[6]
    edit(
        table(tmp_path, "mmse"),
        lambda rows: [
            *rows,
            {"RID": rid_of(twice), "SITEID": 1, "VISCODE": "m18", "EXAMDATE": -4, "MMSCORE": twice.exams[1].mmse - 1},
        ],
    )
    drop(scan(twice, 1), bad_cell, "aibl_mmse_01-Jun-2018.csv row 27 and row 106", "mmse")
    edit(
        table(tmp_path, "pdxconv"),
        lambda rows: [row for row in rows if (row["RID"], row["VISCODE"]) != (str(rid_of(twice)), "m36")],
    )
    rows[scan(twice, 2)] |= missing | {"diagnosis_source": "aibl_pdxconv has no row of m36"}

    # Links: no MRI date, then the collection's visit, the sagittal rule, the nearest date from the chain of tables.
    near, far, listed, sagittal, fluid = PEOPLE[7:12]
    for person, days in ((near, 90), (far, 91)):
        no_mri_dates(tmp_path, person, "bl")
        not_listed(tmp_path, image_of(person, person.exams[0]))
        set_cell(tmp_path, "cdr", person, "bl", EXAMDATE=us(person.exams[0].date + datetime.timedelta(days=days)))
    linked = {"field_strength_t": "", "visit_from": "nearest within 90 days"}
    rows[scan(near, 0)] |= linked | {"diagnosis_gap_days": "90"}
    unlinked = "mmse cdr_global field_strength_t visit visit_from diagnosis diagnosis_gap_days".split()
    rows[scan(far, 0)] |= dict.fromkeys(unlinked, "") | {"session_id": str(far.exams[0].date)}
    rows[scan(far, 0)] |= {"diagnosis_source": "no visit within 90 days"}
    for code in ("bl", "m18", "m36"):
        no_mri_dates(tmp_path, listed, code)
        set_cell(tmp_path, "cdr", listed, code, EXAMDATE=-4)
    set_cell(tmp_path, "mmse", listed, "m36", EXAMDATE=us(listed.exams[2].date - datetime.timedelta(days=5)))

    def name_visits(rows):
        words = {scan(listed, 0): "Base", scan(listed, 1): "18 Mo"}
        for row in rows:
            row["Visit"] = words.get(f"I{row['Image Data ID']}", row["Visit"])

    edit(tmp_path / "tables" / "AIBL_T1_11_20_2019.csv", name_visits)
    for number, gap in ((0, ""), (1, ""), (2, "-5")):
        rows[scan(listed, number)] |= {"field_strength_t": "", "visit_from": "the collection's Visit"}
        rows[scan(listed, number)] |= {"diagnosis_gap_days": gap}
    no_mri_dates(tmp_path, sagittal, "bl")
    not_listed(tmp_path, image_of(sagittal, sagittal.exams[0]))
    new = move_series(tmp_path, sagittal, sagittal.exams[0], "MPRAGESAGISOp2ND")
    by_rule = {"field_strength_t": "", "visit_from": "the rule for sagittal series"}
    rows[scan(sagittal, 0)] |= by_rule | {"series": "MPRAGESAGISOp2ND", "image": str(new)}
    for person in PEOPLE[24:]:  # RID 342 and 557: the sagittal scan is of m54
        no_mri_dates(tmp_path, person, "m54")
        not_listed(tmp_path, image_of(person, person.exams[3]))
        new = move_series(tmp_path, person, person.exams[3], "MPRAGE_SAG_ISO_p2_ND")
        rows[scan(person, 3)] |= by_rule | {"series": "MPRAGE_SAG_ISO_p2_ND", "image": str(new)}
    no_mri_dates(tmp_path, fluid, "bl")
    not_listed(tmp_path, image_of(fluid, fluid.exams[0]))
    set_cell(tmp_path, "cdr", fluid, "bl", EXAMDATE=-4)
    set_cell(tmp_path, "flutemeta", fluid, "bl", EXAMDATE=us(fluid.exams[0].date - datetime.timedelta(days=9)))
    with open(table(tmp_path, "flutemeta"), encoding="utf-8") as file:
        lines = file.read().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(f"{rid_of(fluid)},1,bl,"))
    lines[place] = ",".join([*lines[place].split(",")[:5], "measured", "AUSTIN AC CT Brain  H19s", "PET 1", "0"])
    table(tmp_path, "flutemeta").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows[scan(fluid, 0)] |= linked | {"diagnosis_gap_days": "-9"}

    # Dates: of two visits, in both MRI tables, with day and month turned round.
    double, both, turned = PEOPLE[12:15]
    set_cell(tmp_path, "mri3meta", double, "m18", EXAMDATE=us(double.exams[0].date))
    drop(scan(double, 0), "two visits fit", "bl and m18")
    gap = (double.exams[0].date - double.exams[1].date).days
    rows[scan(double, 1)] |= dict.fromkeys(unlinked, "") | {"session_id": str(double.exams[1].date)}
    rows[scan(double, 1)] |= {"diagnosis_source": f"the collection's Visit names m18, {gap} days from the scan"}
    set_cell(tmp_path, "mri3meta", both, "bl", EXAMDATE=us(both.exams[0].date))
    rows[scan(both, 0)] |= {"field_strength_t": "", "visit_from": "aibl_mri3meta EXAMDATE"}
    set_cell(tmp_path, "mri3meta", turned, "m36", EXAMDATE="25/03/2012")
    not_listed(tmp_path, image_of(turned, turned.exams[2]))
    drop(scan(turned, 2), bad_cell, "aibl_mri3meta_01-Jun-2018.csv row 60", "EXAMDATE", "'25/03/2012'")

    # People: a bad year of birth, no row, unknown genes.
    odd, absent, genes = PEOPLE[15:18]
    set_cell(tmp_path, "ptdemog", odd, "bl", PTDOB="/34")
    for number in range(4):
        drop(scan(odd, number), bad_cell, "aibl_ptdemog_01-Jun-2018.csv row 17", "PTDOB", "'/34'")
    edit(table(tmp_path, "ptdemog"), lambda rows: [row for row in rows if row["RID"] != str(rid_of(absent))])
    set_cell(tmp_path, "apoeres", genes, "bl", APGEN2=-4)
    for number in range(4):
        rows[scan(absent, number)] |= {"sex": "", "age_years": ""}
        rows[scan(genes, number)] |= {"apoe_e4": ""}

    # Images: repeats, copies, other series, DICOM, strangers.
    many, dicom, pair = PEOPLE[18:21]
    repeat = image_path(rid_of(many), many.exams[0], 900001, "MPRAGE_ADNI_confirmed_REPEAT")
    touch(tmp_path / repeat)
    drop("I900001", same_visit, scan(many, 0))
    touch(tmp_path / image_path(rid_of(many), many.exams[0], 900002, "FLAIR_AXIAL"))
    drop("I900002", "not a T1-weighted series", "FLAIR_AXIAL")
    path = image_path(rid_of(many), many.exams[1], image_of(many, many.exams[1]))
    copy = touch(tmp_path / "images" / "unzipped_2" / path.relative_to("images"))
    kept_image = tmp_path / path
    path = image_path(rid_of(dicom), dicom.exams[0], image_of(dicom, dicom.exams[0]))
    (tmp_path / path).unlink()
    for slice_number in range(3):
        touch(tmp_path / path.parent / f"AIBL_{rid_of(dicom)}_MR_br_raw_{slice_number}_S1_{scan(dicom, 0)}.dcm")
    rows[scan(dicom, 0)] |= {"image": str(path.parent)}
    path = image_path(rid_of(pair), pair.exams[0], 900010)
    for image in (900010, 900011):
        touch(tmp_path / path.parent / f"AIBL_{rid_of(pair)}_MR_br_raw_1_S1_I{image}.dcm")
        drop(f"I{image}", "a DICOM folder with several images", "folder of its own")
    touch(tmp_path / image_path(rid_of(pair), pair.exams[0], 900012).parent / "AIBL_1_MR_x_I900012.nii")
    drop("I900012", "file and folder name different subjects", "AIBL_1_MR_x_I900012.nii")
    touch(tmp_path / "images/AIBL/0151083/MPRAGE/2010-01-01_10_00_00.0/I900013/a_I900013.dcm")
    drop("I900013", "a folder that is not part of the release", "0151083")
    touch(tmp_path / "images/AIBL/s7/MPRAGE/2010-01-01_10_00_00.0/I900014/a_I900014.nii")
    drop("I900014", "the subject's folder is not named by a RID", "s7")
    touch(tmp_path / "images/loose_I900015.nii")
    drop("I900015", "not in the folders of the download")
    touch(tmp_path / "images/AIBL/900/MPRAGE/2010-01-01_10_00_00.0/I900016/a_I900016.nii")
    rows["I900016"] = dict.fromkeys(next(iter(rows.values())), "") | {
        "scan_id": "I900016",
        "cohort": "AIBL",
        "subject_id": "900",
        "session_id": "2010-01-01",
        "image": "images/AIBL/900/MPRAGE/2010-01-01_10_00_00.0/I900016/a_I900016.nii",
        "diagnosis_source": "no table has this person",
        "acquired": "2010-01-01",
        "split": "test",
        "series": "MPRAGE",
    }

    # The collection's CSV: another person's, an unknown visit.
    other, unknown = PEOPLE[21:23]
    for person in (other, unknown):
        no_mri_dates(tmp_path, person, "bl")

    def spoil(rows):
        for row in rows:
            if f"I{row['Image Data ID']}" == scan(other, 0):
                row["Subject"] = "3"
            if f"I{row['Image Data ID']}" == scan(unknown, 0):
                row["Visit"] = "v99"

    edit(tmp_path / "tables" / "AIBL_T1_11_20_2019.csv", spoil)
    drop(scan(other, 0), "table and folder name different subjects", f"is of 3, its folder of {rid_of(other)}")
    drop(scan(unknown, 0), bad_cell, "AIBL_T1_11_20_2019.csv row ", "Visit", "'v99'")

    found_rows, found_dropped, log = manifest(tmp_path)
    copies = [gone for gone in found_dropped if gone["reason"] == "a second copy of the same image"]
    assert [(gone["image"], gone["detail"]) for gone in copies] == [(str(copy.relative_to(tmp_path)), str(kept_image))]
    found_dropped = {gone["scan_id"]: gone for gone in found_dropped if gone not in copies}
    assert found_rows.keys() == rows.keys()
    for scan_id, row in rows.items():
        assert found_rows[scan_id] == row
    assert {scan_id: gone["reason"] for scan_id, gone in found_dropped.items()} == {
        scan_id: reason for scan_id, (reason, _) in dropped.items()
    }
    for scan_id, (_, told) in dropped.items():
        assert all(word in found_dropped[scan_id]["detail"] for word in told), found_dropped[scan_id]["detail"]
    num_found = len(rows) + len(dropped) + 1
    assert f"{num_found} scans found = {len(rows)} kept + {len(dropped) + 1} dropped" in log


def test_a_clean_release_loses_nothing(small):
    rows, dropped, _ = manifest(small)
    assert rows == clean_rows(PEOPLE[:3]) and dropped == []


def rename(old: str, new: str):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("stem", "spoil", "told"),
    [
        ("pdxconv", rename("DXCURREN", "DXCURRENT"), ["DXCURREN", "is it 'DXCURRENT'?"]),
        ("ptdemog", rename(",PTDOB", ""), ["PTDOB"]),
        ("mmse", lambda text: text.replace(",", ";"), ["separated by ','"]),
        ("cdr", lambda text: "", ["empty"]),
        ("mri3meta", rename("EXAMDATE", "SITEID"), ["SITEID", "twice"]),
    ],
)
def test_a_table_that_is_not_what_it_should_be_is_refused_by_name(small, stem, spoil, told):
    path = table(small, stem)
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        read_release(small)
    assert all(word in str(refused.value) for word in [path.name, *told])


def test_a_table_that_is_absent_or_there_twice_is_refused_by_name(small):
    path = table(small, "mmse")
    path.with_name("aibl_mmse_28-Apr-2015.csv").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="2 tables are named aibl_mmse"):
        read_release(small)
    path.unlink()
    path.with_name("aibl_mmse_28-Apr-2015.csv").unlink()
    with pytest.raises(ValueError, match="no table named aibl_mmse"):
        read_release(small)


@pytest.mark.parametrize(
    ("stem", "cells", "told"),
    [
        ("pdxconv", {"DXCURREN": "9"}, ["row 2", "DXCURREN", "'9'"]),
        ("pdxconv", {"DXPARK": "x"}, ["row 2", "DXPARK", "'x'"]),
        ("mmse", {"MMSCORE": "31"}, ["row 2", "MMSCORE", "'31'"]),
        ("cdr", {"CDGLOBAL": "0.7"}, ["row 2", "CDGLOBAL", "'0.7'"]),
        ("cdr", {"CDGLOBAL": "\udce9"}, ["row 2", "CDGLOBAL", "UTF-8"]),
        ("mrimeta", {"EXAMDATE": "2009-13-01"}, ["row 2", "EXAMDATE", "'2009-13-01'"]),
    ],
)
def test_a_bad_cell_drops_its_visit_and_no_other(small, stem, cells, told):
    with open(table(small, stem), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0].update(cells)
    with open(table(small, stem), "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (small / "tables" / "AIBL_T1_11_20_2019.csv").unlink()
    release = read_release(small)
    (gone,) = release.dropped
    assert gone.scan.scan_id == "I100001" and len(release.rows) == 11
    assert all(word in gone.detail for word in [table(small, stem).name, *told]), gone.detail
    assert gone.detail in release.faults


def test_a_byte_order_mark_and_latin_1_in_an_unused_column_do_no_harm(small):
    path = table(small, "ptdemog")
    lines = path.read_bytes().split(b"\r\n")
    lines = [line + (b",PTCOUNTRY" if place == 0 else b",Caf\xe9") for place, line in enumerate(lines) if line]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    release = read_release(small)
    assert not release.faults and not release.dropped and {row["sex"] for row in release.rows} <= {"F", "M"}


def test_the_window_decides_how_far_a_visit_may_be(small):
    person = PEOPLE[0]
    no_mri_dates(small, person, "bl")
    (small / "tables" / "AIBL_T1_11_20_2019.csv").unlink()
    set_cell(small, "cdr", person, "bl", EXAMDATE=us(person.exams[0].date - datetime.timedelta(days=20)))
    gaps = {}
    for window in (20, 19):
        rows = {row["scan_id"]: row for row in read_release(small, window_days=window).rows}
        gaps[window] = rows["I100001"]["diagnosis_gap_days"]
    assert gaps == {20: -20, 19: None}


def test_one_scan_per_decides_how_many_are_kept(small):
    touch(small / image_path(2, PEOPLE[0].exams[0], 900001, "MPRAGE_ADNI_confirmed_RPT"))
    assert len(read_release(small, one_scan_per="all").rows) == 13
    assert [gone.scan.scan_id for gone in read_release(small).dropped] == ["I900001"]
    rows, dropped, _ = manifest(small, "--one-scan-per", "subject")
    assert sorted(rows) == ["I100001", "I100021", "I100041"] and len(dropped) == 10
