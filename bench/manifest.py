"""How long a release of 30,000 scans takes to become a manifest, and how much memory.

Each release is written by its own writer (sharding/releases) with files of a few bytes in place of scans: adapters only
read names, tables and headers. NACC's UDS table is padded to its real size with rows of people who were not scanned.

    python bench/manifest.py [--scans 30000] [--releases adni oasis3] [--json manifest.json]
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import tyro

from sharding.manifest import RELEASES
from sharding.people import Exam, Volunteer, draw_volunteers

EXAMS = 3
UDS_ROWS, UDS_COLUMNS = 206_000, 1_500
# More people would not fit into the ids of these releases.
MOST_PEOPLE = {"oasis1": 9_999, "oasis2": 9_999, "bids": 9_999, "oasis3": 9_999, "adni": 9_999}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Seconds and megabytes of `python -m sharding.manifest` for each release."""

    scans: int = 30_000
    """Scans in each release, as far as its ids go."""
    releases: tuple[str, ...] = RELEASES
    """Which releases."""
    json: Path | None = None
    """File for the table."""


def main(options: Options) -> int:
    """Writes, times and prints one release after the other."""
    rows = []
    print(f"{'release':<10}{'scans found':>12}{'wall s':>10}{'CPU s':>10}{'MB':>8}")
    for name in options.releases:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, options.scans, Path(folder))
        rows.append(row)
        print(
            f"{name:<10}{row['scans']:>12}{row['wall_s']:>10.1f}{row['cpu_s']:>10.1f}{row['peak_mb']:>8.0f}", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(name: str, num_scans: int, folder: Path) -> dict:
    """Time and memory of one release's manifest."""
    count = min(num_scans // EXAMS, MOST_PEOPLE.get(name, num_scans))
    people = draw_volunteers(name.upper(), count, EXAMS, seed=0)
    importlib.import_module(f"sharding.releases.{name}").write(people, folder, save_nothing(folder / "tiny.nii"))
    if name == "nacc":
        pad_uds(folder)
    images = folder / "images" if (folder / "images").is_dir() else folder
    command = [sys.executable, "-m", "sharding.manifest", name, "--images", images, "--out", folder / "manifest.csv"]
    if (folder / "tables").is_dir():
        command += ["--tables", folder / "tables"]
    started_at = time.perf_counter()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - started_at
    told = (folder / "log.txt").read_text()
    assert status == 0, told
    scans = int(re.search(r"(\d+) scans found", told)[1])
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"release": name, "scans": scans, "wall_s": elapsed_s, "cpu_s": cpu_s, "peak_mb": usage.ru_maxrss / 1024}


def save_nothing(tiny: Path):
    """A `SaveImage` that writes the same smallest scan everywhere."""
    image = nib.Nifti1Image(np.zeros((16, 16, 16), np.uint8), np.diag([4.0, 4, 4, 1]))
    image.to_filename(tiny)
    content = tiny.read_bytes()

    def save(path: Path, volunteer: Volunteer, exam: Exam, axes: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if path.suffix == ".hdr":
            path.with_suffix(".img").write_bytes(b"")

    return save


def pad_uds(folder: Path) -> None:
    """Gives the UDS table the rows and columns that it really has."""
    (table,) = [path for path in folder.rglob("investigator_nacc*.csv")]
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    more = ["0"] * (UDS_COLUMNS - len(header))
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, *(f"X{number}" for number in range(len(more)))])
        writer.writerows(row + more for row in rows)
        stranger = dict(zip(header, rows[0], strict=True))
        for number in range(UDS_ROWS - len(rows)):
            stranger["NACCID"] = f"NACC{900_000 + number % 99_000:06d}"
            writer.writerow([*stranger.values(), *more])


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
