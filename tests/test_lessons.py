"""What the tiny language models are taught: to find an answer in a record, and nothing about the disease."""

import random

import pytest
import torch
from tiny import tiny_words
from transformers import AutoModelForCausalLM

from medblip.lessons import draw_corpus
from medblip.text import DIAGNOSIS_ANSWERS, reading_text, render_prompt, render_record
from medblip.towers import locate


@pytest.fixture(scope="module")
def gpt2():
    return AutoModelForCausalLM.from_pretrained(locate("tiny/gpt2"), attn_implementation="eager").eval()


@torch.no_grad()
def next_words(model, prompts: list[str]) -> list[str]:
    """The most likely token after each prompt."""
    words = tiny_words("tiny")
    ids_BT, is_read_BT = words.prompts(prompts)
    positions_BT = (is_read_BT.cumsum(1) - 1).clamp(min=0)
    logits_BV = model(input_ids=ids_BT, attention_mask=is_read_BT.long(), position_ids=positions_BT).logits[:, -1]
    return words.language.batch_decode(logits_BV.argmax(-1)[:, None])


def test_a_made_language_model_reads_the_score_that_a_record_holds(gpt2):
    """Records it was not taught, with other numbers around; guessing among the scores of 18 to 30 is right in 8 %."""
    draw = random.Random(12345)
    people = [
        {
            "age_years": draw.randint(60, 90),
            "sex": "F",
            "education_years": draw.randint(8, 20),
            "mmse": draw.randint(18, 30),
        }
        for _ in range(100)
    ]
    prompts = [
        render_prompt(render_record(person, "", "cognition", wording=draw.randrange(3)), "What is the MMSE score?")
        for person in people
    ]
    told = next_words(gpt2, prompts)
    right = sum(word.strip() == f"{person['mmse']}" for word, person in zip(told, people, strict=True))
    assert right > 25


def test_numbers_that_follow_each_other_have_embeddings_that_are_alike(gpt2):
    vocabulary = tiny_words("tiny").language.vocab
    numbers_NE = gpt2.get_input_embeddings().weight[[vocabulary[f"Ġ{number}"] for number in range(18, 31)]]
    distances_NN = torch.cdist(numbers_NE, numbers_NE)
    assert distances_NN.diagonal(1).mean() < 0.95 * distances_NN.diagonal(8).mean()


def test_no_lesson_about_a_record_says_anything_of_a_diagnosis():
    draw = random.Random(7)
    for _ in range(500):
        record, asked = reading_text(draw)
        assert asked
        text = " ".join([record, *(" ".join(pair) for pair in asked)]).lower()
        assert "diagnos" not in text and "dement" not in text
        assert not any(answer.lower() in text for answer in DIAGNOSIS_ANSWERS.values())


def test_a_corpus_is_a_function_of_its_seed():
    assert draw_corpus(3, 20) == draw_corpus(3, 20) != draw_corpus(4, 20)
