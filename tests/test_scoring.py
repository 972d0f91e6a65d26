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


def test_the_rule_under_which_the_truth_is_most_probable_wins_and_ties_go_to_the_default():
    # Per token the options are equal but for what the truth adds; whole, the longest always loses.
    truth_N = np.array([0, 1, 2, 1, 1])
    logp_NO = np.array([[-1.0 * n for n in OPTIONS.num_tokens]] * 5)
    logp_NO[np.arange(5), truth_N] += 0.5
    rule, scores = choose_rule(truth_N, logp_NO, OPTIONS)
    assert rule == RULES["per-token"]
    gain_3 = np.exp(0.5 / np.array(OPTIONS.num_tokens))  # each option counts once, although the second occurs thrice
    assert scores["per-token"] == pytest.approx(np.log(gain_3 / (gain_3 + 2)).mean())
    ruled_out = np.full((5, 3), -np.inf)
    ruled_out[np.arange(5), truth_N] = 0
    rule, scores = choose_rule(truth_N, ruled_out, OPTIONS)
    assert rule == DEFAULT_RULE and set(scores.values()) == {0.0}
    rule, scores = choose_rule((truth_N + 1) % 3, ruled_out, OPTIONS)
    assert rule == DEFAULT_RULE and np.isfinite(list(scores.values())).all()


def test_a_rule_is_not_chosen_for_one_more_right_answer_that_it_is_unsure_of():
    """Whole likelihoods tell twenty scans apart well; per token they say next to nothing, but one more is right."""
    truth_N = np.array([0, 2] * 10)
    logp_NO = np.full((20, 3), -30.0)
    logp_NO[:, 0], logp_NO[:, 2] = -1.2, -1.8
    logp_NO[np.arange(20), truth_N] += 1.1
    logp_NO[1, 2] -= 0.6  # this one is right by token, since the answer is longer, and wrong as a whole
    whole, by_token = (
        probabilities(logp_NO, OPTIONS, RULES[name]).argmax(1) == truth_N for name in ("sum", "per-token")
    )
    assert whole.sum() < by_token.sum()
    _, scores = choose_rule(truth_N, logp_NO, OPTIONS)
    assert scores["sum"] > scores["per-token"]


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
