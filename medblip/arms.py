"""What the model reads of a scan in each arm of an evaluation, and so what it is asked.

Arms differ in the record and in whose image is read, so that it shows which of the two an answer comes from.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal, NamedTuple

from medblip.text import DIAGNOSIS_ANSWERS, DIAGNOSIS_QUESTION, render_prompt


class Arm(NamedTuple):
    """What the model reads of a scan: the record, and whose image."""

    record: bool
    image: Literal["own scan", "another subject's scan", "no scan", "blank scan"]


ARMS = {
    "image": Arm(record=False, image="own scan"),
    "text": Arm(record=True, image="no scan"),
    "both": Arm(record=True, image="own scan"),
    "shuffled_image": Arm(record=False, image="another subject's scan"),
    "blank_image": Arm(record=False, image="blank scan"),
    "both_shuffled": Arm(record=True, image="another subject's scan"),
}

ArmName = Literal["image", "text", "both", "shuffled_image", "blank_image", "both_shuffled"]
DEFAULT_ARMS: tuple[ArmName, ...] = ("image", "text", "both", "shuffled_image", "blank_image")

BLANK = -1
"""In an `Ask`, the image of a volume without a brain."""

SHUFFLED_PAIRS = {"shuffled_image": 1000, "both_shuffled": 200}
"""Pairs of a scan and another subject that an arm asks about, in as many rounds as it takes and at least one: one
round's score is a matter of luck. Without the record these are the questions of the arm `image`, and cost nothing."""


class Ask(NamedTuple):
    """One question to the model: the prompt, and the row of the scan it sees with it (BLANK: blank; None: no queries).

    Equal asks have equal answers, and are asked once.
    """

    prompt: str
    image: int | None


class Asked(NamedTuple):
    """An ask about the scan in a row, in an arm."""

    arm: str
    row: int
    ask: Ask


def classes_of(diagnoses: Iterable[str | None]) -> list[str]:
    """The diagnoses that occur, in the order of DIAGNOSIS_ANSWERS."""
    occurring = set(diagnoses)
    return [name for name in DIAGNOSIS_ANSWERS if name in occurring]


def offered_of(classes: list[str]) -> list[str]:
    """The diagnoses that are offered as answers to a cohort with these classes: its own two where it has two."""
    return classes if len(classes) == 2 else list(DIAGNOSIS_ANSWERS)


def ask_diagnosis(
    arms: tuple[str, ...], rows: list[int], subjects: list[str], records: list[str], seed: int
) -> tuple[list[Asked], list[str]]:
    """The question for the diagnosis of each scan of a cohort in each arm, and notes on arms that were left out.

    Args:
        arms: names of ARMS.
        rows: of the cohort's scans among all.
        subjects: of those scans.
        records: of those scans, as text.
        seed: decides who gets whose scan.
    """
    images_of = {"own scan": [rows], "no scan": [[None] * len(rows)], "blank scan": [[BLANK] * len(rows)]}
    asked, notes = [], []
    for name in arms:
        arm = ARMS[name]
        rounds = images_of.get(arm.image)
        if rounds is None:
            others = shuffle_over_subjects(subjects, -(-SHUFFLED_PAIRS[name] // len(rows)), seed)
            rounds = [[rows[other] for other in round_] for round_ in others]
        if not rounds:
            notes.append(f"there is no other subject, so the arm {name} was left out")
        for images in rounds:
            for row, image, record in zip(rows, images, records, strict=True):
                prompt = render_prompt(record if arm.record else "", DIAGNOSIS_QUESTION)
                asked.append(Asked(name, row, Ask(prompt, image)))
    return asked, notes


def shuffle_over_subjects(subjects: list[str], num_rounds: int, seed: int) -> list[list[int]]:
    """For each round and scan, the row of a scan of another subject; no round where there is only one subject.

    The subjects stand in a ring in random order, and in round k everybody takes from the k-th neighbour: everybody
    gives to one and takes from one, another one in each round.
    """
    draw = random.Random(seed)
    ring = sorted(set(subjects))
    draw.shuffle(ring)
    rows_of: dict[str, list[int]] = {}
    for row, subject in enumerate(subjects):
        rows_of.setdefault(subject, []).append(row)
    rounds = []
    for shift in range(1, min(num_rounds, len(ring) - 1) + 1):
        giver = dict(zip(ring, ring[shift:] + ring[:shift], strict=True))
        rounds.append([draw.choice(rows_of[giver[subject]]) for subject in subjects])
    return rounds
