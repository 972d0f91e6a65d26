"""BIDS: Clinica's output and plain folders, to rows and dropped scans, trap by trap."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sharding.cohorts import bids
from sharding.people import draw_volunteers, save_tiny
from sharding.releases.bids import session_id, subject_id, write, write_tsv

PEOPLE = draw_volunteers("ADNI", 25, 3, seed=1)


def name_of(person, exam) -> str:
    return f"{subject_id(person)}_{session_id(exam)}_T1w"


def place_of(person, exam, name: str = "") -> str:
    return f"{subject_id(person)}/{session_id(exam)}/anat/{name or name_of(person, exam)}.nii.gz"


def sessions_of(person) -> str:
    return f"{subject_id(person)}/{subject_id(person)}_sessions.tsv"


def edit(path: Path, change) -> None:
    """Rewrites a table; `change` gets its rows and returns them (or None, if it changed them in place)."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    rows = change(rows) or rows
    write_tsv(path, [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)])


def set_session(folder: Path, person, number: int, **cells) -> None:
    edit(folder / sessions_of(person), lambda rows: rows[number].update(cells))


def set_participant(folder: Path, person, **cells) -> None:
    edit(folder / "participants.tsv", lambda rows: rows[person.number].update(cells))


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def clean_rows(people) -> dict[str, dict[str, str]]:
    """The rows that a folder without any trap must give."""
    rows = {}
    for person in people:
        for exam in person.exams:
            rows[name_of(person, exam)] = {
                "scan_id": name_of(person, exam),
                "cohort": "ADNI",
                "subject_id": subject_id(person),
                "session_id": session_id(exam),
                "image": place_of(person, exam),
                "diagnosis": exam.diagnosis,
                "diagnosis_source": f"sessions.tsv diagnosis {exam.diagnosis}",
                "diagnosis_gap_days": "0",
                "age_years": f"{exam.age_years:g}",
                "sex": person.sex,
                "education_years": str(person.education_years),
                "apoe_e4": str(person.apoe.count(4)),
                "mmse": str(exam.mmse),
                "moca": str(exam.moca),
                "cdr_global": f"{exam.cdr_global:g}",
                "cdr_sb": f"{exam.cdr_sb:g}",
                "field_strength_t": "",
                "acquired": str(exam.date),
                "report": "",
            }
    return rows


def manifest(folder: Path, *flags: str) -> tuple[dict, list[dict], str]:
    """The command's rows by scan_id (without their split), its dropped scans, and its log."""
    command = f"-m sharding.manifest bids --images {folder} --out {folder}/bids.csv"
    done = subprocess.run([sys.executable, *command.split(), *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = []
    for name in ("bids.csv", "bids.dropped.csv"):
        with open(folder / name, encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert {row.pop("split") for row in tables[0]} <= {"train", "val", "test"}
    return {row["scan_id"]: row for row in tables[0]}, tables[1], done.stderr


def read_folder(folder: Path, **flags):
    return bids.read(bids.Options(images=folder, out=folder / "x.csv", **flags))


def by_id(release) -> dict[str, dict]:
    return {row["scan_id"]: row for row in release.rows}


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder of two people without traps, three sessions each."""
    write(PEOPLE[:2], tmp_path, save_tiny)
    return tmp_path


def make_plain(folder: Path, header: str, *people: str, sessions: tuple[str, ...] = ("",)) -> Path:
    """A folder with participants.tsv and an empty T1w of each person and session; the cells are parted by commas."""
    rows = [line.split(",") for line in (header, *people)]
    write_tsv(folder / "participants.tsv", rows)
    for subject, *_ in rows[1:]:
        for session in sessions:
            name = "_".join(filter(None, (subject, session)))
            touch(folder / subject / session / "anat" / f"{name}_T1w.nii.gz")
    return folder


def test_a_release_with_every_trap_gives_exactly_these_rows(tmp_path):
    write(PEOPLE, tmp_path, save_tiny)
    rows, dropped = clean_rows(PEOPLE), []
    bad_cell, same_visit = "a table's cell cannot be used", "another scan of the same visit was taken"

    def scan(person, number: int) -> str:
        return name_of(person, person.exams[number])

    def drop(scan_id: str, reason: str, *told: str) -> None:
        rows.pop(scan_id, None)
        dropped.append((scan_id, reason, told))

    def no_diagnosis(person, number: int, why: str) -> None:
        rows[scan(person, number)] |= {"diagnosis": "", "diagnosis_source": why, "diagnosis_gap_days": ""}

    # Names: runs, variants, other images, what is no scan at all.
    a, b, c, d, e = PEOPLE[:5]
    plain = tmp_path / place_of(a, a.exams[0])
    first, second = (scan(a, 0).replace("_T1w", f"_run-{run}_T1w") for run in ("02", "10"))
    plain.rename(tmp_path / place_of(a, a.exams[0], first))
    rows[first] = rows.pop(scan(a, 0)) | {"scan_id": first, "image": place_of(a, a.exams[0], first), "acquired": ""}
    touch(tmp_path / place_of(a, a.exams[0], second))
    drop(second, same_visit, first)
    for variant in ("acq-hires", "ce-gadolinium", "rec-norm"):
        name = scan(b, 0).replace("_T1w", f"_{variant}_T1w")
        touch(tmp_path / place_of(b, b.exams[0], name))
        drop(name, same_visit, scan(b, 0))
    only = scan(b, 1).replace("_T1w", "_acq-hires_rec-norm_T1w")
    (tmp_path / place_of(b, b.exams[1])).rename(tmp_path / place_of(b, b.exams[1], only))
    rows[only] = rows.pop(scan(b, 1)) | {"scan_id": only, "image": place_of(b, b.exams[1], only), "acquired": ""}
    contrast = scan(b, 1).replace("_T1w", "_ce-gadolinium_T1w")
    touch(tmp_path / place_of(b, b.exams[1], contrast))
    drop(contrast, same_visit, only)
    for suffix, folder in (("FLAIR", "anat"), ("bold", "func"), ("T1map", "anat"), ("pet", "pet")):
        name = scan(c, 0).replace("T1w", suffix)
        touch(tmp_path / subject_id(c) / "ses-M000" / folder / f"{name}.nii.gz")
        drop(name, "not a T1-weighted scan", suffix)
    for entity, what in (
        ("space-MNI152", "a derivative"),
        ("label-brain", "a mask"),
        ("part-phase", "part of a complex image"),
    ):
        name = scan(c, 1).replace("_T1w", f"_{entity}_T1w")
        touch(tmp_path / place_of(c, c.exams[1], name))
        drop(name, what, entity)
    touch(tmp_path / subject_id(c) / "ses-M012" / "anat" / "T1.nii.gz")
    drop("T1", "not a BIDS name", "T1.nii.gz")
    for ignored in ("derivatives/fmriprep", "sourcedata"):
        touch(tmp_path / ignored / place_of(d, d.exams[0]))
    touch(tmp_path / subject_id(d) / "ses-M000" / "anat" / "notes.json")
    touch(tmp_path / place_of(d, d.exams[0], scan(e, 0)))
    drop(scan(e, 0), "file and folder name different subjects or sessions", scan(e, 0))
    rows[scan(e, 0)] = clean_rows([e])[scan(e, 0)]
    (tmp_path / place_of(d, d.exams[1])).rename(tmp_path / subject_id(d) / "ses-M012" / f"{scan(d, 1)}.nii.gz")
    drop(scan(d, 1), "not in the session's folder anat", f"{subject_id(d)}/ses-M012")
    (tmp_path / place_of(d, d.exams[2])).unlink()
    (tmp_path / place_of(d, d.exams[2])).symlink_to(tmp_path / ".git/annex/objects/none")
    drop(scan(d, 2), "a link to a file that is not here", "datalad get")
    touch(tmp_path / place_of(e, e.exams[1]).replace(".gz", ""))
    drop(scan(e, 1), "a second copy of the same image", f"{scan(e, 1)}.nii")
    rows[scan(e, 1)] = clean_rows([e])[scan(e, 1)]
    rows[scan(e, 1)] |= {"image": place_of(e, e.exams[1]).replace(".gz", ""), "acquired": ""}

    # Sessions: words, missing values, Clinica's MMS, no row, no table, rows twice, a bad table.
    f, g, h, i, j, k, m, n = PEOPLE[5:13]
    set_session(tmp_path, f, 0, diagnosis="n/a")
    no_diagnosis(f, 0, "sessions.tsv diagnosis n/a")
    set_session(tmp_path, f, 1, diagnosis="Dementia")
    rows[scan(f, 1)] |= {"diagnosis": "AD", "diagnosis_source": "sessions.tsv diagnosis Dementia"}
    set_session(tmp_path, f, 2, diagnosis="EMCI")
    drop(scan(f, 2), bad_cell, f"{sessions_of(f)} row 4", "diagnosis", "'EMCI'")
    set_session(tmp_path, g, 0, diagnosis="3")
    drop(scan(g, 0), bad_cell, f"{sessions_of(g)} row 2", "diagnosis", "'3'")
    set_session(tmp_path, g, 1, MMSE="n/a", moca="n/a", cdr_global="n/a", cdr_sb="n/a")
    rows[scan(g, 1)] |= dict.fromkeys(("mmse", "moca", "cdr_global", "cdr_sb"), "")
    path = tmp_path / sessions_of(h)
    path.write_text(path.read_text(encoding="utf-8").replace("MMSE", "MMS"), encoding="utf-8")
    edit(tmp_path / sessions_of(i), lambda rows: [*rows[:1], *rows[2:]])
    none = {"mmse": "", "moca": "", "cdr_global": "", "cdr_sb": ""}
    no_diagnosis(i, 1, "no row of this session in sessions.tsv")
    rows[scan(i, 1)] |= none  # age stays: that of the first session and twelve months
    (tmp_path / sessions_of(j)).unlink()
    for number in range(3):
        no_diagnosis(j, number, "no row of this session in sessions.tsv")
        rows[scan(j, number)] |= none
    edit(tmp_path / sessions_of(k), lambda rows: [*rows, dict(rows[0])])
    edit(tmp_path / sessions_of(m), lambda rows: [*rows, rows[1] | {"MMSE": "1"}])
    drop(scan(m, 1), bad_cell, f"{sessions_of(m)} row 3 and row 5", "mmse", " and 1")
    (tmp_path / sessions_of(n)).write_text("")
    for number in range(3):
        drop(scan(n, number), bad_cell, sessions_of(n), "empty")
    o, p, q, r = PEOPLE[13:17]
    path = tmp_path / sessions_of(o)
    path.write_text(path.read_text(encoding="utf-8").replace("session_id", "visit"), encoding="utf-8")
    for number in range(3):
        drop(scan(o, number), bad_cell, sessions_of(o), "session_id")
    set_session(tmp_path, p, 0, MMSE="88")
    drop(scan(p, 0), bad_cell, f"{sessions_of(p)} row 2", "MMSE", "'88'")
    times = f"{subject_id(p)}/ses-M012/{subject_id(p)}_ses-M012_scans.tsv"
    edit(tmp_path / times, lambda rows: rows[0].update(acq_time="31/12/2010"))
    drop(scan(p, 1), bad_cell, times, "acq_time", "'31/12/2010'")
    (tmp_path / subject_id(p) / "ses-M024" / f"{subject_id(p)}_ses-M024_scans.tsv").unlink()
    rows[scan(p, 2)] |= {"acquired": ""}

    # People: no row, missing and impossible values, rows twice.
    set_participant(tmp_path, q, sex="n/a", apoe4="n/a", education_level="n/a")
    set_participant(tmp_path, r, sex="X")
    s, t, u = PEOPLE[17:20]
    set_participant(tmp_path, s, apoe4="3")
    for number in range(3):
        rows[scan(q, number)] |= {"sex": "", "apoe_e4": "", "education_years": ""}
        drop(scan(r, number), bad_cell, "participants.tsv row 18", "sex", "'X'")
        drop(scan(s, number), bad_cell, "participants.tsv row 19", "apoe4", "'3'")
    edit(
        tmp_path / "participants.tsv",
        lambda rows: [
            *(row for row in rows if row["participant_id"] != subject_id(t)),
            dict(rows[0]),
            rows[u.number] | {"education_level": "1"},
        ],
    )
    for number in range(3):
        rows[scan(t, number)] |= {"sex": "", "apoe_e4": "", "education_years": ""}
        drop(scan(u, number), bad_cell, "participants.tsv row 20 and row 27", "education_years")

    found_rows, found_dropped, log = manifest(tmp_path)
    assert found_rows.keys() == rows.keys()
    for scan_id, row in rows.items():
        assert found_rows[scan_id] == row
    assert sorted((gone["scan_id"], gone["reason"]) for gone in found_dropped) == sorted(
        (scan_id, reason) for scan_id, reason, _ in dropped
    )
    details = {(gone["scan_id"], gone["reason"]): gone["detail"] for gone in found_dropped}
    for scan_id, reason, told in dropped:
        assert all(word in details[scan_id, reason] for word in told), details[scan_id, reason]
    assert f"{len(rows) + len(dropped)} scans found = {len(rows)} kept + {len(dropped)} dropped" in log


def test_a_folder_without_sessions_takes_age_scores_and_diagnosis_of_the_person(tmp_path):
    header = "participant_id,age,sex,dx,MMSE,education_years,apoe_e4"
    people = ("sub-01,71.5,F,CN,29,16,1", "sub-02,89+,male,AD,n/a,n/a,n/a", "sub-03,n/a,O,n/a,27,8,0")
    rows, dropped, _ = manifest(make_plain(tmp_path, header, *people))
    columns = "subject_id session_id cohort diagnosis diagnosis_source age_years sex mmse education_years apoe_e4"
    assert [[rows[f"sub-0{number}_T1w"][name] for name in columns.split()] for number in (1, 2, 3)] == [
        ["sub-01", "", "custom", "CN", "participants.tsv dx CN", "71.5", "F", "29", "16", "1"],
        ["sub-02", "", "custom", "AD", "participants.tsv dx AD", "89", "M", "", "", ""],
        ["sub-03", "", "custom", "", "participants.tsv dx n/a", "", "", "27", "8", "0"],
    ]
    assert dropped == [] and {row["diagnosis_gap_days"] for row in rows.values()} == {""}


def test_what_is_said_of_a_person_is_not_given_to_each_of_several_sessions(tmp_path):
    folder = make_plain(
        tmp_path, "participant_id,age,diagnosis,group", "sub-1,70,AD,MCI", sessions=("ses-1", "ses-2", "ses-10")
    )
    rows = read_folder(folder).rows
    assert [row["session_id"] for row in rows] == ["ses-1", "ses-2", "ses-10"]
    assert {(row["age_years"], row["diagnosis"]) for row in rows} == {(None, None)}
    assert "--diagnosis-column" in rows[0]["diagnosis_source"]
    rows = read_folder(folder, diagnosis_column="group").rows
    assert {(row["diagnosis"], row["diagnosis_source"]) for row in rows} == {("MCI", "participants.tsv group MCI")}
    with pytest.raises(ValueError, match="no table has a diagnosis in a column 'status'"):
        read_folder(folder, diagnosis_column="status")


def test_a_group_is_a_diagnosis_only_on_request(tmp_path):
    folder = make_plain(tmp_path, "participant_id,group", "sub-1,AD", "sub-2,Control")
    assert [row["diagnosis"] for row in read_folder(folder).rows] == [None, None]
    release = read_folder(folder, diagnosis_column="group")
    assert [row["diagnosis"] for row in release.rows] == ["AD"]
    assert "participants.tsv row 3, column 'group': 'Control' is not one of CN, MCI, AD" in release.dropped[0].detail


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("mci", ("MCI", "CDR 0.5 -> MCI (--cdr05 mci)")),
        ("ad", ("AD", "CDR 0.5 -> AD (--cdr05 ad)")),
        ("drop", None),
    ],
)
def test_oasis_1_from_clinica_goes_by_the_cdr_and_not_by_its_diagnosis(tmp_path, policy, expected):
    header = "participant_id,sex,education_level,age_bl,cdr,diagnosis_bl"
    people = {"0001": ("0", "CN"), "0002": ("0.5", "n/a"), "0003": ("2.0", "n/a"), "0004": ("n/a", "no word of ours")}
    lines = [f"sub-OASIS1{number},F,3,70,{cdr},{cdr}" for number, (cdr, _) in people.items()]
    folder = make_plain(tmp_path, header, *lines, sessions=("ses-M000",))
    for number, (cdr, diagnosis) in people.items():
        subject = f"sub-OASIS1{number}"
        cells = ["ses-M000", cdr, "28", diagnosis]
        write_tsv(
            folder / subject / f"{subject}_sessions.tsv", [["session_id", "cdr_global", "MMS", "diagnosis"], cells]
        )
    release = read_folder(folder, cdr05=policy)
    rows = {row["subject_id"][-4:]: row for row in release.rows}
    told = {number: (row["diagnosis"], row["diagnosis_source"]) for number, row in rows.items()}
    assert release.cohort == "OASIS1"
    assert told == {
        "0001": ("CN", "CDR 0 -> CN"),
        **({"0002": expected} if expected else {}),
        "0003": ("AD", "CDR 2 -> AD"),
        "0004": (None, "CDR blank: not assessed"),
    }
    assert [gone.reason for gone in release.dropped] == ([] if expected else ["CDR 0.5 (--cdr05 drop)"])
    assert (rows["0001"]["education_years"], rows["0001"]["education_code"], rows["0001"]["mmse"]) == (None, 3, 28)
    assert rows["0001"]["age_years"] == 70


def test_oasis_3_from_clinica_takes_nothing_from_its_sessions(tmp_path):
    header = "participant_id,sex,education_level,age_bl,apoe4"
    folder = make_plain(tmp_path, header, "sub-OAS30001,M,16,65.5,1", sessions=("ses-M000", "ses-M018"))
    cells = [["ses-M000", "60", "AD", "12", "2"], ["ses-M018", "60", "words", "99", "2"]]
    write_tsv(
        folder / "sub-OAS30001/sub-OAS30001_sessions.tsv",
        [["session_id", "age", "diagnosis", "MMS", "cdr_global"], *cells],
    )
    release = read_folder(folder)
    assert release.cohort == "OASIS3" and not release.dropped
    assert [(row["age_years"], row["education_years"], row["apoe_e4"]) for row in release.rows] == [
        (65.5, 16, 1),
        (67, 16, 1),
    ]
    for row in release.rows:
        assert (row["diagnosis"], row["mmse"], row["cdr_global"]) == (None, None, None)
        assert "re-join from the source with `sharding.manifest oasis3`" in row["diagnosis_source"]


def test_aibl_from_clinica(tmp_path):
    header = "participant_id,sex,date_of_birth,apoe_gen1,apoe_gen2"
    folder = make_plain(tmp_path, header, "sub-AIBL12,F,1934,4,3", "sub-AIBL7,M,1930,n/a,n/a", sessions=("ses-M018",))
    write_tsv(
        folder / "sub-AIBL12/sub-AIBL12_sessions.tsv",
        [["session_id", "age", "diagnosis", "MMS", "cdr_global", "examination_date"]]
        + [["ses-M018", "74", "MCI", "26", "0.5", "05/12/2008"]],
    )
    release = read_folder(folder)
    first, second = release.rows
    columns = ("cohort", "diagnosis", "age_years", "sex", "apoe_e4", "mmse", "cdr_global")
    assert [first[name] for name in columns] == ["AIBL", "MCI", 74, "F", 1, 26, 0.5]
    assert [second[name] for name in columns] == ["AIBL", None, None, "M", None, None, None]


def test_the_cohort_is_told_by_ids_or_named(tmp_path):
    one = make_plain(tmp_path / "one", "participant_id,age", "sub-ADNI027S0074,70")
    two = make_plain(tmp_path / "two", "participant_id,age", "sub-ADNI027S0074,70", "sub-phantom,1")
    assert read_folder(one).cohort == "ADNI"
    assert read_folder(one, cohort="MY-SITE").rows[0]["cohort"] == "MY-SITE"
    with pytest.raises(ValueError, match="ADNI027S0074 .ADNI., sub-phantom .custom."):
        read_folder(two)
    with pytest.raises(ValueError, match="spelt ADNI"):
        read_folder(two, cohort="adni")
    with pytest.raises(ValueError, match="one BIDS folder"):
        read_folder(tmp_path)
    assert read_folder(tmp_path / "two", cohort="ADNI").cohort == "ADNI"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda text: text.replace("participant_id", "participant"), ["participant_id", "is it 'participant'?"]),
        (lambda text: text.replace("\t", ";"), ["separated by", "participant_id;sex"]),
        (lambda text: "", ["empty"]),
        (lambda text: text.replace("age_bl", "sex"), ["'sex' appears twice"]),
    ],
)
def test_participants_that_are_not_what_they_should_be_are_refused_by_name(small, spoil, told):
    path = small / "participants.tsv"
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        read_folder(small)
    assert all(word in str(refused.value) for word in [str(path), *told])


def test_a_byte_order_mark_and_latin_1_in_an_unused_column_do_no_harm(small):
    path = small / "participants.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"n/a\n", b"mari\xe9\n"))
    release = read_folder(small)
    assert not release.faults and len(release.rows) == 6 and {row["sex"] for row in release.rows} <= {"F", "M"}
    path.write_bytes(path.read_bytes().replace(b"\tF\t", b"\t\xe9\t").replace(b"\tM\t", b"\t\xe9\t"))
    release = read_folder(small)
    assert not release.rows and "UTF-8" in release.dropped[0].detail


def test_one_scan_per_decides_how_many_are_kept(small):
    again = name_of(PEOPLE[0], PEOPLE[0].exams[0]).replace("_T1w", "_run-02_T1w")
    touch(small / place_of(PEOPLE[0], PEOPLE[0].exams[0], again))
    set_session(small, PEOPLE[1], 0, diagnosis="n/a")
    assert len(read_folder(small, one_scan_per="all").rows) == 7
    assert [gone.scan.scan_id for gone in read_folder(small).dropped] == [again]
    rows, dropped, _ = manifest(small, "--one-scan-per", "subject")
    assert sorted(rows) == [name_of(PEOPLE[0], PEOPLE[0].exams[0]), name_of(PEOPLE[1], PEOPLE[1].exams[1])]
    assert len(dropped) == 5
