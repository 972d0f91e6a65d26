"""NACC: scans of the mixed protocol (zips or unpacked sessions) and of SCAN, with the visits of the UDS.

    images/  mri1234.zip  NACC000001_….zip  mri1235ni.zip     a session each; its T1 series is unpacked (--unpack)
             mri1236/…                                        or as unpacked: DICOM folders, or NIfTI with JSON
             …/NACC000002/MPRAGE/2021-05-04_10_11_12.0/I123/  SCAN, as LONI lays it out
    tables/  investigator_nacc70.csv, or investigator_ftldlbd_nacc70.csv, or --uds FILE
             investigator_mri_nacc70.csv                      whose session a zip is, and its date (--mri FILE)
             investigator_scan_mriqc_nacc70.csv               if there: which of SCAN's series its centre chose

A scan gets the visit that the MRI table names (NACCVNUM) if that is within --window-days, else the nearest.
CN is NACCUDSD 1, MCI 3, AD 4 with NACCALZD 1; impaired-not-MCI (2) and other dementias are dropped by name.

Example:
    python -m sharding.manifest nacc --images nacc/images --tables nacc/tables --out nacc.csv
"""

import datetime
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sharding.cohorts import nacc_images, nacc_tables, nacc_zips
from sharding.cohorts.nacc_images import Place, Series, T1Rule
from sharding.cohorts.nacc_tables import Session, letters
from sharding.release import (
    DAYS_PER_YEAR,
    FoundScan,
    Person,
    Release,
    ReleaseOptions,
    Visit,
    nearest,
    one_per,
    one_row_per_subject,
)
from sharding.tables import Row, find_table

COHORT = "NACC"
BROKEN_ZIP = "a broken or unsafe zip"
BAD_CELL = "a table's cell cannot be used"
OF_SCAN = Path("SCAN")  # all of SCAN is one delivery: there, repeats have an image id each


@dataclass(frozen=True, kw_only=True)
class Options(ReleaseOptions):
    """Policies of NACC."""

    uds: Path | None = None
    """The UDS table, where its name is not investigator_nacc<NN>.csv; else it is found below --tables."""
    mri: Path | None = None
    """The table of mixed-protocol sessions, where its name is not investigator_mri_nacc<NN>.csv."""
    unpack: Path | None = None
    """Folder for the series that are taken out of zips; `unpacked` beside the manifest unless given."""
    window_days: int = 180
    """A visit further than this from the scan, on either side, says nothing of it."""
    ad: Literal["any", "primary", "etiology"] = "any"
    """Dementia is AD if AD is a presumed cause (NACCALZD 1), the primary one (and NACCALZP 1), or NACCETPR is 1."""
    mci_due_to_ad: bool = False
    """MCI counts only with NACCALZD 1; other MCI is dropped by name."""
    t1_names: str = r"mp-?rage|spgr|bravo|t1|tfl|ir-?fspgr"
    """Regular expression: what the description or protocol of a T1-weighted series contains, in any case."""
    other_names: str = r"flair|t2|scout|loc"
    """Regular expression: what shows that a series is none, whatever else it contains."""
    max_slice_mm: float = 1.6
    """Slices thicker than this and than 1.5 times the voxels' edge were acquired in 2-D: no T1 volume."""
    min_cover_mm: float = 60
    """A series that covers less than this along an axis is a slab: no T1 volume."""


def read(options: Options) -> Release:
    """Lists the scans, reads the visits, links them, and unpacks what was kept.

    Raises:
        ValueError: a table is not there, lacks a column, or is none.
    """
    release = Release(COHORT)
    zipped: dict[str, Zipped] = {}
    scans = _one_delivery(release, _list_scans(options, release, zipped))
    if options.one_scan_per != "all":
        scans = one_per(release, scans, lambda scan: (scan.subject_id, scan.session_id))

    subjects = {scan.subject_id for scan in scans}
    people, visits = nacc_tables.read_uds(
        _table(options, "uds"), subjects, options.ad, options.mci_due_to_ad, release.faults
    )

    for scan in sorted(scans, key=lambda scan: (scan.subject_id, str(scan.when or "9"), scan.scan_id)):
        _link(release, scan, people.get(scan.subject_id), visits.get(scan.subject_id, []), options.window_days)
    if options.one_scan_per == "subject":
        one_row_per_subject(release)  # before anything is unpacked
    _unpack(release, zipped)
    return release


STEMS = {
    "uds": (r"investigator_nacc\d+", r"investigator_ftldlbd_nacc\d+", r"commercial(?:_ftldlbd)?_nacc\d+"),
    "mri": (r"investigator_mri_nacc\d+", r"commercial_mri_nacc\d+"),
    "scan": (r"investigator_scan_mriqc_nacc\d+", r"commercial_scan_mriqc_nacc\d+"),
}


def _table(options: Options, name: Literal["uds", "mri"]) -> Path:
    given = getattr(options, name)
    path = given or find_table(options.tables_folder, STEMS[name], required=False)
    if path is None or not path.is_file():
        wanted = {"uds": "investigator_nacc<NN>.csv", "mri": "investigator_mri_nacc<NN>.csv"}[name]
        raise ValueError(f"{given or options.tables_folder}: no table {wanted}; download it, or give --{name} FILE")
    return path


# --- scans ---


@dataclass(frozen=True)
class Zipped:
    """A series in a zip, and where it goes."""

    members: tuple[str, ...]
    target: Path
    is_folder: bool


@dataclass(frozen=True, kw_only=True)
class NaccScan(FoundScan):
    """A scan and what decides between deliveries, and between visits."""

    delivery: Path
    """The zip or folder it came in."""
    is_dicom: bool
    description: str
    visit: str = ""
    """NACCVNUM of the MRI table."""
    no_visit: str = ""
    """Why no visit can be found for it."""


def _list_scans(options: Options, release: Release, zipped: dict[str, Zipped]) -> list[NaccScan]:
    """The T1 series of every session and of SCAN; all others are dropped by name."""
    from tqdm import tqdm

    unpacked = options.unpack or options.out.parent / "unpacked"
    rule = T1Rule(
        names=_pattern("--t1-names", options.t1_names),
        other_names=_pattern("--other-names", options.other_names),
        max_slice_mm=options.max_slice_mm,
        min_cover_mm=options.min_cover_mm,
    )
    places = list(nacc_images.find_places(options.images, unpacked))
    sessions, qc = {}, {}
    if any(place.kind == "session" for place in places):
        sessions = nacc_tables.read_mri_table(_table(options, "mri"), release.faults)
    if any(place.kind == "scan" for place in places):
        qc_table = find_table(options.tables_folder, STEMS["scan"], required=False)
        qc = nacc_tables.read_scan_qc(qc_table, release.faults) if qc_table else {}
    scans = []
    for place in tqdm(_one_place(release, places), unit=" sessions", disable=None):
        if place.kind == "stray":
            release.drop(_whole(place), "not where NACC's scans are", place.fault)
        elif place.kind == "session":
            scans += _session_scans(place, sessions, rule, unpacked, release, zipped)
        else:
            scans += _scan_scans(place, qc, rule, release)
    return scans


def _pattern(flag: str, text: str) -> re.Pattern:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{flag} {text!r} is no regular expression: {error}") from error


def _one_place(release: Release, places: list[Place]) -> list[Place]:
    """Each session and image once: unpacked rather than zipped, the first by name of copies; others are dropped."""
    chosen: dict[tuple[str, str], Place] = {}
    for place in sorted(places, key=_preference):
        before = chosen.setdefault((place.kind, place.stem.lower()), place)
        if before is not place:
            release.drop(_whole(place), "found twice", f"{before.path} is used")
    return list(chosen.values())


def _preference(place: Place) -> tuple[int, str]:
    is_zip = place.path.suffix.lower() == ".zip"
    return (1 if is_zip else 0 if place.files else 2), str(place.path)


def _whole(place: Place, subject_id: str = "") -> FoundScan:
    """A session or image that is dropped as it is."""
    return FoundScan(
        scan_id=place.stem, subject_id=subject_id or place.subject_id, session_id=place.stem, image=place.path
    )


def _session_scans(
    place: Place,
    sessions: dict[str, Session],
    rule: T1Rule,
    unpacked: Path,
    release: Release,
    zipped: dict[str, Zipped],
) -> list[NaccScan]:
    stem = place.stem.lower()
    session = sessions.get(stem) or sessions.get(stem.removesuffix("ni"))  # the NIfTI flavour of a zip
    subject_id = session.subject_id if session else place.subject_id
    whole = _whole(place, subject_id)
    if not subject_id:
        release.drop(whole, "whose session it is, is not known", "no row of the MRI table has it in NACCMRFI")
        return []
    if session and place.subject_id and place.subject_id != subject_id:
        fault = f"{session.row.where}, column 'NACCID': {subject_id!r} is not {place.subject_id!r}, as the name says"
        release.faults.append(fault)
        release.drop(whole, BAD_CELL, fault)
        return []
    if session and session.fault:
        release.drop(whole, BAD_CELL, session.fault)
        return []
    try:
        with nacc_images.open_session(place) as (files, first_bytes):
            found = list(nacc_images.series_of(files, first_bytes, rule))
            members = {series.name: tuple(files[name] for name in series.files) for series in found}
    except ValueError as error:
        release.drop(whole, BROKEN_ZIP, str(error))
        return []
    if not found:
        release.drop(whole, "no image in the session", "neither NIfTI nor DICOM files")
    scans = []
    for series in found:
        is_zip = place.path.is_file()
        file = place.path / members[series.name][0]
        image = place.path if is_zip else file.parent if series.is_dicom else file
        scan = _scan_of(place, series, image, subject_id, session)
        if is_zip:
            inner = series.name if series.is_dicom else series.files[0]
            target = unpacked / place.stem / ("dicom" if inner == "." else inner.replace("/", "__"))
            zipped[scan.scan_id] = Zipped(members[series.name], target, series.is_dicom)
        _keep_t1(scan, series, rule, release, scans)
    return scans


def _scan_of(place: Place, series: Series, image: Path, subject_id: str, session: Session | None) -> NaccScan:
    when = session.date if session else None
    no_visit = "" if session else "no row of the MRI table has it in NACCMRFI, so its date is not known"
    return NaccScan(
        scan_id=f"{place.stem}/{series.name}" if series.name != "." else place.stem,
        subject_id=subject_id,
        session_id=when.isoformat() if when else place.stem,
        image=image,
        when=when,
        delivery=place.path,
        is_dicom=series.is_dicom,
        description=series.description,
        visit=session.visit if session else "",
        no_visit=no_visit,
        values={
            "field_strength_t": series.field_strength_t,
            "age_years": session.age_years if session else None,
            "series": series.description,
            "protocol": "mixed",
        },
    )


def _keep_t1(scan: NaccScan, series: Series, rule: T1Rule, release: Release, scans: list[NaccScan]) -> None:
    """Adds the scan to `scans` with its rank, or drops it if it is no T1 of a head."""
    name_rank = nacc_images.name_rank(series, rule)
    if series.fault:
        release.drop(scan, "not one readable series", series.fault)
    elif name_rank is None:
        release.drop(scan, "no T1 by its name", series.description)
    elif why := nacc_images.why_no_head(series, rule):
        release.drop(scan, "no T1 volume of a head", f"{series.description}: {why}")
    else:
        scans.append(replace(scan, rank=(*scan.rank, series.is_dicom, name_rank, series.number)))


def _scan_scans(place: Place, qc: dict[tuple, Row], rule: T1Rule, release: Release) -> list[NaccScan]:
    """The one image of a leaf of SCAN's tree, if it is a T1."""
    is_dicom = not place.files[0].lower().endswith(nacc_images.NIFTI)
    shape, spacing_mm, fault = (), (), ""
    series = Series(name=place.series, files=place.files, is_dicom=is_dicom, description=place.series)
    if not is_dicom and nacc_images.name_rank(series, rule) is not None:
        try:
            with open(place.path, "rb") as file:
                shape, spacing_mm = nacc_images.read_nifti_header(file.read(2**12))
        except (OSError, ValueError) as error:
            fault = f"{place.path}: {error}"
    row = qc.get((place.subject_id, place.stem.split("/")[0])) or qc.get(
        (place.subject_id, place.date, letters(place.series))
    )
    values = {"series": place.series, "protocol": "SCAN"}
    if row is not None:
        values |= {"series_qc": row["SERIESQC"], "series_chosen": row["SERIESCHOSEN"]}
    scan = NaccScan(
        scan_id=place.stem,
        subject_id=place.subject_id,
        session_id=place.date.isoformat() if place.date else place.stem,
        image=place.path,
        when=place.date,
        rank=(not (row and row["SERIESCHOSEN"].lower() in ("1", "y", "yes", "true")),),
        delivery=OF_SCAN,
        is_dicom=is_dicom,
        description=place.series,
        values=values,
    )
    scans: list[NaccScan] = []
    _keep_t1(scan, replace(series, shape=shape, spacing_mm=spacing_mm, fault=fault), rule, release, scans)
    return scans


def _one_delivery(release: Release, scans: list[NaccScan]) -> list[NaccScan]:
    """Leaves out what is there twice: DICOM where a day's T1 is there as NIfTI, and a series in a second delivery."""
    days: dict[tuple[str, str], list[NaccScan]] = {}
    for scan in scans:
        days.setdefault((scan.subject_id, scan.session_id), []).append(scan)
    kept = []
    for day in days.values():
        nifti = min((scan for scan in day if not scan.is_dicom), key=lambda scan: scan.scan_id, default=None)
        first: dict[tuple[str, int], NaccScan] = {}
        count: dict[tuple[str, Path], int] = {}
        for scan in sorted(day, key=lambda scan: (str(scan.delivery), scan.rank, scan.scan_id)):
            name = letters(scan.description)
            nth = count[name, scan.delivery] = count.get((name, scan.delivery), 0) + 1  # repeats within a delivery
            if scan.is_dicom and nifti:
                release.drop(scan, "the session's T1 is there as NIfTI as well", nifti.scan_id)
            elif (before := first.setdefault((name, nth), scan)) is scan:
                kept.append(scan)
            else:
                release.drop(scan, "the series was delivered twice", before.scan_id)
    return kept


def _unpack(release: Release, zipped: dict[str, Zipped]) -> None:
    """Unpacks the series of the rows that were kept; a row whose zip is broken is dropped."""
    from tqdm import tqdm

    rows, release.rows = release.rows, []
    for row in tqdm(rows, unit=" unpacked", disable=None if zipped else True):
        series = zipped.get(row["scan_id"])
        if series is not None:
            try:
                nacc_zips.unpack(row["image"], series.members, series.target, series.is_folder)
            except ValueError as error:
                names = ("scan_id", "subject_id", "session_id", "image")
                release.drop(FoundScan(**{name: row[name] for name in names}), BROKEN_ZIP, str(error))
                continue
            row = {**row, "image": series.target}
        release.rows.append(row)


# --- link ---


def _link(release: Release, scan: NaccScan, person: Person | None, visits: list[Visit], window_days: int) -> None:
    """Makes the scan's row from its person and its visit: the one NACC names if it is near enough, else the nearest."""
    visit, gap_days, no_visit = None, None, scan.no_visit
    if not visits:
        no_visit = "no UDS visit of this NACCID in the table"
    elif scan.when is None:
        no_visit = no_visit or "the scan's date is not known"
    else:
        named = [visit for visit in visits if scan.visit and visit.label == scan.visit]
        undated = [visit for visit in named if visit.when is None and visit.fault]
        link = nearest(named, scan.when, window_days) or nearest(visits, scan.when, window_days)
        if undated:
            visit = undated[0]
        elif link:
            visit, gap_days = link
        else:
            no_visit = f"no UDS visit within {window_days} days (--window-days)"
    if scan.values.get("age_years") is None:
        scan = replace(scan, values={**scan.values, "age_years": _age_years(scan.when, visits)})
    if visit and visit.values:
        linked_by = "NACCVNUM" if visit.label == scan.visit else "date"
        scan = replace(scan, values={**scan.values, "linked_by": linked_by})
    release.keep(scan, person, visit, gap_days, no_visit)


def _age_years(when: datetime.date | None, visits: list[Visit]) -> float | None:
    """From the age at the nearest visit, however far: NACCAGE is in whole years."""
    aged = [visit for visit in visits if visit.values.get("visit_age_years") is not None]
    found = nearest(aged, when, 10**6) if when else None
    if found is None:
        return None
    visit, gap_days = found
    return round(visit.values["visit_age_years"] - gap_days / DAYS_PER_YEAR, 2)
