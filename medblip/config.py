"""What a run is made of: the model's parts, the presets, and the options of `train.py`.

Nothing here imports torch, so `--help` and every check of an option are instant. The DeepSpeed JSON owns ZeRO
stage, offload, precision, clipping and communication; everything else is owned here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

EhrTier = Literal["none", "demographics", "genetics", "cognition", "staging"]
"""How much of the record the model may read; each tier holds the ones before it. `staging` nearly is the label."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The parts of one model. Widths and depths come from the checkpoints, never from here."""

    vision: str
    """Frozen 2-D vision transformer: folder or hub id (BLIP-2), eva_vit_g.pth, or a made tower like `tiny/vision`."""
    qformer: str
    """What the MedQFormer starts from (BLIP-2 with text branch, or BERT), with the text branch's tokenizer."""
    language: str
    """Checkpoint of the language model: any causal or encoder-decoder Hugging Face model."""
    patch_edge: int = 32
    """Edge of a cubic 3-D patch in voxels."""
    patch_init: Literal["inflated", "random"] = "inflated"
    """Start of the 3-D patch and position embeddings: from the 2-D ones, or random as published."""
    qformer_init: Literal["pretrained", "random"] = "pretrained"
    """Start of the MedQFormer: its checkpoint, or random with the checkpoint's sizes and tokenizer."""
    num_queries: int = 32
    """Learned queries, each of which becomes one token for the language model."""
    contrast_width: int = 256
    """Width of the space in which images and texts are contrasted."""
    contrast_temperature: float = 0.07
    """Start of the learned temperature; 1 lets a model that has just been made be unsure."""
    train_final_layernorm: bool = False
    """Train the LayerNorm after the last frozen vision block."""
    lora: bool = True
    """Adapt the language model with LoRA; otherwise it stays as it was published."""
    lora_rank: int = 8
    lora_alpha: int = 16
    """LoRA's update is scaled by alpha / rank."""
    lora_dropout: float = 0.05
    qformer_dropout: float = 0.1
    max_prompt_tokens: int = 256
    """Longest prompt; a longer record loses its left part, the question never does."""
    max_record_tokens: int = 128
    """Longest record or answer in the MedQFormer's text branch."""
    activation_checkpointing: bool = False
    """Recompute the frozen blocks in the backward pass: slower, far less memory."""

    def __post_init__(self) -> None:
        for name in ("patch_edge", "num_queries", "contrast_width", "lora_rank", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and the training settings that suit it."""

    model: ModelConfig
    epochs: int
    global_batch: int
    micro_batch: int
    learning_rate: float
    lora_learning_rate: float
    weight_decay: float
    questions_per_scan: int = 1


_TINY = ModelConfig(
    vision="tiny/vision",
    qformer="tiny/qformer",
    language="tiny/gpt2",
    patch_edge=16,
    patch_init="random",
    contrast_width=64,
    contrast_temperature=1.0,
    train_final_layernorm=True,
    qformer_dropout=0.0,
    max_prompt_tokens=160,
    max_record_tokens=96,
)

_TINY_PRESET = Preset(
    model=_TINY,
    epochs=32,
    global_batch=16,
    micro_batch=8,
    learning_rate=2e-3,
    lora_learning_rate=5e-3,
    weight_decay=0.05,
    questions_per_scan=2,
)

_FULL_PRESET = Preset(
    model=ModelConfig(
        vision="Salesforce/blip2-itm-vit-g", qformer="Salesforce/blip2-itm-vit-g", language="stanford-crfm/BioMedLM"
    ),
    epochs=100,
    global_batch=56,
    micro_batch=7,
    learning_rate=5e-5,  # the published 2e-5 at a batch of 7, times about the square root of 8
    lora_learning_rate=2e-4,
    weight_decay=1e-4,
)


def _with_language(preset: Preset, language: str) -> Preset:
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, language=language))


PRESETS: dict[str, Preset] = {
    "tiny": _TINY_PRESET,
    "tiny-t5": _with_language(_TINY_PRESET, "tiny/t5"),
    "biomedlm": _FULL_PRESET,
    "biogpt": _with_language(_FULL_PRESET, "microsoft/biogpt"),
    "biogpt-large": _with_language(_FULL_PRESET, "microsoft/BioGPT-Large"),
    "flan-t5-xl": _with_language(_FULL_PRESET, "google/flan-t5-xl"),
}
"""`tiny` and `tiny-t5` need no download: their towers are made from a seed on this machine (see towers.py)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train MedBLIP, or go on where `--run` stopped.

    Examples:
      deepspeed train.py --deepspeed_config ds_configs/zero2.json --preset tiny --data shards/ --run runs/x
      torchrun --nproc-per-node 8 -- train.py --deepspeed_config ds_configs/zero2.json --data shards/ --run runs/x
      python train.py --deepspeed_config ds_configs/zero2.json --data shards/ --run runs/x --dry-run 4
    """

    data: str
    """Folder of shards with its index.json, written by `python -m sharding.build`; or its URL (https, s3, ...)."""
    run: str
    """Folder of this run. If it holds a checkpoint, training goes on from it."""
    deepspeed_config: str
    """DeepSpeed JSON: ZeRO stage, offload, precision, clipping, communication. See ds_configs/README.md."""
    preset: str = "tiny"
    """Model and training settings to start from (tiny, tiny-t5, biomedlm, biogpt, biogpt-large, flan-t5-xl)."""
    ehr: EhrTier = "demographics"
    """Fields of the record that the model may read; each tier holds the ones before it."""
    lm: str | None = None
    """Another language model than the preset's: a folder or hub id of any causal or encoder-decoder model."""
    vision: str | None = None
    """Vision tower: folder, fetched hub id, or eva_vit_g.pth. Without it: the preset's."""
    qformer: str | None = None
    """What the MedQFormer starts from: BLIP-2 with text branch, or BERT. Without it: the preset's."""
    qformer_init: Literal["pretrained", "random"] | None = None
    """Random: take only sizes and tokenizer from the MedQFormer's checkpoint. Without it: the preset's."""
    patch_edge: int | None = None
    """Edge of a cubic patch in voxels; must divide the volumes' edge. Without it: the preset's."""
    patch_init: Literal["inflated", "random"] | None = None
    """Start of the 3-D patch and position embeddings: from the 2-D ones, or random. Without it: the preset's."""
    train_final_layernorm: bool | None = None
    """Train the LayerNorm after the frozen vision blocks. Without it: the preset's."""
    activation_checkpointing: bool | None = None
    """Recompute the frozen blocks in the backward pass: slower, far less memory. Without it: the preset's."""
    lora: bool = True
    """Adapt the language model with LoRA, or leave it frozen."""
    steps: int | None = None
    """Optimizer steps. Without it: the preset's epochs."""
    global_batch: int | None = None
    """Samples per optimizer step over all ranks. Without it: the preset's, reduced to fit tiny data."""
    micro_batch: int | None = None
    """Samples per rank and forward pass. Without it: the preset's, reduced to fit the global batch."""
    learning_rate: float | None = None
    """Peak learning rate. Without it: the preset's."""
    lora_learning_rate: float | None = None
    """Peak learning rate of the LoRA matrices, which start at zero and need more. Without it: the preset's."""
    weight_decay: float | None = None
    """AdamW's weight decay on matrices. Without it: the preset's."""
    warmup_fraction: float = 0.1
    """Share of the steps during which the learning rate rises linearly; then it falls as a cosine."""
    dropout: float | None = None
    """Replaces every dropout rate of the trained parts (MedQFormer, LoRA); 0 makes layouts comparable."""
    contrastive: bool = True
    """Train the image-record and image-answer contrast beside the language loss."""
    balance_classes: bool = False
    """Weigh the language loss so that each diagnosis counts the same in total, however many scans it has."""
    balance_subjects: bool = False
    """Weigh the language loss so that each subject counts the same, however many scans it has."""
    augment: bool = True
    """Augmentation on the device: left-right flip, pose, contrast, bias field, noise (augment.py)."""
    record_dropout: float = 0.3
    """Probability that a sample's whole record is left out of the prompt."""
    field_dropout: float = 0.15
    """Probability that one field of a record is left out."""
    query_dropout: float = 0.1
    """Probability that the image's queries are left out of the prompt."""
    questions_per_scan: int | None = None
    """Questions that a scan is asked each time it is read, its image being encoded once. Without it: the preset's."""
    other_questions: float = 0.2
    """Share of the samples with a diagnosis that are asked something else instead: age, sex, MMSE range, ..."""
    seed: int = 0
    """Decides the initial weights, the order of the samples and all that is drawn about them."""
    checkpoint_every: int = 500
    """Steps between checkpoints. Training always ends with one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0: none."""
    step_timeout_s: float = 600.0
    """Longest time for one thing (a micro-step, waiting for data); then the ranks name the culprit and end."""
    max_skipped: float = 0.01
    """Share of the training samples that may be unreadable; one sample always may. More end the run."""
    max_nonfinite: int = 5
    """Steps in a row whose loss or gradient is not finite, which are skipped; one more ends the run."""
    validate_every: int = 0
    """Steps between validations on the split val, whose best checkpoint is kept; 0: none."""
    validate_scans: int = 200
    """Scans of the split val that are used, always the same."""
    best_metric: Literal["balanced_accuracy", "macro_auc", "loss_lm"] = "balanced_accuracy"
    """What the best checkpoint is best in."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    read_threads: int = 2
    """Threads per rank that read and decompress volumes."""
    wandb: str | None = None
    """Project name for Weights & Biases (needs the `wandb` extra; WANDB_MODE=offline works). Off without it."""
    dry_run: int = 0
    """Show this many samples as the model gets them, with pictures, and stop."""
    local_rank: int = -1
    """Given by the DeepSpeed launcher; the environment is what counts."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))
        counts = ("steps", "global_batch", "micro_batch", "checkpoint_every", "keep_checkpoints", "log_every")
        counts += ("max_nonfinite", "step_timeout_s", "validate_scans", "questions_per_scan")
        shares = ("record_dropout", "field_dropout", "query_dropout", "other_questions", "warmup_fraction", "dropout")
        shares += ("max_skipped",)
        for names, fits, rule in (
            (counts, lambda value: value >= 1, "must be at least 1"),
            (shares, lambda value: 0 <= value < 1, "must be in [0, 1)"),
            (
                ("learning_rate", "lora_learning_rate", "weight_decay", "dry_run", "keep_every", "validate_every"),
                lambda value: value >= 0,
                "must not be negative",
            ),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"--{name.replace('_', '-')} {rule}, not {value}")

    def model_config(self) -> ModelConfig:
        """The preset's model with this run's options applied."""
        parts = ("vision", "qformer", "qformer_init", "patch_edge", "patch_init")
        parts += ("train_final_layernorm", "activation_checkpointing")
        given = {part: getattr(self, part) for part in parts if getattr(self, part) is not None}
        model = dataclasses.replace(PRESETS[self.preset].model, lora=self.lora, **given)
        if self.lm is not None:
            model = dataclasses.replace(model, language=self.lm)
        if self.dropout is not None:
            model = dataclasses.replace(model, qformer_dropout=self.dropout, lora_dropout=self.dropout)
        return model


def is_url(folder: str) -> bool:
    """Whether a folder of shards is somewhere else."""
    return "://" in folder


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """An error text for an unknown name, with the nearest right one."""
    nearest = difflib.get_close_matches(value, list(known), n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {what} '{value}'{hint} (known: {', '.join(known)})"
