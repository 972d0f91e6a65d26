import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))


@pytest.mark.slow
def test_realistic_scans_have_the_grid_the_noise_and_the_bytes_of_a_clinical_t1(tmp_path):
    from realistic import write_realistic_scans

    first, second = write_realistic_scans(tmp_path, 2)
    for path in (first, second):
        image = nib.load(path)
        assert image.shape[:2] == (256, 256) and 166 <= image.shape[2] < 176
        assert np.allclose(image.header.get_zooms(), (1, 1, 1.2)) and image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("P", "I", "R")
        assert 10e6 < path.stat().st_size < 15e6
        air = np.asarray(image.dataobj)[-8:, :8]
        # Rician noise without signal is Rayleigh's: its mean is 1.91 times its standard deviation.
        assert air.std() > 5 and 1.7 < air.mean() / air.std() < 2.1
    assert first.read_bytes() != second.read_bytes()


def test_the_small_study_has_its_people_and_tests_each_with_a_diagnosis_once(tmp_path):
    import csv
    from collections import Counter

    from small_cohort import NUM_AD, NUM_CN, NUM_FOLDS, NUM_YOUNG, draw_person, write_manifest

    people = [draw_person(1, number) for number in range(NUM_CN + NUM_AD + NUM_YOUNG)]
    assert Counter(person["diagnosis"] for person in people) == {"CN": NUM_CN, "AD": NUM_AD, "": NUM_YOUNG}
    rows = [
        {"image": f"{n}.nii.gz", "subject_id": f"S{n}", "cohort": "SMALL"}
        | {name: value for name, value in person.items() if name != "severity"}
        for n, person in enumerate(people)
    ]
    tested = Counter()
    for fold in range(NUM_FOLDS):
        write_manifest(tmp_path / "fold.csv", rows, fold)
        with open(tmp_path / "fold.csv", newline="") as file:
            test = [row for row in csv.DictReader(file) if row["split"] == "test"]
        assert 39 <= len(test) <= 40 and {row["diagnosis"] for row in test} == {"CN", "AD"}
        tested.update(row["subject_id"] for row in test)
    assert set(tested.values()) == {1} and len(tested) == NUM_CN + NUM_AD


def test_the_small_data_bench_runs_the_commands_of_the_readme_under_its_own_names():
    from small_data import recipe

    names = {"fold0.csv": "A", "fold0-shards/": "B", "runs/fold0": "C"}
    names |= {"fold0-cognition/": "D", "fold0-demographics/": "E"}
    build, train, *evaluations = recipe(**names)
    assert build[1:7] == ["-m", "sharding.build", "--manifest", "A", "--out", "B"]
    assert str(ROOT / "train.py") in train and train[train.index("--run") + 1] == "C"
    assert [command[command.index("--out") + 1] for command in evaluations] == ["D", "E"]
    assert not any("fold0" in word for command in (build, train, *evaluations) for word in command)


def test_pooled_scores_are_the_auc_of_all_people_together():
    from small_data import pooled

    truth = {f"k{n}": [float(n >= 20)] for n in range(40)}
    assert pooled({key: [value[0]] for key, value in truth.items()}, truth) == {"auc": 1.0, "ci95": [1.0, 1.0]}
    reversed_once = pooled({key: [value[0], 1 - value[0]] for key, value in truth.items()}, truth)
    assert reversed_once["auc"] == 0.5
