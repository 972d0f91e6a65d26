import pytest
import torch
from tiny import PRESETS, example, tiny_words

from medblip.text import render_statement
from medblip.words import Words

QUESTION = "Question: How old is this subject? Answer:"


def rows_of(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[is_token].tolist() for row, is_token in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("preset", PRESETS)
def test_prompts_are_padded_on_the_left(preset):
    words = tiny_words(preset)
    ids, mask = words.prompts(["The age is 70 years. " + QUESTION, QUESTION])
    assert ids.shape == mask.shape and mask[0].all()
    padding = int((~mask[1]).sum())
    assert padding > 0
    assert mask[1].tolist() == [False] * padding + [True] * (ids.shape[1] - padding)
    assert (ids[1, :padding] == words.pad_id).all()
    assert [words.language.decode(row) for row in rows_of(ids, mask)] == ["The age is 70 years. " + QUESTION, QUESTION]


@pytest.mark.parametrize("preset", PRESETS)
def test_too_long_a_record_is_cut_on_the_left_and_the_question_stays(preset):
    words = tiny_words(preset)
    start, end = "The sex is male. ", "The age is 70 years. "
    ids, mask = words.prompts([start + end * 60 + QUESTION])
    assert ids.shape == (1, words.max_prompt_tokens) and mask.all()
    text = words.language.decode(ids[0])
    assert text.endswith(end + QUESTION) and start not in text


@pytest.mark.parametrize("preset", PRESETS)
def test_answers_are_padded_on_the_right_and_end_with_the_end_token(preset):
    words = tiny_words(preset)
    ids, mask = words.answers(["Dementia", "mild cognitive impairment (MCI)"])
    rows = rows_of(ids, mask)
    assert len(rows[0]) < len(rows[1]) == ids.shape[1]
    assert mask[0].tolist() == [True] * len(rows[0]) + [False] * (ids.shape[1] - len(rows[0]))
    assert (ids[0, len(rows[0]) :] == words.pad_id).all()
    for row, answer in zip(rows, [" Dementia", " mild cognitive impairment (MCI)"], strict=True):
        assert row.count(words.end_id) == 1 and row[-1] == words.end_id
        assert words.language.decode(row[:-1]) == answer  # the space belongs to the answer, the prompt ends without


@pytest.mark.parametrize("preset", PRESETS)
def test_an_empty_answer_has_no_tokens_not_even_the_end(preset):
    words = tiny_words(preset)
    ids, mask = words.answers(["", "female"])
    assert not mask[0].any() and mask[1].any()
    ids, mask = words.answers(["", ""])
    assert ids.shape == (2, 1) and not mask.any()


def test_texts_begin_with_the_class_token_and_end_with_the_separator():
    words = tiny_words("tiny")
    ids, mask = words.texts(["The age is 70 years.", "", "The sex is female. The age is 70 years."])
    rows = rows_of(ids, mask)
    assert rows[1] == []
    for row in (rows[0], rows[2]):
        assert row[0] == words.text.cls_token_id and row[-1] == words.text.sep_token_id
    assert mask[:, 0].tolist() == [True, False, True]  # what the contrast takes for "has a text"
    assert words.text.decode(rows[0][1:-1]) == "The age is 70 years."


def test_too_long_a_text_keeps_the_class_token_and_its_end():
    words = tiny_words("tiny")
    long = "The sex is male. " + "The age is 70 years. " * 60 + "The global CDR is 0.5."
    ids, mask = words.texts([long])
    assert ids.shape == (1, words.max_record_tokens) and mask.all()
    assert ids[0, 0] == words.text.cls_token_id and ids[0, -1] == words.text.sep_token_id
    text = words.text.decode(ids[0, 1:-1])
    assert text.endswith("The age is 70 years. The global CDR is 0.5.") and "male" not in text


def test_a_language_tokenizer_without_padding_token_pads_with_its_end():
    tokenizer = tiny_words("tiny").language

    class WithoutPadding:  # GPT-2 and BioMedLM have none
        eos_token_id, pad_token_id, all_special_ids = tokenizer.eos_token_id, None, [tokenizer.eos_token_id]

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    words = Words(WithoutPadding(), tiny_words("tiny").text, 20, 20)
    ids, mask = words.answers(["female", "mild cognitive impairment (MCI)"])
    assert (ids[0][~mask[0]] == tokenizer.eos_token_id).all() and mask[0].sum() == 2


def test_samples_that_say_the_same_share_a_group():
    words = tiny_words("tiny")
    age, sex = "How old is this subject?", "What is the sex of this subject?"
    examples = [
        example("The age is 70 years.", "Dementia", "What is the diagnosis of this subject?"),
        example("The age is 70 years.", "Dementia", "What will this subject be diagnosed with?"),
        example("", "Dementia", age),
        example("The age is 71 years.", "female", sex),
    ]
    batch = words.batch(examples, ["p1", "p2", "p1", "p1"], ["k1", "k2", "k3", "k3"])
    record, statement = batch["record_groups_BN"], batch["statement_groups_BN"]
    assert record.dtype == statement.dtype == torch.int64
    assert record.shape == (4, 2) and statement.shape == (4, 2)
    assert record[0, 0] == record[1, 0] and len(set(record[:, 0].tolist())) == 3  # the first column: the text
    assert record[0, 1] == record[2, 1] == record[3, 1] != record[1, 1]  # the second: the subject
    # The same answer, asked in other words; and, in the second column, the same scan.
    assert statement[0, 0] == statement[1, 0] != statement[3, 0]
    assert statement[2, 1] == statement[3, 1] and len(set(statement[:, 1].tolist())) == 3


def test_a_batch_holds_every_text_of_its_examples():
    words = tiny_words("tiny")
    examples = [example("The sex is male.", "Dementia", queries=False), example("", "")]
    batch = words.batch(examples, ["p1", "p2"], ["k1", "k2"])
    assert batch["use_queries_B"].tolist() == [False, True]

    def decoded(tokenizer, name):
        rows = rows_of(
            batch[f"{name}_ids_{'BA' if name == 'answer' else 'BT'}"],
            batch[f"is_{name}_{'BA' if name == 'answer' else 'BT'}"],
        )
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    assert decoded(words.language, "prompt") == [e.prompt for e in examples]
    assert decoded(words.language, "answer") == [" Dementia", ""]
    assert decoded(words.text, "record") == ["The sex is male.", ""]
    assert decoded(words.text, "statement") == [render_statement(examples[0].question, "Dementia"), ""]
