"""MedBLIP whole: volume -> vision tower -> MedQFormer -> language model, with the contrast beside it.

B samples of this rank, X Y Z voxels (RAS+), P patches, Q queries, C width, T prompt tokens, A answer tokens.
Source: arXiv 2305.10799, whose loss is that of one rank with all texts distinct, but for the centred contrast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medblip import pretrained, towers
from medblip.config import ModelConfig
from medblip.contrast import Contrast
from medblip.data import Batch
from medblip.language import Language
from medblip.losses import language_loss
from medblip.qformer import MedQFormer
from medblip.vision import VisionTower


class MedBLIP(nn.Module):
    """The model as one module tree: `vision`, `qformer`, `contrast`, `language`."""

    def __init__(
        self,
        config: ModelConfig,
        grid_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        bundled=None,
    ):
        """
        Args:
            config: the parts.
            grid_size: voxels along each edge of a volume, from the shards' recipe.
            device: where it will run, which decides the attention kernel.
            dtype: of the pretrained weights; bf16 halves what each rank holds while it starts.
            bundled: folder of an exported model that holds its own towers.

        Raises:
            ValueError: if the parts do not fit together.
        """
        super().__init__()
        vision, qformer, language = (
            towers.locate(source, bundled) for source in (config.vision, config.qformer, config.language)
        )
        attention = {name: resolve_attention(name, device) for name in ("vision", "qformer", "language")}
        tower = pretrained.load_vision(vision, dtype, attention["vision"])
        self.vision = VisionTower(
            tower, grid_size, config.patch_edge, config.train_final_layernorm, config.patch_init == "inflated"
        )
        transformer, beside = pretrained.load_qformer(
            qformer, config.qformer_init == "random", self.vision.width, attention["qformer"], config.qformer_dropout
        )
        self.qformer = MedQFormer(transformer, self.vision.width, config.num_queries)
        self.contrast = Contrast(self.qformer.width, config.contrast_width, config.contrast_temperature)
        pretrained.place(self, beside, qformer)
        lm = pretrained.load_language(language, dtype, attention["language"])
        self.language = Language(
            lm, self.qformer.width, config.lora, config.lora_rank, config.lora_alpha, config.lora_dropout
        )
        if config.activation_checkpointing:
            tower.activation_checkpointing_enable()
            lm.activation_checkpointing_enable()
        self.attention = attention

    def forward(self, batch: Batch, contrastive: bool = True) -> dict[str, Tensor]:
        """Losses of a micro-batch: `loss` = `loss_itc` (image-record + image-answer) + `loss_lm`."""
        queries_BQC = self.qformer(self.vision(batch.volume_BXYZ))
        queries_BQC = queries_BQC.repeat_interleave(len(batch.prompt_ids_BT) // len(queries_BQC), 0)
        logp_BA = self.language(
            queries_BQC,
            batch.use_queries_B,
            batch.prompt_ids_BT,
            batch.is_prompt_BT,
            batch.answer_ids_BA,
            batch.is_answer_BA,
        )
        loss_lm = language_loss(logp_BA, batch.is_answer_BA, batch.weight_B)
        if not contrastive:
            return {"loss": loss_lm, "loss_lm": loss_lm, "loss_itc": torch.zeros_like(loss_lm)}
        record_BC = self.qformer.read_text(batch.record_ids_BT, batch.is_record_BT)
        statement_BC = self.qformer.read_text(batch.statement_ids_BT, batch.is_statement_BT)
        record, statement = self.contrast(queries_BQC, record_BC, statement_BC, batch)
        return {
            "loss": loss_lm + record + statement,
            "loss_lm": loss_lm,
            "loss_itc": record + statement,
            "loss_itc_record": record,
            "loss_itc_answer": statement,
        }

    def frozen_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the towers as they came, by which a checkpoint knows what it was trained on."""
        lm = self.language.lm
        base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        frozen = {"vision": self.vision, "language": base}
        return {name: towers.fingerprint(_Frozen(module)) for name, module in frozen.items()}


class _Frozen:
    """A module's frozen parameters under the names they had before LoRA wrapped them."""

    def __init__(self, module: nn.Module):
        self.module = module

    def named_parameters(self):
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                yield name.replace(".base_layer.", "."), parameter


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def resolve_attention(part: str, device: torch.device) -> str:
    """The fastest attention kernel for a part: flash-attn where it is installed and possible, else SDPA.

    On a CPU the explicit product is fastest: SDPA's bf16 backward is several times slower there.
    """
    if device.type == "cpu":
        return "eager"
    from transformers.utils import is_flash_attn_2_available

    has_kernel = (
        part != "qformer" and is_flash_attn_2_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    return "flash_attention_2" if has_kernel else "sdpa"
