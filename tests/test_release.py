import csv
import datetime
from pathlib import Path

from sharding.release import (
    OTHER,
    FoundScan,
    Person,
    Release,
    Visit,
    files_below,
    nearest,
    one_per,
    one_row_per_subject,
    summary,
    write_release,
)


def scan(name: str = "I1", session: str = "m00", **values) -> FoundScan:
    return FoundScan(scan_id=name, subject_id="p1", session_id=session, image=Path(f"/data/{name}.nii"), **values)


def visits(*days: int) -> list[Visit]:
    return [Visit(subject_id="p1", when=day, diagnosis="CN") for day in days]


def test_the_nearest_visit_counts_on_either_side_and_ties_go_to_the_earlier():
    assert nearest(visits(0, 100), 60, 180)[1] == 40
    assert nearest(visits(0, 100), 40, 180)[1] == -40
    assert nearest(visits(100, 0), 50, 180)[1] == -50
    assert nearest(visits(0, 100), 50, 49) is None
    assert nearest([], 50, 180) is None


def test_dates_and_days_are_the_same_to_linking():
    start = datetime.date(2010, 1, 1)
    dated = [Visit(subject_id="p1", when=start + datetime.timedelta(days=day)) for day in (0, 100)]
    assert nearest(dated, start + datetime.timedelta(days=60), 90)[1] == 40


def test_a_visit_beyond_the_window_gives_no_label_and_says_why():
    release = Release("X")
    release.keep(scan(), None, None, None, no_visit="no visit within 90 days")
    assert release.rows[0]["diagnosis"] is None
    assert release.rows[0]["diagnosis_source"] == "no visit within 90 days"


def test_faults_and_other_dementias_drop_the_scan_with_their_words():
    release = Release("X")
    release.keep(scan("I1"), Person(subject_id="p1", fault="T.csv row 3"), None, None)
    release.keep(scan("I2"), None, Visit(subject_id="p1", when=0, fault="V.csv row 9"), 0)
    release.keep(scan("I3"), None, Visit(subject_id="p1", when=0, diagnosis=OTHER, diagnosis_source="DLB 1"), 0)
    assert [(gone.scan.scan_id, gone.detail) for gone in release.dropped] == [
        ("I1", "T.csv row 3"),
        ("I2", "V.csv row 9"),
        ("I3", "DLB 1"),
    ]
    assert release.rows == []


def test_the_best_scan_of_a_visit_is_kept_and_named_in_the_others():
    release = Release("X")
    kept = one_per(release, [scan("I2", rank=(1,)), scan("I1", rank=(0,)), scan("I3", "m12")], lambda s: s.session_id)
    assert [s.scan_id for s in kept] == ["I1", "I3"]
    (gone,) = release.dropped
    assert (gone.scan.scan_id, gone.detail) == ("I2", "I1")


def test_one_per_subject_is_the_first_visit_with_a_diagnosis():
    release = Release("X")
    for name, diagnosis in (("I1", None), ("I2", "MCI"), ("I3", "AD")):
        visit = Visit(subject_id="p1", when=0, diagnosis=diagnosis)
        release.keep(scan(name), None, visit, 0)
    one_row_per_subject(release)
    assert [row["scan_id"] for row in release.rows] == ["I2"]
    assert {gone.scan.scan_id for gone in release.dropped} == {"I1", "I3"}


def test_files_hold_every_scan_once_and_the_summary_adds_up(tmp_path):
    release = Release("X")
    (tmp_path / "images").mkdir()
    inside = FoundScan(scan_id="I1", subject_id="p1", session_id="m00", image=tmp_path / "images/a b.nii")
    person = Person(subject_id="p1", values={"sex": "F", "age_years": 71.23456, "site": "12"})
    release.keep(inside, person, Visit(subject_id="p1", when=0, diagnosis="AD", values={"mmse": 22.0}), -3)
    release.drop(scan("I2"), "not a T1", "it is\na localizer")
    for row in release.rows:
        row["split"] = "train"
    dropped = write_release(release, tmp_path / "m.csv")
    (row,) = csv.DictReader((tmp_path / "m.csv").open(newline=""))
    assert (row["image"], row["mmse"], row["age_years"], row["site"]) == ("images/a b.nii", "22", "71.23", "12")
    assert (row["diagnosis"], row["diagnosis_gap_days"]) == ("AD", "-3")
    (gone,) = csv.DictReader(dropped.open(newline=""))
    assert dropped.name == "m.dropped.csv" and gone["image"] == "/data/I2.nii" and gone["reason"] == "not a T1"
    assert "2 scans found = 1 kept + 1 dropped" in summary(release)


def test_linked_folders_are_searched_and_a_link_back_does_no_harm(tmp_path):
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "disk/deep/a.nii").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/ADNI").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/deep/back").symlink_to(tmp_path / "images")
    found = [folder / name for folder, names in files_below(tmp_path / "images") for name in names]
    assert found == [tmp_path / "images/ADNI/deep/a.nii"]
