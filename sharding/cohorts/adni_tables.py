"""The clinical tables of ADNI: people by RID, and their visits.

The single tables come first (DXSUM, CDR, MMSE, MOCA, PTDEMOG, APOERES); ADNIMERGE fills in what they do not know, so a
download with either works. Tables are joined by RID, the number at the end of the PTID, and the harmonised visit code.
"""

import datetime
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sharding.release import OTHER, Person, Visit
from sharding.tables import BadCell, Entry, Row, TablesFolder, find_table, index_rows, read_table

log = logging.getLogger(__name__)

MISSING = ("-4", "-1")
PTID = re.compile(r"(?<!\d)(\d{3}_S_\d{4,5})(?!\d)")
NAMES = {
    "RID": ("PTID", "subject_id"),
    "VISCODE": ("VISCODE2",),
    "EXAMDATE": ("VISDATE",),
    "PHASE": ("Phase", "COLPROT"),
}
STEMS = {  # the newest name first
    "DXSUM": ("All_Subjects_DXSUM", "DXSUM", "DXSUM_PDXCONV", "DXSUM_PDXCONV_ADNIALL"),
    **{name: (f"All_Subjects_{name}", name) for name in ("CDR", "MMSE", "MOCA", "PTDEMOG", "APOERES", "REGISTRY")},
    "ADNIMERGE": ("ADNIMERGE",),
}
BASELINE = ("bl", "sc", "scmri")  # one visit; what bl does not know is taken from the screening
IGNORED = ("f", "uns1")  # screen failures and unscheduled visits

DIAGNOSIS = {"1": "CN", "2": "MCI", "3": "AD"}
DIAGNOSES = {  # the first column with a value decides: the third is ADNI1's, the second ADNIGO's and ADNI2's
    "DIAGNOSIS": DIAGNOSIS,
    "DXCHANGE": {**dict.fromkeys("179", "CN"), **dict.fromkeys("248", "MCI"), **dict.fromkeys("356", "AD")},
    "DXCURREN": DIAGNOSIS,
}
OTHER_DEMENTIA = {"DXOTHDEM": "1", "DXDDUE": "2"}
MERGED_DIAGNOSIS = {"CN": "CN", "NL": "CN", "MCI": "MCI", "Dementia": "AD"}
GRADES = {grade: grade for grade in ("0", "0.5", "1", "2", "3")}
BOXES = ("CDMEMORY", "CDORIENT", "CDJUDGE", "CDCOMMUN", "CDHOME", "CDCARE")


@dataclass(frozen=True)
class Diagnosis:
    """What a row says; two rows are of one opinion if they say the same, whatever column says it."""

    name: str
    source: str = field(compare=False)
    phase: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.source})"


@dataclass(frozen=True)
class AgeAnchor:
    """A day and the age on it."""

    day: datetime.date
    age_years: float
    source: str


@dataclass(frozen=True)
class Clinic:
    """All tables together, by RID."""

    people: dict[int, Person]
    ages: dict[int, AgeAnchor]
    visits: dict[int, list[Visit]]


def read_clinic(folder: TablesFolder, faults: list[str]) -> Clinic:
    """Reads the tables below `folder`; cells that cannot be used go to `faults` and make their visit or person faulty.

    Raises:
        ValueError: neither DXSUM nor ADNIMERGE is there, or a table is not what it should be.
    """

    def table(name: str, needed: tuple[str, ...], key: Callable, values: Callable) -> dict:
        path = find_table(folder, STEMS[name], required=False)
        if path is None:
            absent.append(name)
            return {}
        log.info("%s: %s", name, path)
        index = index_rows(_rows(path, needed), key, values, faults)
        for entry in index.values():
            if bad_cell := entry.values.pop("bad_cell", ""):
                entry.fault = entry.fault or bad_cell
                faults.append(bad_cell)
        return index

    absent: list[str] = []
    by_visit = {
        "DXSUM": table(
            "DXSUM", ("VISCODE", "EXAMDATE", "|".join(DIAGNOSES)), _visit_key, _dated(_diagnosis, "diagnosis")
        ),
        "CDR": table("CDR", ("VISCODE", "CDGLOBAL"), _visit_key, _dated(_cdr, "cdr_global", "cdr_sb")),
        "MMSE": table("MMSE", ("VISCODE", "MMSCORE"), _visit_key, _dated(_mmse, "mmse")),
        "MOCA": table("MOCA", ("VISCODE",), _visit_key, _dated(_moca, "moca")),
        "REGISTRY": table("REGISTRY", ("VISCODE", "EXAMDATE"), _visit_key, _dated(lambda row: {})),
        "ADNIMERGE": table("ADNIMERGE", MERGED_COLUMNS, _visit_key, _dated(_merged, *MERGED)),
    }
    demographics = table("PTDEMOG", ("VISCODE", "PTGENDER", "PTEDUCAT", "PTDOBYY|PTDOB"), _visit_key, _demographics)
    genes = table("APOERES", ("APGEN1|GENOTYPE",), _rid, _apoe)
    if {"DXSUM", "ADNIMERGE"} <= set(absent):
        raise ValueError(f"{folder}: neither a table DXSUM nor ADNIMERGE (a date may follow); check --tables")
    if absent:
        log.info("not there: %s; what they alone know stays empty", ", ".join(absent))

    codes: dict[int, set[str]] = defaultdict(set)
    for index in by_visit.values():
        for rid, code in index:
            codes[rid].add(code)
    visits = {rid: _visits(rid, codes[rid], by_visit) for rid in codes}
    people, ages = _people(demographics, genes, by_visit["ADNIMERGE"], faults)
    return Clinic(people, ages, visits)


def read_date(row: Row, column: str) -> datetime.date | None:
    """A cell as a date, None if missing.

    Raises:
        BadCell: not a date.
        ValueError: the day comes first, so that other dates of the table have been read wrongly.
    """
    try:
        return row.date(column, ("%Y-%m-%d", "%m/%d/%Y"), MISSING)
    except BadCell as error:
        try:
            row.date(column, ("%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y"))
        except BadCell:
            raise error from None
        hint = "has the day first, where ADNI writes 2010-12-31 or 12/31/2010"
        raise ValueError(f"{row.where}, column {column!r}: {row[column]!r} {hint}; download the table again") from None


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a table that has RID and the needed columns; `A|B` is needed if the table has neither."""
    single = [name for name in needed if "|" not in name]
    for row in read_table(path, ["RID", *single], NAMES):
        for names in needed:
            if not any(name in row for name in names.split("|")):
                raise ValueError(f"{path}: no column {' or '.join(names.split('|'))}; download the table again")
        yield row


def _rid(row: Row) -> int:
    text = row.text("RID")
    named = PTID.fullmatch(text)
    rid = int(named[1][6:]) if named else row.number("RID", 1, 99999, whole=True)
    if rid is None:
        raise row.bad("RID", "a person's number")
    ptid = PTID.fullmatch(row["PTID"])
    if ptid and int(ptid[1][6:]) != rid:
        raise row.bad("PTID", f"the PTID of RID {text}")
    return int(rid)


def _visit_key(row: Row) -> tuple[int, str] | None:
    """RID and visit code; VISCODE is local to a phase where VISCODE2 has none."""
    code, local = row.text("VISCODE2", MISSING).lower(), row.text("VISCODE", MISSING).lower()
    months = re.fullmatch(r"m(\d+)", code or local)
    if months:
        code = f"m{int(months[1]):02d}" if int(months[1]) else "bl"
    elif not code and local in (*BASELINE, *IGNORED):
        code = local
    elif not code and local:
        code = f"{row.text('PHASE')} {local}".strip()
    if not code:
        raise row.bad("VISCODE", "a visit such as bl or m12")
    return None if code in IGNORED else (_rid(row), code)


def _dated(values: Callable[[Row], dict[str, object]], *names: str) -> Callable[[Row], dict[str, object]]:
    """Reads the date as well, and keeps it where another cell is bad: the scans of that day must not go elsewhere."""

    def with_date(row: Row) -> dict[str, object]:
        known = {"date": None, **dict.fromkeys(names), "bad_cell": ""}
        try:
            known["date"] = read_date(row, "EXAMDATE")
            return {**known, **values(row)}
        except BadCell as error:
            return {**known, "bad_cell": str(error)}

    return with_date


def _diagnosis(row: Row) -> dict[str, object]:
    for column, codes in DIAGNOSES.items():
        name = row.code(column, codes, MISSING)
        if name is None:
            continue
        source = f"DXSUM {column} {row[column]}"
        if name == "AD":
            for flag, yes in OTHER_DEMENTIA.items():
                if row.code(flag, {"0": "0", "1": "1", "2": "2"}, MISSING) == yes:
                    name, source = OTHER, f"{source}, {flag} {row[flag]}"
                    break
        return {"diagnosis": Diagnosis(name, source, row.text("PHASE"))}
    return {"diagnosis": None}


def _cdr(row: Row) -> dict[str, object]:
    overall = row.code("CDGLOBAL", GRADES, MISSING)
    if "CDRSB" in row:
        total = row.number("CDRSB", 0, 18, MISSING)
    else:
        boxes = [row.code(box, GRADES, MISSING) for box in BOXES]
        total = None if None in boxes else sum(map(float, boxes))
    return {"cdr_global": None if overall is None else float(overall), "cdr_sb": total}


def _mmse(row: Row) -> dict[str, object]:
    return {"mmse": row.number("MMSCORE", 0, 30, MISSING, whole=True)}


def _moca(row: Row) -> dict[str, object]:
    """Older exports have the items without a total; then there is none."""
    return {"moca": row.number("MOCA", 0, 30, MISSING, whole=True)}


def _demographics(row: Row) -> dict[str, object]:
    born = row.number("PTDOBYY", 1880, 2000, MISSING, whole=True)
    if born is None and row.text("PTDOB", MISSING):
        year = re.fullmatch(r"(?:(?:\d{1,2})?/)?(?:\d{1,2}/)?(\d{4})", row["PTDOB"])
        if not year or not 1880 <= int(year[1]) <= 2000:
            raise row.bad("PTDOB", "a date of birth such as 04/1934")
        born = int(year[1])
    return {
        "sex": row.code("PTGENDER", {"1": "M", "2": "F"}, MISSING),
        "education_years": row.number("PTEDUCAT", 0, 36, MISSING),
        "born": born,
    }


def _apoe(row: Row) -> dict[str, object]:
    if "APGEN1" in row:
        alleles = [row.code(column, {"2": "2", "3": "3", "4": "4"}, MISSING) for column in ("APGEN1", "APGEN2")]
        return {"apoe_e4": None if None in alleles else alleles.count("4")}
    genotype = row.text("GENOTYPE", MISSING)
    if genotype and not re.fullmatch("[234]/[234]", genotype):
        raise row.bad("GENOTYPE", "a genotype such as 3/4")
    return {"apoe_e4": genotype.count("4") if genotype else None}


MERGED_COLUMNS = tuple("VISCODE EXAMDATE EXAMDATE_bl DX AGE PTGENDER PTEDUCAT APOE4 MMSE CDRSB".split())
MERGED = ("diagnosis", "mmse", "moca", "cdr_sb", "age", "sex", "education_years", "apoe_e4")


def _merged(row: Row) -> dict[str, object]:
    """A row of ADNIMERGE. DX_bl is the diagnosis at entry, never that of a visit, and is not read."""
    now = row.text("DX").rpartition(" to ")[2]
    if now and now not in MERGED_DIAGNOSIS:
        raise row.bad("DX", f"one of {', '.join(MERGED_DIAGNOSIS)}, or NL to MCI and the like")
    entered, age_years = read_date(row, "EXAMDATE_bl"), row.number("AGE", 18, 110, MISSING)
    sex = row.code("PTGENDER", {"Male": "M", "Female": "F"}, MISSING)
    apoe_e4 = row.code("APOE4", {"0": "0", "1": "1", "2": "2"}, MISSING)
    return {
        "diagnosis": Diagnosis(MERGED_DIAGNOSIS[now], f"ADNIMERGE DX {row['DX']}", row.text("PHASE")) if now else None,
        "mmse": row.number("MMSE", 0, 30, MISSING, whole=True),
        "moca": row.number("MOCA", 0, 30, MISSING, whole=True),
        "cdr_sb": row.number("CDRSB", 0, 18, MISSING),
        "age": AgeAnchor(entered, age_years, "ADNIMERGE AGE") if entered and age_years is not None else None,
        "sex": sex,
        "education_years": row.number("PTEDUCAT", 0, 36, MISSING),
        "apoe_e4": None if apoe_e4 is None else int(apoe_e4),
    }


def _visits(rid: int, codes: set[str], by_visit: dict[str, dict]) -> list[Visit]:
    """The visits of a person; the screening belongs to the baseline."""
    groups = {code: [code] for code in codes if code not in BASELINE}
    if len(groups) < len(codes):
        groups["bl"] = [code for code in BASELINE if code in codes]
    return [_visit(rid, label, members, by_visit) for label, members in sorted(groups.items())]


def _visit(rid: int, label: str, codes: list[str], by_visit: dict[str, dict]) -> Visit:
    """One visit. Each fact is the first that is known, in the order of the tables, then of the codes.

    The date is that of the row with the diagnosis; a table with nothing left to add is not looked at.
    """
    known: dict[str, object] = dict.fromkeys(("diagnosis", "date", "mmse", "moca", "cdr_global", "cdr_sb"))
    fault = ""
    for index in by_visit.values():
        for code in codes:
            entry: Entry | None = index.get((rid, code))
            unknown = {name for name, value in known.items() if value is None}
            news = {name: value for name, value in entry.values.items() if name in unknown} if entry else {}
            if not news:
                continue
            fault = fault or entry.fault
            known |= news
            if news.get("diagnosis") and entry.values["date"]:
                known["date"] = entry.values["date"]
    diagnosis: Diagnosis | None = known.pop("diagnosis")
    when = known.pop("date")
    return Visit(
        subject_id=str(rid),
        when=when,
        label=label,
        diagnosis=diagnosis.name if diagnosis else None,
        diagnosis_source=diagnosis.source if diagnosis else "the visit has no diagnosis",
        values={**known, "visit": label, "phase": diagnosis.phase if diagnosis else ""},
        fault=fault,
    )


def _people(
    demographics: dict[tuple[int, str], Entry],
    genes: dict[int, Entry],
    merged: dict[tuple[int, str], Entry],
    faults: list[str],
) -> tuple[dict[int, Person], dict[int, AgeAnchor]]:
    by_person: dict[int, list[Entry]] = defaultdict(list)
    for (rid, _), entry in sorted(demographics.items(), key=lambda item: _month(item[0][1])):
        by_person[rid].append(entry)
    first_merged: dict[int, Entry] = {}
    for (rid, _), entry in merged.items():
        if not entry.fault:
            first_merged.setdefault(rid, entry)

    people, ages = {}, {}
    for rid in by_person.keys() | genes.keys() | first_merged.keys():
        entries = by_person[rid]
        contradiction = _contradiction(entries)
        faults += [contradiction] if contradiction else []
        entries += [genes[rid]] if rid in genes else []
        fault = next((entry.fault for entry in entries if entry.fault), contradiction)
        facts = [*entries, *([first_merged[rid]] if rid in first_merged else [])]
        values = {name: _first(facts, name) for name in ("sex", "education_years", "apoe_e4")}
        people[rid] = Person(subject_id=str(rid), values=values, fault=fault)
        born, anchor = _first(entries, "born"), _first(facts, "age")
        if born is not None:  # only the year is known: the middle of it is at most half a year off
            anchor = AgeAnchor(datetime.date(int(born), 7, 2), 0.0, "PTDEMOG year of birth")
        if anchor is not None:
            ages[rid] = anchor
    return people, ages


def _month(code: str) -> tuple[int, str]:
    """Sorts visit codes in the order of time; baseline first, unknown codes last."""
    months = re.fullmatch(r"m(\d+)", code)
    return (0 if code in BASELINE else int(months[1]) if months else 10_000, code)


def _first(entries: list[Entry], name: str) -> object:
    return next((entry.values[name] for entry in entries if entry.values.get(name) is not None), None)


def _contradiction(entries: list[Entry]) -> str:
    """Sex and year of birth are the same at every visit; education is that of the first."""
    for name in ("sex", "born"):
        told = [entry for entry in entries if entry.values.get(name) is not None]
        for entry in told[1:]:
            if entry.values[name] != told[0].values[name]:
                said, says = told[0].values[name], entry.values[name]
                return f"{told[0].where} and {entry.where} contradict each other: {name} {said} and {says}"
    return ""
