import copy

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from medblip.qformer import MedQFormer

SIZES = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    encoder_hidden_size=16,
    vocab_size=50,
    max_position_embeddings=20,
    initializer_range=0.2,
    use_qformer_text_input=True,
)
PATCHES = torch.randn(3, 27, 16, generator=torch.Generator().manual_seed(0))
TEXT = torch.tensor([[1, 5, 9, 2]])


def build(vision_width: int = 16, num_queries: int = 4, **changes) -> MedQFormer:
    torch.manual_seed(0)
    model = Blip2QFormerModel(Blip2QFormerConfig(**SIZES | changes))
    return MedQFormer(model, vision_width, num_queries).eval()


def test_images_become_as_many_tokens_as_there_are_queries():
    qformer = build(num_queries=5)
    assert qformer(PATCHES).shape == (3, 5, qformer.width)


def test_every_query_reads_every_patch():
    qformer = build()
    patches = PATCHES[:1].clone().requires_grad_()
    for query in range(4):
        (gradient,) = torch.autograd.grad(qformer(patches)[0, query].square().sum(), patches)
        assert gradient.abs().amax(-1).min() > 0


def test_an_image_does_not_depend_on_the_others_in_the_batch():
    qformer = build()
    assert torch.allclose(qformer(PATCHES)[1], qformer(PATCHES[1:2])[0], atol=1e-6)
    assert not torch.allclose(qformer(PATCHES)[1], qformer(PATCHES)[0], atol=1e-3)


def test_padding_does_not_change_a_text():
    qformer = build()
    alone = qformer.read_text(TEXT, torch.ones(1, 4, dtype=torch.bool))
    ids = torch.tensor([[1, 5, 9, 2, 0, 0, 0], [1, 7, 7, 7, 8, 8, 2]])
    padded = qformer.read_text(ids, torch.tensor([[True] * 4 + [False] * 3, [True] * 7]))
    assert torch.allclose(padded[0], alone[0], atol=1e-6)
    ids[0, 4:] = 6  # the mask, not the id, says what padding is
    other = qformer.read_text(ids, torch.tensor([[True] * 4 + [False] * 3, [True] * 7]))
    assert torch.allclose(other[0], alone[0], atol=1e-6)


def test_words_and_their_order_change_a_text():
    qformer = build()
    everything = torch.ones(1, 4, dtype=torch.bool)
    text = qformer.read_text(TEXT, everything)
    for other in ([1, 9, 5, 2], [1, 5, 8, 2]):
        assert not torch.allclose(qformer.read_text(torch.tensor([other]), everything), text, atol=1e-3)


def test_text_and_queries_share_self_attention_but_not_the_feed_forward():
    def touched(loss, qformer):
        qformer = copy.deepcopy(qformer)
        loss(qformer).square().sum().backward()
        return {name for name, p in qformer.named_parameters() if p.grad is not None and p.grad.any()}

    qformer = build()
    image = touched(lambda q: q(PATCHES), qformer)
    text = touched(lambda q: q.read_text(TEXT, torch.ones(1, 4, dtype=torch.bool)), qformer)
    everything = {name for name, _ in qformer.named_parameters()}
    # A key's bias shifts all scores of a softmax alike, so it never has more than rounding's gradient.
    learned = {name for name in everything if "key.bias" not in name}
    assert learned <= image | text
    shared = {name for name in learned if ".attention.attention." in name and "value" in name}
    assert shared and shared <= image & text
    text_only = {name for name in text - image if "key.bias" not in name}
    image_only = {name for name in image - text if "key.bias" not in name}
    assert text_only == {
        name
        for name in learned
        if name.startswith("text_embedding") or ".intermediate." in name or ".output." in name
        if "attention" not in name
    }
    assert image_only >= {name for name in learned if "_query" in name or "crossattention" in name} | {"queries"}


def test_a_checkpoint_without_text_branch_is_refused():
    with pytest.raises(ValueError, match="no text branch"):
        build(use_qformer_text_input=False)


def test_a_checkpoint_that_reads_another_width_is_refused_with_both_widths():
    with pytest.raises(ValueError, match="width 16, but the vision tower gives 96"):
        build(vision_width=96)
