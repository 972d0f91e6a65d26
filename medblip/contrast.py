"""Which text belongs to which image: the projections and both contrastive terms.

B rows of this rank (several where a scan is asked several questions), Q queries, C width, K contrastive width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medblip.data import Batch
from medblip.losses import centred, contrastive_loss


class Contrast(nn.Module):
    """Projections into the shared space, one temperature, and the two contrastive terms."""

    def __init__(self, width: int, contrast_width: int, temperature: float):
        super().__init__()
        self.image_projection = nn.Linear(width, contrast_width)
        self.record_projection = nn.Linear(width, contrast_width)
        self.statement_projection = nn.Linear(width, contrast_width)
        self.temperature = nn.Parameter(torch.tensor([temperature]))

    def forward(
        self, queries_BQC: Tensor, record_BC: Tensor, statement_BC: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Image-record and image-answer contrast."""
        image_BQK = self.image_projection(queries_BQC)
        terms = (
            (self.record_projection(record_BC), batch.record_groups_BN, batch.is_record_BT[:, 0]),
            (self.statement_projection(statement_BC), batch.statement_groups_BN, batch.is_statement_BT[:, 0]),
        )
        record, statement = (
            contrastive_loss(
                centred(image_BQK, valid_B), centred(text_BK, valid_B), groups_BN, valid_B, self.temperature
            )
            for text_BK, groups_BN, valid_B in terms
        )
        return record, statement
