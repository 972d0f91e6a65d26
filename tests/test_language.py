"""The one prefix that serves training and generation, checked against the Hugging Face models called directly."""

import copy
import functools

import pytest
import torch
import transformers as hf
from tiny import PRESETS, tiny_model, tiny_words, wake_lora
from transformers.activations import GELUTanh, NewGELUActivation

from medblip.language import Language, QueryProjection
from medblip.pretrained import load_language
from medblip.text import QUESTIONS, render_prompt

KINDS = [(preset, lora) for preset in PRESETS for lora in (False, True)]
SMALL = dict(vocab_size=80, pad_token_id=1, bos_token_id=0, eos_token_id=2)
BLOCKS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
PUBLISHED = {
    "biomedlm": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, scale_attn_by_inverse_layer_idx=True)
    ),
    "biomedlm-upcast": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, reorder_and_upcast_attn=True)
    ),
    "biogpt": lambda: hf.BioGptForCausalLM(hf.BioGptConfig(**SMALL, **BLOCKS, scale_embedding=True)),
    "flan-t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=80,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            n_positions=512,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
}
"""The presets' language models with all that their published configs switch on, dropout of 0.1 too; small, random."""
OTHERS = PUBLISHED | {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **BLOCKS, num_key_value_heads=1)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL, **BLOCKS, resid_pdrop=0.1, partial_rotary_factor=0.5)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, layerdrop=0.3)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=2)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SMALL, **BLOCKS, num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0)
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
            encoder_layerdrop=0.3,
        )
    ),
}
"""Random models of other families: any of them must work as the presets' do."""
LORA_LAYERS = {
    "tiny": {"c_attn", "c_proj", "c_fc"},
    "tiny-t5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "biomedlm": {"c_attn", "c_proj", "c_fc"},
    "biomedlm-upcast": {"c_attn", "c_proj", "c_fc"},
    "biogpt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "flan-t5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gemma2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}
"""Every linear layer of attention and MLP; never the output layer."""

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
            if parameter.dim() > 1:
                parameter.data.mul_(6 if parameter.std() < 0.05 else 1)
        # What published checkpoints bring: greedy must mean greedy.
        pretrained.generation_config.update(
            repetition_penalty=3.0, no_repeat_ngram_size=2, min_new_tokens=3, num_beams=2
        )
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
        assert (generated[is_answer] <= 0).all() and generated.any()


@pytest.mark.parametrize("preset", PRESETS)
def test_generated_answers_end_with_the_end_token_and_differ_in_length(preset):
    """On the real wording, which the tiny language models were taught: each answer is cut at its end."""
    language, words = build(preset, False), tiny_words(preset)
    record = "The subject is 70 years old. The subject is female. The MMSE score is 21 of 30."
    prompts = [render_prompt(record, wording) for question in QUESTIONS.values() for wording in question.wordings]
    prompt_ids, is_prompt = words.prompts(prompts)
    nothing, unused = torch.zeros(len(prompts), 2, WIDTH), torch.zeros(len(prompts), dtype=torch.bool)
    ids, logp = language.generate(nothing, unused, prompt_ids, is_prompt, words.end_id, words.pad_id, max_new_tokens=20)
    assert all(words.language.batch_decode(ids, skip_special_tokens=True))
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
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == LORA_LAYERS[kind]
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


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_an_answer_is_as_likely_as_the_published_model_says(kind, lora, tmp_path):
    """Saved as published, loaded by us, in training mode: the source model's own loss on the same ids."""
    torch.manual_seed(1)
    PUBLISHED[kind]().save_pretrained(tmp_path)
    source = (hf.AutoModelForSeq2SeqLM if kind == "flan-t5" else hf.AutoModelForCausalLM).from_pretrained(tmp_path)
    prompt, answer = [11, 12, 13, 14, 15, 16], [31, 32, 33, 2]
    if kind == "flan-t5":
        expected = source(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
    else:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        expected = source(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
    pretrained = load_language(str(tmp_path), torch.float32, "eager")
    language = Language(pretrained, WIDTH, lora, rank=4, alpha=8, dropout=0.0).train()
    ids, answers = torch.tensor([prompt]), torch.tensor([answer])
    given = (ids, torch.ones_like(ids, dtype=torch.bool), answers, torch.ones_like(answers, dtype=torch.bool))
    logp = language(some_queries(2)[:1], torch.tensor([False]), *given)
    assert abs(expected + logp.mean()) < 1e-5


@pytest.mark.parametrize("kind", [*PRESETS, *OTHERS])
def test_generation_is_a_greedy_loop_whatever_habits_the_checkpoint_came_with(kind):
    language, queries = build(kind, False), some_queries(2)[1:]
    image = language.projection(queries[0])
    prefix_SE = torch.cat([language.lm.get_input_embeddings()(PROMPT_IDS[1]), image])
    answer: list[int] = []
    for _ in range(6):
        lm = language.lm
        if language.is_encoder_decoder:
            decoder_ids = torch.tensor([[language.start_id, *answer]])
            logits_V = lm(inputs_embeds=prefix_SE[None], decoder_input_ids=decoder_ids).logits[0, -1]
        else:
            answer_AE = lm.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
            logits_V = lm(inputs_embeds=torch.cat([prefix_SE, answer_AE])[None]).logits[0, -1]
        answer.append(int(logits_V.argmax()))
        if answer[-1] == 2:
            break
    ids, _ = language.generate(queries, WITH_QUERIES[1:], PROMPT_IDS[1:], IS_PROMPT[1:], 2, 1, max_new_tokens=6)
    assert ids[0].tolist() == answer


@pytest.mark.parametrize("kind", [*PRESETS, *OTHERS])
def test_a_frozen_model_has_no_dropout_although_it_is_in_training_mode(kind):
    language, queries = build(kind, False), some_queries(2)
    given = (queries, WITH_QUERIES, PROMPT_IDS, IS_PROMPT, ANSWER_IDS, IS_ANSWER)
    expected = language.eval()(*given)
    language.train()
    assert base(language).training
    for _ in range(3):
        assert torch.equal(language(*given), expected)


def test_queries_are_as_large_as_large_words_and_never_made_smaller():
    queries, found = torch.randn(500, 64), {}
    for size in (0.02, 0.5, 1.2, 9.0):
        embedding = torch.nn.Embedding(3000, 48)
        torch.nn.init.normal_(embedding.weight, std=size)
        projection = QueryProjection(64, embedding)
        found[size] = projection(queries).std().item()
        assert torch.equal(projection.scale.bfloat16().float(), projection.scale)  # one model in every precision
        assert set(projection.state_dict()) == {"weight", "bias"}
    assert found[0.02] == pytest.approx(found[0.5], rel=0.1) and found[0.5] == pytest.approx(3**-0.5, rel=0.1)
    assert 0.45 < found[1.2] / 1.2 < 1.1 and 0.45 < found[9.0] / 9.0 < 1.1
    scaled = hf.models.biogpt.modeling_biogpt.BioGptScaledWordEmbedding(3000, 48, 1, embed_scale=32.0)
    torch.nn.init.normal_(scaled.weight, std=0.1)
    assert QueryProjection(64, scaled).scale == 4  # words are 3.2 large once they are looked up
    with torch.device("meta"):
        assert QueryProjection(64, torch.nn.Embedding(3000, 48)).scale.is_meta


def test_an_encoder_decoder_without_a_start_for_its_answers_is_refused():
    pretrained = OTHERS["bart"]()
    pretrained.config.decoder_start_token_id = pretrained.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="set decoder_start_token_id"):
        Language(pretrained, WIDTH, False, 4, 8, 0.0)


@pytest.mark.parametrize(("kind", "lora"), [*KINDS, *((kind, True) for kind in OTHERS)])
@pytest.mark.parametrize("num_queries", [3, 0])
def test_options_that_share_one_reading_of_the_prompt_score_as_each_by_itself(kind, lora, num_queries):
    language = build(kind, lora)
    queries = some_queries(num_queries)
    prompts = (queries, torch.tensor([num_queries > 0] * 2), PROMPT_IDS, IS_PROMPT)
    options = [torch.tensor(ids) for ids in ([31, 2], [41, 42, 43, 2], [2], [51, 52, 2])]
    logp_BO, is_written_BO = language.score_options(*prompts, options)
    for number, ids in enumerate(options):
        answer_ids = ids.expand(2, -1)
        alone = language(*prompts, answer_ids, torch.ones_like(answer_ids, dtype=torch.bool))
        torch.testing.assert_close(logp_BO[:, number], alone.sum(1), atol=1e-5, rtol=1e-6)
    assert logp_BO.isfinite().all() and is_written_BO.sum(1).max() <= 1
    again, _ = language.score_options(*prompts, options[::-1])
    torch.testing.assert_close(again.flip(1), logp_BO, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("kind", "lora"), [*KINDS, *((kind, False) for kind in PUBLISHED)])
def test_an_option_counts_as_written_exactly_where_greedy_generation_writes_it(kind, lora):
    language = build(kind, lora)
    prompts = (some_queries(3), WITH_QUERIES, PROMPT_IDS, IS_PROMPT)
    written_BA, _ = language.generate(*prompts, end_token_id=2, pad_token_id=1, max_new_tokens=6)
    for row, ids in enumerate(written_BA):
        ids = ids[: int((ids == 2).nonzero()[0]) + 1] if (ids == 2).any() else ids
        other = ids.clone()
        other[-1] = (other[-1] + 1) % 80
        _, is_written_BO = language.score_options(*prompts, [other, ids])
        assert is_written_BO[row].tolist() == [False, True]


def test_a_model_that_cannot_forget_an_option_reads_each_with_the_prompt_anew(monkeypatch):
    from transformers import DynamicCache

    language = build("llama", True)
    prompts = (some_queries(3), WITH_QUERIES, PROMPT_IDS, IS_PROMPT)
    options = [torch.tensor(ids) for ids in ([31, 2], [41, 42, 43, 2])]
    shared, _ = language.score_options(*prompts, options)
    monkeypatch.setattr(DynamicCache, "is_croppable", property(lambda self: False))
    for change in ("crop", "batch_repeat_interleave"):
        monkeypatch.setattr(DynamicCache, change, lambda self, count: pytest.fail("it cannot"))
    anew, _ = language.score_options(*prompts, options)
    torch.testing.assert_close(anew, shared, atol=1e-5, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["biomedlm", "flan-t5"])
def test_gelu_runs_in_one_kernel_and_is_the_same_function(name):
    x_N = torch.linspace(-9, 9, 4001, dtype=torch.double)
    assert torch.allclose(GELUTanh()(x_N), NewGELUActivation()(x_N), rtol=0, atol=1e-14)
    pretrained = PUBLISHED[name]().eval()
    assert any(isinstance(part, NewGELUActivation) for part in pretrained.modules())
    ids_BT = torch.arange(3, 23).view(2, 10)
    inputs = {"input_ids": ids_BT} | ({"decoder_input_ids": ids_BT} if name == "flan-t5" else {})
    written_out = pretrained(**inputs).logits
    lm = Language(pretrained, WIDTH, False, 4, 8, 0.0).lm
    assert not any(isinstance(part, NewGELUActivation) for part in lm.modules())
    assert torch.allclose(lm(**inputs).logits, written_out, atol=1e-5)
