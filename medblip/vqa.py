"""Questions beside the diagnosis: every kind whose answer is known of a scan, asked with three images.

With the scan itself; with none, which shows what the question alone gives away; and with another subject's scan. The
record is never read, so that it cannot hold the answer. What the model writes is scored here and then forgotten: it
could repeat a record.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medblip.analysis import Draws
from medblip.answers import score_answers
from medblip.arms import Ask, shuffle_over_subjects
from medblip.asking import Interview
from medblip.scoring import Rule, check_likelihoods, probabilities
from medblip.shards import Sample
from medblip.text import QUESTIONS, answer_to, render_prompt

UNPARSABLE = ""
"""In place of a written answer to a closed question that is none of its options."""


def ask_questions(
    interview: Interview, rows: list[int], rule: Rule, draws: Draws
) -> dict[str, dict[str, dict[str, Any]]]:
    """The scores of each kind of question, by whose scan was read.

    To a closed question the model's written answer counts; `accuracy_by_likelihood` is that of the option which the
    rule takes for the most probable.

    Args:
        interview: encoded scans.
        rows: of the scans to ask about, of one cohort.
        rule: how options are compared.
        draws: of the bootstrap.
    """
    others = shuffle_over_subjects([interview.scans[row].sample.subject for row in rows], 1, draws.seed)
    images_of = {"own scan": rows, "question only": [None] * len(rows)}
    if others:
        images_of["another subject's scan"] = [rows[other] for other in others[0]]
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in images_of}
    for kind in QUESTIONS:
        scans = [interview.scans[row] for row in rows]
        truths = [answer_to(kind, scan.fields, scan.sample.diagnosis, scan.extent_mm) for scan in scans]
        known = [place for place, truth in enumerate(truths) if truth]
        prompt = render_prompt("", QUESTIONS[kind].wordings[0])
        for name, images in images_of.items() if known else ():
            asks = [Ask(prompt, images[place]) for place in known]
            samples = [scans[place].sample for place in known]
            found[name][kind] = _score(interview, kind, asks, [truths[place] for place in known], samples, rule, draws)
    return found


def _score(
    interview: Interview, kind: str, asks: list[Ask], truths: list[str], samples: list[Sample], rule: Rule, draws: Draws
) -> dict[str, Any]:
    question, subjects = QUESTIONS[kind], [sample.subject for sample in samples]
    if question.type != "closed":
        written = interview.write(asks)
        return score_answers(question, truths, [written[ask] for ask in asks], subjects, draws.number, draws.seed)
    scores = interview.score(asks, question.options)
    chosen = [scores[ask].written for ask in asks]
    answers = [UNPARSABLE if option is None else question.options[option] for option in chosen]
    entry = score_answers(question, truths, answers, subjects, draws.number, draws.seed)
    options = interview.asker.options(question.options, question.wordings[0])
    logp_NO = [scores[ask].logp for ask in asks]
    check_likelihoods(logp_NO, options, [f"{sample.key}, question {kind}" for sample in samples])
    p_NO = probabilities(logp_NO, options, rule)
    is_right_N = [question.options[best] == truth for best, truth in zip(p_NO.argmax(axis=1), truths, strict=True)]
    return entry | {"accuracy_by_likelihood": float(np.mean(is_right_N))}
