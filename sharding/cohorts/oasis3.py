"""OASIS-3, longitudinal: about 2,800 MR sessions of 1,378 people, clinical visits on days of their own.

There are no dates, only days since a person's entry. Reads the images, at any depth, in the layouts of NITRC and XNAT:

    OAS30001_MR_d0757/anat2/sub-OAS30001_ses-d0757[_run-01]_T1w.nii.gz      simplified; a .json beside it
    OAS30001_MR_d0757/anat2/NIFTI/...  and  .../scans/anat2/resources/NIFTI/files/...

and the tables `OASIS3_UDSd1_diagnoses`, `OASIS3_UDSb4_cdr` and `OASIS3_demographics`, or the older `ADRC Clinical Data`
with `subjects` or `MR Sessions`.

Of each session the first run of T1w is taken. A scan gets the nearest visit within --window-days on either side. The
diagnosis is what the visit's form D1 says: NORMCOG is CN, an MCI column MCI, DEMENTED with an Alzheimer column AD,
everything else another diagnosis; two of these at once are no diagnosis. Where D1 says nothing, the text `dx1` of form
B4 decides. Age is the age at entry plus the day of the scan, at most 90, as the release never tells more.

Example:
    python -m sharding.manifest oasis3 --images oasis3/images --tables oasis3/tables --out oasis3.csv
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.release import (
    DAYS_PER_YEAR,
    OTHER,
    FoundScan,
    Person,
    Release,
    ReleaseOptions,
    Visit,
    drop_copies,
    files_below,
    merge_people,
    nearest,
    one_each,
    one_per,
)
from sharding.tables import BadCell, Row, TablesFolder, find_table, read_table

SUBJECT = re.compile(r"OAS3\d{4}")
SESSION_FOLDER = re.compile(r"(OAS3\d{4})_MR_d(\d+)")
IMAGE_NAME = re.compile(r"sub-(OAS3\d{4})_sess?-d(\d+)((?:_[A-Za-z]+-[A-Za-z0-9]+)*)_([A-Za-z0-9]+)")  # `sess` occurs
NOT_THE_WHOLE_HEAD = re.compile(r"tse|hippo", re.IGNORECASE)
TOP_CODED_YEARS = 90

MCI_COLUMNS = ("MCIAMEM", "MCIAPLUS", "MCINON1", "MCINON2")
AD_COLUMNS = ("PROBAD", "POSSAD", "alzdis")
STATES = {"CN": ("NORMCOG",), "MCI": MCI_COLUMNS, "dementia": ("DEMENTED",), OTHER: ("IMPNOMCI",)}
MISSING = (".",)

CN_TEXTS = ("cognitively normal", "no dementia")
AD_BEGINNINGS = ("ad dem", "dat")
UNCERTAIN_TEXTS = ("0.5 in memory only", "unc: ques. impairment", "uncertain dementia")

E4_ALLELES = {"22": "0", "23": "0", "32": "0", "33": "0", "24": "1", "42": "1", "34": "1", "43": "1", "44": "2"}
CDR = {"0": "0", "0.5": "0.5", "1": "1", "2": "2", "3": "3"}


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """What decides about OASIS-3."""

    window_days: int = 180
    """A scan gets the nearest visit, before or after, if it is at most this far."""
    uncertain_as_mci: bool = False
    """Where only `dx1` decides: "uncertain dementia", "Unc: ques. Impairment" and "0.5 in memory only" are MCI."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The table with CDR, MMSE and dx1, and what its columns are called."""

    name: str
    subject: str
    day: str
    mmse: str
    cdr_global: str
    cdr_sb: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that must be there."""
        return (self.subject, self.day, self.mmse, self.cdr_global, self.cdr_sb, "dx1")


B4 = Scores(name="UDSb4", subject="OASISID", day="days_to_visit", mmse="MMSE", cdr_global="CDRTOT", cdr_sb="CDRSUM")
ADRC = Scores(
    name="ADRC Clinical Data",
    subject="Subject",
    day="ADRC_ADRCCLINICALDATA ID",  # ends in _d and the day
    mmse="mmse",
    cdr_global="cdr",
    cdr_sb="sumbox",
)


def read(options: Options) -> Release:
    """The MR sessions of OASIS-3, each with its nearest visit.

    Raises:
        ValueError: a table is missing, or misses a column.
    """
    release = Release("OASIS3")

    scans = drop_copies(release, _scans(release, options.images))
    if options.one_scan_per != "all":
        scans = one_per(release, scans, key=lambda scan: scan.session_id)

    people, visits = _people_and_visits(release, options)

    for scan in sorted(scans, key=lambda scan: (scan.subject_id, scan.when, scan.rank)):
        person = people.get(scan.subject_id)
        visit, gap_days = nearest(visits.get(scan.subject_id, ()), scan.when, options.window_days) or (None, None)
        no_visit = f"no visit within {options.window_days} days"
        if scan.subject_id not in visits:
            no_visit = "no visit of this subject in the tables"
        known = {"age_years": _age_years(person, scan.when), "field_strength_t": _field_strength_t(release, scan.image)}
        release.keep(replace(scan, values=known), person, visit, gap_days, no_visit)
    return release


# 1. scans


def _scans(release: Release, images: Path) -> Iterator[FoundScan]:
    """The T1-weighted images; all others are dropped."""
    for folder, names in files_below(images):
        in_session = next((found for part in reversed(folder.parts) if (found := SESSION_FOLDER.fullmatch(part))), None)
        for name in names:
            if not name.endswith((".nii", ".nii.gz")):
                continue
            stem = name.removesuffix(".gz").removesuffix(".nii")
            named = IMAGE_NAME.fullmatch(stem)
            subject, day, entities, kind = named.groups() if named else ("", "", "", "")
            scan = FoundScan(
                scan_id=stem,
                subject_id=subject,
                session_id=f"{subject}_MR_d{int(day):04d}" if named else "",
                image=folder / name,
                when=int(day) if named else None,
                rank=(_entity(entities, "echo", 0), _entity(entities, "run", 1)),
            )
            if not named:
                release.drop(scan, "not a name of this release", "a scan is named like sub-OAS30001_ses-d0757_T1w")
            elif kind != "T1w":
                release.drop(scan, "not T1-weighted", kind)
            elif NOT_THE_WHOLE_HEAD.search(entities):
                release.drop(scan, "not a T1 of the whole head", entities.lstrip("_"))
            elif in_session and (in_session[1], int(in_session[2])) != (subject, scan.when):
                release.drop(scan, "its name and its folder are of two sessions", in_session[0])
            else:
                yield scan


def _entity(entities: str, name: str, absent: int) -> int:
    found = re.search(rf"_{name}-(\d+)", entities)
    return int(found[1]) if found else absent


def _field_strength_t(release: Release, image: Path) -> float | None:
    """From the sidecar beside the image, or in the folder BIDS beside its folder NIFTI."""
    beside = image.with_name(image.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    parts = list(beside.parts)
    if "NIFTI" in parts:
        parts[len(parts) - 1 - parts[::-1].index("NIFTI")] = "BIDS"
    for sidecar in dict.fromkeys((beside, Path(*parts))):
        try:
            tesla = float(json.loads(sidecar.read_bytes())["MagneticFieldStrength"])
        except (FileNotFoundError, KeyError):
            continue
        except (OSError, TypeError, ValueError) as error:
            release.faults.append(f"{sidecar}: no field strength can be read ({error})")
            continue
        return next((nominal for nominal in (1.5, 3.0) if abs(tesla - nominal) < 0.2), tesla)  # 2.89 is called 3
    return None


def _age_years(person: Person | None, day: int) -> float | None:
    at_entry = person and person.values.get("age_at_entry_years")
    return None if at_entry is None else min(at_entry + day / DAYS_PER_YEAR, TOP_CODED_YEARS)


# 2. people and visits


def _people_and_visits(release: Release, options: Options) -> tuple[dict[str, Person], dict[str, list[Visit]]]:
    folder = options.tables_folder
    table = find_table(folder, ["OASIS3_UDSb4_cdr", "ADRC Clinical Data", "ADRC_Clinical_Data"])
    undated: dict[str, str] = {}
    scores = B4 if table.name.lower().startswith("oasis3_") else ADRC
    by_dx1 = _dated(
        read_table(table, scores.columns),
        scores,
        lambda row: _read_scores(row, scores, options.uncertain_as_mci),
        release,
        undated,
    )
    by_d1 = {}
    if scores is B4:
        d1 = find_table(folder, ["OASIS3_UDSd1_diagnoses"])
        needed = ["OASISID", "days_to_visit", *sum(STATES.values(), ()), *AD_COLUMNS]
        by_d1 = _dated(read_table(d1, needed, {"alzdis": ("ALZDIS",)}), B4, _read_d1, release, undated)
        facts = _demographics(find_table(folder, ["OASIS3_demographics"]))
    else:
        facts = _adrc_facts(folder, table)

    people = merge_people(facts)
    for subject, fault in undated.items():  # any scan of this person might belong to that visit
        people[subject] = replace(people.get(subject, Person(subject_id=subject)), fault=fault)
    visits: dict[str, list[Visit]] = {}
    for key in sorted(by_dx1.keys() | by_d1.keys()):
        visits.setdefault(key[0], []).append(_one_visit(by_d1.get(key), by_dx1.get(key)))
    everybody = (*people.values(), *(visit for some in visits.values() for visit in some))
    release.faults += [owner.fault for owner in everybody if owner.fault]
    return people, visits


def _dated(
    rows: Iterable[Row], table: Scores, read_visit: Callable[[Row], Visit], release: Release, undated: dict[str, str]
) -> dict[tuple[str, int], Visit]:
    """The visits of a table by subject and day; subjects with a day that cannot be read go into `undated`."""

    def dated() -> Iterator[tuple[Row, Visit]]:
        for row in rows:
            subject = row[table.subject]
            day = re.fullmatch(r"(?:.*_d)?(-?\d+)(?:\.0)?", row[table.day])
            if not SUBJECT.fullmatch(subject):
                release.faults.append(str(row.bad(table.subject, "a subject such as OAS30001; the row is not used")))
            elif not day:
                undated.setdefault(subject, str(row.bad(table.day, "a number of days since entry")))
            else:
                try:
                    visit = read_visit(row)
                except BadCell as fault:
                    visit = Visit(subject_id=subject, when=None, fault=str(fault))
                yield row, replace(visit, subject_id=subject, when=int(day[1]))

    return one_each(dated(), key=lambda visit: (visit.subject_id, visit.when))


def _read_d1(row: Row) -> Visit:
    """What form D1 says; without a diagnosis and a source if it says nothing."""
    said = {state: [column for column in columns if _is_set(row, column)] for state, columns in STATES.items()}
    said = {state: columns for state, columns in said.items() if columns}
    shown = "UDSd1 " + ", ".join(f"{column} 1" for columns in said.values() for column in columns)
    if not said:
        diagnosis, source = None, ""
    elif len(said) > 1:
        diagnosis, source = None, f"{shown}: more than one state, no diagnosis"
    elif "dementia" in said:
        causes = [column for column in AD_COLUMNS if _is_set(row, column)]
        diagnosis = "AD" if causes else OTHER
        source = ", ".join([shown, *(f"{column} 1" for column in causes)])
    else:
        diagnosis, source = next(iter(said)), shown
    return Visit(subject_id="", when=None, diagnosis=diagnosis, diagnosis_source=source)


def _is_set(row: Row, column: str) -> bool:
    return row.code(column, {"0": "0", "1": "1"}, MISSING) == "1"


def _read_scores(row: Row, table: Scores, uncertain_as_mci: bool) -> Visit:
    """The scores, with the diagnosis that `dx1` alone would give."""
    cdr = row.code(table.cdr_global, CDR, MISSING)
    values = {
        "mmse": row.number(table.mmse, 0, 30, MISSING, whole=True),
        "cdr_global": None if cdr is None else float(cdr),
        "cdr_sb": row.number(table.cdr_sb, 0, 18, MISSING),
    }
    text = row.text("dx1", MISSING)
    diagnosis, policy = _diagnose_dx1(text, uncertain_as_mci)
    source = f"{table.name} dx1 {text!r}{policy}" if text else f"{table.name} dx1 missing"
    return Visit(subject_id="", when=None, diagnosis=diagnosis, diagnosis_source=source, values=values)


def _diagnose_dx1(text: str, uncertain_as_mci: bool) -> tuple[str | None, str]:
    """The diagnosis of a text, and the policy that decided if one did."""
    text = text.lower()
    if not text:
        return None, ""
    if text in CN_TEXTS:
        return "CN", ""
    if text.startswith(AD_BEGINNINGS):
        return "AD", ""
    if text in UNCERTAIN_TEXTS:
        return ("MCI", " -> MCI (--uncertain-as-mci)") if uncertain_as_mci else (OTHER, " (not --uncertain-as-mci)")
    return OTHER, ""


def _one_visit(d1: Visit | None, dx1: Visit | None) -> Visit:
    """The forms of one day as one visit: D1 decides, and dx1 where it says nothing."""
    if d1 is None:
        return dx1
    if dx1 is None:
        return replace(d1, diagnosis_source=d1.diagnosis_source or "UDSd1 says nothing, no dx1 of that day")
    decides = d1 if d1.diagnosis_source else dx1
    return replace(
        dx1,
        diagnosis=decides.diagnosis,
        diagnosis_source=decides.diagnosis_source,
        fault=d1.fault or dx1.fault,
    )


def _demographics(table: Path) -> Iterator[tuple[Row, Person]]:
    columns = {"sex": "GENDER", "age_at_entry_years": "AgeatEntry", "education_years": "EDUC", "apoe_e4": "APOE"}
    for row in read_table(table, ["OASISID", *columns.values()]):
        yield row, _person(row, "OASISID", columns)


def _adrc_facts(folder: TablesFolder, clinical: Path) -> Iterator[tuple[Row, Person]]:
    """Age at entry and APOE stand with every visit; sex with the subjects or the MR sessions."""
    columns = {"age_at_entry_years": "ageAtEntry", "apoe_e4": "apoe"}
    for row in read_table(clinical, ["Subject", *columns.values()]):
        yield row, _person(row, "Subject", columns)
    for row in read_table(find_table(folder, ["subjects", "MR Sessions", "MR_Sessions"]), ["Subject", "M/F"]):
        yield row, _person(row, "Subject", {"sex": "M/F", "education_years": "Education"})


def _person(row: Row, subject: str, columns: dict[str, str]) -> Person:
    try:
        if not SUBJECT.fullmatch(row[subject]):
            raise row.bad(subject, "a subject such as OAS30001; the row is not used")
        values = {name: FACTS[name](row, column) for name, column in columns.items()}
        return Person(subject_id=row[subject], values=values)
    except BadCell as fault:
        return Person(subject_id=row[subject], fault=str(fault))


FACTS = {
    "sex": lambda row, column: row.code(column, {"1": "M", "2": "F", "M": "M", "F": "F"}, MISSING),
    "age_at_entry_years": lambda row, column: row.number(column, 0, 120, MISSING),
    "education_years": lambda row, column: row.number(column, 0, 36, (*MISSING, "99")),
    "apoe_e4": lambda row, column: row.code(column, E4_ALLELES, MISSING),
}
