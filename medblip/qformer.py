"""The MedQFormer: learned queries that read the patches, and a text branch with the same self-attention.

B batch, P patches, Q queries, T text tokens, C width. Source: BLIP-2 (arXiv 2301.12597, section 3.1), here on
transformers' Blip2QFormerModel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings


class MedQFormer(nn.Module):
    """Compresses patch features into Q tokens, and texts into one vector each; all of it is trained."""

    def __init__(self, pretrained: Blip2QFormerModel, vision_width: int, num_queries: int):
        """
        Args:
            pretrained: a Q-Former with the text branch.
            vision_width: width of the patch features, which the cross-attention must read.
            num_queries: learned queries.

        Raises:
            ValueError: if the checkpoint has no text branch, or reads another width.
        """
        super().__init__()
        config = pretrained.config
        if not config.use_qformer_text_input:
            raise ValueError("the Q-Former checkpoint has no text branch (use_qformer_text_input is false)")
        if config.encoder_hidden_size != vision_width:
            raise ValueError(
                f"the Q-Former reads patches of width {config.encoder_hidden_size}, "
                f"but the vision tower gives {vision_width}"
            )
        self.transformer = pretrained
        self.text_embedding = Blip2TextEmbeddings(config)
        nn.init.normal_(self.text_embedding.word_embeddings.weight, std=config.initializer_range)
        nn.init.normal_(self.text_embedding.position_embeddings.weight, std=config.initializer_range)
        self.queries = nn.Parameter(torch.empty(1, num_queries, config.hidden_size))
        nn.init.normal_(self.queries, std=config.initializer_range)

    @property
    def width(self) -> int:
        """Width C of the query tokens."""
        return self.queries.shape[-1]

    def forward(self, patches_BPC: Tensor) -> Tensor:
        """Query tokens of the images, `B P C` to `B Q C`."""
        queries_BQC = self.queries.expand(len(patches_BPC), -1, -1)
        return self.transformer(query_embeds=queries_BQC, encoder_hidden_states=patches_BPC).last_hidden_state

    def read_text(self, token_ids_BT: Tensor, is_token_BT: Tensor) -> Tensor:
        """The first token's output for each text, `B T` to `B C`. True in the mask means a token, not padding.

        A text without tokens gives a finite output that means nothing.
        """
        embeddings_BTC = self.text_embedding(token_ids_BT)
        is_first_BT = torch.zeros_like(is_token_BT)
        is_first_BT[:, 0] = True  # attention over nothing at all would be NaN
        attended_BT = is_token_BT | is_first_BT
        output = self.transformer(query_embeds=embeddings_BTC, query_length=0, attention_mask=attended_BT)
        return output.last_hidden_state[:, 0]
