"""`--lm FOLDER`: language models of many families learn, each from a checkpoint with its family's own tokenizer."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import transformers as hf
from test_train import metrics, run_training
from tiny import EXAMPLES, GRID, make_batch, model_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from medblip.config import TrainConfig
from medblip.model import MedBLIP, trainable
from medblip.text import DIAGNOSIS_ANSWERS, QUESTIONS, render_prompt
from medblip.words import MAX_ANSWER_TOKENS, build_words

CPU = torch.device("cpu")
TEXTS = [text for sample, _ in EXAMPLES for text in (sample.prompt, sample.answer)]
TEXTS += [render_prompt("", wording) for question in QUESTIONS.values() for wording in question.wordings]
BLOCKS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
QWEN = dict(BLOCKS, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True)


def pieces(**special) -> hf.PreTrainedTokenizerFast:
    """SentencePiece's manner (Llama, T5): a space becomes part of the next word, one is put before the first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, ["<unk>", "<s>", "</s>", "<pad>"], unk_token="<unk>", **special)


def bytes_(*tokens, **special) -> hf.PreTrainedTokenizerFast:
    """GPT-2's manner (Phi, Qwen, OPT): bytes, and a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, list(tokens), pre_tokenizers.ByteLevel.alphabet(), **special)


def _trained(tokenizer, tokens, alphabet=(), template=None, **special) -> hf.PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=tokens, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if template:
        ids = [(token, tokenizer.token_to_id(token)) for token in tokens if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def llama():
    tokenizer = pieces(bos_token="<s>", eos_token="</s>", template="<s> $A")  # no token for padding
    return tokenizer, hf.LlamaForCausalLM(hf.LlamaConfig(**BLOCKS, vocab_size=400, num_key_value_heads=1))


def qwen2():
    tokenizer = bytes_("<|endoftext|>", "<|im_end|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")  # no start
    return tokenizer, hf.Qwen2ForCausalLM(hf.Qwen2Config(**QWEN, vocab_size=400))


def qwen3():
    tokenizer = bytes_("<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    return tokenizer, hf.Qwen3ForCausalLM(hf.Qwen3Config(**QWEN, vocab_size=400, head_dim=16))


def phi():
    tokenizer = bytes_("<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    config = hf.PhiConfig(**BLOCKS, vocab_size=400, partial_rotary_factor=0.5, resid_pdrop=0.1, embd_pdrop=0.1)
    return tokenizer, hf.PhiForCausalLM(config)


def opt():
    tokens = ("<s>", "<pad>", "</s>", "<unk>")
    tokenizer = bytes_(*tokens, bos_token="</s>", eos_token="</s>", pad_token="<pad>", template="</s> $A")
    config = hf.OPTConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        word_embed_proj_dim=16,
        max_position_embeddings=256,
        layerdrop=0.3,
    )
    return tokenizer, hf.OPTForCausalLM(config)


def t5():
    tokenizer = pieces(pad_token="<pad>", eos_token="</s>", template="$A </s>")
    config = hf.T5Config(
        vocab_size=400,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=3,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return tokenizer, hf.T5ForConditionalGeneration(config)


FAMILIES = {make.__name__: make for make in (llama, qwen2, qwen3, phi, opt, t5)}
STARTS = {"llama": ["<s>"], "opt": ["</s>"]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of checkpoints, one per family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, make in FAMILIES.items():
        tokenizer, model = make()
        if name != "t5":  # a fresh output layer finds all words alike, whatever the blocks say
            model.get_output_embeddings().weight.data.mul_(12)
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    return folder


def config_of(folder, **changes):
    return dataclasses.replace(model_config("tiny"), language=str(folder), **changes)


def changed(checkpoint, folder, **config):
    """A copy of a checkpoint with other entries in its config.json."""
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_by_lora_and_keeps_its_frozen_bits(checkpoints, family):
    torch.manual_seed(7)
    config = config_of(checkpoints / family)
    model, batch = MedBLIP(config, GRID, CPU).train(), make_batch(build_words(config))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3)
    losses, learned = [], set()
    for _ in range(12):
        optimizer.zero_grad()
        terms = model(batch)
        terms["loss"].backward()
        learned |= {name for name, parameter in trainable(model).items() if parameter.grad.any()}
        optimizer.step()
        losses.append(terms["loss_lm"].item())
    assert all(loss < float("inf") for loss in losses) and losses[-1] < losses[0] - 0.5
    lora = {name for name in trainable(model) if "lora_" in name}
    assert len(lora) >= 16 and lora | {"language.projection.weight"} <= learned
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == learned


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_cut_up_as_the_family_does_within_a_text(checkpoints, family):
    words = build_words(config_of(checkpoints / family))
    tokenizer, question = words.language, "Question: Is this subject demented? Answer:"
    ids, mask = words.prompts([question, "The age is 71 years. " + question])
    start = tokenizer.convert_tokens_to_ids(STARTS.get(family, []))
    assert words.start_ids == start
    for row, is_token, text in zip(ids, mask, (question, "The age is 71 years. " + question), strict=True):
        assert row[is_token].tolist() == start + tokenizer(text, add_special_tokens=False).input_ids
    for answer in (*DIAGNOSIS_ANSWERS.values(), "71", "yes"):
        (row,), (is_token,) = words.answers([answer])
        assert is_token.all() and row[-1] == words.end_id
        within = tokenizer(f"{question} {answer}", add_special_tokens=False).input_ids
        assert tokenizer(question, add_special_tokens=False).input_ids + row[:-1].tolist() == within
        assert tokenizer.decode(row, skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_too_long_a_record_is_cut_behind_the_start_and_before_the_question(checkpoints, family, tmp_path):
    limit = {} if family == "t5" else {"max_position_embeddings": 168}  # T5's positions have no end
    words = build_words(config_of(changed(checkpoints / family, tmp_path / family, **limit)))
    assert words.max_prompt_tokens == (160 if family == "t5" else 168 - 32 - MAX_ANSWER_TOKENS)
    long = "The sex is male. " + "The age is 71 years. " * 60 + "Question: Is this subject demented? Answer:"
    ids, mask = words.prompts([long])
    assert ids.shape == (1, words.max_prompt_tokens) and mask.all()
    assert ids[0, : len(words.start_ids)].tolist() == words.start_ids
    text = words.language.decode(ids[0], skip_special_tokens=True)
    assert text.endswith("The age is 71 years. Question: Is this subject demented? Answer:") and "male" not in text


@pytest.mark.parametrize("family", ["opt", "phi"])
def test_the_longest_prompt_queries_and_answer_just_fit_the_positions(checkpoints, family, tmp_path):
    config = config_of(checkpoints / family, max_prompt_tokens=4000)
    model, words = MedBLIP(config, GRID, CPU).eval(), build_words(config)
    limit = model.language.lm.config.max_position_embeddings
    assert words.max_prompt_tokens == limit - 32 - MAX_ANSWER_TOKENS
    prompt_ids, is_prompt = words.prompts(["The age is 71 years. " * 4000])
    queries = torch.zeros(1, 32, model.qformer.width)
    never = words.language.convert_tokens_to_ids("<s>") if family == "opt" else 399  # so that it writes to the end
    ids, logp = model.language.generate(queries, torch.tensor([True]), prompt_ids, is_prompt, never, words.pad_id)
    assert ids.shape[1] == MAX_ANSWER_TOKENS and logp.isfinite().all()


def test_positions_without_room_for_a_question_are_refused_with_the_numbers(checkpoints, tmp_path):
    folder = changed(checkpoints / "opt", tmp_path / "opt", max_position_embeddings=96)
    refusal = r"question takes \d+ tokens, but a prompt may have 16 \(max_prompt_tokens 160; .* 96 positions"
    with pytest.raises(ValueError, match=refusal):
        build_words(config_of(folder))


def test_a_tokenizer_without_an_end_is_refused_by_name(checkpoints, tmp_path):
    folder = changed(checkpoints / "phi", tmp_path / "phi")
    bytes_("<|endoftext|>").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"phi: the tokenizer has no end token.*eos_token in its tokenizer_config"):
        build_words(config_of(folder))


@pytest.mark.parametrize("family", ["qwen2", "phi", "t5"])
def test_weights_without_the_tokenizers_files_are_refused(checkpoints, tmp_path, family):
    """transformers makes a tokenizer without words of them, and says nothing."""
    folder = changed(checkpoints / family, tmp_path / family)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=f"{family}: its tokenizer has no tokens for 'Not demented'"):
        build_words(config_of(folder))


def test_a_token_that_the_model_lacks_is_refused_with_both_numbers(checkpoints, tmp_path):
    folder = changed(checkpoints / "phi", tmp_path / "phi")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"padding token is {tokenizer.pad_token_id}, the model has 400 tokens"):
        build_words(config_of(folder))


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM, which is neither a causal"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "LlamaModel, which is neither a causal"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "reads more than text"),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "reads more than text"),
        ({"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}, "reads more than text"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_a_model_that_is_not_a_language_model_is_refused_by_its_kind(checkpoints, tmp_path, content, refusal):
    folder = tmp_path / "other"
    shutil.copytree(checkpoints / "phi", folder)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=refusal):
        build_words(config_of(folder))


def test_a_language_model_whose_attention_has_a_config_of_its_own_is_one(checkpoints, tmp_path):
    folder = tmp_path / "mpt"
    shutil.copytree(checkpoints / "phi", folder)  # its tokenizer
    sizes = dict(vocab_size=400, d_model=32, n_layers=2, n_heads=2, expansion_ratio=2)
    hf.MptForCausalLM(hf.MptConfig(**sizes)).save_pretrained(folder)
    config = config_of(folder)
    terms = MedBLIP(config, GRID, CPU)(make_batch(build_words(config)))
    assert terms["loss_lm"].isfinite()


def test_lm_takes_the_place_of_the_presets_language_model_alone():
    config = TrainConfig(data="", run="", deepspeed_config="", lm="a/b")
    without = dataclasses.replace(config, lm=None).model_config()
    assert config.model_config() == dataclasses.replace(without, language="a/b")


def test_biogpt_reads_as_published(tmp_path):
    """Its own tokenizer from its own files: words by Moses, no space kept, and the text begins with the end token."""
    pytest.importorskip("sacremoses", reason="BioGPT's tokenizer is made of it")
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "})
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *(f"{letter}</w>" for letter in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    hf.BioGptConfig(**BLOCKS, vocab_size=len(tokens), architectures=["BioGptForCausalLM"]).save_pretrained(tmp_path)
    words = build_words(config_of(tmp_path, max_prompt_tokens=200))
    assert (words.start_ids, words.pad_id, words.end_id) == ([2], 1, 2)
    question = "Question: Is this subject demented? Answer:"
    (prompt,), _ = words.prompts([question])
    for answer in DIAGNOSIS_ANSWERS.values():
        (ids,), _ = words.answers([answer])
        assert words.language(f"{question} {answer}").input_ids == prompt.tolist() + ids[:-1].tolist()
        assert words.language.decode(ids, skip_special_tokens=True).strip() == answer


@pytest.mark.slow
@pytest.mark.parametrize(("family", "others"), [("llama", ["qwen2", None]), ("t5", [])])
def test_train_py_trains_another_language_model_and_goes_on_with_no_other(
    made_up_shards, checkpoints, tmp_path, family, others
):
    run, lm = tmp_path / "run", str(checkpoints / family)
    run_training(made_up_shards, run, "--steps", 6, "--lm", lm)
    losses = [record["loss_lm"] for record in metrics(run)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    written = json.loads((run / "config.json").read_text())
    assert written["train"]["lm"] == written["model"]["language"] == lm
    for other in others:
        options = ["--lm", checkpoints / other] if other else []
        refused = run_training(made_up_shards, run, "--steps", 6, *options, code=1)
        assert f"--lm was {lm}, now {options[-1] if other else None}" in refused.stderr
