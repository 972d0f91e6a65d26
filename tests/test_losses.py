import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny import GRID, make_batch, tiny_model, tiny_words

from medblip import losses
from medblip.data import HostBatch, to_device
from medblip.losses import balance, centred, contrastive_loss, language_loss
from medblip.shards import Sample


def wave(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The numbers that the published model's losses were worked out for."""
    n = np.arange(math.prod(shape), dtype=np.float64)
    values = np.sin(0.7310585 * n + 1.6180339 * seed) + 0.5 * np.cos(0.1234567 * n * (seed + 1))
    return torch.from_numpy(values.reshape(shape))


def published(image_BQK, text_BK) -> float:
    groups_BN = torch.arange(len(text_BK))[:, None]
    everyone = torch.ones(len(text_BK), dtype=torch.bool)
    return contrastive_loss(image_BQK, text_BK, groups_BN, everyone, torch.tensor([0.07])).item()


def test_contrastive_loss_equals_the_published_numbers():
    # In float32: how a processor sums a product moves the last digits.
    image_BQK = wave((7, 32, 256), 11)
    text, statement = published(image_BQK, wave((7, 256), 12)), published(image_BQK, wave((7, 256), 13))
    assert text == pytest.approx((1.942968059 + 1.945945984) / 2, abs=5e-6)
    assert statement == pytest.approx(1.958961049, abs=5e-6)
    assert text + statement == pytest.approx(3.903418070, abs=5e-6)
    image_BQK = wave((3, 5, 16), 11)
    total = published(image_BQK, wave((3, 16), 12)) + published(image_BQK, wave((3, 16), 13))
    assert total == pytest.approx(4.237368741, abs=5e-6)


def naive_contrast(image, text, groups, valid, temperature, smoothing=0.1):
    """The definition, one pair at a time, in float64."""
    image = [[row / np.linalg.norm(row) for row in rows] for rows in image.double().numpy()]
    text = [row / np.linalg.norm(row) for row in text.double().numpy()]
    members = [i for i in range(len(text)) if valid[i]]
    total = 0.0
    for image_first in (True, False):
        for i in members:
            pairs = [(i, j) if image_first else (j, i) for j in members]
            scores = [max(float(query @ text[t]) for query in image[v]) / temperature for v, t in pairs]
            log_sum = math.log(sum(math.exp(score) for score in scores))
            positive = [bool((groups[i] == groups[j]).any()) for j in members]
            for score, is_positive in zip(scores, positive, strict=True):
                target = (1 - smoothing) * is_positive / sum(positive) + smoothing / len(members)
                total -= target * (score - log_sum) / len(members) / 2
    return total


@pytest.mark.parametrize("temperature", [0.03, 0.07, 0.4])
def test_contrastive_loss_equals_a_naive_loop(temperature):
    draw = torch.Generator().manual_seed(1)
    image, text = torch.randn(8, 4, 12, generator=draw), torch.randn(8, 12, generator=draw)
    # Text 1 twice, text 3 once more in a sample that does not count, subject 20 in three texts.
    groups = torch.tensor([[1, 20], [1, 21], [2, 20], [3, 22], [3, 23], [4, 20], [5, 24], [6, 22]])
    valid = torch.tensor([True, True, True, True, False, True, True, False])
    loss = contrastive_loss(image, text, groups, valid, torch.tensor([temperature])).item()
    assert loss == pytest.approx(naive_contrast(image, text, groups, valid, temperature), rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "valid"),
    [([5, 5, 5], [True, True, True]), ([5, 6, 6], [True, False, False]), ([5, 6, 7], [False] * 3), ([5], [True])],
    ids=["one text", "one sample with a text", "no text", "batch of one"],
)
def test_contrast_of_fewer_than_two_texts_is_exactly_zero(texts, valid):
    draw = torch.Generator().manual_seed(2)
    leaves = [torch.randn(len(texts), 4, 12, generator=draw), torch.randn(len(texts), 12, generator=draw)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.tensor([0.07]))]
    groups = torch.tensor([[text, subject] for subject, text in enumerate(texts)])
    loss = contrastive_loss(leaves[0], leaves[1], groups, torch.tensor(valid), leaves[2])
    loss.backward()
    assert loss.item() == 0
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_sample_without_text_is_neither_anchor_nor_negative():
    draw = torch.Generator().manual_seed(3)
    image = torch.randn(5, 4, 12, generator=draw).requires_grad_()
    text = torch.randn(5, 12, generator=draw).requires_grad_()
    groups = torch.tensor([[1, 9], [2, 8], [1, 9], [3, 7], [0, 9]])  # the last one would be a positive of two
    valid = torch.tensor([True, True, True, True, False])
    temperature = torch.tensor([0.07])
    loss = contrastive_loss(image, text, groups, valid, temperature)
    loss.backward()
    alone = contrastive_loss(image[:4], text[:4], groups[:4], valid[:4], temperature)
    assert loss.item() == pytest.approx(alone.item(), abs=1e-6)
    assert not image.grad[4].any() and not text.grad[4].any()
    assert image.grad[:4].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize(("given", "used"), [(0.0001, 0.01), (-3.0, 0.01), (9.0, 1.0)])
def test_temperature_is_kept_between_a_hundredth_and_one(given, used):
    draw = torch.Generator().manual_seed(4)
    image, text = torch.randn(4, 3, 12, generator=draw), torch.randn(4, 12, generator=draw)
    groups, valid = torch.arange(4)[:, None], torch.ones(4, dtype=torch.bool)

    def loss(temperature):
        return contrastive_loss(image, text, groups, valid, torch.tensor([temperature])).item()

    assert loss(given) == pytest.approx(loss(used), rel=1e-4)
    assert loss(0.012) != loss(0.01) and loss(0.98) != loss(1.0)


@pytest.mark.parametrize("temperature", [0.001, 0.07, 3.0])
def test_a_temperature_beyond_a_bound_still_learns(temperature):
    draw = torch.Generator().manual_seed(4)
    image, text = torch.randn(4, 3, 12, generator=draw), torch.randn(4, 12, generator=draw)
    groups, valid = torch.arange(4)[:, None], torch.ones(4, dtype=torch.bool)
    leaf = torch.tensor([temperature], requires_grad=True)
    contrastive_loss(image, text, groups, valid, leaf).backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_features_are_centred_over_the_samples_that_count():
    draw = torch.Generator().manual_seed(5)
    image, text = torch.randn(5, 4, 12, generator=draw), torch.randn(5, 12, generator=draw)
    valid = torch.tensor([True, True, False, True, False])
    for features in (image, text):
        expected = features - features[valid].mean(0)
        assert torch.allclose(centred(features, valid), expected, atol=1e-6)
        assert torch.equal(centred(features, torch.zeros(5, dtype=torch.bool)), features)  # nothing to centre on
    assert centred(text.bfloat16(), valid).dtype == torch.float32


def test_contrast_of_centred_features_is_blind_to_what_all_share():
    """That is what makes it start: nearly alike features, as fresh models give, are told apart."""
    draw = torch.Generator().manual_seed(6)
    own, text = torch.randn(6, 4, 12, generator=draw), torch.randn(6, 12, generator=draw)
    groups, valid = torch.arange(6)[:, None], torch.ones(6, dtype=torch.bool)

    def loss(shared: float) -> torch.Tensor:
        parts = centred(own + shared, valid), centred(text - shared, valid)
        return contrastive_loss(*parts, groups, valid, torch.tensor([0.1]))

    assert loss(50.0).item() == pytest.approx(loss(0.0).item(), abs=1e-3)
    raw = contrastive_loss(own + 50, text + 50, groups, valid, torch.tensor([0.1])).item()
    assert raw == pytest.approx(math.log(6), abs=0.05) and abs(loss(50.0).item() - math.log(6)) > 0.3


def test_two_questions_of_a_scan_cost_what_two_scans_alike_cost():
    """One volume with two rows of words gives the loss and the gradients of the same volume read twice."""
    words, results = tiny_words("tiny"), []
    for questions in (1, 2):
        model = tiny_model("tiny").eval()  # dropout would be drawn for each row of a volume
        batch = make_batch(words)
        volume_BXYZ = batch.volume_BXYZ[::2] if questions == 2 else batch.volume_BXYZ[::2].repeat_interleave(2, 0)
        loss = model(dataclasses.replace(batch, volume_BXYZ=volume_BXYZ))["loss"]
        loss.backward()
        results.append((loss.item(), model.vision.patch_embedding.weight.grad))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_more_smoothing_asks_for_a_flatter_match():
    """A perfect match costs nothing without smoothing; with it, the target's own entropy and more."""
    image_BQK = torch.eye(4)[:, None]
    groups, valid = torch.arange(4)[:, None], torch.ones(4, dtype=torch.bool)
    sharp = contrastive_loss(image_BQK, torch.eye(4), groups, valid, torch.tensor([0.05]), smoothing=0.0)
    smooth = contrastive_loss(image_BQK, torch.eye(4), groups, valid, torch.tensor([0.05]), smoothing=0.1)
    assert sharp.item() < 1e-6
    assert smooth.item() == pytest.approx(0.1 * 3 / 4 * 20, rel=1e-5)


def test_the_best_query_alone_decides():
    draw = torch.Generator().manual_seed(5)
    text = torch.randn(3, 12, generator=draw)
    image = torch.cat([text[:, None], -text[:, None]], dim=1).requires_grad_()
    groups, valid = torch.arange(3)[:, None], torch.ones(3, dtype=torch.bool)
    # The first query is its text itself: similarity 1 / 0.5 with it.
    loss = contrastive_loss(image, text, groups, valid, torch.tensor([0.5]))
    unit = torch.nn.functional.normalize(text, dim=-1)
    log_p = ((unit @ unit.T).abs() / 0.5).log_softmax(-1)
    expected = -(0.9 * log_p.diagonal() + 0.1 * log_p.mean(-1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_language_loss_equals_a_naive_loop():
    draw = torch.Generator().manual_seed(6)
    lengths = [3, 0, 1, 7, 2]
    is_answer = torch.tensor([[place < length for place in range(7)] for length in lengths])
    logp = (-torch.rand(5, 7, generator=draw)).masked_fill(~is_answer, 0.0)
    samples = [
        sum(-logp[row, place].item() for place in range(length)) / length
        for row, length in enumerate(lengths)
        if length
    ]
    assert language_loss(logp, is_answer).item() == pytest.approx(sum(samples) / 4, rel=1e-6)


def test_answers_of_different_length_count_equally():
    is_answer = torch.tensor([[True, False, False, False], [True, True, True, True]])
    logp = torch.tensor([[-2.0, 0, 0, 0], [-1.0, -1, -1, -1]])
    assert language_loss(logp, is_answer).item() == pytest.approx((2 + 1) / 2)


def test_a_sample_without_answer_is_left_out():
    is_answer = torch.tensor([[True, True], [False, False]])
    logp = torch.tensor([[-1.0, -3.0], [0.0, 0.0]], requires_grad=True)
    loss = language_loss(logp, is_answer)
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert logp.grad.tolist() == [[-0.5, -0.5], [0, 0]]


def test_a_batch_without_answers_costs_zero_and_not_nan():
    logp = torch.zeros(3, 1, requires_grad=True)
    loss = language_loss(logp, torch.zeros(3, 1, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not logp.grad.any()


def test_the_contrasts_gradient_equals_that_of_the_naive_loop():
    """By central differences in float64: image, text and temperature."""
    draw = torch.Generator().manual_seed(9)
    image, text = torch.randn(5, 3, 6, generator=draw), torch.randn(5, 6, generator=draw)
    groups = torch.tensor([[1, 20], [1, 21], [2, 20], [3, 22], [4, 23]])
    valid = torch.tensor([True, True, True, True, False])
    leaves = [leaf.clone().requires_grad_() for leaf in (image, text, torch.tensor([0.2]))]
    contrastive_loss(leaves[0], leaves[1], groups, valid, leaves[2]).backward()

    def slope(which: int, place: int) -> float:
        ends = []
        for step in (1e-5, -1e-5):
            moved = [leaf.detach().double().clone() for leaf in leaves]
            moved[which].view(-1)[place] += step
            ends.append(naive_contrast(moved[0], moved[1], groups, valid, float(moved[2])))
        return (ends[0] - ends[1]) / 2e-5

    for which, places in ((0, range(0, 90, 7)), (1, range(0, 30, 4)), (2, [0])):
        gradient = leaves[which].grad.flatten()
        assert gradient.any()
        for place in places:
            assert gradient[place].item() == pytest.approx(slope(which, place), rel=1e-3, abs=1e-5)


def test_the_contrasts_memory_grows_with_the_ranks_and_not_with_their_square(monkeypatch):
    """What one rank keeps for its backward pass, with 3 samples on each of 4, 8 and 16 ranks."""
    kept_bytes = {}
    for ranks in (4, 8, 16):
        monkeypatch.setattr(losses, "gather", lambda tensor, ranks=ranks: torch.cat([tensor] * ranks))
        monkeypatch.setattr(losses, "world_size", lambda ranks=ranks: ranks)
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        draw = torch.Generator().manual_seed(10)
        image = torch.randn(3, 32, 16, generator=draw).requires_grad_()
        text = torch.randn(3, 16, generator=draw).requires_grad_()
        groups, valid = torch.arange(3)[:, None], torch.ones(3, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            contrastive_loss(image, text, groups, valid, torch.tensor([0.07], requires_grad=True))
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        kept_bytes[ranks] = sum(storages.values())
    growth = kept_bytes[8] - kept_bytes[4]
    assert growth > 0
    assert (kept_bytes[16] - kept_bytes[8]) / growth == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("weights", [[2.0, 1.0, 0.25, 0.5, 1.25], [1.0] * 5])
def test_weighted_language_loss_equals_a_naive_loop(weights):
    draw = torch.Generator().manual_seed(6)
    lengths = [3, 0, 1, 7, 2]
    is_answer = torch.tensor([[place < length for place in range(7)] for length in lengths])
    logp = (-torch.rand(5, 7, generator=draw, dtype=torch.float64)).masked_fill(~is_answer, 0.0)
    samples = [
        weight * sum(-logp[row, place].item() for place in range(length)) / length
        for row, (length, weight) in enumerate(zip(lengths, weights, strict=True))
        if length
    ]
    loss = language_loss(logp, is_answer, torch.tensor(weights))
    assert loss.item() == pytest.approx(sum(samples) / 4, rel=1e-12)
    if weights == [1.0] * 5:
        assert torch.equal(loss, language_loss(logp, is_answer))


def sample(subject: str, diagnosis: str | None) -> Sample:
    return Sample("k", 0, (0, 0), (0, 0), (1, 1, 1), (0, 0, 0), "C", subject, diagnosis)


SAMPLES = [
    *[sample("a", "CN")] * 4,
    sample("b", "CN"),
    *[sample("c", "AD")] * 2,
    sample("d", None),
    *[sample("e", "MCI"), sample("e", "AD")],  # converted
    *[sample("f", None)] * 2,
]


def totals(samples: list[Sample], field: str) -> dict:
    found: dict = {}
    for one in samples:
        found[getattr(one, field)] = found.get(getattr(one, field), 0) + one.weight
    return found


@pytest.mark.parametrize(("by_class", "by_subject"), [(True, False), (False, True), (True, True)])
def test_weights_have_mean_one_and_depend_on_no_order(by_class, by_subject):
    weighted = balance(SAMPLES, by_class, by_subject)
    assert [one._replace(weight=1.0) for one in weighted] == SAMPLES  # each once, in place
    assert sum(one.weight for one in weighted) == pytest.approx(len(SAMPLES), rel=1e-12)
    backwards = balance(SAMPLES[::-1], by_class, by_subject)[::-1]
    assert [one.weight for one in backwards] == pytest.approx([one.weight for one in weighted], rel=1e-12)


def test_without_balance_every_weight_is_exactly_one():
    many = SAMPLES * 997
    assert balance(many, False, False) == many
    assert {one.weight for one in many} == {1.0}


def test_every_diagnosis_counts_the_same_and_scans_without_one_as_before():
    found = totals(balance(SAMPLES, True, False), "diagnosis")
    assert found == {name: pytest.approx(3) for name in ("CN", "AD", "MCI", None)}


def test_every_subject_counts_the_same():
    found = totals(balance(SAMPLES, False, True), "subject")
    assert found == {name: pytest.approx(2) for name in "abcdef"}


def test_with_both_a_diagnosis_counts_the_same_and_its_subjects_share_it():
    weighted = balance(SAMPLES, True, True)
    found = totals(weighted, "diagnosis")
    assert found["CN"] == pytest.approx(found["AD"]) and found["CN"] == pytest.approx(found["MCI"])
    assert weighted[0].weight * 4 == pytest.approx(weighted[4].weight)  # a's four scans weigh as b's one


def test_a_split_without_any_diagnosis_can_be_balanced():
    unlabelled = [sample("a", None), sample("b", None)]
    assert balance(unlabelled, True, True) == unlabelled


def test_a_weight_reaches_the_language_loss_and_no_other():
    model, batch = tiny_model("tiny"), make_batch(tiny_words("tiny"), 0, 3)
    weighted = [sample("a", None)._replace(weight=weight) for weight in (3.0, 0.5, 0.0)]
    host = HostBatch(weighted, [0] * 3, [None] * 3, torch.zeros(3, dtype=torch.uint8), {}, None, {})
    names = [name for name in vars(batch) if name not in ("keys", "volume_BXYZ", "weight_B")]
    host.words.update({name: getattr(batch, name) for name in names})
    sent = to_device(host, GRID, torch.device("cpu"), torch.float32, None)
    assert sent.weight_B.tolist() == [3.0, 0.5, 0.0]
    found, plain = (model(dataclasses.replace(batch, weight_B=w)) for w in (sent.weight_B, None))
    alone = [model(make_batch(tiny_words("tiny"), row, row + 1))["loss_lm"] for row in range(3)]
    assert found["loss_lm"].item() == pytest.approx((3 * alone[0] + 0.5 * alone[1]).item() / 3, rel=1e-4)
    assert found["loss_itc"] == plain["loss_itc"]
