import csv
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.manifest import read_manifest
from sharding.merge import Options, merge


def write(path: Path, cohort: str, subjects: int = 40, **columns) -> Path:
    """A manifest of one scan a subject; `columns` are the same in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"scan_id": f"{cohort}-{n}", "cohort": cohort, "subject_id": f"p{n}", "image": f"{cohort}/{n}.nii"} | columns
        for n in range(subjects)
    ]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_keep_their_order_their_extra_columns_and_their_images(tmp_path):
    first = write(tmp_path / "a" / "adni.csv", "ADNI", 3, visit="m12")
    second = write(tmp_path / "b" / "custom.csv", "custom", 2, scanner="X")
    out = tmp_path / "all.csv"
    merge(Options(manifests=[first, second], out=out))
    rows = rows_of(out)
    assert [row["scan_id"] for row in rows] == ["ADNI-0", "ADNI-1", "ADNI-2", "custom-0", "custom-1"]
    assert [row["visit"] for row in rows] == ["m12"] * 3 + [""] * 2
    assert [row["scanner"] for row in rows] == [""] * 3 + ["X"] * 2
    images = [scan.image for scan in read_manifest(out)]
    assert images == [tmp_path / "a" / f"ADNI/{n}.nii" for n in range(3)] + [
        tmp_path / "b" / f"custom/{n}.nii" for n in range(2)
    ]


def test_splits_are_those_of_each_manifest_alone(tmp_path):
    adni, aibl = write(tmp_path / "adni.csv", "ADNI", 60), write(tmp_path / "aibl.csv", "AIBL")
    alone = {scan.scan_id: scan.split for path in (adni, aibl) for scan in read_manifest(path)}
    joint = {scan.scan_id: scan.split for scan in merge(Options(manifests=[adni, aibl], out=tmp_path / "all.csv"))}
    assert joint == alone
    assert {row["split"] for row in rows_of(tmp_path / "all.csv")} == {"train", "val", "test"}


def test_one_oasis_release_keeps_its_splits_and_two_go_to_one_side(tmp_path, caplog):
    caplog.set_level("INFO")
    one, two = write(tmp_path / "1.csv", "OASIS1", 60), write(tmp_path / "2.csv", "OASIS2", 60)
    assert {scan.split for scan in merge(Options(manifests=[one], out=tmp_path / "a.csv"))} == {"train", "val", "test"}
    assert {scan.split for scan in merge(Options(manifests=[one, two], out=tmp_path / "b.csv"))} == {"train"}
    assert "OASIS1, OASIS2 may share people" in caplog.text
    own = merge(Options(manifests=[one, two], out=tmp_path / "c.csv", oasis="own"))
    assert {scan.split for scan in own} == {"train", "val", "test"}
    tested = merge(Options(manifests=[one, two], out=tmp_path / "d.csv", test_cohorts="OASIS1,OASIS2"))
    assert {scan.split for scan in tested} == {"test"}
    with pytest.raises(ValueError, match="OASIS1 of --test-cohorts may share people with OASIS2"):
        merge(Options(manifests=[one, two], out=tmp_path / "e.csv", test_cohorts="OASIS1"))


@pytest.mark.parametrize("joined", [("NACC", "OASIS3"), ("ADNI", "OASIS1"), ("ADNI", "NACC")])
def test_releases_that_may_share_people_are_warned_about(tmp_path, caplog, joined):
    manifests = [write(tmp_path / f"{name}.csv", name) for name in joined]
    merge(Options(manifests=manifests, out=tmp_path / "all.csv"))
    warnings = [record.getMessage() for record in caplog.records if "may be in" in record.getMessage()]
    assert len(warnings) == 1 and all(name in warnings[0] for name in joined)
    caplog.clear()
    merge(Options(manifests=manifests[:1], out=tmp_path / "one.csv"))
    assert "may be in" not in caplog.text


def test_clashes_are_named_with_both_files_and_rows(tmp_path):
    first, second = write(tmp_path / "a.csv", "ADNI", 2), write(tmp_path / "b.csv", "ADNI", 1)
    with pytest.raises(ValueError) as raised:
        merge(Options(manifests=[first, second], out=tmp_path / "all.csv"))
    assert f"{second} row 2: scan id 'ADNI-0' is that of {first} row 2" in str(raised.value)
    assert not (tmp_path / "all.csv").exists() and not list(tmp_path.glob(".*"))


def test_a_subject_in_two_splits_is_refused(tmp_path):
    first = write(tmp_path / "a.csv", "ADNI", 1, split="train")
    second = write(tmp_path / "b.csv", "ADNI", 1, split="test", scan_id="again", image="again.nii")
    with pytest.raises(
        ValueError, match=r"b\.csv row 2: subject 'p0' of ADNI is in 'test', and in 'train' in .*a\.csv"
    ):
        merge(Options(manifests=[first, second], out=tmp_path / "all.csv"))


def test_the_command_says_what_it_joined_and_fails_with_1(tmp_path):
    manifest = write(tmp_path / "a.csv", "ADNI", 30, diagnosis="CN")
    command, out = [sys.executable, "-m", "sharding.merge", str(manifest)], ["--out", str(tmp_path / "all.csv")]
    done = subprocess.run([*command, *out], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "all.csv")
    assert "30 CN" in done.stderr and "ok 30 scans of 1 manifests" in done.stderr
    failed = subprocess.run([*command, str(manifest), *out], capture_output=True, text=True)
    assert failed.returncode == 1 and "clashes" in failed.stderr and "Traceback" not in failed.stderr
