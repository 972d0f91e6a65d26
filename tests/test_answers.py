"""Scores of answers against values worked out by hand or by plain loops, and answers that mean nothing."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from medblip.answers import score_answers
from medblip.text import QUESTIONS, Question

OPEN = Question(("Describe the scan.",), "open")
TRUTHS = ["large ventricles and a thin cortex", "a normal brain", "the left hippocampus is small"]
ANSWERS = ["Large ventricles and a thick cortex.", "a normal brain", "no idea"]


def test_closed_answers_match_an_option_or_count_as_wrong():
    truths = ["yes", "no", "no", "no"]
    found = score_answers(QUESTIONS["demented"], truths, ["Yes. ", "yes", "  no", "perhaps"], list("abcd"), 500, 0)
    assert (found["n"], found["accuracy"], found["unparsable"], found["majority_accuracy"]) == (4, 0.5, 1, 0.75)
    low, high = found["ci95"]["accuracy"]
    assert 0 <= low < 0.5 < high <= 1


def test_diagnoses_are_read_with_their_own_words():
    options = QUESTIONS["diagnosis"].options
    found = score_answers(QUESTIONS["diagnosis"], options, ["not demented", "MCI", "Dementia."], list("abc"), 100, 0)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["unparsable"] == 1


def test_numbers_are_off_by_years_and_no_number_is_wrong():
    answers = ["72", "about 80.5 years", "old", "-3"]
    found = score_answers(QUESTIONS["age"], ["70", "75", "60", "1"], answers, list("abcd"), 500, 0)
    assert found["mae"] == pytest.approx((2 + 5.5 + 4) / 3)
    assert (found["within_tolerance"], found["tolerance"], found["unparsable"]) == (0.5, 5, 1)
    assert found["ci95"]["mae"][0] < found["mae"] < found["ci95"]["mae"][1]


def test_exactly_the_tolerance_is_within():
    assert score_answers(QUESTIONS["age"], ["70"], ["75"], ["a"], 100, 0)["within_tolerance"] == 1


def test_no_number_at_all_has_no_mean_error():
    found = score_answers(QUESTIONS["age"], ["70", "71"], ["old", ""], ["a", "b"], 100, 0)
    assert found["mae"] is None and found["ci95"]["mae"] is None and found["within_tolerance"] == 0
    json.dumps(found, allow_nan=False)


def plain_bleu(truth: str, answer: str, max_order: int) -> float:
    """Papineni et al. 2002 of one answer that has an n-gram right at each order."""
    true, told = truth.split(), answer.split()
    logs = []
    for n in range(1, max_order + 1):
        true_n = Counter(tuple(true[i : i + n]) for i in range(len(true) - n + 1))
        told_n = Counter(tuple(told[i : i + n]) for i in range(len(told) - n + 1))
        logs.append(math.log(sum(min(told_n[g], true_n[g]) for g in told_n) / sum(told_n.values())))
    return min(1.0, math.exp(1 - len(true) / len(told))) * math.exp(sum(logs) / max_order)


def plain_rouge_l(truth: str, answer: str) -> float:
    true, told = truth.split(), answer.split()
    longest = np.zeros((len(true) + 1, len(told) + 1), dtype=int)
    for i, a in enumerate(true):
        for j, b in enumerate(told):
            longest[i + 1, j + 1] = longest[i, j] + 1 if a == b else max(longest[i, j + 1], longest[i + 1, j])
    return 2 * longest[-1, -1] / (len(true) + len(told))


@pytest.mark.parametrize(
    "truth, answer",
    [
        ("large ventricles and a thin cortex", "large ventricles and a thick cortex"),
        ("the cortex is thin and the ventricles are large", "the cortex is thin and small the the the"),
        ("ventricles are large and wide with a thin cortex", "ventricles are large and wide"),
    ],
)
def test_open_scores_are_what_plain_loops_give(truth, answer):
    found = score_answers(OPEN, [truth], [answer], ["a"], 100, 0)
    assert found["bleu1"] == pytest.approx(plain_bleu(truth, answer, 1))
    assert found["bleu4"] == pytest.approx(plain_bleu(truth, answer, 4))
    assert found["rouge_l"] == pytest.approx(plain_rouge_l(truth, answer))
    left, common = truth.split(), 0
    for word in answer.split():
        if word in left:
            left.remove(word)
            common += 1
    precision, recall = common / len(answer.split()), common / len(truth.split())
    assert found["token_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["exact_match"] == 0


def test_open_scores_by_hand_and_their_means():
    found = score_answers(OPEN, TRUTHS, ANSWERS, list("abc"), 500, 0)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["token_f1"] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert found["rouge_l"] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert found["bleu1"] == pytest.approx((5 / 6 + 1 + 0) / 3)


def test_a_short_right_answer_has_full_marks_and_an_empty_one_none():
    right = score_answers(OPEN, ["atrophy"], ["Atrophy."], ["a"], 100, 0)
    nothing = score_answers(OPEN, ["atrophy"], [""], ["a"], 100, 0)
    for name in ("exact_match", "token_f1", "bleu1", "bleu4", "rouge_l"):
        assert (right[name], nothing[name]) == (pytest.approx(1), 0)
    assert right["ci95"] == dict.fromkeys(right["ci95"])  # one subject


def test_intervals_move_whole_subjects():
    truths, answers = ["yes"] * 40, ["yes", "no"] * 20
    apart = score_answers(QUESTIONS["demented"], truths, answers, [str(n) for n in range(40)], 2000, 0)
    # Subjects 0 to 9 are right four times, the others wrong four times: ten answers' worth of evidence, not forty.
    alike = [answer for answer in answers[:10] for _ in range(4)]
    together = score_answers(QUESTIONS["demented"], truths, alike, [str(n // 4) for n in range(40)], 2000, 0)
    assert together["accuracy"] == apart["accuracy"] == 0.5
    assert np.ptp(together["ci95"]["accuracy"]) > 1.6 * np.ptp(apart["ci95"]["accuracy"])


def test_all_right_in_few_subjects_is_no_certainty():
    found = score_answers(QUESTIONS["demented"], ["yes", "no"] * 4, ["yes", "no"] * 4, list("abcdefgh"), 200, 0)
    assert found["accuracy"] == 1 and found["ci95"]["accuracy"] == pytest.approx([0.025 ** (1 / 8), 1])


@pytest.mark.parametrize("kind", ["demented", "age", "extent"])
def test_no_answers_have_no_scores(kind):
    found = score_answers(QUESTIONS[kind], [], [], [], 100, 0)
    assert found["n"] == 0 and set(found["ci95"].values()) == {None}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("kind, truth", [("demented", "maybe"), ("age", "unknown"), ("extent", "")])
def test_a_truth_that_does_not_fit_is_named_by_row_and_not_repeated(kind, truth):
    first = {"demented": "yes", "age": "70", "extent": "1 x 1 x 1 mm"}[kind]
    with pytest.raises(ValueError, match="row 1") as raised:
        score_answers(QUESTIONS[kind], [first, truth], [first, first], ["a", "b"], 100, 0)
    assert not truth or truth not in str(raised.value)
