"""AIBL, as downloaded from LONI: images by RID and series, tables of the non-imaging data.

    images/AIBL/RID/SERIES/2008-05-12_10_31_00.0/I123456/*.dcm, or AIBL_RID_MR_..._I123456.nii
    tables/Data_extract_3.3.0/aibl_pdxconv_01-Jun-2018.csv, aibl_ptdemog_..., aibl_mmse_..., and so on

The diagnosis is `aibl_pdxconv` DXCURREN of the scan's visit: 1 CN, 2 MCI, 3 AD; a set DXPARK or DXOTHDEM is another
disease, and dropped. The visit of a scan is, in this order: the one whose MRI table has the date of the scan's folder
(which also tells 1.5 from 3 tesla); the `Visit` of the collection's CSV, if it lies with the tables; for sagittal
series the baseline (RID 342 and 557: m54); else the nearest. A visit more than --window-days away is none. Age is the
scan's year minus the year of birth. -4 is missing.

Example:
    python -m sharding.manifest aibl --images aibl/images --tables aibl/tables --out aibl.csv
"""

import datetime
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sharding.release import (
    OTHER,
    FoundScan,
    Person,
    Release,
    ReleaseOptions,
    Visit,
    drop_copies,
    files_below,
    nearest,
    one_per,
)
from sharding.tables import Entry, Row, TablesFolder, find_by_header, find_table, index_rows, read_table

MISSING = ("-4",)
DIAGNOSIS = {"1": "CN", "2": "MCI", "3": "AD"}
OTHER_DISEASES = ("DXPARK", "DXOTHDEM")
FIELD_STRENGTH_T = {"aibl_mri3meta": 3.0, "aibl_mrimeta": 1.5}
DATED = ("aibl_mri3meta", "aibl_mrimeta", "aibl_cdr", "aibl_flutemeta", "aibl_mmse", "aibl_pibmeta")
REQUIRED = ("aibl_mri3meta", "aibl_mrimeta", "aibl_cdr", "aibl_mmse")
COLLECTION_COLUMNS = ("Image Data ID", "Subject", "Visit")
COLLECTION_VISITS = {"Base": "bl", "1": "bl", "2": "m18", "3": "m36", "4": "m54"}

T1_SERIES = re.compile(
    r"MPRAGE|MPRAGE_ADNI_confirmed(_RPT|_REPEAT|_REPEATX2)?|MPRAGE_ADNI_conf_REPEAT|"
    r"MPRAGESAGISOp2ND|MPRAGE_SAG_ISO_p2(_ND)?",
    re.IGNORECASE,
)
SAGITTAL_AT_M54 = ("342", "557")
NOT_OF_THE_RELEASE = "0151083"  # a folder that came into the download by mistake
FOLDER_DATE = re.compile(r"(\d{4}-\d{2}-\d{2})_\d{2}_\d{2}_\d{2}(?:\.\d+)?")
NIFTI, DICOM = 0, 1  # flavours of the download, in the order of preference
IMAGE_ID = re.compile(r"_I(\d+)\.(?:nii|nii\.gz|dcm)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """AIBL."""

    window_days: int = 90
    """A visit further away than this, before or after the scan, gives it no diagnosis."""


@dataclass
class Tables:
    """The tables by person (RID) or by visit (RID, VISCODE)."""

    people: dict[str, Entry]
    genes: dict[str, Entry]
    diagnoses: dict[tuple[str, str], Entry]
    dated: dict[str, dict[tuple[str, str], Entry]]
    """Every table with a date, by its name; aibl_mmse and aibl_cdr have their score as well."""
    collection: dict[str, Entry]
    """By image id."""
    visits: dict[str, dict[str, Visit]] = field(default_factory=dict)
    """By RID, then VISCODE."""


def read(options: Options) -> Release:
    """Every scan of the release, as a row or dropped with a reason.

    Raises:
        ValueError: a table is missing or is not what it should be.
    """
    release = Release("AIBL")
    scans = drop_copies(release, _list_scans(options.images, release))
    tables = _read_tables(options.tables_folder, release.faults)
    linked = {}
    for scan in sorted(scans, key=lambda scan: (scan.subject_id, scan.when, scan.rank, scan.scan_id)):
        link = _link(scan, tables, options.window_days)
        if link.fault:
            release.drop(scan, link.fault, link.how)
        else:
            linked[scan.scan_id] = _named(scan, link, tables.people.get(scan.subject_id)), link
    kept = [scan for scan, _ in linked.values()]
    if options.one_scan_per != "all":
        kept = one_per(release, kept, key=lambda scan: (scan.subject_id, scan.session_id))
    people = {rid: _person(rid, tables) for rid in {scan.subject_id for scan in kept}}
    for scan in kept:
        link = linked[scan.scan_id][1]
        release.keep(scan, people[scan.subject_id], link.visit, link.gap, link.how)
    return release


def _list_scans(images: Path, release: Release) -> list[FoundScan]:
    """The T1 scans, NIfTI before DICOM; other images are dropped."""
    scans = []
    for folder, names in files_below(images):
        nifti = [name for name in names if name.lower().endswith((".nii", ".nii.gz"))]
        dicom = [name for name in names if name.lower().endswith(".dcm")]
        found = [(folder / name, name, NIFTI) for name in nifti]
        series = {IMAGE_ID.search(name)[1]: name for name in dicom if IMAGE_ID.search(name)} or dict.fromkeys(dicom[:1])
        found += [(folder, name or dicom[0], DICOM) for name in series.values()]
        for image, name, flavour in found:
            scan, reason, detail = _found(image, folder, name, flavour)
            if not reason and flavour == DICOM and len(series) > 1:
                reason, detail = "a DICOM folder with several images", "give each image id a folder of its own"
            if reason:
                release.drop(scan, reason, detail)
            else:
                scans.append(scan)
    return sorted(scans, key=lambda scan: (scan.rank[-1], str(scan.image)))


def _found(image: Path, folder: Path, name: str, flavour: int) -> tuple[FoundScan, str, str]:
    """A scan from its place, and why it is not used."""
    parts = folder.parts
    place = next((i for i in reversed(range(2, len(parts))) if FOLDER_DATE.fullmatch(parts[i])), None)
    rid, series = (parts[place - 2], parts[place - 1]) if place else ("", "")
    numbered = IMAGE_ID.search(name) or (flavour == DICOM and re.fullmatch(r"I(\d+)", folder.name))
    scan_id = f"I{numbered[1]}" if numbered else "_".join([*filter(None, (rid, series)), name.split(".")[0]])
    when = _folder_date(parts[place]) if place else None
    scan = FoundScan(
        scan_id=scan_id,
        subject_id=rid,
        session_id=when.isoformat() if when else "",
        image=image,
        when=when,
        rank=("SAG" in series.upper(), re.search("_RPT|REPEAT", series.upper()) is not None, flavour),
        values={"series": series},
    )
    named = re.match(r"AIBL_(\d+)_", name)
    if when is None:
        return scan, "not in the folders of the download", "expected RID/SERIES/YYYY-MM-DD_hh_mm_ss.0/I123456/"
    if rid == NOT_OF_THE_RELEASE:
        return scan, "a folder that is not part of the release", rid
    if not re.fullmatch(r"[1-9]\d*", rid):
        return scan, "the subject's folder is not named by a RID", rid
    if named and named[1] != rid:
        return scan, "file and folder name different subjects", f"{name} below {rid}"
    if not T1_SERIES.fullmatch(series):
        return scan, "not a T1-weighted series", series
    return scan, "", ""


def _folder_date(name: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(FOLDER_DATE.fullmatch(name)[1])
    except ValueError:
        return None


def _read_tables(folder: TablesFolder, faults: list[str]) -> Tables:
    """All tables; `faults` takes the cells that cannot be used."""

    def table(stem: str, columns: tuple[str, ...], key, values, required: bool = True) -> dict:
        path = find_table(folder, [stem], required=required)
        return index_rows(_cut(read_table(path, columns), stem), key, values, faults) if path else {}

    visit_columns = ("RID", "VISCODE")
    scores = {"aibl_mmse": ("MMSCORE", _mmse), "aibl_cdr": ("CDGLOBAL", _cdr)}
    dated = {}
    for stem in DATED:
        column, score = scores.get(stem, (None, lambda row: {}))
        columns = (*visit_columns, "EXAMDATE", *([column] if column else []))
        dated[stem] = table(
            stem,
            columns,
            _visit_key,
            lambda row, score=score: {"date": _exam_date(row), **score(row)},
            stem in REQUIRED,
        )
    tables = Tables(
        people=table("aibl_ptdemog", ("RID", "PTGENDER", "PTDOB"), _rid, _demographics),
        genes=table("aibl_apoeres", ("RID", "APGEN1", "APGEN2"), _rid, _apoe),
        diagnoses=table("aibl_pdxconv", (*visit_columns, "DXCURREN", *OTHER_DISEASES), _visit_key, _diagnosis),
        dated=dated,
        collection=index_rows(_collection_rows(folder), _image_id, _collection_visit, faults),
    )
    keys = {key for part in (tables.diagnoses, *dated.values()) for key in part}
    visits = defaultdict(dict)
    for rid, code in keys:
        visits[rid][code] = _visit(rid, code, tables)
    tables.visits = dict(visits)
    return tables


def _cut(rows: Iterator[Row], stem: str) -> Iterator[Row]:
    """Rows of aibl_flutemeta without what lies right of the header: a comma in a late column shifts only that."""
    for row in rows:
        if stem == "aibl_flutemeta":
            row = Row(row.file, row.line, row.columns, row.width, row.cells[: row.width])
        yield row


def _collection_rows(folder: TablesFolder) -> Iterator[Row]:
    for path in find_by_header(folder, COLLECTION_COLUMNS):
        yield from read_table(path, COLLECTION_COLUMNS)


def _rid(row: Row) -> str:
    rid = row.number("RID", 1, 1e6, whole=True)
    if rid is None:
        raise row.bad("RID", "a person's number")
    return str(int(rid))


def _visit_key(row: Row) -> tuple[str, str]:
    code = row.text("VISCODE").lower()
    if not re.fullmatch(r"[a-z]+\d*", code):
        raise row.bad("VISCODE", "a visit such as bl or m18")
    return _rid(row), code


def _image_id(row: Row) -> str | None:
    number = row.text("Image Data ID").lstrip("ID")
    return f"I{number}" if number else None


def _collection_visit(row: Row) -> dict[str, object]:
    months = re.fullmatch(r"(\d+) Mo", row.text("Visit"))
    visit = f"m{int(months[1])}" if months else row.code("Visit", COLLECTION_VISITS)
    return {"rid": row.text("Subject"), "visit": visit}


def _exam_date(row: Row) -> datetime.date | None:
    return row.date("EXAMDATE", ["%m/%d/%Y"], MISSING)


def _mmse(row: Row) -> dict[str, object]:
    return {"mmse": row.number("MMSCORE", 0, 30, MISSING, whole=True)}


def _cdr(row: Row) -> dict[str, object]:
    value = row.code("CDGLOBAL", {grade: grade for grade in ("0", "0.5", "1", "2", "3")}, MISSING)
    return {"cdr_global": None if value is None else float(value)}


def _apoe(row: Row) -> dict[str, object]:
    alleles = [row.code(column, {"2": "2", "3": "3", "4": "4"}, MISSING) for column in ("APGEN1", "APGEN2")]
    return {"apoe_e4": None if None in alleles else alleles.count("4")}


def _demographics(row: Row) -> dict[str, object]:
    born = row.text("PTDOB", MISSING)
    year = re.fullmatch(r"/?(\d{4})", born)
    if born and not (year and 1880 <= int(year[1]) <= 1970):
        raise row.bad("PTDOB", "a year of birth such as /1934")
    return {"sex": row.code("PTGENDER", {"1": "M", "2": "F"}, MISSING), "birth_year": int(year[1]) if year else None}


def _diagnosis(row: Row) -> dict[str, object]:
    current = row.code("DXCURREN", DIAGNOSIS, MISSING)
    for column in OTHER_DISEASES:
        if row.code(column, {"0": "no", "1": "yes"}, MISSING) == "yes":
            return {"diagnosis": OTHER, "source": f"aibl_pdxconv {column} 1"}
    source = f"aibl_pdxconv DXCURREN {row['DXCURREN']}" if current else "aibl_pdxconv DXCURREN is missing"
    return {"diagnosis": current, "source": source}


def _visit(rid: str, code: str, tables: Tables) -> Visit:
    """One visit from its rows in all tables; its date is the first that DATED has."""
    key = rid, code
    diagnosis = tables.diagnoses.get(key)
    used = [
        entry for entry in (diagnosis, tables.dated["aibl_mmse"].get(key), tables.dated["aibl_cdr"].get(key)) if entry
    ]
    when = None
    for stem in DATED:
        entry = tables.dated[stem].get(key)
        if entry and (entry.fault or entry.values["date"]):
            used.append(entry)
            when = entry.values.get("date")
            break
    scores = {name: value for entry in used for name, value in entry.values.items() if name in ("mmse", "cdr_global")}
    return Visit(
        subject_id=rid,
        when=when,
        label=code,
        diagnosis=diagnosis.values.get("diagnosis") if diagnosis else None,
        diagnosis_source=diagnosis.values.get("source", "") if diagnosis else f"aibl_pdxconv has no row of {code}",
        values={"mmse": None, "cdr_global": None, **scores},
        fault=next((entry.fault for entry in used if entry.fault), ""),
    )


@dataclass(frozen=True)
class Link:
    """The visit of a scan."""

    visit: Visit | None
    gap: int | None
    how: str
    """What linked them, or why nothing did."""
    field_strength_t: float | None = None
    fault: str = ""
    """Why the scan cannot be used."""


def _link(scan: FoundScan, tables: Tables, window_days: int) -> Link:
    """The steps are in the module's docstring."""
    visits = tables.visits.get(scan.subject_id, {})

    def to(code: str, how: str, field_strength_t: float | None = None) -> Link:
        visit = visits.get(code)
        if visit is None:
            return Link(None, None, f"{how} names {code}, of which no table has a row", field_strength_t)
        gap = (visit.when - scan.when).days if visit.when else None
        if gap is not None and abs(gap) > window_days:
            return Link(None, None, f"{how} names {code}, {gap:+d} days from the scan", field_strength_t)
        return Link(visit, gap, how, field_strength_t)

    def mri(stem: str, code: str) -> Entry | None:
        return tables.dated[stem].get((scan.subject_id, code))

    dated = {
        (code, stem): entry
        for code in visits
        for stem in FIELD_STRENGTH_T
        if (entry := mri(stem, code)) and entry.values.get("date") == scan.when
    }
    codes = sorted({code for code, _ in dated})
    if len(codes) > 1:
        rows = ", ".join(entry.where for entry in dated.values())
        return Link(None, None, f"{scan.when} is the date of {' and '.join(codes)}: {rows}", fault="two visits fit")
    if codes:
        stems = [stem for _, stem in dated]
        return to(codes[0], f"{stems[0]} EXAMDATE", FIELD_STRENGTH_T[stems[0]] if len(stems) == 1 else None)
    listed = tables.collection.get(scan.scan_id)
    if listed and listed.fault:
        return Link(None, None, listed.fault, fault="a table's cell cannot be used")
    if listed and listed.values["rid"].isdigit() and listed.values["rid"] != scan.subject_id:
        detail = f"{listed.where}: {scan.scan_id} is of {listed.values['rid']}, its folder of {scan.subject_id}"
        return Link(None, None, detail, fault="table and folder name different subjects")
    if listed and listed.values["visit"]:
        return to(listed.values["visit"], "the collection's Visit")
    if "SAG" in scan.values["series"].upper():
        return to("m54" if scan.subject_id in SAGITTAL_AT_M54 else "bl", "the rule for sagittal series")
    bad_dates = [entry for stem in FIELD_STRENGTH_T for code in visits if (entry := mri(stem, code)) and entry.fault]
    if bad_dates:  # which scan it is of cannot be known
        return Link(None, None, bad_dates[0].fault, fault="a table's cell cannot be used")
    assessed = [visit for visit in visits.values() if visit.diagnosis or visit.fault]
    found = nearest(assessed, scan.when, window_days) or nearest(visits.values(), scan.when, window_days)
    if found is None:
        why = f"no visit within {window_days} days" if visits else "no table has this person"
        return Link(None, None, why)
    return Link(found[0], found[1], f"nearest within {window_days} days")


def _named(scan: FoundScan, link: Link, person: Entry | None) -> FoundScan:
    """The scan with its age and what its visit decides: session, field strength, how it was linked."""
    birth_year = person.values.get("birth_year") if person else None
    values = {
        **scan.values,
        "age_years": scan.when.year - birth_year if birth_year else None,
        "field_strength_t": link.field_strength_t,
        "visit": link.visit.label if link.visit else "",
        "visit_from": link.how if link.visit else "",
    }
    return replace(scan, session_id=link.visit.label if link.visit else scan.session_id, values=values)


def _person(rid: str, tables: Tables) -> Person | None:
    entries = [part[rid] for part in (tables.people, tables.genes) if rid in part]
    values = {name: value for entry in entries for name, value in entry.values.items() if name != "birth_year"}
    fault = next((entry.fault for entry in entries if entry.fault), "")
    return Person(subject_id=rid, values=values, fault=fault) if entries else None
