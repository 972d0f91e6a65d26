"""Looks through a manifest for what would make a score untrue, before a GPU hour is spent on it.

1. subjects in two splits, and the same image under two ids (`--shards`: by the prepared voxels' fingerprint, which also
   finds a scan that two cohorts share; else by the files' bytes);
2. diagnoses that go back and forth, and a person whose sex, APOE or age contradicts itself;
3. values that no person has (age 7, MMSE 31, CDR 0.7), and a CDR that contradicts the diagnosis;
4. how the classes are spread over splits and cohorts;
5. the leakage table: how well each record field alone predicts the diagnosis.

The exit status is 1 if a subject or an image is in two splits: a test on them would be untrue. All else is for you to
judge.

Examples:
    python -m sharding.audit manifest.csv
    python -m sharding.audit manifest.csv --shards shards/ --json audit.json
"""

import csv
import hashlib
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sharding.leakage import leakage_table
from sharding.manifest import Scan, names_in, read_scans
from sharding.shard import sha256_of, write_whole

log = logging.getLogger(__name__)

# What a person can have. CDR and its sum of boxes go in fixed steps; the others are ranges.
PLAUSIBLE = {
    "age_years": (18, 110),
    "education_years": (0, 30),
    "apoe_e4": (0, 2),
    "mmse": (0, 30),
    "moca": (0, 30),
    "cdr_global": (0, 3),
    "cdr_sb": (0, 18),
    "field_strength_t": (0.2, 11.7),
}
STEPS = {"apoe_e4": 1, "mmse": 1, "moca": 1, "cdr_sb": 0.5}
CDR_STAGES = (0, 0.5, 1, 2, 3)
SEVERITY = {"CN": 0, "MCI": 1, "AD": 2}
PROBE_BYTES = 2**16  # compared in the middle of files of one size, before whole files are


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to audit."""

    manifest: Annotated[Path, tyro.conf.Positional]
    """The manifest, of one cohort or merged."""
    shards: Path | None = None
    """Folder that sharding.build made of it: images are compared by their prepared voxels."""
    test_cohorts: str = "AIBL,MIRIAD"
    """Cohorts that are only ever tested on, separated by commas."""
    json: Path | None = None
    """File for the findings, for programs."""


@dataclass(frozen=True)
class Finding:
    """One thing that a person should look at."""

    kind: str
    what: str
    severe: bool = False


def audit(options: Options) -> dict:
    """All findings: `{"findings": [{kind, what, severe}], "classes": …, "leakage": [rows of leakage.py]}`."""
    scans, faults = read_scans(options.manifest, test_cohorts=names_in(options.test_cohorts))
    findings = [Finding("the manifest is refused as it is", fault) for fault in faults]
    for group in _by_subject(scans).values():
        findings += _two_splits(group) + _contradictions(group)
    findings += _same_images(options, scans)
    findings += [finding for scan in scans for finding in _implausible(scan)]
    return {
        "findings": [vars(finding) for finding in findings],
        "classes": _classes(scans),
        "leakage": leakage_table(scans),
    }


def _by_subject(scans: list[Scan]) -> dict[tuple[str, str], list[Scan]]:
    groups = defaultdict(list)
    for scan in scans:
        groups[scan.cohort, scan.subject_id].append(scan)
    return groups


def _name(scan: Scan) -> str:
    return f"row {scan.row} ({scan.cohort} {scan.scan_id})"


def _two_splits(group: list[Scan]) -> list[Finding]:
    if len({scan.split for scan in group}) == 1:
        return []
    places = ", ".join(f"{_name(scan)} in {scan.split}" for scan in group)
    return [Finding("a subject in two splits", f"{group[0].cohort} {group[0].subject_id}: {places}", severe=True)]


def _same_images(options: Options, scans: list[Scan]) -> list[Finding]:
    if options.shards is not None:
        groups = _groups_by_fingerprint(options.shards, scans)
    else:
        groups = _groups_by_bytes(scans)
    findings = []
    for group in groups:
        subjects, splits = {(scan.cohort, scan.subject_id) for scan in group}, {scan.split for scan in group}
        kind = "one image, several subjects" if len(subjects) > 1 else "one image, several scans"
        names = ", ".join(f"{_name(scan)} in {scan.split}" for scan in group)
        findings.append(Finding(kind, names, severe=len(splits) > 1))
    return findings


def _groups_by_fingerprint(shards: Path, scans: list[Scan]) -> list[list[Scan]]:
    """Scans whose prepared voxels are the same.

    Raises:
        ValueError: the shards are not of this manifest.
    """
    index = json.loads((shards / "index.json").read_bytes())
    by_key = {scan.key: scan for scan in scans}
    samples = [sample for shard in index["shards"] for sample in shard["samples"]]
    strangers = [sample["key"] for sample in samples if sample["key"] not in by_key]
    if strangers:
        raise ValueError(f"{shards}: {len(strangers)} samples are not of this manifest, the first is {strangers[0]}")
    groups = defaultdict(list)
    for sample in samples:
        groups[sample["fingerprint"]].append(by_key[sample["key"]])
    return [group for group in groups.values() if len(group) > 1]


def _groups_by_bytes(scans: list[Scan]) -> list[list[Scan]]:
    """Scans whose files are the same, looking closer only at files that agree so far."""
    groups = [[scan for scan in scans if scan.image.is_file()]]
    for look in (lambda path: path.stat().st_size, _middle, sha256_of):
        closer = defaultdict(list)
        for number, group in enumerate(groups):
            for scan in group:
                closer[number, look(scan.image)].append(scan)
        groups = [group for group in closer.values() if len(group) > 1]
    return groups


def _middle(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) // 2 - PROBE_BYTES // 2))
        return hashlib.sha256(file.read(PROBE_BYTES)).digest()


def _contradictions(group: list[Scan]) -> list[Finding]:
    """What does not fit together within one subject."""
    found = []
    first = group[0]
    person = f"{first.cohort} {first.subject_id}"
    for name in ("sex", "apoe_e4"):
        values = sorted({str(scan.fields[name]) for scan in group if scan.fields[name] is not None})
        if len(values) > 1:
            found.append(Finding("a person changes", f"{person}: {name} is {' and '.join(values)}"))

    ordered = sorted(group, key=lambda scan: (scan.acquired, scan.session_id, scan.fields["age_years"] or 0))
    ages = [scan for scan in ordered if scan.fields["age_years"] is not None and scan.acquired]
    for before, after in zip(ages, ages[1:], strict=False):
        if after.fields["age_years"] < before.fields["age_years"] - 1:
            years = f"{before.fields['age_years']:g} years in {_name(before)}, later {after.fields['age_years']:g}"
            found.append(Finding("age runs backwards", f"{person}: {years}"))

    stages = [(SEVERITY[scan.diagnosis], scan) for scan in ordered if scan.diagnosis]
    changes = [after - before for (before, _), (after, _) in zip(stages, stages[1:], strict=False) if after != before]
    path = " -> ".join(scan.diagnosis for _, scan in stages)
    if any(change > 0 for change in changes) and any(change < 0 for change in changes):
        found.append(Finding("a diagnosis goes back and forth", f"{person}: {path}"))
    elif any(change < 0 for change in changes):
        found.append(Finding("a diagnosis improves", f"{person}: {path}"))
    return found


def _implausible(scan: Scan) -> list[Finding]:
    found = []
    for name, (low, high) in PLAUSIBLE.items():
        value = scan.fields[name]
        if value is None:
            continue
        wrong = not low <= value <= high or (name in STEPS and value % STEPS[name] != 0)
        if wrong or (name == "cdr_global" and value not in CDR_STAGES):
            allowed = ", ".join(f"{stage:g}" for stage in CDR_STAGES) if name == "cdr_global" else f"{low:g}..{high:g}"
            step = f" in steps of {STEPS[name]:g}" if name in STEPS else ""
            found.append(Finding("implausible value", f"{_name(scan)}: {name} is {value:g}, not {allowed}{step}"))
    cdr = scan.fields["cdr_global"]
    if (scan.diagnosis == "CN" and (cdr or 0) >= 1) or (scan.diagnosis == "AD" and cdr == 0):
        found.append(Finding("diagnosis and CDR contradict", f"{_name(scan)}: {scan.diagnosis} with CDR {cdr:g}"))
    return found


def _classes(scans: list[Scan]) -> list[dict]:
    """Scans and subjects of each cohort, split and diagnosis."""
    groups = defaultdict(list)
    for scan in scans:
        groups[scan.cohort, scan.split, scan.diagnosis or "none"].append(scan.subject_id)
    return [
        {"cohort": cohort, "split": split, "diagnosis": diagnosis, "scans": len(ids), "subjects": len(set(ids))}
        for (cohort, split, diagnosis), ids in sorted(groups.items())
    ]


def render(result: dict) -> str:
    """The findings as a person reads them."""
    lines = []
    findings = sorted(result["findings"], key=lambda finding: (not finding["severe"], finding["kind"]))
    by_kind = defaultdict(list)
    for finding in findings:
        by_kind[finding["kind"], finding["severe"]].append(finding["what"])
    for (kind, severe), whats in by_kind.items():
        lines.append(f"{'SEVERE: ' if severe else ''}{kind}: {len(whats)}")
        lines += [f"  {what}" for what in whats[:20]]
        lines += [f"  ... and {len(whats) - 20} more (--json has all)"] if len(whats) > 20 else []
    lines += [] if findings else ["no subject or image in two splits, no implausible value"]

    lines += [
        "",
        "scans (subjects) by diagnosis",
        f"  {'cohort':<10}{'split':<7}{'CN':>14}{'MCI':>14}{'AD':>14}{'none':>14}",
    ]
    table = defaultdict(dict)
    for row in result["classes"]:
        table[row["cohort"], row["split"]][row["diagnosis"]] = f"{row['scans']} ({row['subjects']})"
    for (cohort, split), cells in table.items():
        shown = "".join(f"{cells.get(name, '-'):>14}" for name in ("CN", "MCI", "AD", "none"))
        lines.append(f"  {cohort:<10}{split:<7}{shown}")

    lines += ["", "leakage: diagnosis predicted from one field alone, subjects kept apart in cross-validation"]
    if not result["leakage"]:
        lines.append("  too few subjects with a diagnosis")
    else:
        lines.append(f"  {'field':<22}{'balanced accuracy':>18}{'chance':>8}{'known':>8}")
    for row in result["leakage"]:
        note = f"   {row['note']}" if row["note"] else ""
        lines.append(
            f"  {row['field']:<22}{row['balanced_accuracy']:>18.2f}{row['chance']:>8.2f}{row['known']:>8.0%}{note}"
        )
    return "\n".join(lines)


def main() -> None:
    options = tyro.cli(Options, prog="python -m sharding.audit", description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        result = audit(options)
        if options.json:
            write_whole(options.json, json.dumps(result, indent=1).encode())
    except (ValueError, OSError, csv.Error) as error:
        sys.exit(f"error: {error}")
    print(render(result))
    severe = Counter(finding["severe"] for finding in result["findings"])
    log.info("%d severe findings, %d others", severe[True], severe[False])
    sys.exit(1 if severe[True] else 0)


if __name__ == "__main__":
    main()
