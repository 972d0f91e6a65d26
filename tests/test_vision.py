import pytest
import torch
from tiny import GRID, tiny_model
from transformers import Blip2VisionConfig, Blip2VisionModel

from medblip.vision import VisionTower


def tower(grid_size: int = GRID, patch_edge: int = 16, train_final_layernorm: bool = True, **sizes) -> VisionTower:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2) | sizes
    return VisionTower(Blip2VisionModel(Blip2VisionConfig(**sizes)), grid_size, patch_edge, train_final_layernorm)


def tokens_given_to_the_blocks(vision: VisionTower, volume_BXYZ: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = vision.encoder.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"].detach()), with_kwargs=True
    )
    vision(volume_BXYZ)
    handle.remove()
    return seen[0]


def test_patch_embedding_equals_a_3d_convolution():
    vision = tiny_model("tiny").vision
    edge, width = vision.patch_edge, vision.width
    convolution = torch.nn.Conv3d(1, width, kernel_size=edge, stride=edge)
    convolution.weight.data = vision.patch_embedding.weight.data.view(width, 1, edge, edge, edge)
    convolution.bias.data = vision.patch_embedding.bias.data
    volume_BXYZ = torch.randn(2, GRID, GRID, GRID, generator=torch.Generator().manual_seed(0))
    patches_BPC = convolution(volume_BXYZ[:, None]).flatten(2).transpose(1, 2)
    class_B1C = vision.class_embedding.expand(2, 1, -1)
    expected = torch.cat([class_B1C, patches_BPC], dim=1) + vision.position_embedding
    assert torch.allclose(tokens_given_to_the_blocks(vision, volume_BXYZ), expected, atol=1e-5)


@pytest.mark.parametrize("place_XYZ", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 1, 0)])
def test_patches_run_along_x_then_y_then_z_fastest(place_XYZ):
    vision = tower()
    x, y, z = (16 * place + 3 for place in place_XYZ)
    volume_BXYZ = torch.zeros(1, GRID, GRID, GRID)
    dark = tokens_given_to_the_blocks(vision, volume_BXYZ)
    volume_BXYZ[0, x, y, z] = 1
    changed = (tokens_given_to_the_blocks(vision, volume_BXYZ) != dark).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [1 + place_XYZ[0] * 9 + place_XYZ[1] * 3 + place_XYZ[2]]


@pytest.mark.parametrize(("grid_size", "advice"), [(50, 48), (47, 32), (10, 16)])
def test_a_grid_that_the_patch_does_not_divide_is_an_error_that_names_the_right_size(grid_size, advice):
    with pytest.raises(ValueError, match=rf"{grid_size} voxels .* patches of 16: .*--size {advice}$"):
        tower(grid_size)


def test_features_are_those_of_the_pretrained_blocks_and_final_norm():
    torch.manual_seed(0)
    pretrained = Blip2VisionModel(
        Blip2VisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    )
    torch.nn.init.normal_(pretrained.post_layernorm.weight)
    vision = VisionTower(pretrained, GRID, 16, False)
    volume_BXYZ = torch.randn(2, GRID, GRID, GRID)
    features = tokens_given_to_the_blocks(vision, volume_BXYZ)
    for block in pretrained.encoder.layers:
        features = block(features)
    assert torch.allclose(vision(volume_BXYZ), pretrained.post_layernorm(features), atol=1e-5)


@pytest.mark.parametrize("train_final_layernorm", [True, False])
def test_gradient_passes_through_the_frozen_blocks_to_the_3d_embedding(train_final_layernorm):
    vision = tower(train_final_layernorm=train_final_layernorm)
    vision(torch.randn(2, GRID, GRID, GRID))[:, 0].square().sum().backward()  # only the class token: through attention
    trained = {"patch_embedding.weight", "patch_embedding.bias", "position_embedding"}
    if train_final_layernorm:
        trained |= {"final_layernorm.weight", "final_layernorm.bias"}
    gradients = {name: parameter.grad for name, parameter in vision.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == trained
    assert all(gradients[name].isfinite().all() and gradients[name].any() for name in trained)


def test_published_shapes_at_the_published_grid():
    vision = tower(224, 32, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    with torch.no_grad():
        assert vision(torch.zeros(1, 224, 224, 224)).shape == (1, 344, 8)
