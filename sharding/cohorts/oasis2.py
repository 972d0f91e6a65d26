"""OASIS-2, longitudinal: 373 sessions of 150 people aged 60 to 98, each up to four raw Analyze pairs.

Reads `oasis_longitudinal_demographics.xlsx` (or the copy `oasis_longitudinal.csv`) and, at any depth:

    OAS2_RAW_PART1/OAS2_0001_MR1/RAW/mpr-1.nifti.{hdr,img}     ... mpr-4; Analyze in spite of the name

Of each session the first repeat that is there is taken. A session links to the row with its MRI ID, and to no other:
MR numbers have gaps. The diagnosis is the CDR of that row: 0 is CN, 1 and above AD, 0.5 as --cdr05 says. `Group` says
what became of a person years later; it is kept as a column of its own and used for nothing.

Example:
    python -m sharding.manifest oasis2 --images oasis2/images --tables oasis2/tables --out oasis2.csv
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sharding.cohorts.oasis1 import (
    FIELD_STRENGTH_T,
    Cdr05,
    analyze_pairs,
    cdr_global,
    diagnose_cdr,
    is_a_fraction,
    keep_sessions,
    people_of,
    refuse_altered,
    session_name,
)
from sharding.release import FoundScan, Release, ReleaseOptions, Visit, drop_copies, files_below, one_each, one_per
from sharding.tables import BadCell, Row, find_table, read_table

TABLES = ("oasis_longitudinal_demographics", "oasis_longitudinal")
ID = re.compile(r"(OAS2_\d{4})_MR(\d+)")
REPEAT = re.compile(r"mpr-(\d+)\.nifti")
COLUMNS = ("Subject ID", "MRI ID", "MR Delay", "M/F", "Age", "EDUC", "MMSE", "CDR", "nWBV")
SPELLINGS = {"M/F": ("Gender",), "EDUC": ("Educ",), "MR Delay": ("Delay",)}


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """What decides about OASIS-2."""

    cdr05: Cdr05 = "mci"
    """CDR 0.5, which the release calls very mild dementia: as MCI, as AD, or left out."""


def read(options: Options) -> Release:
    """The sessions of OASIS-2, linked by MRI ID.

    Raises:
        ValueError: the table is missing, or is not as the release has it (columns, IDs, `MR Delay`, `nWBV`).
    """
    release = Release("OASIS2")
    table = find_table(options.tables_folder, TABLES, suffixes=(".csv", ".xlsx"))

    scans = drop_copies(release, _scans(release, options.images))
    if options.one_scan_per != "all":
        scans = one_per(release, scans, key=lambda scan: scan.session_id)

    sessions = [(row, _visit(row, options.cdr05)) for row in read_table(table, COLUMNS, SPELLINGS)]
    visits = one_each(sessions, key=lambda visit: visit.label)
    people = people_of(sessions, ["sex", "education_years"])

    in_time = sorted(scans, key=lambda scan: (scan.subject_id, _number(scan.session_id)))
    keep_sessions(release, in_time, people, visits, options.cdr05, f"no row with this MRI ID in {table.name}")
    return release


def _number(session_id: str) -> int:
    return int(ID.fullmatch(session_id)[2])


def _scans(release: Release, images: Path) -> Iterator[FoundScan]:
    """The repeats of each session's folder; halves of pairs and other names are dropped."""
    for folder, names in files_below(images):
        session = next((found for part in reversed(folder.parts) if (found := ID.fullmatch(part))), None)
        for image, fault in analyze_pairs(folder, names):
            repeat = REPEAT.fullmatch(image.stem)
            scan = FoundScan(
                scan_id=f"{session[0]}_mpr-{repeat[1]}" if session and repeat else image.stem,
                subject_id=session[1] if session else "",
                session_id=session[0] if session else "",
                image=image,
                rank=(int(repeat[1]),) if repeat else (),
                values={"field_strength_t": FIELD_STRENGTH_T},
            )
            if not session:
                release.drop(scan, "not in the folder of a session", "a folder is named like OAS2_0001_MR1")
            elif not repeat:
                release.drop(scan, "not a name of this release", "a scan is named like mpr-1.nifti.hdr")
            elif fault:
                release.drop(scan, fault)
            else:
                yield scan


def _visit(row: Row, cdr05: Cdr05) -> Visit:
    match = session_name(row, "MRI ID", ID, "OAS2_0001_MR1")
    session, subject = match[0], match[1]
    refuse_altered(row, "Subject ID", row["Subject ID"] == subject, f"the subject of {session}")
    refuse_altered(row, "nWBV", is_a_fraction(row["nWBV"]), "a fraction between 0 and 1")
    delay = row["MR Delay"].removesuffix(".0")
    is_right = delay == "0" if match[2] == "1" else delay.isdigit() and delay != "0"
    refuse_altered(row, "MR Delay", is_right, "the days since the first session, 0 for that one")
    try:
        values = {
            "age_years": row.number("Age", 0, 120),
            "sex": row.code("M/F", {"M": "M", "F": "F"}),
            "education_years": row.number("EDUC", 0, 30),
            "mmse": row.number("MMSE", 0, 30, whole=True),
            "cdr_global": cdr_global(row),
            "delay_days": int(delay),
            "group": row.text("Group"),
            "visit": row.text("Visit"),
        }
    except BadCell as fault:
        return Visit(subject_id=subject, when=None, label=session, fault=str(fault))
    diagnosis, source = diagnose_cdr(values["cdr_global"], cdr05)
    return Visit(
        subject_id=subject,
        when=None,
        label=session,
        diagnosis=diagnosis,
        diagnosis_source=source,
        values=values,
    )
