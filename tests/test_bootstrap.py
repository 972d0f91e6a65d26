"""Draws of subjects: whole, within their class, and the same for the same seed."""

import math

import numpy as np
import pytest

from medblip.bootstrap import draw_weights, interval, two_sided_p


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
