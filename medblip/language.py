"""The language model: reads a prompt and the image's queries, and answers. Frozen, or adapted with LoRA.

B batch, T prompt tokens, Q queries, S = T + Q prefix, A answer tokens, C query width, E language width. One prefix
serves training, scoring and generation, for decoder-only and encoder-decoder models alike.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from medblip.words import MAX_ANSWER_TOKENS


@dataclass(frozen=True)
class Prefix:
    """What the language model reads before the answer: embeddings `B S E` and their mask (True = read)."""

    embeddings_BSE: Tensor
    is_read_BS: Tensor


class QueryProjection(nn.Linear):
    """Query width C to language width E, at a size at which the language model notices the queries.

    Queries come out at about the size of words where words are large (T5, BioGPT), up to a factor of two. Where words
    are smaller than a plain projection makes them (GPT-2, Llama) nothing is scaled down: the layer norm at the entrance
    of each block takes the size away. A power of two, so that it is exact in every precision; worked out from the
    frozen embedding at each start, never stored. A factor and not a larger initial weight, which Adam would soon undo.
    """

    def __init__(self, width: int, embedding: nn.Module):
        super().__init__(width, embedding.embedding_dim)
        some_ids = torch.arange(0, embedding.num_embeddings, 1 + embedding.num_embeddings // 1000)
        with torch.no_grad():
            # Called, not read: some embeddings scale what they hold.
            words_NE = embedding(some_ids.to(embedding.weight.device)).float()
            word_size = words_NE.square().mean(1).sqrt().median()
            scale = (word_size * 3**0.5).clamp(min=1).log2().floor().exp2()
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, queries_BQC: Tensor) -> Tensor:
        return super().forward(queries_BQC) * self.scale


class Language(nn.Module):
    """A Hugging Face language model behind one interface: prefix, token log-likelihoods, generation."""

    def __init__(self, pretrained: nn.Module, query_width: int, lora: bool, rank: int, alpha: int, dropout: float):
        """
        Args:
            pretrained: a causal or encoder-decoder model. Its dropout and its habits of generation are taken from it.
            query_width: width of the query tokens.
            lora: adapt every linear layer of attention and MLP with LoRA of this `rank`, `alpha` and `dropout`;
                else every weight stays frozen.

        Raises:
            ValueError: if an encoder-decoder does not say with which token its decoder starts.
        """
        from transformers import GenerationConfig
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.is_encoder_decoder = bool(pretrained.config.is_encoder_decoder)
        accepted = inspect.signature(pretrained.forward).parameters
        self.accepts_positions, self.accepts_keep = "position_ids" in accepted, "logits_to_keep" in accepted
        self.start_id = _decoder_start(pretrained) if self.is_encoder_decoder else None
        # Greedy means the most likely token: published models come with repetition penalties, forced tokens and more.
        pretrained.generation_config = GenerationConfig(decoder_start_token_id=self.start_id)
        _without_dropout(pretrained)
        _fuse_gelu(pretrained)
        self.lm = pretrained.requires_grad_(False)
        if lora:
            from peft import LoraConfig, get_peft_model

            self.lm = get_peft_model(
                pretrained,
                LoraConfig(
                    r=rank,
                    lora_alpha=alpha,
                    lora_dropout=dropout,
                    target_modules="all-linear",  # but the output layer
                    fan_in_fan_out=any(isinstance(module, Conv1D) for module in pretrained.modules()),
                ),
                autocast_adapter_dtype=False,  # one dtype in the model: ZeRO-3 cannot gather a mixture
            )
        self.projection = QueryProjection(query_width, pretrained.get_input_embeddings())

    def prefix(self, queries_BQC: Tensor, use_queries_B: Tensor, prompt_ids_BT: Tensor, is_prompt_BT: Tensor) -> Prefix:
        """[prompt, queries] with the padding where it cannot be felt; `prompt_ids_BT` must be padded on the left.

        For a decoder all padding is on the left, so that the answer follows at once; for an encoder-decoder on the
        right, since some encoders count positions from the left end. Queries that are left out (`use_queries_B` is
        False) go to that end and count as padding.
        """
        prompt_BTE = self.lm.get_input_embeddings()(prompt_ids_BT)
        queries_BQE = self.projection(queries_BQC).to(prompt_BTE.dtype)
        num_queries = queries_BQC.shape[1]
        embeddings_BSE = torch.cat([prompt_BTE, queries_BQE], dim=1)
        is_query_BQ = use_queries_B[:, None].expand(-1, num_queries)
        is_read_BS = torch.cat([is_prompt_BT, is_query_BQ], dim=1)
        position_S = torch.arange(is_read_BS.shape[1], device=is_read_BS.device)
        if self.is_encoder_decoder:
            shift_B1 = -(~is_prompt_BT).sum(1, keepdim=True)
        else:
            shift_B1 = torch.where(use_queries_B, 0, num_queries)[:, None]
        source_BS = (position_S[None] - shift_B1) % is_read_BS.shape[1]
        return Prefix(
            embeddings_BSE.gather(1, source_BS[..., None].expand_as(embeddings_BSE)), is_read_BS.gather(1, source_BS)
        )

    def forward(
        self,
        queries_BQC: Tensor,
        use_queries_B: Tensor,
        prompt_ids_BT: Tensor,
        is_prompt_BT: Tensor,
        answer_ids_BA: Tensor,
        is_answer_BA: Tensor,
    ) -> Tensor:
        """Log-likelihood of each answer token given all before it, `B A` in float32; 0 on padding.

        Answers are padded on the right and include the end token.
        """
        prefix = self.prefix(queries_BQC, use_queries_B, prompt_ids_BT, is_prompt_BT)
        logits_BAV = self._logits(prefix, answer_ids_BA, is_answer_BA)
        logp_BA = logits_BAV.float().log_softmax(-1).gather(-1, answer_ids_BA[..., None])[..., 0]
        return logp_BA.masked_fill(~is_answer_BA, 0.0)

    def _logits(self, prefix: Prefix, answer_ids_BA: Tensor, is_answer_BA: Tensor | None = None) -> Tensor:
        """What is expected in the place of each answer token, `B A V`."""
        if is_answer_BA is None:
            is_answer_BA = torch.ones_like(answer_ids_BA, dtype=torch.bool)
        if self.is_encoder_decoder:
            shifted_BA = torch.cat([torch.full_like(answer_ids_BA[:, :1], self.start_id), answer_ids_BA[:, :-1]], dim=1)
            return self.lm(
                inputs_embeds=prefix.embeddings_BSE,
                attention_mask=prefix.is_read_BS.long(),
                decoder_input_ids=shifted_BA,
                use_cache=False,
            ).logits
        answer_BAE = self.lm.get_input_embeddings()(answer_ids_BA)
        mask = torch.cat([prefix.is_read_BS, is_answer_BA], dim=1).long()
        num_scored = answer_ids_BA.shape[1] + 1
        optional = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self.accepts_positions else {}
        optional |= {"logits_to_keep": num_scored} if self.accepts_keep else {}
        return self.lm(
            inputs_embeds=torch.cat([prefix.embeddings_BSE, answer_BAE], dim=1),
            attention_mask=mask,
            use_cache=False,
            **optional,
        ).logits[:, -num_scored:-1]

    @torch.no_grad()
    def score_options(
        self,
        queries_BQC: Tensor,
        use_queries_B: Tensor,
        prompt_ids_BT: Tensor,
        is_prompt_BT: Tensor,
        options: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each option as the whole answer, and whether greedy generation would write just that.

        The prefix is read once: the options go on from its cache (of the decoder, or of the encoder with the decoder's
        first step), all of them at a time. The same numbers as `forward` for each option, to rounding.

        Args:
            queries_BQC: images; `Q` may be 0 where none of them is used.
            use_queries_B: see `prefix`.
            prompt_ids_BT: prompts, padded on the left.
            is_prompt_BT: their mask.
            options: token ids of each option with its end token, `A`; the same for all rows.

        Returns:
            `B O` in float32, and `B O`.
        """
        prefix = self.prefix(queries_BQC, use_queries_B, prompt_ids_BT, is_prompt_BT)
        ids_OA = pad_sequence(options, batch_first=True)
        num_tokens_O = torch.tensor([len(ids_A) for ids_A in options], device=ids_OA.device)
        is_padding_OA = torch.arange(ids_OA.shape[1], device=ids_OA.device) >= num_tokens_O[:, None]
        first = self._read(prefix)
        logits_BOAV = first.logits[:, None, -1:].expand(-1, len(options), -1, -1)
        if ids_OA.shape[1] > 1:
            logits_BOAV = torch.cat([logits_BOAV, self._go_on(prefix, first, ids_OA[:, :-1])], dim=2)
        logits_BOAV = logits_BOAV.float()
        wanted_BOA1 = ids_OA.expand(len(prompt_ids_BT), -1, -1)[..., None]
        logp_BOA = logits_BOAV.log_softmax(-1).gather(-1, wanted_BOA1)[..., 0].masked_fill(is_padding_OA, 0)
        is_written_BO = ((logits_BOAV.argmax(-1) == ids_OA) | is_padding_OA).all(-1)
        return logp_BOA.sum(-1), is_written_BO

    def _read(self, prefix: Prefix):
        """What the model makes of a prefix: the logits of the first answer token, and its cache."""
        mask_BS = prefix.is_read_BS.long()
        if self.is_encoder_decoder:
            start_B1 = torch.full_like(mask_BS[:, :1], self.start_id)
            return self.lm(
                inputs_embeds=prefix.embeddings_BSE, attention_mask=mask_BS, decoder_input_ids=start_B1, use_cache=True
            )
        optional = {"position_ids": (mask_BS.cumsum(1) - 1).clamp(min=0)} if self.accepts_positions else {}
        optional |= {"logits_to_keep": 1} if self.accepts_keep else {}
        return self.lm(inputs_embeds=prefix.embeddings_BSE, attention_mask=mask_BS, use_cache=True, **optional)

    def _go_on(self, prefix: Prefix, first, ids_OA: Tensor) -> Tensor:
        """The logits after each token of each option, `B O A V`, from what `_read` gave, whose cache this uses up."""
        num_rows, num_options = len(prefix.is_read_BS), len(ids_OA)
        is_read_RS = prefix.is_read_BS.repeat_interleave(num_options, 0)  # R: the options of a row, row by row
        ids_RA = ids_OA.repeat(num_rows, 1)
        if first.cache is None or not first.cache.is_croppable:  # recurrent models keep no cache that can be copied
            prefix = Prefix(prefix.embeddings_BSE.repeat_interleave(num_options, 0), is_read_RS)
            logits_RAV = self._logits(prefix, torch.cat([ids_RA, ids_RA[:, :1]], dim=1))[:, 1:]
        else:
            first.cache.batch_repeat_interleave(num_options)
            if self.is_encoder_decoder:
                read = BaseModelOutput(first.encoder_last_hidden_state.repeat_interleave(num_options, 0))
                words = {"encoder_outputs": read, "attention_mask": is_read_RS.long(), "decoder_input_ids": ids_RA}
            else:
                is_read_RS = torch.cat([is_read_RS, torch.ones_like(ids_RA, dtype=torch.bool)], dim=1)
                words = {"input_ids": ids_RA, "attention_mask": is_read_RS.long()}
                if self.accepts_positions:
                    words["position_ids"] = is_read_RS.long().cumsum(1)[:, -ids_RA.shape[1] :] - 1
            logits_RAV = self.lm(**words, cache=first.cache, use_cache=True).logits
        return logits_RAV.unflatten(0, (num_rows, num_options))

    @torch.no_grad()
    def generate(
        self,
        queries_BQC: Tensor,
        use_queries_B: Tensor,
        prompt_ids_BT: Tensor,
        is_prompt_BT: Tensor,
        end_token_id: int,
        pad_token_id: int,
        max_new_tokens: int = MAX_ANSWER_TOKENS,
    ) -> tuple[Tensor, Tensor]:
        """Greedy answers: token ids `B A`, padded on the right, and the log-likelihood of each, `B A`."""
        prefix = self.prefix(queries_BQC, use_queries_B, prompt_ids_BT, is_prompt_BT)
        output = self.lm.generate(
            inputs_embeds=prefix.embeddings_BSE,
            attention_mask=prefix.is_read_BS.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=end_token_id,
            pad_token_id=pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits_BAV = torch.stack(output.logits, dim=1).float()
        answer_ids_BA = output.sequences[:, -logits_BAV.shape[1] :]
        logp_BA = logits_BAV.log_softmax(-1).gather(-1, answer_ids_BA[..., None])[..., 0]
        ended_BA = (answer_ids_BA == end_token_id).cumsum(1)
        is_answer_BA = (ended_BA == 0) | ((ended_BA == 1) & (answer_ids_BA == end_token_id))
        return answer_ids_BA.masked_fill(~is_answer_BA, pad_token_id), logp_BA.masked_fill(~is_answer_BA, 0.0)


def _without_dropout(pretrained: nn.Module) -> None:
    # Rates, not eval(): the library checkpoints activations of modules in training mode only.
    for owner in (pretrained.config, *pretrained.modules()):
        for name, value in vars(owner).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(owner, nn.Dropout))):
                setattr(owner, name, 0.0)


def _fuse_gelu(pretrained: nn.Module) -> None:
    """Puts torch's kernel in the place of GPT-2's and T5's `gelu_new`: the same function within rounding.

    Written out in eight steps it keeps as many tensors for the backward pass, and took a quarter of the forward pass.
    """
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in list(pretrained.modules()):
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation):
                setattr(module, name, GELUTanh())


def _decoder_start(pretrained: nn.Module) -> int:
    for config in (pretrained.config, pretrained.generation_config):
        if getattr(config, "decoder_start_token_id", None) is not None:
            return config.decoder_start_token_id
    raise ValueError(
        f"{pretrained.config.name_or_path}: set decoder_start_token_id in its config.json, the token that an answer's "
        "decoder begins with"
    )
