"""manifest.csv, one row per scan: what every other step starts from. As a command: a release becomes a manifest.

A release is read by sharding/cohorts/NAME.py (names, tables and headers; never voxels). Every scan that is found is in
the manifest or, with a reason, in manifest.dropped.csv.

Examples:
    python -m sharding.manifest adni --images ADNI/ --tables tables/ --out adni.csv
    python -m sharding.manifest oasis1 --images oasis1/ --tables oasis1/ --out oasis1.csv --cdr05 drop
    python -m sharding.manifest nacc --help

Reading a manifest: only the column `image` is needed. The rest has defaults, so that a list made by hand in a
spreadsheet is as good as one made from a release. It goes in this order:

1. every cell is checked, and every fault collected with its row (the header is row 1), before anything is refused;
2. missing ids are filled in from the image's path;
3. scans without a split get one by subject.
"""

import csv
import difflib
import hashlib
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

COLUMNS = tuple(
    "scan_id cohort subject_id session_id image diagnosis diagnosis_source diagnosis_gap_days age_years sex "
    "education_years apoe_e4 mmse moca cdr_global cdr_sb field_strength_t acquired split report".split()
)
NUMBER_FIELDS = (
    "age_years",
    "education_years",
    "apoe_e4",
    "mmse",
    "moca",
    "cdr_global",
    "cdr_sb",
    "field_strength_t",
)
ALLOWED = {"diagnosis": ("CN", "MCI", "AD"), "sex": ("F", "M"), "split": ("train", "val", "test")}
COHORTS = ("ADNI", "NACC", "OASIS1", "OASIS2", "OASIS3", "AIBL", "MIRIAD")
MIN_SUBJECTS_TO_SPLIT = 20
MAX_SHOWN = 20


@dataclass(frozen=True)
class Scan:
    """One row. Unknown text is empty, an unknown number or code is None."""

    row: int
    """As a spreadsheet counts: the header is row 1."""
    scan_id: str
    cohort: str
    subject_id: str
    session_id: str
    image: Path
    """Absolute, or relative to the working directory; the file may be missing."""
    split: str
    diagnosis: str | None
    diagnosis_source: str
    diagnosis_gap_days: float | None
    acquired: str
    fields: dict[str, float | str | None]
    """The record: `sex` (F, M) and the numbers of NUMBER_FIELDS."""
    report: str
    extra: dict[str, str] = field(default_factory=dict)
    """Columns that this module does not know, as they are."""
    expected_sha256: str = ""
    """What a split file says of the image; empty if there is none."""

    @property
    def key(self) -> str:
        """Name of the sample in a shard: 16 hex digits, nothing of the ids can be read from it."""
        return _hash(f"{self.cohort}/{self.subject_id}/{self.session_id}/{self.scan_id}")

    @property
    def subject_key(self) -> str:
        """The subject as 16 hex digits, see `subject_key`."""
        return subject_key(self.cohort, self.subject_id)


def subject_key(cohort: str, subject_id: str) -> str:
    """A person as 16 hex digits, the same for all their scans within a cohort."""
    return _hash(f"medblip-subject/{cohort}/{subject_id}")


def read_manifest(path: str | Path, *, test_cohorts: tuple[str, ...] = ("AIBL", "MIRIAD")) -> list[Scan]:
    """Reads a manifest, in the order of its rows, with every scan's split decided.

    A split that is given is kept and holds for all scans of its subject. Subjects of `test_cohorts` are all test.
    Other subjects are drawn 80/10/10 by a hash of cohort and subject, so that new rows move nobody; fewer than 20
    of them all train.

    Raises:
        ValueError: naming the file and each row, column and value that is wrong, and what would be right.
    """
    scans, faults = read_scans(path, test_cohorts=test_cohorts)
    refuse(f"{path}: {len(faults)} faults", faults)
    return scans


def refuse(summary: str, faults: list[str]) -> None:
    """Raises ValueError with the summary and the first of the faults below it, if there are any."""
    if faults:
        more = [f"... and {len(faults) - MAX_SHOWN} more"] if len(faults) > MAX_SHOWN else []
        raise ValueError(f"{summary}\n  " + "\n  ".join(faults[:MAX_SHOWN] + more))


def names_in(option: str) -> tuple[str, ...]:
    """The names of an option such as `--test-cohorts`, separated by commas."""
    return tuple(name.strip() for name in option.split(",") if name.strip())


def image_cell(image: Path, folder: Path) -> str:
    """How a manifest in `folder` names an image: relative to it if it lies below, else absolute."""
    image, folder = Path(os.path.abspath(image)), Path(os.path.abspath(folder))
    return str(image.relative_to(folder)) if image.is_relative_to(folder) else str(image)


def read_scans(path: str | Path, *, test_cohorts: tuple[str, ...] = ("AIBL", "MIRIAD")) -> tuple[list[Scan], list[str]]:
    """As `read_manifest`, but returns the faults beside the scans; what a faulty cell says is then unknown.

    Raises:
        ValueError: the file is no table, or has no column `image`.
    """
    path = Path(path)
    try:
        header, rows = read_cells(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from error
    _check_header(path, header)
    faults: list[str] = [] if rows else ["no rows below the header"]
    cells = [(number, _check_row(number, header, values, faults)) for number, values in rows]
    named = [(number, _with_ids(row, path.parent)) for number, row in cells]
    if not faults:  # ids that are wrong because a cell is wrong would only confuse
        _check_scan_ids(named, faults)
    splits = _decide_splits(named, test_cohorts, faults)

    without_subject = sum(not row["subject_id"] for _, row in cells)
    if without_subject:
        log.warning(
            "%s: %d rows have no subject_id, so each is taken for another person; repeat scans of one person "
            "cannot be recognised and may end up in two splits",
            path,
            without_subject,
        )
    scans = [
        _scan(number, row, row["split"] or splits[row["cohort"], row["subject_id"]], path.parent)
        for number, row in named
    ]
    return scans, faults


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the numbered rows that are not blank."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [(number, row) for number, row in enumerate(csv.reader(file, strict=True), start=1)]
    header = [name.strip() for name in rows[0][1]] if rows else []
    return header, [(number, row) for number, row in rows[1:] if any(cell.strip() for cell in row)]


def _check_header(path: Path, header: list[str]) -> None:
    if "image" not in header:
        near = difflib.get_close_matches("image", [name.lower() for name in header], n=1, cutoff=0.5)
        hint = f"; is it {near[0]!r}?" if near else ""
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            hint = "; columns must be separated by commas"
        raise ValueError(f"{path}: no column 'image' among {header}{hint}")
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: columns {repeated} appear more than once")
    for name in header:
        near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.8)
        if name not in COLUMNS and near and near[0] not in header:
            log.warning("%s: column %r is kept but not used; is it %r?", path, name, near[0])


def _check_row(number: int, header: list[str], values: list[str], faults: list[str]) -> dict:
    """The row's cells by column, every known column present, numbers and codes read."""
    if len(values) > len(header):
        faults.append(f"row {number}: {len(values)} cells under {len(header)} columns; quote a cell that has commas")
    cells = dict(zip(header, values, strict=False))
    row = {name: cells.get(name, "") if name == "report" else cells.get(name, "").strip() for name in header}
    row = {**dict.fromkeys(COLUMNS, ""), **row}
    if not row["image"]:
        faults.append(f"row {number}: column 'image' is empty")
    if row["cohort"] not in COHORTS and row["cohort"].upper() in COHORTS:
        faults.append(f"row {number}: cohort {row['cohort']!r} is spelt {row['cohort'].upper()!r}")
    for name, allowed in ALLOWED.items():
        if row[name] and row[name] not in allowed:
            faults.append(f"row {number}: {name} {row[name]!r} is none of {', '.join(allowed)} (or empty if unknown)")
            row[name] = ""
    for name in (*NUMBER_FIELDS, "diagnosis_gap_days"):
        text = row[name]
        row[name] = _number(text)
        if text and row[name] is None:
            faults.append(f"row {number}: {name} {text!r} is not a number (leave it empty if unknown)")
    return row


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _with_ids(row: dict, folder: Path) -> dict:
    relative = Path(os.path.relpath(row["image"], folder) if os.path.isabs(row["image"]) else row["image"]).as_posix()
    scan_id = row["scan_id"] or relative
    return {
        **row,
        "scan_id": scan_id,
        "subject_id": row["subject_id"] or scan_id,
        "cohort": row["cohort"] or "custom",
    }


def _check_scan_ids(rows: list[tuple[int, dict]], faults: list[str]) -> None:
    first: dict[str, int] = {}
    for number, row in rows:
        before = first.setdefault(row["scan_id"], number)
        if before != number:
            faults.append(f"rows {before} and {number}: both have scan_id {row['scan_id']!r}")


def _decide_splits(rows: list[tuple[int, dict]], test_cohorts: tuple[str, ...], faults: list[str]) -> dict:
    """The split of every (cohort, subject_id)."""
    splits: dict[tuple[str, str], str] = {}
    decided_by: dict[tuple[str, str], int] = {}
    for number, row in rows:
        subject = row["cohort"], row["subject_id"]
        split = row["split"]
        if row["cohort"] in test_cohorts:
            if split not in ("", "test"):
                faults.append(f"row {number}: split {split!r}, but {row['cohort']} is a test cohort (--test-cohorts)")
            split = "test"
        if split and splits.setdefault(subject, split) != split:
            other = f"{splits[subject]!r} in row {decided_by[subject]}"
            faults.append(f"row {number}: subject {row['subject_id']!r} has split {split!r} here and {other}")
        if split:
            decided_by.setdefault(subject, number)

    undecided = sorted({(row["cohort"], row["subject_id"]) for _, row in rows} - splits.keys())
    if 0 < len(undecided) < MIN_SUBJECTS_TO_SPLIT:
        log.warning(
            "%d subjects without a split are too few to divide (from %d on): all of them train",
            len(undecided),
            MIN_SUBJECTS_TO_SPLIT,
        )
        return {**splits, **dict.fromkeys(undecided, "train")}
    return {**splits, **{subject: _drawn_split(*subject) for subject in undecided}}


def _drawn_split(cohort: str, subject_id: str) -> str:
    share = int(_hash(f"medblip-split/{cohort}/{subject_id}"), 16) / 2**64
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def _scan(number: int, row: dict, split: str, folder: Path) -> Scan:
    return Scan(
        row=number,
        scan_id=row["scan_id"],
        cohort=row["cohort"],
        subject_id=row["subject_id"],
        session_id=row["session_id"],
        image=folder / row["image"],
        split=split,
        diagnosis=row["diagnosis"] or None,
        diagnosis_source=row["diagnosis_source"],
        diagnosis_gap_days=row["diagnosis_gap_days"],
        acquired=row["acquired"],
        fields={"sex": row["sex"] or None, **{name: row[name] for name in NUMBER_FIELDS}},
        report=row["report"],
        extra={name: value for name, value in row.items() if name not in COLUMNS},
    )


def splits_of(subjects: Iterable[tuple[str, str]], test_cohorts: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """The split of every (cohort, subject_id) that has none yet, as `read_manifest` would decide it."""
    rows = [(0, {"cohort": cohort, "subject_id": subject, "split": ""}) for cohort, subject in sorted(set(subjects))]
    return _decide_splits(rows, test_cohorts, faults=[])


RELEASES = ("adni", "nacc", "oasis1", "oasis2", "oasis3", "aibl", "miriad", "bids")  # modules of sharding/cohorts


def main() -> None:
    """Turns the release that is named on the command line into a manifest."""
    from typing import Annotated, Union

    import tyro

    from sharding.release import one_row_per_subject, summary, write_release

    modules = {name: importlib.import_module(f"sharding.cohorts.{name}") for name in RELEASES}
    choices = tuple(
        Annotated[module.Options, tyro.conf.subcommand(name, description=module.__doc__)]
        for name, module in modules.items()
    )
    options = tyro.cli(Union[choices], prog="python -m sharding.manifest", description=__doc__)  # noqa: UP007 - made from RELEASES
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    module = sys.modules[type(options).__module__]
    try:
        for folder in (options.images, options.tables_folder.path):
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder")
        release = module.read(options)
        if not release.rows and not release.dropped:
            raise ValueError(
                f"{options.images}: no scan of this release was found below it; docs/data.md shows the layout"
            )
        if options.one_scan_per == "subject":
            one_row_per_subject(release)
        subjects = ((row["cohort"], row["subject_id"]) for row in release.rows)
        splits = splits_of(subjects, names_in(options.test_cohorts))
        for row in release.rows:
            row["split"] = splits[row["cohort"], row["subject_id"]]
        dropped = write_release(release, options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    log.info("%s", summary(release))
    log.info("ok %d scans -> %s, set aside %d -> %s", len(release.rows), options.out, len(release.dropped), dropped)
    print(options.out)


if __name__ == "__main__":
    main()
