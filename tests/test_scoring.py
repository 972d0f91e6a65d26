"""How options are compared, and that the rule is chosen and balanced by right answers alone."""

import numpy as np
import pytest

from medblip.scoring import (
    DEFAULT_RULE,
    LEAST_PROBABILITY,
    RULES,
    Options,
    balancing_offsets,
    check_likelihoods,
    choose_rule,
    probabilities,
)

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
        "sum-balanced": [-1, -4, -7],
    }
    assert expected.keys() == RULES.keys()
    for name, scores in expected.items():
        (p_O,) = probabilities([logp_O], OPTIONS, RULES[name], np.array([1, 0, -1]) if "balanced" in name else 0.0)
        np.testing.assert_allclose(p_O, np.exp(scores) / np.exp(scores).sum())


def test_the_rule_under_which_the_truth_is_most_probable_wins_and_ties_go_to_the_default():
    # Per token the options are equal but for what the truth adds; whole, the longest loses, by more or less.
    truth_N = np.array([0, 1, 2, 1, 1])
    logp_NO = np.array([[-size * n for n in OPTIONS.num_tokens] for size in (1.0, 4.0, 2.0, 0.5, 3.0)])
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


def made_up_asks(draw, num_asks: int, lean_O=(0.0, 0.0, 0.0)):
    """Right options, and log-likelihoods of a model that is right about their probabilities but for a lean."""
    evidence_NO = draw.normal(size=(num_asks, 3))
    p_NO = np.exp(evidence_NO) / np.exp(evidence_NO).sum(1, keepdims=True)
    truth_N = np.array([draw.choice(3, p=p_O) for p_O in p_NO])
    return truth_N, np.log(p_NO) - 3 + lean_O


def test_balanced_options_are_equally_probable_however_often_each_is_right():
    truth_N, logp_NO = made_up_asks(np.random.default_rng(0), 60, lean_O=(2.0, -1.0, 0.5))
    offset_O = balancing_offsets(truth_N, logp_NO)
    p_NO = probabilities(logp_NO, OPTIONS, RULES["sum-balanced"], offset_O)
    mean_OO = np.array([p_NO[truth_N == option].mean(0) for option in range(3)])
    np.testing.assert_allclose(mean_OO.mean(0), 1 / 3, atol=1e-7)
    assert offset_O.sum() == pytest.approx(0) and np.abs(offset_O).max() > 1
    rows = np.concatenate([np.arange(60), np.repeat(np.flatnonzero(truth_N == 1), 3)])
    np.testing.assert_allclose(balancing_offsets(truth_N[rows], logp_NO[rows]), offset_O, atol=1e-6)


def test_offsets_find_the_lean_of_a_model_and_nothing_where_there_is_none():
    """A model that training taught to weigh one option by 3/2 has a lean of log(3/2)."""
    truth_N, logp_NO = made_up_asks(np.random.default_rng(1), 20_000)
    lean_O = np.log([2 / 3, 1, 1]) - np.log([2 / 3, 1, 1]).mean()
    straight_O, leaning_O = balancing_offsets(truth_N, logp_NO), balancing_offsets(truth_N, logp_NO + lean_O)
    np.testing.assert_allclose(straight_O, 0, atol=0.05)
    np.testing.assert_allclose(leaning_O, straight_O - lean_O, atol=1e-6)


def test_offsets_are_finite_whatever_the_options_are():
    only_0_and_2 = balancing_offsets(np.array([0, 2, 0]), np.array([[-1.0, -2, -3], [-2, -1, -1.5], [-1, -9, -4]]))
    assert only_0_and_2[1] == 0 and only_0_and_2[0] == pytest.approx(-only_0_and_2[2]) != 0
    ruled_out = np.array([[0, -np.inf, -np.inf], [-np.inf, 0, -np.inf], [0, -np.inf, -np.inf]])
    assert np.isfinite(balancing_offsets(np.array([0, 1, 2]), ruled_out)).all()
    assert (balancing_offsets(np.array([1, 1]), np.array([[-1.0, -2], [-3, -1]])) == 0).all()


def test_the_balanced_rule_is_judged_on_each_ask_with_the_offsets_of_the_others():
    truth_N, logp_NO = made_up_asks(np.random.default_rng(2), 30, lean_O=(4.0, 0.0, -4.0))
    p_N = []
    for row in range(30):
        others = [other for other in range(30) if other != row]
        offset_O = balancing_offsets(truth_N[others], logp_NO[others])
        p_N.append(probabilities(logp_NO[[row]], OPTIONS, RULES["sum-balanced"], offset_O)[0, truth_N[row]])
    log_N = np.log(np.maximum(p_N, LEAST_PROBABILITY))
    rule, scores = choose_rule(truth_N, logp_NO, OPTIONS)
    assert rule == RULES["sum-balanced"]
    assert scores["sum-balanced"] == pytest.approx(np.mean([log_N[truth_N == option].mean() for option in range(3)]))


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
