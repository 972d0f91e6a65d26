"""Scores against values worked out by hand, by plain loops or by scikit-learn, and the odd cohorts."""

import json
import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from medblip.bootstrap import draw_weights
from medblip.metrics import SCORED, age_matched, calibration, compare, score, score_once, weighted_scores

CLASSES = ["CN", "MCI", "AD"]
TRUTH = ["CN", "CN", "MCI", "MCI", "AD", "AD"]
P = np.array(
    [
        [0.6, 0.3, 0.1],
        [0.2, 0.5, 0.3],  # CN taken for MCI
        [0.3, 0.4, 0.3],
        [0.1, 0.7, 0.2],
        [0.1, 0.2, 0.7],
        [0.5, 0.1, 0.4],  # AD taken for CN
    ]
)
SUBJECTS = list("abcdef")


def made_up(num_scans=90, num_classes=3, seed=0, signal=1.0):
    """Truth, probabilities with ties, and subjects of one to three scans."""
    draw = np.random.default_rng(seed)
    subject_N = np.sort(draw.integers(0, num_scans // 2, size=num_scans))
    truth_N = (subject_N % num_classes).astype(int)
    logit_NK = draw.normal(size=(num_scans, num_classes)).round(1)
    logit_NK[np.arange(num_scans), truth_N] += signal
    p_NK = np.exp(logit_NK) / np.exp(logit_NK).sum(axis=1, keepdims=True)
    if num_classes == 2:  # the same ties in both columns
        p_NK = np.c_[1 - p_NK[:, 1].round(2), p_NK[:, 1].round(2)]
    classes = CLASSES if num_classes == 3 else ["CN", "AD"]
    return [classes[k] for k in truth_N], p_NK, classes, [f"s{s}" for s in subject_N]


def pairs_won(inside, outside):
    return np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside])


def test_three_classes_give_the_values_worked_out_by_hand():
    found = score(TRUTH, P, CLASSES, SUBJECTS, 1000, seed=0)
    assert found["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert found["recall"] == {"CN": 0.5, "MCI": 1.0, "AD": 0.5}
    assert found["specificity"] == {"CN": 3 / 4, "MCI": 3 / 4, "AD": 1.0}
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)
    # CN: 0.6 beats all four, 0.2 beats two. MCI: 0.4 beats three, 0.7 all. AD: both beat all four.
    assert found["macro_auc"] == pytest.approx((6 / 8 + 7 / 8 + 8 / 8) / 3)
    # F1: CN 2*1/(2+2), MCI 2*2/(2+3), AD 2*1/(2+1)
    assert found["macro_f1"] == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)
    # Squared distances of the rows from the truth: .26 .98 .54 .14 .14 .62
    assert found["brier"] == pytest.approx(2.68 / 6)
    # Bins by the top probability: (0.3, 0.4] right 1 of 1; (0.4, 0.5] 0 of 2; (0.5, 0.6] 1 of 1; (0.6, 0.7] 2 of 2
    assert found["ece"] == pytest.approx((0.6 + 2 * 0.5 + 0.4 + 2 * 0.3) / 6)
    assert [place["n"] for place in found["reliability"]] == [1, 2, 1, 2]
    assert (found["n_subjects"], found["n_scans"], found["classes"]) == (6, 6, CLASSES)


def test_two_classes_have_the_plain_auc():
    found = score(
        ["CN", "CN", "AD", "AD"], [[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.2, 0.8]], ["CN", "AD"], list("abcd"), 1000, 0
    )
    assert found["macro_auc"] == pytest.approx(3 / 4)
    assert found["balanced_accuracy"] == pytest.approx(0.5 * (1 / 2 + 1 / 2))
    assert found["confusion"] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_score_is_what_plain_loops_give(num_classes, seed):
    truth, p_NK, classes, subjects = made_up(num_classes=num_classes, seed=seed)
    found = score(truth, p_NK, classes, subjects, 100, seed=0)
    told = [classes[max(range(len(classes)), key=lambda k: row[k])] for row in p_NK]
    recalls, f1s, aucs = [], [], []
    for k, name in enumerate(classes):
        hit = sum(t == name == a for t, a in zip(truth, told, strict=True))
        missed = sum(t == name != a for t, a in zip(truth, told, strict=True))
        false = sum(t != name == a for t, a in zip(truth, told, strict=True))
        rest = len(truth) - hit - missed - false
        assert found["recall"][name] == pytest.approx(hit / (hit + missed))
        assert found["specificity"][name] == pytest.approx(rest / (rest + false))
        recalls.append(hit / (hit + missed))
        f1s.append(hit / (hit + (missed + false) / 2))
        inside = [row[k] for row, t in zip(p_NK, truth, strict=True) if t == name]
        aucs.append(pairs_won(inside, [row[k] for row, t in zip(p_NK, truth, strict=True) if t != name]))
        curve = found["roc"][name]
        assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(aucs[-1])
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["macro_f1"] == pytest.approx(np.mean(f1s))
    assert found["macro_auc"] == pytest.approx(np.mean(aucs))
    assert found["brier"] == pytest.approx(
        np.mean(
            [
                sum((p - (name == t)) ** 2 for p, name in zip(row, classes, strict=True))
                for row, t in zip(p_NK, truth, strict=True)
            ]
        )
    )
    ece = 0.0
    for edge in range(10):
        inside = [(max(r), t == a) for r, t, a in zip(p_NK, truth, told, strict=True) if edge < 10 * max(r) <= edge + 1]
        ece += abs(sum(p for p, _ in inside) - sum(right for _, right in inside)) / len(truth)
    assert found["ece"] == pytest.approx(ece)


def test_reliability_is_what_scikit_learn_gives():
    truth, p_NK, classes, _ = made_up(seed=4)
    found = calibration(truth, p_NK, classes)["reliability"]
    right = np.array([classes[k] for k in p_NK.argmax(axis=1)]) == np.array(truth)
    fraction, mean = calibration_curve(right, p_NK.max(axis=1), n_bins=10)
    assert [place["fraction_right"] for place in found] == pytest.approx(fraction.tolist())
    assert [place["mean_probability"] for place in found] == pytest.approx(mean.tolist())
    assert sum(place["n"] for place in found) == len(truth)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_draws_are_what_scikit_learn_says_of_the_redrawn_scans(num_classes):
    truth, p_NK, classes, subjects = made_up(60, num_classes, seed=1)
    truth_N = np.array([classes.index(name) for name in truth])
    weight_DN = draw_weights(truth_N, subjects, 20, seed=5)
    found = weighted_scores(truth_N, p_NK, weight_DN)
    for place, weight_N in enumerate(weight_DN):
        rows = np.repeat(np.arange(60), weight_N.astype(int))
        told_N, scores = p_NK[rows].argmax(axis=1), p_NK[rows] if num_classes == 3 else p_NK[rows, 1]
        assert found["balanced_accuracy"][place] == pytest.approx(balanced_accuracy_score(truth_N[rows], told_N))
        assert found["macro_f1"][place] == pytest.approx(f1_score(truth_N[rows], told_N, average="macro"))
        assert found["macro_auc"][place] == pytest.approx(roc_auc_score(truth_N[rows], scores, multi_class="ovr"))
        assert found["brier"][place] == pytest.approx(
            ((p_NK[rows] - np.eye(num_classes)[truth_N[rows]]) ** 2).sum() / len(rows)
        )


def test_scans_that_are_copies_add_no_evidence():
    truth, p_NK, classes, subjects = made_up(40, seed=2)
    once = score(truth, p_NK, classes, subjects, 1000, seed=0)
    twice = score(truth * 2, np.tile(p_NK, (2, 1)), classes, subjects * 2, 1000, seed=0)  # as the shuffled arms do
    assert twice["n_subjects"] == once["n_subjects"] and twice["n_scans"] == 80
    for name in SCORED:
        assert twice[name] == pytest.approx(once[name])
        assert twice["ci95"][name] == pytest.approx(once["ci95"][name])
    renamed = score(truth * 2, np.tile(p_NK, (2, 1)), classes, subjects + [f"x{s}" for s in subjects], 1000, seed=0)
    assert np.ptp(renamed["ci95"]["macro_auc"]) < 0.9 * np.ptp(once["ci95"]["macro_auc"])


def test_true_probabilities_have_the_ece_of_calibrated_ones_and_false_ones_more():
    draw = np.random.default_rng(0)
    p_NK = draw.dirichlet([1, 1, 1], size=400)
    truth = [CLASSES[draw.choice(3, p=row)] for row in p_NK]
    subjects = [str(row) for row in range(400)]
    true = score(truth, p_NK, CLASSES, subjects, 10, seed=0)
    assert true["ece"] == pytest.approx(true["ece_if_calibrated"], abs=0.03)
    sharp_NK = p_NK**4 / (p_NK**4).sum(axis=1, keepdims=True)
    false = score(truth, sharp_NK, CLASSES, subjects, 10, seed=0)
    assert false["ece"] > 3 * false["ece_if_calibrated"]


def test_scans_of_a_subject_share_the_diagnosis_that_is_drawn_for_calibration():
    draw = np.random.default_rng(0)
    p_NK = draw.dirichlet([1, 1, 1], size=60)
    truth, subjects = [CLASSES[draw.choice(3, p=row)] for row in p_NK], [str(row) for row in range(60)]
    once = score(truth, p_NK, CLASSES, subjects, 10, seed=0)["ece_if_calibrated"]
    # The same scan nine times tells nothing new, so nine scans a subject have the ECE of one; nine subjects do not.
    args = (truth * 9, np.tile(p_NK, (9, 1)), CLASSES)
    assert score(*args, subjects * 9, 10, seed=0)["ece_if_calibrated"] == pytest.approx(once)
    assert score(*args, [str(n) for n in range(540)], 10, seed=0)["ece_if_calibrated"] < 0.6 * once
    # and independently, by a plain loop over redrawn diagnoses
    eces = []
    for _ in range(400):
        again = [CLASSES[draw.choice(3, p=row)] for row in p_NK]
        eces.append(calibration(again, p_NK, CLASSES)["ece"])
    assert once == pytest.approx(np.mean(eces), rel=0.1)


def test_a_class_that_does_not_occur_is_left_out_of_the_means():
    found = score(TRUTH[:4], P[:4], CLASSES, SUBJECTS[:4], 200, seed=0)
    assert found["recall"] == {"CN": 0.5, "MCI": 1.0, "AD": None} and found["roc"]["AD"] is None
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["macro_auc"] == pytest.approx(
        np.mean([pairs_won([0.6, 0.2], [0.3, 0.1]), pairs_won([0.4, 0.7], [0.3, 0.5])])
    )
    json.dumps(found, allow_nan=False)


def test_one_class_alone_has_no_score():
    found = score(["CN", "CN"], P[:2], CLASSES, ["a", "b"], 100, seed=0)
    assert found["n_scans"] == 2 and all(found[name] is None for name in (*SCORED, "ece", "recall", "roc", "ci95"))
    assert compare(["CN"], P[:1], P[:1], CLASSES, ["a"], 100, 0)["macro_auc"]["difference"] is None
    assert age_matched(["CN"], [[1.0]], ["CN"], [70], ["a"], 100, 0) is None


def test_a_class_with_one_subject_has_scores_and_no_interval():
    found = score(TRUTH[:5], P[:5], CLASSES, list("abcde"), 100, seed=0)
    assert found["macro_auc"] is not None
    assert found["ci95"] == dict.fromkeys((*SCORED, "recall", "specificity")) | {"draws": 0}
    assert compare(TRUTH[:5], P[:5], P[:5], CLASSES, list("abcde"), 100, 0)["macro_auc"]["p_value"] is None


def test_one_subject_that_changes_class_has_scores_and_no_interval():
    found = score(["CN", "AD"], [[0.9, 0.1], [0.4, 0.6]], ["CN", "AD"], ["a", "a"], 100, seed=0)
    assert found["balanced_accuracy"] == 1 and found["ci95"]["macro_auc"] is None


def all_right(num_subjects, classes, wrong=()):
    """Each scan of its own subject; the true class has the highest probability, except in the rows `wrong`."""
    truth_N = np.arange(num_subjects) % len(classes)
    told_N = truth_N.copy()
    told_N[list(wrong)] = (truth_N[list(wrong)] + 1) % len(classes)
    p_NK = np.full((num_subjects, len(classes)), 0.1)
    p_NK[np.arange(num_subjects), told_N] = 1 - 0.1 * (len(classes) - 1)
    return [classes[k] for k in truth_N], p_NK, classes, [str(n) for n in range(num_subjects)]


@pytest.mark.parametrize("classes", [["CN", "AD"], CLASSES])
def test_all_right_in_few_subjects_is_no_certainty(classes):
    found, more = (score(*all_right(n * len(classes), classes), 200, seed=0) for n in (7, 70))
    assert all(found[name] == 1 for name in ("balanced_accuracy", "macro_auc", "macro_f1"))
    # Clopper-Pearson of 7 of 7: were a recall 0.59, all would be right in 2.5 % of studies
    one = 0.025 ** (1 / 7)
    for name in classes:
        assert found["ci95"]["recall"][name] == pytest.approx([one, 1])
        assert found["ci95"]["specificity"][name] == pytest.approx([0.025 ** (1 / (7 * (len(classes) - 1))), 1])
    # independent recalls: the distance of their mean is that of one over the root of their number
    assert found["ci95"]["balanced_accuracy"] == pytest.approx([1 - (1 - one) / math.sqrt(len(classes)), 1])
    for name in ("balanced_accuracy", "macro_auc", "macro_f1"):
        low, high = found["ci95"][name]
        assert 0.5 < low < 0.9 and high == 1
        assert low < more["ci95"][name][0] < 1 and more["ci95"][name][1] == 1


def test_a_class_that_is_always_right_leaves_room_in_the_mean():
    truth, p_NK, classes, subjects = all_right(40, ["CN", "AD"], wrong=range(0, 20, 2))  # CN: 10 of 20 right
    found = score(truth, p_NK, classes, subjects, 2000, seed=0)
    assert found["recall"] == {"CN": 0.5, "AD": 1}
    (cn_low, cn_high), (ad_low, ad_high) = found["ci95"]["recall"].values()
    assert (ad_low, ad_high) == (pytest.approx(0.025 ** (1 / 20)), 1) and cn_low < 0.35 and cn_high > 0.65
    low, high = found["ci95"]["balanced_accuracy"]
    assert low == pytest.approx(0.75 - math.hypot(0.5 - cn_low, 1 - ad_low) / 2)
    assert high == pytest.approx(0.75 + (cn_high - 0.5) / 2)


def test_always_wrong_is_the_mirror_of_always_right():
    truth, p_NK, classes, subjects = all_right(14, ["CN", "AD"])
    right, wrong = (score(truth, p, classes, subjects, 200, seed=0)["ci95"] for p in (p_NK, p_NK[:, ::-1]))
    for name in ("balanced_accuracy", "macro_auc"):
        assert wrong[name] == pytest.approx([1 - right[name][1], 1 - right[name][0]])
    assert wrong["macro_f1"][0] == 0 < wrong["macro_f1"][1] < 0.5


def test_two_that_are_both_always_right_may_still_differ():
    truth, a_NK, classes, subjects = all_right(14, ["CN", "AD"])
    b_NK = np.where(a_NK > 0.5, 0.8, 0.2)
    for name, found in compare(truth, a_NK, b_NK, classes, subjects, 200, 0).items():
        low, high = score(truth, a_NK, classes, subjects, 200, 0)["ci95"][name]
        assert found["difference"] == 0 and found["p_value"] == 1
        assert found["ci95"] == pytest.approx([low - high, high - low])


def test_the_interval_of_an_auc_is_symmetric_in_its_logit():
    truth, p_NK, classes, subjects = made_up(num_classes=2, seed=3)
    found = score(truth, p_NK, classes, subjects, 500, seed=0)
    truth_N = np.array([classes.index(name) for name in truth])
    auc_D = weighted_scores(truth_N, p_NK, draw_weights(truth_N, subjects, 500, seed=0))["macro_auc"]
    auc, (low, high) = found["macro_auc"], found["ci95"]["macro_auc"]
    odds, low_odds, high_odds = (math.log(value / (1 - value)) for value in (auc, low, high))
    assert odds - low_odds == pytest.approx(high_odds - odds)
    assert high_odds - odds == pytest.approx(1.96 * auc_D.std() / (auc * (1 - auc)), rel=1e-4)


def test_draws_that_lose_a_class_are_left_out_and_counted():
    # The AD scans are of a and b, who began as CN: a draw of three CN subjects may hold neither.
    truth, subjects = ["CN", "AD", "CN", "AD", "CN"], ["a", "a", "b", "b", "c"]
    p_NK = [[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.7, 0.3], [0.3, 0.7]]
    found = score(truth, p_NK, ["CN", "AD"], subjects, 5000, seed=0)
    assert found["ci95"]["draws"] / 5000 == pytest.approx(26 / 27, abs=0.01)
    json.dumps(found, allow_nan=False)


def test_equal_probabilities_are_chance():
    found = score(TRUTH, np.full((6, 3), 1 / 3), CLASSES, SUBJECTS, 200, seed=0)
    assert found["macro_auc"] == 0.5 and found["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["ci95"]["macro_auc"] == [0.5, 0.5]
    assert found["ece"] == pytest.approx(0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.2])
def test_what_is_no_probability_is_named_by_its_row(value):
    p_NK = P.copy()
    p_NK[3, 1] = value
    with pytest.raises(ValueError, match=r"row 3: .* no probabilities"):
        score(TRUTH, p_NK, CLASSES, SUBJECTS, 100, seed=0)
    with pytest.raises(ValueError, match="row 3"):
        compare(TRUTH, P, p_NK, CLASSES, SUBJECTS, 100, seed=0)


def test_other_wrong_input_is_named():
    with pytest.raises(ValueError, match="row 2: .* sum to 0.7"):
        calibration(TRUTH, np.vstack([P[:2], [[0.3, 0.1, 0.3]], P[3:]]), CLASSES)
    with pytest.raises(ValueError, match="no scan"):
        score([], np.zeros((0, 3)), CLASSES, [], 100, seed=0)
    with pytest.raises(ValueError, match="row 1: the diagnosis 'SCD'"):
        score(["CN", "SCD"], P[:2], CLASSES, ["a", "b"], 100, seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        score(TRUTH, P[:5], CLASSES, SUBJECTS, 100, seed=0)


def test_rows_of_half_precision_are_scored():
    assert score(TRUTH, P.astype(np.float16), CLASSES, SUBJECTS, 100, 0)["brier"] == pytest.approx(2.68 / 6, abs=1e-3)


def test_same_seed_same_interval():
    args = made_up(seed=3)
    first, again, other = (score(*args, 1000, seed)["ci95"] for seed in (0, 0, 1))
    assert first == again and first != other


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    draw = np.random.default_rng(0)
    p_N = draw.random(2000)
    truth = ["AD" if draw.random() < p else "CN" for p in p_N]
    found = score(truth, np.c_[1 - p_N, p_N], ["CN", "AD"], [str(n) for n in range(2000)], 10, 0)
    curve = found["roc"]["AD"]
    assert len(curve["fpr"]) == 200 and (curve["fpr"][0], curve["tpr"][0]) == (0, 0)
    assert (curve["fpr"][-1], curve["tpr"][-1]) == (1, 1)
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(found["macro_auc"], abs=0.005)


def test_a_comparison_redraws_both_sides_with_the_same_subjects():
    truth, a_NK, classes, subjects = made_up(seed=5)
    b_NK = made_up(seed=6, signal=0.5)[1]
    found = compare(truth, a_NK, b_NK, classes, subjects, 60, seed=7)
    truth_N = np.array([classes.index(name) for name in truth])
    differences = []
    for weight_N in draw_weights(truth_N, subjects, 60, seed=7):
        rows = np.repeat(np.arange(len(truth)), weight_N.astype(int))
        differences.append(
            roc_auc_score(truth_N[rows], a_NK[rows], multi_class="ovr")
            - roc_auc_score(truth_N[rows], b_NK[rows], multi_class="ovr")
        )
    assert found["macro_auc"]["ci95"] == pytest.approx(np.percentile(differences, [2.5, 97.5]).tolist())
    rarer = min(sum(d <= 0 for d in differences), sum(d >= 0 for d in differences))
    assert found["macro_auc"]["p_value"] == pytest.approx(min(1, 2 * (1 + rarer) / 61))
    a, b = (score(truth, p_NK, classes, subjects, 10, 0) for p_NK in (a_NK, b_NK))
    for name in ("balanced_accuracy", "macro_auc"):
        assert found[name]["difference"] == pytest.approx(a[name] - b[name])


def test_the_same_predictions_do_not_differ():
    truth, p_NK, classes, subjects = made_up()
    for found in compare(truth, p_NK, p_NK, classes, subjects, 200, 0).values():
        assert found == {"difference": 0, "ci95": [0, 0], "p_value": 1}


def test_one_in_twenty_comparisons_of_equals_is_taken_for_a_difference():
    taken = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        truth = ["CN", "AD"] * 40
        a_N, b_N = draw.random(80), draw.random(80)
        found = compare(
            truth, np.c_[1 - a_N, a_N], np.c_[1 - b_N, b_N], ["CN", "AD"], [str(n) for n in range(80)], 400, seed
        )
        taken += found["macro_auc"]["p_value"] < 0.05
    assert 2 <= taken <= 22


def test_age_alone_is_no_score_between_matched_pairs():
    draw = np.random.default_rng(0)
    age_N = np.r_[draw.uniform(60, 80, 150), draw.uniform(70, 90, 150)]
    truth, subjects = ["CN"] * 150 + ["AD"] * 150, [str(n) for n in range(300)]
    p_N = (age_N - 55) / 40
    p_NK = np.c_[1 - p_N, p_N]
    assert score(truth, p_NK, ["CN", "AD"], subjects, 10, 0)["macro_auc"] > 0.8
    found = age_matched(truth, p_NK, ["CN", "AD"], age_N.tolist(), subjects, 1000, 0)
    assert found["pairs"] > 50 and found["macro_auc"] == pytest.approx(0.5, abs=0.08)
    low, high = found["ci95"]["macro_auc"]
    assert low < found["macro_auc"] < high


def test_pairs_keep_to_the_caliper_and_use_a_subject_once():
    classes, ages = ["CN", "AD"], [70, 71, 72, 90, 70, None, 71.5]
    truth = ["CN", "CN", "AD", "AD", "AD", "CN", "CN"]
    subjects = ["a", "b", "c", "d", "c", "e", "a"]
    p_NK = [[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.5, 0.5]]
    # c (72 at its first scan) goes with b (71); a is left over, d has nobody of its age, e has no age.
    found = age_matched(truth, p_NK, classes, ages, subjects, 100, 0)
    assert found == {"pairs": 1, "caliper_years": 2.0, "macro_auc": 0.0, "ci95": {"macro_auc": None}}
    assert age_matched(truth, p_NK, classes, ages, subjects, 100, 0, caliper_years=0.5) is None


def test_as_many_pairs_as_can_be_are_made():
    # Nearest first would pair 71 with 71.5 and leave 70 and 73 alone.
    truth, ages = ["CN", "CN", "AD", "AD"], [70, 71.5, 71, 73]
    p_NK = [[0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.1, 0.9]]
    found = age_matched(truth, p_NK, ["CN", "AD"], ages, list("abcd"), 100, 0)
    assert found["pairs"] == 2 and found["macro_auc"] == pytest.approx(3 / 4)


def test_matching_of_three_classes_is_of_the_first_and_the_last():
    found = age_matched(TRUTH, P, CLASSES, [70.0] * 6, SUBJECTS, 100, 0)
    # AD of AD + CN: CN 1/7, 3/5; AD 7/8, 4/9
    assert found["pairs"] == 2 and found["macro_auc"] == pytest.approx(3 / 4)


# Odd cohorts for every metric: those above test `score`; here is what they leave open.


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.2])
def test_every_entry_refuses_what_is_no_probability(value):
    p_NK = P.copy()
    p_NK[3, 1] = value
    for call in (
        lambda: score_once(TRUTH, p_NK, CLASSES),
        lambda: calibration(TRUTH, p_NK, CLASSES),
        lambda: compare(TRUTH, p_NK, P, CLASSES, SUBJECTS, 100, 0),
        lambda: age_matched(TRUTH, p_NK, CLASSES, [70.0] * 6, SUBJECTS, 100, 0),
    ):
        with pytest.raises(ValueError, match=r"row 3: .* no probabilities"):
            call()


def test_a_class_that_does_not_occur_by_hand_for_the_other_metrics():
    found = score(TRUTH[:4], P[:4], CLASSES, SUBJECTS[:4], 200, seed=0)  # CN MCI MCI MCI told, no AD
    # F1: CN 2*1/(2+1), MCI 2*2/(2+3); AD, which nobody has and nobody is told, is left out
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["specificity"] == {"CN": 1.0, "MCI": 0.5, "AD": 1.0}
    assert found["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert found["brier"] == pytest.approx((0.26 + 0.98 + 0.54 + 0.14) / 4)
    # Bins by the top probability: (0.3, 0.4] right 1 of 1, (0.4, 0.5] 0 of 1, (0.5, 0.6] 1 of 1, (0.6, 0.7] 1 of 1
    assert found["ece"] == pytest.approx((0.6 + 0.5 + 0.4 + 0.3) / 4)
    assert found["ci95"]["recall"]["AD"] is None and found["ci95"]["specificity"]["AD"][1] == 1
    assert found["ci95"]["macro_auc"] is not None and found["ci95"]["macro_f1"] is not None
    once = score_once(TRUTH[:4], P[:4], CLASSES)
    assert once == pytest.approx({name: found[name] for name in SCORED})
    differences = compare(TRUTH[:4], P[:4], P[[1, 0, 2, 3]], CLASSES, SUBJECTS[:4], 200, 0)
    swapped = score_once(TRUTH[:4], P[[1, 0, 2, 3]], CLASSES)
    for name, entry in differences.items():
        assert entry["difference"] == pytest.approx(found[name] - swapped[name]) and entry["ci95"] is not None


def test_scans_told_as_a_class_that_does_not_occur_are_wrong():
    truth, subjects = ["CN", "CN", "AD", "AD"], list("abcd")
    p_NK = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.1, 0.6, 0.3]]  # two told as MCI, which nobody has
    found = score(truth, p_NK, CLASSES, subjects, 200, seed=0)
    assert found["recall"] == {"CN": 0.5, "MCI": None, "AD": 0.5} and found["specificity"]["MCI"] == 0.5
    assert found["balanced_accuracy"] == 0.5 and found["macro_f1"] == pytest.approx(2 / 3)
    low, high = found["ci95"]["balanced_accuracy"]
    assert 0 <= low < 0.5 < high <= 1


def test_matched_ages_without_one_of_the_two_classes_have_no_pair():
    assert age_matched(TRUTH[:4], P[:4], CLASSES, [70.0] * 4, SUBJECTS[:4], 100, 0) is None  # no AD
    assert age_matched(TRUTH[2:], P[2:], CLASSES, [70.0] * 4, SUBJECTS[2:], 100, 0) is None  # no CN
    assert age_matched(TRUTH, P, CLASSES, [None] * 6, SUBJECTS, 100, 0) is None


def test_one_subject_has_no_interval_anywhere():
    truth, p_NK, classes = ["CN", "AD"], [[0.9, 0.1], [0.4, 0.6]], ["CN", "AD"]
    for entry in compare(truth, p_NK, p_NK[::-1], classes, ["a", "a"], 100, 0).values():
        assert entry["difference"] == 1 and entry["ci95"] is None and entry["p_value"] is None
    # matched by age, a subject counts once, and is not compared with itself
    assert age_matched(truth, p_NK, classes, [70, 71], ["a", "a"], 100, 0) is None
    assert score(truth, p_NK, classes, ["a", "a"], 100, 0)["ece_if_calibrated"] is not None
    assert calibration(["CN"], [[0.9, 0.1]], classes)["ece"] == pytest.approx(0.1)
    assert math.isnan(score_once(["CN"], [[0.9, 0.1]], classes)["macro_auc"])


def test_ties_count_half_and_the_first_of_equals_is_told():
    classes, truth = ["CN", "AD"], ["CN", "CN", "AD", "AD"]
    p_NK = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]
    found = score(truth, p_NK, classes, list("abcd"), 200, 0)
    assert found["macro_auc"] == pytest.approx((2 * 0.5 + 2 * 1) / 4)
    assert found["confusion"] == [[2, 0], [1, 1]] and found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["roc"]["AD"] == {"fpr": [0, 0, 1], "tpr": [0, 0.5, 1]}
    # Top probabilities 0.5 three times, right twice, and 0.8, right
    assert found["ece"] == pytest.approx((abs(3 * 0.5 - 2) + abs(0.8 - 1)) / 4)
    matched = age_matched(truth, p_NK, classes, [70, 71, 70, 71], list("abcd"), 100, 0)
    assert matched["pairs"] == 2 and matched["macro_auc"] == pytest.approx(3 / 4)
    differences = compare(truth, p_NK, [[0.5, 0.5]] * 4, classes, list("abcd"), 200, 0)
    assert differences["macro_auc"]["difference"] == pytest.approx(1 / 4)


def test_all_right_between_matched_pairs_is_no_certainty():
    p_NK = [[0.9, 0.1]] * 5 + [[0.2, 0.8]] * 5
    truth, ages = ["CN"] * 5 + ["AD"] * 5, [70.0, 72, 74, 76, 78] * 2
    found = age_matched(truth, p_NK, ["CN", "AD"], ages, list("abcdefghij"), 100, 0)
    assert found["pairs"] == 5 and found["macro_auc"] == 1
    low, high = found["ci95"]["macro_auc"]
    assert 0.5 < low < 0.75 and high == 1
