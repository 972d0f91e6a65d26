"""Records, questions and answers as strings: the only place where wording lives.

A prompt is `[record] Question: ... Answer:`, an answer follows it; the record's sentences are written from its
fields so that a tier (`--ehr`) decides what the model may know. Diagnoses use the published answer strings
(Qybc/MedBLIP): "Not demented", "mild cognitive impairment (MCI)", "Dementia".
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from medblip.config import EhrTier

DIAGNOSIS_ANSWERS = {
    "CN": "Not demented",
    "MCI": "mild cognitive impairment (MCI)",
    "AD": "Dementia",
}

DIAGNOSIS_QUESTION = "What will this subject be diagnosed with?"

QUESTIONS = {
    "diagnosis": (DIAGNOSIS_QUESTION, "What is the diagnosis of this subject?"),
    "sex": ("What is the sex of this subject?",),
    "age": ("How old is this subject?",),
    "extent": ("How large is the imaged region?",),
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
}


def fields_of(tier: EhrTier) -> tuple[str, ...]:
    """All fields that a tier allows, in the order they are written."""
    tiers = list(TIER_FIELDS)
    return tuple(field for name in tiers[: tiers.index(tier) + 1] for field in TIER_FIELDS[name])


def _number(value: float) -> str:
    return f"{value:g}"


_SENTENCES = {
    "age_years": lambda v: f"The age is {v:.0f} years.",
    "sex": lambda v: f"The sex is {'female' if v == 'F' else 'male'}.",
    "education_years": lambda v: f"The education is {v:.0f} years.",
    "apoe_e4": lambda v: f"The number of APOE e4 alleles is {v:.0f}.",
    "mmse": lambda v: f"The MMSE total score is {v:.0f}.",
    "moca": lambda v: f"The MoCA total score is {v:.0f}.",
    "cdr_global": lambda v: f"The global CDR is {_number(v)}.",
    "cdr_sb": lambda v: f"The CDR sum of boxes is {_number(v)}.",
}


def render_record(fields: dict, report: str, tier: EhrTier, dropped: frozenset[str] | set[str] = frozenset()) -> str:
    """The record as text, at most at `tier`; empty where nothing is known.

    A `report` is used where there is one, without the sentences that mention the diagnosis, a higher tier's fields or
    a field in `dropped` that a question may be about; else sentences are written from the fields that are known and
    not in `dropped`.
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
        _SENTENCES[name](fields[name])
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
    extent_mm: tuple[float, float, float] | None = None,
) -> Example:
    """Chooses a question for a sample and renders its words; `draw` decides all that is random.

    A question about a field takes that field out of the record. A sample without a diagnosis is asked about what is
    known of it: sex or age, else how far the image reaches to the right, to the front and up (`extent_mm`). If nothing
    is known, its answer is empty.
    """
    others = [kind for kind, field in (("sex", "sex"), ("age", "age_years")) if fields.get(field) is not None]
    ask_other, which = draw.random() < other_questions, draw.random()
    kind = "diagnosis"
    if others and (diagnosis is None or ask_other):
        kind = others[int(which * len(others))]
    elif diagnosis is None and extent_mm is not None:
        kind = "extent"
    question = draw.choice(QUESTIONS[kind])
    if kind == "sex":
        answer, asked = ("female" if fields["sex"] == "F" else "male"), "sex"
    elif kind == "age":
        answer, asked = f"{fields['age_years']:.0f}", "age_years"
    elif kind == "extent":
        answer, asked = " x ".join(f"{edge:.0f}" for edge in extent_mm) + " mm", ""
    else:
        answer, asked = DIAGNOSIS_ANSWERS.get(diagnosis or "", ""), ""
    dropped = {name for name in fields_of(tier) if draw.random() < field_dropout} | {asked}
    record = render_record(fields, report, tier, dropped)
    drop_record, drop_queries = draw.random() < record_dropout, draw.random() < query_dropout
    return Example(
        prompt=render_prompt("" if drop_record else record, question),
        kind=kind,
        question=question,
        answer=answer,
        record_text=record,
        use_queries=not drop_queries,
    )


def template_text(draw: random.Random) -> tuple[str, str, str]:
    """A made-up (hint, prompt, answer) in this module's wording, for teaching the tiny language models.

    The hint states the answer; nothing links the answer to the record's fields, so no knowledge about the
    disease is taught, only the wording and that an answer follows from what was read.
    """
    fields = {
        "age_years": draw.choice((draw.randint(18, 99), draw.randint(18, 99), None)),
        "sex": draw.choice(("F", "M", None)),
        "education_years": draw.randint(4, 24),
        "apoe_e4": draw.randint(0, 2),
        "mmse": draw.randint(0, 30),
        "moca": draw.randint(0, 30),
        "cdr_global": draw.choice((0, 0.5, 1, 2, 3)),
        "cdr_sb": draw.randint(0, 36) / 2,
    }
    example = draw_example(
        fields,
        "",
        draw.choice((*DIAGNOSIS_ANSWERS, *DIAGNOSIS_ANSWERS, None)),
        draw.choice(tuple(TIER_FIELDS)),
        draw,
        record_dropout=0.3,
        field_dropout=0.3,
        other_questions=0.4,
        extent_mm=tuple(draw.randint(60, 260) for _ in range(3)),
    )
    return f"{example.answer}.", example.prompt, example.answer
