"""Will it fit: memory, traffic and the DeepSpeed config for a model, before anything is downloaded or queued.

1. build the model without weights, on torch's meta device, from the checkpoints' configs;
2. run one forward pass there and add up what autograd keeps for the backward pass: shapes without values;
3. divide weights, gradients and optimizer state among the GPUs as each ZeRO stage does;
4. take the first DeepSpeed config that fits.

All figures are estimates, for the longest texts that the options allow. Sources: ZeRO (arXiv 1910.02054, section 3 for
memory, section 7 for traffic); what each of DeepSpeed's buffers holds is from its 0.19 source.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medblip.config import PRESETS, ModelConfig, TrainConfig, unknown
from medblip.ds_config import load_deepspeed_config
from medblip.schedule import plan_schedule

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` must not wait for it
    import torch
    from torch import nn

DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"
IN_ORDER = ("zero2", "zero1", "zero3", "zero3_offload")
"""Least traffic first; the first that fits is recommended."""

BIOMEDLM = dict(n_embd=2560, n_layer=32, n_head=20, vocab_size=28896, bos_token_id=28895, eos_token_id=28895)
BIOGPT_LARGE = dict(hidden_size=1600, intermediate_size=6400, num_hidden_layers=48, num_attention_heads=25)
FLAN_T5_XL = dict(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu")
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Salesforce/blip2-itm-vit-g": ("blip-2", dict(qformer_config=dict(use_qformer_text_input=True))),
    "stanford-crfm/BioMedLM": ("gpt2", BIOMEDLM),
    "microsoft/biogpt": ("biogpt", {}),
    "microsoft/BioGPT-Large": ("biogpt", BIOGPT_LARGE | dict(vocab_size=57717, max_position_embeddings=2048)),
    "google/flan-t5-xl": ("t5", FLAN_T5_XL | dict(vocab_size=32128, decoder_start_token_id=0)),
}
"""Shapes of the presets' checkpoints, for planning before they are fetched: what differs from transformers' defaults,
which are EVA-ViT-g, BERT-base with cross-attention in every second layer, and BioGPT."""

CONTEXT_BYTES = 1_000_000_000
"""CUDA context, cuBLAS and NCCL on each GPU: a round figure, not derived."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Estimate memory and traffic of a training run, and choose its DeepSpeed config. Exit code 1: it does not fit.

    Examples:
      medblip plan --preset biomedlm --gpus 8
      medblip plan --preset flan-t5-xl --gpus 4 --gpu-gb 40 --micro-batch 4 --activation-checkpointing True
    """

    preset: str = "biomedlm"
    """Model to plan for; nothing is downloaded."""
    gpus: int = 1
    """GPUs of a node."""
    nodes: int = 1
    gpu_gb: float = 80
    """Memory of a GPU in GB (1e9 bytes)."""
    micro_batch: int | None = None
    """Samples per GPU and forward pass. Without it: the preset's."""
    lora: bool = True
    """Adapt the language model with LoRA, or leave it frozen."""
    lm: str | None = None
    """Another language model than the preset's: a folder or hub id."""
    patch_edge: int | None = None
    """Edge of a cubic patch in voxels. Without it: the preset's."""
    activation_checkpointing: bool | None = None
    """Recompute the frozen blocks in the backward pass. Without it: the preset's."""
    deepspeed_config: str | None = None
    """One DeepSpeed JSON to judge. Without it: those of ds_configs/."""
    size: int = 224
    """Voxels along each edge of a volume."""
    json: bool = False
    """Print one JSON object instead of the tables."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))
        for name in ("gpus", "nodes", "gpu_gb", "micro_batch", "size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")


class Count(NamedTuple):
    """Numbers of parameters."""

    frozen: int
    trained: int


class Activations(NamedTuple):
    """Bytes that the forward pass of a micro-batch leaves for the backward pass, and what the latter needs on top."""

    vision: int
    qformer: int
    language: int
    workspace: int


def plan(options: PlanOptions) -> int:
    """Prints the plan; returns 0 if it fits and 1 if not.

    Raises:
        ValueError: for an unknown preset, a checkpoint that is neither here nor known, or a DeepSpeed JSON that
            train.py would refuse.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    names = ("preset", "lora", "lm", "patch_edge", "activation_checkpointing")
    ranks, micro_batch = options.gpus * options.nodes, options.micro_batch or PRESETS[options.preset].micro_batch
    train = TrainConfig(
        **dict(data="", run="", deepspeed_config="", micro_batch=micro_batch, global_batch=ranks * micro_batch),
        **{name: getattr(options, name) for name in names},
    )
    config = train.model_config()
    schedule, _ = plan_schedule(train, ranks * micro_batch, ranks)
    files = {f"ds_configs/{name}.json": DS_CONFIGS / f"{name}.json" for name in IN_ORDER}
    if options.deepspeed_config:
        files = {options.deepspeed_config: options.deepspeed_config}
    engines = {name: load_deepspeed_config(path, schedule) for name, path in files.items()}
    model = build(config, options.size, _weight_bytes(next(iter(engines.values()))))
    kept = activations(model, config, options.size, micro_batch, schedule.questions_per_scan)
    choices = {}
    for name, engine in engines.items():
        share = divide(engine, model, options.gpus, options.nodes)
        choices[name] = share | _peak(
            share, sum(kept[config.activation_checkpointing]), micro_batch, options.gpu_gb * 1e9
        )
    fitting = [name for name in choices if choices[name]["fits"]]
    best = fitting[0] if fitting else min(choices, key=lambda name: choices[name]["peak"])
    answer = {
        "fits": bool(fitting),
        "gpu_bytes": choices[best]["peak"],
        "deepspeed_config": best,
        "reason": _reason(best, choices, config.activation_checkpointing),
        "estimate": True,
        "options": dataclasses.asdict(options) | {"micro_batch": micro_batch},
        "model": dataclasses.asdict(config),
        "parameters": {part: count(module)._asdict() for part, module in model.named_children()},
        "all_parameters": count(model)._asdict(),
        "activations": {"whole": kept[False]._asdict(), "checkpointed": kept[True]._asdict()},
        "choices": choices,
    }
    print(json.dumps(answer) if options.json else _tables(answer))
    return 0 if fitting else 1


def checkpoint_config(source: str):
    """The config of a checkpoint: from its folder, else a built-in one for those of the presets.

    Raises:
        ValueError: if it is neither here nor known.
    """
    from transformers import AutoConfig, Blip2VisionConfig

    from medblip import towers

    try:
        folder = Path(towers.locate(source))
    except ValueError:
        if source not in PUBLISHED:
            raise
        model_type, sizes = PUBLISHED[source]
        return AutoConfig.for_model(model_type, **sizes)
    # The one file that is a checkpoint is LAVIS's eva_vit_g.pth, whose shape is the default.
    return Blip2VisionConfig() if folder.is_file() else AutoConfig.from_pretrained(folder)


def build(config: ModelConfig, grid_size: int, width: int) -> nn.Module:
    """The MedBLIP that training would build, without its weights, in precision of `width` bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Blip2QFormerModel, Blip2VisionModel

    from medblip import pretrained
    from medblip.language import Language
    from medblip.model import Contrast, MedBLIP
    from medblip.qformer import MedQFormer
    from medblip.vision import VisionTower

    vision_config, language_config = checkpoint_config(config.vision), checkpoint_config(config.language)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    qformer_config = pretrained.qformer_config(checkpoint_config(config.qformer), vision_config.hidden_size)
    qformer_config.hidden_dropout_prob = qformer_config.attention_probs_dropout_prob = config.qformer_dropout
    kind = AutoModelForSeq2SeqLM if language_config.is_encoder_decoder else AutoModelForCausalLM
    lora = config.lora, config.lora_rank, config.lora_alpha, config.lora_dropout
    with torch.device("meta"), _shapes_only():
        model = MedBLIP.__new__(MedBLIP)  # its __init__ reads the weights
        torch.nn.Module.__init__(model)
        tower = Blip2VisionModel._from_config(vision_config, attn_implementation="sdpa")
        model.vision = VisionTower(tower, grid_size, config.patch_edge, config.train_final_layernorm)
        transformer = Blip2QFormerModel._from_config(qformer_config, attn_implementation="sdpa")
        model.qformer = MedQFormer(transformer, model.vision.width, config.num_queries)
        model.contrast = Contrast(model.qformer.width, config.contrast_width, config.contrast_temperature)
        model.language = Language(
            kind.from_config(language_config, attn_implementation="sdpa"), model.qformer.width, *lora
        )
    return model.to(torch.bfloat16 if width == 2 else torch.float32).train()


def _shapes_only():
    """Makes the meta device keep what a GPU would: fused attention and dropout, and padding in every mask."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    fused = torch.ops.aten

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        if attn_mask is None:
            return fused._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        bias = attn_mask.expand(*query.shape[:2], -1, -1)
        return fused._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, scale=scale)[0]

    def dropout(input, p=0.5, training=True, inplace=False):
        return torch.native_dropout(input, p, True)[0] if training and p else input

    instead = {
        functional.scaled_dot_product_attention: attend,
        functional.dropout: dropout,
        torch.Tensor.__bool__: lambda tensor: False,  # "is nothing padded?", which has no answer without values
    }

    class ShapesOnly(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return instead.get(function, function)(*args, **(kwargs or {}))

    return ShapesOnly()


def kept_for_backward(model: nn.Module, function, *args) -> tuple[Any, list[int]]:
    """A function's output, and the bytes of each storage that autograd keeps of it; the model's own are left out."""
    from torch.autograd.graph import saved_tensors_hooks

    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other gets its number
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*args)
    return output, [storage.nbytes() for number, storage in kept.items() if number not in own]


def activations(
    model: nn.Module, config: ModelConfig, grid_size: int, num_samples: int, questions_per_scan: int = 1
) -> dict[bool, Activations]:
    """Activation bytes of a micro-batch with the longest texts, without (False) and with checkpointing (True).

    The gradient passes through the frozen blocks to the 3-D embedding and to LoRA, so they keep theirs too; a frozen
    linear layer keeps nothing. The contrast is left out: below 1 MB.
    """
    import torch

    from medblip.words import MAX_ANSWER_TOKENS

    num_rows = num_samples * questions_per_scan
    with torch.device("meta"):
        volume_BXYZ = torch.empty(num_samples, *[grid_size] * 3, dtype=model.vision.patch_embedding.weight.dtype)
        prompt, answer, record = (
            (torch.empty(num_rows, length, dtype=torch.long), torch.empty(num_rows, length, dtype=torch.bool))
            for length in (config.max_prompt_tokens, MAX_ANSWER_TOKENS, config.max_record_tokens)
        )
        use_queries_B = torch.empty(num_rows, dtype=torch.bool)
    num_blocks, kept, largest = {}, {}, 0
    for checkpointing in (False, True):
        for name in ("vision", "language"):
            num_blocks[name] = _checkpoint_blocks(getattr(model, name), checkpointing)
        with torch.device("meta"), _shapes_only():
            patches_BPC, vision = kept_for_backward(model, model.vision, volume_BXYZ)
            queries_BQC, queries = kept_for_backward(model, model.qformer, patches_BPC)
            _, text = kept_for_backward(model, model.qformer.read_text, *record)
            queries_BQC = queries_BQC.repeat_interleave(questions_per_scan, 0)
            _, language = kept_for_backward(model, model.language, queries_BQC, use_queries_B, *prompt, *answer)
        # Two texts a question: record and answer.
        sizes = {"vision": sum(vision), "qformer": sum(queries) + 2 * sum(text), "language": sum(language)}
        kept[checkpointing], largest = sizes, max(largest, *vision, *queries, *text, *language)
    # While the gradient of a checkpointed block is taken, it has everything again, and what followed it is gone.
    block = max((kept[False][name] - kept[True][name]) // max(1, number) for name, number in num_blocks.items())
    # The volume itself, and the gradients on both sides of an operation on the largest tensor; a block made again
    # gives up its own tensors as their gradients come, which leaves one of these.
    workspace = {flag: volume_BXYZ.nbytes + largest + max(largest, block * flag) for flag in kept}
    return {flag: Activations(**sizes, workspace=workspace[flag]) for flag, sizes in kept.items()}


def _checkpoint_blocks(tower: nn.Module, checkpointing: bool) -> int:
    from functools import partial

    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.gradient_checkpointing = checkpointing
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return len(blocks)


def count(module: nn.Module) -> Count:
    """Frozen and trainable parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return Count(sum(n for n, trained in sizes if not trained), sum(n for n, trained in sizes if trained))


def _weight_bytes(engine: dict[str, Any]) -> int:
    return 2 if any(engine.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")) else 4


def divide(engine: dict[str, Any], model: nn.Module, gpus: int, nodes: int) -> dict[str, int]:
    """What a GPU holds besides activations, and what it receives in a step, in bytes, under a DeepSpeed config.

    With F frozen and T trained weights of w bytes on N GPUs: weights w (F + T), divided by N at stage 3; gradients g T,
    at stages 2 and 3 divided by N; AdamW's float32 master and two moments 12 T / N (arXiv 1910.02054, section 3).
    A step sends trained weights only; stage 3 also gathers every weight twice (section 7).
    """
    zero = engine.get("zero_optimization", {})
    stage, ranks, width = zero.get("stage", 0), gpus * nodes, _weight_bytes(engine)
    frozen, trained = count(model)
    everything, others = width * (frozen + trained), (ranks - 1) / ranks
    gradient = {"fp32": 4}.get(engine.get("data_types", {}).get("grad_accum_dtype"), width)
    sent = {"fp32": 4}.get(engine.get("communication_data_type"), width)
    bucket = int(min(trained, zero.get("reduce_bucket_size", 5e8)))
    offload, optimizer_offload = (
        zero.get(f"offload_{what}", {}).get("device", "none") != "none" for what in ("param", "optimizer")
    )
    state = 12 * trained // (ranks if stage else 1)
    weights, from_host, step_copies = everything, 0, 0
    if stage == 3:
        threshold = zero.get("stage3_param_persistence_threshold", 1e5)
        small = sum(p.numel() for p in model.parameters() if p.numel() <= threshold)
        weights = width * small + (0 if offload else everything // ranks)
        gradients = gradient * trained // ranks
        # Gathered weights stay while their next use is near: at most so many. One bucket, cast to be sent.
        live = min(everything, width * int(zero.get("stage3_max_live_parameters", 1e9)))
        buffers = live + width * int(zero.get("stage3_prefetch_bucket_size", 5e7)) + (width + sent) * bucket
        received = (2 * everything + sent * trained) * others
        from_host = 2 * everything // ranks if offload else 0
    elif stage == 2:  # one bucket fills while another, cast, is sent
        gradients, step_copies = gradient * trained // ranks, gradient * trained // ranks
        buffers = (width * (2 if zero.get("overlap_comm") else 1) + sent) * bucket
        received = (sent + width) * trained * others
    else:  # gradients of one micro-step and their sum; flattened all at once after the backward pass
        gradients, step_copies, buffers = (width + gradient) * trained, sent * trained, 0
        received = (2 * sent + width) * trained * others
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer_state": 0 if optimizer_offload else state,
        "communication_buffers": buffers,
        "context": CONTEXT_BYTES,
        "step_copies": step_copies,
        "received_per_step": int(received),
        "from_host_per_step": from_host,
        # Every rank builds the whole model in host memory before it is divided.
        "host_per_node_at_start": gpus * (width * frozen + 4 * trained),
        "host_per_node_in_training": gpus * (everything // ranks * offload + state * optimizer_offload),
        "checkpoint_on_disk": 12 * trained,
    }


ON_GPU = ("weights", "gradients", "optimizer_state", "communication_buffers", "context")


def _peak(share: dict[str, int], kept: int, micro_batch: int, budget: float) -> dict[str, Any]:
    fixed = sum(share[name] for name in ON_GPU)
    peak = fixed + max(kept, share["step_copies"])  # in the step itself the activations are gone
    largest = max(0, int((budget - fixed) * micro_batch // kept)) if fixed + share["step_copies"] <= budget else 0
    return {"activations": kept, "peak": peak, "fits": peak <= budget, "largest_micro_batch": largest}


def _reason(best: str, choices: dict[str, Any], checkpointing: bool) -> str:
    first, choice = next(iter(choices)), choices[best]
    traffic = f"{choice['received_per_step'] / 1e9:.1f} GB received per GPU and step"
    if not choice["fits"]:
        smaller = max(other["largest_micro_batch"] for other in choices.values())
        advice = f"--micro-batch {smaller}, " * (smaller > 0) + "--activation-checkpointing True, " * (
            not checkpointing
        )
        return f"no config fits, {best} comes closest; take {advice}more or larger GPUs"
    if best == first:
        return f"it fits{' and moves least of all' * (len(choices) > 1)} ({traffic})"
    return f"the first that fits; {first} needs {choices[first]['peak'] / 1e9:.1f} GB a GPU ({traffic})"


def _tables(answer: dict[str, Any]) -> str:
    options, model, choices = answer["options"], answer["model"], answer["choices"]
    lines = [
        f"Estimates: preset {options['preset']}, {model['language']} {'with LoRA' if model['lora'] else 'frozen'}, "
        f"{options['size']} voxels a side, {options['nodes']} x {options['gpus']} GPUs of {options['gpu_gb']:g} GB,",
        f"micro-batch {options['micro_batch']}, activation checkpointing "
        f"{'on' if model['activation_checkpointing'] else 'off'}. GB are 1e9 bytes.",
    ]

    def table(title: str, unit: float, columns: dict[str, dict[str, int]], rows) -> None:
        lines.append(f"\n{title:28}" + "".join(f"{Path(column).stem:>15}" for column in columns))
        for row in rows:
            cells = "".join(f"{values[row] / unit:15.2f}" for values in columns.values())
            lines.append(f"{row.replace('_', ' '):28}{cells}")

    parts = answer["parameters"] | {"all": answer["all_parameters"]}
    table("million parameters", 1e6, {kind: {p: parts[p][kind] for p in parts} for kind in Count._fields}, parts)
    table("activations, MB", 1e6, answer["activations"], Activations._fields)
    table("GB per GPU", 1e9, choices, (*ON_GPU, "activations", "peak", "received_per_step", "from_host_per_step"))
    for row in ("fits", "largest_micro_batch"):
        lines.append(f"{row.replace('_', ' '):28}" + "".join(f"{choice[row]!s:>15}" for choice in choices.values()))
    elsewhere = ("host_per_node_at_start", "host_per_node_in_training", "checkpoint_on_disk")
    table("GB elsewhere", 1e9, choices, elsewhere)
    verdict = f"Take {answer['deepspeed_config']}" if answer["fits"] else "Does not fit"
    return "\n".join([*lines, f"\n{verdict}: {answer['reason']}."])
