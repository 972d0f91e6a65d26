import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sharding.audit import Options, audit, render
from sharding.build import Options as BuildOptions
from sharding.build import build

DIAGNOSES = ("CN", "MCI", "AD")


def write(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def cohort(people: int = 60, sessions: int = 1) -> list[dict]:
    """Subjects of each diagnosis; CDR says the diagnosis, MMSE nearly, sex nothing."""
    draw = np.random.default_rng(0)
    rows = []
    for n in range(people):
        stage, sex, age = n % 3, str(draw.choice(["F", "M"])), draw.integers(60, 90)
        for session in range(sessions):
            rows.append(
                {
                    "scan_id": f"s{n}-{session}",
                    "subject_id": f"p{n}",
                    "session_id": f"m{12 * session:02d}",
                    "cohort": "ADNI",
                    "image": f"{n}-{session}.nii",
                    "diagnosis": DIAGNOSES[stage],
                    "cdr_global": (0, 0.5, 1)[stage],
                    "mmse": int(np.clip(29 - 4 * stage + draw.normal(0, 1.5), 0, 30)),
                    "sex": sex,
                    "age_years": age + session,
                    "acquired": f"20{10 + session}-01-01",
                }
            )
    return rows


def found(path: Path, kind: str, **options) -> list[str]:
    result = audit(Options(manifest=path, **options))
    return [finding["what"] for finding in result["findings"] if finding["kind"] == kind]


def test_a_clean_manifest_has_no_finding(tmp_path):
    result = audit(Options(manifest=write(tmp_path / "m.csv", cohort(sessions=2))))
    assert result["findings"] == []
    assert sum(row["scans"] for row in result["classes"]) == 120
    assert "no subject or image in two splits" in render(result)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"age_years": 7}, "age_years is 7, not 18..110"),
        ({"mmse": 31}, "mmse is 31, not 0..30"),
        ({"mmse": 27.5}, "mmse is 27.5, not 0..30 in steps of 1"),
        ({"cdr_global": 0.7}, "cdr_global is 0.7, not 0, 0.5, 1, 2, 3"),
        ({"cdr_sb": 18.5}, "cdr_sb is 18.5"),
        ({"apoe_e4": 3}, "apoe_e4 is 3"),
        ({"field_strength_t": 30}, "field_strength_t is 30"),
    ],
)
def test_an_implausible_value_is_named_with_its_row(tmp_path, change, words):
    rows = cohort()
    rows[7] |= change
    (what,) = found(write(tmp_path / "m.csv", rows), "implausible value")
    assert what.startswith("row 9 (ADNI s7-0)") and words in what


def test_flips_of_a_diagnosis_are_told_apart(tmp_path):
    rows = cohort(sessions=3)
    paths = {0: ("CN", "MCI", "CN"), 1: ("MCI", "MCI", "CN"), 2: ("MCI", "AD", "AD")}
    for n, diagnoses in paths.items():
        for session, diagnosis in enumerate(diagnoses):
            rows[3 * n + session] |= {"diagnosis": diagnosis, "cdr_global": ""}
    path = write(tmp_path / "m.csv", rows)
    assert found(path, "a diagnosis goes back and forth") == ["ADNI p0: CN -> MCI -> CN"]
    assert found(path, "a diagnosis improves") == ["ADNI p1: MCI -> MCI -> CN"]


def test_a_person_that_contradicts_itself_is_named(tmp_path):
    rows = cohort(sessions=2)
    rows[1]["sex"] = "M" if rows[0]["sex"] == "F" else "F"
    rows[3]["age_years"] = int(rows[2]["age_years"]) - 5
    rows[4] |= {"diagnosis": "AD", "cdr_global": 0}
    rows[5] |= {"diagnosis": "AD", "cdr_global": 1}
    path = write(tmp_path / "m.csv", rows)
    assert found(path, "a person changes") == ["ADNI p0: sex is F and M"]
    assert "ADNI p1" in found(path, "age runs backwards")[0]
    assert found(path, "diagnosis and CDR contradict") == ["row 6 (ADNI s2-0): AD with CDR 0"]


def test_a_subject_in_two_splits_is_severe(tmp_path):
    rows = cohort(sessions=2)
    rows[0]["split"], rows[1]["split"] = "train", "test"
    path = write(tmp_path / "m.csv", rows)
    result = audit(Options(manifest=path))
    (severe,) = [finding for finding in result["findings"] if finding["severe"]]
    assert severe["kind"] == "a subject in two splits" and "ADNI p0" in severe["what"]
    done = subprocess.run([sys.executable, "-m", "sharding.audit", str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "SEVERE: a subject in two splits" in done.stdout and not done.stderr.count("Trace")


def images(folder: Path, rows: list[dict]) -> None:
    for number, row in enumerate(rows):
        array = np.random.default_rng(number).integers(1, 900, (20, 24, 18)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([3.0, 3, 3, 1])), folder / row["image"])


def test_one_file_under_two_ids_is_found_by_its_bytes(tmp_path):
    rows = cohort(people=21)
    rows[4] |= {"split": "train"}
    rows[9] |= {"split": "test"}
    images(tmp_path, rows)
    (tmp_path / rows[9]["image"]).write_bytes((tmp_path / rows[4]["image"]).read_bytes())
    result = audit(Options(manifest=write(tmp_path / "m.csv", rows)))
    (finding,) = [finding for finding in result["findings"] if finding["kind"] == "one image, several subjects"]
    assert finding["severe"] and "s4-0" in finding["what"] and "s9-0" in finding["what"]


def test_one_image_in_two_cohorts_is_found_by_its_voxels(tmp_path):
    rows = cohort(people=6)
    for row in rows[3:]:
        row["cohort"] = "NACC"
    images(tmp_path, rows)
    # Another file, another header, the same voxels.
    image = nib.load(tmp_path / rows[0]["image"])
    nib.save(nib.Nifti2Image(np.asarray(image.dataobj), image.affine), tmp_path / rows[5]["image"])
    path = write(tmp_path / "m.csv", rows)
    assert found(path, "one image, several subjects") == []
    build(BuildOptions(manifest=path, out=tmp_path / "shards", size=32, spacing_mm=6.0, workers=1))
    (what,) = found(path, "one image, several subjects", shards=tmp_path / "shards")
    assert "ADNI s0-0" in what and "NACC s5-0" in what


def test_shards_of_another_manifest_are_refused(tmp_path):
    rows = cohort(people=3)
    images(tmp_path, rows)
    build(BuildOptions(manifest=write(tmp_path / "m.csv", rows), out=tmp_path / "s", size=32, spacing_mm=6, workers=1))
    other = write(tmp_path / "other.csv", [row | {"subject_id": "x"} for row in rows])
    with pytest.raises(ValueError, match="3 samples are not of this manifest"):
        audit(Options(manifest=other, shards=tmp_path / "s"))


def test_the_leakage_table_names_what_gives_the_label_away(tmp_path):
    rows = [row | {"stage_code": row["diagnosis"].lower(), "site": n % 7} for n, row in enumerate(cohort(people=120))]
    for row in rows:
        if row["diagnosis"] == "CN":
            row["age_years"] = ""  # measured in patients only: that it is missing tells
        row["report"] = "memory complaint" if row["diagnosis"] == "AD" else "feels well"
    table = {row["field"]: row for row in audit(Options(manifest=write(tmp_path / "m.csv", rows)))["leakage"]}
    for field in ("cdr_global", "stage_code"):
        assert table[field]["balanced_accuracy"] > 0.95 and table[field]["note"] == "gives the label away"
    assert 0.6 < table["mmse"]["balanced_accuracy"] <= 1 and table["mmse"]["note"]
    for field in ("sex", "site"):
        assert table[field]["balanced_accuracy"] < 0.5 and table[field]["note"] == ""
    assert table["which fields are missing"]["balanced_accuracy"] > 0.6
    assert table["report (its words)"]["balanced_accuracy"] > 0.6
    assert table["age_years"]["known"] == pytest.approx(2 / 3)


def test_repeat_scans_do_not_flatter_the_leakage_table(tmp_path):
    # Each person has a number of their own: a model that met the person would know the diagnosis.
    rows = [row | {"own_number": row["subject_id"][1:]} for row in cohort(people=60, sessions=6)]
    draw = np.random.default_rng(1)
    diagnoses = dict(zip({row["subject_id"] for row in rows}, draw.permutation(np.tile(DIAGNOSES, 20)), strict=True))
    for row in rows:
        row["diagnosis"], row["cdr_global"] = diagnoses[row["subject_id"]], ""
    table = {row["field"]: row for row in audit(Options(manifest=write(tmp_path / "m.csv", rows)))["leakage"]}
    assert table["own_number"]["balanced_accuracy"] < 0.55


def test_findings_for_programs_are_those_for_people(tmp_path):
    rows = cohort()
    rows[0]["mmse"] = 31
    path = write(tmp_path / "m.csv", rows)
    command = [sys.executable, "-m", "sharding.audit", str(path), "--json", str(tmp_path / "audit.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "mmse is 31" in done.stdout
    result = json.loads((tmp_path / "audit.json").read_text())
    assert [finding["kind"] for finding in result["findings"]] == ["implausible value"]
    assert {row["field"] for row in result["leakage"]} >= {"cdr_global", "mmse", "sex"}
