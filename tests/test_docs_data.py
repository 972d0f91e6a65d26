"""The commands of docs/data.md for each study, run on a release that is written as it is downloaded."""

import csv
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from sharding.manifest import RELEASES, read_manifest
from sharding.people import draw_volunteers, save_tiny

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
COHORTS = {name: name.upper() for name in RELEASES} | {"bids": "ADNI"}
STUDIES = (ROOT / "docs/data.md").read_text().split("## 2. ")[1].split("## 3. ")[0]
COMMANDS = re.findall(r"(?m)^python -m sharding\.manifest (\w+) (--images .+)$", STUDIES)


def write_release(name: str, folder) -> None:
    writer = importlib.import_module(f"sharding.releases.{name}")
    writer.write(draw_volunteers(COHORTS[name], 24, 2, seed=0), folder, save_tiny)


def test_every_study_has_its_command_in_the_page():
    assert {name for name, _ in COMMANDS} == set(RELEASES)


@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_the_command_of_the_page_makes_a_manifest_of_every_scan(tmp_path, name, options):
    folder = tmp_path / shlex.split(options)[1].split("/")[0]
    write_release(name, folder)
    if "--diagnosis-column group" in options:
        table = folder / "participants.tsv"
        rows = list(csv.DictReader(table.open(newline=""), delimiter="\t"))
        rows = [row | {"group": ("CN", "MCI", "AD")[number % 3]} for number, row in enumerate(rows)]
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    command = [sys.executable, "-m", "sharding.manifest", name, *shlex.split(options)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / done.stdout.strip()
    scans = read_manifest(out)
    assert len(scans) >= 24 and all(scan.image.is_file() for scan in scans)
    assert {scan.diagnosis for scan in scans} == ({"CN", "AD"} if name == "miriad" else {"CN", "MCI", "AD"})
    assert all(scan.fields["sex"] for scan in scans)
    found = int(re.search(r"(\d+) scans found", done.stderr)[1])
    with out.with_suffix(".dropped.csv").open(newline="") as file:
        assert found == len(scans) + len(list(csv.DictReader(file)))
