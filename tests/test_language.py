"""The one prefix that serves training and generation, checked against the Hugging Face models called directly."""

import copy
import functools

import pytest
import torch
import transformers as hf
from tiny import PRESETS, tiny_model, tiny_words, wake_lora

from medblip.language import LORA_TARGETS, Language

KINDS = [(preset, lora) for preset in PRESETS for lora in (False, True)]
SMALL = dict(vocab_size=80, pad_token_id=1, bos_token_id=0, eos_token_id=2)
OTHERS = {
    "biogpt": lambda: hf.BioGptForCausalLM(
        hf.BioGptConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            **SMALL,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    ),
}
"""Random models of other families: any of them must work as the presets' do."""

PROMPT_IDS = torch.tensor([[1, 1, 11, 12, 13], [21, 22, 23, 24, 25]])
IS_PROMPT = torch.tensor([[False, False, True, True, True], [True] * 5])
ANSWER_IDS = torch.tensor([[31, 2, 1, 1], [41, 42, 43, 2]])
IS_ANSWER = torch.tensor([[True, True, False, False], [True] * 4])
WITH_QUERIES = torch.tensor([True, True])
WIDTH = 6


@functools.cache
def _built(kind: str, lora: bool) -> Language:
    torch.manual_seed(0)
    if kind in PRESETS:
        pretrained = copy.deepcopy(tiny_model(kind, lora=False).language.lm)
    else:
        pretrained = OTHERS[kind]()
        for parameter in pretrained.parameters():  # otherwise every token is about as likely as every other
            parameter.data.mul_(6)
    language = Language(pretrained.eval(), WIDTH, lora, rank=4, alpha=8, dropout=0.1).eval()
    torch.nn.init.normal_(language.projection.weight)
    wake_lora(language)
    return language


def build(kind: str, lora: bool) -> Language:
    return copy.deepcopy(_built(kind, lora))


def base(language: Language) -> torch.nn.Module:
    return language.lm.get_base_model() if hasattr(language.lm, "get_base_model") else language.lm


def some_queries(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def record_inputs(module: torch.nn.Module) -> dict:
    """Fills in what a module is given at its next call."""
    seen: dict = {}
    module.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    return seen


def directly(language: Language, prefix_SE: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """Log-likelihood of each answer token from the Hugging Face model itself: one sample, no padding, no mask."""
    lm = language.lm
    if language.is_encoder_decoder:
        decoder_ids = torch.tensor([[lm.config.decoder_start_token_id, *answer[:-1]]])
        logits = lm(inputs_embeds=prefix_SE[None], decoder_input_ids=decoder_ids).logits[0]
    else:
        answer_AE = lm.get_input_embeddings()(torch.tensor(answer))
        logits = lm(inputs_embeds=torch.cat([prefix_SE, answer_AE])[None]).logits[0, len(prefix_SE) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer]


@pytest.mark.parametrize("lora", [False, True])
def test_decoder_only_reads_prompt_queries_answer_and_counts_the_answer_alone(lora):
    language, queries = build("tiny", lora), some_queries(2)
    seen = record_inputs(base(language).transformer)
    logp = language(queries, WITH_QUERIES, PROMPT_IDS, IS_PROMPT, ANSWER_IDS, IS_ANSWER)
    word, image = language.lm.get_input_embeddings(), language.projection(queries)
    assert seen["attention_mask"].tolist() == [[0, 0, *[1] * 7, 0, 0], [1] * 11]
    assert torch.equal(
        seen["inputs_embeds"][0, 2:9], torch.cat([word(PROMPT_IDS[0, 2:]), image[0], word(ANSWER_IDS[0, :2])])
    )
    assert torch.equal(seen["inputs_embeds"][1], torch.cat([word(PROMPT_IDS[1]), image[1], word(ANSWER_IDS[1])]))
    assert seen["position_ids"][0, 2:9].tolist() == list(range(7))
    assert seen["position_ids"][1].tolist() == list(range(11))
    assert logp.shape == (2, 4) and (logp != 0).tolist() == IS_ANSWER.tolist()
    for row, prompt, answer in ((0, [11, 12, 13], [31, 2]), (1, [21, 22, 23, 24, 25], [41, 42, 43, 2])):
        expected = directly(language, torch.cat([word(torch.tensor(prompt)), image[row]]), answer)
        assert torch.allclose(logp[row, : len(answer)], expected, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_encoder_reads_prompt_queries_and_decoder_the_answer(lora):
    language, queries = build("tiny-t5", lora), some_queries(2)
    encoder, decoder = record_inputs(base(language).encoder), record_inputs(base(language).decoder)
    logp = language(queries, WITH_QUERIES, PROMPT_IDS, IS_PROMPT, ANSWER_IDS, IS_ANSWER)
    word, image = language.lm.get_input_embeddings(), language.projection(queries)
    assert encoder["attention_mask"].tolist() == [[*[1] * 5, 0, 0], [1] * 7]
    assert torch.equal(encoder["inputs_embeds"][0, :5], torch.cat([word(PROMPT_IDS[0, 2:]), image[0]]))
    assert torch.equal(encoder["inputs_embeds"][1], torch.cat([word(PROMPT_IDS[1]), image[1]]))
    start = language.lm.config.decoder_start_token_id
    assert decoder["input_ids"].tolist() == [[start, 31, 2, 1], [start, 41, 42, 43]]
    assert logp.shape == (2, 4) and (logp != 0).tolist() == IS_ANSWER.tolist()
    for row, prompt, answer in ((0, [11, 12, 13], [31, 2]), (1, [21, 22, 23, 24, 25], [41, 42, 43, 2])):
        expected = directly(language, torch.cat([word(torch.tensor(prompt)), image[row]]), answer)
        assert torch.allclose(logp[row, : len(answer)], expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "lora"), [*KINDS, *((kind, True) for kind in OTHERS)])
def test_training_scores_a_generated_answer_as_generation_did(kind, lora):
    language, queries = build(kind, lora), some_queries(2)
    for use_queries in ([True, True], [True, False], [False, False]):
        use_queries = torch.tensor(use_queries)
        ids, generated = language.generate(queries, use_queries, PROMPT_IDS, IS_PROMPT, 2, 1, max_new_tokens=6)
        lengths = [row.index(2) + 1 if 2 in row else len(row) for row in ids.tolist()]
        is_answer = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        trained = language(queries, use_queries, PROMPT_IDS, IS_PROMPT, ids, is_answer)
        assert torch.allclose(trained, generated, atol=1e-4)
        assert (generated[is_answer] < 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_generated_answers_end_with_the_end_token_and_differ_in_length(preset):
    """On the real wording: what the tiny language models were taught is found again, each answer cut at its end."""
    language, words = build(preset, False), tiny_words(preset)
    hints = [" Dementia.", " mild cognitive impairment (MCI).", " Not demented."]
    question = "Question: What will this subject be diagnosed with? Answer:"
    prompt_ids, is_prompt = words.prompts([question + hint for hint in hints])
    nothing = torch.zeros(3, 2, WIDTH)
    ids, logp = language.generate(
        nothing, torch.tensor([False] * 3), prompt_ids, is_prompt, words.end_id, words.pad_id, max_new_tokens=20
    )
    assert [words.language.decode(row, skip_special_tokens=True).strip() for row in ids] == [
        "Dementia",
        "mild cognitive impairment (MCI)",
        "Not demented",
    ]
    lengths = (logp != 0).sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, length in zip(ids, lengths.tolist(), strict=True):
        assert row[length - 1] == words.end_id and (row[length:] == words.pad_id).all()


@pytest.mark.parametrize(("kind", "lora"), [*KINDS, *((kind, True) for kind in OTHERS)])
def test_padding_does_not_change_a_sample(kind, lora):
    language, queries = build(kind, lora), some_queries(2)
    prompt_ids = torch.cat([torch.ones(2, 4, dtype=torch.long), PROMPT_IDS], dim=1)
    prompt_ids[1, :4] = torch.tensor([51, 52, 53, 54])
    is_prompt = prompt_ids != 1
    together = language(queries, WITH_QUERIES, prompt_ids, is_prompt, ANSWER_IDS, IS_ANSWER)
    short = slice(0, 1), slice(2, None)
    alone = language(
        queries[:1], WITH_QUERIES[:1], PROMPT_IDS[short], IS_PROMPT[short], ANSWER_IDS[:1, :2], IS_ANSWER[:1, :2]
    )
    assert torch.allclose(together[0, :2], alone[0], atol=1e-5)
    alone = language(queries[1:], WITH_QUERIES[1:], prompt_ids[1:], is_prompt[1:], ANSWER_IDS[1:], IS_ANSWER[1:])
    assert torch.allclose(together[1], alone[0], atol=1e-5)


@pytest.mark.parametrize(("kind", "lora"), [*KINDS, *((kind, True) for kind in OTHERS)])
def test_queries_left_out_are_as_if_there_were_none(kind, lora):
    language = build(kind, lora)
    word = language.lm.get_input_embeddings()
    bare = [
        directly(language, word(torch.tensor([11, 12, 13])), [31, 2]),
        directly(language, word(torch.tensor([21, 22, 23, 24, 25])), [41, 42, 43, 2]),
    ]
    for use_queries in ([False, False], [False, True], [True, False]):
        logp = language(some_queries(2), torch.tensor(use_queries), PROMPT_IDS, IS_PROMPT, ANSWER_IDS, IS_ANSWER)
        for row, length in enumerate((2, 4)):
            assert torch.allclose(logp[row, :length], bare[row], atol=1e-5) != use_queries[row]


@pytest.mark.parametrize("kind", [*PRESETS, *OTHERS])
def test_inputs_as_embeddings_equal_inputs_as_ids(kind):
    """A model that scales its word embeddings must do so once, whichever way it is given words."""
    language = build(kind, False)
    lm, use_none = language.lm, torch.tensor([False])
    ids = torch.tensor([[11, 12, 13, 14]])
    answer = torch.tensor([[31, 32, 2]])
    if language.is_encoder_decoder:
        decoder_ids = torch.tensor([[lm.config.decoder_start_token_id, 31, 32]])
        logits = lm(input_ids=ids, decoder_input_ids=decoder_ids).logits[0]
    else:
        logits = lm(input_ids=torch.cat([ids, answer], dim=1)).logits[0, 3:-1]
    expected = logits.log_softmax(-1)[torch.arange(3), answer[0]]
    everything = torch.ones_like(answer, dtype=torch.bool)
    logp = language(some_queries(2)[:1], use_none, ids, torch.ones_like(ids, dtype=torch.bool), answer, everything)
    assert torch.allclose(logp[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", [*PRESETS, *OTHERS])
def test_lora_adapts_its_targets_in_every_block_and_nothing_else_is_trained(kind):
    language = build(kind, True)
    trained = [name for name, parameter in language.lm.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_A" in name or "lora_B" in name for name in trained)
    config = base(language).config
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    if config.model_type in LORA_TARGETS:
        assert adapted == set(LORA_TARGETS[config.model_type])
    else:
        assert len(adapted) >= 4
    blocks = {name.split(".lora_")[0].rsplit(".", 1)[0] for name in trained}
    assert len(blocks) >= 2


@pytest.mark.parametrize("kind", [*PRESETS, *OTHERS])
def test_without_lora_only_the_projection_is_trained(kind):
    language = build(kind, False)
    trained = {name for name, parameter in language.named_parameters() if parameter.requires_grad}
    assert trained == {"projection.weight", "projection.bias"}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_answer_teaches_the_queries_through_the_frozen_language_model(preset):
    language, queries = build(preset, False), some_queries(2).requires_grad_()
    use_queries = torch.tensor([True, False])
    language(queries, use_queries, PROMPT_IDS, IS_PROMPT, ANSWER_IDS, IS_ANSWER).sum().backward()
    assert queries.grad[0].abs().amax(-1).min() > 0
    assert not queries.grad[1].any()
    assert all(parameter.grad is None for parameter in language.lm.parameters())
