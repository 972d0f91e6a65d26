"""Records, questions and answers as strings: the only place where wording lives.

A prompt is `[record] Question: ... Answer:`, an answer follows it; the record's sentences are written from its
fields so that a tier (`--ehr`) decides what the model may know. Diagnoses use the published answer strings
(Qybc/MedBLIP): "Not demented", "mild cognitive impairment (MCI)", "Dementia".
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medblip.config import EhrTier

DIAGNOSIS_ANSWERS = {
    "CN": "Not demented",
    "MCI": "mild cognitive impairment (MCI)",
    "AD": "Dementia",
}

DIAGNOSIS_QUESTION = "What will this subject be diagnosed with?"
MMSE_BANDS = {"27 to 30": 27, "24 to 26": 24, "18 to 23": 18, "0 to 17": 0}
"""Lowest score of each band: usual, borderline, mild and marked impairment."""
FIELD_STRENGTHS_T = (1.5, 3.0, 7.0)


@dataclass(frozen=True)
class Question:
    """What a scan can be asked."""

    wordings: tuple[str, ...]
    """The first in evaluation, any of them in training."""
    type: Literal["closed", "number", "open"]
    """closed: one of `options`. number: as digits. open: words."""
    options: tuple[str, ...] = ()
    field: str = ""
    """The record's field that holds the answer; the record in the prompt then lacks it."""


QUESTIONS = {
    "diagnosis": Question(
        (DIAGNOSIS_QUESTION, "What is the diagnosis of this subject?", "Which diagnosis fits this scan?"),
        "closed",
        tuple(DIAGNOSIS_ANSWERS.values()),
    ),
    "demented": Question(("Is this subject demented?", "Does this subject have dementia?"), "closed", ("yes", "no")),
    "age": Question(("How old is this subject?", "What is the age of this subject?"), "number", field="age_years"),
    "sex": Question(("What is the sex of this subject?",), "closed", ("female", "male"), "sex"),
    "mmse_band": Question(
        ("In which range is the MMSE score?", "Which MMSE range does this subject score in?"),
        "closed",
        tuple(MMSE_BANDS),
        "mmse",
    ),
    "apoe_e4": Question(
        ("Does this subject carry an APOE e4 allele?", "Is this subject an APOE e4 carrier?"),
        "closed",
        ("yes", "no"),
        "apoe_e4",
    ),
    "field_strength": Question(
        ("What is the field strength of the scanner?",),
        "closed",
        tuple(f"{tesla:g} tesla" for tesla in FIELD_STRENGTHS_T),
        "field_strength_t",
    ),
    "extent": Question(("How large is the imaged region?",), "open"),
}

TIER_FIELDS: dict[EhrTier, tuple[str, ...]] = {
    "none": (),
    "demographics": ("age_years", "sex", "education_years"),
    "genetics": ("apoe_e4",),
    "cognition": ("mmse", "moca"),
    "staging": ("cdr_global", "cdr_sb"),
}
"""Fields that each tier adds to the ones before it."""

# A free-text report is read sentence by sentence; a sentence that mentions a field of a higher tier is left out.
_MENTIONS: dict[EhrTier, re.Pattern[str]] = {
    "genetics": re.compile(r"apo-?\s?e|apolipo|\be[234]\b|epsilon", re.I),
    "cognition": re.compile(r"mmse|mini[- ]?mental|moca|montreal cognitive", re.I),
    "staging": re.compile(r"cdr|clinical dementia rating|sum of boxes", re.I),
}
_DIAGNOSIS = re.compile(
    r"(?i:diagnos|dement|alzheimer|cognitive(ly)? (impair|normal|unimpair|intact|declin))"
    r"|(?i:(normal|intact|impaired) cognit|donepezil|rivastigmine|galantamine|memantine|lecanemab|donanemab|aducanumab)"
    r"|MCI\b|\bAD\b|\bCN\b"
)
_ASKED = {
    "age_years": re.compile(r"\bage[sd]?\b|\b(yo|y/o|yrs?|years?)\b|year-old", re.I),
    "sex": re.compile(r"\b(sex|gender|(fe)?male|(wo)?man|s?he|his|hers?|him|lady|gentleman)\b", re.I),
    "mmse": re.compile(r"mmse|mini[- ]?mental", re.I),
    "apoe_e4": _MENTIONS["genetics"],
    "field_strength_t": re.compile(r"\btesla\b|\d\s?T\b"),
}


def fields_of(tier: EhrTier) -> tuple[str, ...]:
    """All fields that a tier allows, in the order they are written."""
    tiers = list(TIER_FIELDS)
    return tuple(field for name in tiers[: tiers.index(tier) + 1] for field in TIER_FIELDS[name])


_WORDINGS = (
    {
        "age_years": lambda v: f"The subject is {v:.0f} years old.",
        "sex": lambda v: f"The subject is {'female' if v == 'F' else 'male'}.",
        "education_years": lambda v: f"The subject has {v:.0f} years of education.",
        "apoe_e4": lambda v: (
            f"The subject carries {('no', 'one', 'two')[int(v)]} APOE e4 allele{'' if v == 1 else 's'}."
        ),
        "mmse": lambda v: f"The MMSE score is {v:.0f} of 30.",
        "moca": lambda v: f"The MoCA score is {v:.0f} of 30.",
        "cdr_global": lambda v: f"The global CDR is {v:g}.",
        "cdr_sb": lambda v: f"The CDR sum of boxes is {v:g}.",
    },
    {
        "age_years": lambda v: f"Age: {v:.0f} years.",
        "sex": lambda v: f"Sex: {'female' if v == 'F' else 'male'}.",
        "education_years": lambda v: f"Education: {v:.0f} years.",
        "apoe_e4": lambda v: f"APOE e4 alleles: {v:.0f}.",
        "mmse": lambda v: f"MMSE: {v:.0f}/30.",
        "moca": lambda v: f"MoCA: {v:.0f}/30.",
        "cdr_global": lambda v: f"CDR: {v:g}.",
        "cdr_sb": lambda v: f"CDR-SB: {v:g}.",
    },
    {
        "age_years": lambda v: f"The age is {v:.0f} years.",
        "sex": lambda v: f"The sex is {'female' if v == 'F' else 'male'}.",
        "education_years": lambda v: f"There were {v:.0f} years of education.",
        "apoe_e4": lambda v: f"The number of APOE e4 alleles is {v:.0f}.",
        "mmse": lambda v: f"The Mini-Mental State Examination gave {v:.0f} of 30 points.",
        "moca": lambda v: f"The Montreal Cognitive Assessment gave {v:.0f} of 30 points.",
        "cdr_global": lambda v: f"The global score of the CDR is {v:g}.",
        "cdr_sb": lambda v: f"The boxes of the CDR sum to {v:g}.",
    },
)
NUM_WORDINGS = len(_WORDINGS)


def render_record(
    fields: dict, report: str, tier: EhrTier, dropped: frozenset[str] | set[str] = frozenset(), wording: int = 0
) -> str:
    """The record as text, at most at `tier`; empty where nothing is known.

    A `report` is used where there is one, without the sentences that mention the diagnosis, a higher tier's fields or
    a field in `dropped` that a question may be about; else sentences are written from the fields that are known and
    not in `dropped`, in one of NUM_WORDINGS ways (0 in evaluation, any in training).
    """
    if tier == "none":
        return ""
    if report.strip():
        tiers = list(TIER_FIELDS)
        above = [_MENTIONS[name] for name in tiers[tiers.index(tier) + 1 :] if name in _MENTIONS]
        above += [_DIAGNOSIS, *(pattern for name, pattern in _ASKED.items() if name in dropped)]
        kept, value_follows = [], False
        for sentence in re.split(r"(?<=[.!?;])\s+|\s*\n\s*", report.strip()):
            left_out = value_follows or any(pattern.search(sentence) for pattern in above)
            # "The MMSE total score is", cut by the end of the line: the number stands on the next one.
            value_follows = left_out and re.search(r"[\d.!?;]$", sentence) is None
            kept += [] if left_out else [sentence]
        return " ".join(kept)
    return " ".join(
        _WORDINGS[wording][name](fields[name])
        for name in fields_of(tier)
        if name not in dropped and fields.get(name) is not None
    )


def render_prompt(record: str, question: str) -> str:
    """What the language model reads before the image and the answer."""
    return f"{record} Question: {question} Answer:".strip()


def render_statement(question: str, answer: str) -> str:
    """A question with its answer, the text that an image is contrasted with."""
    return f"Question: {question} Answer: {answer}"


def is_diagnosis_question(question: str) -> bool:
    """Whether a question asks for the diagnosis, so that its options can be scored."""
    return "diagnos" in question.lower()


@dataclass(frozen=True)
class Example:
    """One sample's words. Empty `record_text` or `answer`: nothing known, the objectives that need it skip it."""

    prompt: str
    kind: str
    question: str
    answer: str
    record_text: str
    use_queries: bool


def answer_to(kind: str, fields: dict, diagnosis: str | None, extent_mm: Sequence[float] | None = None) -> str:
    """The true answer to a question of this kind; empty if it is not known."""
    value = fields.get(QUESTIONS[kind].field)
    if kind == "diagnosis":
        return DIAGNOSIS_ANSWERS.get(diagnosis or "", "")
    if kind == "demented":
        return "" if diagnosis is None else "yes" if diagnosis == "AD" else "no"
    if kind == "extent":
        return "" if extent_mm is None else " x ".join(f"{edge:.0f}" for edge in extent_mm) + " mm"
    if value is None:
        return ""
    if kind == "age":
        return f"{value:.0f}"
    if kind == "sex":
        return "female" if value == "F" else "male"
    if kind == "mmse_band":
        return next((band for band, lowest in MMSE_BANDS.items() if value >= lowest), "")
    if kind == "apoe_e4":
        return "yes" if value > 0 else "no"
    assert kind == "field_strength"
    return next((f"{tesla:g} tesla" for tesla in FIELD_STRENGTHS_T if abs(value - tesla) < 0.2), "")


def draw_example(
    fields: dict,
    report: str,
    diagnosis: str | None,
    tier: EhrTier,
    draw: random.Random,
    *,
    record_dropout: float = 0.0,
    field_dropout: float = 0.0,
    query_dropout: float = 0.0,
    other_questions: float = 0.0,
    extent_mm: Sequence[float] | None = None,
) -> Example:
    """Chooses a question for a sample and renders its words; `draw` decides all that is random.

    A question about a field takes that field out of the record. A sample without a diagnosis is asked about what is
    known of it, else how far the image reaches to the right, to the front and up (`extent_mm`). If nothing is known,
    its answer is empty.
    """
    answers = {kind: answer_to(kind, fields, diagnosis, extent_mm) for kind in QUESTIONS}
    others = [kind for kind in QUESTIONS if answers[kind] and kind not in ("diagnosis", "extent")]
    ask_other, which = draw.random() < other_questions, draw.random()
    kind = "diagnosis"
    if others and (diagnosis is None or ask_other):
        kind = others[int(which * len(others))]
    elif diagnosis is None and extent_mm is not None:
        kind = "extent"
    question = draw.choice(QUESTIONS[kind].wordings)
    dropped = {name for name in fields_of(tier) if draw.random() < field_dropout} | {QUESTIONS[kind].field}
    record = render_record(fields, report, tier, dropped, draw.randrange(NUM_WORDINGS))
    drop_record, drop_queries = draw.random() < record_dropout, draw.random() < query_dropout
    return Example(
        prompt=render_prompt("" if drop_record else record, question),
        kind=kind,
        question=question,
        answer=answers[kind],
        record_text=record,
        use_queries=not drop_queries,
    )


READING_QUESTIONS = {
    "education_years": ("How many years of education?", "What is the education of this subject?"),
    "mmse": ("What is the MMSE score?", "What is the MMSE of this subject?"),
    "moca": ("What is the MoCA score?", "What is the MoCA of this subject?"),
}
"""More about the numbers that a record holds, by which the tiny language models learn to read one."""


def _made_up_fields(draw: random.Random) -> dict:
    return {
        "age_years": draw.choice((draw.randint(18, 99), draw.randint(50, 95), None)),
        "sex": draw.choice(("F", "M", None)),
        "education_years": draw.randint(4, 24),
        "apoe_e4": draw.randint(0, 2),
        "mmse": draw.choice((draw.randint(0, 30), draw.randint(18, 30))),
        "moca": draw.randint(0, 30),
        "cdr_global": draw.choice((0, 0.5, 1, 2, 3)),
        "cdr_sb": draw.randint(0, 36) / 2,
        "field_strength_t": draw.choice(FIELD_STRENGTHS_T),
    }


def hinted_text(draw: random.Random) -> tuple[str, str, str]:
    """A made-up (hint, prompt, answer) in this module's wording, for teaching the tiny language models.

    The hint states the answer; nothing links the answer to the record's fields, so no knowledge about the
    disease is taught, only the wording and that an answer follows from what was read.
    """
    example = draw_example(
        _made_up_fields(draw),
        "",
        draw.choice((*DIAGNOSIS_ANSWERS, *DIAGNOSIS_ANSWERS, None)),
        draw.choice(tuple(TIER_FIELDS)[1:]),
        draw,
        record_dropout=0.3,
        field_dropout=0.4,
        other_questions=0.4,
        extent_mm=tuple(draw.randint(60, 260) for _ in range(3)),
    )
    return f"{example.answer}.", example.prompt, example.answer


def reading_text(draw: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A made-up record and up to five (question, answer) about what it says, at least one; never a diagnosis."""
    asked = []
    while not asked:
        fields, tier = _made_up_fields(draw), draw.choice(tuple(TIER_FIELDS)[1:])
        dropped = {name for name in fields_of(tier) if draw.random() < 0.5}
        for name in fields_of(tier):
            if name in dropped or fields[name] is None:
                continue
            if name in READING_QUESTIONS:
                asked.append((draw.choice(READING_QUESTIONS[name]), f"{fields[name]:.0f}"))
            kinds = (kind for kind, question in QUESTIONS.items() if question.field == name)
            asked += [(draw.choice(QUESTIONS[kind].wordings), answer_to(kind, fields, None)) for kind in kinds]
        draw.shuffle(asked)
    return render_record(fields, "", tier, dropped, draw.randrange(NUM_WORDINGS)), asked[:5]
