"""ADNI, as downloaded from LONI: image collections and study tables, with or without ADNIMERGE.

    images/ADNI/012_S_3456/DESCRIPTION/2007-02-19_08_31_00.0/I40966/ADNI_012_S_3456_MR_..._S21856_I40966.nii
    tables/DXSUM_21Aug2025.csv, PTDEMOG, MMSE, CDR, MOCA, APOERES (or All_Subjects_...), ADNIMERGE, the collection's CSV

NIfTI files and DICOM folders; several zips are unpacked side by side. A date may follow a table's name. The diagnosis
is the visit's in DXSUM: DIAGNOSIS, else DXCHANGE, else DXCURREN; in ADNIMERGE (DX) where DXSUM has none. Dementia with
DXOTHDEM 1 or DXDDUE 2 is another disease, and dropped. The screening belongs to the baseline visit. Diagnoses at entry
(DX_bl, the collection's Group) are never a visit's diagnosis; Group is kept in the column `group`.

A scan is known by its image id (`_I40966`). Its date is its folder's, else that of the collection's CSV, Key_MRI,
MPRAGEMETA or MRILIST, else its XML file's; scans with two dates a week apart or more are dropped. It takes the nearest
visit with a diagnosis within --window-days. Of a visit's scans the best is kept: ADNI1/GO/2 the one processed with N3
and scaling, ADNI3/4 the accelerated original that is not _ND; then 1.5 T for ADNI1, 3 T later; then the nearest in
time. Age is counted from the year of birth (PTDEMOG), else from ADNIMERGE's AGE at entry.

Example:
    python -m sharding.manifest adni --images adni/images --tables adni/tables --out adni.csv
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sharding.cohorts.adni_scans import find_scans, is_repeat, kind_of
from sharding.cohorts.adni_tables import Clinic, read_clinic
from sharding.release import DAYS_PER_YEAR, FoundScan, Release, ReleaseOptions, Visit, nearest, one_per

OLDER_PHASES = ("n3-scaled", "n3", "corrected", "plain", "accelerated", "nd")  # best first
NEWER_PHASES = ("accelerated", "plain", "nd", "n3-scaled", "n3", "corrected")


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """ADNI."""

    window_days: int = 90
    """A scan takes the nearest visit, earlier or later, at most this many days away; else it has no diagnosis."""


@dataclass(frozen=True)
class Link:
    """A scan and its visit."""

    scan: FoundScan
    visit: Visit | None
    gap_days: int | None
    no_visit: str = ""


def read(options: Options) -> Release:
    """Every image of the download, as a row or dropped with a reason.

    Raises:
        ValueError: neither DXSUM nor ADNIMERGE is there, or a table is not what it should be.
    """
    release = Release("ADNI")
    scans = find_scans(options.images, options.tables_folder, release)
    clinic = read_clinic(options.tables_folder, release.faults)
    links = {scan.scan_id: _link(scan, clinic, options.window_days) for scan in scans}

    kept: Iterable[FoundScan] = (link.scan for link in links.values())
    if options.one_scan_per != "all":
        kept = one_per(release, kept, key=lambda scan: (scan.subject_id, _visit_of(links[scan.scan_id])))
    for scan in sorted(kept, key=lambda scan: (scan.subject_id, scan.session_id, scan.scan_id)):
        link = links[scan.scan_id]
        release.keep(scan, clinic.people.get(_rid(scan)), link.visit, link.gap_days, link.no_visit)
    return release


def _rid(scan: FoundScan) -> int:
    return int(scan.subject_id.rpartition("_")[2])


def _visit_of(link: Link) -> tuple[str, str]:
    return ("visit", link.visit.label) if link.visit else ("day", link.scan.session_id)


def _link(scan: FoundScan, clinic: Clinic, window_days: int) -> Link:
    """The scan with the visit that it belongs to; a visit without a diagnosis only where no other is near."""
    visits = clinic.visits.get(_rid(scan), [])
    told = [visit for visit in visits if visit.diagnosis or visit.fault]
    visit, gap_days, no_visit = None, None, ""
    if scan.when is None:
        no_visit = "no date of the scan"
    elif not visits:
        no_visit = "no visit of this person in the tables"
    elif found := nearest(told, scan.when, window_days) or nearest(visits, scan.when, window_days):
        visit, gap_days = found
    else:
        no_visit = f"no visit within {window_days} days"
    phase = str(visit.values["phase"]) if visit else ""
    values = {**scan.values, **_age(scan, clinic)}
    return Link(replace(scan, rank=_rank(scan, phase, gap_days or 0), values=values), visit, gap_days, no_visit)


def _age(scan: FoundScan, clinic: Clinic) -> dict[str, object]:
    anchor = clinic.ages.get(_rid(scan))
    if anchor is None or scan.when is None:
        return {}
    age_years = anchor.age_years + (scan.when - anchor.day).days / DAYS_PER_YEAR
    return {"age_years": round(age_years, 2), "age_source": anchor.source}


def _rank(scan: FoundScan, phase: str, gap_days: int) -> tuple:
    """The order among a visit's scans, as in the module's docstring."""
    description = str(scan.values["description"])
    kinds = NEWER_PHASES if phase in ("ADNI3", "ADNI4") else OLDER_PHASES
    wanted_t, field_strength_t = 1.5 if phase == "ADNI1" else 3.0, scan.values["field_strength_t"]
    is_wanted = field_strength_t is not None and abs(float(field_strength_t) - wanted_t) < 0.5
    of_field = 0 if is_wanted else 1 if field_strength_t is None else 2
    return kinds.index(kind_of(description)), of_field, abs(gap_days), is_repeat(description)
