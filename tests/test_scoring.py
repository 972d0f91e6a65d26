"""How options are compared, and that the rule is chosen by right answers alone."""

import numpy as np
import pytest

from medblip.scoring import DEFAULT_RULE, RULES, Options, check_likelihoods, choose_rule, probabilities

OPTIONS = Options(("no", "mild trouble", "yes!"), num_tokens=(2, 4, 3), null_logp=(-1.0, -8.0, -3.0))


def test_each_rule_is_the_arithmetic_that_its_name_says():
    logp_O = [-2.0, -4.0, -6.0]
    expected = {
        "sum": [-2, -4, -6],
        "sum-minus-null": [-1, 4, -3],
        "per-token": [-1, -1, -2],
        "per-token-minus-null": [-0.5, 1, -1],
        "per-character": [-1, -1 / 3, -1.5],
        "per-character-minus-null": [-0.5, 1 / 3, -0.75],
    }
    assert expected.keys() == RULES.keys()
    for name, scores in expected.items():
        (p_O,) = probabilities([logp_O], OPTIONS, RULES[name])
        np.testing.assert_allclose(p_O, np.exp(scores) / np.exp(scores).sum())


def test_the_rule_with_the_most_balanced_accuracy_wins_and_ties_go_to_the_default():
    # Per token the options are equal but for what the truth adds; whole, the longest always loses.
    truth_N = np.array([0, 1, 2, 1, 1])
    logp_NO = np.array([[-1.0 * n for n in OPTIONS.num_tokens]] * 5)
    logp_NO[np.arange(5), truth_N] += 0.5
    rule, scores = choose_rule(truth_N, logp_NO, OPTIONS)
    assert rule == RULES["per-token"] and scores["per-token"] == 1 > scores["sum"]
    everything_right = np.full((5, 3), -500.0)
    everything_right[np.arange(5), truth_N] = 0
    rule, scores = choose_rule(truth_N, everything_right, OPTIONS)
    assert rule == DEFAULT_RULE and set(scores.values()) == {1.0}


def test_a_likelihood_that_is_not_a_number_gives_no_probability():
    p_NO = probabilities([[-1.0, float("nan"), -1.0], [-2.0, -1.0, -3.0]], OPTIONS, DEFAULT_RULE)
    assert np.isnan(p_NO[0]).all() and p_NO[1].sum() == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_likelihood_that_is_not_finite_is_refused_by_the_key_of_its_scan(bad):
    names = ["ADNI-1a, arm image", "ADNI-2b, arm image", "ADNI-1a, arm both"]
    logp_NO = [[-1.0, -2.0, -1.0], [-2.0, bad, -3.0], [-1.0, -2.0, -1.0]]
    with pytest.raises(ValueError, match=r"1 of 3 answers .*ADNI-2b, arm image: \[-2.0, (nan|inf), -3.0\]") as raised:
        check_likelihoods(logp_NO, OPTIONS, names)
    assert "ADNI-1a" not in str(raised.value)
    check_likelihoods(logp_NO[::2], OPTIONS, names[::2])
    check_likelihoods([[-1.0, -float("inf"), -1.0]], OPTIONS, names[:1])  # an answer that cannot be: probability 0
