"""Which scans are unlike the others of their cohort, and which images are there twice.

Scanners differ, so a scan is compared with its cohort: how many median absolute deviations (MAD) it lies from the
median, measure by measure. A cohort of a few scans is compared with all.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from sharding.packed import PackedScan

MIN_COHORT = 20  # scans; below, a median and a MAD say little
SAME = 0.9999  # correlation of two thumbnails from which on two images are nearly the same
MAX_COPIES_NAMED = 3
PAIR_ROWS = 500  # compared with all at a time; with 30,000 scans 60 MB


@dataclass(frozen=True)
class Measure:
    """How a measure is told and judged."""

    text: str
    """For a person, with the value's place."""
    bad: tuple[str, ...]
    """Which side is suspicious: below, above."""
    least_mad: float
    """A cohort that is more uniform than this is treated as if it had this MAD."""


MEASURES = {
    "foreground_ml": Measure("foreground {:.0f} ml", ("below", "above"), 20),
    "mean": Measure("mean intensity {:.0f} of 255", ("below", "above"), 2),
    "p90": Measure("90th percentile {:.0f} of 255", ("below", "above"), 2),
    "contrast": Measure("contrast {:.2f}", ("below",), 0.01),
    "entropy_bits": Measure("entropy {:.1f} bits", ("below",), 0.05),
    "empty_slices": Measure("empty slices {:.0%}", ("above",), 0.01),
    "cut": Measure("cut off, {:.0%} of a side is head", ("above",), 0.005),
    "likeness": Measure("likeness to the median scan {:.2f}", ("below",), 0.003),
}


@dataclass
class Judged:
    """A scan, its measures, and what is suspicious about it."""

    scan: PackedScan
    measures: dict[str, float]
    score: float
    """The largest distance from the cohort's median on a bad side, in MAD."""
    flags: list[str]
    """In words; empty if nothing is suspicious."""
    is_copy: bool
    """The same image is there under another subject."""


def judge(scans: list[PackedScan], measures: list[dict], thumbnails: np.ndarray, max_mads: float) -> list[Judged]:
    """Compares every scan with its cohort; the worst come first, copies under another subject before all.

    `measures` and `thumbnails` (scans x 512) are those of `sharding.packed.measure`, in the order of `scans`; the
    measure `likeness` is added: the correlation of a thumbnail with the median one of what it is compared with.
    """
    judged = [Judged(scan, found, 0.0, [], False) for scan, found in zip(scans, measures, strict=True)]
    unit = _unit(thumbnails)
    for group, (rows, reference) in _groups(scans).items():
        likeness = unit @ _unit(np.median(thumbnails[reference], axis=0, keepdims=True))[0]
        for name, measure in MEASURES.items():
            values = likeness if name == "likeness" else np.array([found[name] for found in measures])
            median = np.median(values[reference])
            mad = max(np.median(np.abs(values[reference] - median)), measure.least_mad)
            for row in rows:
                side, mads = "below" if values[row] < median else "above", float(abs(values[row] - median) / mad)
                judged[row].measures[name] = float(values[row])
                if side in measure.bad:
                    judged[row].score = max(judged[row].score, mads)
                    if mads > max_mads:
                        judged[row].flags.append(f"{measure.text.format(values[row])}, {mads:.1f} MAD {side} {group}")
    _flag_copies(judged, unit)
    return sorted(judged, key=lambda one: (-one.is_copy, -one.score, one.scan.name))


def _groups(scans: list[PackedScan]) -> dict[str, tuple[list[int], list[int]]]:
    """By name: the rows that are judged, and those that they are compared with."""
    cohorts: dict[str, list[int]] = defaultdict(list)
    for row, scan in enumerate(scans):
        cohorts[scan.cohort].append(row)
    groups = {name: (rows, rows) for name, rows in cohorts.items() if len(rows) >= MIN_COHORT}
    in_small = [row for rows in cohorts.values() if len(rows) < MIN_COHORT for row in rows]
    return groups | ({"all scans": (in_small, list(range(len(scans))))} if in_small else {})


def _flag_copies(judged: list[Judged], unit: np.ndarray) -> None:
    """Flags both scans of a pair: the same voxels, by fingerprint, or nearly the same, by thumbnail."""
    copies: dict[int, list[int]] = defaultdict(list)
    for first in range(0, len(judged), PAIR_ROWS):
        alike = unit[first : first + PAIR_ROWS] @ unit.T > SAME
        for row, other in np.argwhere(alike).tolist():
            if first + row != other:
                copies[first + row].append(other)
    same: dict[str, list[int]] = defaultdict(list)
    for row, one in enumerate(judged):
        same[one.scan.fingerprint].append(row)

    for row, one in enumerate(judged):
        others = sorted({*copies[row], *same[one.scan.fingerprint]} - {row})
        others.sort(key=lambda other: judged[other].scan.subject == one.scan.subject)
        for other in others[:MAX_COPIES_NAMED]:
            scan = judged[other].scan
            is_other = scan.subject != one.scan.subject
            one.is_copy |= is_other
            what = "the same image" if scan.fingerprint == one.scan.fingerprint else "nearly the same image"
            who = "of another subject" if is_other else "of the same subject"
            one.flags.insert(0, f"{what} as {scan.name} {who}, in {scan.split}")


def _unit(thumbnails: np.ndarray) -> np.ndarray:
    """Rows without their mean, of length 1, so that products are correlations; a constant one stays 0."""
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
