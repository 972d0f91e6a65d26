"""MIRIAD: from its download to rows and dropped scans, trap by trap."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from csv_files import edit

from sharding.cohorts import miriad
from sharding.people import draw_volunteers, save_tiny
from sharding.releases.miriad import write

EVERYONE = draw_volunteers("MIRIAD", 33, 3, seed=1)
PEOPLE = [person for person in EVERYONE if person.exams[0].diagnosis != "MCI"]
VISITS = (1, 7, 9)  # weeks 0, 52 and 104


def number_of(person) -> int:
    return 188 + person.number


def name_of(person, visit: int, scan: int = 1) -> str:
    group = {"CN": "HC", "AD": "AD"}[person.exams[0].diagnosis]
    return f"miriad_{number_of(person)}_{group}_{person.sex}_{visit:02d}_MR_{scan}"


def place_of(person, name: str) -> Path:
    return Path("images", f"miriad_{number_of(person)}", name, f"{name}.nii")


def add_scan(folder: Path, person, visit: int, scan: int = 1) -> str:
    """An empty file with the name of a scan; returns its scan_id."""
    name = name_of(person, visit, scan)
    path = folder / place_of(person, name)
    path.parent.mkdir(parents=True)
    path.touch()
    return name


def set_cell(folder: Path, table: str, label: str, **cells) -> None:
    """Sets cells of the row with a label (or, in subjects.csv, a subject)."""

    def change(rows):
        found = [row for row in rows if label == (row.get("Label") or row.get("MR ID") or row["Subject"])]
        assert len(found) == 1
        found[0].update({name.replace("M_F", "M/F"): str(value) for name, value in cells.items()})

    edit(folder / "tables" / f"{table}.csv", change)


def add_row(folder: Path, table: str, **cells) -> None:
    cells = {{"MR_ID": "MR ID", "M_F": "M/F"}.get(name, name): value for name, value in cells.items()}
    edit(folder / "tables" / f"{table}.csv", lambda rows: [*rows, cells])


def clean_row(person, visit: int, age: str, mmse: str, scan: int = 1, weeks_before: str = "0") -> dict[str, str]:
    name = name_of(person, visit, scan)
    group = name.split("_")[2]
    return {
        "scan_id": name,
        "cohort": "MIRIAD",
        "subject_id": f"miriad_{number_of(person)}",
        "session_id": f"{visit:02d}",
        "image": str(place_of(person, name)),
        "diagnosis": {"AD": "AD", "HC": "CN"}[group],
        "diagnosis_source": f"file name {group}",
        "diagnosis_gap_days": "0",
        "age_years": age,
        "sex": person.sex,
        "education_years": "",
        "apoe_e4": "",
        "mmse": mmse,
        "moca": "",
        "cdr_global": "",
        "cdr_sb": "",
        "field_strength_t": "1.5",
        "acquired": "",
        "split": "test",
        "report": "",
        "group": group,
        "mmse_weeks_before": weeks_before,
        "week": {1: "0", 2: "2", 3: "6", 4: "14", 5: "26", 6: "38", 7: "52", 8: "78", 9: "104"}.get(visit, ""),
    }


def clean_rows(people) -> dict[str, dict[str, str]]:
    """The rows that a release without any trap must give."""
    return {
        name_of(person, visit): clean_row(person, visit, f"{exam.age_years:g}", str(exam.mmse))
        for person in people
        for visit, exam in zip(VISITS, person.exams, strict=True)
    }


def manifest(folder: Path, *flags: str) -> tuple[dict, dict, str]:
    """The command's rows and dropped scans by scan_id, and its log."""
    command = f"-m sharding.manifest miriad --images {folder}/images --tables {folder}/tables --out {folder}/m.csv"
    done = subprocess.run([sys.executable, *command.split(), *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = []
    for name in ("m.csv", "m.dropped.csv"):
        with open(folder / name, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append({row["scan_id"]: row for row in rows})
        assert len(tables[-1]) == len(rows)
    return *tables, done.stderr


def read_release(folder: Path, **flags):
    return miriad.read(
        miriad.Options(images=folder / "images", tables=folder / "tables", out=folder / "x.csv", **flags)
    )


@pytest.fixture
def small(tmp_path) -> Path:
    """A release of two people without traps, three visits each."""
    write(PEOPLE[:2], tmp_path, save_tiny)
    return tmp_path


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    write(EVERYONE, tmp_path, save_tiny)
    assert len(PEOPLE) >= 20
    rows, dropped = clean_rows(PEOPLE), {}
    bad_cell = "a table's cell cannot be used"

    def label(person, visit: int, kind: str) -> str:
        return f"miriad_{number_of(person)}_{visit}_{kind}"

    def drop(scan_id: str, reason: str, *told: str) -> None:
        rows.pop(scan_id, None)
        dropped[scan_id] = reason, told

    def drop_person(person, *told: str) -> None:
        for visit in VISITS:
            drop(name_of(person, visit), bad_cell, *told)

    # MMSE: the visit's, else the last before it within 183 days, never a later one.
    a, b, c, d = PEOPLE[:4]
    for visit, mmse, before in ((2, a.exams[0].mmse, "2"), (5, a.exams[0].mmse, "26")):  # 26 weeks are 182 days
        name = add_scan(tmp_path, a, visit)
        rows[name] = clean_row(a, visit, "", str(mmse), weeks_before=before)
    name = add_scan(tmp_path, a, 6)  # week 38
    rows[name] = clean_row(a, 6, "", "", weeks_before="")
    set_cell(tmp_path, "clinical", label(b, 1, "MMSE"), MMSE="")
    rows[name_of(b, 1)] |= {"mmse": "", "mmse_weeks_before": ""}
    add_row(tmp_path, "clinical", id="E1", Label=label(b, 6, "MMSE"), Subject=f"miriad_{number_of(b)}", MMSE=11)
    set_cell(tmp_path, "clinical", label(b, 7, "MMSE"), MMSE="")
    rows[name_of(b, 7)] |= {"mmse": "11", "mmse_weeks_before": "14"}
    name = add_scan(tmp_path, c, 10)  # a visit that the schedule does not have
    rows[name] = clean_row(c, 10, "", "", weeks_before="")
    name = add_scan(tmp_path, d, 11)
    add_row(tmp_path, "clinical", id="E2", Label=label(d, 11, "MMSE"), Subject=f"miriad_{number_of(d)}", MMSE=12)
    rows[name] = clean_row(d, 11, "", "12")

    # Rows: twice the same, contradicting, another test, a label or a value that means nothing.
    e, f, g, h, i = PEOPLE[4:9]
    edit(tmp_path / "tables" / "clinical.csv", lambda rows: [*rows, dict(rows[0])])
    add_row(tmp_path, "clinical", id="E3", Label=label(e, 1, "CDR"), Subject=f"miriad_{number_of(e)}", MMSE="")
    add_row(
        tmp_path, "clinical", id="E4", Label=label(f, 7, "MMSE"), Subject=f"miriad_{number_of(f)}", MMSE=1,
        Gender={"F": "female", "M": "male"}[f.sex],
    )  # fmt: skip
    drop(name_of(f, 7), bad_cell, "clinical.csv row ", "mmse", "and 1")
    set_cell(tmp_path, "clinical", label(g, 9, "MMSE"), MMSE=31)
    drop(name_of(g, 9), bad_cell, "clinical.csv row ", "MMSE", "'31'")
    set_cell(tmp_path, "mr_sessions", label(h, 1, "MR_1"), Age="seventy")
    drop(name_of(h, 1), bad_cell, "mr_sessions.csv row ", "Age", "'seventy'")
    set_cell(tmp_path, "mr_sessions", label(i, 7, "MR_1"), Subject="miriad_1")
    drop(name_of(i, 7), bad_cell, "mr_sessions.csv row ", "Subject", "'miriad_1'")

    # Sex and group of a table, or of another file, that contradict the file name.
    j, k, m, n = PEOPLE[9:13]
    set_cell(tmp_path, "mr_sessions", label(j, 7, "MR_1"), M_F={"F": "M", "M": "F"}[j.sex])
    drop_person(j, "mr_sessions.csv row ", "sex")
    set_cell(tmp_path, "clinical", label(k, 1, "MMSE"), Gender={"F": "male", "M": "female"}[k.sex])
    drop_person(k, "clinical.csv row ", "sex")
    group = {"CN": "AD", "AD": "HC"}[m.exams[0].diagnosis]
    set_cell(tmp_path, "subjects", f"miriad_{number_of(m)}", Group=group)
    drop_person(m, "subjects.csv row ", f"Group {group}")
    other_sex = name_of(n, 2).replace(f"_{n.sex}_", {"F": "_M_", "M": "_F_"}[n.sex])
    path = tmp_path / place_of(n, other_sex)
    path.parent.mkdir(parents=True)
    path.touch()
    drop_person(n, "name another sex or group")
    drop(other_sex, bad_cell, "name another sex or group")

    # Images: the second scan of a day, a copy, other names.
    p, q, r = PEOPLE[13:16]
    second = add_scan(tmp_path, p, 1, scan=2)
    drop(second, "another scan of the same visit was taken", name_of(p, 1))
    only_second = add_scan(tmp_path, q, 3, scan=2)
    add_row(
        tmp_path, "mr_sessions", MR_ID=label(q, 3, "MR_2"), Subject=f"miriad_{number_of(q)}", M_F=q.sex, Age="70.25"
    )
    rows[only_second] = clean_row(q, 3, "70.25", str(q.exams[0].mmse), scan=2, weeks_before="6")
    mask = tmp_path / "images" / f"{name_of(r, 1)}_mask.nii"
    mask.touch()
    drop(f"{name_of(r, 1)}_mask", "not a name of MIRIAD", "expected miriad_199_HC_F_01_MR_1.nii")
    (mask.parent / "preview.gif").touch()

    found_rows, found_dropped, log = manifest(tmp_path)
    assert found_rows.keys() == rows.keys()
    for scan_id, row in rows.items():
        assert found_rows[scan_id] == row
    assert {scan_id: gone["reason"] for scan_id, gone in found_dropped.items()} == {
        scan_id: reason for scan_id, (reason, _) in dropped.items()
    }
    for scan_id, (_, told) in dropped.items():
        assert all(word in found_dropped[scan_id]["detail"] for word in told), found_dropped[scan_id]["detail"]
    assert f"{len(rows) + len(dropped)} scans found = {len(rows)} kept + {len(dropped)} dropped" in log


def test_the_diagnosis_is_the_file_names_and_needs_no_table(small):
    for path in (small / "tables").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="there is no CSV"):
        read_release(small)
    rows = read_release(small, without_tables=True).rows
    assert {(row["scan_id"], row["diagnosis"], row["sex"]) for row in rows} == {
        (name_of(person, visit), person.exams[0].diagnosis, person.sex) for person in PEOPLE[:2] for visit in VISITS
    }
    assert all(row["age_years"] is None and row["mmse"] is None for row in rows)


def test_a_copy_as_nii_gz_is_one_scan(small):
    path = small / place_of(PEOPLE[0], name_of(PEOPLE[0], 1))
    path.with_suffix(".nii.gz").touch()
    (gone,) = read_release(small).dropped
    assert (gone.scan.image, gone.detail) == (path.with_suffix(".nii.gz"), str(path))


def test_tables_are_told_apart_by_their_header_whatever_their_name(small):
    for place, path in enumerate(sorted((small / "tables").iterdir())):
        text = path.read_text(encoding="utf-8").replace("MR ID", "Label")
        path.with_name(f"someone_{place}.csv").write_text("\ufeff" + text, encoding="utf-8")
        path.unlink()
    (small / "tables" / "notes.csv").write_text("when,what\n2020,downloaded\n")
    assert manifest(small)[0] == clean_rows(PEOPLE[:2])


@pytest.mark.parametrize(
    ("table", "spoil", "told"),
    [
        ("clinical", lambda text: text.replace("MMSE", "MMS", 1), ["Label, Subject, MMSE", "clinical.csv: id,Label"]),
        ("mr_sessions", lambda text: text.replace("MR ID", "Session", 1), ["Label (or MR ID)", "mr_sessions.csv: Ses"]),
        ("clinical", lambda text: text.replace("Subject", "Person", 1), ["clinical.csv", "'Subject'"]),
        ("clinical", lambda text: text.replace(",", ";"), ["Label, Subject, MMSE", "clinical.csv: id;Label"]),
        ("mr_sessions", lambda text: "", ["Label (or MR ID)", "mr_sessions.csv: empty"]),
        ("mr_sessions", lambda text: text.replace("Project", "Age", 1), ["mr_sessions.csv", "'Age' appears twice"]),
    ],
)
def test_a_table_that_is_not_what_it_should_be_is_refused_by_name(small, table, spoil, told):
    path = small / "tables" / f"{table}.csv"
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        read_release(small)
    assert all(word in str(refused.value) for word in told), refused.value


@pytest.mark.parametrize(
    ("table", "label", "cells", "told"),
    [
        ("clinical", "MMSE", {"MMSE": "-4"}, ["MMSE", "'-4'"]),
        ("clinical", "MMSE", {"MMSE": "12.5"}, ["MMSE", "'12.5'"]),
        ("clinical", "MMSE", {"Gender": "?"}, ["sex", "'?'"]),
        ("clinical", "MMSE", {"MMSE": "\udce9"}, ["MMSE", "UTF-8"]),
        ("mr_sessions", "MR_1", {"Age": "7"}, ["Age", "'7'"]),
    ],
)
def test_a_bad_cell_drops_its_visit_and_no_other(small, table, label, cells, told):
    number = number_of(PEOPLE[1])
    set_cell(small, table, f"miriad_{number}_9_{label}", **cells)
    release = read_release(small)
    (gone,) = release.dropped
    assert gone.scan.scan_id == name_of(PEOPLE[1], 9) and len(release.rows) == 5
    assert all(word in gone.detail for word in [f"{table}.csv row 7", *told]), gone.detail
    assert gone.detail in release.faults


def test_a_label_that_cannot_be_read_is_told(small):
    set_cell(small, "clinical", f"miriad_{number_of(PEOPLE[0])}_1_MMSE", Label="miriad_x_MMSE")
    release = read_release(small)
    assert len(release.faults) == 1 and "'miriad_x_MMSE'" in release.faults[0] and len(release.rows) == 6


@pytest.mark.parametrize(("days", "expected"), [(183, "mmse"), (182, "mmse"), (181, None), (0, None)])
def test_the_window_of_the_mmse(small, days, expected):
    person = PEOPLE[0]
    name = add_scan(small, person, 5)
    row = next(row for row in read_release(small, mmse_window_days=days).rows if row["scan_id"] == name)
    assert row["mmse"] == (person.exams[0].mmse if expected else None)


def test_one_scan_per_decides_how_many_are_kept(small):
    second = add_scan(small, PEOPLE[0], 7, scan=2)
    assert len(read_release(small, one_scan_per="all").rows) == 7
    assert [gone.scan.scan_id for gone in read_release(small).dropped] == [second]
    rows, dropped, _ = manifest(small, "--one-scan-per", "subject")
    assert sorted(rows) == sorted(name_of(person, 1) for person in PEOPLE[:2]) and len(dropped) == 5
