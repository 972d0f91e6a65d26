"""A BIDS folder: the output of Clinica's converters, or any other with participants.tsv.

    bids/participants.tsv                                     participant_id, sex, and more
    bids/sub-X/sub-X_sessions.tsv                             session_id, age, diagnosis, MMSE or MMS, cdr_global, ...
    bids/sub-X/ses-Y/sub-X_ses-Y_scans.tsv                    filename, acq_time
    bids/sub-X/[ses-Y/]anat/sub-X[_ses-Y][_run-01]_T1w.nii.gz

What a session's row says wins over the participant's. `n/a` is missing. Diagnoses are written CN, MCI, AD or Dementia,
in the column `diagnosis` or `dx` (else name it with --diagnosis-column); other words are refused by name. An age in
participants.tsv is used where the person has one session; Clinica's `age_bl` grows with the months of `ses-M012`.

Three studies are recognised by their ids and read with care (--cohort names another):
    OASIS1, OASIS2  the diagnosis is the session's CDR: 0 CN, 0.5 by --cdr05, 1 and above AD. Clinica's own column has
                    no diagnosis for 0.5 in sessions.tsv, and AD for it in participants.tsv.
    OASIS3          Clinica's sessions.tsv can hold another person's scores, so no score or diagnosis is taken from it:
                    make that manifest from the release itself, with `sharding.manifest oasis3`.

Folders derivatives, sourcedata and code hold no scans. Of several T1w of a session the plainest name is taken (no
ce-, rec- or acq-), then the lowest run.

Example:
    python -m sharding.manifest bids --images bids/ --out bids.csv
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.cohorts.oasis1 import Cdr05, diagnose_cdr
from sharding.manifest import COHORTS
from sharding.release import FoundScan, Person, Release, ReleaseOptions, Visit, drop_copies, files_below, one_per
from sharding.tables import Entry, Row, index_rows, read_table, walk

MISSING = ("n/a", "N/A", "NaN", "nan")
DIAGNOSIS = {"CN": "CN", "MCI": "MCI", "AD": "AD", "Dementia": "AD"}
SEX = {
    **dict.fromkeys(("M", "m", "male", "Male"), "M"),
    **dict.fromkeys(("F", "f", "female", "Female"), "F"),
    **dict.fromkeys(("O", "o", "other", "Other"), None),
}
CDR = {grade: float(grade) for grade in ("0", "0.5", "1", "2", "3")}
SCORES = ("mmse", "moca", "cdr_global", "cdr_sb")
CDR_COHORTS = ("OASIS1", "OASIS2")
EDUCATION_YEARS = {"ADNI": "education_level", "OASIS2": "education", "OASIS3": "education_level"}
COHORT_OF_ID = {  # as Clinica writes them
    r"sub-ADNI\d{3}S\d{4}": "ADNI",
    r"sub-AIBL\d+": "AIBL",
    r"sub-OASIS1\d{4}": "OASIS1",
    r"sub-(OAS2|OASIS2)\d{4}": "OASIS2",
    r"sub-(OAS3|OASIS3)\d{4}": "OASIS3",
}
NO_SCANS = ("derivatives", "sourcedata", "code")
FILE_NAME = re.compile(r"(sub-[^_]+)(?:_(ses-[^_]+))?((?:_[a-zA-Z]+-[^_]+)*)_([a-zA-Z0-9]+)")
NOT_A_SCAN = {"space": "a derivative", "desc": "a derivative", "label": "a mask", "part": "part of a complex image"}
ACQUIRED = ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d")


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """BIDS."""

    cohort: str = ""
    """Name of the cohort; else recognised from ids as Clinica writes them (sub-ADNI..., sub-AIBL...), or `custom`."""
    diagnosis_column: str = ""
    """The column with CN, MCI, AD or Dementia; else `diagnosis`, else `dx`."""
    cdr05: Cdr05 = "mci"
    """OASIS-1 and 2: what CDR 0.5 is."""


def read(options: Options) -> Release:
    """Every image of the folder, as a row or dropped with a reason.

    Raises:
        ValueError: not one BIDS folder, or participants.tsv is not what it should be.
    """
    root = _root(options.images)
    tables = options.tables or root
    subjects = sorted(entry.name for entry in os.scandir(root) if entry.name.startswith("sub-") and entry.is_dir())
    release = Release(_cohort(subjects, options.cohort))
    scans = drop_copies(release, _list_scans(root, set(subjects), release))
    participants = index_rows(
        read_table(tables / "participants.tsv", ("participant_id",), delimiter="\t"),
        lambda row: _prefixed("sub-", row.text("participant_id")),
        lambda row: _participant(row, release.cohort, options.diagnosis_column),
        release.faults,
    )
    of_subject = defaultdict(list)
    for scan in scans:
        of_subject[scan.subject_id].append(scan)
    for subject, found in sorted(of_subject.items()):
        _link(subject, found, tables, participants.get(subject), release, options)
    if options.diagnosis_column and release.rows and not any(row["diagnosis"] for row in release.rows):
        raise ValueError(f"{tables}: no table has a diagnosis in a column {options.diagnosis_column!r}")
    return release


def _root(images: Path) -> Path:
    """The folder that has the sub-... folders."""
    roots = []
    for parent, folders, _ in walk(images):
        if any(name.startswith("sub-") for name in folders):
            roots.append(Path(parent))
            folders.clear()
        folders[:] = [name for name in folders if name not in NO_SCANS and not name.startswith(".")]
    if len(roots) != 1:
        found = ", ".join(map(str, roots[:5])) or "none"
        raise ValueError(f"{images}: expected one BIDS folder with sub-... folders in it, found {found}; name it")
    return roots[0]


def _cohort(subjects: list[str], named: str) -> str:
    """The cohort that is named, else the one that the ids tell."""
    if named:
        if named not in COHORTS and named.upper() in COHORTS:
            raise ValueError(f"--cohort {named}: it is spelt {named.upper()}")
        return named
    example = {}
    for subject in subjects:
        kinds = (cohort for pattern, cohort in COHORT_OF_ID.items() if re.fullmatch(pattern, subject))
        example.setdefault(next(kinds, "custom"), subject)
    if len(example) > 1:
        told = ", ".join(f"{subject} ({cohort})" for cohort, subject in example.items())
        raise ValueError(f"ids of several studies: {told}; make a folder of each, or give --cohort")
    return next(iter(example), "custom")


def _list_scans(root: Path, subjects: set[str], release: Release) -> list[FoundScan]:
    """The T1w images; other images are dropped."""
    scans = []
    for folder, names in files_below(root):
        place = folder.relative_to(root).parts
        if not place or place[0] not in subjects:
            continue
        for name in names:
            if name.endswith((".nii", ".nii.gz")):
                scan, reason, detail = _found(folder / name, place)
                if reason:
                    release.drop(scan, reason, detail)
                else:
                    scans.append(scan)
    return scans


def _found(image: Path, place: tuple[str, ...]) -> tuple[FoundScan, str, str]:
    """A scan from its name and its folders below the root, and why it is not used."""
    session = place[1] if len(place) > 1 and place[1].startswith("ses-") else ""
    stem = image.name.removesuffix(".gz").removesuffix(".nii")
    scan = FoundScan(scan_id=stem, subject_id=place[0], session_id=session, image=image)
    named = FILE_NAME.fullmatch(stem)
    if not named:
        return scan, "not a BIDS name", f"{image.name}; expected sub-..._T1w.nii.gz"
    if (named[1], named[2] or "") != (place[0], session):
        return scan, "file and folder name different subjects or sessions", f"{image.name} in {'/'.join(place)}"
    if named[4] != "T1w":
        return scan, "not a T1-weighted scan", named[4]
    entities = dict(pair.split("-", 1) for pair in named[3].split("_")[1:])
    for entity, what in NOT_A_SCAN.items():
        if entity in entities and entities[entity] != "mag":
            return scan, what, f"{entity}-{entities[entity]}"
    if place != tuple(filter(None, (place[0], session, "anat"))):
        return scan, "not in the session's folder anat", "/".join(place)
    if not image.exists():
        return scan, "a link to a file that is not here", "get it (datalad get), then make the manifest again"
    run = re.search(r"\d+", entities.pop("run", ""))
    rank = ("ce" in entities, len(entities), int(run[0]) if run else 0)
    return replace(scan, rank=rank), "", ""


def _prefixed(prefix: str, label: str) -> str:
    return label if label.startswith(prefix) else prefix + label


def _column(row: Row, *names: str) -> str:
    """The first of the names that the table has."""
    return next((name for name in names if name in row), names[0])


def _age(row: Row, column: str) -> float | None:
    capped = re.fullmatch(r"(\d+)\+", row.text(column))  # 89+
    return float(capped[1]) if capped else row.number(column, 0, 120, MISSING)


def _scores(row: Row, cohort: str, diagnosis_column: str) -> dict[str, object]:
    """What holds for a moment; a table without a column knows nothing of it."""
    column = diagnosis_column or _column(row, "diagnosis", "dx")
    return {
        "age_years": _age(row, "age"),
        "mmse": row.number(_column(row, "mmse", "MMSE", "MMS"), 0, 30, MISSING, whole=True),
        "moca": row.number(_column(row, "moca", "MOCA", "MoCA"), 0, 30, MISSING, whole=True),
        "cdr_global": row.code(_column(row, "cdr_global", "cdr"), CDR, MISSING),
        "cdr_sb": row.number("cdr_sb", 0, 18, MISSING),
        "diagnosis": None if cohort in CDR_COHORTS else row.code(column, DIAGNOSIS, MISSING),
        "diagnosis_source": f"{row.file.name.split('_')[-1]} {column} {row[column]}" if column in row else "",
    }


def _participant(row: Row, cohort: str, diagnosis_column: str) -> dict[str, object]:
    alleles = [row.code(column, {"2": 2, "3": 3, "4": 4}, MISSING) for column in ("apoe_gen1", "apoe_gen2")]
    values = {
        "sex": row.code(_column(row, "sex", "Sex", "gender", "Gender"), SEX, MISSING),
        "apoe_e4": row.code(_column(row, "apoe_e4", "apoe4"), {"0": 0, "1": 1, "2": 2}, MISSING),
        "education_years": row.number(EDUCATION_YEARS.get(cohort, "education_years"), 0, 36, MISSING),
        "age_bl": _age(row, "age_bl"),
        "scores": {} if cohort == "OASIS3" else _scores(row, cohort, diagnosis_column),
    }
    if None not in alleles:
        values["apoe_e4"] = alleles.count(4)
    if cohort == "OASIS1":
        values["education_code"] = row.number("education_level", 1, 5, MISSING, whole=True)
    return values


def _link(
    subject: str, scans: list[FoundScan], tables: Path, known: Entry | None, release: Release, options: Options
) -> None:
    """Keeps the scans of one person, each with its session's row."""
    path = tables / subject / f"{subject}_sessions.tsv"
    sessions, fault = {}, known.fault if known else ""
    if path.is_file() and release.cohort != "OASIS3":
        try:
            sessions = index_rows(
                read_table(path, ("session_id",), delimiter="\t"),
                lambda row: _prefixed("ses-", row.text("session_id")),
                lambda row: _scores(row, release.cohort, options.diagnosis_column),
                release.faults,
            )
        except ValueError as error:
            fault = fault or str(error)
            release.faults.append(str(error))
    about = known.values if known and not known.fault else {}
    lasting = ("sex", "apoe_e4", "education_years", "education_code")
    person = Person(subject_id=subject, values={n: about[n] for n in lasting if n in about}, fault=fault)
    is_only_session = len({scan.session_id for scan in scans} | sessions.keys()) == 1
    scans = _with_dates(scans, tables, release)
    if options.one_scan_per != "all":
        scans = one_per(release, scans, key=lambda scan: scan.session_id)
    for scan in sorted(scans, key=lambda scan: (_natural(scan.session_id), scan.rank, scan.scan_id)):
        visit, gap_days = _visit(scan, sessions.get(scan.session_id), about, is_only_session, release.cohort, options)
        is_questionable = release.cohort in CDR_COHORTS and visit.values["cdr_global"] == 0.5 and not visit.fault
        if is_questionable and options.cdr05 == "drop":
            release.drop(scan, "CDR 0.5 (--cdr05 drop)")
        else:
            release.keep(scan, person, visit, gap_days)


def _with_dates(scans: list[FoundScan], tables: Path, release: Release) -> list[FoundScan]:
    """The scans with the day of their scans.tsv, where there is one; a scan whose row cannot be used is dropped."""
    days: dict[str, Entry] = {}
    faults: dict[str, str] = {}
    for session in {scan.session_id for scan in scans}:
        subject = scans[0].subject_id
        folder = tables / subject / session if session else tables / subject
        path = folder / f"{'_'.join(filter(None, (subject, session)))}_scans.tsv"
        if not path.is_file():
            continue
        try:
            rows = read_table(path, ("filename",), delimiter="\t")
            days |= index_rows(
                rows,
                lambda row: row.text("filename").split("/")[-1],
                lambda row: {"day": row.date("acq_time", ACQUIRED, MISSING)},
                release.faults,
            )
        except ValueError as error:
            faults[session] = str(error)
            release.faults.append(str(error))
    dated = []
    for scan in scans:
        entry = days.get(scan.image.name)
        fault = faults.get(scan.session_id) or (entry.fault if entry else "")
        if fault:
            release.drop(scan, "a table's cell cannot be used", fault)
        else:
            dated.append(replace(scan, when=entry.values["day"] if entry else None))
    return dated


def _visit(
    scan: FoundScan, row: Entry | None, about: dict, is_only_session: bool, cohort: str, options: Options
) -> tuple[Visit, int | None]:
    """What is known of the scan's session, and 0 for a diagnosis of the very session, None for one of the person."""
    of_session = row.values if row else {}
    of_person = about.get("scores", {})
    fitting = of_person if is_only_session else {}
    values = {name: _first(of_session.get(name), fitting.get(name)) for name in ("age_years", *SCORES)}
    values["age_years"] = _first(values["age_years"], _grown(about.get("age_bl"), scan.session_id, is_only_session))
    if cohort in CDR_COHORTS:
        diagnosis, source = diagnose_cdr(values["cdr_global"], options.cdr05)
        gap_days = 0 if of_session.get("cdr_global") is not None else None
    elif of_session.get("diagnosis"):
        diagnosis, source, gap_days = of_session["diagnosis"], of_session["diagnosis_source"], 0
    elif of_person.get("diagnosis") and (is_only_session or options.diagnosis_column):
        diagnosis, source, gap_days = of_person["diagnosis"], of_person["diagnosis_source"], None
    else:
        diagnosis, source, gap_days = None, _why_none(scan, row, of_person, cohort), None
    visit = Visit(
        subject_id=scan.subject_id,
        when=None,
        label=scan.session_id,
        diagnosis=diagnosis,
        diagnosis_source=source,
        values=values,
        fault=row.fault if row else "",
    )
    return visit, gap_days


def _why_none(scan: FoundScan, row: Entry | None, of_person: dict, cohort: str) -> str:
    if cohort == "OASIS3":
        return "Clinica's sessions.tsv is not safe for OASIS-3; re-join from the source with `sharding.manifest oasis3`"
    if of_person.get("diagnosis"):
        return "participants.tsv has one diagnosis for several sessions; --diagnosis-column takes it for all"
    if row or not scan.session_id:
        known = row.values if row else of_person
        return known.get("diagnosis_source") or "no column diagnosis or dx; name it with --diagnosis-column"
    return "no row of this session in sessions.tsv"


def _grown(age_bl: float | None, session: str, is_only_session: bool) -> float | None:
    """Age at a session such as ses-M012 from that of the first."""
    months = re.fullmatch(r"ses-M(\d+)", session)
    if age_bl is None or not (months or is_only_session):
        return None
    return age_bl + int(months[1]) / 12 if months else age_bl


def _first(*values: object) -> object:
    return next((value for value in values if value is not None), None)


def _natural(label: str) -> list:
    """ses-2 before ses-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label)]
