import copy
import logging
import re
import subprocess
import sys

import published
import pytest
import torch
from conftest import ROOT
from published import shard
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, layer_norm, linear, softmax
from transformers import (
    BertModel,
    BioGptConfig,
    BioGptForCausalLM,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from medblip.config import PRESETS, TrainConfig
from medblip.language import Language
from medblip.model import Contrast
from medblip.pretrained import load_language, load_qformer, load_vision, place, weights_on_disk
from medblip.qformer import MedQFormer
from medblip.vision import VisionTower

PICTURE = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[2, 5, 6, 7, 3, 0, 0], [2, 8, 9, 10, 11, 4, 3]])
IS_TOKEN = IDS != 0


def vision_of(source) -> Blip2VisionModel:
    return load_vision(str(source), torch.float32, "eager")


def qformer_of(source, random: bool = False, num_queries: int = 5, contrast_width: int = 16) -> torch.nn.ModuleDict:
    transformer, beside = load_qformer(str(source), random, 24, "eager", 0.0)
    qformer = MedQFormer(transformer, 24, num_queries)
    parts = torch.nn.ModuleDict({"qformer": qformer, "contrast": Contrast(qformer.width, contrast_width, 0.07)})
    place(parts, beside, str(source))
    return parts.eval()


def change(folder, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    return folder, published.blip2(folder)


@pytest.mark.parametrize("layout", ["safetensors", "safetensors shards", "bin", "bin shards"])
@torch.no_grad()
def test_the_vision_tower_of_a_composite_checkpoint_answers_as_in_transformers(layout, tmp_path):
    model = published.blip2(tmp_path)
    if layout != "safetensors":
        shard(tmp_path, layout)
    expected = model.vision_model(PICTURE).last_hidden_state
    assert torch.allclose(vision_of(tmp_path)(PICTURE).last_hidden_state, expected, atol=1e-5)
    assert expected.std() > 0.1


@torch.no_grad()
def test_a_plain_vision_folder_answers_as_in_transformers(tmp_path):
    model = Blip2VisionModel(Blip2VisionConfig(**published.VISION)).eval()
    published.randomise(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(vision_of(tmp_path)(PICTURE)[0], model(PICTURE)[0], atol=1e-5)


def eva_features(weights, picture, num_blocks: int, num_heads: int):
    """EVA-ViT written out from the weights' names in the file, up to the last kept block."""
    patch = weights["patch_embed.proj.weight"]
    x = torch.nn.functional.conv2d(picture, patch, weights["patch_embed.proj.bias"], stride=patch.shape[-1])
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + weights["pos_embed"]
    width = x.shape[-1]
    for number in range(num_blocks):
        w = {name.removeprefix(f"blocks.{number}."): value for name, value in weights.items()}
        y = layer_norm(x, (width,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        q, k, v = (linear(y, rows) for rows in w["attn.qkv.weight"].chunk(3))
        q, v = q + w["attn.q_bias"], v + w["attn.v_bias"]
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = (softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, w["attn.proj.weight"], w["attn.proj.bias"])
        y = layer_norm(x, (width,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        x = x + linear(gelu(linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])), w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    return x


@torch.no_grad()
def test_lavis_s_file_gives_39_of_its_40_blocks_and_says_that_the_last_norm_is_not_there(tmp_path, caplog):
    weights = published.eva_vit_g(tmp_path / "eva_vit_g.pth")
    model = vision_of(tmp_path / "eva_vit_g.pth")
    assert model.config.num_hidden_layers == 39 and model.config.num_attention_heads == 2
    features = eva_features(weights, PICTURE, 39, 2)
    expected = layer_norm(features, (176,), eps=1e-6)
    assert torch.allclose(model(PICTURE).last_hidden_state, expected, atol=1e-5)
    assert not torch.allclose(eva_features(weights, PICTURE, 40, 2), features, atol=1e-2)
    assert "no LayerNorm after the last block (BLIP-2's ln_vision); it starts as the identity" in caplog.text


def test_half_of_lavis_s_file_and_a_file_of_something_else_are_refused_by_name(tmp_path):
    published.eva_vit_g(tmp_path / "half.pth", num_blocks=20)
    with pytest.raises(ValueError, match=r"247 weights are missing from the checkpoint \(blocks.20.attn.proj.bias"):
        vision_of(tmp_path / "half.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth cannot be read as weights: it does not hold weights by name"):
        vision_of(tmp_path / "other.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "another.pth")
    with pytest.raises(
        ValueError, match=r"511 weights are missing .*\(blocks.0.attn.proj.bias, .*; 1 weights .* unknown \(weight\)"
    ):
        vision_of(tmp_path / "another.pth")
    whole = published.eva_vit_g(tmp_path / "whole.pth")
    for name in ("blocks.7.attn.q_bias", "blocks.38.norm2.weight", "cls_token"):  # named as the file names them
        torch.save({other: whole[other] for other in whole if other != name}, tmp_path / "less.pth")
        with pytest.raises(
            ValueError, match=rf"less.pth \(file\): 1 weights are missing from the checkpoint \({name}\)$"
        ):
            vision_of(tmp_path / "less.pth")
    torch.save(whole | {"blocks.3.gamma_1": torch.zeros(176)}, tmp_path / "more.pth")
    with pytest.raises(
        ValueError, match=r"more.pth \(file\): 1 weights of the checkpoint are unknown \(blocks.3.gamma_1\)$"
    ):
        vision_of(tmp_path / "more.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="empty.pth cannot be read as weights: EOFError"):
        vision_of(tmp_path / "empty.pth")


@torch.no_grad()
def test_the_qformer_of_a_composite_checkpoint_reads_images_and_texts_as_in_transformers(blip2):
    folder, model = blip2
    parts, patches = qformer_of(folder), model.vision_model(PICTURE).last_hidden_state
    queries = model.qformer(model.query_tokens.expand(2, -1, -1), encoder_hidden_states=patches).last_hidden_state
    assert torch.allclose(parts["qformer"](patches), queries, atol=1e-5)
    texts = model.qformer(model.embeddings(IDS), query_length=0, attention_mask=IS_TOKEN).last_hidden_state
    assert torch.allclose(parts["qformer"].read_text(IDS, IS_TOKEN), texts[:, 0], atol=1e-5)


@torch.no_grad()
def test_image_and_text_are_as_alike_as_the_checkpoint_says(blip2):
    folder, model = blip2
    parts = qformer_of(folder)
    image_BQK = parts["contrast"].image_projection(parts["qformer"](model.vision_model(PICTURE).last_hidden_state))
    expected = model(PICTURE, IDS, IS_TOKEN, use_image_text_matching_head=False).logits_per_image
    for name in ("record_projection", "statement_projection"):
        text_BK = getattr(parts["contrast"], name)(parts["qformer"].read_text(IDS, IS_TOKEN))
        similarity = torch.einsum(
            "bqk,tk->btq", *(torch.nn.functional.normalize(features, dim=-1) for features in (image_BQK, text_BK))
        ).amax(-1)
        assert torch.allclose(similarity, expected, atol=1e-5)


@torch.no_grad()
def test_projections_of_another_width_start_new_and_other_numbers_of_queries_are_refused(blip2, caplog):
    caplog.set_level(logging.INFO, "medblip")
    folder, model = blip2
    parts = qformer_of(folder, contrast_width=8)
    assert "contrast.image_projection.weight is new, the checkpoint's is 16 wide" in caplog.text
    assert torch.equal(parts["qformer"].queries, model.query_tokens)
    with pytest.raises(ValueError, match=r"qformer.queries \(1, 5, 32\) instead of \(1, 7, 32\)"):
        qformer_of(folder, num_queries=7)


@torch.no_grad()
def test_a_text_branch_from_bert_reads_as_bert_and_the_queries_start_with_its_feed_forward(tmp_path):
    bert = published.bert(tmp_path)
    qformer = qformer_of(tmp_path)["qformer"]
    expected = bert.bert(IDS, attention_mask=IS_TOKEN).last_hidden_state[:, 0]
    assert torch.allclose(BertModel.from_pretrained(tmp_path)(IDS, IS_TOKEN)[0][:, 0], expected, atol=1e-5)
    assert torch.allclose(qformer.read_text(IDS, IS_TOKEN), expected, atol=1e-5)
    for layer, theirs in zip(qformer.transformer.encoder.layer, bert.bert.encoder.layer, strict=True):
        assert torch.equal(layer.intermediate_query.dense.weight, theirs.intermediate.dense.weight)
        assert torch.equal(layer.output_query.LayerNorm.bias, theirs.output.LayerNorm.bias)
    assert [layer.has_cross_attention for layer in qformer.transformer.encoder.layer] == [True, False, True]
    assert qformer(torch.randn(2, 9, 24)).isfinite().all()
    # Both feed-forwards are trained, each on its own.
    layer = qformer.transformer.encoder.layer[0]
    assert layer.intermediate_query.dense.weight.data_ptr() != layer.intermediate.dense.weight.data_ptr()


def test_a_random_qformer_has_the_checkpoint_s_sizes_and_none_of_its_weights(blip2):
    folder, model = blip2
    random, same = qformer_of(folder, random=True).state_dict(), qformer_of(folder).state_dict()
    assert {name: value.shape for name, value in random.items()} == {name: value.shape for name, value in same.items()}
    assert not any(torch.equal(random[name], same[name]) for name in same if name != "contrast.temperature")


def test_the_first_release_s_spelling_of_the_text_branch_is_known(tmp_path):
    model = published.blip2(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert config.count('"use_qformer_text_input": true') == 1
    (tmp_path / "config.json").write_text(config.replace("use_qformer_text_input", "qformer_text_input"))
    texts = model.qformer(model.embeddings(IDS), query_length=0, attention_mask=IS_TOKEN).last_hidden_state
    assert torch.allclose(qformer_of(tmp_path)["qformer"].read_text(IDS, IS_TOKEN), texts[:, 0], atol=1e-5)


def test_the_published_configs_give_the_published_sizes(tmp_path):
    """Configs as they stand on the hub name little: the rest are defaults, which a new transformers must not change."""
    (tmp_path / "config.json").write_text(
        """{"model_type": "blip-2", "image_text_hidden_size": 256, "num_query_tokens": 32, "text_config": {"model_type":
        "opt"}, "qformer_config": {"model_type": "blip_2_qformer", "use_qformer_text_input": true, "vocab_size": 30523},
        "vision_config": {"model_type": "blip_2_vision_model"}}"""
    )
    config = Blip2Config.from_pretrained(tmp_path)
    with torch.device("meta"):
        vision = Blip2VisionModel(Blip2VisionConfig.from_pretrained(tmp_path))
        qformer = MedQFormer(Blip2QFormerModel(config.qformer_config), 1408, 32)
    assert (millions(vision), millions(qformer)) == (pytest.approx(986.0, abs=0.1), pytest.approx(185.7, abs=0.1))


def test_a_composite_checkpoint_without_a_text_branch_is_refused(tmp_path):
    published.blip2(tmp_path, qformer=published.QFORMER | {"use_qformer_text_input": False})
    with pytest.raises(ValueError, match="no text branch .*; Salesforce/blip2-itm-vit-g has one"):
        qformer_of(tmp_path)


@pytest.mark.parametrize("load", [vision_of, qformer_of])
def test_a_half_checkpoint_a_renamed_weight_and_a_wrong_width_are_refused_by_name(load, tmp_path):
    published.blip2(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    prefix, name = {
        vision_of: ("vision_model.", "encoder.layers.1.mlp.fc1.weight"),
        qformer_of: ("qformer.", "encoder.layer.1.output.dense.weight"),
    }[load]

    def refused(weights, told):
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=told) as raised:
            load(tmp_path)
        assert str(tmp_path) in str(raised.value)

    last = "layers.2" if load is vision_of else "layer.2"
    half = {key: value for key, value in whole.items() if not (key.startswith(prefix) and last in key)}
    number = len(whole) - len(half)
    refused(half, rf"{number} weights are missing from the checkpoint \(encoder.{last}")
    renamed = {key.replace(name, "encoder.other"): value for key, value in whole.items()}
    refused(renamed, rf"1 weights are missing.*\({name}\); 1 weights of the checkpoint are unknown \(encoder.other\)")
    refused(whole | {prefix + name: torch.zeros(2, 3)}, rf"1 weights have another shape \({name} \(2, 3\) instead of")
    refused(whole | {"audio_model.weight": torch.zeros(2)}, r"1 weights of the checkpoint are unknown \(audio_model")


def test_text_embedding_queries_and_projections_must_be_in_a_composite_checkpoint(tmp_path):
    published.blip2(tmp_path)
    gone = ["query_tokens", "embeddings.word_embeddings.weight", "text_projection.bias"]
    change(tmp_path, lambda weights: [weights.pop(name) for name in gone])
    with pytest.raises(ValueError, match=r"3 weights are missing .*\(embeddings.word.*, query_tokens, text_projection"):
        qformer_of(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors shards", "bin shards"])
@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_missing_shard_and_a_damaged_one_are_named(part, layout, tmp_path):
    (published.blip2 if part == "vision" else published.gpt2)(tmp_path)
    load = vision_of if part == "vision" else lambda source: load_language(str(source), torch.float32, "eager")
    first, second = shard(tmp_path, layout)
    load(tmp_path)
    whole = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{second} cannot be read as weights"):
        load(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=rf"{second} missing"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no model.safetensors and no pytorch_model.bin"):
        (tmp_path / "empty").mkdir()
        weights_on_disk(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "load", [vision_of, qformer_of, lambda source: load_language(str(source), torch.float32, "eager")]
)
def test_a_folder_without_a_config_is_refused(load, tmp_path):
    published.blip2(tmp_path)
    for spoil in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        spoil(tmp_path / "config.json")
        with pytest.raises(ValueError, match=f"{tmp_path} .folder.: config.json is missing or damaged"):
            load(tmp_path)


def test_a_file_that_runs_code_is_not_read(tmp_path):
    published.blip2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"vision_model.weight": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read as weights"):
        vision_of(tmp_path)


def test_a_language_model_s_missing_unknown_and_misshapen_weights_are_named(tmp_path):
    model = published.gpt2(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for edit, told in (
        (lambda w: w.pop("transformer.h.1.mlp.c_fc.weight"), r"1 weights are missing .*h.1.mlp.c_fc.weight"),
        (lambda w: w.update({"transformer.h.9.extra": torch.zeros(2)}), r"unknown \(transformer.h.9.extra\)"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.zeros(7)}), r"ln_f.bias \(7,\) instead of \(32,\)"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.full((32,), torch.nan)}), r"not finite \(.*ln_f.bias\)"),
    ):
        weights = copy.copy(whole)
        edit(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=told):
            load_language(str(tmp_path), torch.float32, "eager")
    # What old versions of transformers wrote beside the weights is no stranger.
    whole |= {"transformer.h.0.attn.bias": torch.ones(1), "transformer.h.0.attn.masked_bias": torch.zeros(1)}
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_language(str(tmp_path), torch.float32, "eager")
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)


@torch.no_grad()
def test_flan_t5_s_own_output_head_is_kept(tmp_path):
    sizes = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(
        T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ).eval()
    weights = published.save(model, tmp_path)
    weights["lm_head.weight"] = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_language(str(tmp_path), torch.float32, "eager")
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(loaded.decoder.embed_tokens.weight, weights["shared.weight"])
    adapted = Language(loaded, 8, True, 2, 4, 0.0).lm.get_base_model()
    assert torch.equal(adapted.lm_head.weight, weights["lm_head.weight"])


def test_one_line_of_the_log_says_what_a_tower_is(blip2, caplog):
    caplog.set_level(logging.INFO, "medblip")
    folder, _ = blip2
    for dtype in (torch.float32, torch.bfloat16):
        caplog.clear()
        load_vision(str(folder), dtype, "sdpa")
        (line,) = caplog.messages
        assert f"vision: {folder} (folder), Blip2VisionModel, 0.0 M parameters, {str(dtype)[6:]}, attention" in line
        assert re.search(r"attention sdpa, fingerprint [0-9a-f]{16}$", line)


def test_a_vision_weight_that_is_not_a_number_is_named(tmp_path):
    weights = published.eva_vit_g(tmp_path / "eva.pth")
    weights["blocks.5.mlp.fc1.bias"][3] = torch.inf
    torch.save(weights, tmp_path / "eva.pth")
    told = r"1 weights hold values that are not finite \(encoder.layers.5.mlp.fc1.bias\)"
    with pytest.raises(ValueError, match=told):
        vision_of(tmp_path / "eva.pth")


def test_the_log_says_which_parts_of_the_qformer_the_checkpoint_lacks(tmp_path, caplog):
    caplog.set_level(logging.INFO, "medblip")
    whole = published.blip2(tmp_path / "blip2")
    whole.qformer.save_pretrained(tmp_path / "plain")
    published.bert(tmp_path / "bert")
    told = {}
    for name in ("blip2", "plain", "bert"):
        caplog.clear()
        qformer_of(tmp_path / name)
        told[name] = caplog.messages[-1].split("fingerprint ")[1][16:]
    assert told == {
        "blip2": "",
        "plain": ", without queries, text embedding and projections: those start random",
        "bert": ", without cross-attention, queries and projections: those start random",
    }


def test_weights_are_copies_of_the_file_s(blip2):
    folder, _ = blip2
    before = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for parameter in [*vision_of(folder).parameters(), *qformer_of(folder).parameters()]:
            parameter.add_(1)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


LANGUAGE = {
    "biomedlm": (GPT2LMHeadModel, GPT2Config(vocab_size=28896, n_embd=2560, n_layer=32, n_head=20), 2594.2),
    "biogpt": (BioGptForCausalLM, BioGptConfig(), 346.8),
    "biogpt-large": (
        BioGptForCausalLM,
        BioGptConfig(
            vocab_size=57717,
            hidden_size=1600,
            num_hidden_layers=48,
            num_attention_heads=25,
            intermediate_size=6400,
            max_position_embeddings=2048,
        ),
        1571.2,
    ),
    "flan-t5-xl": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=32128,
            d_model=2048,
            d_kv=64,
            d_ff=5120,
            num_layers=24,
            num_heads=32,
            feed_forward_proj="gated-gelu",
        ),
        2784.0,  # and 65.8 more for its own output head, which only the weights show
    ),
}


def test_full_size_towers_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        pictures = Blip2VisionModel(Blip2VisionConfig())
        vision = VisionTower(pictures, 224, 32, train_final_layernorm=False, inflate=True)
        qformer = MedQFormer(
            Blip2QFormerModel(Blip2QFormerConfig(vocab_size=30523, use_qformer_text_input=True)), 1408, 32
        )
        language = {name: millions(kind(config)) for name, (kind, config, _) in LANGUAGE.items()}
    assert millions(pictures) == pytest.approx(986.0, abs=0.1)
    trained = {name: p.numel() for name, p in vision.named_parameters() if p.requires_grad}
    assert trained == {
        "patch_embedding.weight": 32**3 * 1408,
        "patch_embedding.bias": 1408,
        "position_embedding": 344 * 1408,
    }
    # The published blocks and class token, and here the last LayerNorm and the keys' biases (zeros) as well.
    assert round(millions(vision) * 1e6) - sum(trained.values()) == 984_703_360 + 2 * 1408 + 39 * 1408
    assert millions(qformer) == pytest.approx(185.7, abs=0.1)
    assert language == {name: pytest.approx(count, abs=0.1) for name, (_, _, count) in LANGUAGE.items()}
    assert set(PRESETS) == {"tiny", "tiny-t5", *LANGUAGE}


def test_the_run_s_options_replace_the_preset_s_parts():
    asked = dict(
        vision="eva_vit_g.pth", qformer="bert", qformer_init="random", patch_edge=16, patch_init="random"
    ) | dict(train_final_layernorm=True, activation_checkpointing=True)
    run = dict(data="", run="", deepspeed_config="", preset="biomedlm")
    changed, plain = TrainConfig(**run, **asked).model_config(), TrainConfig(**run).model_config()
    assert {name: getattr(changed, name) for name in asked} == asked
    assert plain == PRESETS["biomedlm"].model
    assert plain.language == changed.language == "stanford-crfm/BioMedLM"


@pytest.mark.slow
def test_a_run_trains_on_published_layouts_and_a_half_checkpoint_stops_it_before_its_first_step(
    made_up_shards, tmp_path
):
    published.eva_vit_g(tmp_path / "eva_vit_g.pth")
    published.bert(tmp_path / "bert")
    published.gpt2(tmp_path / "gpt2")
    command = f"train.py --deepspeed_config ds_configs/zero2_fp32.json --data {made_up_shards} --preset biomedlm"
    command += f" --vision {tmp_path}/eva_vit_g.pth --qformer {tmp_path}/bert --lm {tmp_path}/gpt2 --patch-edge 16"
    command += (
        " --train-final-layernorm True --activation-checkpointing True --steps 2 --global-batch 4 --micro-batch 2"
    )

    def train(run):
        arguments = [*command.split(), "--run", str(tmp_path / run)]
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)

    done = train("run")
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (
        "vision: .*eva_vit_g.pth .file., Blip2VisionModel, ",
        "qformer: .*/bert .folder., ",
        "language: .*/gpt2 ",
    ):
        assert len(re.findall(line + ".*fingerprint [0-9a-f]{16}", done.stderr)) == 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2

    change(tmp_path / "bert", lambda weights: weights.pop("bert.encoder.layer.1.intermediate.dense.bias"))
    done = train("half")
    assert done.returncode == 1
    told = "2 weights are missing from the checkpoint (encoder.layer.1.intermediate.dense.bias, encoder.layer.1.interme"
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "half/metrics.jsonl").exists() and not list((tmp_path / "half").glob("**/*.pt"))
