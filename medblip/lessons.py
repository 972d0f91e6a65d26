"""What the tiny language models are taught: this project's wording, and to find an answer in a hint or in a record.

B rows, T prompt tokens, Q hint vectors, S = T + Q, A tokens after it, E width.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from medblip import text

NUM_HINTS = 8
"""Vectors in the queries' place; fewer than the queries, which is faster and taught no worse."""


@dataclass(frozen=True)
class Corpus:
    """Made-up texts, see text.py: (hint, prompt, answer), and (record, [(question, answer), ...])."""

    hinted: list[tuple[str, str, str]]
    records: list[tuple[str, list[tuple[str, str]]]]

    def texts(self) -> list[str]:
        """All of it as plain text, for tokenizers."""
        records = (f"{record} {' '.join(' '.join(pair) for pair in asked)}" for record, asked in self.records)
        return [*(" ".join(texts) for texts in self.hinted), *records]


def draw_corpus(seed: int, num_texts: int) -> Corpus:
    """`num_texts` texts of each kind."""
    draw = random.Random(seed)
    hinted = [text.hinted_text(draw) for _ in range(num_texts)]
    return Corpus(hinted, [text.reading_text(draw) for _ in range(num_texts)])


def teach(model, tokenizer, corpus: Corpus, seed: int, steps: int, size: int) -> float:
    """Teaches the wording and two ways to find an answer; returns the last loss, which is on answers alone.

    Two steps of three from the record, in which the answer stands: so it learns to look a field up and to read numbers.
    The third from a hint that stands where the image's queries will stand: vectors of the queries' size, of noise and,
    with it, more or less of the answer's mean word. So it learns to weigh many faint hints, which words do not teach.

    Args:
        model: fresh, causal or encoder-decoder; changed in place.
        tokenizer: its own, with a padding and an end token.
        corpus: what is taught.
        seed: of what is drawn.
        steps: of the optimizer.
        size: texts in a step.
    """
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    _order_numbers(model.get_input_embeddings(), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    records = _record_rows(corpus.records, tokenizer, model.config.is_encoder_decoder)
    # Some records beside the hints, so that queries that say nothing do not keep the model from reading.
    hinted = _hinted_rows(corpus, tokenizer) + _record_rows(corpus.records[::4], tokenizer, True)
    batches: list[list[_Row]] = []
    model.train()
    for step in range(steps):
        if step % 3 == 2:
            if not batches:  # rows of one length in a batch: little padding
                some = sorted(draw.sample(hinted, 16 * size), key=lambda row: len(row.prompt))
                batches = [some[at : at + size] for at in range(0, len(some), size)]
                draw.shuffle(batches)
            loss = _lesson_loss(model, batches.pop(), tokenizer.pad_token_id, noise)
        else:
            loss = _lesson_loss(model, draw.sample(records, size), tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


@dataclass(frozen=True)
class _Row:
    """A lesson: token ids of what is read first, of the hint (if any), and of what follows; -100: no loss there."""

    prompt: list[int]
    hint: list[int]
    rest: list[int]
    labels: list[int]


def _hinted_rows(corpus: Corpus, tokenizer) -> list[_Row]:
    rows = []
    for hint, prompt, answer in corpus.hinted:
        answer_ids = _ids(tokenizer, f" {answer}") + [tokenizer.eos_token_id]
        rows.append(_Row(_ids(tokenizer, prompt), _ids(tokenizer, hint), answer_ids, answer_ids))
    return rows


def _record_rows(records: list[tuple[str, list]], tokenizer, one_question: bool) -> list[_Row]:
    """A decoder reads the record once and then answers one question after the other."""
    rows = []
    for record, asked in records:
        questions = [_ids(tokenizer, f" {text.render_prompt('', question)}") for question, _ in asked]
        answers = [_ids(tokenizer, f" {answer}") + [tokenizer.eos_token_id] for _, answer in asked]
        record_ids = _ids(tokenizer, record)
        if one_question:
            rows.append(_Row(record_ids + questions[0], [], answers[0], answers[0]))
            continue
        rest, labels = [], []
        for question, answer in zip(questions, answers, strict=True):
            rest += question + answer
            labels += [-100] * len(question) + answer
        rows.append(_Row(record_ids, [], rest, labels))
    return rows


def _ids(tokenizer, words: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(words, add_special_tokens=False).ids  # ten times faster than the wrapper


def _lesson_loss(model, rows: list[_Row], pad_id: int, noise: torch.Generator | None = None) -> torch.Tensor:
    prompt_ids_BT = _padded([row.prompt for row in rows], pad_id, left=True)
    rest_ids_BA = _padded([row.rest for row in rows], pad_id)
    labels_BA = _padded([row.labels for row in rows], -100)
    embed = model.get_input_embeddings()
    embeddings_BSE, is_read_BS = embed(prompt_ids_BT), prompt_ids_BT != pad_id
    if noise is not None:
        hint_BQE = _hints(embed, [row.hint for row in rows], noise)
        embeddings_BSE = torch.cat([embeddings_BSE, hint_BQE], dim=1)
        is_read_B = torch.tensor([bool(row.hint) for row in rows]) | (torch.rand(len(rows), generator=noise) < 0.5)
        is_read_BS = torch.cat([is_read_BS, is_read_B[:, None].expand(hint_BQE.shape[:2])], dim=1)
    if model.config.is_encoder_decoder:
        return model(inputs_embeds=embeddings_BSE, attention_mask=is_read_BS.long(), labels=labels_BA).loss
    is_read_BS = torch.cat([is_read_BS, rest_ids_BA != pad_id], dim=1)
    hidden_BSE = model.base_model(
        inputs_embeds=torch.cat([embeddings_BSE, embed(rest_ids_BA)], dim=1),
        attention_mask=is_read_BS.long(),
        position_ids=(is_read_BS.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    is_label_BA = labels_BA != -100
    before_NE = hidden_BSE[:, -labels_BA.shape[1] - 1 : -1][is_label_BA]  # logits where an answer is expected only
    return torch.nn.functional.cross_entropy(model.get_output_embeddings()(before_NE), labels_BA[is_label_BA])


def _hints(embed: torch.nn.Embedding, hints: list[list[int]], noise: torch.Generator) -> torch.Tensor:
    """What stands for the queries, `B Q E`: noise of each vector, noise that they share, and the hint's mean word."""
    with torch.no_grad():
        size = embed.weight.square().mean().sqrt().clamp(min=0.5)  # a fresh projection's queries are not smaller
        shape = (len(hints), NUM_HINTS, embed.embedding_dim)
        vectors_BQE = torch.randn(shape, generator=noise) + torch.randn(shape, generator=noise)[:, :1]
        for row, ids in enumerate(hints):
            if ids:
                word_E = embed.weight[ids].mean(0)
                vectors_BQE[row] += torch.rand(1, generator=noise) * word_E / word_E.square().mean().sqrt()
        return vectors_BQE * size / 2**0.5


def _padded(ids: list[list[int]], pad_id: int, left: bool = False) -> torch.Tensor:
    side = "left" if left else "right"
    return pad_sequence([torch.tensor(row) for row in ids], True, pad_id, side)


def _order_numbers(embedding: torch.nn.Embedding, tokenizer) -> None:
    """Lets the embeddings of the numbers 0 to 99 change smoothly with the number, as those of published models do.

    A model that is taught for a minute has no other way to know that 23 lies between 22 and 24. Source: published
    models hold numbers as Fourier features (arXiv 2406.03445).
    """
    periods_F = torch.tensor([200, 100, 50, 25, 12.5, 6.25, 4, 3])
    sizes_F = torch.tensor([2, 1.5, 1, 0.7, 0.5, 0.4, 0.3, 0.3])
    number_N1 = torch.arange(100.0)[:, None]
    angles_NF = 2 * math.pi * number_N1 / periods_F
    features_NF = torch.cat([3 * (number_N1 / 50 - 1), angles_NF.sin() * sizes_F, angles_NF.cos() * sizes_F], dim=1)
    ordered_NE = features_NF @ torch.randn(features_NF.shape[1], embedding.embedding_dim)
    with torch.no_grad():
        ordered_NE *= embedding.weight.std() / ordered_NE.std()
        for number in range(100):
            for token in (f"{number}", f"Ġ{number}"):  # in the vocabulary, Ġ is a space
                if token in tokenizer.vocab:
                    embedding.weight[tokenizer.vocab[token]] += ordered_NE[number]
