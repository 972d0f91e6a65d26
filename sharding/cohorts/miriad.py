"""MIRIAD, as downloaded from its XNAT: images, and the tables that XNAT lists as CSV.

    images/.../miriad_199_HC_F_01_MR_1.nii     person 199, healthy control, female, first visit, first scan
    tables/*.csv                               named as you like: they are told apart by their headers

    MR sessions   `Label` or `MR ID` (miriad_199_1_MR_1), Subject (miriad_199), M/F, Age, sometimes Group
    MMSE          Label (miriad_199_1_MMSE), Subject, MMSE, sometimes Gender

The diagnosis is the file name's: AD, or HC for CN; MIRIAD has no MCI. Age is the MR session's. MMSE is that of the
visit, else of the last visit before it within --mmse-window-days, never of a later one: visits have no dates, but
their numbers tell the week. The second scan of a day (MR_2) is dropped by --one-scan-per visit. Every scan is from one
scanner of 1.5 tesla.

Example:
    python -m sharding.manifest miriad --images miriad/images --tables miriad/tables --out miriad.csv
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sharding.release import (
    FoundScan,
    Person,
    Release,
    ReleaseOptions,
    Visit,
    drop_copies,
    files_below,
    one_per,
)
from sharding.tables import Entry, Row, TablesFolder, find_by_header, index_rows, read_table

DIAGNOSIS = {"AD": "AD", "HC": "CN"}
WEEK_OF_VISIT = {1: 0, 2: 2, 3: 6, 4: 14, 5: 26, 6: 38, 7: 52, 8: 78, 9: 104}
FIELD_STRENGTH_T = 1.5
FILE_NAME = re.compile(r"miriad_(\d+)_(AD|HC)_([MF])_(\d+)_MR_(\d+)\.nii(?:\.gz)?")
SEX = {"M": "M", "F": "F", "male": "M", "female": "F", "Male": "M", "Female": "F"}


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """MIRIAD."""

    mmse_window_days: int = 183
    """A visit without an MMSE takes that of the last visit before it, at most this many days; 0: of no other visit."""
    without_tables: bool = False
    """Read no table: diagnosis and sex from the file names, neither age nor MMSE."""


def read(options: Options) -> Release:
    """Every scan of the release, as a row or dropped with a reason.

    Raises:
        ValueError: a table is missing or is not what it should be.
    """
    release = Release("MIRIAD")
    scans = drop_copies(release, _list_scans(options.images, release))
    if options.one_scan_per != "all":
        scans = one_per(release, scans, key=lambda scan: (scan.subject_id, scan.session_id))
    tables = Tables() if options.without_tables else _read_tables(options.tables_folder, release.faults)
    people = _people(scans, tables)
    for scan in sorted(scans, key=lambda scan: (scan.subject_id, int(scan.session_id), scan.scan_id)):
        visit = _visit(scan, tables, options.mmse_window_days)
        release.keep(scan, people[scan.subject_id], visit, gap_days=0)
    return release


def _list_scans(images: Path, release: Release) -> list[FoundScan]:
    """The scans by their names; images with other names are dropped."""
    scans = []
    for folder, names in files_below(images):
        for name in names:
            if not name.endswith((".nii", ".nii.gz")):
                continue
            named = FILE_NAME.fullmatch(name)
            stem = name.split(".")[0]
            if not named:
                scan = FoundScan(scan_id=stem, subject_id="", session_id="", image=folder / name)
                release.drop(scan, "not a name of MIRIAD", f"{name}; expected miriad_199_HC_F_01_MR_1.nii")
                continue
            number, group, sex, visit, repeat = named.groups()
            week = WEEK_OF_VISIT.get(int(visit))
            values = {"sex": sex, "field_strength_t": FIELD_STRENGTH_T, "group": group, "week": week}
            scans.append(
                FoundScan(
                    scan_id=stem,
                    subject_id=f"miriad_{int(number)}",
                    session_id=f"{int(visit):02d}",
                    image=folder / name,
                    when=None if week is None else 7 * week,
                    rank=(int(repeat),),
                    values=values,
                )
            )
    return scans


@dataclass(frozen=True)
class Tables:
    """What the tables say; empty without them."""

    sessions: dict[tuple[str, int, int], Entry] = field(default_factory=dict)
    """MR sessions by subject, visit and scan."""
    mmse: dict[tuple[str, int], Entry] = field(default_factory=dict)
    """By subject and visit."""
    subjects: dict[str, Entry] = field(default_factory=dict)


def _read_tables(folder: TablesFolder, faults: list[str]) -> Tables:
    mmse = find_by_header(folder, ("Label", "MMSE"))
    sessions = {path for name in ("Label", "MR ID") for path in find_by_header(folder, (name, "Age"))} - set(mmse)
    subjects = {path for name in ("M/F", "Gender") for path in find_by_header(folder, ("Subject", name))}
    if not (mmse and sessions):
        absent = "the columns Label, Subject, MMSE" if sessions else "the columns Label (or MR ID), Subject, M/F, Age"
        seen = "; ".join(f"{path.name}: {_header(path)}" for path in find_by_header(folder, ())[:5])
        raise ValueError(
            f"{folder}: no table has {absent} ({seen or 'there is no CSV'}); export it from XNAT, or --without-tables"
        )
    return Tables(
        sessions=index_rows(_rows(sessions), _session_key, lambda row: {**_about(row), "age_years": _age(row)}, faults),
        mmse=index_rows(_rows(mmse), _mmse_key, lambda row: {**_about(row), "mmse": _mmse(row)}, faults),
        subjects=index_rows(_rows(subjects - sessions - set(mmse)), lambda row: row.text("Subject"), _about, faults),
    )


def _header(path: Path) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline().strip()[:100] or "empty"


def _rows(paths: Iterable[Path]) -> Iterator[Row]:
    names = {"Label": ("MR ID",), "sex": ("M/F", "Gender")}
    for path in sorted(paths):
        yield from read_table(path, ("Subject",), names)


def _session_key(row: Row) -> tuple[str, int, int]:
    label = re.fullmatch(r"miriad_(\d+)_(\d+)_MR_(\d+)", row.text("Label"))
    if label is None:
        raise row.bad("Label", "like miriad_199_1_MR_1")
    return f"miriad_{int(label[1])}", int(label[2]), int(label[3])


def _mmse_key(row: Row) -> tuple[str, int] | None:
    label = re.fullmatch(r"miriad_(\d+)_(\d+)_MMSE", row.text("Label"))
    if label is None and row["MMSE"] == "":
        return None  # another test
    if label is None:
        raise row.bad("Label", "like miriad_199_1_MMSE")
    return f"miriad_{int(label[1])}", int(label[2])


def _about(row: Row) -> dict[str, object]:
    labelled = re.match(r"miriad_\d+", row.text("Label"))
    if labelled and row.text("Subject") != labelled[0]:
        raise row.bad("Subject", f"{labelled[0]}, the person of {row['Label']}")
    return {"sex": row.code("sex", SEX), "group": row.text("Group")}


def _age(row: Row) -> float | None:
    return row.number("Age", 40, 110)


def _mmse(row: Row) -> float | None:
    return row.number("MMSE", 0, 30, whole=True)


def _people(scans: list[FoundScan], tables: Tables) -> dict[str, Person]:
    """Everyone with a scan; a fault where file names, or a table and the file names, contradict each other."""
    told = defaultdict(list)
    for key, entry in (*tables.sessions.items(), *tables.mmse.items()):
        told[key[0]].append(entry)
    for subject, entry in tables.subjects.items():
        told[subject].append(entry)
    people: dict[str, Person] = {}
    for scan in scans:
        subject, sex, group = scan.subject_id, scan.values["sex"], scan.values["group"]
        fault = tables.subjects[subject].fault if subject in tables.subjects else ""
        for entry in told[subject]:
            said_sex, said_group = entry.values.get("sex") or sex, entry.values.get("group")
            if said_sex != sex:
                fault = fault or f"{entry.where}: sex {said_sex}, but the file is named {scan.image.name}"
            if said_group in DIAGNOSIS and said_group != group:
                fault = fault or f"{entry.where}: Group {said_group}, but the file is named {scan.image.name}"
        before = people.get(subject)
        if before and (before.values["sex"], before.values["group"]) != (sex, group):
            fault = fault or f"{scan.image}: other files of {subject} name another sex or group"
        if before is None or fault:
            people[subject] = Person(subject_id=subject, values={"sex": sex, "group": group}, fault=fault)
    return people


def _visit(scan: FoundScan, tables: Tables, window_days: int) -> Visit:
    """What is known of the scan's visit."""
    subject, visit = scan.subject_id, int(scan.session_id)
    session = tables.sessions.get((subject, visit, scan.rank[0])) or tables.sessions.get((subject, visit, 1))
    tested = _last_test(subject, visit, tables, window_days)
    test = tables.mmse[subject, tested] if tested else None
    faults = [entry.fault for entry in (session, test) if entry and entry.fault]
    group = scan.values["group"]
    return Visit(
        subject_id=subject,
        when=scan.when,
        label=scan.session_id,
        diagnosis=DIAGNOSIS[group],
        diagnosis_source=f"file name {group}",
        values={
            "age_years": session.values.get("age_years") if session else None,
            "mmse": test.values.get("mmse") if test else None,
            "mmse_weeks_before": _weeks(tested, visit) if tested else None,
        },
        fault=faults[0] if faults else "",
    )


def _last_test(subject: str, visit: int, tables: Tables, window_days: int) -> int | None:
    """The visit whose MMSE counts: this one, else the last before it within the window."""
    for earlier in range(visit, 0, -1):
        weeks = _weeks(earlier, visit)
        if weeks is None or 7 * weeks > window_days:
            return None
        entry = tables.mmse.get((subject, earlier))
        if entry and (entry.fault or entry.values["mmse"] is not None):
            return earlier
    return None


def _weeks(earlier: int, later: int) -> int | None:
    """Weeks between two visits; None for one that the schedule does not have."""
    if earlier == later:
        return 0
    if later not in WEEK_OF_VISIT:
        return None
    return WEEK_OF_VISIT[later] - WEEK_OF_VISIT[earlier]
