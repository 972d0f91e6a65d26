"""Scores against values worked out by hand, and intervals that move whole subjects."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medblip.metrics import bootstrap, score

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


def test_three_classes_give_the_values_worked_out_by_hand():
    found = score(TRUTH, P, CLASSES, SUBJECTS, 1000, seed=0)
    assert found["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert found["recall"] == {"CN": 0.5, "MCI": 1.0, "AD": 0.5}
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)
    # CN: 0.6 beats all four, 0.2 beats two. MCI: 0.4 beats three, 0.7 all. AD: both beat all four.
    assert found["macro_auc"] == pytest.approx((6 / 8 + 7 / 8 + 8 / 8) / 3)
    # F1: CN 2*1/(2+2), MCI 2*2/(2+3), AD 2*1/(2+1)
    assert found["macro_f1"] == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)


def test_two_classes_have_the_plain_auc():
    found = score(
        ["CN", "CN", "AD", "AD"], [[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.2, 0.8]], ["CN", "AD"], list("abcd"), 1000, 0
    )
    assert found["macro_auc"] == pytest.approx(3 / 4)
    assert found["balanced_accuracy"] == pytest.approx(0.5 * (1 / 2 + 1 / 2))
    assert found["confusion"] == [[1, 1], [1, 1]]


def test_19_of_20_intervals_hold_the_true_auc_of_guesses():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        truth_N, p_NK = np.repeat(draw.permutation(60) % 3, 2), np.repeat(draw.dirichlet([1, 1, 1], size=60), 2, axis=0)
        subjects = [f"s{i // 2}" for i in range(120)]
        low, high = np.percentile(bootstrap(truth_N, p_NK, subjects, 1000, seed=0)[1], [2.5, 97.5])
        held += low <= 0.5 <= high
    assert 180 <= held <= 198


def test_draws_are_what_scikit_learn_says_of_the_redrawn_scans():
    draw = np.random.default_rng(1)
    truth_N = np.arange(30) % 3
    p_NK = draw.dirichlet([1, 1, 1], size=30).round(1) + 1e-9  # rounded: ties must count half
    p_NK /= p_NK.sum(axis=1, keepdims=True)
    subjects = [f"s{i // 2:02}" for i in range(30)]
    accuracy_D, auc_D = bootstrap(truth_N, p_NK, subjects, 20, seed=5)
    times_DS = np.random.default_rng(5).multinomial(15, np.full(15, 1 / 15), size=20)
    assert len(accuracy_D) == 20
    for times_S, accuracy, auc in zip(times_DS, accuracy_D, auc_D, strict=True):
        rows = np.repeat(np.arange(30), np.repeat(times_S, 2))
        assert accuracy == pytest.approx(balanced_accuracy_score(truth_N[rows], p_NK[rows].argmax(1)))
        assert auc == pytest.approx(roc_auc_score(truth_N[rows], p_NK[rows], multi_class="ovr"))


def test_two_scans_of_one_subject_move_together():
    once = bootstrap(np.arange(6) // 2, P, SUBJECTS, 1000, seed=0)
    twice = bootstrap(np.tile(np.arange(6) // 2, 2), np.tile(P, (2, 1)), SUBJECTS * 2, 1000, seed=0)
    np.testing.assert_allclose(once, twice)
    apart = bootstrap(np.tile(np.arange(6) // 2, 2), np.tile(P, (2, 1)), list("abcdefghijkl"), 1000, seed=0)
    assert apart[0].std() < 0.9 * once[0].std()  # a copy of every scan under a new name would look like evidence


def test_draws_that_lose_a_class_are_left_out_and_counted():
    found = score(TRUTH[::2], P[::2], CLASSES, list("abc"), 5000, seed=0)
    assert found["ci95"]["draws"] / 5000 == pytest.approx(6 / 27, abs=0.02)  # 3! of 3^3 draws keep all three subjects


def test_same_seed_same_interval():
    first, again, other = (score(TRUTH, P, CLASSES, SUBJECTS, 1000, seed)["ci95"] for seed in (0, 0, 1))
    assert first == again and first["draws"] != other["draws"]
