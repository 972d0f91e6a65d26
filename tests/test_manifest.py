import logging
from collections import Counter

import pytest

from sharding.manifest import NUMBER_FIELDS, read_manifest


def write(tmp_path, text: str, encoding="utf-8"):
    path = tmp_path / "m.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_image_is_all_a_manifest_needs(tmp_path, caplog):
    scans = read_manifest(write(tmp_path, "image\nsub/a.nii.gz\n/data/b.nii\n"))
    assert [scan.image for scan in scans] == [tmp_path / "sub/a.nii.gz", tmp_path.__class__("/data/b.nii")]
    first = scans[0]
    assert (first.scan_id, first.subject_id, first.cohort, first.split) == (
        "sub/a.nii.gz",
        "sub/a.nii.gz",
        "custom",
        "train",
    )
    assert first.diagnosis is None
    assert first.fields == dict.fromkeys(("sex", *NUMBER_FIELDS))
    assert sum("subject_id" in message for message in caplog.messages) == 1
    assert sum("too few to divide" in message for message in caplog.messages) == 1


def test_every_column_arrives(tmp_path, caplog):
    header = (
        "scan_id,cohort,subject_id,session_id,image,diagnosis,diagnosis_source,diagnosis_gap_days,age_years,sex,"
        "education_years,apoe_e4,mmse,moca,cdr_global,cdr_sb,field_strength_t,acquired,split,report,scanner"
    )
    row = 'I1,ADNI,S1,m12,a.nii,MCI,visit,-3,71.5,F,16,1,27,,0.5,1.5,3,2010-01-02,val,"Seen, well.\nAgain.",Trio'
    (scan,) = read_manifest(write(tmp_path, f"{header}\n{row}\n"))
    assert (scan.diagnosis, scan.split, scan.session_id, scan.diagnosis_gap_days) == ("MCI", "val", "m12", -3)
    assert scan.fields["age_years"] == 71.5
    assert scan.fields["moca"] is None
    assert scan.report == "Seen, well.\nAgain."
    assert scan.extra == {"scanner": "Trio"}
    assert not caplog.records


def test_byte_order_mark_and_accents_are_read(tmp_path):
    scans = read_manifest(write(tmp_path, "image,report\na.nii,müde\n", encoding="utf-8-sig"))
    assert scans[0].report == "müde"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("imgae,age_years\na.nii,3\n", ["no column 'image'", "imgae"]),
        ("Image\na.nii\n", ["no column 'image'", "image"]),
        ("image;sex\na.nii;F\n", ["commas"]),
        ("", ["no column 'image'"]),
        ("image\n", ["no rows"]),
        ("image,image\na,b\n", ["more than once"]),
        ("image,sex\na.nii,F\n,M\n", ["row 3", "'image' is empty"]),
        ("image,scan_id\na.nii,X\nb.nii,Y\nc.nii,X\n", ["rows 2 and 4", "'X'"]),
        ("image\na.nii\na.nii\n", ["rows 2 and 3", "'a.nii'"]),
        ("image,diagnosis\na.nii,CN\nb.nii,Dementia\n", ["row 3", "diagnosis", "'Dementia'", "CN, MCI, AD"]),
        ("image,sex\na.nii,female\n", ["row 2", "sex", "'female'", "F, M"]),
        ("image,split\na.nii,training\n", ["row 2", "split", "'training'", "train, val, test"]),
        ("image,age_years\na.nii,7O\n", ["row 2", "age_years", "'7O'", "number"]),
        ("image,mmse\na.nii,nan\n", ["row 2", "mmse", "'nan'"]),
        ("image,subject_id,split\na.nii,S,train\nb.nii,S,test\n", ["row 3", "'S'", "'test'", "'train'", "row 2"]),
        ("image,cohort,split\na.nii,AIBL,train\n", ["row 2", "AIBL", "--test-cohorts"]),
        ("image,cohort\na.nii,aibl\n", ["row 2", "'aibl'", "'AIBL'"]),
        ("image,sex\na.nii,F,3\n", ["row 2", "3 cells", "2 columns"]),
        ('image,report\na.nii,"open\n', ["CSV"]),
    ],
)
def test_a_fault_is_named_with_file_row_and_value(tmp_path, text, named):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_manifest(path)
    for part in [str(path), *named]:
        assert part in str(error.value)


def test_all_faults_are_told_at_once(tmp_path):
    rows = "".join(f"{n}.nii,X,y\n" for n in range(30))
    with pytest.raises(ValueError) as error:
        read_manifest(write(tmp_path, f"image,sex,age_years\n{rows}"))
    assert "60 faults" in str(error.value)
    assert "... and 40 more" in str(error.value)


def test_a_file_that_is_not_utf8_or_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="UTF-8"):
        read_manifest(write(tmp_path, "image,report\na.nii,müde\n", encoding="latin-1"))
    with pytest.raises(ValueError, match="missing.csv"):
        read_manifest(tmp_path / "missing.csv")


def test_a_misspelt_column_is_warned_about(tmp_path, caplog):
    read_manifest(write(tmp_path, "image,diagnosys,scanner\na.nii,CN,Trio\n"))
    assert any("'diagnosys'" in message and "'diagnosis'" in message for message in caplog.messages)
    assert not any("scanner" in message for message in caplog.messages)


def many(subjects: int, scans: int = 1, cohort="X") -> str:
    return "".join(f"{cohort}-{s}-{n}.nii,{cohort},S{s}\n" for s in range(subjects) for n in range(scans))


def test_subjects_are_split_about_80_10_10_and_never_divided(tmp_path):
    scans = read_manifest(write(tmp_path, "image,cohort,subject_id\n" + many(600, scans=2)))
    shares = Counter(scan.split for scan in scans)
    assert 0.75 < shares["train"] / 1200 < 0.85
    assert 0.06 < shares["val"] / 1200 < 0.14
    assert len({(scan.subject_id, scan.split) for scan in scans}) == 600


def test_new_rows_move_nobody(tmp_path):
    text = "image,cohort,subject_id\n" + many(30)
    before = {scan.scan_id: scan.split for scan in read_manifest(write(tmp_path, text))}
    after = {scan.scan_id: scan.split for scan in read_manifest(write(tmp_path, text + many(50, cohort="Y")))}
    assert before.items() <= after.items()


def test_one_subject_name_in_two_cohorts_is_two_people(tmp_path):
    scans = read_manifest(write(tmp_path, "image,cohort,subject_id\n" + many(40, cohort="X") + many(40, cohort="Y")))
    assert len({scan.subject_key for scan in scans}) == 80
    by_cohort = [[scan.split for scan in scans if scan.cohort == cohort] for cohort in "XY"]
    assert by_cohort[0] != by_cohort[1]


def test_test_cohorts_are_test_only(tmp_path, caplog):
    path = write(tmp_path, "image,cohort,subject_id\n" + many(30, cohort="AIBL") + many(2, cohort="ADNI"))
    scans = read_manifest(path)
    assert {scan.split for scan in scans if scan.cohort == "AIBL"} == {"test"}
    assert {scan.split for scan in scans if scan.cohort == "ADNI"} == {"train"}
    scans = read_manifest(path, test_cohorts=())
    assert len({scan.split for scan in scans if scan.cohort == "AIBL"}) == 3


def test_a_given_split_holds_for_all_scans_of_the_subject(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    scans = read_manifest(write(tmp_path, "image,subject_id,split\na.nii,S,\nb.nii,S,val\n"))
    assert [scan.split for scan in scans] == ["val", "val"]
    assert not caplog.records


def test_keys_have_no_dots_and_depend_on_every_id(tmp_path):
    text = (
        "image,cohort,subject_id,session_id,scan_id\n" + "a.nii,A,S,1,x\nb.nii,A,S,2,y\nc.nii,A,T,1,z\nd.nii,B,S,1,w\n"
    )
    scans = read_manifest(write(tmp_path, text))
    assert len({scan.key for scan in scans}) == 4
    assert all(len(scan.key) == 16 and set(scan.key) <= set("0123456789abcdef") for scan in scans)
    assert scans[0].subject_key == scans[1].subject_key != scans[3].subject_key
