"""Published checkpoints, read strictly: every weight that the model expects is there, and every other one is known.

A checkpoint is a folder as the hub has it (safetensors or pytorch_model.bin, whole or in shards), or LAVIS's file
eva_vit_g.pth. Its weights get our names; one that is missing, has another shape or belongs to nothing stops the run.
"""

from __future__ import annotations

import json
import logging
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from medblip import towers
from medblip.distributed import log

Weights = dict[str, Callable[[], Tensor]]
"""Weights by name, each with the function that reads it: a composite checkpoint is mostly left on the disk."""

BLIP2_PARTS = (
    r"(vision_model|qformer|embeddings|vision_projection|text_projection|itm_head|language_projection|language_model)\.|"
    r"query_tokens$"
)
"""All that a composite BLIP-2 checkpoint may hold."""
EVA_DEPTH, EVA_HEAD_WIDTH = 39, 88
EVA_BLOCK = (
    *(
        f"{part}.{kind}"
        for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
    *("attn.qkv.weight", "attn.q_bias", "attn.v_bias"),
)
"""The weights of one of its blocks: no bias on the keys."""
EVA_LEFTOVERS = rf"blocks\.{EVA_DEPTH}\.|(norm|fc_norm|head)\.|mask_token$"
"""EVA-ViT-g's last block, norm and head: BLIP-2 does without them."""
BERT_LEFTOVERS = r"bert\.pooler\.|cls\.|bert\.embeddings\.position_ids$"
BUFFERS = r".*(embeddings\.position_ids|rotary_emb\.inv_freq|attn\.(masked_)?bias)$"
"""Constants that older versions of transformers wrote beside the weights."""

EVA_NAMES = (
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.self_attn\.proj\.", ".self_attn.projection."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
)
BERT_NAMES = (
    (r"^bert\.", ""),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.attention\.self\.", ".attention.attention."),
    (r"^embeddings\.LayerNorm\.", "layernorm."),
)


def load_vision(source: str, dtype: torch.dtype, attention: str) -> nn.Module:
    """The 2-D vision transformer of a composite BLIP-2 checkpoint, of a Blip2VisionModel, or of eva_vit_g.pth.

    Args:
        source: folder or file, from `towers.locate`.
        dtype: in which the weights are held.
        attention: the attention kernel.

    Raises:
        ValueError: if a weight is missing, has another shape or is unknown, or a file is missing or damaged.
    """
    from transformers import Blip2VisionConfig, Blip2VisionModel

    weights = weights_on_disk(source)
    if Path(source).is_file():
        config, weights = _from_lavis(source, weights)
    else:
        config = _config(Blip2VisionConfig, source)
        weights = _part(source, weights, "vision_model.")
    with torch.device("meta"):
        model = Blip2VisionModel._from_config(config, attn_implementation=attention, dtype=dtype)
    fill(model, weights, source, dtype)
    report("vision", source, model)
    return model.eval()


def qformer_config(published, vision_width: int):
    """The Q-Former's config that a checkpoint's config stands for: of BLIP-2, of a plain Q-Former, or of BERT."""
    from transformers import Blip2QFormerConfig

    if published.model_type == "bert":
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        names += ("hidden_act", "max_position_embeddings", "initializer_range", "layer_norm_eps", "pad_token_id")
        sizes = {name: getattr(published, name) for name in names}
        return Blip2QFormerConfig(**sizes, encoder_hidden_size=vision_width, use_qformer_text_input=True)
    config = getattr(published, "qformer_config", published)
    # The first release of blip2-itm-vit-g spelled it another way.
    config.use_qformer_text_input |= getattr(config, "qformer_text_input", False)
    return config


def load_qformer(
    source: str, random: bool, vision_width: int, attention: str, dropout: float
) -> tuple[nn.Module, Weights]:
    """A Q-Former with the text branch, and the published weights that stand beside it under MedBLIP's names.

    From a composite BLIP-2 checkpoint come also the queries, the text embedding and the contrastive projections; from
    BERT (both feed-forwards start as BERT's, the cross-attention is new) the text embedding; from a plain
    Blip2QFormerModel nothing else.

    Args:
        source: folder, from `towers.locate`.
        random: take only the sizes from the checkpoint.
        vision_width: width of the patch features.
        attention: the attention kernel.
        dropout: rate on hidden states and attention.

    Raises:
        ValueError: as `load_vision`, and if the checkpoint has no text branch.
    """
    from transformers import AutoConfig, Blip2QFormerConfig, Blip2QFormerModel

    published = _config(AutoConfig, source)
    is_bert, is_composite = published.model_type == "bert", published.model_type == "blip-2"
    if not is_bert and not is_composite:
        published = _config(Blip2QFormerConfig, source)
    config = qformer_config(published, vision_width)
    if not config.use_qformer_text_input:
        raise ValueError(
            f"{towers.describe(source)}: the Q-Former checkpoint has no text branch (use_qformer_text_input is false); "
            "Salesforce/blip2-itm-vit-g has one"
        )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    if random:
        model, beside = Blip2QFormerModel._from_config(config, attn_implementation=attention), {}
        remark = ", random"
    else:
        weights, beside = weights_on_disk(source), {}
        remark = "" if is_composite else ", without queries, text embedding and projections: those start random"
        if is_bert:
            model = Blip2QFormerModel._from_config(config, attn_implementation=attention)
            weights, beside = _from_bert(source, weights, model)
            remark = ", without cross-attention, queries and projections: those start random"
        else:
            with torch.device("meta"):
                model = Blip2QFormerModel._from_config(config, attn_implementation=attention)
            if is_composite:
                beside = _beside_qformer(source, weights)
            weights = _part(source, weights, "qformer.")
        fill(model, weights, source, torch.float32)  # all of it is trained
    report("qformer", source, model, remark)
    return model.eval(), beside


def load_language(source: str, dtype: torch.dtype, attention: str, **overrides) -> nn.Module:
    """Any causal or encoder-decoder language model that transformers knows.

    Args:
        source: folder, from `towers.locate`.
        dtype: in which the weights are held.
        attention: the attention kernel; SDPA instead of a flash-attn that the model cannot use.
        overrides: fields of its config.

    Raises:
        ValueError: as `load_vision`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = _config(AutoConfig, source)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if attention == "flash_attention_2" and not kind._model_mapping[type(config)]._supports_flash_attn:
        attention = "sdpa"
    weights_on_disk(source)  # names a missing shard or a damaged file
    model, info = kind.from_pretrained(
        source,
        attn_implementation=attention,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are all named below
        **overrides,
    )
    wrong = [f"{name} {tuple(found)} instead of {tuple(asked)}" for name, found, asked in info["mismatched_keys"]]
    strangers = [name for name in info["unexpected_keys"] if not re.match(BUFFERS, name)]
    _refuse(source, info["missing_keys"], strangers, wrong)
    _refuse_not_finite(source, model)
    report("language", source, model)
    return model


def _config(kind, source: str):
    try:
        json.loads(Path(source, "config.json").read_text())
    except (OSError, ValueError) as error:
        told = f"config.json is missing or damaged{towers.fetch_again(source)}"
        raise ValueError(f"{towers.describe(source)}: {told}") from error
    return kind.from_pretrained(source)


def weights_on_disk(source: str) -> Weights:
    """All weights of a checkpoint.

    Raises:
        ValueError: if there are none, or a file of them is missing or damaged.
    """
    if Path(source).is_file():
        return _open(Path(source))
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = Path(source, name), Path(source, f"{name}.index.json")
        if whole.is_file():
            return _open(whole)
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            absent = [shard for shard in shards if not Path(source, shard).is_file()]
            if absent:
                raise ValueError(f"{towers.describe(source)}: {', '.join(absent)} missing{towers.fetch_again(source)}")
            return {name: read for shard in shards for name, read in _open(Path(source, shard)).items()}
    raise ValueError(
        f"{towers.describe(source)}: no model.safetensors and no pytorch_model.bin, whole or with an index.json"
        + towers.fetch_again(source)
    )


def _open(path: Path) -> Weights:
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            opened = safe_open(path, "pt")
            return {name: lambda name=name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("it does not hold weights by name")
        return {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}
    except Exception as error:  # whatever safetensors, zip and pickle raise on damaged bytes
        raise ValueError(f"{path} cannot be read as weights: {str(error) or type(error).__name__}") from error


def _part(source: str, weights: Weights, prefix: str) -> Weights:
    """The weights of one part of a composite checkpoint; all of them where the checkpoint is that part."""
    if not any(name.startswith(prefix) for name in weights):
        return weights
    _refuse(source, strangers=[name for name in weights if not re.match(BLIP2_PARTS, name)])
    return {name.removeprefix(prefix): read for name, read in weights.items() if name.startswith(prefix)}


def _renamed(weights: Weights, rules: tuple[tuple[str, str], ...], leftovers: str) -> Weights:
    renamed = {}
    for name, read in weights.items():
        if not re.match(leftovers, name):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            renamed[name] = read
    return renamed


def _from_lavis(source: str, weights: Weights):
    """EVA-ViT-g as LAVIS keeps it: 39 of its 40 blocks, biases for query and value only, no last LayerNorm."""
    from transformers import Blip2VisionConfig

    telling = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    expected = {*telling, "cls_token", "patch_embed.proj.bias"}
    expected |= {f"blocks.{number}.{name}" for number in range(EVA_DEPTH) for name in EVA_BLOCK}
    strangers = [name for name in weights.keys() - expected if not re.match(EVA_LEFTOVERS, name)]
    _refuse(source, expected - weights.keys(), strangers)
    (_, num_positions, _), (width, *_, patch_size), (mlp_width, _) = (weights[name]().shape for name in telling)
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=EVA_DEPTH,
        num_attention_heads=max(1, width // EVA_HEAD_WIDTH),
        image_size=math.isqrt(num_positions - 1) * patch_size,
        patch_size=patch_size,
    )
    weights = _renamed(weights, EVA_NAMES, EVA_LEFTOVERS)
    for prefix in (f"encoder.layers.{number}.self_attn." for number in range(EVA_DEPTH)):
        query, value = weights.pop(f"{prefix}q_bias"), weights.pop(f"{prefix}v_bias")
        weights[f"{prefix}qkv.bias"] = lambda q=query, v=value: torch.cat([q(), torch.zeros_like(q()), v()])
    weights["post_layernorm.weight"] = lambda: torch.ones(width)
    weights["post_layernorm.bias"] = lambda: torch.zeros(width)
    log.warning("%s: no LayerNorm after the last block (BLIP-2's ln_vision); it starts as the identity", source)
    return config, weights


def _from_bert(source: str, weights: Weights, model: nn.Module) -> tuple[Weights, Weights]:
    """BERT's weights for a Q-Former, whose cross-attention keeps what `model` was drawn with; and its embeddings."""
    weights = _renamed(weights, BERT_NAMES, BERT_LEFTOVERS)
    for name in [name for name in weights if re.match(r"encoder\.layer\.\d+\.(intermediate|output)\.", name)]:
        weights[re.sub(r"\.(intermediate|output)\.", r".\1_query.", name, count=1)] = weights[name]
    for name, tensor in model.state_dict().items():
        if ".crossattention." in name:
            weights[name] = lambda tensor=tensor: tensor
    names = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    _refuse(source, missing=[name for name in names if name not in weights])
    words, positions, types = (weights.pop(name) for name in names)
    return weights, {
        "qformer.text_embedding.word_embeddings.weight": words,
        # BERT adds the first type to every token of a lone text.
        "qformer.text_embedding.position_embeddings.weight": lambda: positions() + types()[0],
    }


def _beside_qformer(source: str, weights: Weights) -> Weights:
    """Queries, text embedding and contrastive projections of a composite checkpoint, under MedBLIP's names."""
    published = {
        "qformer.queries": "query_tokens",
        "qformer.text_embedding.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "qformer.text_embedding.position_embeddings.weight": "embeddings.position_embeddings.weight",
    }
    for kind in ("weight", "bias"):
        published[f"contrast.image_projection.{kind}"] = f"vision_projection.{kind}"
        published[f"contrast.record_projection.{kind}"] = f"text_projection.{kind}"
        published[f"contrast.statement_projection.{kind}"] = f"text_projection.{kind}"
    _refuse(source, missing=sorted(set(published.values()) - weights.keys()))
    return {ours: weights[theirs] for ours, theirs in published.items()}


def fill(model: nn.Module, weights: Weights, source: str, dtype: torch.dtype) -> None:
    """Puts weights into a model, which may be on the meta device; its every weight must be among them, and no other.

    Raises:
        ValueError: with the names of those that are missing, have another shape or are not the model's.
    """
    expected = model.state_dict()
    strangers = [name for name in weights.keys() - expected.keys() if not re.match(BUFFERS, name)]
    _refuse(source, expected.keys() - weights.keys(), strangers)
    read, wrong = {}, []
    for name, place in expected.items():
        tensor = weights[name]()
        if tensor.shape != place.shape:
            wrong.append(f"{name} {tuple(tensor.shape)} instead of {tuple(place.shape)}")
        read[name] = tensor.to(dtype, copy=True)  # the file's own pages must not be trained
    _refuse(source, wrong=wrong)
    model.load_state_dict(read, assign=True)
    _refuse_not_finite(source, model)


@torch.no_grad()
def place(model: nn.Module, weights: Weights, source: str) -> None:
    """Copies weights over some of a model's own. Contrastive projections of another width are left out, and named.

    Raises:
        ValueError: with the names of those that have another shape.
    """
    state, wrong = model.state_dict(), []
    for name, read in weights.items():
        tensor = read()
        if tensor.shape == state[name].shape:
            state[name].copy_(tensor)
        elif name.startswith("contrast."):
            log.info("%s: %s is new, the checkpoint's is %d wide", towers.describe(source), name, len(tensor))
        else:
            wrong.append(f"{name} {tuple(tensor.shape)} instead of {tuple(state[name].shape)}")
    _refuse(source, wrong=wrong)


def _refuse(source: str, missing=(), strangers=(), wrong=(), not_finite=()) -> None:
    problems = [
        f"{len(names)} weights {what} ({', '.join(sorted(names)[:8])}{', ...' * (len(names) > 8)})"
        for names, what in (
            (missing, "are missing from the checkpoint"),
            (strangers, "of the checkpoint are unknown"),
            (wrong, "have another shape"),
            (not_finite, "hold values that are not finite"),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{towers.describe(source)}: {'; '.join(problems)}")


def _refuse_not_finite(source: str, model: nn.Module) -> None:
    # A sum is enough, and needs no copy: what is not finite stays so in it.
    state = model.state_dict().items()
    _refuse(source, not_finite=[name for name, value in state if not value.sum(dtype=torch.float32).isfinite()])


def report(part: str, source: str, model: nn.Module, remark: str = "") -> None:
    """One line of the log about a tower: source, revision, size, precision, kernel, fingerprint of its weights."""
    if log.isEnabledFor(logging.INFO):
        log.info(
            "%s: %s, %s, %.1f M parameters, %s, attention %s, fingerprint %s%s",
            part,
            towers.describe(source),
            type(model).__name__,
            sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            str(model.dtype).removeprefix("torch."),
            model.config._attn_implementation,
            towers.fingerprint(model),
            remark,
        )
