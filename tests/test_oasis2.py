"""OASIS-2: what a release with every known trap becomes, and which altered tables are refused."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from csv_files import edit, read_rows

from sharding.cohorts import oasis2
from sharding.manifest import COLUMNS
from sharding.people import draw_volunteers, save_tiny
from sharding.release import write_release
from sharding.releases import oasis2 as writer

TABLE = Path("tables", "oasis_longitudinal.csv")
SAME_VISIT = "another scan of the same visit was taken"
UNUSABLE = "a table's cell cannot be used"
NO_ROW = "no row with this MRI ID in oasis_longitudinal.csv"
PEOPLE = draw_volunteers("OASIS2", 22, 2, seed=3)
FEW = PEOPLE[:6]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oasis2")
    writer.write(FEW, folder, save_tiny)
    return folder


@pytest.fixture
def release(clean, tmp_path) -> Path:
    """A clean release of six people, as downloaded, for a test to spoil."""
    return Path(shutil.copytree(clean, tmp_path, dirs_exist_ok=True))


def set_cells(session: str, **cells: str):
    """A change of one row's cells; `MRI_ID` is the column `MRI ID`."""

    def change(rows: list[dict]) -> None:
        row = next(row for row in rows if row["MRI ID"] == session)
        row |= {name.replace("_", " "): value for name, value in cells.items()}

    return change


def run(release: Path, **options) -> tuple[dict, dict]:
    """Rows and dropped scans by scan_id, as they were written."""
    out = release / "oasis2.csv"
    options = oasis2.Options(images=release / "images", tables=release / "tables", out=out, **options)
    dropped = write_release(oasis2.read(options), out)
    return by_scan(out), by_scan(dropped)


def by_scan(path: Path) -> dict[str, dict]:
    rows = read_rows(path)
    assert len({row["scan_id"] for row in rows}) == len(rows)
    return {row["scan_id"]: row for row in rows}


def put_pair(folder: Path, name: str, suffixes=(".hdr", ".img")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        (folder / f"{name}{suffix}").write_bytes(b"voxels")


def expected_row(person, exam) -> dict[str, str]:
    """The manifest's row of a clean session, from the person alone."""
    subject = f"OAS2_{person.number + 1:04d}"
    session = f"{subject}_MR{exam.number + 1}"
    cdr = f"{exam.cdr_global:g}"
    diagnosis = {"0": "CN", "0.5": "MCI", "1": "AD", "2": "AD"}[cdr]
    return dict.fromkeys(COLUMNS, "") | {
        "scan_id": f"{session}_mpr-1",
        "cohort": "OASIS2",
        "subject_id": subject,
        "session_id": session,
        "image": f"images/OAS2_RAW_PART1/{session}/RAW/mpr-1.nifti.hdr",
        "diagnosis": diagnosis,
        "diagnosis_source": f"CDR {cdr} -> {diagnosis}" + (" (--cdr05 mci)" if cdr == "0.5" else ""),
        "diagnosis_gap_days": "0",
        "age_years": str(int(exam.age_years)),
        "sex": person.sex,
        "education_years": str(person.education_years),
        "mmse": str(exam.mmse),
        "cdr_global": cdr,
        "field_strength_t": "1.5",
        "delay_days": str(365 * exam.number),
        "group": "Nondemented" if exam.diagnosis == "CN" else "Demented",
        "visit": str(exam.number + 1),
    }


def expected_rows(people) -> dict[str, dict]:
    rows = [expected_row(person, exam) for person in people for exam in person.exams]
    return {row["scan_id"]: row for row in rows}


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    writer.write(PEOPLE, tmp_path, save_tiny)
    expected = expected_rows(PEOPLE)
    dropped: dict[str, tuple[str, str]] = {}
    part, table = tmp_path / "images" / "OAS2_RAW_PART1", tmp_path / TABLE
    sessions = {number: f"OAS2_{number + 1:04d}_MR1" for number in range(22)}
    lines = {row["MRI ID"]: number for number, row in enumerate(read_rows(table), start=2)}

    # 0: four repeats and a stray double of the first; 1: the first repeat is not there
    for number in (2, 3, 4):
        put_pair(part / sessions[0] / "RAW", f"mpr-{number}.nifti")
        dropped[f"{sessions[0]}_mpr-{number}"] = SAME_VISIT, f"{sessions[0]}_mpr-1"
    put_pair(part / sessions[0] / "RAW", "3906-3.nifti", [".img"])
    dropped["3906-3.nifti"] = "not a name of this release", "a scan is named like mpr-1.nifti.hdr"
    for suffix in (".hdr", ".img"):
        (part / sessions[1] / "RAW" / f"mpr-1.nifti{suffix}").rename(
            part / sessions[1] / "RAW" / f"mpr-3.nifti{suffix}"
        )
    expected[f"{sessions[1]}_mpr-3"] = expected.pop(f"{sessions[1]}_mpr-1") | {
        "scan_id": f"{sessions[1]}_mpr-3",
        "image": f"images/OAS2_RAW_PART1/{sessions[1]}/RAW/mpr-3.nifti.hdr",
    }

    # 2: the first repeat lost its header, the second is whole; 3: its header only; and an image of nobody
    (part / sessions[2] / "RAW" / "mpr-1.nifti.hdr").unlink()
    put_pair(part / sessions[2] / "RAW", "mpr-2.nifti")
    dropped[f"{sessions[2]}_mpr-1"] = "an .img without its .hdr", ""
    expected[f"{sessions[2]}_mpr-2"] = expected.pop(f"{sessions[2]}_mpr-1") | {
        "scan_id": f"{sessions[2]}_mpr-2",
        "image": f"images/OAS2_RAW_PART1/{sessions[2]}/RAW/mpr-2.nifti.hdr",
    }
    (part / sessions[3] / "RAW" / "mpr-1.nifti.img").unlink()
    dropped[f"{sessions[3]}_mpr-1"] = "a header without its .img", ""
    del expected[f"{sessions[3]}_mpr-1"]
    put_pair(part, "mpr-1.nifti")
    dropped["mpr-1.nifti"] = "not in the folder of a session", "a folder is named like OAS2_0001_MR1"

    # 4: a folder in a folder of the same name; 5: a part that was unpacked twice
    inner = part / "OAS2_RAW_PART1" / sessions[4]
    inner.parent.mkdir()
    (part / sessions[4]).rename(inner)
    expected[f"{sessions[4]}_mpr-1"]["image"] = (
        f"images/OAS2_RAW_PART1/OAS2_RAW_PART1/{sessions[4]}/RAW/mpr-1.nifti.hdr"
    )
    shutil.copytree(part / sessions[5], part / "OAS2_RAW_PART1" / sessions[5])

    # 6: the second session is MR3, and a scan of MR2 has no row; its Visit would have fitted
    edit(table, set_cells("OAS2_0007_MR2", MRI_ID="OAS2_0007_MR3"))
    row = expected.pop("OAS2_0007_MR2_mpr-1")
    known = ("scan_id", "cohort", "subject_id", "session_id", "image", "field_strength_t", "sex", "education_years")
    blank = dict.fromkeys(row, "") | {name: row[name] for name in known}
    expected["OAS2_0007_MR2_mpr-1"] = blank | {"diagnosis_source": NO_ROW}
    put_pair(part / "OAS2_0007_MR3" / "RAW", "mpr-1.nifti")
    expected["OAS2_0007_MR3_mpr-1"] = row | {
        "scan_id": "OAS2_0007_MR3_mpr-1",
        "session_id": "OAS2_0007_MR3",
        "image": "images/OAS2_RAW_PART1/OAS2_0007_MR3/RAW/mpr-1.nifti.hdr",
    }

    # 7: Converted, CN at first; 8: Nondemented with CDR 0.5; 9: no MMSE; 10: CDR not assessed
    normal = {"cdr_global": "0", "diagnosis": "CN", "diagnosis_source": "CDR 0 -> CN", "group": "Converted"}
    mild = {"cdr_global": "0.5", "diagnosis": "MCI", "diagnosis_source": "CDR 0.5 -> MCI (--cdr05 mci)"}
    edit(table, set_cells("OAS2_0008_MR1", Group="Converted", CDR="0"))
    edit(table, set_cells("OAS2_0008_MR2", Group="Converted", CDR="0.5"))
    expected["OAS2_0008_MR1_mpr-1"] |= normal
    expected["OAS2_0008_MR2_mpr-1"] |= mild | {"group": "Converted"}
    edit(table, set_cells("OAS2_0009_MR2", Group="Nondemented", CDR="0.5"))
    expected["OAS2_0009_MR2_mpr-1"] |= mild | {"group": "Nondemented"}
    edit(table, set_cells("OAS2_0010_MR2", MMSE="", SES=""))
    expected["OAS2_0010_MR2_mpr-1"] |= {"mmse": ""}
    edit(table, set_cells("OAS2_0011_MR2", CDR=""))
    undecided = {"diagnosis": "", "diagnosis_gap_days": "", "diagnosis_source": "CDR blank: not assessed"}
    expected["OAS2_0011_MR2_mpr-1"] |= undecided | {"cdr_global": ""}

    # 11: a row twice; 12: two rows that differ; 13: a cell that means nothing; 14: two lengths of education
    edit(table, lambda rows: [*rows, next(row for row in rows if row["MRI ID"] == sessions[11])])
    other = next(row for row in read_rows(table) if row["MRI ID"] == sessions[12]) | {"CDR": "3"}
    edit(table, lambda rows: [*rows, other])
    edit(table, set_cells(sessions[13], Age="O8"))
    edit(table, set_cells("OAS2_0015_MR2", EDUC="23"))
    where = {number: f"{table} row {lines[sessions[number]]}" for number in (12, 13, 14)}
    last = len(read_rows(table)) + 1
    dropped[f"{sessions[12]}_mpr-1"] = UNUSABLE, f"{where[12]} and {table} row {last} contradict each other: cdr_global"
    dropped[f"{sessions[13]}_mpr-1"] = UNUSABLE, f"{where[13]}, column 'Age': 'O8' is not a number within 0..120"
    for session in ("OAS2_0015_MR1", "OAS2_0015_MR2"):
        next_line = lines["OAS2_0015_MR2"]
        dropped[f"{session}_mpr-1"] = (
            UNUSABLE,
            (
                f"{where[14]} and {table} row {next_line} contradict each other: "
                f"education_years {PEOPLE[14].education_years}.0 and 23.0"
            ),
        )
        del expected[f"{session}_mpr-1"]
    del expected[f"{sessions[12]}_mpr-1"], expected[f"{sessions[13]}_mpr-1"]

    command = f"sharding.manifest oasis2 --images {tmp_path}/images --tables {tmp_path}/tables --out {tmp_path}/m.csv"
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = by_scan(tmp_path / "m.csv")
    assert rows.keys() == expected.keys()
    for scan, row in rows.items():
        assert row.pop("split") in ("train", "val", "test")
        del expected[scan]["split"]
        assert row == expected[scan]

    gone = read_rows(tmp_path / "m.dropped.csv")
    copies = [row for row in gone if row["reason"] == "a second copy of the same image"]
    assert [row["session_id"] for row in copies] == [sessions[5]]
    gone = {row["scan_id"]: row for row in gone if row not in copies}
    assert {scan: row["reason"] for scan, row in gone.items()} == {scan: why for scan, (why, _) in dropped.items()}
    for scan, row in gone.items():
        assert row["detail"].startswith(dropped[scan][1]), scan
    found = len(rows) + len(gone) + 1
    assert f"{found} scans found = {len(rows)} kept + {len(gone) + 1} dropped" in done.stderr


def test_a_clean_release_becomes_its_people(release):
    assert run(release) == (expected_rows(FEW), {})


def test_known_copies_are_read_alike(release):
    """Gender in place of M/F, a byte order mark, a spreadsheet."""
    table = release / TABLE
    before, text = run(release), table.read_text()
    table.write_text(text.replace("M/F", "Gender"))
    assert run(release) == before
    table.write_text(text, encoding="utf-8-sig")
    assert run(release) == before

    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in csv.reader(text.splitlines()):
        book.active.append([float(cell) if cell.replace(".", "").isdigit() else cell or None for cell in row])
    table.unlink()
    book.save(table.with_name("oasis_longitudinal_demographics-8d83e569fa2e2d30.xlsx"))
    assert run(release) == before


def test_the_group_decides_nothing(release):
    rows, _ = run(release)
    edit(release / TABLE, lambda rows: [row | {"Group": "Demented"} for row in rows])
    again, _ = run(release)
    assert {row["group"] for row in again.values()} == {"Demented"}
    assert [row | {"group": ""} for row in again.values()] == [row | {"group": ""} for row in rows.values()]


ALTERED = {
    "no MRI ID": (("MRI ID", "Session"), "no column 'MRI ID'"),
    "no Subject ID": (("Subject ID", "Subject"), "no column 'Subject ID' (is it 'Subject'?)"),
    "no EDUC": (("EDUC", "Years"), "no column 'EDUC'"),
    "semicolons": ((",", ";"), "columns must be separated by ','"),
    "sessions of another kind": (("OAS2_0002_MR1", "2_1"), "row 4, column 'MRI ID': '2_1' is not a session such as"),
    "ids of another kind": (
        ("OAS2_0002,", "2,"),
        "row 4, column 'Subject ID': '2' is not the subject of OAS2_0002_MR1",
    ),
    "nWBV lost its decimals": ((",0.7", ",7"), "row 2, column 'nWBV': '7"),
    "Delay was blanked": ((",365,", ",,"), "row 3, column 'MR Delay': '' is not the days since the first session"),
    "Delay was zeroed": ((",365,", ",0,"), "row 3, column 'MR Delay': '0' is not the days since the first session"),
    "Delay was filled": ((",1,0,", ",1,N/A,"), "row 2, column 'MR Delay': 'N/A' is not the days since the first"),
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_table_is_refused_by_file_row_and_column(release, how):
    (old, new), said = ALTERED[how]
    table = release / TABLE
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match="oasis_longitudinal.csv") as refusal:
        run(release)
    assert said in str(refusal.value)


def test_an_empty_or_missing_table_is_named(release):
    (release / TABLE).write_text("")
    with pytest.raises(ValueError, match="oasis_longitudinal.csv: the file is empty"):
        run(release)
    (release / TABLE).unlink()
    with pytest.raises(ValueError, match="no table named oasis_longitudinal_demographics or oasis_longitudinal"):
        run(release)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("CDR", "0.25"),
        ("CDR", "?"),
        ("M/F", "X"),
        ("Age", "740"),
        ("EDUC", "99"),
        ("MMSE", "-4"),
        ("MMSE", "na\udce9f"),
    ],
)
def test_a_cell_that_means_nothing_drops_its_session_and_no_other(release, column, value):
    table = release / TABLE
    edit(table, set_cells("OAS2_0002_MR1", **{column: "REPLACED"}))
    table.write_bytes(table.read_bytes().replace(b"REPLACED", value.encode("utf-8", "surrogateescape")))
    rows, dropped = run(release)
    assert len(rows) == 11
    (gone,) = dropped.values()
    assert (gone["session_id"], gone["reason"]) == ("OAS2_0002_MR1", UNUSABLE)
    assert f"{table} row 4, column {column!r}: " in gone["detail"]


@pytest.mark.parametrize("policy", ["mci", "ad", "drop"])
def test_cdr_05_is_what_the_policy_says_and_the_manifest_tells(release, policy):
    rows, dropped = run(release, cdr05=policy)
    mild = {scan for scan, row in expected_rows(FEW).items() if row["cdr_global"] == "0.5"}
    assert len(mild) == 4
    if policy == "drop":
        assert {scan: gone["reason"] for scan, gone in dropped.items()} == dict.fromkeys(mild, "CDR 0.5 (--cdr05 drop)")
    else:
        decided = {(rows[scan]["diagnosis"], rows[scan]["diagnosis_source"]) for scan in mild}
        assert decided == {(policy.upper(), f"CDR 0.5 -> {policy.upper()} (--cdr05 {policy})")}


def test_one_scan_per_all_keeps_the_repeats(release):
    for number in (2, 3):
        put_pair(release / "images" / "OAS2_RAW_PART1" / "OAS2_0001_MR1" / "RAW", f"mpr-{number}.nifti")
    rows, dropped = run(release, one_scan_per="all")
    assert (len(rows), dropped) == (14, {})
    rows, dropped = run(release)
    assert (len(rows), list(dropped)) == (12, ["OAS2_0001_MR1_mpr-2", "OAS2_0001_MR1_mpr-3"])


def test_a_table_with_the_counts_of_the_official_one_gives_these_counts(tmp_path):
    """373 sessions of 150 people, CDR 0, 0.5, 1, 2 in 206, 123, 41, 3; two rows have no MMSE; MR numbers have gaps."""
    sessions = [(subject, visit) for subject in range(1, 151) for visit in (1, 2)]
    sessions = sorted(sessions + [(subject, 3) for subject in range(1, 74)])
    cdr = ["0"] * 206 + ["0.5"] * 123 + ["1"] * 41 + ["2"] * 3
    rows = []
    for (subject, visit), rating in zip(sessions, cdr, strict=True):
        session = f"OAS2_{subject:04d}_MR{visit + (subject == 18 and visit > 1)}"
        mmse = "" if (subject, visit) in ((60, 2), (60, 3)) else 27
        # what the release calls a person says nothing of the row's CDR
        group = ("Nondemented", "Demented", "Converted")[subject % 3]
        delay = 400 * (visit - 1)
        cells = [session[:9], session, group, visit, delay, "F", "R", 70 + visit, 12, 2, mmse, rating, 1480, 0.73, 1.2]
        rows.append(cells)
        put_pair(tmp_path / "images" / session / "RAW", "mpr-1.nifti")
    (tmp_path / "tables").mkdir()
    with open(tmp_path / TABLE, "w", newline="") as file:
        csv.writer(file).writerows([writer.HEADER, *rows])
    kept, dropped = run(tmp_path)
    assert (len(kept), len({row["subject_id"] for row in kept.values()}), dropped) == (373, 150, {})
    found = [row["cdr_global"] for row in kept.values()]
    assert [found.count(value) for value in ("0", "0.5", "1", "2", "")] == [206, 123, 41, 3, 0]
    diagnoses = [row["diagnosis"] for row in kept.values()]
    assert [diagnoses.count(value) for value in ("CN", "MCI", "AD", "")] == [206, 123, 44, 0]
    assert sum(row["mmse"] == "" for row in kept.values()) == 2
    assert [scan for scan in kept if scan.startswith("OAS2_0018")] == [f"OAS2_0018_MR{n}_mpr-1" for n in (1, 3, 4)]
