import csv

import pytest

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
