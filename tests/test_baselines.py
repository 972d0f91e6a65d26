"""Baselines on packed scans of balls with a hole that grows with the disease."""

import csv
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import balanced_accuracy_score

from medblip.baselines import fit_and_predict
from medblip.shards import Reader, ShardIndex

CLASSES = ["CN", "MCI", "AD"]
HOLE_MM = {"CN": 22.0, "MCI": 34.0, "AD": 46.0}


def ball(diagnosis: str, draw: np.random.Generator) -> np.ndarray:
    """A head of 160 mm in voxels of 5 mm, in noise, with a hole that is wider the worse the disease is."""
    from_centre_mm = 5.0 * np.linalg.norm(np.indices((40, 40, 40)) - 19.5 + draw.normal(0, 0.3, (3, 1, 1, 1)), axis=0)
    brain_XYZ = 100.0 * (from_centre_mm < 80) - 70.0 * (from_centre_mm < HOLE_MM[diagnosis] + draw.normal(0, 3))
    return (brain_XYZ + draw.normal(0, 3, brain_XYZ.shape)).clip(0).astype(np.float32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 scans of 45 subjects to train on, 30 of 30 to test; MMSE falls with the disease, and is unknown in a fifth."""
    folder, draw, rows = tmp_path_factory.mktemp("balls"), np.random.default_rng(0), []
    for split, num_subjects in (("train", 45), ("test", 30)):
        for number in range(num_subjects):
            diagnosis = CLASSES[number % 3]
            for scan in range(2 if split == "train" and number < 15 else 1):
                name = f"{split}{number}-{scan}.nii"
                affine = np.diag([5.0, 5.0, 5.0, 1.0])
                affine[:3, 3] = -100
                nib.save(nib.Nifti1Image(ball(diagnosis, draw), affine), folder / name)
                mmse = round(np.clip({"CN": 29, "MCI": 26, "AD": 20}[diagnosis] + draw.normal(0, 1), 0, 30))
                rows.append(
                    {
                        "image": name,
                        "subject_id": f"{split}{number}",
                        "cohort": "BALLS",
                        "diagnosis": diagnosis,
                        "age_years": round(draw.uniform(60, 90)),
                        "sex": draw.choice(["F", "M"]),
                        "mmse": "" if draw.random() < 0.2 else mmse,
                        "split": split,
                    }
                )
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    command = f"-m sharding.build --manifest {folder}/manifest.csv --out {folder}/shards --size 96 --spacing-mm 2.2"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    return ShardIndex(folder / "shards")


@pytest.fixture
def reader(shards):
    reader = Reader(shards, threads=1)
    yield reader
    reader.close()


def accuracy(samples, p_NK, classes):
    told = [classes[column] for column in np.argmax(p_NK, axis=1)]
    return balanced_accuracy_score([sample.diagnosis for sample in samples], told)


def test_svm_and_regression_find_a_strong_effect_and_the_majority_does_not(shards, reader):
    train, test = shards.samples("train"), shards.samples("test")
    found, notes = fit_and_predict(shards, reader, train, test, CLASSES, "cognition", seed=0)
    assert notes == [] and list(found) == ["majority", "voxel_svm", "record_logistic"]
    for p_NK in found.values():
        assert p_NK.shape == (30, 3)
        np.testing.assert_allclose(p_NK.sum(axis=1), 1)
    assert accuracy(test, found["voxel_svm"], CLASSES) > 0.75
    assert accuracy(test, found["record_logistic"], CLASSES) > 0.6
    assert accuracy(test, found["majority"], CLASSES) == pytest.approx(1 / 3)
    again, _ = fit_and_predict(shards, reader, train, test, CLASSES, "cognition", seed=0)
    np.testing.assert_array_equal(again["voxel_svm"], found["voxel_svm"])


def test_training_on_shuffled_diagnoses_is_chance(shards, reader):
    train, test = shards.samples("train"), shards.samples("test")
    subjects = sorted({sample.subject for sample in train})
    drawn = np.random.default_rng(1).permutation(len(subjects)) % 3
    other = {subject: CLASSES[number] for subject, number in zip(subjects, drawn, strict=True)}
    shuffled = [sample._replace(diagnosis=other[sample.subject]) for sample in train]
    found, _ = fit_and_predict(shards, reader, shuffled, test, CLASSES, "none", seed=0)
    assert accuracy(test, found["voxel_svm"], CLASSES) < 0.6


def test_a_cohort_of_two_classes_gets_probabilities_of_these_two(shards, reader):
    test = [sample for sample in shards.samples("test") if sample.diagnosis != "MCI"]
    found, _ = fit_and_predict(shards, reader, shards.samples("train"), test, ["CN", "AD"], "cognition", seed=0)
    for name in ("majority", "voxel_svm", "record_logistic"):
        assert found[name].shape == (20, 2)
        np.testing.assert_allclose(found[name].sum(axis=1), 1)
    assert accuracy(test, found["voxel_svm"], ["CN", "AD"]) > 0.9


def test_rows_come_in_the_order_asked_for(shards, reader):
    train, test = shards.samples("train"), shards.samples("test")
    forward, _ = fit_and_predict(shards, reader, train, test, CLASSES, "cognition", seed=0)
    backward, _ = fit_and_predict(shards, reader, train, test[::-1], CLASSES, "cognition", seed=0)
    for name in forward:
        np.testing.assert_allclose(backward[name][::-1], forward[name], rtol=1e-5)  # float32 sums


def test_a_tier_without_fields_has_no_regression_and_age_says_nothing(shards, reader):
    train, test = shards.samples("train"), shards.samples("test")
    found, notes = fit_and_predict(shards, reader, train, test, CLASSES, "none", seed=0)
    assert "record_logistic" not in found and any("no record_logistic" in note for note in notes)
    found, _ = fit_and_predict(shards, reader, train, test, CLASSES, "demographics", seed=0)
    assert accuracy(test, found["record_logistic"], CLASSES) < 0.6  # MMSE is of a higher tier


def test_a_class_without_subjects_leaves_only_what_can_be_fitted(shards, reader):
    few = [sample for sample in shards.samples("train") if sample.diagnosis != "AD"]
    found, notes = fit_and_predict(shards, reader, few, shards.samples("test"), CLASSES, "cognition", seed=0)
    assert list(found) == ["majority"] and any("AD" in note for note in notes)
    found, notes = fit_and_predict(shards, reader, [], shards.samples("test"), CLASSES, "cognition", seed=0)
    assert found == {} and len(notes) == 1


def test_more_scans_than_the_svm_takes_are_said(shards, reader, monkeypatch):
    monkeypatch.setattr("medblip.baselines.MAX_TRAIN_SCANS", 40)
    found, notes = fit_and_predict(
        shards, reader, shards.samples("train"), shards.samples("test"), CLASSES, "none", seed=0
    )
    assert any("40 of 60 training scans" in note for note in notes) and found["voxel_svm"].shape == (30, 3)


def test_a_damaged_training_volume_is_left_out_by_name_and_a_damaged_test_volume_refused(shards, tmp_path):
    folder = shutil.copytree(shards.folder, tmp_path / "damaged")
    index = ShardIndex(folder)
    train, test = index.samples("train"), index.samples("test")
    for sample in (train[3], test[0]):
        with open(index.shards[sample.shard], "r+b") as file:
            file.seek(sample.volume[0])
            file.write(b"\0" * sample.volume[1])
    reader = Reader(index, threads=1)
    found, notes = fit_and_predict(index, reader, train, test[1:], CLASSES, "none", seed=0)
    assert found["voxel_svm"].shape == (29, 3) and any(train[3].key in note for note in notes)
    with pytest.raises(ValueError, match=test[0].key):
        fit_and_predict(index, reader, train, test, CLASSES, "none", seed=0)
    reader.close()
