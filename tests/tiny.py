"""The tiny models, loaded once a session, and batches without files for them."""

import copy
import functools

import torch

from medblip.config import ModelConfig, TrainConfig
from medblip.data import Batch
from medblip.model import MedBLIP
from medblip.text import Example, render_prompt
from medblip.words import Words, build_words

GRID = 48
"""27 patches of 16 voxels a side."""
PRESETS = ("tiny", "tiny-t5")


def model_config(preset: str, lora: bool = True) -> ModelConfig:
    """The preset's model without dropout."""
    return TrainConfig(data="", run="", deepspeed_config="", preset=preset, lora=lora, dropout=0.0).model_config()


@functools.cache
def _loaded(preset: str, lora: bool) -> MedBLIP:
    torch.manual_seed(7)
    return MedBLIP(model_config(preset, lora), GRID, torch.device("cpu"))


def tiny_model(preset: str, lora: bool = True) -> MedBLIP:
    """A copy of its own, the same bits each time."""
    return copy.deepcopy(_loaded(preset, lora))


@functools.cache
def tiny_words(preset: str) -> Words:
    return build_words(model_config(preset))


def wake_lora(module: torch.nn.Module) -> None:
    """Makes LoRA matter: as it starts, one of its two factors is zero."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def example(record: str, answer: str, question: str = "What will this subject be diagnosed with?", queries=True):
    return Example(render_prompt(record, question), "diagnosis", question, answer, record, queries)


EXAMPLES = (
    (example("The age is 71 years.", "Dementia"), "p0"),
    (example("", "Not demented"), "p1"),  # no record: left out of one contrast
    (example("The age is 66 years. The sex is female.", "mild cognitive impairment (MCI)"), "p2"),
    (example("The age is 71 years.", "", queries=False), "p3"),  # no answer, and p0's very record
    (example("The sex is male.", "Not demented", queries=False), "p2"),  # p2's second scan
    (example("The education is 12 years. The sex is male. The age is 80 years.", "Dementia"), "p5"),
)
"""Six samples with everything uneven: lengths, missing records and answers, texts and subjects seen twice."""


def make_batch(words: Words, first: int = 0, last: int = len(EXAMPLES)) -> Batch:
    """A slice of EXAMPLES, each with a volume that depends on its number alone."""
    rows = range(first, last)
    volume_BXYZ = torch.stack(
        [torch.randn(GRID, GRID, GRID, generator=torch.Generator().manual_seed(row)) for row in rows]
    )
    examples, subjects = zip(*EXAMPLES[first:last], strict=True)
    keys = [f"key{row}" for row in rows]
    texts = words.batch(list(examples), list(subjects), keys)
    return Batch(keys=keys, volume_BXYZ=volume_BXYZ, **texts)
