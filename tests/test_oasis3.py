"""OASIS-3: what a release with every known trap becomes, in the new tables and in the older ones."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from csv_files import read_rows

from sharding.cohorts import oasis3
from sharding.manifest import COLUMNS
from sharding.people import draw_volunteers, save_tiny
from sharding.release import write_release
from sharding.releases import oasis3 as writer

DEMOGRAPHICS = writer.table_path("OASIS3_demographics")
B4 = writer.table_path("OASIS3_UDSb4_cdr")
D1 = writer.table_path("OASIS3_UDSd1_diagnoses")
SAME_VISIT = "another scan of the same visit was taken"
UNUSABLE = "a table's cell cannot be used"
ANOTHER = "another diagnosis than CN, MCI or AD"
BEYOND = "no visit within 180 days"
PEOPLE = draw_volunteers("OASIS3", 30, 2, seed=3)
FEW = PEOPLE[:6]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oasis3")
    writer.write(FEW, folder, save_tiny)
    return folder


@pytest.fixture
def release(clean, tmp_path) -> Path:
    """A clean release of six people, as downloaded, for a test to spoil."""
    return Path(shutil.copytree(clean, tmp_path, dirs_exist_ok=True))


def write_rows(path: Path, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def is_of(row: dict, subject: str, day: int | None) -> bool:
    return row["OASISID"] == subject and (day is None or row["days_to_visit"] == str(day))


def set_cells(table: Path, subject: str, day: int | None, **cells: str) -> None:
    """Changes the row of a subject, and of a day where a table has days."""
    rows = read_rows(table)
    row = next(row for row in rows if is_of(row, subject, day))
    row |= cells
    write_rows(table, rows)


def remove(table: Path, subject: str, day: int | None = None) -> None:
    rows = read_rows(table)
    keep = [row for row in rows if not is_of(row, subject, day)]
    assert len(keep) < len(rows)
    write_rows(table, keep)


def line_of(table: Path, subject: str, day: int | None = None) -> str:
    """FILE row N, of the first such row."""
    lines = (number for number, row in enumerate(read_rows(table), start=2) if is_of(row, subject, day))
    return f"{table} row {next(lines)}"


def run(release: Path, **options) -> tuple[dict, dict]:
    """Rows and dropped scans by scan_id, as they were written."""
    out = release / "oasis3.csv"
    options = oasis3.Options(images=release / "images", tables=release / "tables", out=out, **options)
    dropped = write_release(oasis3.read(options), out)
    return by_scan(out), by_scan(dropped)


def by_scan(path: Path) -> dict[str, dict]:
    rows = read_rows(path)
    assert len({row["scan_id"] for row in rows}) == len(rows)
    return {row["scan_id"]: row for row in rows}


def subject_of(number: int) -> str:
    return f"OAS3{number + 1:04d}"


def scan_of(number: int, exam: int = 0) -> str:
    return f"sub-{subject_of(number)}_ses-d{(14, 379)[exam]:04d}_T1w"


def two_places(years: float) -> str:
    """As the manifest writes years."""
    return f"{years:g}" if years == round(years, 4) else f"{years:.2f}"


def expected_row(person, exam) -> dict[str, str]:
    """The manifest's row of a clean scan, from the person alone: two weeks after its visit."""
    subject, day = f"OAS3{person.number + 1:04d}", 365 * exam.number + 14
    scan, session = f"sub-{subject}_ses-d{day:04d}_T1w", f"{subject}_MR_d{day:04d}"
    entry = round(person.exams[0].age_years, 2)
    said = {"CN": "NORMCOG 1", "MCI": "MCIAMEM 1", "AD": "DEMENTED 1, PROBAD 1"}[exam.diagnosis]
    return dict.fromkeys(COLUMNS, "") | {
        "scan_id": scan,
        "cohort": "OASIS3",
        "subject_id": subject,
        "session_id": session,
        "image": f"images/{session}/anat1/{scan}.nii.gz",
        "diagnosis": exam.diagnosis,
        "diagnosis_source": f"UDSd1 {said}",
        "diagnosis_gap_days": "-14",
        "age_years": two_places(min(entry + day / 365.25, 90)),
        "age_at_entry_years": two_places(entry),
        "sex": person.sex,
        "education_years": str(person.education_years),
        "apoe_e4": str(person.apoe.count(4)),
        "mmse": str(exam.mmse),
        "cdr_global": f"{exam.cdr_global:g}",
        "cdr_sb": f"{exam.cdr_sb:g}",
        "field_strength_t": "3",
    }


def expected_rows(people) -> dict[str, dict]:
    rows = [expected_row(person, exam) for person in people for exam in person.exams]
    return {row["scan_id"]: row for row in rows}


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"voxels")


NO_VISIT = dict.fromkeys(("diagnosis", "diagnosis_gap_days", "mmse", "cdr_global", "cdr_sb"), "")


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    writer.write(PEOPLE, tmp_path, save_tiny)
    expected = expected_rows(PEOPLE)
    dropped: dict[str, tuple[str, str]] = {}
    images, demographics, b4, d1 = tmp_path / "images", tmp_path / DEMOGRAPHICS, tmp_path / B4, tmp_path / D1

    def session(number: int, day: str = "d0014") -> Path:
        return images / f"{subject_of(number)}_MR_{day}"

    def move(number: int, new: str, field: str = "3") -> None:
        """The first scan of a person to another place, with its sidecar."""
        old = session(number) / "anat1" / f"{scan_of(number)}.nii.gz"
        target = images / new
        target.parent.mkdir(parents=True, exist_ok=True)
        old.rename(target)
        sidecar = old.with_name(old.name.replace(".nii.gz", ".json"))
        sidecar.rename(target.with_name(target.name.replace(".nii.gz", ".json")))
        name = target.name.removesuffix(".nii.gz")
        row = expected.pop(scan_of(number))
        expected[name] = row | {"scan_id": name, "image": f"images/{new}", "field_strength_t": field}

    # 0: two runs and everything that is no T1; 1: only run 2; 2: echoes
    name = f"sub-{subject_of(0)}_ses-d0014"
    move(0, f"{subject_of(0)}_MR_d0014/anat2/{name}_run-01_T1w.nii.gz")
    touch(session(0) / "anat3" / f"{name}_run-02_T1w.nii.gz")
    dropped[f"{name}_run-02_T1w"] = SAME_VISIT, f"{name}_run-01_T1w"
    for rest, folder in {
        "T2w": "anat4",
        "acq-TSE_T2w": "anat5",
        "FLAIR": "anat6",
        "task-rest_run-01_bold": "func1",
    }.items():
        touch(session(0) / folder / f"{name}_{rest}.nii.gz")
        touch(session(0) / folder / f"{name}_{rest}.json")
        dropped[f"{name}_{rest}"] = "not T1-weighted", rest.split("_")[-1]
    for acquisition in ("acq-TSE", "acq-hippocampus"):
        touch(session(0) / "anat7" / f"{name}_{acquisition}_T1w.nii.gz")
        dropped[f"{name}_{acquisition}_T1w"] = "not a T1 of the whole head", acquisition
    touch(images / f"{subject_of(0)}_AV45_PETs_d0020" / "pet1" / f"sub-{subject_of(0)}_ses-d0020_acq-AV45_pet.nii.gz")
    dropped[f"sub-{subject_of(0)}_ses-d0020_acq-AV45_pet"] = "not T1-weighted", "pet"
    move(1, f"{subject_of(1)}_MR_d0014/anat3/sub-{subject_of(1)}_ses-d0014_run-02_T1w.nii.gz")
    name = f"sub-{subject_of(2)}_ses-d0014"
    move(2, f"{subject_of(2)}_MR_d0014/anat1/{name}_echo-1_T1w.nii.gz")
    touch(session(2) / "anat1" / f"{name}_echo-2_T1w.nii.gz")
    dropped[f"{name}_echo-2_T1w"] = SAME_VISIT, f"{name}_echo-1_T1w"

    # 3: XNAT's folders, the sidecar in another; 4: BIDS and NIFTI; 5: `sess`; 6: a day of five digits
    name = scan_of(3)
    move(3, f"{subject_of(3)}_MR_d0014/scans/anat1/resources/NIFTI/files/{name}.nii.gz")
    resources = session(3) / "scans" / "anat1" / "resources"
    (resources / "BIDS" / "files").mkdir(parents=True)
    (resources / "NIFTI" / "files" / f"{name}.json").rename(resources / "BIDS" / "files" / f"{name}.json")
    name = scan_of(4)
    move(4, f"{subject_of(4)}_MR_d0014/anat1/NIFTI/{name}.nii.gz", field="1.5")
    (session(4) / "anat1" / "BIDS").mkdir()
    (session(4) / "anat1" / "NIFTI" / f"{name}.json").unlink()
    (session(4) / "anat1" / "BIDS" / f"{name}.json").write_text(json.dumps({"MagneticFieldStrength": 1.494}))
    move(5, f"{subject_of(5)}_MR_d0014/anat1/sub-{subject_of(5)}_sess-d0014_T1w.nii.gz")
    name = f"sub-{subject_of(6)}_ses-d10020_T1w"
    move(6, f"{subject_of(6)}_MR_d10020/anat1/{name}.nii.gz")
    expected[name] |= NO_VISIT | {"session_id": f"{subject_of(6)}_MR_d10020", "diagnosis_source": BEYOND}
    expected[name]["age_years"] = two_places(min(round(PEOPLE[6].exams[0].age_years, 2) + 10020 / 365.25, 90))

    # 7: a copy; 8: a name of another session than its folder's; 9: no name at all; 10, 11: sidecars
    touch(images / "again" / f"{subject_of(7)}_MR_d0014" / "anat1" / f"{scan_of(7)}.nii.gz")
    other = f"sub-{subject_of(8)}_ses-d0379_run-02_T1w"
    touch(session(8) / "anat1" / f"{other}.nii.gz")
    dropped[other] = "its name and its folder are of two sessions", f"{subject_of(8)}_MR_d0014"
    touch(session(9) / "anat1" / "T1.nii")
    dropped["T1"] = "not a name of this release", "a scan is named like sub-OAS30001_ses-d0757_T1w"
    (session(10) / "anat1" / f"{scan_of(10)}.json").write_text('{"MagneticFieldStrength": 2.89362}')
    (session(11) / "anat1" / f"{scan_of(11)}.json").write_text("<html>")
    expected[scan_of(11)]["field_strength_t"] = ""

    # 12: a visit 181 days off; 13: 180 days off; 14: equally far before and after: the earlier; 15: negative days
    for number, day in {12: 195, 13: 194}.items():
        for table in (b4, d1):
            set_cells(table, subject_of(number), 0, days_to_visit=str(day))
            remove(table, subject_of(number), 365)
        del expected[scan_of(number, 1)]
        shutil.rmtree(session(number, "d0379"))
    expected[scan_of(12)] |= NO_VISIT | {"diagnosis_source": BEYOND}
    expected[scan_of(13)] |= {"diagnosis_gap_days": "180"}
    for table in (b4, d1):
        set_cells(table, subject_of(14), 365, days_to_visit="28")
        set_cells(table, subject_of(15), 0, days_to_visit="-30")
    expected[scan_of(14)] |= {"diagnosis_gap_days": "-14"}
    row = expected[scan_of(14, 1)]
    row |= NO_VISIT | {"diagnosis_source": BEYOND}
    expected[scan_of(15)] |= {"diagnosis_gap_days": "-44"}

    # 16: two states; 17: dementia without Alzheimer's; 18: impaired, not MCI; 19: alzdis of version 3; 20: possible AD
    clear = dict.fromkeys("NORMCOG DEMENTED MCIAMEM MCIAPLUS MCINON1 MCINON2 IMPNOMCI PROBAD POSSAD".split(), "0")
    set_cells(d1, subject_of(16), 0, **clear | {"NORMCOG": "1", "MCINON2": "1"})
    both = {"diagnosis": "", "diagnosis_gap_days": ""}
    both["diagnosis_source"] = "UDSd1 NORMCOG 1, MCINON2 1: more than one state, no diagnosis"
    expected[scan_of(16)] |= both
    set_cells(d1, subject_of(17), 0, **clear | {"DEMENTED": "1", "DLB": "1"})
    dropped[scan_of(17)] = ANOTHER, "UDSd1 DEMENTED 1"
    set_cells(d1, subject_of(18), 0, **clear | {"IMPNOMCI": "1"})
    dropped[scan_of(18)] = ANOTHER, "UDSd1 IMPNOMCI 1"
    set_cells(d1, subject_of(19), 0, **clear | {"DEMENTED": "1", "PROBAD": ".", "POSSAD": ".", "alzdis": "1"})
    expected[scan_of(19)] |= {"diagnosis": "AD", "diagnosis_source": "UDSd1 DEMENTED 1, alzdis 1"}
    set_cells(d1, subject_of(20), 0, **clear | {"DEMENTED": "1", "POSSAD": "1"})
    expected[scan_of(20)] |= {"diagnosis": "AD", "diagnosis_source": "UDSd1 DEMENTED 1, POSSAD 1"}

    # 21-26: form D1 is not there or says nothing, so dx1 decides
    remove(d1, subject_of(21), 0)
    set_cells(b4, subject_of(21), 0, dx1="AD dem w/depresss")
    expected[scan_of(21)] |= {"diagnosis": "AD", "diagnosis_source": "UDSb4 dx1 'AD dem w/depresss'"}
    set_cells(d1, subject_of(22), 0, **dict.fromkeys(clear, "."))
    set_cells(b4, subject_of(22), 0, dx1="No dementia")
    expected[scan_of(22)] |= {"diagnosis": "CN", "diagnosis_source": "UDSb4 dx1 'No dementia'"}
    for number, text in {23: "uncertain dementia", 24: "DLBD"}.items():
        remove(d1, subject_of(number), 0)
        set_cells(b4, subject_of(number), 0, dx1=text)
        dropped[scan_of(number)] = ANOTHER, f"UDSb4 dx1 {text!r}"
    remove(d1, subject_of(25), 0)
    set_cells(b4, subject_of(25), 0, dx1=".", MMSE=".", CDRTOT="", CDRSUM=".")
    expected[scan_of(25)] |= NO_VISIT | {"diagnosis_source": "UDSb4 dx1 missing"}
    remove(b4, subject_of(26), 0)  # the other form alone
    expected[scan_of(26)] |= dict.fromkeys(("mmse", "cdr_global", "cdr_sb"), "")

    # 27: no demographics, and its rows say nothing of the person; 28: cells that mean nothing; 29: people and days
    remove(demographics, subject_of(27))
    blank = dict.fromkeys(("sex", "education_years", "apoe_e4", "age_years", "age_at_entry_years"), "")
    for exam in (0, 1):
        expected[scan_of(27, exam)] |= blank
    set_cells(d1, subject_of(28), 0, NORMCOG="7")
    dropped[scan_of(28)] = UNUSABLE, f"{line_of(d1, subject_of(28), 0)}, column 'NORMCOG': '7' is not one of 0, 1"
    set_cells(b4, subject_of(28), 365, MMSE="77")
    bad = f"{line_of(b4, subject_of(28), 365)}, column 'MMSE': '77' is not a whole number within 0..30"
    dropped[scan_of(28, 1)] = UNUSABLE, bad
    where = line_of(b4, subject_of(29), 365)
    set_cells(b4, subject_of(29), 365, days_to_visit="01/02/2010")
    for exam in (0, 1):
        said = f"{where}, column 'days_to_visit': '01/02/2010' is not a number of days since entry"
        dropped[scan_of(29, exam)] = UNUSABLE, said
    # and at 90, ages stop
    set_cells(demographics, subject_of(26), None, AgeatEntry="89.9", APOE=".", EDUC="")
    for exam, age in enumerate(("89.94", "90")):
        known = {"age_years": age, "age_at_entry_years": "89.9", "apoe_e4": "", "education_years": ""}
        expected[scan_of(26, exam)] |= known
    for scan in dropped.keys() & expected.keys():
        del expected[scan]

    command = f"sharding.manifest oasis3 --images {images} --tables {tmp_path}/tables --out {tmp_path}/m.csv"
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
    assert [row["session_id"] for row in copies] == [f"{subject_of(7)}_MR_d0014"]
    gone = {row["scan_id"]: row for row in gone if row not in copies}
    assert {scan: row["reason"] for scan, row in gone.items()} == {scan: why for scan, (why, _) in dropped.items()}
    for scan, row in gone.items():
        assert row["detail"].startswith(dropped[scan][1]), scan
    found = len(rows) + len(gone) + 1
    assert f"{found} scans found = {len(rows)} kept + {len(gone) + 1} dropped" in done.stderr
    assert f"{scan_of(11)}.json: no field strength can be read" in done.stderr


def test_a_clean_release_becomes_its_people(release):
    assert run(release) == (expected_rows(FEW), {})


def write_older_tables(release: Path, with_subjects: bool) -> None:
    """The three tables of 2019-22 in place of the new ones, of the same people."""
    shutil.rmtree(release / "tables")
    (release / "tables").mkdir()
    clinical, subjects, sessions = [], [], []
    for person in FEW:
        subject, entry = f"OAS3{person.number + 1:04d}", round(person.exams[0].age_years, 2)
        subjects.append({"Subject": subject, "M/F": person.sex, "Hand": "R", "Education": person.education_years})
        for exam in person.exams:
            day = 365 * exam.number
            text = {"CN": "Cognitively normal", "MCI": "0.5 in memory only", "AD": "AD Dementia"}[exam.diagnosis]
            row = {"ADRC_ADRCCLINICALDATA ID": f"{subject}_ClinicalData_d{day:04d}", "Subject": subject, "Date": ""}
            row |= {"Age": "", "mmse": exam.mmse, "ageAtEntry": entry, "cdr": exam.cdr_global, "commun": 0, "dx1": text}
            clinical.append(
                row | {"dx2": ".", "memory": 0, "apoe": "".join(map(str, person.apoe)), "sumbox": exam.cdr_sb}
            )
            mri = {"MR ID": f"{subject}_MR_d{day + 14:04d}", "Subject": subject, "M/F": person.sex, "Age": 70}
            sessions.append(mri | {"Scanner": "3.0T", "Scans": "T1w(1)"})
    write_rows(release / "tables" / "ADRC Clinical Data.csv", clinical)
    write_rows(release / "tables" / "MR Sessions.csv", sessions)
    if with_subjects:
        write_rows(release / "tables" / "subjects.csv", subjects)


@pytest.mark.parametrize("with_subjects", [True, False])
def test_the_older_tables_give_the_same_people_by_dx1(release, with_subjects):
    write_older_tables(release, with_subjects)
    rows, dropped = run(release, uncertain_as_mci=True)
    assert dropped == {}
    sources = {
        "CN": "ADRC Clinical Data dx1 'Cognitively normal'",
        "MCI": "ADRC Clinical Data dx1 '0.5 in memory only' -> MCI (--uncertain-as-mci)",
        "AD": "ADRC Clinical Data dx1 'AD Dementia'",
    }
    expected = expected_rows(FEW)
    for row in expected.values():
        row["diagnosis_source"] = sources[row["diagnosis"]]
        row["education_years"] = row["education_years"] if with_subjects else ""
    assert rows == expected


def test_a_day_on_which_no_form_says_a_diagnosis_gives_none_and_says_so(release):
    states = [column for columns in oasis3.STATES.values() for column in columns]
    set_cells(release / D1, subject_of(0), 0, **dict.fromkeys(states, "0"))
    remove(release / B4, subject_of(0), 0)
    row = run(release)[0][scan_of(0)]
    assert (row["diagnosis"], row["diagnosis_gap_days"]) == ("", "")
    assert row["diagnosis_source"] == "UDSd1 says nothing, no dx1 of that day"


def test_two_spellings_of_a_day_are_one_visit(release):
    scan = f"sub-{subject_of(0)}_sess-d14_run-02_T1w"
    touch(release / "images" / f"{subject_of(0)}_MR_d0014" / "anat2" / f"{scan}.nii.gz")
    rows, dropped = run(release)
    assert (len(rows), dropped[scan]["reason"]) == (12, SAME_VISIT)


def test_the_uncertain_are_mci_only_if_asked(release):
    for number, text in enumerate(("uncertain dementia", "Unc: ques. Impairment", "0.5 in memory only")):
        remove(release / D1, subject_of(number), 0)
        set_cells(release / B4, subject_of(number), 0, dx1=text)
    rows, dropped = run(release)
    assert list(dropped) == [scan_of(0), scan_of(1), scan_of(2)]
    assert {gone["reason"] for gone in dropped.values()} == {ANOTHER}
    assert dropped[scan_of(0)]["detail"] == "UDSb4 dx1 'uncertain dementia' (not --uncertain-as-mci)"
    rows, dropped = run(release, uncertain_as_mci=True)
    assert dropped == {}
    assert {rows[scan_of(number)]["diagnosis"] for number in (0, 1, 2)} == {"MCI"}
    assert rows[scan_of(2)]["diagnosis_source"] == "UDSb4 dx1 '0.5 in memory only' -> MCI (--uncertain-as-mci)"


def test_the_window_is_what_is_asked_for(release):
    rows, _ = run(release, window_days=13)
    assert {row["diagnosis"] for row in rows.values()} == {""}
    assert {row["diagnosis_source"] for row in rows.values()} == {"no visit within 13 days"}
    rows, _ = run(release, window_days=14)
    assert all(row["diagnosis"] for row in rows.values())


def test_a_subject_without_visits_is_kept_and_said(release):
    for table in (B4, D1):
        remove(release / table, subject_of(0))
    rows, _ = run(release)
    assert rows[scan_of(0)]["diagnosis"] == ""
    assert rows[scan_of(0)]["diagnosis_source"] == "no visit of this subject in the tables"
    assert rows[scan_of(0)]["age_years"] == expected_rows(FEW)[scan_of(0)]["age_years"]


def test_one_scan_per_all_keeps_every_run(release):
    folder = release / "images" / f"{subject_of(0)}_MR_d0014" / "anat2"
    touch(folder / f"sub-{subject_of(0)}_ses-d0014_run-02_T1w.nii.gz")
    assert len(run(release)[0]) == 12
    assert len(run(release, one_scan_per="all")[0]) == 13


ALTERED = {
    "a day's name": (B4, "days_to_visit", "day", "no column 'days_to_visit'"),
    "no CDR": (B4, "CDRTOT", "cdr", "no column 'CDRTOT'"),
    "an id's name": (DEMOGRAPHICS, "OASISID", "ID", "no column 'OASISID'"),
    "no PROBAD": (D1, "PROBAD,", "PROBABLE,", "no column 'PROBAD'"),
    "no alzdis": (D1, "alzdis,", "alz,", "no column 'alzdis'"),
    "semicolons": (D1, ",", ";", "columns must be separated by ','"),
}


@pytest.mark.parametrize("how", ALTERED)
def test_a_table_without_a_column_is_refused_by_name(release, how):
    table, old, new, said = ALTERED[how]
    path = release / table
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=table.name) as refusal:
        run(release)
    assert said in str(refusal.value)


@pytest.mark.parametrize("table", [DEMOGRAPHICS, B4, D1], ids=lambda table: table.stem)
def test_an_empty_or_missing_table_is_refused_and_a_dated_one_is_found(release, table):
    path, before = release / table, run(release)
    path.rename(path.with_name(f"{path.stem}_21Aug2025.csv"))
    assert run(release) == before
    path.write_text("")
    with pytest.raises(ValueError, match="2 tables are named"):
        run(release)
    path.with_name(f"{path.stem}_21Aug2025.csv").unlink()
    with pytest.raises(ValueError, match=f"{table.name}: the file is empty"):
        run(release)
    path.unlink()
    with pytest.raises(ValueError, match=f"no table named {table.stem}"):
        run(release)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        (B4, "CDRTOT", "0.7"),
        (B4, "CDRSUM", "19"),
        (B4, "MMSE", "good"),
        (B4, "dx1", "d\udce9mence"),
        (D1, "MCIAPLUS", "yes"),
        (D1, "DEMENTED", "2"),
        (DEMOGRAPHICS, "GENDER", "3"),
        (DEMOGRAPHICS, "APOE", "35"),
        (DEMOGRAPHICS, "AgeatEntry", "730"),
        (DEMOGRAPHICS, "EDUC", "88"),
    ],
)
def test_a_cell_that_means_nothing_drops_what_hangs_on_it_and_no_other(release, table, column, value):
    path = release / table
    set_cells(path, subject_of(1), None if table is DEMOGRAPHICS else 0, **{column: "REPLACED"})
    where = line_of(path, subject_of(1), None if table is DEMOGRAPHICS else 0)
    path.write_bytes(path.read_bytes().replace(b"REPLACED", value.encode("utf-8", "surrogateescape")))
    _, dropped = run(release)
    scans = [scan_of(1), scan_of(1, 1)] if table is DEMOGRAPHICS else [scan_of(1)]
    assert list(dropped) == scans
    for gone in dropped.values():
        assert gone["reason"] == UNUSABLE
        assert gone["detail"].startswith(f"{where}, column {column!r}: ")


@pytest.mark.parametrize(
    ("table", "column", "value"), [(B4, "MMSE", "3"), (D1, "IMPNOMCI", "1"), (DEMOGRAPHICS, "EDUC", "3")]
)
def test_two_rows_for_one_key_are_one_if_they_agree_and_a_fault_if_not(release, table, column, value):
    path, before = release / table, run(release)
    rows = read_rows(path)
    row = next(row for row in rows if row["OASISID"] == subject_of(1))
    write_rows(path, [*rows, row])
    assert run(release) == before
    write_rows(path, [*rows, row | {column: value}])
    _, dropped = run(release)
    assert scan_of(1) in dropped
    for gone in dropped.values():
        assert gone["subject_id"] == subject_of(1)
        assert gone["detail"].startswith(f"{line_of(path, subject_of(1))} and {path} row {len(rows) + 2} contradict")


def test_a_byte_order_mark_is_no_part_of_a_name(release):
    before = run(release)
    for table in (DEMOGRAPHICS, B4, D1):
        (release / table).write_bytes(b"\xef\xbb\xbf" + (release / table).read_bytes())
    assert run(release) == before
