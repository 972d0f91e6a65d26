"""Tables of NACC: the sessions of the mixed protocol, SCAN's quality table, and the visits of the UDS.

Every cell that is used is checked by its own column's codes; -4 is "not available" in all of them. A visit with a cell
that cannot be used keeps its place in time, with its fault, so that no scan is given a farther visit instead.
"""

import datetime
import re
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.release import OTHER, Person, Visit
from sharding.tables import BadCell, Row, read_table

GONE = ("-4",)  # "not available", in every column
CDR = {"0": 0.0, "0.5": 0.5, "1": 1.0, "2": 2.0, "3": 3.0}
E4_OF_NACCAPOE = {"1": 0, "2": 1, "3": 0, "4": 2, "5": 1, "6": 0}  # e3e3 e3e4 e3e2 e4e4 e4e2 e2e2
ALZP_IS_PRIMARY = {"1": True, "2": False, "3": False, "7": False, "8": False}
SEX, MISSING_SEX = {"1": "M", "2": "F"}, (*GONE, "9")
MISSING_EDUC = (*GONE, "99")
SUBJECT = re.compile(r"NACC\d{6}")
UDS_COLUMNS = (
    "NACCID NACCVNUM VISITYR VISITMO VISITDAY SEX EDUC NACCAGE NACCUDSD NACCALZD NACCMMSE NACCMOCA CDRGLOB CDRSUM "
    "NACCAPOE NACCNE4S"
).split()
MRI_COLUMNS = "NACCID NACCMRFI MRIYR MRIMO MRIDY NACCMRIA".split()


@dataclass(frozen=True)
class Session:
    """A row of the MRI table."""

    row: Row
    subject_id: str
    date: datetime.date | None = None
    age_years: float | None = None
    visit: str = ""
    """NACCVNUM: the visit that NACC thinks closest."""
    fault: str = ""


def read_mri_table(path: Path, faults: list[str]) -> dict[str, Session]:
    """The sessions by their zip's name in lower case, without `.zip`; unusable rows are sessions with a fault."""
    sessions: dict[str, Session] = {}
    for row in read_table(path, MRI_COLUMNS):
        stem = Path(row["NACCMRFI"]).stem.lower()  # not strip(".zip"), which takes letters away
        if not any(letter.isdigit() for letter in stem) or row["NACCMRFI"] in ("-4", "88"):
            continue  # a person without an MRI
        session = _session(row)
        before = sessions.setdefault(stem, session)
        used = (*MRI_COLUMNS, "NACCVNUM")
        if before is not session and [before.row[name] for name in used] != [row[name] for name in used]:
            session = sessions[stem] = replace(
                before, fault=f"{before.row.where} and row {row.line}: they differ for NACCMRFI {row['NACCMRFI']!r}"
            )
        if session.fault:
            faults.append(session.fault)
    return sessions


def _session(row: Row) -> Session:
    subject_id = row["NACCID"]
    try:
        if not SUBJECT.fullmatch(subject_id):
            raise row.bad("NACCID", "NACC and six digits")
        date = _date(row, "MRIYR", "MRIMO", "MRIDY")
        age = row.number("NACCMRIA", 18, 120, (*GONE, "888", "999"))
        visit = row.number("NACCVNUM", 1, 60, (*GONE, "88", "888", "8888"), whole=True)
    except BadCell as error:
        return Session(row, subject_id, fault=str(error))
    return Session(row, subject_id, date, age, f"{visit:g}" if visit else "")


def _date(row: Row, year: str, month: str, day: str) -> datetime.date | None:
    """The date in three columns, None if one of them is unknown."""
    parts = [
        row.number(year, 1980, 2100, (*GONE, "8888", "9999"), whole=True),
        row.number(month, 1, 12, (*GONE, "88", "99"), whole=True),
        row.number(day, 1, 31, (*GONE, "88", "99"), whole=True),
    ]
    if None in parts:
        return None
    try:
        return datetime.date(*map(int, parts))
    except ValueError:
        raise row.bad(day, f"a day of {row[year]}-{row[month]}") from None


def read_scan_qc(path: Path, faults: list[str]) -> dict[tuple, Row]:
    """SCAN's rows by (NACCID, image id) where the table has ids, and by (NACCID, date, letters of the description)."""
    rows: dict[tuple, Row] = {}
    needed = ("NACCID", "STUDYDATE", "SERIESDESCRIPTION", "SERIESQC", "SERIESCHOSEN")
    for row in read_table(path, needed, {"LONIUID": ("LONI_IMAGE", "IMAGEID", "IMAGE_ID")}):
        try:
            date = row.date("STUDYDATE", ("%Y-%m-%d", "%m/%d/%Y"))
            row.text("SERIESQC"), row.text("SERIESCHOSEN")
        except BadCell as error:
            faults.append(str(error))
            continue
        rows.setdefault((row["NACCID"], date, letters(row["SERIESDESCRIPTION"])), row)
        if row["LONIUID"]:
            number = row["LONIUID"].lstrip("ISD")
            rows |= {(row["NACCID"], f"{letter}{number}"): row for letter in ("", "I", "S", "D")}
    return rows


def read_uds(
    path: Path, subjects: set[str], ad: str, mci_due_to_ad: bool, faults: list[str]
) -> tuple[dict[str, Person], dict[str, list[Visit]]]:
    """The people among `subjects`, and their visits in the order of NACCVNUM.

    The table has some 200,000 rows of 1,000 to 2,000 columns: it is read as a stream, of which little is kept.
    """
    from tqdm import tqdm

    used = (*UDS_COLUMNS, *{"any": (), "primary": ("NACCALZP",), "etiology": ("NACCETPR",)}[ad])
    found: dict[str, dict[str, tuple[Row, Visit]]] = {}
    rows = read_table(path, used, wanted=lambda line: not subjects.isdisjoint(SUBJECT.findall(line)))
    for row in tqdm(rows, unit=" visits", disable=None):
        if row["NACCID"] not in subjects:
            continue
        row = _narrow(row, (*used, "PACKET", "FORMVER"))
        number = plain(row["NACCVNUM"])
        number = number if number.isdigit() else f"in row {row.line}"  # unusable, but a visit of its own
        of_person = found.setdefault(row["NACCID"], {})
        if number not in of_person:
            of_person[number] = row, _visit(row, ad, mci_due_to_ad)
            continue
        before, visit = of_person[number]
        differing = [name for name in used if before[name] != row[name]]
        if differing and not visit.fault:
            name = differing[0]
            fault = (
                f"{before.where} and row {row.line}: both are NACCVNUM {number} of {row['NACCID']}, with column "
                f"{name!r} {before[name]!r} and {row[name]!r}"
            )
            of_person[number] = before, replace(visit, fault=fault)
    people, visits = {}, {}
    for subject_id, of_person in found.items():
        rows = sorted(of_person.values(), key=lambda pair: _order(pair[0]))
        faults += [visit.fault for _, visit in rows if visit.fault]
        people[subject_id] = _person(subject_id, [row for row, visit in rows if not visit.fault], faults)
        visits[subject_id] = [visit for _, visit in rows]
    return people, visits


def _narrow(row: Row, columns: tuple[str, ...]) -> Row:
    """The row without its other thousand cells."""
    cells = [row[name] for name in columns if name in row]
    if row.surplus:
        cells += row.cells[row.width :]
    names = [name for name in columns if name in row]
    return Row(row.file, row.line, {name: place for place, name in enumerate(names)}, len(names), cells)


def _order(row: Row) -> tuple[int, int]:
    number = plain(row["NACCVNUM"])
    return int(number) if number.isdigit() else 10**6, row.line


def _visit(row: Row, ad: str, mci_due_to_ad: bool) -> Visit:
    when = None
    try:
        when = _date(row, "VISITYR", "VISITMO", "VISITDAY")
        if row.number("NACCVNUM", 1, 60, whole=True) is None:
            raise row.bad("NACCVNUM", "the number of a visit")
        row.code("SEX", SEX, MISSING_SEX)
        row.number("EDUC", 0, 36, MISSING_EDUC, whole=True)
        diagnosis, source = _diagnose(row, ad, mci_due_to_ad)
        values = {
            "mmse": row.number("NACCMMSE", 0, 30, (*GONE, "88", "95", "96", "97", "98"), whole=True),
            "moca": row.number("NACCMOCA", 0, 30, (*GONE, "88", "99"), whole=True),
            "cdr_global": row.code("CDRGLOB", CDR, GONE),
            "cdr_sb": row.number("CDRSUM", 0, 18, GONE),
            "visit": plain(row["NACCVNUM"]),
            "visit_age_years": row.number("NACCAGE", 18, 120, GONE),
            "packet": row.text("PACKET"),
            "form_version": row.text("FORMVER"),
        }
    except BadCell as error:
        return Visit(subject_id=row["NACCID"], when=when, label=plain(row["NACCVNUM"]), fault=str(error))
    return Visit(
        subject_id=row["NACCID"],
        when=when,
        label=plain(row["NACCVNUM"]),
        diagnosis=diagnosis,
        diagnosis_source=source,
        values=values,
    )


def _diagnose(row: Row, ad: str, mci_due_to_ad: bool) -> tuple[str | None, str]:
    """CN, MCI, AD, OTHER or None, and the columns and the policy that decided.

    Raises:
        BadCell: a code that decides is unknown, or contradicts another.
    """
    status = row.code("NACCUDSD", {"1": "1", "2": "2", "3": "3", "4": "4"}, GONE)
    source = f"UDS NACCUDSD {status}"
    if status is None:
        return None, "UDS NACCUDSD not given"
    if status == "1":
        return "CN", source
    if status == "2":
        return OTHER, f"{source}: impaired, not MCI"
    if status == "3" and not mci_due_to_ad:
        return "MCI", source
    cause = row.code("NACCALZD", {"0": "0", "1": "1", "8": "8"}, GONE)
    if cause is None:
        return None, f"{source}, NACCALZD not given"
    if cause == "8":
        raise row.bad("NACCALZD", f"0 or 1, as NACCUDSD {status} needs (8 means no impairment)")
    source = f"{source}, NACCALZD {cause}"
    if status == "3":
        return (
            "MCI" if cause == "1" else OTHER
        ), f"{source} -> {'MCI' if cause == '1' else 'not AD'} (--mci-due-to-ad)"
    if cause == "0":
        return OTHER, f"{source}: dementia, not AD"
    if ad == "any":
        return "AD", f"{source} -> AD (--ad any)"
    if ad == "primary":
        column, is_first = "NACCALZP", row.code("NACCALZP", ALZP_IS_PRIMARY, GONE)
    else:
        column, is_first = "NACCETPR", row.number("NACCETPR", 1, 99, GONE, whole=True) == 1
    source = f"{source}, {column} {row[column]}"
    return ("AD" if is_first else OTHER), f"{source} -> {'AD' if is_first else 'AD not primary'} (--ad {ad})"


def _person(subject_id: str, rows: list[Row], faults: list[str]) -> Person:
    """Sex, education and APOE as the first visit that has them says. Another sex later is a fault of the person."""
    sexes = [(row, sex) for row in rows if (sex := row.code("SEX", SEX, MISSING_SEX))]
    for row, sex in sexes:
        if sex != sexes[0][1]:
            fault = f"{sexes[0][0].where} and row {row.line}, column 'SEX': {sexes[0][1]} and {sex} for {subject_id}"
            faults.append(fault)
            return Person(subject_id=subject_id, fault=fault)
    years = [value for row in rows if (value := row.number("EDUC", 0, 36, MISSING_EDUC, whole=True)) is not None]
    values = {
        "sex": sexes[0][1] if sexes else None,
        "education_years": years[0] if years else None,
        "apoe_e4": _first_apoe_e4(rows, faults),
    }
    return Person(subject_id=subject_id, values=values)


def _first_apoe_e4(rows: list[Row], faults: list[str]) -> int | None:
    """The first valid value. Stray values, and changes between visits, are known of releases: noted, not dropped."""
    first, where = None, ""
    for row in rows:
        try:
            value = _apoe_e4(row)
        except BadCell as error:
            faults.append(f"{error}; the person's first valid value is used")
            continue
        if first is None:
            first, where = value, row.where
        elif value is not None and value != first:
            faults.append(f"{row.where}: APOE says {value} e4 alleles, {where} says {first}; the first is used")
    return first


def _apoe_e4(row: Row) -> int | None:
    """The e4 alleles, from either column.

    Raises:
        BadCell: no column has a valid value, and one has a stray one.
    """
    stray = None
    for column, meanings in (("NACCNE4S", {"0": 0, "1": 1, "2": 2}), ("NACCAPOE", E4_OF_NACCAPOE)):
        try:
            value = row.code(column, meanings, (*GONE, "9"))
        except BadCell as error:
            stray = error
            continue
        if value is not None:
            return value
    if stray:
        raise stray
    return None


def letters(text: str) -> str:
    """A description as LONI's folders and the tables have in common."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def plain(number: str) -> str:
    """`3.0` and `03` as `3`; text that is no number as it is."""
    try:
        return f"{float(number):g}"
    except ValueError:
        return number
