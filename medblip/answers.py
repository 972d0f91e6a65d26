"""How good written answers are: closed questions, numbers and free words, each by what its kind allows.

All scores are means over answers, so that their intervals are, too: subjects are redrawn with all their answers.
Answers that are all right or all wrong have exact limits (bootstrap.py), so that few subjects are seen as few.
N answers, D draws.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medblip.bootstrap import draw_weights, interval, share_interval, weighted_mean
from medblip.text import Question

TOLERANCE = 5.0
"""Of numbers, in their own unit (years, for the age)."""

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?")


def score_answers(
    question: Question,
    truths: Sequence[str],
    answers: Sequence[str],
    subjects: Sequence[str],
    num_draws: int,
    seed: int,
) -> dict[str, Any]:
    """Scores of the answers to one kind of question, ready for JSON; scores are None where there is no answer.

    Case, spaces and a full stop at the end make no difference.

    Returns:
        Of every kind `n` and `ci95`, the interval of each mean, None where there are fewer than two subjects.
        closed: `accuracy`; `unparsable`, the answers that are none of the options, which count as wrong;
        `majority_accuracy`, of always giving the most frequent truth.
        number: `mae`, of the answers that hold a number (the first one counts); `within_tolerance`, the fraction
        that is at most `tolerance` off, where no number counts as wrong; `unparsable`, those without one.
        open: `exact_match`; `token_f1` (words in common, as in SQuAD); `bleu1`, `bleu4` (sacrebleu, by answer, orders
        that a short answer has not left out) and `rouge_l` (rouge-score, F-measure), all 0 to 1.

    Raises:
        ValueError: naming the row of a truth that does not fit the question.
    """
    if not len(truths) == len(answers) == len(subjects):
        raise ValueError(f"{len(truths)} truths, {len(answers)} answers and {len(subjects)} subjects do not fit")
    by_type = {"closed": _closed, "number": _number, "open": _open}
    values, rest = by_type[question.type](question, list(map(_plain, truths)), list(map(_plain, answers)))
    means = {name: float(np.nanmean(v_N)) if np.isfinite(v_N).any() else None for name, v_N in values.items()}
    intervals: dict[str, Any] = dict.fromkeys(values)
    if len(set(subjects)) > 1:
        weight_DN = draw_weights(np.zeros(len(truths), dtype=int), subjects, num_draws, seed)
        intervals = {name: share_interval(v_N, subjects, weight_DN) for name, v_N in values.items() if name != "mae"}
        if "mae" in values:  # the others lie between 0 and 1
            intervals["mae"] = interval(weighted_mean(weight_DN, values["mae"]))
    return {"n": len(truths)} | means | rest | {"ci95": intervals}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def _closed(question: Question, truths: list[str], answers: list[str]) -> tuple[dict[str, NDArray], dict[str, Any]]:
    options = {_plain(option) for option in question.options}
    for row, truth in enumerate(truths):
        if truth not in options:  # its words stay here: they may be a record's
            raise ValueError(f"row {row}: the truth is none of the options {', '.join(question.options)}")
    right_N = np.array([truth == answer for truth, answer in zip(truths, answers, strict=True)], dtype=float)
    most = max(Counter(truths).values(), default=0)
    return {"accuracy": right_N}, {
        "unparsable": sum(answer not in options for answer in answers),
        "majority_accuracy": most / len(truths) if truths else None,
    }


def _number(question: Question, truths: list[str], answers: list[str]) -> tuple[dict[str, NDArray], dict[str, Any]]:
    true_N, told_N = _numbers(truths), _numbers(answers)
    for row in np.flatnonzero(np.isnan(true_N)):
        raise ValueError(f"row {row}: the truth holds no number")
    off_N = np.abs(told_N - true_N)
    values = {"mae": off_N, "within_tolerance": (off_N <= TOLERANCE).astype(float)}  # NaN is not within
    return values, {"tolerance": TOLERANCE, "unparsable": int(np.isnan(told_N).sum())}


def _numbers(texts: list[str]) -> NDArray:
    found = [_NUMBER.search(text) for text in texts]
    return np.array([float(match[0]) if match else np.nan for match in found], dtype=float)


def _open(question: Question, truths: list[str], answers: list[str]) -> tuple[dict[str, NDArray], dict[str, Any]]:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    for row, truth in enumerate(truths):
        if not truth:
            raise ValueError(f"row {row}: the truth is empty")
    bleu1, bleu4 = (BLEU(max_ngram_order=order, effective_order=True) for order in (1, 4))
    rouge = RougeScorer(["rougeL"])
    pairs = list(zip(truths, answers, strict=True))
    values = {
        "exact_match": [float(truth == answer) for truth, answer in pairs],
        "token_f1": [token_f1(truth, answer) for truth, answer in pairs],
        "bleu1": [bleu1.sentence_score(answer, [truth]).score / 100 for truth, answer in pairs],
        "bleu4": [bleu4.sentence_score(answer, [truth]).score / 100 for truth, answer in pairs],
        "rouge_l": [rouge.score(truth, answer)["rougeL"].fmeasure for truth, answer in pairs],
    }
    return {name: np.array(v, dtype=float) for name, v in values.items()}, {}


def token_f1(truth: str, answer: str) -> float:
    """The harmonic mean of which share of the answer's words is true, and of the truth's words is there."""
    true, told = re.findall(r"\w+", truth), re.findall(r"\w+", answer)
    common = (Counter(true) & Counter(told)).total()
    return 2 * common / (len(true) + len(told)) if true or told else 0.0
