"""OASIS-1: what a release with every known trap becomes, and which altered tables are refused."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from csv_files import edit, read_rows

from sharding.cohorts import oasis1
from sharding.manifest import COLUMNS
from sharding.people import draw_volunteers, save_tiny
from sharding.release import write_release
from sharding.releases import oasis1 as writer

TABLE = Path("tables", "oasis_cross-sectional.csv")
ANOTHER_KIND, SAME_VISIT = "another kind of image", "another scan of the same visit was taken"
NO_ROW = "no row with this ID in oasis_cross-sectional.csv"


PEOPLE = draw_volunteers("OASIS1", 24, 2, seed=3)
FEW = PEOPLE[:6]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oasis1")
    writer.write(FEW, folder, save_tiny)
    return folder


@pytest.fixture
def release(clean, tmp_path) -> Path:
    """A clean release of six people, as downloaded, for a test to spoil."""
    return Path(shutil.copytree(clean, tmp_path, dirs_exist_ok=True))


def set_cell(session: str, column: str, value: str):
    def change(rows: list[dict]) -> None:
        next(row for row in rows if row["ID"] == session)[column] = value

    return change


def run(release: Path, **options) -> tuple[dict, dict]:
    """Rows and dropped scans by scan_id, as they were written."""
    out = release / "oasis1.csv"
    options = oasis1.Options(images=release / "images", tables=release / "tables", out=out, **options)
    dropped = write_release(oasis1.read(options), out)
    return by_scan(out), by_scan(dropped)


def by_scan(path: Path) -> dict[str, dict]:
    rows = read_rows(path)
    assert len({row["scan_id"] for row in rows}) == len(rows)
    return {row["scan_id"]: row for row in rows}


def put_pair(folder: Path, name: str, suffixes=(".hdr", ".img")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        (folder / f"{name}{suffix}").write_bytes(b"voxels")


def atlas_image(person, exam) -> str:
    return f"OAS1_{person.number + 1:04d}_MR{exam.number + 1}_mpr_n4_anon_111_t88_gfc"


def expected_row(person, exam) -> dict[str, str]:
    """The manifest's row of a clean session, from the person alone."""
    subject = f"OAS1_{person.number + 1:04d}"
    session = f"{subject}_MR{exam.number + 1}"
    years = person.education_years
    education = 1 if years < 12 else 2 if years == 12 else 3 if years < 16 else 4 if years == 16 else 5
    cdr = f"{exam.cdr_global:g}"
    diagnosis = {"0": "CN", "0.5": "MCI", "1": "AD", "2": "AD"}[cdr]
    row = dict.fromkeys([*COLUMNS, "delay_days", "education_code", "image_kind"], "")
    row |= {
        "scan_id": atlas_image(person, exam),
        "cohort": "OASIS1",
        "subject_id": subject,
        "session_id": session,
        "image": f"images/disc1/{session}/PROCESSED/MPRAGE/T88_111/{atlas_image(person, exam)}.hdr",
        "diagnosis": diagnosis,
        "diagnosis_source": f"CDR {cdr} -> {diagnosis}" + (" (--cdr05 mci)" if cdr == "0.5" else ""),
        "diagnosis_gap_days": "0",
        "age_years": str(int(exam.age_years)),
        "sex": person.sex,
        "mmse": str(exam.mmse),
        "cdr_global": cdr,
        "field_strength_t": "1.5",
        "education_code": str(education),
        "delay_days": "365" if exam.number else "",
        "image_kind": "t88_gfc",
    }
    return row


def expected_rows(people) -> dict[str, dict]:
    return {atlas_image(person, exam): expected_row(person, exam) for person in people for exam in person.exams}


def without(row: dict, reason: str) -> dict:
    """The row of a scan whose session is not in the table."""
    known = ("scan_id", "cohort", "subject_id", "session_id", "image", "field_strength_t", "image_kind")
    known += ("sex",)  # from the person's other session
    return dict.fromkeys(row, "") | {name: row[name] for name in known} | {"diagnosis_source": reason}


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    release, people = tmp_path, PEOPLE
    writer.write(people, release, save_tiny)
    expected = expected_rows(people)
    dropped: dict[str, tuple[str, str]] = {}
    disc, table = release / "images" / "disc1", release / TABLE
    sessions = {number: f"OAS1_{number + 1:04d}_MR1" for number in range(24)}
    lines = {row["ID"]: number for number, row in enumerate(read_rows(table), start=2)}

    def processed(number: int) -> Path:
        return disc / sessions[number] / "PROCESSED" / "MPRAGE"

    def remove_atlas(number: int, suffixes=(".hdr", ".img")) -> dict:
        for suffix in suffixes:
            (processed(number) / "T88_111" / f"{sessions[number]}_mpr_n4_anon_111_t88_gfc{suffix}").unlink()
        return expected.pop(f"{sessions[number]}_mpr_n4_anon_111_t88_gfc")

    # 0: everything that a session has; the atlas image is taken
    name = sessions[0]
    put_pair(processed(0) / "SUBJ_111", f"{name}_mpr_n4_anon_sbj_111")
    dropped[f"{name}_mpr_n4_anon_sbj_111"] = ANOTHER_KIND, f"{name}_mpr_n4_anon_111_t88_gfc was taken"
    for number in (1, 2, 3, 4):
        put_pair(disc / name / "RAW", f"{name}_mpr-{number}_anon", (".hdr", ".img", "_sag_66.gif"))
        dropped[f"{name}_mpr-{number}_anon"] = ANOTHER_KIND, f"{name}_mpr_n4_anon_111_t88_gfc was taken"
    put_pair(processed(0) / "T88_111", f"{name}_mpr_n4_anon_111_t88_masked_gfc")
    put_pair(disc / name / "FSL_SEG", f"{name}_mpr_n4_anon_111_t88_masked_gfc_fseg", (".hdr", ".img", ".txt", ".gif"))
    dropped[f"{name}_mpr_n4_anon_111_t88_masked_gfc"] = "a derived image", ""
    dropped[f"{name}_mpr_n4_anon_111_t88_masked_gfc_fseg"] = "a derived image", ""
    put_pair(processed(0) / "T88_111", f"._{name}_mpr_n4_anon_111_t88_gfc")  # what macOS leaves in archives

    # 1: no atlas image; 2: raw only, the first repeat is not there; 3: averages of three and of four
    row = remove_atlas(1)
    put_pair(processed(1) / "SUBJ_111", f"{sessions[1]}_mpr_n3_anon_sbj_111")
    put_pair(disc / sessions[1] / "RAW", f"{sessions[1]}_mpr-1_anon")
    taken = f"{sessions[1]}_mpr_n3_anon_sbj_111"
    image = f"images/disc1/{sessions[1]}/PROCESSED/MPRAGE/SUBJ_111/{taken}.hdr"
    expected[taken] = row | {"scan_id": taken, "image": image, "image_kind": "sbj_111"}
    dropped[f"{sessions[1]}_mpr-1_anon"] = ANOTHER_KIND, f"{taken} was taken"
    row = remove_atlas(2)
    for number in (2, 3, 4):
        put_pair(disc / sessions[2] / "RAW", f"{sessions[2]}_mpr-{number}_anon")
        dropped[f"{sessions[2]}_mpr-{number}_anon"] = SAME_VISIT, f"{sessions[2]}_mpr-2_anon"
    del dropped[f"{sessions[2]}_mpr-2_anon"]
    taken = f"{sessions[2]}_mpr-2_anon"
    image = f"images/disc1/{sessions[2]}/RAW/{taken}.hdr"
    expected[taken] = row | {"scan_id": taken, "image": image, "image_kind": "raw"}
    put_pair(processed(3) / "T88_111", f"{sessions[3]}_mpr_n3_anon_111_t88_gfc")
    dropped[f"{sessions[3]}_mpr_n3_anon_111_t88_gfc"] = SAME_VISIT, f"{sessions[3]}_mpr_n4_anon_111_t88_gfc"

    # 4, 5: half of a pair; 6: converted by someone; and an image of nobody
    remove_atlas(4, [".img"])
    dropped[f"{sessions[4]}_mpr_n4_anon_111_t88_gfc"] = "a header without its .img", ""
    remove_atlas(5, [".hdr"])
    dropped[f"{sessions[5]}_mpr_n4_anon_111_t88_gfc"] = "an .img without its .hdr", ""
    put_pair(processed(6) / "SUBJ_111", f"{sessions[6]}_mpr_n4_anon_sbj_111", [".nii.gz"])
    dropped[f"{sessions[6]}_mpr_n4_anon_sbj_111.nii"] = "not an Analyze pair, as the release has it", ""
    put_pair(disc, "711-2N_atlas")
    dropped["711-2N_atlas"] = "not a name of this release", ""

    # 7: not in the table, though its .txt is there; 8: young and not assessed; 9: CDR 3
    edit(table, lambda rows: [row for row in rows if row["ID"] != sessions[7]])
    scan = f"{sessions[7]}_mpr_n4_anon_111_t88_gfc"
    expected[scan] = without(expected[scan], NO_ROW)
    for column, value in {"CDR": "", "MMSE": "", "Educ": "", "SES": "", "Age": "23"}.items():
        edit(table, set_cell(sessions[8], column, value))
    expected[f"{sessions[8]}_mpr_n4_anon_111_t88_gfc"] |= {
        "diagnosis": "",
        "diagnosis_source": "CDR blank: not assessed",
        "diagnosis_gap_days": "",
        "cdr_global": "",
        "mmse": "",
        "education_code": "",
        "age_years": "23",
    }
    edit(table, set_cell(sessions[9], "CDR", "3"))
    decided = {"cdr_global": "3", "diagnosis": "AD", "diagnosis_source": "CDR 3 -> AD"}
    expected[f"{sessions[9]}_mpr_n4_anon_111_t88_gfc"] |= decided

    # 10: a row twice; 11: two rows that differ; 12, 13: cells that mean nothing; 14: two sexes for one person
    edit(table, lambda rows: [*rows, next(row for row in rows if row["ID"] == sessions[10])])
    other = next(row for row in read_rows(table) if row["ID"] == sessions[11]) | {"MMSE": "3"}
    edit(table, lambda rows: [*rows, other])
    edit(table, set_cell(sessions[12], "CDR", "0.7"))
    edit(table, set_cell(sessions[13], "Age", "seventy"))
    edit(table, set_cell(sessions[14], "M/F", "M" if people[14].sex == "F" else "F"))
    first = {number: f"{table} row {lines[sessions[number]] - 1}" for number in (11, 12, 13, 14)}  # row of 7 is gone
    last = len(read_rows(table)) + 1
    for number, detail in {
        11: f"{first[11]} and {table} row {last} contradict each other: mmse {people[11].exams[0].mmse} and 3",
        12: f"{first[12]}, column 'CDR': '0.7' is not one of 0, 0.5, 1, 2, 3",
        13: f"{first[13]}, column 'Age': 'seventy' is not a number within 0..120",
    }.items():
        scan = f"{sessions[number]}_mpr_n4_anon_111_t88_gfc"
        del expected[scan]
        dropped[scan] = "a table's cell cannot be used", detail.replace(f"mmse {people[11].exams[0].mmse} ", "mmse ")
    for exam in people[14].exams:
        del expected[atlas_image(people[14], exam)]
        dropped[atlas_image(people[14], exam)] = "a table's cell cannot be used", f"{first[14]} and {table} row"

    # 15: a second copy, from a disc that was unpacked twice
    put_pair(release / "images/disc1 (1)/disc1" / sessions[15], f"{sessions[15]}_mpr_n4_anon_111_t88_gfc")

    command = f"sharding.manifest oasis1 --images {release}/images --tables {release}/tables --out {release}/oasis1.csv"
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = by_scan(release / "oasis1.csv")
    assert rows.keys() == expected.keys()
    for scan, row in rows.items():
        assert row.pop("split") in ("train", "val", "test")
        del expected[scan]["split"]
        assert row == expected[scan]

    gone = read_rows(release / "oasis1.dropped.csv")
    copies = [row for row in gone if row["reason"] == "a second copy of the same image"]
    assert [row["session_id"] for row in copies] == [sessions[15]]
    assert "disc1 (1)" in copies[0]["image"] + copies[0]["detail"]
    gone = {row["scan_id"]: row for row in gone if row not in copies}
    assert {scan: row["reason"] for scan, row in gone.items()} == {scan: why for scan, (why, _) in dropped.items()}
    for scan, row in gone.items():
        detail = row["detail"].replace(f"mmse {people[11].exams[0].mmse}.0 and 3.0", "mmse and 3")
        assert dropped[scan][1] in detail, scan
    found = len(rows) + len(gone) + len(copies)
    assert f"{found} scans found = {len(rows)} kept + {found - len(rows)} dropped" in done.stderr


def test_a_clean_release_becomes_its_people(release):
    rows, dropped = run(release)
    assert dropped == {}
    assert rows == expected_rows(FEW)


ALTERED = {
    "the ids' column was renamed": lambda text: text.replace("ID,M/F", "Subject,M/F"),
    "no CDR": lambda text: text.replace(",CDR,", ",Rating,"),
    "semicolons": lambda text: text.replace(",", ";"),
    "empty": lambda text: "",
    "no header": lambda text: text.split("\n", 1)[1],
    "a column twice": lambda text: text.replace(",SES,", ",Educ,"),
    "ids of another kind": lambda text: text.replace("OAS1_0004_MR1", "4"),
    "nWBV lost its decimals": lambda text: text.replace(",0.7", ",7"),
    "nWBV was rounded": lambda text: text.replace(",0.781,", ",1,").replace(",0.752,", ",1,").replace(",0.719,", ",1,"),
    "Delay was filled": lambda text: text.replace("N/A", "0"),
    "Delay was blanked": lambda text: text.replace("N/A", ""),
    "Delay was overwritten": lambda text: text.replace(",365", ",N/A"),
}
SAID = {
    "the ids' column was renamed": "no column 'ID'",
    "no CDR": "no column 'CDR'",
    "semicolons": "columns must be separated by ','",
    "empty": "the file is empty",
    "no header": "no column 'ID'",
    "a column twice": "column 'Educ' appears twice",
    "ids of another kind": "row 8, column 'ID': '4' is not a session such as OAS1_0001_MR1; this copy was altered",
    "nWBV lost its decimals": "row 2, column 'nWBV': '7",
    "nWBV was rounded": "row 2, column 'nWBV': '1' is not a fraction between 0 and 1; this copy was altered",
    "Delay was filled": "row 2, column 'Delay': '0' is not N/A, as in every row of a first session; this copy was",
    "Delay was blanked": "row 2, column 'Delay': '' is not N/A, as in every row of a first session; this copy was",
    "Delay was overwritten": "row 3, column 'Delay': 'N/A' is not the days since the first session; this copy was",
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_table_is_refused_by_file_row_and_column(release, how):
    table = release / TABLE
    table.write_text(ALTERED[how](table.read_text().replace("\r\n", "\n")))
    with pytest.raises(ValueError, match="oasis_cross-sectional.csv") as refusal:
        run(release)
    assert SAID[how] in str(refusal.value)


def test_a_missing_table_is_named(release):
    (release / TABLE).unlink()
    with pytest.raises(ValueError, match="no table named oasis_cross-sectional"):
        run(release)


@pytest.mark.parametrize(
    ("column", "value"),
    [("CDR", "0.25"), ("CDR", "?"), ("M/F", "X"), ("Age", "740"), ("Educ", "6"), ("MMSE", "31"), ("MMSE", "2,9")],
)
def test_a_cell_that_means_nothing_drops_its_session_and_no_other(release, column, value):
    edit(release / TABLE, set_cell("OAS1_0002_MR1", column, value))
    rows, dropped = run(release)
    assert len(rows) == 11
    (gone,) = dropped.values()
    assert (gone["session_id"], gone["reason"]) == ("OAS1_0002_MR1", "a table's cell cannot be used")
    assert f"{release / TABLE} row 4, column {column!r}: {value!r} is not" in gone["detail"]


def test_a_byte_order_mark_is_no_part_of_a_name_and_latin_1_is_named_where_it_is_used(release):
    table = release / TABLE
    before = run(release)
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert run(release) == before
    table.write_bytes(table.read_bytes()[3:])
    edit(table, set_cell("OAS1_0003_MR1", "Hand", "droiti\u00e8re"))
    edit(table, set_cell("OAS1_0002_MR1", "CDR", "z\u00e9ro"))
    table.write_bytes(table.read_text().encode("latin-1"))
    _, dropped = run(release)
    (gone,) = dropped.values()
    assert gone["session_id"] == "OAS1_0002_MR1"
    assert "row 4, column 'CDR'" in gone["detail"] and "UTF-8" in gone["detail"]


def test_the_sites_spreadsheet_gives_the_same_rows(release):
    openpyxl = pytest.importorskip("openpyxl")
    before = run(release)
    book = openpyxl.Workbook()
    for row in csv.reader((release / TABLE).read_text().splitlines()):
        book.active.append([float(cell) if cell.replace(".", "").isdigit() else cell or None for cell in row])
    book.save(release / "tables" / "oasis_cross-sectional-5708aa0a98d82080.xlsx")
    (release / TABLE).unlink()
    assert run(release) == before


@pytest.mark.parametrize("policy", ["mci", "ad", "drop"])
def test_cdr_05_is_what_the_policy_says_and_the_manifest_tells(release, policy):
    rows, dropped = run(release, cdr05=policy)
    mild = {atlas_image(person, exam) for person in FEW for exam in person.exams if exam.cdr_global == 0.5}
    assert len(mild) == 4
    if policy == "drop":
        assert {scan: gone["reason"] for scan, gone in dropped.items()} == dict.fromkeys(mild, "CDR 0.5 (--cdr05 drop)")
        assert not mild & rows.keys()
    else:
        decided = {(rows[scan]["diagnosis"], rows[scan]["diagnosis_source"]) for scan in mild}
        assert decided == {(policy.upper(), f"CDR 0.5 -> {policy.upper()} (--cdr05 {policy})")}
        assert dropped == {}


def test_a_sex_that_one_session_lacks_is_known_from_the_other(release):
    before = run(release)
    edit(release / TABLE, set_cell("OAS1_0001_MR1", "M/F", ""))
    assert run(release) == before


def test_young_people_without_a_cdr_become_cn_only_if_asked(release):
    for session, age in {"OAS1_0001_MR1": "59", "OAS1_0002_MR1": "60", "OAS1_0003_MR1": ""}.items():
        edit(release / TABLE, set_cell(session, "CDR", ""))
        edit(release / TABLE, set_cell(session, "Age", age))
    sessions = [f"OAS1_000{number}_MR1_mpr_n4_anon_111_t88_gfc" for number in (1, 2, 3)]
    rows, _ = run(release)
    assert [rows[scan]["diagnosis"] for scan in sessions] == ["", "", ""]
    rows, _ = run(release, young_controls_as_cn=True)
    assert [rows[scan]["diagnosis"] for scan in sessions] == ["CN", "", ""]
    assert rows[sessions[0]]["diagnosis_source"] == "CDR blank, under 60 -> CN (--young-controls-as-cn)"
    assert rows[sessions[0]]["cdr_global"] == ""


@pytest.mark.parametrize("kind", ["first", "t88_gfc", "sbj_111", "raw"])
def test_the_kind_of_image_that_is_asked_for_is_taken(release, kind):
    folder = release / "images" / "disc1" / "OAS1_0001_MR1"
    put_pair(folder / "PROCESSED" / "MPRAGE" / "SUBJ_111", "OAS1_0001_MR1_mpr_n4_anon_sbj_111")
    put_pair(folder / "RAW", "OAS1_0001_MR1_mpr-1_anon")
    put_pair(folder / "RAW", "OAS1_0001_MR1_mpr-2_anon")
    rows, dropped = run(release, image_kind=kind)
    first = {"first": "mpr_n4_anon_111_t88_gfc", "t88_gfc": "mpr_n4_anon_111_t88_gfc"}
    first |= {"sbj_111": "mpr_n4_anon_sbj_111", "raw": "mpr-1_anon"}
    assert [scan for scan in rows if "OAS1_0001_MR1" in scan] == [f"OAS1_0001_MR1_{first[kind]}"]
    assert len(rows) == (12 if kind in ("first", "t88_gfc") else 1)
    assert len(rows) + len(dropped) == 15
    everything, _ = run(release, image_kind=kind, one_scan_per="all")
    assert len(everything) == len(rows) + (kind == "raw")


def test_one_scan_per_subject_is_the_first_with_a_diagnosis(release):
    edit(release / TABLE, set_cell("OAS1_0002_MR1", "CDR", ""))
    command = f"sharding.manifest oasis1 --images {release} --out {release}/one.csv --one-scan-per subject"
    subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, check=True, capture_output=True)
    sessions = [row["session_id"] for row in read_rows(release / "one.csv")]
    assert sessions == [f"OAS1_{number:04d}_MR{2 if number == 2 else 1}" for number in range(1, 7)]


def test_a_table_with_the_counts_of_the_official_one_gives_these_counts(tmp_path):
    """436 sessions of 416 people: CDR 0, 0.5, 1, 2 in 135, 70, 28, 2; the other 201 are under 60."""
    assessed = ["0"] * 135 + ["0.5"] * 70 + ["1"] * 28 + ["2"] * 2
    rows = [[f"OAS1_{n:04d}_MR1", "F", "R", 60 + n % 37, 1 + n % 5, 2, 28, cdr, 1480, 0.8, 1.2, "N/A"]
            for n, cdr in enumerate(assessed, start=1)]  # fmt: skip
    rows += [[f"OAS1_{n:04d}_MR1", "M", "R", 18 + n % 42, "", "", "", "", 1480, 0.85, 1.2, "N/A"]
             for n in range(236, 417)]  # fmt: skip
    rows += [[f"OAS1_{n:04d}_MR2", "M", "R", 18 + n % 42, "", "", "", "", 1480, 0.85, 1.2, 1 + n % 90]
             for n in range(236, 256)]  # fmt: skip
    (tmp_path / "tables").mkdir()
    with open(tmp_path / TABLE, "w", newline="") as file:
        csv.writer(file).writerows([writer.HEADER, *rows])
    for session, *_ in rows:
        put_pair(tmp_path / "images" / "disc1" / session / "RAW", f"{session}_mpr-1_anon")
    kept, dropped = run(tmp_path)
    assert (len(kept), len({row["subject_id"] for row in kept.values()}), dropped) == (436, 416, {})
    cdr = [row["cdr_global"] for row in kept.values()]
    assert [cdr.count(value) for value in ("0", "0.5", "1", "2", "")] == [135, 70, 28, 2, 201]
    diagnoses = [row["diagnosis"] for row in kept.values()]
    assert [diagnoses.count(value) for value in ("CN", "MCI", "AD", "")] == [135, 70, 30, 201]
    assert all(float(row["age_years"]) < 60 for row in kept.values() if not row["cdr_global"])
    assert all(row["education_years"] == "" for row in kept.values())
