"""Words as token ids: for the language model, and for the MedQFormer's text branch with its own vocabulary.

B samples, T tokens, A answer tokens, N group columns. Masks: True = a token that counts, False = padding.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from medblip.config import ModelConfig
from medblip.text import Example, render_statement
from medblip.towers import locate


class Words:
    """Tokenises examples for the language model and for the MedQFormer's text branch."""

    def __init__(self, language_tokenizer, text_tokenizer, max_prompt_tokens: int, max_record_tokens: int):
        self.language = language_tokenizer
        self.text = text_tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_record_tokens = max_record_tokens
        self.end_id = language_tokenizer.eos_token_id
        self.pad_id = self.end_id if language_tokenizer.pad_token_id is None else language_tokenizer.pad_token_id

    def prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids `B T` and mask, padded on the left; too long a prompt loses its left part, the record's."""
        ids = [
            self.language(prompt, add_special_tokens=False).input_ids[-self.max_prompt_tokens :] for prompt in prompts
        ]
        return _pad(ids, self.pad_id, left=True)

    def answers(self, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids `B A` with the end token and mask, padded on the right; an empty answer has no tokens."""
        ids = [
            self.language(" " + answer, add_special_tokens=False).input_ids + [self.end_id] if answer else []
            for answer in answers
        ]
        return _pad(ids, self.pad_id, left=False)

    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids `B T` for the text branch and mask; an empty text has no tokens."""
        ids = [self._text(text) for text in texts]
        return _pad(ids, self.text.pad_token_id, left=False)

    def _text(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self.text(text).input_ids
        # The end of a record holds what the tier adds: cut after the class token.
        return ids if len(ids) <= self.max_record_tokens else ids[:1] + ids[1 - self.max_record_tokens :]

    def batch(self, examples: list[Example], subjects: list[str]) -> dict[str, Tensor]:
        """All text fields of a `Batch`."""
        words = {"use_queries_B": torch.tensor([example.use_queries for example in examples])}
        words["prompt_ids_BT"], words["is_prompt_BT"] = self.prompts([example.prompt for example in examples])
        words["answer_ids_BA"], words["is_answer_BA"] = self.answers([example.answer for example in examples])
        words["record_ids_BT"], words["is_record_BT"] = self.texts([example.record_text for example in examples])
        words["statement_ids_BT"], words["is_statement_BT"] = self.texts(
            [render_statement(example.question, example.answer) if example.answer else "" for example in examples]
        )
        words["record_groups_BN"] = torch.tensor(
            [[_hash(example.record_text), _hash(subject)] for example, subject in zip(examples, subjects, strict=True)]
        )
        words["statement_groups_BN"] = torch.tensor([[_hash(f"{e.kind} {e.answer}")] for e in examples])
        return words


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _pad(ids: list[list[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    longest = max(1, max(map(len, ids)))
    padded = torch.full((len(ids), longest), pad_id)
    mask = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        where = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
        padded[row, where] = torch.tensor(tokens, dtype=torch.long)
        mask[row, where] = True
    return padded, mask


def build_words(config: ModelConfig, bundled: Path | None = None) -> Words:
    """The tokenisers that belong to a model's towers.

    Args:
        config: the model's parts.
        bundled: folder of an exported model that holds its own towers.
    """
    from transformers import AutoTokenizer

    language, text = (AutoTokenizer.from_pretrained(locate(s, bundled)) for s in (config.language, config.qformer))
    return Words(language, text, config.max_prompt_tokens, config.max_record_tokens)
