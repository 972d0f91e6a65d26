"""Joins manifests into one and checks it again.

1. each manifest is read and judged on its own;
2. scan ids that clash, and subjects in two splits, are refused, naming the files;
3. releases that may share people are kept on one side of the split, see below;
4. what has no split yet gets one, by subject.

No public table says who took part in two of OASIS-1, OASIS-2 and OASIS-3. Where two of them meet, all their scans go to
one split (train unless `--oasis` says otherwise), so that nobody is trained on and tested. People of OASIS may be in
NACC or ADNI as well, and people of NACC in ADNI: this is said, and left to you.

Example:
    python -m sharding.merge adni.csv oasis1.csv oasis2.csv aibl.csv --out manifest.csv
"""

import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sharding.manifest import COLUMNS, Scan, image_cell, names_in, read_cells, read_manifest, refuse
from sharding.shard import to_csv, write_whole

log = logging.getLogger(__name__)

OASIS = ("OASIS1", "OASIS2", "OASIS3")
MAY_SHARE_PEOPLE = (("NACC", OASIS), ("ADNI", OASIS), ("ADNI", ("NACC",)))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which manifests to join."""

    manifests: Annotated[list[Path], tyro.conf.Positional]
    """The manifests, in the order that their scans shall have."""
    out: Path
    """The manifest to write."""
    oasis: Literal["train", "val", "test", "own"] = "train"
    """Where all scans of OASIS go when two of its releases meet; own: each release keeps its splits."""
    test_cohorts: str = "AIBL,MIRIAD"
    """Cohorts that are only ever tested on, separated by commas."""


def merge(options: Options) -> list[Scan]:
    """Writes the joint manifest and returns its scans, read back.

    Raises:
        ValueError: naming every clash with its files and rows.
    """
    test_cohorts = names_in(options.test_cohorts)
    rows: list[dict] = []
    if not options.manifests:
        raise ValueError("name the manifests to join")
    for place, path in enumerate(options.manifests):
        if path.resolve() == options.out.resolve():
            raise ValueError(f"{path}: --out would replace a manifest that is read; take another name")
        scans = read_manifest(path, test_cohorts=test_cohorts)
        header, lines = read_cells(path)
        for scan, (number, cells) in zip(scans, lines, strict=True):
            row = dict(zip(header, cells, strict=False))
            rows.append(
                row
                | {"scan_id": scan.scan_id, "subject_id": scan.subject_id, "cohort": scan.cohort}
                | {"image": image_cell(scan.image, options.out.parent), "source": place, "from": f"{path} row {number}"}
            )
    _refuse_clashes(rows)
    _one_side_for_oasis(rows, options.oasis, test_cohorts)
    _warn_of_shared_people({row["cohort"] for row in rows})

    extra = sorted({name for row in rows for name in row if name} - set(COLUMNS) - {"source", "from"})
    unchecked = options.out.with_name(f".{options.out.name}.unchecked")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _write(unchecked, [*COLUMNS, *extra], rows)
    try:
        scans = read_manifest(unchecked, test_cohorts=test_cohorts)
    finally:
        unchecked.unlink()
    for row, scan in zip(rows, scans, strict=True):
        row["split"] = scan.split
    _write(options.out, [*COLUMNS, *extra], rows)
    return scans


def _refuse_clashes(rows: list[dict]) -> None:
    faults = []
    for what, name in (("scan_id", "scan id"), ("image", "image")):
        first: dict[str, dict] = {}
        for row in rows:
            before = first.setdefault(row[what], row)
            if before["source"] != row["source"]:  # within one manifest, reading it has judged that
                faults.append(f"{row['from']}: {name} {row[what]!r} is that of {before['from']}")
    decided: dict[tuple, dict] = {}
    for row in rows:
        if row.get("split"):
            before = decided.setdefault((row["cohort"], row["subject_id"]), row)
            if before["split"] != row["split"]:
                faults.append(
                    f"{row['from']}: subject {row['subject_id']!r} of {row['cohort']} is in {row['split']!r}, and in "
                    f"{before['split']!r} in {before['from']}; empty one of the two cells"
                )
    refuse(f"{len(faults)} clashes", faults)


def _one_side_for_oasis(rows: list[dict], side: str, test_cohorts: tuple[str, ...]) -> None:
    releases = sorted({row["cohort"] for row in rows} & set(OASIS))
    if len(releases) < 2:
        return
    tested = [name for name in releases if name in test_cohorts]
    if tested and len(tested) < len(releases) and side != "own":
        others = ", ".join(name for name in releases if name not in tested)
        raise ValueError(
            f"{', '.join(tested)} of --test-cohorts may share people with {others}, and no public table says who; "
            "name all OASIS releases in --test-cohorts or none, or take --oasis own"
        )
    if tested:
        return
    if side == "own":
        log.warning("warning: %s keep their own splits and may share people", ", ".join(releases))
        return
    changed = 0
    for row in rows:
        if row["cohort"] in OASIS:
            changed += row.get("split", "") not in ("", side)
            row["split"] = side
    log.info(
        "%s may share people, and no table says who: all their scans go to %s (%d moved); --oasis own keeps theirs",
        ", ".join(releases),
        side,
        changed,
    )


def _warn_of_shared_people(cohorts: set[str]) -> None:
    for cohort, others in MAY_SHARE_PEOPLE:
        found = sorted(cohorts & set(others))
        if cohort in cohorts and found:
            log.warning(
                "warning: people of %s may be in %s under other ids; after packing, `python -m sharding.audit` with "
                "--shards finds scans that are in both",
                cohort,
                " and ".join(found),
            )


def _write(path: Path, columns: list[str], rows: list[dict]) -> None:
    write_whole(path, to_csv(columns, ([row.get(name, "") for name in columns] for row in rows)))


def main() -> None:
    options = tyro.cli(Options, prog="python -m sharding.merge", description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        scans = merge(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name in ("cohort", "split", "diagnosis"):
        counts = Counter(getattr(scan, name) or f"no {name}" for scan in scans)
        log.info("%-9s %s", name, ", ".join(f"{count} {value}" for value, count in sorted(counts.items())))
    log.info("ok %d scans of %d manifests -> %s", len(scans), len(options.manifests), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
