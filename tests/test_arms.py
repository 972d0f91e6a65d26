"""Who is asked what in which arm."""

from collections import Counter

import pytest

from medblip.arms import ARMS, BLANK, DEFAULT_ARMS, ask_diagnosis, shuffle_over_subjects
from medblip.text import DIAGNOSIS_QUESTION, render_prompt


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_images_are_never_the_subject_s_own(seed):
    subjects = list("aabbbcdee") if seed % 2 else list("ab")
    rounds = shuffle_over_subjects(subjects, 3, seed)
    assert len(rounds) == min(3, len(set(subjects)) - 1)
    for other in rounds:
        assert all(subjects[row] != subject for row, subject in zip(other, subjects, strict=True))
    givers = [tuple(subjects[row] for row in other) for other in rounds]
    assert len(set(givers)) == len(rounds), "each round takes from another subject"
    assert rounds == shuffle_over_subjects(subjects, 3, seed)
    assert shuffle_over_subjects(["a", "a"], 3, seed) == []


def test_each_arm_reads_what_its_name_says():
    subjects, rows = [f"s{i // 2}" for i in range(6)], list(range(10, 16))
    records = [f"record {i}" for i in range(6)]
    asked, notes = ask_diagnosis(tuple(ARMS), rows, subjects, records, seed=0)
    assert not notes
    rounds = {name: 2 if "shuffled" in name else 1 for name in ARMS}  # there are two other subjects
    assert Counter(one.arm for one in asked) == {name: 6 * number for name, number in rounds.items()}
    for name, row, ask in asked:
        assert ask.prompt == render_prompt(records[row - 10] if ARMS[name].record else "", DIAGNOSIS_QUESTION)
        if "shuffled" in name:
            assert subjects[ask.image - 10] != subjects[row - 10]
        else:
            assert ask.image == {"text": None, "blank_image": BLANK}.get(name, row)


def test_the_default_arms_ask_at_most_once_per_scan_and_arm():
    subjects = [f"s{i}" for i in range(1000)]
    asked, _ = ask_diagnosis(DEFAULT_ARMS, list(range(1000)), subjects, [f"record {i}" for i in range(1000)], seed=0)
    assert len({one.ask for one in asked}) == 3 * 1000 + 1  # shuffled images are those of `image`


def test_arms_that_need_another_subject_are_left_out_and_said_where_there_is_none():
    asked, notes = ask_diagnosis(("image", "shuffled_image"), [0, 1], ["s", "s"], ["", ""], seed=0)
    assert {one.arm for one in asked} == {"image"} and "shuffled_image was left out" in notes[0]
