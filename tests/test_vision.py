import pytest
import torch
from tiny import GRID, tiny_model
from transformers import Blip2VisionConfig, Blip2VisionModel

from medblip.vision import CHANNEL_MEAN, CHANNEL_STD, VisionTower, extend_positions, inflate_patches


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


def pictures(patch: int = 14, side: int = 4) -> Blip2VisionModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    model = Blip2VisionModel(Blip2VisionConfig(**sizes, patch_size=patch, image_size=patch * side))
    for parameter in model.embeddings.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def as_the_checkpoint_reads(slices_BXY: torch.Tensor) -> torch.Tensor:
    """Axial slices as pictures, face up: rows from front to back, columns from left to right, grey, normalised."""
    rows_BHW = slices_BXY.transpose(1, 2).flip(1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CHANNEL_MEAN, CHANNEL_STD))
    return (rows_BHW[:, None] - mean) / std


@torch.no_grad()
def test_a_volume_that_is_one_slice_over_and_over_is_read_as_that_picture():
    model = pictures()
    slices_BXY = torch.rand(2, 56, 56, generator=torch.Generator().manual_seed(1))
    vision = VisionTower(model, 56, 14, False, inflate=True)
    tokens_BPC = tokens_given_to_the_blocks(vision, slices_BXY[..., None].expand(-1, -1, -1, 56))
    expected_BPC = model.embeddings(as_the_checkpoint_reads(slices_BXY))
    assert torch.allclose(tokens_BPC[:, 0], expected_BPC[:, 0], atol=1e-4)  # the class token at its place
    cube = tokens_BPC[:, 1:].unflatten(1, (4, 4, 4))
    picture = expected_BPC[:, 1:].unflatten(1, (4, 4))
    for x in range(4):
        for y in range(4):
            for z in range(4):
                assert torch.allclose(cube[:, x, y, z], picture[:, 3 - y, x], atol=1e-4)


@pytest.mark.parametrize("edge", [14, 16, 32])
@torch.no_grad()
def test_a_stretched_patch_gets_the_answer_of_the_patch(edge):
    embedding = pictures().embeddings.patch_embedding
    weight_CV, bias_C = inflate_patches(embedding.weight, embedding.bias, edge)
    patch_BXY = torch.rand(5, 14, 14, generator=torch.Generator().manual_seed(2))
    expected_BC = embedding(as_the_checkpoint_reads(patch_BXY)).flatten(1)
    stretched_BXY = torch.nn.functional.interpolate(patch_BXY[:, None], size=(edge, edge), mode="bilinear")[:, 0]
    voxels_BV = stretched_BXY[..., None].expand(-1, -1, -1, edge).flatten(1)
    assert torch.allclose(voxels_BV @ weight_CV.T + bias_C, expected_BC, atol=1e-5)


@pytest.mark.parametrize("grid", [4, 3, 7])
@torch.no_grad()
def test_every_height_has_the_picture_s_positions_as_transformers_interpolates_them(grid):
    embeddings = pictures().embeddings
    cube_1PC = extend_positions(embeddings.position_embedding, grid)
    assert cube_1PC.shape == (1, 1 + grid**3, 24)
    if grid == 4:
        expected_1PC = embeddings.position_embedding
    else:
        blank = torch.zeros(1, 1 + grid**2, 24)
        expected_1PC = embeddings.interpolate_pos_encoding(blank, 14 * grid, 14 * grid)
    assert torch.equal(cube_1PC[0, 0], embeddings.position_embedding[0, 0])
    cube, picture = cube_1PC[0, 1:].unflatten(0, (grid, grid, grid)), expected_1PC[0, 1:].unflatten(0, (grid, grid))
    for z in range(grid):
        assert torch.allclose(cube[:, :, z], picture.flip(0).transpose(0, 1), atol=1e-5)


def test_inflated_or_random_the_embeddings_are_trained():
    for inflate in (False, True):
        trained = {
            name for name, p in VisionTower(pictures(), 32, 16, False, inflate).named_parameters() if p.requires_grad
        }
        assert trained == {"patch_embedding.weight", "patch_embedding.bias", "position_embedding"}


@pytest.mark.parametrize(("grid_size", "edge", "tokens"), [(224, 32, 344), (224, 16, 2745), (96, 32, 28), (64, 16, 65)])
def test_any_size_that_the_patch_divides_has_its_tokens(grid_size, edge, tokens):
    with torch.device("meta"):
        model = Blip2VisionModel(Blip2VisionConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1))
        vision = VisionTower(model, grid_size, edge, False, inflate=True)
        assert vision.position_embedding.shape == (1, tokens, 8)


def saved_for_backward(vision: VisionTower, volume_BXYZ: torch.Tensor) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, the weights and the volume apart."""
    weights = {parameter.data_ptr() for parameter in vision.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape[-1] != vision.patch_edge**3:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = vision(volume_BXYZ)
    features.sum().backward()
    return sum(kept.values())


def test_activation_checkpointing_keeps_less_and_is_off_only_in_evaluation():
    model = Blip2VisionModel(
        Blip2VisionConfig(hidden_size=24, intermediate_size=96, num_hidden_layers=6, num_attention_heads=2)
    )
    vision, volume_BXYZ = VisionTower(model, 64, 16, False), torch.rand(2, 64, 64, 64)
    plain = saved_for_backward(vision.train(), volume_BXYZ)
    model.activation_checkpointing_enable()
    checkpointed = saved_for_backward(vision.train(), volume_BXYZ)
    assert checkpointed < plain / 4
    assert saved_for_backward(vision.eval(), volume_BXYZ) == plain  # which is why frozen blocks stay in train()
    assert saved_for_backward(vision.train(), volume_BXYZ) == checkpointed
