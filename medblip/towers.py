"""Checkpoints of the three pretrained parts: found, made (tiny) and fingerprinted.

A tower is a checkpoint folder, LAVIS's eva_vit_g.pth, or a hub id that `medblip fetch` has brought into the cache:
training itself never asks the network. The names `tiny/vision`, `tiny/qformer`, `tiny/gpt2` and `tiny/t5` stand for
small towers that are made on this machine, once, from a seed and the wording of text.py, never from anybody's
records: so that the whole way runs on a CPU without a download. They are kept under `MEDBLIP_HOME` (default
`~/.cache/medblip`) in a folder named by the hash of their recipe, and are then read like any other checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from medblip import lessons
from medblip.config import PRESETS, unknown
from medblip.distributed import locked, log, log_to_stderr

TINY = {
    "version": 2,  # grows when the same settings and texts make other towers
    "seed": 0,
    "corpus_texts": 5000,
    "vocabulary": 1024,
    "language_steps": {"gpt2": 400, "t5": 300},
    "language_batch": 16,
    "vision": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "initializer_range": 0.2,
        "qkv_bias": True,
    },
    "qformer": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "cross_attention_frequency": 1,
        "encoder_hidden_size": 96,
        "initializer_range": 0.1,
        "max_position_embeddings": 128,
    },
    # The weights start larger than GPT-2's 0.02, with which reading a number takes twice the steps.
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.06},
    "t5": {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4},
}


def home() -> Path:
    """Where made towers are kept: `MEDBLIP_HOME`, else `~/.cache/medblip`."""
    return Path(os.environ.get("MEDBLIP_HOME", "~/.cache/medblip")).expanduser()


def hub_cache() -> Path | None:
    """The cache of hub checkpoints: `MEDBLIP_HOME/hub`, unless `HF_HOME` or `HF_HUB_CACHE` names one (then None)."""
    named = {"HF_HOME", "HF_HUB_CACHE"} & os.environ.keys()
    return home() / "hub" if "MEDBLIP_HOME" in os.environ and not named else None


def locate(source: str, bundled: Path | None = None) -> str:
    """Turns a tower's name into a folder or file on this machine, making a tiny tower where needed.

    Args:
        source: a checkpoint folder or file, a hub id, or `tiny/NAME`.
        bundled: folder of an exported model that may hold the tower itself.

    Raises:
        ValueError: for a tiny tower that does not exist, and for a hub id that is not in the cache.
    """
    if bundled is not None and (bundled / "towers" / source).is_dir():
        return str(bundled / "towers" / source)
    if source.startswith("tiny/"):
        return str(make_tiny(source.removeprefix("tiny/")))
    if Path(source).expanduser().exists():
        return str(Path(source).expanduser())
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(source, "config.json", cache_dir=hub_cache())
    except HFValidationError:
        raise ValueError(f"{source}: no such folder or file") from None
    if not isinstance(config, str):
        raise ValueError(
            f"{source}: no such folder, and not in the cache {hub_cache() or constants.HF_HUB_CACHE}: "
            f"where there is a network, run `{fetch_command(source)}` with the same MEDBLIP_HOME or HF_HOME"
        )
    return str(Path(config).parent)


def fetch_command(source: str) -> str:
    """What brings a hub checkpoint into the cache."""
    for name, preset in PRESETS.items():
        if source in (preset.model.vision, preset.model.qformer, preset.model.language):
            return f"medblip fetch --preset {name}"
    return f"medblip fetch --source {source}"


def hub_id(located: str) -> tuple[str, str] | None:
    """Hub id and commit of a checkpoint from the hub's cache; None for any other."""
    found = re.search(r"models--([^/]+)/snapshots/([^/]+)/?$", located)
    return (found[1].replace("--", "/"), found[2]) if found else None


def describe(located: str) -> str:
    """A checkpoint for people: `ID at COMMIT` from the hub, `PATH (folder)` or `PATH (file)`."""
    return " at ".join(hub_id(located) or (f"{located} ({'folder' if Path(located).is_dir() else 'file'})",))


def fetch_again(located: str) -> str:
    """The end of an error about a checkpoint with files missing."""
    return f": run `{fetch_command(hub_id(located)[0])}` again" if hub_id(located) else ""


def make_tiny(name: str) -> Path:
    """The folder of one tiny tower; made first if it is not there yet (up to a minute)."""
    if name not in MAKERS:
        raise ValueError(unknown("tiny tower", name, MAKERS))
    recipe = json.dumps([TINY, _corpus().texts()], sort_keys=True)
    folder = home() / f"tiny-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}" / name
    if folder.exists():
        return folder
    with locked(folder.with_name(f".{name}.lock")):
        if not folder.exists():
            log.info("making the tower tiny/%s in %s (once)", name, folder)
            unfinished = folder.with_name(f".{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            # A process of its own: transformers saves on global rank 0 only, and the caller's random state stays.
            ranks = {variable for variable in os.environ if variable.endswith("RANK") or variable.startswith("SLURM_")}
            alone = {variable: value for variable, value in os.environ.items() if variable not in ranks}
            subprocess.run([sys.executable, "-m", "medblip.towers", name, str(unfinished)], env=alone, check=True)
            os.replace(unfinished, folder)
    return folder


@functools.cache
def _corpus() -> lessons.Corpus:
    return lessons.draw_corpus(TINY["seed"], TINY["corpus_texts"])


def _make_vision(folder: Path) -> None:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    Blip2VisionModel(Blip2VisionConfig(**TINY["vision"])).save_pretrained(folder)


def _make_qformer(folder: Path) -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    tokenizer = _tokenizer(pad="[PAD]", end="[SEP]", start="[CLS]", append_end=True)
    config = Blip2QFormerConfig(
        **TINY["qformer"],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_qformer_text_input=True,
    )
    Blip2QFormerModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_gpt2(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _tokenizer(pad="<|pad|>", end="<|end|>")
    config = GPT2Config(
        **TINY["gpt2"],
        vocab_size=len(tokenizer),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_taught(GPT2LMHeadModel(config), tokenizer, folder)


def _make_t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer(pad="<pad>", end="</s>", append_end=True)
    config = T5Config(
        **TINY["t5"],
        vocab_size=len(tokenizer),
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    _save_taught(T5ForConditionalGeneration(config), tokenizer, folder)


def _save_taught(model, tokenizer, folder: Path) -> None:
    steps = TINY["language_steps"][model.config.model_type]
    loss = lessons.teach(model, tokenizer, _corpus(), TINY["seed"], steps, TINY["language_batch"])
    log.info("  taught the wording to %s: loss %.3f in the end", type(model).__name__, loss)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MAKERS = {"vision": _make_vision, "qformer": _make_qformer, "gpt2": _make_gpt2, "t5": _make_t5}


def _tokenizer(pad: str, end: str, start: str = "", append_end: bool = False):
    """A byte-level BPE of the corpus in which every number below 100 is one token, as in published vocabularies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (pad, end, start) if token]
    texts = _corpus().texts()
    numbers = " ".join(map(str, range(100)))
    tokenizer.train_from_iterator(
        itertools.chain(texts, [numbers] * len(texts)),
        trainers.BpeTrainer(
            vocab_size=TINY["vocabulary"],
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if append_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}".strip(),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
        )
    names = {"pad_token": pad, "eos_token": end}
    if start:
        names |= {"cls_token": start, "sep_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def fingerprint(module: torch.nn.Module) -> str:
    """First 16 hex digits of sha256 over names, shapes and bf16 values of a module's parameters.

    bf16, because that is how frozen weights are held whatever the checkpoint's own precision.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().data)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    log_to_stderr(0)
    torch.manual_seed(TINY["seed"])
    torch.set_num_threads(1)
    MAKERS[sys.argv[1]](Path(sys.argv[2]))
