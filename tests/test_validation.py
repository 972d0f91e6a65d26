"""Validation during training: the numbers of `medblip evaluate`, the best checkpoint kept, nothing learned anew."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from csv_files import edit
from test_train import STATE_FILES, metrics, run_training, train_command

VALIDATED = ("--steps", 6, "--checkpoint-every", 3, "--validate-every", 2, "--keep-checkpoints", 1)


def split_by_subject(rows: list[dict]) -> list[dict]:
    """A subject of each diagnosis that has two is the split val, the others train."""
    subjects = {name: {row["subject_id"] for row in rows if row["diagnosis"] == name} for name in ("CN", "MCI", "AD")}
    held_out = {min(found) for found in subjects.values() if len(found) > 1}
    assert len(held_out) >= 2
    return [row | {"split": "val" if row["subject_id"] in held_out else "train"} for row in rows]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Nine made-up patients, of whom three are the split val."""
    folder = tmp_path_factory.mktemp("validation")
    command = f"-m sharding.madeup --out {folder}/release --subjects 9 --workers 1"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    edit(folder / "release/manifest.csv", split_by_subject)
    command = f"-m sharding.build --manifest {folder}/release/manifest.csv --out {folder}/shards --size 48"
    subprocess.run([sys.executable, *command.split(), "--spacing-mm", "4.5"], cwd=ROOT, check=True)
    return folder / "shards"


@pytest.fixture(scope="module")
def validated(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "validated"
    run_training(shards, run, *VALIDATED)
    return run


def best_of(run: Path) -> dict:
    return json.loads((run / "best.json").read_text())


def test_every_nth_step_has_its_numbers_and_the_best_checkpoint_outlives_newer_ones(validated):
    records = metrics(validated)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "val_balanced_accuracy" in record] == [2, 4, 6]
    scores = {record["step"]: record["val_balanced_accuracy"] for record in records if record["step"] % 2 == 0}
    best = best_of(validated)
    assert best["value"] == max(scores.values()) and best["step"] == max(scores, key=scores.get)  # the first such
    kept = {path.name for path in (validated / "checkpoints").iterdir()}
    assert kept == {f"step-{best['step']}", "step-6"}
    assert (validated / "latest").read_text().strip() == "step-6"


def test_validation_says_what_evaluate_says(shards, validated, medblip, tmp_path):
    for which, step in (("latest", 6), ("best", best_of(validated)["step"])):
        command = f"evaluate --model {validated} --checkpoint {which} --data {shards} --split val"
        command += f" --out {tmp_path / which} --rule sum-minus-null --arms both image"
        code, _, stderr = medblip(*command.split())
        assert code == 0, stderr
        report = json.loads((tmp_path / which / "report.json").read_text())
        assert report["model"] == f"validated/step-{step}"
        (cohort,) = report["cohorts"].values()
        record = next(record for record in metrics(validated) if record["step"] == step)
        for arm, name in (("both", "val"), ("image", "val_image")):
            for metric in ("balanced_accuracy", "macro_auc"):
                assert record[f"{name}_{metric}"] == pytest.approx(cohort[arm][metric], abs=1e-6)


@pytest.mark.slow
def test_a_run_learns_the_same_with_and_without_validation(shards, validated, tmp_path):
    run_training(shards, tmp_path / "plain", "--steps", 6, "--checkpoint-every", 3)
    for name in STATE_FILES:
        one, other = (run / "checkpoints/step-6" / name for run in (validated, tmp_path / "plain"))
        assert one.read_bytes() == other.read_bytes(), name
    without = [{k: v for k, v in line.items() if not k.startswith("val_")} for line in metrics(validated)]
    assert without == metrics(tmp_path / "plain")
    assert not (tmp_path / "plain/best.json").exists()


# The stop file appears when the second validation begins, and is looked for once a while.
STOPPED = """
import sys, time, train
from pathlib import Path
from medblip import stopping, validation
real, calls = validation.encode, []
def encode(*rest):
    calls.append(0)
    if len(calls) == 2:
        (Path(sys.argv[sys.argv.index("--run") + 1]) / "stop").touch()
        time.sleep(2 * stopping.SECONDS_BETWEEN_LOOKS)
    return real(*rest)
validation.encode = encode
raise SystemExit(train.main())
"""


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_a_validation_makes_up_for_it_and_ends_the_same(shards, validated, tmp_path):
    run = tmp_path / "stopped"
    command = train_command(shards, run, *map(str, VALIDATED))
    command[1:2] = ["-c", STOPPED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 85, done.stderr[-3000:]
    assert metrics(run)[-1]["step"] == 4 and "val_loss_lm" not in metrics(run)[-1]
    run_training(shards, run, *VALIDATED)
    assert metrics(run) == metrics(validated) and best_of(run) == best_of(validated)
    for name in STATE_FILES:
        one, other = (folder / "checkpoints/step-6" / name for folder in (run, validated))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2_fp32", "zero3"])
def test_two_ranks_validate_as_one_at_every_stage(shards, tmp_path, engine):
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port()]
    runs = {}
    for name, how in (("plain", []), ("validated", ["--validate-every", 1, "--micro-batch", 1])):
        run = runs[name] = tmp_path / name
        options = ["--steps", 2, "--micro-batch", 1, *how]
        run_training(shards, run, *options, launcher=[*launcher, "--"], engine=engine)
    without = [{k: v for k, v in line.items() if not k.startswith("val_")} for line in metrics(runs["validated"])]
    assert without == metrics(runs["plain"])
    assert all(line["val_loss_lm"] > 0 for line in metrics(runs["validated"]))
    for name in STATE_FILES:
        one, other = (run / "checkpoints/step-2" / name for run in runs.values())
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.slow
def test_a_split_val_without_two_diagnoses_is_refused_before_training(made_up_shards, tmp_path):
    refused = run_training(made_up_shards, tmp_path / "run", "--steps", 2, "--validate-every", 1, code=1)
    assert "val" in refused.stderr and "Traceback" not in refused.stderr
