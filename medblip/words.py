"""Words as token ids: for the language model, and for the MedQFormer's text branch with its own vocabulary.

B samples, T tokens, A answer tokens, N group columns. Masks: True = a token that counts, False = padding.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import torch
from torch import Tensor

from medblip.config import ModelConfig
from medblip.text import DIAGNOSIS_ANSWERS, QUESTIONS, Example, render_prompt, render_statement
from medblip.towers import locate

MAX_ANSWER_TOKENS = 48
"""Longest answer that is generated, and for which the language model's positions leave room."""


class Words:
    """Tokenises examples for the language model and for the MedQFormer's text branch.

    What a language tokenizer puts in front of every text (Llama's `<s>`, OPT's and BioGPT's `</s>`) begins the prompt;
    what it puts behind (T5's `</s>`) stands behind the answer alone. Without a padding token it pads with its end.

    Raises:
        ValueError: if the language tokenizer has no end token.
    """

    def __init__(self, language_tokenizer, text_tokenizer, max_prompt_tokens: int, max_record_tokens: int):
        if language_tokenizer.eos_token_id is None:
            name = language_tokenizer.name_or_path
            raise ValueError(
                f"{name}: the tokenizer has no end token, by which an answer ends: name one as eos_token in its "
                "tokenizer_config.json, one that the model was trained to end with"
            )
        self.language = language_tokenizer
        self.text = text_tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_record_tokens = max_record_tokens
        self.end_id = language_tokenizer.eos_token_id
        self.pad_id = self.end_id if language_tokenizer.pad_token_id is None else language_tokenizer.pad_token_id
        is_special = set(language_tokenizer.all_special_ids).__contains__
        self.start_ids = list(itertools.takewhile(is_special, language_tokenizer("Answer:").input_ids))
        self._lead_ids = self._language("Answer:")

    def prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids `B T` and mask, padded on the left; too long a prompt loses its left part, the record's."""
        room = self.max_prompt_tokens - len(self.start_ids)
        ids = self.language(prompts, add_special_tokens=False).input_ids  # all at once: a call costs more than a text
        return _pad([self.start_ids + some[-room:] for some in ids], self.pad_id, left=True)

    def answers(self, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids `B A` with the end token and mask, padded on the right; an empty answer has no tokens."""
        ids = [self._answer(answer) + [self.end_id] if answer else [] for answer in answers]
        return _pad(ids, self.pad_id, left=False)

    def _answer(self, answer: str) -> list[int]:
        # As it is written after a prompt: some tokenizers drop or double a space at the beginning of a text.
        ids, num_lead = self._language(f"Answer: {answer}"), len(self._lead_ids)
        return ids[num_lead:] if ids[:num_lead] == self._lead_ids else self._language(" " + answer)

    def _language(self, text: str) -> list[int]:
        return self.language(text, add_special_tokens=False).input_ids

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

    def batch(self, examples: list[Example], subjects: list[str], keys: list[str]) -> dict[str, Tensor]:
        """All text fields of a `Batch`, from the examples with the subject and the scan's KEY of each."""
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
        # What is answered about a scan is true of it, whichever question its row asks.
        words["statement_groups_BN"] = torch.tensor(
            [[_hash(f"{e.kind} {e.answer}"), _hash(key)] for e, key in zip(examples, keys, strict=True)]
        )
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

    Raises:
        ValueError: if the language model is of a kind that cannot answer, its tokenizer does not fit or has no
            words, or its positions have no room for a question, the queries and an answer.
    """
    from transformers import AutoConfig, AutoTokenizer

    sources = [locate(source, bundled) for source in (config.language, config.qformer)]
    model = AutoConfig.from_pretrained(sources[0])
    _check_answers(config.language, model)
    language, text = (AutoTokenizer.from_pretrained(source) for source in sources)
    words = Words(language, text, config.max_prompt_tokens, config.max_record_tokens)
    for name, token in (("end", words.end_id), ("padding", words.pad_id)):
        if token >= getattr(model, "vocab_size", token + 1):
            raise ValueError(
                f"{config.language}: the tokenizer's {name} token is {token}, the model has {model.vocab_size} tokens"
            )
    for answer in DIAGNOSIS_ANSWERS.values():
        ids = words._answer(answer)
        if not ids or language.unk_token_id in ids:
            raise ValueError(
                f"{config.language}: its tokenizer has no tokens for '{answer}'; are its files (tokenizer.json, or "
                "vocab.json and merges.txt) beside the weights?"
            )
    num_question = max(
        len(words.start_ids) + len(words._language(render_prompt("", phrase)))
        for question in QUESTIONS.values()
        for phrase in question.wordings
    )
    positions = getattr(model, "max_position_embeddings", None)
    num_answer = 0 if model.is_encoder_decoder else MAX_ANSWER_TOKENS
    if positions is not None:
        words.max_prompt_tokens = min(config.max_prompt_tokens, positions - config.num_queries - num_answer)
    if words.max_prompt_tokens < num_question:
        raise ValueError(
            f"{config.language}: the longest question takes {num_question} tokens, but a prompt may have "
            f"{words.max_prompt_tokens} (max_prompt_tokens {config.max_prompt_tokens}; the model has "
            f"{positions or 'any number of'} positions, of which {config.num_queries} go to the queries and "
            f"{num_answer} to the answer)"
        )
    return words


def _check_answers(source: str, model) -> None:
    """Refuses what AutoModelForCausalLM would load without a word, and what it would refuse with two hundred."""
    from transformers.models.auto import modeling_auto

    kinds = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    (written, *_) = model.architectures or [kinds.get(model.model_type)]
    if model.sub_configs.keys() - {"attn_config", "ffn_config", "encoder", "decoder"}:  # those of MPT, DBRX and T5Gemma
        raise ValueError(f"{source}: {model.model_type} reads more than text; give a language model of its own")
    if written not in kinds.values():
        raise ValueError(
            f"{source}: its config.json says {written}, which is neither a causal nor an encoder-decoder language model"
        )
