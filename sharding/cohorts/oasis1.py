"""OASIS-1, cross-sectional: 436 sessions of 416 people, each an Analyze pair and a row of one table.

Reads `oasis_cross-sectional.csv` (or the site's .xlsx) and, at any depth, the folders of the twelve discs:

    OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.{hdr,img}   t88_gfc
    OAS1_0001_MR1/PROCESSED/MPRAGE/SUBJ_111/OAS1_0001_MR1_mpr_n4_anon_sbj_111.{hdr,img}      sbj_111
    OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.{hdr,img}                                     raw

Of each session the first kind that is there is taken. A session links to the row with its ID; `_MR2` is the same person
again. The diagnosis is the row's CDR: 0 is CN, 1 and above AD, 0.5 as --cdr05 says. A blank CDR is "not assessed":
these people are all under 60, and calling them CN would teach age. `Educ` is a code 1-5, not years: education_code.

Example:
    python -m sharding.manifest oasis1 --images oasis1/images --tables oasis1/tables --out oasis1.csv
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sharding.release import (
    FoundScan,
    Person,
    Release,
    ReleaseOptions,
    Visit,
    drop_copies,
    files_below,
    merge_people,
    one_each,
    one_per,
)
from sharding.tables import BadCell, Row, find_table, read_table

ID = re.compile(r"(OAS1_\d{4})_MR(\d+)")
IMAGE_NAME = re.compile(r"(OAS1_\d{4})_(MR\d+)_(.+)")
KINDS = {
    "t88_gfc": re.compile(r"mpr_n(\d)_anon_111_t88_gfc"),
    "sbj_111": re.compile(r"mpr_n(\d)_anon_sbj_111"),
    "raw": re.compile(r"mpr-(\d+)_anon"),
}
DERIVED = re.compile(r".*_(masked_gfc|fseg)")
COLUMNS = ("ID", "M/F", "Age", "Educ", "MMSE", "CDR", "nWBV", "Delay")
CDR = {"0": "0", "0.5": "0.5", "1": "1", "2": "2", "3": "3"}
FIELD_STRENGTH_T = 1.5  # one scanner for the whole of OASIS-1 and OASIS-2
YOUNG_YEARS = 60

Cdr05 = Literal["mci", "ad", "drop"]


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """What decides about OASIS-1."""

    cdr05: Cdr05 = "mci"
    """CDR 0.5, which the release calls very mild dementia: as MCI, as AD, or left out."""
    image_kind: Literal["first", "t88_gfc", "sbj_111", "raw"] = "first"
    """Which image of a session: the first kind that is there, or this one only."""
    young_controls_as_cn: bool = False
    """People under 60 without a CDR are CN, though nobody assessed them."""


def read(options: Options) -> Release:
    """The sessions of OASIS-1, linked by ID.

    Raises:
        ValueError: the table is missing, or is not as the release has it (columns, IDs, `Delay`, decimals of `nWBV`).
    """
    release = Release("OASIS1")
    table = find_table(options.tables_folder, ["oasis_cross-sectional"], suffixes=(".csv", ".xlsx"))

    scans = _of_one_kind(release, drop_copies(release, _scans(release, options.images)), options.image_kind)
    if options.one_scan_per != "all":
        scans = one_per(release, scans, key=lambda scan: scan.session_id)

    sessions = [(row, _visit(row, options)) for row in read_table(table, COLUMNS, {"Educ": ("EDUC",)})]
    visits = one_each(sessions, key=lambda visit: visit.label)
    people = people_of(sessions, ["sex"])

    keep_sessions(release, scans, people, visits, options.cdr05, f"no row with this ID in {table.name}")
    return release


def _scans(release: Release, images: Path) -> Iterator[FoundScan]:
    """The images of people; those that a scan was made into, halves of pairs and unknown names are dropped."""
    for folder, names in files_below(images):
        for image, fault in analyze_pairs(folder, names):
            named = IMAGE_NAME.fullmatch(image.stem)
            subject, session, rest = named.groups() if named else ("", "", image.stem)
            kind = next((kind for kind, form in KINDS.items() if form.fullmatch(rest)), "")
            number = int(KINDS[kind].fullmatch(rest)[1]) if kind else 0
            scan = FoundScan(
                scan_id=image.stem,
                subject_id=subject,
                session_id=f"{subject}_{session}" if named else "",
                image=image,
                # of the averages the one of most repeats, of the repeats the first
                rank=(list(KINDS).index(kind), number if kind == "raw" else -number) if kind else (),
                values={"image_kind": kind, "field_strength_t": FIELD_STRENGTH_T},
            )
            if fault or not kind:
                derived = named and DERIVED.fullmatch(rest)
                release.drop(scan, "a derived image" if derived else fault or "not a name of this release")
            else:
                yield scan


def analyze_pairs(folder: Path, names: list[str]) -> Iterator[tuple[Path, str]]:
    """Each image of a folder, a pair by its `.hdr`, and what is wrong with it (empty if nothing is)."""
    present = set(names)
    for name in names:
        stem = name[:-4]
        if name.endswith(".hdr"):
            yield folder / name, "" if f"{stem}.img" in present else "a header without its .img"
        elif name.endswith(".img") and f"{stem}.hdr" not in present:
            yield folder / name, "an .img without its .hdr"
        elif name.endswith((".nii", ".nii.gz", ".img.gz")):
            yield folder / name, "not an Analyze pair, as the release has it"


def _of_one_kind(release: Release, scans: Iterable[FoundScan], asked: str) -> list[FoundScan]:
    sessions: dict[str, list[FoundScan]] = {}
    for scan in sorted(scans, key=lambda scan: (scan.session_id, scan.rank)):
        sessions.setdefault(scan.session_id, []).append(scan)
    taken = []
    for found in sessions.values():
        kind = found[0].values["image_kind"] if asked == "first" else asked
        for scan in found:
            if scan.values["image_kind"] == kind:
                taken.append(scan)
            else:
                why = f"{found[0].scan_id} was taken" if asked == "first" else f"--image-kind {asked}"
                release.drop(scan, "another kind of image", why)
    return taken


def _visit(row: Row, options: Options) -> Visit:
    match = session_name(row, "ID", ID, "OAS1_0001_MR1")
    session, subject = match[0], match[1]
    refuse_altered(row, "nWBV", is_a_fraction(row["nWBV"]), "a fraction between 0 and 1")
    if match[2] == "1":
        refuse_altered(row, "Delay", row["Delay"] in ("N/A", "#N/A"), "N/A, as in every row of a first session")
    else:
        refuse_altered(row, "Delay", row["Delay"].removesuffix(".0").isdigit(), "the days since the first session")
    try:
        age_years = row.number("Age", 0, 120)
        education = row.code("Educ", {code: code for code in "12345"})
        values = {
            "age_years": age_years,
            "sex": row.code("M/F", {"M": "M", "F": "F"}),
            "education_code": education and int(education),
            "mmse": row.number("MMSE", 0, 30, whole=True),
            "cdr_global": cdr_global(row),
            "delay_days": row.number("Delay", 0, 10000, missing=("N/A", "#N/A")),
        }
    except BadCell as fault:
        return Visit(subject_id=subject, when=None, label=session, fault=str(fault))
    diagnosis, source = diagnose_cdr(values["cdr_global"], options.cdr05)
    if options.young_controls_as_cn and values["cdr_global"] is None and age_years is not None:
        if age_years < YOUNG_YEARS:
            diagnosis, source = "CN", f"CDR blank, under {YOUNG_YEARS} -> CN (--young-controls-as-cn)"
    return Visit(
        subject_id=subject,
        when=None,
        label=session,
        diagnosis=diagnosis,
        diagnosis_source=source,
        values=values,
    )


# What OASIS-2 does in the same way.


def session_name(row: Row, column: str, form: re.Pattern, example: str) -> re.Match:
    """The parts of a session's name.

    Raises:
        ValueError: the cell has another form, so the table is not as the release has it.
    """
    match = form.fullmatch(row[column])
    refuse_altered(row, column, match is not None, f"a session such as {example}")
    return match


def refuse_altered(row: Row, column: str, is_right: bool, expected: str) -> None:
    """Refuses a table of which one column was spoilt: the others cannot be trusted either.

    Raises:
        ValueError: naming file, row, column and value.
    """
    if not is_right:
        raise ValueError(f"{row.bad(column, expected)}; this copy was altered, take the table from oasis-brains.org")


def is_a_fraction(text: str) -> bool:
    """Whether the text is a number between 0 and 1, both excluded."""
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def cdr_global(row: Row) -> float | None:
    """The CDR of a row, None if it was not assessed.

    Raises:
        BadCell: not 0, 0.5, 1, 2 or 3.
    """
    code = row.code("CDR", CDR)
    return None if code is None else float(code)


def diagnose_cdr(cdr: float | None, cdr05: Cdr05) -> tuple[str | None, str]:
    """The diagnosis that a CDR stands for, and what decided."""
    if cdr is None:
        return None, "CDR blank: not assessed"
    if cdr == 0.5:
        diagnosis = {"mci": "MCI", "ad": "AD", "drop": None}[cdr05]
        return diagnosis, f"CDR 0.5 -> {diagnosis} (--cdr05 {cdr05})"
    diagnosis = "CN" if cdr == 0 else "AD"
    return diagnosis, f"CDR {cdr:g} -> {diagnosis}"


def people_of(sessions: list[tuple[Row, Visit]], columns: list[str]) -> dict[str, Person]:
    """What must be the same in all rows of a person; a fault of the person where it is not."""
    read = (
        (row, Person(subject_id=visit.subject_id, values={name: visit.values[name] for name in columns}))
        for row, visit in sessions
        if not visit.fault
    )
    return merge_people(read)


def keep_sessions(
    release: Release,
    scans: list[FoundScan],
    people: dict[str, Person],
    visits: dict[str, Visit],
    cdr05: Cdr05,
    no_visit: str,
) -> None:
    """Gives each scan the row of its own session."""
    release.faults += [owner.fault for owner in (*visits.values(), *people.values()) if owner.fault]
    for scan in scans:
        visit = visits.get(scan.session_id)
        if visit and not visit.fault and visit.values["cdr_global"] == 0.5 and cdr05 == "drop":
            release.drop(scan, "CDR 0.5 (--cdr05 drop)")
        else:
            release.keep(scan, people.get(scan.subject_id), visit, 0, no_visit)
