"""split.csv: which scans were used, and in which split. Ids and hashes may be shared where pixels may not.

Every build writes one; `--split-file` applies one from elsewhere, so that a published split can be repeated.
"""

import csv
import logging
from dataclasses import replace
from pathlib import Path

from sharding.manifest import Scan, refuse
from sharding.shard import to_csv

log = logging.getLogger(__name__)

COLUMNS = ("scan_id", "subject_id", "cohort", "split", "sha256", "key")
NEEDED = ("scan_id", "subject_id", "cohort", "split")
MAX_SHOWN = 10


def apply_split(scans: list[Scan], path: Path) -> tuple[list[Scan], bytes]:
    """The scans that the split file names, with its splits and the sha256 that their images should have.

    Also returns, as CSV, what is missing on either side: `in` says which side has it, `split file` or `manifest`.

    Raises:
        ValueError: the file is no split file, names a scan twice or a subject in two splits, or shares no scan with
            the manifest.
    """
    rows = _read(path)
    named = {(row["cohort"], row["subject_id"], row["scan_id"]): row for row in rows}
    ours = {(scan.cohort, scan.subject_id, scan.scan_id): scan for scan in scans}
    kept = [
        replace(scan, split=named[place]["split"], expected_sha256=named[place].get("sha256", ""))
        for place, scan in ours.items()
        if place in named
    ]
    if not kept:
        some, other = next(iter(named)), next(iter(ours))
        raise ValueError(f"{path}: names no scan of the manifest; it has {some}, the manifest {other}")
    absent = [place for place in named if place not in ours]
    left_out = [place for place in ours if place not in named]
    for places, has, lacks in ((absent, "split file", "manifest"), (left_out, "manifest", "split file")):
        if places:
            shown = ", ".join(scan_id for _, _, scan_id in places[:MAX_SHOWN])
            more = f" and {len(places) - MAX_SHOWN} more" if len(places) > MAX_SHOWN else ""
            log.warning("warning: %d scans of the %s are not in the %s: %s%s", len(places), has, lacks, shown, more)
    missing = [["split file", *place] for place in absent] + [["manifest", *place] for place in left_out]
    return kept, to_csv(["in", "cohort", "subject_id", "scan_id"], missing)


def _read(path: Path) -> list[dict]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a split file ({error})") from error
    absent = [name for name in NEEDED if name not in (reader.fieldnames or [])]
    if absent or not rows:
        raise ValueError(f"{path}: not a split file, it lacks {', '.join(absent) or 'rows'}; a build writes split.csv")
    faults, seen, splits = [], {}, {}
    for number, row in enumerate(rows, start=2):
        scan, subject = (row["cohort"], row["scan_id"]), (row["cohort"], row["subject_id"])
        if row["split"] not in ("train", "val", "test"):
            faults.append(f"row {number}: split {row['split']!r} is none of train, val, test")
        if seen.setdefault(scan, number) != number:
            faults.append(f"row {number}: scan {row['scan_id']!r} is in row {seen[scan]} as well")
        if splits.setdefault(subject, row["split"]) != row["split"]:
            faults.append(f"row {number}: subject {row['subject_id']!r} is in {splits[subject]} and {row['split']}")
    refuse(f"{path}: {len(faults)} faults", faults)
    return rows
