"""`medblip evaluate` and `medblip ask`, on a model trained for two steps on random blobs."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, free_port

from medblip.asking import Interview, Scores
from medblip.guards import check_tier
from medblip.scoring import RULES, balancing_offsets, choose_rule, probabilities
from medblip.shards import ShardIndex
from medblip.text import DIAGNOSIS_ANSWERS

SECRET = "keeps eleven quokkas"
EVERYTHING = ("image", "text", "both", "shuffled_image", "blank_image", "both_shuffled")


def scans():
    """(cohort, subject, diagnosis, split) of each scan."""
    for i in range(9):
        yield "HOME", f"h{i}", ("CN", "MCI", "AD")[i % 3], "train"
    for i in range(9):
        yield "THREE", f"t{i // 2}", ("CN", "MCI", "AD")[i % 3], "test"
    yield "THREE", "t9", "", "test"
    for i in range(4):
        yield "TWO", f"u{i}", ("CN", "AD")[i % 2], "test"
    for _ in range(2):
        yield "ONE", "v0", "AD", "test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """raw/, shards/ and run/: 25 blobs, packed, and two steps of training."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "raw").mkdir()
    draw = np.random.default_rng(0)
    radius = np.linalg.norm(np.indices((24, 24, 24)) - 11.5, axis=0)
    with open(folder / "raw/manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "cohort", "subject_id", "diagnosis", "split", "age_years", "sex", "report"])
        for number, (cohort, subject, diagnosis, split) in enumerate(scans()):
            head = (radius < draw.uniform(8, 11)) * draw.uniform(100, 200, radius.shape)
            nib.save(nib.Nifti1Image(head.astype(np.float32), np.diag([6, 6, 6, 1])), folder / f"raw/{number}.nii")
            report = f"The subject is {60 + number} and {SECRET}."
            writer.writerow([f"{number}.nii", cohort, subject, diagnosis, split, 60 + number, "F", report])
    for command in (
        f"-m sharding.build --manifest {folder}/raw/manifest.csv --out {folder}/shards --size 48 --spacing-mm 4"
        " --workers 1",
        f"train.py --deepspeed_config ds_configs/zero2_fp32.json --data {folder}/shards --run {folder}/run --steps 2",
    ):
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def with_val(folder):
    """Shards of nine people in `val` and nine in `test`, and a cohort in which nobody has a diagnosis."""
    rows = [("THREE", split, ("CN", "MCI", "AD")[i % 3]) for split in ("val", "test") for i in range(9)]
    rows += [("BARE", "test", "")] * 3
    with open(folder / "raw/with_val.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "cohort", "subject_id", "diagnosis", "split", "age_years", "sex"])
        for number, (cohort, split, diagnosis) in enumerate(rows):
            writer.writerow([f"{number}.nii", cohort, f"w{number}", diagnosis, split, 60 + number, "F"])
    command = f"-m sharding.build --manifest {folder}/raw/with_val.csv --out {folder}/with_val --size 48 --spacing-mm 4"
    done = subprocess.run(
        [sys.executable, *command.split(), "--workers", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "with_val"


def read_predictions(out: Path) -> list[dict]:
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def everything(folder):
    """Where the evaluation in all arms lies, and what it printed."""
    command = [sys.executable, "-m", "medblip.cli", "evaluate", "--model", folder / "run", "--data", folder / "shards"]
    command += ["--out", folder / "everything", "--arms", *EVERYTHING]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "everything", done.stdout, done.stderr


def test_report_holds_every_cohort_by_itself_and_no_word_of_a_record(everything):
    out, stdout, stderr = everything
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert files.keys() >= {"report.json", "report.md", "predictions.csv", "confusion.png"}
    assert not any(b"quokka" in content for content in files.values()) and "quokka" not in stdout + stderr

    report = json.loads(files["report.json"])
    assert report.keys() >= {"cohorts", "recipe", "ehr", "model", "commit", "split_sha256", "split", "seed", "counts"}
    assert report["ehr"] == "demographics" and report["model"] == "run/step-2"
    assert report["counts"] == {"scans": 16, "without_diagnosis": 1, "scored": 15}
    assert report["arms"]["blank_image"] == {"record": False, "image": "blank scan"}
    assert (report["rule"]["length"], report["rule"]["minus_null"]) == ("sum", True)
    assert report["rule"]["chosen_on"] == "default"  # these shards have no split val
    trained = report["trained_on"]
    assert (trained["subjects"], trained["steps"], trained["lora"], trained["preset"]) == (9, 2, True, "tiny")
    assert str(out.parent) not in files["report.json"].decode(), "no path"
    assert list(report["cohorts"]) == ["ONE", "THREE", "TWO"]
    three, two, one = (report["cohorts"][name] for name in ("THREE", "TWO", "ONE"))
    assert list(three) == list(two) == list(EVERYTHING)
    for arm in three.values():
        assert (arm["n_subjects"], arm["n_scans"], arm["classes"]) == (5, 9, ["CN", "MCI", "AD"])
        assert 0 <= arm["balanced_accuracy"] <= 1 and 0 <= arm["macro_auc"] <= 1
        low, high = arm["ci95"]["balanced_accuracy"]
        assert 0 <= low <= high <= 1 and len(arm["ci95"]["macro_auc"]) == 2
        rounds = 4 if arm in (three["shuffled_image"], three["both_shuffled"]) else 1  # as there are four others
        assert np.sum(arm["confusion"]) == 9 * rounds and arm["recall"].keys() == {"CN", "MCI", "AD"}
    assert three["blank_image"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert three["blank_image"]["macro_auc"] == 0.5, "one question for all scans has one answer"
    assert two["image"]["classes"] == ["CN", "AD"] and np.shape(two["image"]["confusion"]) == (2, 2)
    assert list(one) == ["image", "text", "both", "blank_image"]  # a single subject has nobody to swap scans with
    assert one["image"]["balanced_accuracy"] is None and one["image"]["n_scans"] == 2
    assert set(report["subgroups"]["THREE"]["image"]) == {"sex F", "age 60-69", "age 70-79"}
    assert report["subgroups"]["THREE"]["image"]["sex F"]["n_scans"] == 9
    assert report["one_scan_per_subject"]["THREE"]["both"]["n_scans"] == 5
    compared = [(entry["a"], entry["b"], entry["metric"]) for entry in report["comparisons"]["THREE"]]
    assert ("both", "text", "balanced_accuracy") in compared and ("image", "shuffled_image", "macro_auc") in compared
    assert ("image", "voxel_svm", "macro_auc") in compared and ("both", "record_logistic", "macro_auc") in compared
    assert report["comparisons"]["ONE"] == [] and report["baselines"]["ONE"] == {}
    assert set(report["baselines"]["TWO"]) == {"majority", "voxel_svm", "record_logistic"}
    assert report["baselines"]["THREE"]["majority"]["balanced_accuracy"] == pytest.approx(1 / 3)
    for entry in report["comparisons"]["TWO"]:
        other = (two | report["baselines"]["TWO"])[entry["b"]]
        expected = two[entry["a"]][entry["metric"]] - other[entry["metric"]]
        assert entry["difference"] == pytest.approx(expected, abs=1e-9)
    for told in (
        "1 of 16 scans have no diagnosis",
        "ONE: only AD occurs",
        "TWO: only CN and AD occur",
        "ONE: there is no other",
        "answers are compared by the default rule",
    ):
        assert any(note.startswith(told) for note in report["notes"]) and told in stderr
        assert told in files["report.md"].decode()
    assert "THREE" in stdout and "chance" in stdout and str(out) in stdout


def test_every_kind_of_question_that_is_known_is_asked_with_three_images(everything):
    out, *_ = everything
    vqa = json.loads((out / "report.json").read_text())["vqa"]
    assert set(vqa["THREE"]) == {"own scan", "question only", "another subject's scan"}
    assert set(vqa["ONE"]) == {"own scan", "question only"}  # nobody else's scan
    for kinds in vqa["THREE"].values():
        known = {"diagnosis": 9, "demented": 9, "age": 10, "sex": 10, "extent": 10}  # one has no diagnosis
        assert {kind: scores["n"] for kind, scores in kinds.items()} == known
        assert kinds["sex"]["majority_accuracy"] == 1 and 0 <= kinds["sex"]["accuracy_by_likelihood"] <= 1
        assert {"mae", "within_tolerance"} <= kinds["age"].keys() and {"token_f1", "bleu4"} <= kinds["extent"].keys()
    only = vqa["THREE"]["question only"]["diagnosis"]  # one answer for all: right a third of the time, or never
    assert only["accuracy"] in (0, pytest.approx(1 / 3)) and only["accuracy_by_likelihood"] == pytest.approx(1 / 3)


def test_worst_mistakes_are_wrong_and_have_a_picture_each(everything):
    out, *_ = everything
    worst = json.loads((out / "report.json").read_text())["worst"]
    assert worst
    predictions = {(row["arm"], row["scan_id"]): row for row in read_predictions(out)}
    for mistake in worst:
        row = predictions[mistake["arm"], mistake["key"]]
        assert mistake["answer"] != mistake["diagnosis"] == row["diagnosis"]
        assert mistake["probability"] == pytest.approx(float(row[f"p_{row['diagnosis']}"]), abs=1e-6)
        assert (out / mistake["picture"]).read_bytes().startswith(b"\x89PNG")


def test_the_rule_is_that_of_val_whatever_is_best_on_test(folder, with_val, medblip, monkeypatch, tmp_path):
    answers = tuple(DIAGNOSIS_ANSWERS.values())
    truths = {sample.key: sample.diagnosis for name in ("val", "test") for sample in ShardIndex(with_val).samples(name)}
    val = {sample.key for sample in ShardIndex(with_val).samples("val")}
    seen = {"val": [], "test": []}
    real = Interview.score

    def score(interview, asks, options):
        """Likelihoods by which `sum-balanced` is always right on val and `sum-minus-null` always on test."""
        if options != answers:
            return real(interview, asks, options)
        offered = interview.asker.options(options)
        found = {}
        for ask in asks:
            key = interview.scans[ask.image].sample.key
            truth = np.array([name == truths[key] for name in DIAGNOSIS_ANSWERS])
            base = -np.array(offered.num_tokens) if key in val else np.array(offered.null_logp)
            found[ask] = Scores((base + 0.5 * truth).tolist(), None)
            seen["val" if key in val else "test"].append((int(truth.argmax()), found[ask].logp))
        seen["options"] = offered
        return found

    monkeypatch.setattr(Interview, "score", score)
    arguments = ["--model", folder / "run", "--data", with_val, "--out", tmp_path, "--arms", "image", "--no-baselines"]
    code, _, stderr = medblip("evaluate", *arguments, "--vqa-scans", 0)
    assert code == 0, stderr
    on_val, on_test = (choose_rule(*map(np.array, zip(*seen[name], strict=True)), seen["options"])
                       for name in ("val", "test"))  # fmt: skip
    assert on_val[0] == RULES["sum-balanced"], "the two differ, else no proof"
    of_test = {name: score for name, score in on_test[1].items() if not RULES[name].balanced}
    assert max(of_test, key=of_test.get) == "sum-minus-null", "the two differ, else no proof"
    report = json.loads((tmp_path / "report.json").read_text())
    rule = report["rule"]
    assert (rule["length"], rule["minus_null"], rule["balanced"], rule["chosen_on"]) == ("sum", False, True, "val")
    assert rule["scores"] == on_val[1] and len(seen["val"]) == 9
    offset_O = balancing_offsets(*map(np.array, zip(*seen["val"], strict=True)))
    assert rule["balanced_on"] == {"split": "val", "scans": 9}
    assert list(rule["offsets"]["THREE"]["image"].values()) == pytest.approx(offset_O.tolist())
    by_key = {row["scan_id"]: row for row in read_predictions(tmp_path)}
    p_NO = probabilities([logp for _, logp in seen["test"]], seen["options"], RULES["sum-balanced"], offset_O)
    asked = [sample for sample in ShardIndex(with_val).samples("test") if sample.diagnosis]
    for sample, p_O in zip(asked, p_NO, strict=True):
        assert [float(by_key[sample.key][f"p_{name}"]) for name in DIAGNOSIS_ANSWERS] == pytest.approx(p_O.tolist())
    by_default = probabilities([logp for _, logp in seen["test"]], seen["options"], RULES["sum-minus-null"])
    assert (by_default.argmax(1) == [truth for truth, _ in seen["test"]]).all()
    assert report["cohorts"]["THREE"]["image"]["balanced_accuracy"] < 1


def test_without_val_answers_are_balanced_on_scans_of_train_and_each_arm_by_itself(folder, medblip, tmp_path):
    command = ["evaluate", "--model", folder / "run", "--data", folder / "shards", "--no-baselines", "--vqa-scans", 0]
    command += ["--arms", *EVERYTHING]
    for rule in ("sum", "sum-balanced"):
        code, _, stderr = medblip(*command, "--rule", rule, "--out", tmp_path / rule)
        assert code == 0, stderr
    report = json.loads((tmp_path / "sum-balanced" / "report.json").read_text())
    rule = report["rule"]
    num_train = sum(bool(sample.diagnosis) for sample in ShardIndex(folder / "shards").samples("train"))
    assert rule["balanced_on"] == {"split": "train", "scans": num_train} and rule["chosen_on"] == "given"
    assert any("balanced on scans that were trained on" in note for note in report["notes"])
    assert f"balanced over {num_train} scans of the split train" in (tmp_path / "sum-balanced/report.md").read_text()
    assert f"{num_train} scans of the split train" in (tmp_path / "sum-balanced/methods.md").read_text()
    three = rule["offsets"]["THREE"]
    assert set(three) == set(EVERYTHING) and list(rule["offsets"]["TWO"]["image"]) == ["CN", "AD"]
    assert three["image"] == three["shuffled_image"] == three["blank_image"] != three["both"] == three["both_shuffled"]
    assert three["text"] != three["both"]
    plain, balanced = (read_predictions(tmp_path / rule) for rule in ("sum", "sum-balanced"))
    for before, after in zip(plain, balanced, strict=True):
        offsets = rule["offsets"][before["cohort"]][before["arm"]]
        for name, other in itertools.combinations(offsets, 2):
            moved = [np.log(float(row[f"p_{name}"]) / float(row[f"p_{other}"])) for row in (before, after)]
            assert moved[1] - moved[0] == pytest.approx(offsets[name] - offsets[other], abs=1e-4)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_likelihood_that_is_not_finite_is_named_by_key(folder, with_val, medblip, monkeypatch, tmp_path, split):
    broken = ShardIndex(with_val).samples(split)[1].key
    real = Interview.score

    def score(interview, asks, options):
        found = real(interview, asks, options)
        bad = {ask for ask in found if interview.scans[ask.image].sample.key == broken}
        return {ask: Scores([float("nan")] * 3, None) if ask in bad else one for ask, one in found.items()}

    monkeypatch.setattr(Interview, "score", score)
    arguments = ["--model", folder / "run", "--data", with_val, "--out", tmp_path, "--arms", "image", "--no-baselines"]
    code, stdout, stderr = medblip("evaluate", *arguments, "--vqa-scans", 0)
    assert code == 1 and stdout == "" and f"{broken}, arm image" in stderr and "not finite" in stderr


def test_scans_without_a_diagnosis_are_asked_what_is_known_of_them(folder, with_val, medblip, tmp_path):
    arguments = ["--model", folder / "run", "--data", with_val, "--out", tmp_path, "--arms", "image", "--no-baselines"]
    assert medblip("evaluate", *arguments)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["cohorts"]) == ["THREE"] and set(report["vqa"]) == {"THREE", "BARE"}
    for kinds in report["vqa"]["BARE"].values():
        assert {kind: scores["n"] for kind, scores in kinds.items()} == {"age": 3, "sex": 3, "extent": 3}
    assert "3 of 12 scans have no diagnosis and are not scored on it; 3 of these were asked" in report["notes"][0]
    assert "BARE" in (tmp_path / "report.md").read_text()

    run = shutil.copytree(folder / "run", tmp_path / "run")
    trained = next(sample for sample in ShardIndex(with_val).samples("test") if sample.cohort == "BARE")
    with open(run / "train_subjects.txt", "a") as file:
        file.write(f"{trained.subject}\n")
    code, _, stderr = medblip("evaluate", "--model", run, "--data", with_val, "--out", tmp_path / "out")
    assert code == 1 and trained.key in stderr, "a subject of the training, though it has no diagnosis"


@pytest.mark.slow
def test_two_ranks_write_the_same_report_as_one(folder, everything):
    one, *_ = everything
    launchers = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "medblip.cli"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "medblip.cli"],
    }
    for name, (program, *words) in launchers.items():
        command = [Path(sys.executable).parent / program, *words, "evaluate", "--model", folder / "run"]
        command += ["--data", folder / "shards", "--out", folder / name, "--arms", *EVERYTHING]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        for file in ("report.json", "predictions.csv", "report.md"):
            assert (folder / name / file).read_bytes() == (one / file).read_bytes(), f"{name}: {file}"


def test_predictions_name_scans_by_key_and_offer_only_what_can_be_chosen(folder, medblip, tmp_path):
    code, *_ = medblip(
        "evaluate", "--model", folder / "run", "--data", folder / "shards", "--out", tmp_path, "--batch", 4
    )
    assert code == 0
    samples = {sample.key: sample for sample in ShardIndex(folder / "shards").samples("test")}
    rows = read_predictions(tmp_path)
    # Four arms with a row for each scan, and the shuffled one with a row for each scan and other subject.
    assert len(rows) == 9 * (4 + 4) + 4 * (4 + 3) + 2 * 4
    for row in rows:
        sample = samples[row["scan_id"]]
        assert (row["subject_id"], row["cohort"], row["diagnosis"]) == (sample.subject, sample.cohort, sample.diagnosis)
        assert (row["p_MCI"] == "") == (row["cohort"] == "TWO")
        p = {name: float(row[f"p_{name}"]) for name in DIAGNOSIS_ANSWERS if row[f"p_{name}"]}
        assert sum(p.values()) == pytest.approx(1, abs=1e-6)
        if row["arm"] != "both":
            assert row["answer"] == DIAGNOSIS_ANSWERS[max(p, key=p.get)]
        else:
            assert row["answer"] in (*DIAGNOSIS_ANSWERS.values(), "other")
    # An image counts in its arm, the record in its own, and a batch changes nothing.
    by_arm = defaultdict(list)
    for row in rows:
        by_arm[row["arm"]].append((row["scan_id"], float(row["p_AD"])))
    assert len({tuple(sorted(p)) for p in by_arm.values()}) == 5
    medblip("evaluate", "--model", folder / "run", "--data", folder / "shards", "--out", tmp_path, "--batch", 1)
    for before, after in zip(rows, read_predictions(tmp_path), strict=True):
        assert (before["arm"], before["scan_id"]) == (after["arm"], after["scan_id"])
        assert float(before["p_AD"]) == pytest.approx(float(after["p_AD"]), abs=1e-4)


def test_shards_that_are_not_there_are_a_message_and_exit_1(medblip, tmp_path):
    code, stdout, stderr = medblip("evaluate", "--model", tmp_path, "--data", tmp_path)
    assert code == 1 and stdout == "" and "index.json is missing" in stderr and "Traceback" not in stderr


def test_a_subject_seen_in_training_fails_by_count_and_key(folder, medblip, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    leaked = next(sample for sample in ShardIndex(folder / "shards").samples("test") if sample.cohort == "ONE")
    with open(run / "train_subjects.txt", "a") as file:
        file.write(f"{leaked.subject}\n")
    code, stdout, stderr = medblip("evaluate", "--model", run, "--data", folder / "shards", "--out", tmp_path / "out")
    assert code == 1 and stdout == "" and not (tmp_path / "out").exists()
    assert "1 subjects" in stderr and "2 scans" in stderr and leaked.key in stderr


def test_the_training_split_cannot_be_scored(folder, medblip, tmp_path):
    code, _, stderr = medblip(
        "evaluate", "--model", folder / "run", "--data", folder / "shards", "--split", "train", "--out", tmp_path
    )
    assert code == 1 and "9 subjects" in stderr


def test_another_recipe_is_refused_by_name_and_both_values(folder, medblip, tmp_path):
    shards = shutil.copytree(folder / "shards", tmp_path / "shards")
    content = json.loads((shards / "index.json").read_text())
    content["recipe"] |= {"spacing_mm": 4.5, "high_percentile": 99.0}
    (shards / "index.json").write_text(json.dumps(content))
    code, _, stderr = medblip("evaluate", "--model", folder / "run", "--data", shards, "--out", tmp_path / "out")
    assert code == 1
    assert "spacing_mm is 4.5 in the shards and 4.0 in the model" in stderr
    assert "high_percentile is 99.0 in the shards and 99.5 in the model" in stderr and "size" not in stderr


def test_a_lower_tier_is_fine_and_a_higher_one_is_not():
    assert check_tier("none", "cognition") == "none" and check_tier("cognition", "cognition") == "cognition"
    with pytest.raises(ValueError, match="--ehr staging.*trained with cognition"):
        check_tier("staging", "cognition")


def test_ask_prints_only_json_and_its_probabilities_sum_to_1(folder, medblip):
    scan = folder / "raw/0.nii"
    code, stdout, stderr = medblip(
        "ask", scan, "What is the diagnosis?", "--model", folder / "run", "--report", f"He {SECRET}.", "--json"
    )
    found = json.loads(stdout)
    assert code == 0 and found.keys() == {"answer", "probabilities"} and stdout.count("\n") == 1
    assert list(found["probabilities"]) == ["CN", "MCI", "AD"]
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert found["answer"] == DIAGNOSIS_ANSWERS[max(found["probabilities"], key=found["probabilities"].get)]
    assert SECRET not in stderr

    code, stdout, _ = medblip("ask", scan, "How old is this subject?", "--model", folder / "run", "--json")
    found = json.loads(stdout)
    assert code == 0 and found["probabilities"] is None and isinstance(found["answer"], str)


def test_ask_says_that_it_is_for_research_and_when_a_record_was_not_used(folder, medblip):
    code, stdout, stderr = medblip(
        "ask", folder / "raw/0.nii", "What is the diagnosis?", "--model", folder / "run", "--report", "MMSE 20."
    )
    assert code == 0 and "Research use only; not a medical device." in stdout and "CN" in stdout
    assert "the record was not used" in stderr and "demographics" in stderr


def test_ask_agrees_with_evaluate_on_the_same_scan(folder, medblip, tmp_path):
    medblip("evaluate", "--model", folder / "run", "--data", folder / "shards", "--out", tmp_path, "--arms", "image")
    expected = sorted(round(float(row["p_AD"]), 4) for row in read_predictions(tmp_path) if row["cohort"] == "THREE")
    found = []
    for number in range(9, 18):
        question = "What will this subject be diagnosed with?"
        _, stdout, _ = medblip("ask", folder / f"raw/{number}.nii", question, "--model", folder / "run", "--json")
        found.append(json.loads(stdout)["probabilities"]["AD"])
    assert sorted(found) == pytest.approx(expected, abs=1e-4)


def test_ask_shows_why_a_file_is_not_a_scan(folder, medblip, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    code, stdout, stderr = medblip(
        "ask", tmp_path / "broken.nii.gz", "What is it?", "--model", folder / "run", "--json"
    )
    assert code == 1 and stdout == "" and "broken.nii.gz" in stderr
