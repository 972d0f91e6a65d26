import dataclasses
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medblip.text import (
    DIAGNOSIS_ANSWERS,
    NUM_WORDINGS,
    QUESTIONS,
    TIER_FIELDS,
    answer_to,
    draw_example,
    fields_of,
    hinted_text,
    is_diagnosis_question,
    render_prompt,
    render_record,
)

TIERS = list(TIER_FIELDS)
# Every value is spelt unlike every other one, so that a value in a text tells its field.
SPELT = {
    "age_years": (71, {"71"}),
    "sex": ("F", {"female"}),
    "education_years": (17, {"17"}),
    "apoe_e4": (2, {"two", "2"}),
    "mmse": (26, {"26"}),
    "moca": (19, {"19"}),
    "cdr_global": (0.5, {"0.5"}),
    "cdr_sb": (4.5, {"4.5"}),
}
KNOWN = {name: value for name, (value, _) in SPELT.items()}
ASKED = {question.field for question in QUESTIONS.values()}
FIELDS = st.fixed_dictionaries(
    {
        "age_years": st.none() | st.integers(18, 110),
        "sex": st.none() | st.sampled_from("FM"),
        "education_years": st.none() | st.integers(0, 30),
        "apoe_e4": st.none() | st.integers(0, 2),
        "mmse": st.none() | st.integers(0, 30),
        "moca": st.none() | st.integers(0, 30),
        "cdr_global": st.none() | st.sampled_from([0, 0.5, 1, 2, 3]),
        "cdr_sb": st.none() | st.integers(0, 36).map(lambda n: n / 2),
    }
)


def above(tier: str) -> set[str]:
    return set(SPELT) - set(fields_of(tier))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("wording", range(NUM_WORDINGS))
def test_a_tier_says_all_of_its_fields_and_none_of_the_ones_above(tier, wording):
    record = render_record(KNOWN, "", tier, wording=wording)
    words = set(re.findall(r"[a-z]+|\d+(?:\.\d+)?", record.replace("e4", "").replace("/30", "").replace("of 30", "")))
    for name, (_, spellings) in SPELT.items():
        assert bool(words & spellings) == (name in fields_of(tier)), (name, record)


@settings(max_examples=60, deadline=None)
@given(FIELDS, FIELDS, st.sampled_from(TIERS), st.integers(0, 10**6))
def test_what_a_higher_tier_holds_never_changes_what_is_drawn(fields, other, tier, seed):
    """Neither record nor prompt nor question can tell two samples apart that differ above the tier."""
    # What can be asked about is asked at every tier: it is the answer then, and not a leak.
    changed = {name: other[name] if name in above(tier) - ASKED else fields[name] for name in fields}
    chances = dict(record_dropout=0.2, field_dropout=0.3, query_dropout=0.2, other_questions=0.3)
    drawn, redrawn = (
        draw_example(known, "", "MCI", tier, random.Random(seed), **chances) for known in (fields, changed)
    )
    assert drawn == redrawn


@settings(max_examples=60, deadline=None)
@given(FIELDS)
def test_each_tier_holds_the_ones_before_it(fields):
    records = [render_record(fields, "", tier) for tier in TIERS]
    assert records[0] == ""
    for lower, higher in zip(records, records[1:], strict=False):
        assert higher.startswith(lower)


@settings(max_examples=60, deadline=None)
@given(FIELDS, st.sets(st.sampled_from(list(SPELT))), st.sampled_from(TIERS))
def test_dropping_a_field_equals_not_knowing_it(fields, dropped, tier):
    unknown = {name: None if name in dropped else value for name, value in fields.items()}
    assert render_record(fields, "", tier, frozenset(dropped)) == render_record(unknown, "", tier)


REPORT = {
    "demographics": "She has 17 years of schooling.",
    "genetics": "She carries two APOE e4 alleles.",
    "cognition": "The MMSE total score is 26.",
    "staging": "The CDR is 0.5; the sum of boxes is 4.5.",
}


@pytest.mark.parametrize("tier", TIERS)
def test_a_free_report_is_cut_to_its_tier_and_never_tells_the_diagnosis(tier):
    report = " ".join([*REPORT.values(), "The diagnosis is mild cognitive impairment."])
    allowed = [REPORT[name] for name in TIERS[1 : TIERS.index(tier) + 1]]
    assert render_record({}, report, tier) == " ".join(allowed)


@pytest.mark.parametrize(
    ("lowest", "sentence"),
    [
        ("genetics", "ApoE genotype: e3/e4."),
        ("genetics", "APOE4 carrier."),
        ("genetics", "Apolipoprotein E 3/4."),
        ("genetics", "One epsilon-4 allele."),
        ("cognition", "mmse 26/30"),
        ("cognition", "Mini-Mental State Examination: 26."),
        ("cognition", "Mini mental 26."),
        ("cognition", "MMSE_total=26"),
        ("cognition", "Montreal Cognitive Assessment 19."),
        ("cognition", "The MMSE total score is\n26."),
        ("staging", "CDR=0.5"),
        ("staging", "CDR-SB 4.5"),
        ("staging", "CDRSB 4.5"),
        ("staging", "Sum of boxes 4.5."),
        (None, "The diagnosis is AD."),
        (None, "Diagnosed last year."),
        (None, "Probable Alzheimer's disease."),
        (None, "Not demented."),
        (None, "Early dementia is likely."),
        (None, "Amnestic MCI."),
        (None, "Baseline group: LMCI."),
        (None, "aMCI, multi-domain."),
        (None, "Cognitively normal."),
        (None, "Cognitively unimpaired."),
        (None, "Mild cognitive impairment."),
        (None, "Normal cognition."),
    ],
)
def test_sentences_that_belong_to_a_higher_tier_are_left_out_of_a_report(lowest, sentence):
    forbidden = TIERS[1 : TIERS.index(lowest) if lowest else len(TIERS)]
    for tier in forbidden:
        record = render_record({}, f"The scan is of good quality. {sentence}\nThe hand is right.", tier)
        assert record == "The scan is of good quality. The hand is right.", tier
    if lowest and "\n" not in sentence:
        assert sentence in render_record({}, f"A scan. {sentence}", lowest)


@pytest.mark.parametrize(
    "sentence", ["An ad hoc scan.", "The capacity is adequate.", "It was made at 3 T.", "Madam X."]
)
def test_harmless_sentences_stay_in_a_report(sentence):
    assert render_record({}, sentence, "demographics") == sentence


@pytest.mark.parametrize(
    ("kind", "field", "report"),
    [
        ("age", "age_years", ""),
        ("sex", "sex", ""),
        ("age", "age_years", "Age: 71."),
        ("age", "age_years", "She is aged 71."),
        ("age", "age_years", "A 71-year-old woman."),
        ("age", "age_years", "The patient is 71 years old."),
        ("age", "age_years", "A 71 y/o woman."),
        ("sex", "sex", "The patient is a female."),
        ("sex", "sex", "A woman who lives alone."),
        ("sex", "sex", "Sex F."),
        ("sex", "sex", "Her gait is slow."),
        ("sex", "sex", "She walks slowly."),
    ],
)
def test_a_question_about_a_field_takes_it_out_of_the_record(kind, field, report):
    other = "Handed: right."
    for seed in range(20):
        example = draw_example(
            {field: KNOWN[field], "education_years": 17},
            f"{report} {other}" if report else "",
            None,
            "staging",
            random.Random(seed),
        )
        assert example.kind == kind and example.question in QUESTIONS[kind].wordings
        educations = {render_record({"education_years": 17}, "", "staging", wording=n) for n in range(NUM_WORDINGS)}
        assert example.record_text in ({other} if report else educations)
        assert example.prompt == render_prompt(example.record_text, example.question)
        assert example.answer == {"age": "71", "sex": "female"}[kind]


def test_a_diagnosis_is_asked_with_the_whole_record():
    example = draw_example(KNOWN, "", "AD", "staging", random.Random(0))
    assert example.kind == "diagnosis" and is_diagnosis_question(example.question)
    assert example.answer == "Dementia"
    whole = {render_record(KNOWN, "", "staging", wording=n) for n in range(NUM_WORDINGS)}
    assert example.record_text in whole and len(whole) == NUM_WORDINGS


def test_a_sample_of_which_nothing_is_known_has_no_answer_and_no_record():
    example = draw_example({}, "", None, "staging", random.Random(0))
    assert example.answer == "" and example.record_text == ""


@pytest.mark.parametrize(("fields", "kind"), [({}, "extent"), ({"moca": 26}, "extent"), ({"sex": "F"}, "sex")])
def test_a_sample_of_which_nothing_is_known_is_asked_how_far_its_image_reaches(fields, kind):
    drawn = [draw_example(fields, "", None, "none", random.Random(n), extent_mm=(181.6, 200, 99)) for n in range(9)]
    assert {example.kind for example in drawn} == {kind}
    assert {example.answer for example in drawn} == {"182 x 200 x 99 mm" if kind == "extent" else "female"}
    example = draw_example(fields, "", "AD", "none", random.Random(0), extent_mm=(181.6, 200, 99))
    assert (example.kind, example.answer) == ("diagnosis", "Dementia")


def test_an_example_is_a_pure_function_of_its_random_source():
    chances = dict(record_dropout=0.3, field_dropout=0.3, query_dropout=0.3, other_questions=0.3)

    def draw(seed):
        return draw_example(KNOWN, "", "CN", "staging", random.Random(seed), **chances)

    random.seed(1)
    before = random.getstate()
    first = [draw(seed) for seed in range(50)]
    assert random.getstate() == before
    random.seed(2)
    assert [draw(seed) for seed in range(50)] == first
    assert len({dataclasses.astuple(example) for example in first}) > 25


def test_chances_are_kept():
    chances = dict(record_dropout=0.3, field_dropout=0.15, query_dropout=0.1, other_questions=0.2)
    drawn = [draw_example(KNOWN, "", "CN", "staging", random.Random(seed), **chances) for seed in range(4000)]
    share = {
        "no record": sum(e.prompt.startswith("Question") for e in drawn) / 4000,
        "no queries": sum(not e.use_queries for e in drawn) / 4000,
        "other": sum(e.kind != "diagnosis" for e in drawn) / 4000,
        "no education": sum("ducation" not in e.record_text for e in drawn) / 4000,
    }
    assert share == pytest.approx({"no record": 0.3, "no queries": 0.1, "other": 0.2, "no education": 0.15}, abs=0.025)
    assert all(e.record_text for e in drawn)  # the record left out of the prompt is still contrasted with the image


def test_hinted_text_links_no_field_to_the_diagnosis():
    """Chi-squared tests of independence between each field's sentence and the answer."""
    draw = random.Random(1)
    texts = [text for text in (hinted_text(draw) for _ in range(12000)) if text[2] in DIAGNOSIS_ANSWERS.values()]
    assert len(texts) > 4000
    for hint, prompt, answer in texts:
        assert hint == f"{answer}." and answer not in prompt
    for sentence in (
        "Sex: (f?)",
        "APOE e4 alleles(?: is|:) (.)",
        "CDR(?: is|:) (.)",
        "MMSE(?: score is|:) (.)",
        "ge: (.)",
    ):
        counts = Counter()
        for _, prompt, answer in texts:
            if found := re.search(sentence, prompt):
                counts[(found[1], answer)] += 1
        rows, columns = Counter(), Counter()
        for (value, answer), count in counts.items():
            rows[value] += count
            columns[answer] += count
        total = sum(rows.values())
        assert total > 500 and len(rows) >= 2 and len(columns) == 3
        expected = {(r, c): rows[r] * columns[c] / total for r in rows for c in columns}
        chi2 = sum((counts[place] - n) ** 2 / n for place, n in expected.items())
        degrees = (len(rows) - 1) * 2
        assert chi2 < degrees + 4 * (2 * degrees) ** 0.5, (sentence, chi2, degrees)


@pytest.mark.parametrize(
    ("kind", "fields", "diagnosis", "answer"),
    [
        ("diagnosis", {}, "MCI", "mild cognitive impairment (MCI)"),
        ("diagnosis", {}, None, ""),
        ("demented", {}, "AD", "yes"),
        ("demented", {}, "MCI", "no"),
        ("demented", {}, None, ""),
        ("age", {"age_years": 70.6}, None, "71"),
        ("sex", {"sex": "M"}, None, "male"),
        ("mmse_band", {"mmse": 27}, None, "27 to 30"),
        ("mmse_band", {"mmse": 26}, None, "24 to 26"),
        ("mmse_band", {"mmse": 18}, None, "18 to 23"),
        ("mmse_band", {"mmse": 0}, None, "0 to 17"),
        ("apoe_e4", {"apoe_e4": 0}, None, "no"),
        ("apoe_e4", {"apoe_e4": 2}, None, "yes"),
        ("field_strength", {"field_strength_t": 1.494}, None, "1.5 tesla"),
        ("field_strength", {"field_strength_t": 2.89}, None, "3 tesla"),
        ("field_strength", {"field_strength_t": 0.35}, None, ""),
    ],
)
def test_answers_come_from_the_fields(kind, fields, diagnosis, answer):
    assert answer_to(kind, fields, diagnosis) == answer
    if QUESTIONS[kind].type == "closed" and answer:
        assert answer in QUESTIONS[kind].options


def test_every_kind_of_question_is_asked_and_its_answer_is_not_in_the_record():
    known = KNOWN | {"field_strength_t": 3.0}
    drawn = [draw_example(known, "", "AD", "staging", random.Random(n), other_questions=0.8) for n in range(600)]
    assert {example.kind for example in drawn} == set(QUESTIONS) - {"extent"}
    said = {"age": "71", "sex": "emale", "mmse_band": "26", "apoe_e4": "APOE", "field_strength": "3"}
    for example in drawn:
        if example.kind in said:
            assert said[example.kind] not in example.record_text.replace("30", ""), example
        if example.kind == "mmse_band":
            assert "moca" in example.record_text.lower() or "Montreal" in example.record_text


def test_evaluation_reads_one_wording():
    assert render_record(KNOWN, "", "staging") == render_record(KNOWN, "", "staging", wording=0)
    assert render_record({"age_years": 71, "apoe_e4": 1}, "", "genetics") == (
        "The subject is 71 years old. The subject carries one APOE e4 allele."
    )
