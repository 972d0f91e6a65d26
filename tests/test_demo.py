"""`medblip demo`, small: the whole way from seven releases to an answer."""

import csv
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from medblip.demo import STUDIES, _summary


@pytest.mark.slow
def test_the_demo_goes_through_seven_releases_to_an_answer(tmp_path):
    command = [sys.executable, "-m", "medblip.cli", "demo", "--out", str(tmp_path), "--subjects", "60", "--steps", "4"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in STUDIES:
        assert (tmp_path / f"releases/{name}").is_dir() and (tmp_path / f"manifests/{name}.csv").is_file()
        assert f"sharding.manifest {name} --images" in done.stderr
    with open(tmp_path / "shards/split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["cohort"] for row in rows} == {"ADNI", "NACC", "OASIS1", "OASIS2", "OASIS3", "AIBL", "MIRIAD"}
    assert {row["split"] for row in rows if row["cohort"] in ("AIBL", "MIRIAD")} == {"test"}
    assert {row["split"] for row in rows if row["cohort"].startswith("OASIS")} == {"train"}
    report = json.loads((tmp_path / "evaluation/report.json").read_text())
    assert {"AIBL", "MIRIAD"} <= set(report["cohorts"])
    for name in ("scans.png", "losses.png", "confusion.png", "quality/index.html"):
        assert (tmp_path / name).stat().st_size > 10_000, name
    assert "medblip ask" in done.stderr and "this made-up patient was AD" in done.stderr


def test_the_summary_has_a_row_for_cohorts_that_are_too_small_for_an_interval_or_a_score(tmp_path):
    from rich.console import Console

    few = {"classes": ["CN", "MCI"], "balanced_accuracy": 0.5, "ci95": {"balanced_accuracy": None}}
    alone = {"classes": ["CN"], "balanced_accuracy": None, "ci95": None}
    arms = ("image", "text", "both", "shuffled_image")
    cohorts = {"FEW": dict.fromkeys(arms, few), "ALONE": dict.fromkeys(arms, alone)}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/report.json").write_text(json.dumps({"ehr": "none", "cohorts": cohorts}))
    console = Console(record=True, width=120)
    _summary(console, tmp_path, 60.0)
    shown = console.export_text()
    assert shown.count("too few subjects") == 4 and shown.count("one diagnosis only") == 4
