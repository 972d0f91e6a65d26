"""`medblip compare`: scans paired by KEY, subjects redrawn together, and other splits refused."""

import csv
import json
import re

import numpy as np
import pytest
from made_up_evaluation import made_up_evaluation

from medblip import metrics
from medblip.compare import CompareOptions, compare
from medblip.progress import write_json


def write(folder, report, predictions, arms=("image", "blank_image")):
    """What compare reads of an evaluation, some arms left out to save time."""
    predictions = [row for row in predictions if row["arm"] in arms]
    folder.mkdir()
    write_json(folder / "report.json", report)
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, predictions[0].keys())
        writer.writeheader()
        writer.writerows(predictions)
    return str(folder)


def three(tmp_path):
    """Evaluations of the same scans: one good, one that guesses, one good with other noise."""
    return [
        write(tmp_path / name, *made_up_evaluation(seed=seed, skill=skill))
        for name, seed, skill in (("good", 1, 2.0), ("guessing", 2, 0.0), ("other", 3, 2.0))
    ]


def paired(out, cohort, arm, metric="macro_auc"):
    found = json.loads((out / "compare.json").read_text())["cohorts"][cohort]["paired"]
    return {(p["a"], p["b"]): p for p in found if (p["arm"], p["metric"]) == (arm, metric)}


def test_difference_is_that_of_the_reports_and_the_test_tells_good_from_guessing(tmp_path, capsys):
    folders, out = three(tmp_path), tmp_path / "out"
    assert compare(CompareOptions(evaluations=tuple(folders), out=str(out))) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("good", "guessing", "other")]
    for cohort in ("AIBL", "MIRIAD"):
        for metric in ("balanced_accuracy", "macro_auc"):
            found = paired(out, cohort, "image", metric)
            assert list(found) == [("A", "B"), ("A", "C"), ("B", "C")]
            a, b, c = (report["cohorts"][cohort]["image"][metric] for report in reports)
            for pair, difference in {("A", "B"): a - b, ("A", "C"): a - c, ("B", "C"): b - c}.items():
                assert found[pair]["difference"] == pytest.approx(difference, abs=1e-9)
                assert (found[pair]["common_scans"], found[pair]["common_subjects"]) == (60, 30)
            assert found["A", "B"]["p_value"] < 0.01 and found["A", "B"]["ci95"][0] > 0
        low, high = paired(out, cohort, "blank_image")["A", "B"]["ci95"]
        assert low == high == 0, "both guess alike"
    stdout = capsys.readouterr().out
    assert "A: good (run/step-801), record tier cognition" in stdout
    assert "common scans" in stdout and str(tmp_path / "good") not in stdout


def test_pages_print_the_json_and_need_no_network(tmp_path):
    folders, out = three(tmp_path), tmp_path / "out"
    compare(CompareOptions(evaluations=tuple(folders[:2]), out=str(out)))
    result = json.loads((out / "compare.json").read_text())
    page, markdown = (out / "compare.html").read_text(), (out / "compare.md").read_text()
    assert not re.search(r"https?:|<script", page) and page.count("data:image/png") == 2
    for text in (re.sub("<[^>]*>", "", page), markdown):
        for cohort in result["cohorts"].values():
            for pair in cohort["paired"]:
                assert f"{pair['difference']:.3f} [{pair['ci95'][0]:.3f}, {pair['ci95'][1]:.3f}]" in text
            for scores in cohort["arms"].values():
                for arm in scores.values():
                    assert arm["macro_auc"] is None or f"{arm['macro_auc']:.3f}" in text
        assert "Research use only" in text and "not corrected" in text
        assert "record tier" in text and text.count("cognition") == 2, "the tier of both, though it is the same"
        assert "ONE: A and B have no arm in common" in text


def test_pairs_by_key_and_only_common_scans(tmp_path):
    report, predictions = made_up_evaluation(seed=1)
    other_report, other = made_up_evaluation(seed=2)
    fewer = [row for row in other if row["cohort"] == "AIBL" and int(row["scan_id"][-8:], 16) < 40][::-1]
    a, b = write(tmp_path / "a", report, predictions), write(tmp_path / "b", other_report, fewer)
    compare(CompareOptions(evaluations=(a, b), out=str(tmp_path / "out")))
    found = paired(tmp_path / "out", "AIBL", "image")["A", "B"]
    classes = ["CN", "MCI", "AD"]
    mine, theirs = (
        {row["scan_id"]: row for row in rows if row["arm"] == "image" and row["cohort"] == "AIBL"}
        for rows in (predictions, fewer)
    )
    keys = sorted(theirs)
    p = [np.array([[float(rows[key][f"p_{c}"]) for c in classes] for key in keys]) for rows in (mine, theirs)]
    truth, subjects = [mine[key]["diagnosis"] for key in keys], [mine[key]["subject_id"] for key in keys]
    expected = metrics.compare(truth, *p, classes, subjects, 1000, 0)["macro_auc"]
    assert {name: found[name] for name in expected} == expected and found["common_scans"] == 40
    notes = json.loads((tmp_path / "out/compare.json").read_text())["notes"]
    assert "AIBL: A - B, arm image: 40 common scans, of 60 and 40" in notes
    assert "MIRIAD: A and B have no arm in common" in notes


def in_rounds(report, predictions, num_rounds, seed):
    """The same with only the arm `shuffled_image` of AIBL, in rounds of other probabilities, as evaluate writes it."""
    draw, rows = np.random.default_rng(seed), []
    for _ in range(num_rounds):
        for row in predictions:
            if (row["cohort"], row["arm"]) == ("AIBL", "image"):
                p = dict(zip(("p_CN", "p_MCI", "p_AD"), draw.dirichlet([1, 1, 1]), strict=True))
                rows.append(row | {"arm": "shuffled_image"} | {name: f"{value:.9g}" for name, value in p.items()})
    return report, rows


def test_rounds_of_a_shuffled_arm_are_paired_in_order_and_scans_of_a_subject_stay_together(tmp_path):
    whole = made_up_evaluation(seed=1)
    a_report, a_rows = in_rounds(*whole, num_rounds=4, seed=5)
    b_report, b_rows = in_rounds(*whole, num_rounds=3, seed=6)
    # The scans of b come in another order within each round: KEYs pair scans, and the place of a KEY its rounds.
    b_rows = [row for start in range(0, 180, 60) for row in b_rows[start : start + 60][::-1]]
    a = write(tmp_path / "a", a_report, a_rows, ("shuffled_image",))
    b = write(tmp_path / "b", b_report, b_rows, ("shuffled_image",))
    compare(CompareOptions(evaluations=(a, b), out=str(tmp_path / "out")))
    found = paired(tmp_path / "out", "AIBL", "shuffled_image")["A", "B"]
    assert (found["common_scans"], found["common_subjects"]) == (60, 30)

    keys = sorted({row["scan_id"] for row in a_rows})
    of_a, of_b = ({key: [row for row in rows if row["scan_id"] == key] for key in keys} for rows in (a_rows, b_rows))

    def expected(rounds_of_a, name_of):
        """By `metrics.compare`, from these rounds of a and all of b."""
        pairs = [(of_a[key][n], of_b[key][m]) for key in keys for m, n in enumerate(rounds_of_a)]
        p = [
            np.array([[float(pair[side][f"p_{c}"]) for c in ("CN", "MCI", "AD")] for pair in pairs]) for side in (0, 1)
        ]
        truth, subjects = [x["diagnosis"] for x, _ in pairs], [name_of(x, n) for n, (x, _) in enumerate(pairs)]
        return metrics.compare(truth, *p, ["CN", "MCI", "AD"], subjects, 1000, 0)["macro_auc"]

    first_three = expected((0, 1, 2), lambda row, n: row["subject_id"])  # b has no fourth round
    last_three = expected((1, 2, 3), lambda row, n: row["subject_id"])
    apart = expected((0, 1, 2), lambda row, n: str(n))
    for name in ("difference", "ci95", "p_value"):
        assert found[name] == pytest.approx(first_three[name])
    assert found["difference"] != pytest.approx(last_three["difference"]), "other rounds are not the same"
    assert found["ci95"] != pytest.approx(apart["ci95"]), "six rows of a subject are not six subjects"


def test_an_evaluation_equals_itself(tmp_path):
    a, b = (write(tmp_path / name, *made_up_evaluation()) for name in "ab")
    compare(CompareOptions(evaluations=(a, b), out=str(tmp_path / "out")))
    result = json.loads((tmp_path / "out/compare.json").read_text())
    for pair in result["cohorts"]["AIBL"]["paired"]:
        assert (pair["difference"], pair["ci95"], pair["p_value"]) == (0, [0, 0], 1)


def test_another_split_is_refused_by_name(tmp_path):
    report, predictions = made_up_evaluation()
    a = write(tmp_path / "mine", report, predictions)
    for name, change in {"split_sha256": {"split_sha256": "ab" * 32}, "split": {"split": "val"}}.items():
        b = write(tmp_path / name, report | change, predictions)
        with pytest.raises(ValueError, match=rf"differ in {name},.*A \(mine\) has .*; B \({name}\) has "):
            compare(CompareOptions(evaluations=(a, b), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_differs_beside_the_model_is_noted(tmp_path):
    report, predictions = made_up_evaluation()
    change = {"ehr": "none", "recipe": report["recipe"] | {"size": 128}, "commit": None}
    folders = write(tmp_path / "a", report, predictions), write(tmp_path / "b", report | change, predictions)
    compare(CompareOptions(evaluations=folders, out=str(tmp_path / "out")))
    notes = json.loads((tmp_path / "out/compare.json").read_text())["notes"]
    assert "ehr differs: A: cognition; B: none" in notes and "recipe size differs: A: 96; B: 128" in notes
    assert sum("differs" in note for note in notes) == 3


def test_offsets_of_answers_are_those_of_a_model_but_what_they_were_fitted_on_is_noted(tmp_path):
    report, predictions = made_up_evaluation()
    folders = []
    for name, split, offset in (("a", "val", 0.4), ("b", "train", -0.1)):
        rule = {"length": "sum", "minus_null": False, "balanced": True, "chosen_on": "given", "scores": {}}
        rule |= {"balanced_on": {"split": split, "scans": 90}, "offsets": {"AIBL": {"image": {"CN": offset}}}}
        folders.append(write(tmp_path / name, report | {"rule": rule}, predictions))
    compare(CompareOptions(evaluations=tuple(folders), out=str(tmp_path / "out")))
    (note,) = (note for note in json.loads((tmp_path / "out/compare.json").read_text())["notes"] if "differs" in note)
    assert note.startswith("rule balanced_on differs") and "'split': 'val'" in note and "'split': 'train'" in note


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda rows: rows[0].update(diagnosis="MCI"), "scan AIBL-00000000 has another subject or diagnosis"),
        (lambda rows: rows[3].update(p_AD="much"), r"predictions.csv, line 5: .*much"),
        (lambda rows: rows.__delitem__(slice(1, None)), "no cohort has an arm with two diagnoses"),
    ],
)  # fmt: skip
def test_predictions_that_do_not_fit_are_refused(tmp_path, spoil, told):
    report, predictions = made_up_evaluation()
    a = write(tmp_path / "a", report, predictions)
    spoil(predictions)
    b = write(tmp_path / "b", report, predictions)
    with pytest.raises(ValueError, match=told):
        compare(CompareOptions(evaluations=(a, b), out=str(tmp_path / "out")))


def test_a_folder_without_an_evaluation_is_named(tmp_path):
    a = write(tmp_path / "a", *made_up_evaluation())
    with pytest.raises(ValueError, match="nothing has no report.json"):
        compare(CompareOptions(evaluations=(a, str(tmp_path / "nothing")), out=str(tmp_path / "out")))
