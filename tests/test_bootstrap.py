"""Draws of subjects: whole, within their class, and the same for the same seed."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from medblip.bootstrap import (
    draw_weights,
    exact_interval,
    interval,
    perfect_auc_limit,
    share_interval,
    two_sided_p,
    widened,
)


def test_scans_of_a_subject_are_drawn_together_and_classes_keep_their_subjects():
    truth_N = np.array([0, 0, 1, 1, 1, 0, 2])
    subjects = ["a", "b", "c", "d", "c", "b", "e"]
    weight_DN = draw_weights(truth_N, subjects, 500, seed=3)
    np.testing.assert_array_equal(weight_DN[:, 1], weight_DN[:, 5])
    np.testing.assert_array_equal(weight_DN[:, 2], weight_DN[:, 4])
    np.testing.assert_array_equal(weight_DN[:, 0] + weight_DN[:, 1], 2)  # two subjects of class 0 in every draw
    np.testing.assert_array_equal(weight_DN[:, 2] + weight_DN[:, 3], 2)
    np.testing.assert_array_equal(weight_DN[:, 6], 1)
    assert abs(weight_DN.mean(axis=0) - 1).max() < 0.15


def test_a_subject_that_changes_class_is_drawn_in_the_class_of_its_first_scan():
    weight_DN = draw_weights(np.array([0, 1, 0, 1]), ["a", "a", "b", "c"], 500, seed=0)
    np.testing.assert_array_equal(weight_DN[:, 0], weight_DN[:, 1])
    np.testing.assert_array_equal(weight_DN[:, 0] + weight_DN[:, 2], 2)
    np.testing.assert_array_equal(weight_DN[:, 3], 1)


def test_same_seed_same_draws():
    args = (np.array([0, 0, 0, 1, 1, 1]), list("abcdef"), 50)
    np.testing.assert_array_equal(draw_weights(*args, seed=1), draw_weights(*args, seed=1))
    assert (draw_weights(*args, seed=1) != draw_weights(*args, seed=2)).any()


def test_an_interval_leaves_out_draws_without_a_value():
    assert interval(np.array([*range(101), math.nan])) == [2.5, 97.5]
    assert interval(np.array([math.nan])) is None


def test_p_counts_the_draws_beyond_zero_on_the_rarer_side():
    assert two_sided_p(np.array([-1.0] + 98 * [1.0])) == pytest.approx(2 * 2 / 100)
    assert two_sided_p(np.zeros(99)) == 1
    assert two_sided_p(np.ones(99)) == pytest.approx(2 / 100)  # never 0
    assert two_sided_p(np.array([math.nan])) is None


@pytest.mark.parametrize("right", [0, 1, 9, 14])
def test_exact_limits_are_those_of_a_binomial_test(right):
    expected = binomtest(right, 14).proportion_ci(method="exact")
    assert exact_interval(right / 14, 14) == pytest.approx([expected.low, expected.high])


def test_a_share_has_the_draws_interval_away_from_the_bounds_and_exact_limits_at_them():
    subjects = [str(n) for n in range(40)]
    weight_DN = draw_weights(np.zeros(40, dtype=int), subjects, 1000, seed=0)
    for right in (20, 39, 40, 0):
        value_N = (np.arange(40) < right).astype(float)
        drawn, found = interval(weight_DN @ value_N / 40), share_interval(value_N, subjects, weight_DN)
        assert found == (drawn if right == 20 else pytest.approx(exact_interval(right / 40, 40)))
    # Two scans each and one of them right: no draw differs, and forty subjects are not certain
    twice = share_interval(np.tile([0.0, 1.0], 40), np.repeat(subjects, 2), np.repeat(weight_DN, 2, axis=1))
    assert twice == pytest.approx(exact_interval(0.5, 40))


@pytest.mark.parametrize("sizes", [(7, 7), (9, 5), (90, 60)])
def test_a_perfect_auc_is_1_96_standard_errors_above_its_limit(sizes):
    n, m = sizes
    auc, rest = perfect_auc_limit(n, m), (n + m) / 2 - 1  # subjects a class in Newcombe's method 5
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)  # Hanley & McNeil 1982
    variance = (auc * (1 - auc) + rest * (q1 - auc**2) + rest * (q2 - auc**2)) / (n * m)
    assert (1 - auc) / math.sqrt(variance) == pytest.approx(1.959964)


def test_what_does_not_vary_is_added_in_quadrature_and_only_on_its_side():
    assert widened(0.8, [0.5, 0.9], 0.4, 0.0) == pytest.approx([0.3, 0.9])
    assert widened(0.5, [0.5, 0.5], 0.0, 0.2) == pytest.approx([0.5, 0.7])
    assert widened(0.5, None, 0.1, 0.1) is None
