"""What every adapter of a release is made of: scans found, people, visits, and how a scan gets its row.

An adapter (`sharding/cohorts/NAME.py`) lists the scans, reads the visits and links them; the words for it are here.
Each scan that was found ends either as a row of the manifest or as a dropped scan with a reason: none is lost.
"""

import datetime
import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sharding.manifest import COLUMNS, image_cell
from sharding.shard import to_csv, write_whole
from sharding.tables import Row, TablesFolder, walk

log = logging.getLogger(__name__)

OTHER = "OTHER"  # a diagnosis that is none of CN, MCI, AD: such scans are dropped by name
DROPPED_COLUMNS = ("scan_id", "cohort", "subject_id", "session_id", "image", "reason", "detail")
DAYS_PER_YEAR = 365.25

When = datetime.date | int
"""A calendar date, or days since a person's entry where a release has no dates."""


@dataclass(frozen=True, kw_only=True)
class ReleaseOptions:
    """What every adapter asks for."""

    images: Path
    """Folder of the downloaded images, searched to any depth."""
    tables: Path | None = None
    """Folder of the downloaded tables, searched to any depth; the folder of the images unless given."""
    out: Path
    """The manifest to write; what was dropped goes beside it, to NAME.dropped.csv."""
    one_scan_per: Literal["visit", "subject", "all"] = "visit"
    """Keep the best scan of each visit, or only of each subject's first visit with a diagnosis, or all scans."""
    test_cohorts: str = "AIBL,MIRIAD"
    """Cohorts that are only ever tested on, separated by commas."""

    @functools.cached_property
    def tables_folder(self) -> TablesFolder:
        """Where the tables are."""
        return TablesFolder(self.tables or self.images)


@dataclass(frozen=True, kw_only=True)
class FoundScan:
    """An image in the release, from its name and place alone."""

    scan_id: str
    subject_id: str
    session_id: str
    image: Path
    when: When | None = None
    rank: tuple = ()
    """Smaller is better among the scans of one visit."""
    values: dict[str, object] = field(default_factory=dict)
    """Columns that the image itself decides, e.g. `field_strength_t`; unknown names become extra columns."""


@dataclass(frozen=True, kw_only=True)
class Person:
    """What a release knows of a subject, whatever the visit."""

    subject_id: str
    values: dict[str, object] = field(default_factory=dict)
    fault: str = ""
    """A cell that could not be used, with file, row, column and value: the subject's scans are dropped with it."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One clinical assessment."""

    subject_id: str
    when: When | None
    label: str = ""
    """The release's name of the visit, e.g. m12."""
    diagnosis: str | None = None
    """CN, MCI, AD, OTHER, or None if not assessed."""
    diagnosis_source: str = ""
    """Table, column and value that decided, and the policy if one did: `DXSUM DIAGNOSIS 2`."""
    values: dict[str, object] = field(default_factory=dict)
    fault: str = ""
    """A cell that could not be used: scans that link to this visit are dropped with it."""


@dataclass(frozen=True)
class Dropped:
    """A scan that is not in the manifest."""

    scan: FoundScan
    reason: str
    """In few words, the same for all scans that were dropped for it."""
    detail: str = ""
    """What a person needs to act: file, row, column, value, or the scan that was taken instead."""


@dataclass
class Release:
    """The outcome of an adapter."""

    cohort: str
    rows: list[dict] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Unusable cells and rows of tables, each with file, row, column and value."""

    def drop(self, scan: FoundScan, reason: str, detail: str = "") -> None:
        """Leaves a scan out, by name."""
        self.dropped.append(Dropped(scan, reason, detail))

    def keep(
        self, scan: FoundScan, person: Person | None, visit: Visit | None, gap_days: int | None, no_visit: str = ""
    ) -> None:
        """Makes the scan's row, or drops it where its person or visit is unusable or has another dementia.

        `no_visit` says, in the row's `diagnosis_source`, why there is no visit. What the scan knows wins over what the
        visit knows, and that over what is known of the person; None is not knowing.
        """
        for owner in (person, visit):
            if owner is not None and owner.fault:
                return self.drop(scan, "a table's cell cannot be used", owner.fault)
        if visit is not None and visit.diagnosis == OTHER:
            return self.drop(scan, "another diagnosis than CN, MCI or AD", visit.diagnosis_source)
        values: dict[str, object] = {}
        for owner in (person, visit, scan):
            known = owner.values if owner else {}
            values |= {name: value for name, value in known.items() if value is not None or name not in values}
        self.rows.append(
            {
                "scan_id": scan.scan_id,
                "cohort": self.cohort,
                "subject_id": scan.subject_id,
                "session_id": scan.session_id,
                "image": scan.image,
                "diagnosis": visit.diagnosis if visit else None,
                "diagnosis_source": visit.diagnosis_source if visit else no_visit,
                "diagnosis_gap_days": gap_days if visit and visit.diagnosis else None,
                "acquired": scan.when.isoformat() if isinstance(scan.when, datetime.date) else None,
                **values,
            }
        )


def files_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder at or below `folder` with its files' names, both sorted, without hidden ones."""
    from tqdm import tqdm

    with tqdm(desc="folders", unit="", disable=None) as progress:  # only on a terminal
        for parent, folders, names in walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            progress.update()
            yield Path(parent), sorted(name for name in names if not name.startswith("."))


def one_each(read: Iterable[tuple[Row, Person | Visit]], key: Callable[[Person | Visit], Hashable]) -> dict:
    """The person or visit of each `key`: rows that say the same are one, rows that differ make it a fault."""
    owners: dict[Hashable, Person | Visit] = {}
    rows: dict[Hashable, Row] = {}
    for row, owner in read:
        name = key(owner)
        before, first = owners.setdefault(name, owner), rows.setdefault(name, row)
        if before == owner or before.fault:
            continue
        said, says = ({"diagnosis": getattr(one, "diagnosis_source", ""), **one.values} for one in (before, owner))
        differing = sorted(column for column in said | says if said.get(column) != says.get(column))
        shown = ", ".join(f"{column} {said.get(column)!r} and {says.get(column)!r}" for column in differing)
        fault = owner.fault or f"{first.where} and {row.where} contradict each other: {shown}"
        owners[name] = replace(before, fault=fault)
    return owners


def merge_people(read: Iterable[tuple[Row, Person]]) -> dict[str, Person]:
    """Each subject as all rows together tell; empty cells do not count, one that differs is a fault of the person."""
    read = list(read)
    people = {person.subject_id: Person(subject_id=person.subject_id) for _, person in read}
    for column in dict.fromkeys(name for _, person in read for name in person.values):
        known = (
            (row, Person(subject_id=person.subject_id, values={column: person.values[column]}))
            for row, person in read
            if person.values.get(column) is not None
        )
        for subject, part in one_each(known, key=lambda person: person.subject_id).items():
            before = people[subject]
            people[subject] = replace(before, values=before.values | part.values, fault=before.fault or part.fault)
    for _, person in read:
        if person.fault:
            people[person.subject_id] = person
    return people


def drop_copies(release: Release, scans: Iterable[FoundScan]) -> list[FoundScan]:
    """The first of the scans with one scan_id; the others, copies of the same file, are dropped, naming it."""
    first: dict[str, FoundScan] = {}
    for scan in scans:
        if first.setdefault(scan.scan_id, scan) is not scan:
            release.drop(scan, "a second copy of the same image", str(first[scan.scan_id].image))
    return list(first.values())


def one_per(
    release: Release, scans: Iterable[FoundScan], key: Callable[[FoundScan], Hashable], what: str = "visit"
) -> list[FoundScan]:
    """The best scan (lowest `rank`, then scan_id) of each `key`; the others are dropped, naming the one taken."""
    groups: dict[Hashable, list[FoundScan]] = {}
    for scan in scans:
        groups.setdefault(key(scan), []).append(scan)
    kept = []
    for group in groups.values():
        best, *others = sorted(group, key=lambda scan: (scan.rank, scan.scan_id))
        kept.append(best)
        for scan in others:
            release.drop(scan, f"another scan of the same {what} was taken", best.scan_id)
    return kept


def one_row_per_subject(release: Release) -> None:
    """Keeps each subject's first row with a diagnosis, or the first; `rows` must be in the order of time."""
    chosen: dict[str, dict] = {}
    for row in release.rows:
        best = chosen.get(row["subject_id"])
        if best is None or (best["diagnosis"] is None and row["diagnosis"] is not None):
            chosen[row["subject_id"]] = row
    for row in release.rows:
        best = chosen[row["subject_id"]]
        if row is not best:
            scan = FoundScan(**{name: row[name] for name in ("scan_id", "subject_id", "session_id", "image")})
            release.drop(scan, "another scan of the same subject was taken", best["scan_id"])
    release.rows = [row for row in release.rows if chosen[row["subject_id"]] is row]


def nearest(visits: Iterable[Visit], when: When, window_days: int) -> tuple[Visit, int] | None:
    """The visit nearest to `when`, on either side, and its distance in days (visit minus scan: later is positive).

    Ties go to the earlier visit. None if the nearest is more than `window_days` away.
    """
    gaps = [(abs(gap), gap, visit) for visit in visits if visit.when is not None for gap in [_days(visit.when, when)]]
    if not gaps:
        return None
    distance, gap, visit = min(gaps, key=lambda found: found[:2])
    return (visit, gap) if distance <= window_days else None


def _days(later: When, earlier: When) -> int:
    gap = later - earlier
    return gap if isinstance(gap, int) else gap.days


def write_release(release: Release, out: Path) -> Path:
    """Writes the manifest and, beside it, NAME.dropped.csv; returns the latter's path.

    Paths of images are relative to the manifest where they lie below its folder, else absolute. Both files are sorted
    by subject, session and scan.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    extra = sorted({name for row in release.rows for name in row} - set(COLUMNS))
    rows = [{**row, "image": image_cell(row["image"], out.parent)} for row in release.rows]
    dropped = [
        {
            "scan_id": gone.scan.scan_id,
            "cohort": release.cohort,
            "subject_id": gone.scan.subject_id,
            "session_id": gone.scan.session_id,
            "image": image_cell(gone.scan.image, out.parent),
            "reason": gone.reason,
            "detail": gone.detail,
        }
        for gone in release.dropped
    ]
    dropped_path = out.with_suffix(".dropped.csv")
    _write_csv(dropped_path, DROPPED_COLUMNS, dropped)
    _write_csv(out, (*COLUMNS, *extra), rows)
    return dropped_path


def _write_csv(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    in_order = sorted(rows, key=lambda row: (row["subject_id"], row["session_id"], row["scan_id"]))
    write_whole(path, to_csv(columns, ([_text(row.get(name)) for name in columns] for row in in_order)))


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}" if value == round(value, 4) else f"{value:.2f}"
    return str(value)


def summary(release: Release) -> str:
    """Scans found, kept and dropped, per diagnosis, per split and per reason, for the log."""
    found = len(release.rows) + len(release.dropped)
    lines = [f"{release.cohort}: {found} scans found = {len(release.rows)} kept + {len(release.dropped)} dropped"]
    subjects = len({row["subject_id"] for row in release.rows})
    by_diagnosis = Counter(row["diagnosis"] or "no diagnosis" for row in release.rows)
    by_split = Counter(row["split"] for row in release.rows)
    lines.append(f"  {subjects} subjects; " + ", ".join(f"{n} {name}" for name, n in sorted(by_diagnosis.items())))
    lines.append("  split: " + ", ".join(f"{n} {name}" for name, n in sorted(by_split.items())))
    without = Counter(row["diagnosis_source"] or "not assessed" for row in release.rows if not row["diagnosis"])
    lines += [f"  {n} without a diagnosis: {reason}" for reason, n in without.most_common(8)]
    lines += [
        f"  {n} dropped: {reason}" for reason, n in Counter(gone.reason for gone in release.dropped).most_common()
    ]
    lines += [f"  table: {fault}" for fault in release.faults[:20]]
    if len(release.faults) > 20:
        lines.append(f"  table: ... and {len(release.faults) - 20} more faults")
    return "\n".join(lines)
