"""A frozen 2-D vision transformer that reads volumes: only its patch and position embeddings are new, and 3-D.

B batch, X Y Z voxels (RAS+), P patches, V voxels of a patch, C width; H W rows and columns of a picture. The gradient
passes through the frozen blocks to the embedding.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import Blip2VisionModel

CHANNEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
CHANNEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""What BLIP-2's vision transformers take off the red, green and blue in [0, 1], and divide the rest by."""


class VisionTower(nn.Module):
    """Volume to patch features, `B X Y Z` to `B 1+P C`.

    Source: arXiv 2305.10799, section 3 (3-D patch and position embedding before a frozen EVA-ViT).
    """

    def __init__(
        self,
        pretrained: Blip2VisionModel,
        grid_size: int,
        patch_edge: int,
        train_final_layernorm: bool,
        inflate: bool = False,
    ):
        """
        Args:
            pretrained: the 2-D tower.
            grid_size: voxels along each edge of a volume.
            patch_edge: voxels along each edge of a patch; must divide `grid_size`.
            train_final_layernorm: whether the LayerNorm after the blocks is trained.
            inflate: start the 3-D patch and position embeddings from the 2-D ones; else from random numbers.

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
        if inflate:
            pictures = pretrained.embeddings
            with torch.no_grad():
                weight_CV, bias_C = inflate_patches(
                    pictures.patch_embedding.weight, pictures.patch_embedding.bias, patch_edge
                )
                self.patch_embedding.weight.copy_(weight_CV)
                self.patch_embedding.bias.copy_(bias_C)
                self.position_embedding.copy_(extend_positions(pictures.position_embedding, grid_size // patch_edge))

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


def inflate_patches(weight_C3HW: Tensor, bias_C: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """A patch embedding for volumes from one for pictures: weight `C V` and bias `C`.

    A volume in [0, 1] that is one axial slice over and over, stretched so that a patch of the picture fills a patch of
    the volume, gets the answer of the grey picture of that slice. A patch edge below the picture's comes close to it.
    """
    weight_C3HW, bias_C = weight_C3HW.double(), bias_C.double()
    mean_311, std_311 = (weight_C3HW.new_tensor(values)[:, None, None] for values in (CHANNEL_MEAN, CHANNEL_STD))
    bias_C = bias_C - (weight_C3HW * mean_311 / std_311).sum((1, 2, 3))
    grey_CHW = (weight_C3HW / std_311).sum(1)
    # x -> stretch x stretch^T resizes a patch; the pseudo-inverse undoes that within the weight.
    pixels = torch.eye(grey_CHW.shape[-1], dtype=torch.double, device=grey_CHW.device)
    shrink = torch.linalg.pinv(interpolate(pixels[None], size=edge, mode="linear")[0].T)
    weight_CXY = _upright(shrink.T @ grey_CHW @ shrink)
    weight_CXYZ = weight_CXY[..., None].expand(-1, -1, -1, edge) / edge
    return weight_CXYZ.flatten(1).float(), bias_C.float()


def extend_positions(position_1PC: Tensor, grid: int) -> Tensor:
    """Position embeddings of a picture, class token first, for a cube of `grid` patches a side; all heights are alike.

    Source: the 2-D interpolation is that of transformers' `interpolate_pos_encoding`.
    """
    class_1C, patches_PC = position_1PC[0].float().split([1, position_1PC.shape[1] - 1])
    side = round(len(patches_PC) ** 0.5)
    picture_CHW = rearrange(patches_PC, "(h w) c -> c h w", h=side)
    picture_CHW = interpolate(picture_CHW[None], size=(grid, grid), mode="bicubic")[0]
    cube_CXYZ = _upright(picture_CHW)[..., None].expand(-1, -1, -1, grid)
    return torch.cat([class_1C, cube_CXYZ.flatten(1).T])[None]


def _upright(picture_CHW: Tensor) -> Tensor:
    """A picture with its first row in front and its first column on the left, along X and Y (RAS+)."""
    return picture_CHW.flip(-2).transpose(-2, -1)
