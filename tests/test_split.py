import csv

import nibabel as nib
import numpy as np
import pytest
from test_build import options, write_cohort

from sharding.build import build
from sharding.manifest import read_manifest
from sharding.split import apply_split

HEADER = "scan_id,subject_id,cohort,split,sha256\n"


@pytest.fixture
def scans(tmp_path):
    rows = "".join(f"s{n},p{n // 2},ADNI,{n}.nii\n" for n in range(60))
    (tmp_path / "m.csv").write_text("scan_id,subject_id,cohort,image\n" + rows)
    return read_manifest(tmp_path / "m.csv")


def split_file(tmp_path, text):
    path = tmp_path / "split.csv"
    path.write_text(HEADER + text)
    return path


def test_a_split_from_elsewhere_decides_who_is_in_and_where(tmp_path, scans, caplog):
    path = split_file(tmp_path, "s1,p0,ADNI,test,aa\ns0,p0,ADNI,test,bb\ns7,p3,ADNI,train,\ngone,p99,ADNI,val,cc\n")
    kept, missing = apply_split(scans, path)
    assert [(scan.scan_id, scan.split, scan.expected_sha256) for scan in kept] == [
        ("s0", "test", "bb"),
        ("s1", "test", "aa"),
        ("s7", "train", ""),
    ]
    rows = list(csv.reader(missing.decode().splitlines()))
    assert rows[:2] == [["in", "cohort", "subject_id", "scan_id"], ["split file", "ADNI", "p99", "gone"]]
    assert len(rows) == 1 + 1 + 57
    assert "1 scans of the split file are not in the manifest: gone" in caplog.text
    assert "57 scans of the manifest are not in the split file" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lacks rows"),
        ("s0,p0,ADNI,training,\n", "row 2: split 'training'"),
        ("s0,p0,ADNI,test,\ns0,p0,ADNI,test,\n", "row 3: scan 's0' is in row 2"),
        ("s0,p0,ADNI,test,\ns1,p0,ADNI,train,\n", "row 3: subject 'p0' is in test and train"),
        ("x,y,z,test,\n", "names no scan of the manifest"),
    ],
)
def test_a_split_file_that_cannot_be_applied_is_refused(tmp_path, scans, text, words):
    with pytest.raises(ValueError, match=words):
        apply_split(scans, split_file(tmp_path, text))


def test_another_table_is_not_taken_for_a_split_file(tmp_path, scans):
    with pytest.raises(ValueError, match="lacks split"):
        apply_split(scans, tmp_path / "m.csv")


def test_a_build_repeats_the_split_of_another_build(tmp_path):
    theirs = write_cohort(tmp_path / "theirs", subjects=6)
    assert build(options(theirs, tmp_path / "a")) == 0
    # Here one scan is missing, one is new, one is another image, and the manifest has no split.
    ours = write_cohort(tmp_path / "ours", subjects=7)
    image = nib.load(tmp_path / "ours/p1.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), tmp_path / "ours/p1.nii.gz")
    rows = [line.split(",")[:-1] for line in ours.read_text().splitlines() if not line.startswith("p2")]
    ours.write_text("\n".join(",".join(row) for row in rows) + "\n")
    split_file = tmp_path / "a/split.csv"
    assert build(options(ours, tmp_path / "b", split_file=split_file)) == 0

    def table(path):
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    had = {row["scan_id"]: row for row in table(split_file)}
    have = {row["scan_id"]: row for row in table(tmp_path / "b/split.csv")}
    assert have == {name: row for name, row in had.items() if name not in ("p1.nii.gz", "p2.nii.gz")}
    assert {row["split"] for row in have.values()} == {"train", "val"}
    rejected = {row["scan"]: row for row in table(tmp_path / "b/rejected.csv")}
    assert rejected["p1.nii.gz"]["stage"] == "split" and "another image" in rejected["p1.nii.gz"]["reason"]
    missing = {(row["in"], row["scan_id"]) for row in table(tmp_path / "b/split.missing.csv")}
    assert missing == {("split file", "p2.nii.gz"), ("manifest", "p3.nii.gz"), ("manifest", "p6.nii.gz")}
    with pytest.raises(ValueError, match="split_file was"):
        build(options(ours, tmp_path / "b"))
