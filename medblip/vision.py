"""A frozen 2-D vision transformer that reads volumes: only its patch and position embeddings are new, and 3-D.

B batch, X Y Z voxels (RAS+), P patches, C width. The gradient passes through the frozen blocks to the embedding.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import Blip2VisionModel


class VisionTower(nn.Module):
    """Volume to patch features, `B X Y Z` to `B 1+P C`.

    Source: arXiv 2305.10799, section 3 (3-D patch and position embedding before a frozen EVA-ViT).
    """

    def __init__(self, pretrained: Blip2VisionModel, grid_size: int, patch_edge: int, train_final_layernorm: bool):
        """
        Args:
            pretrained: the 2-D tower; its own patch and position embeddings are not used.
            grid_size: voxels along each edge of a volume.
            patch_edge: voxels along each edge of a patch; must divide `grid_size`.
            train_final_layernorm: whether the LayerNorm after the blocks is trained.

        Raises:
            ValueError: if the patch edge does not divide the grid.
        """
        super().__init__()
        if grid_size % patch_edge:
            raise ValueError(
                f"volumes of {grid_size} voxels a side cannot be cut into patches of {patch_edge}: "
                f"build shards with --size {grid_size // patch_edge * patch_edge or patch_edge}"
            )
        width = pretrained.config.hidden_size
        self.patch_edge = patch_edge
        self.encoder = pretrained.encoder.requires_grad_(False)
        self.class_embedding = nn.Parameter(pretrained.embeddings.class_embedding.data.clone(), requires_grad=False)
        self.final_layernorm = pretrained.post_layernorm.requires_grad_(train_final_layernorm)
        # A linear layer on flattened patches is the 3-D convolution with kernel = stride, and faster on a CPU.
        self.patch_embedding = nn.Linear(patch_edge**3, width)
        num_patches = (grid_size // patch_edge) ** 3
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + num_patches, width))
        nn.init.trunc_normal_(self.position_embedding, std=0.02)

    @property
    def width(self) -> int:
        """Width C of the patch features."""
        return self.patch_embedding.out_features

    def forward(self, volume_BXYZ: Tensor) -> Tensor:
        """Features of the class token and the patches; patches run along X, then Y, then Z fastest."""
        edge = self.patch_edge
        voxels_BPV = rearrange(volume_BXYZ, "b (x i) (y j) (z k) -> b (x y z) (i j k)", i=edge, j=edge, k=edge)
        patches_BPC = self.patch_embedding(voxels_BPV)
        class_B1C = self.class_embedding.expand(len(patches_BPC), -1, -1)
        tokens_BPC = torch.cat([class_B1C, patches_BPC], dim=1) + self.position_embedding
        return self.final_layernorm(self.encoder(inputs_embeds=tokens_BPC).last_hidden_state)
