"""Checkpoints of random weights in the layouts in which the real ones are published; only the widths are small."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    PreTrainedTokenizerFast,
)

VISION = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=60)
QFORMER = TEXT | dict(max_position_embeddings=160, encoder_hidden_size=24, use_qformer_text_input=True)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "the", "age", "is", "years", "sex", "male", "female", "dementia"]


def randomise(model: torch.nn.Module, std: float = 0.3) -> None:
    """Every weight and bias matters: none starts at zero or one."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=draw))
        for name, bias in model.named_parameters():
            if name.endswith("qkv.bias"):  # as published: no bias on the keys
                bias.view(3, -1)[1] = 0


def save(model, folder) -> dict[str, torch.Tensor]:
    """Config and one model.safetensors; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def shard(folder, kind: str) -> list[str]:
    """Turns model.safetensors into two shards with an index, or (`bin`) into what torch.save writes; the new files."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        return ["pytorch_model.bin"]
    stem, end = ("model", "safetensors") if kind == "safetensors shards" else ("pytorch_model", "bin")
    files, names = [f"{stem}-0000{number}-of-00002.{end}" for number in (1, 2)], sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        tensors = {name: weights[name] for name in half}
        save_file(tensors, folder / file, {"format": "pt"}) if end == "safetensors" else torch.save(
            tensors, folder / file
        )
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


def bert_tokenizer(folder) -> None:
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def blip2(folder, vision=VISION, qformer=QFORMER, num_query_tokens: int = 5, image_text_hidden_size: int = 16):
    """Like Salesforce/blip2-itm-vit-g: vision tower, Q-Former with text branch, text embedding, heads, tokenizer."""
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8).to_dict(),
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=image_text_hidden_size,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    randomise(model)
    save(model, folder)
    bert_tokenizer(folder)
    return model


def bert(folder):
    """Like bert-base-uncased: pre-training heads, and LayerNorms that call their weights gamma and beta."""
    model = BertForPreTraining(BertConfig(**TEXT, max_position_embeddings=64)).eval()
    randomise(model)
    weights = save(model, folder)
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bert_tokenizer(folder)
    return model


def eva_vit_g(path, num_blocks: int = 40, width: int = 176, mlp: int = 32, patch: int = 14, side: int = 4):
    """Like LAVIS's eva_vit_g.pth: 40 blocks, biases of queries and values apart, no bias of keys, no last norm."""
    draw = torch.Generator().manual_seed(6)
    sizes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width)}
    sizes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for number in range(num_blocks):
        sizes |= {
            f"blocks.{number}.{name}": size
            for name, size in {
                "norm1.weight": (width,),
                "norm1.bias": (width,),
                "attn.q_bias": (width,),
                "attn.v_bias": (width,),
                "attn.qkv.weight": (3 * width, width),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "norm2.weight": (width,),
                "norm2.bias": (width,),
                "mlp.fc1.weight": (mlp, width),
                "mlp.fc1.bias": (mlp,),
                "mlp.fc2.weight": (width, mlp),
                "mlp.fc2.bias": (width,),
            }.items()
        }
    weights = {name: 0.1 * torch.randn(size, generator=draw) for name, size in sizes.items()}
    torch.save(weights, path)
    return weights


def gpt2(folder):
    """Like stanford-crfm/BioMedLM: GPT-2 with its tokenizer, which has an end but no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.trainers import BpeTrainer

    trainer = BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(WORDS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=1024, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    save(model, folder)
    return model
