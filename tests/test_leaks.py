"""Nothing but a scan's own anatomy tells its diagnosis: with permuted training labels, or another's scan, it is chance.

What chance allows follows from the test scans and not from a guess: the balanced accuracy of the same answers under
10,000 permutations of the true diagnoses.
"""

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from conftest import ROOT
from csv_files import edit
from test_train import run_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SUBJECTS, TESTED = 90, 36
TRAINED = ("--ehr", "none", "--steps", 120, "--checkpoint-every", 1000, "--other-questions", 0, "--global-batch", 16)


def split(permuted: bool, rows: list[dict]) -> list[dict]:
    """The last patients are tested on; the diagnoses of the others are dealt out anew, if so asked."""
    train, test = rows[: SUBJECTS - TESTED], rows[SUBJECTS - TESTED :]
    diagnoses = [row["diagnosis"] for row in train]
    if permuted:
        # Within each true class, each label as often as the others: a permutation that agrees with the truth a little
        # more than by a third would teach the disease itself, which here is the strongest feature.
        draw, told = np.random.default_rng(0), np.array(diagnoses)
        for name in ("CN", "MCI", "AD"):
            rows_of = draw.permutation(np.flatnonzero(np.array(diagnoses) == name))
            told[rows_of] = np.resize(["CN", "MCI", "AD"], len(rows_of))
        diagnoses = told.tolist()
    trained = [row | {"diagnosis": name, "split": "train"} for row, name in zip(train, diagnoses, strict=True)]
    return trained + [row | {"split": "test"} for row in test]


def train_and_evaluate(folder, permuted: bool):
    """Predictions by arm: (diagnosis, answer) of each scan of 36 held-out patients."""
    command = f"-m sharding.madeup --out {folder}/raw --subjects {SUBJECTS} --effect 3 --workers 1"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    edit(folder / "raw/manifest.csv", partial(split, permuted))
    command = f"-m sharding.build --manifest {folder}/raw/manifest.csv --out {folder}/shards --size 48 --spacing-mm 4.5"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    run_training(folder / "shards", folder / "run", *TRAINED, "--micro-batch", 16)
    command = f"-m medblip.cli evaluate --model {folder}/run --data {folder}/shards --out {folder}/out"
    command += " --arms image shuffled_image --vqa-scans 0 --no-baselines"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    arms = {}
    with open(folder / "out/predictions.csv", newline="") as file:
        for row in csv.DictReader(file):
            p = [float(row[f"p_{name}"]) for name in ("CN", "MCI", "AD")]
            arms.setdefault(row["arm"], []).append((("CN", "MCI", "AD").index(row["diagnosis"]), int(np.argmax(p))))
    (cohort,) = json.loads((folder / "out/report.json").read_text())["cohorts"].values()
    return {name: np.array(found) for name, found in arms.items()}, cohort


def chance_of(truth_N, told_N, draws: int = 10_000) -> float:
    """How often permuted diagnoses give these answers at least their balanced accuracy."""
    draw = np.random.default_rng(0)

    def balanced_accuracy(truth_N) -> float:
        return np.mean([np.mean(told_N[truth_N == k] == k) for k in np.unique(truth_N)])

    observed = balanced_accuracy(truth_N)
    return np.mean([balanced_accuracy(draw.permutation(truth_N)) >= observed - 1e-12 for _ in range(draws)])


def test_permuted_training_labels_and_another_subject_s_scan_are_at_chance_and_true_labels_are_not(tmp_path):
    folders = tmp_path / "true", tmp_path / "permuted"
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:  # one process each
        (true, cohort), (permuted, _) = pool.map(train_and_evaluate, folders, (False, True))
    assert chance_of(*true["image"].T) < 0.01, "the test cannot fail: the model learns nothing from true labels"
    # As many rounds as make 1,000 pairs: their mean is close to 1/3, whatever the model has learned.
    assert abs(cohort["shuffled_image"]["balanced_accuracy"] - 1 / 3) < 0.05
    assert chance_of(*permuted["image"].T) > 0.001
