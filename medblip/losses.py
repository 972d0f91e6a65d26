"""The two objectives as functions of tensors, and the weights of samples.

B samples of this rank, G samples of all ranks, Q queries, K contrastive width, A answer tokens.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from medblip.distributed import gather, world_size
from medblip.shards import Sample


def contrastive_loss(
    image_BQK: Tensor,
    text_BK: Tensor,
    groups_BN: Tensor,
    is_valid_B: Tensor,
    temperature: Tensor,
    smoothing: float = 0.1,
) -> Tensor:
    """Image-text contrast in both directions, with the negatives of all ranks and several positives per row.

    The similarity of an image and a text is the largest over the image's queries, divided by the temperature. The
    target of a row is uniform over its positives, smoothed over all valid texts; with all texts distinct this is the
    usual cross-entropy with label smoothing. Features are normalised here, in float32.

    Args:
        image_BQK: one feature per query. The gradient reaches the features of every rank.
        text_BK: one feature per text.
        groups_BN: int64; texts that agree in any of the N columns are positives of each other. The first column
            is the text itself.
        is_valid_B: samples that have a text. The others are neither anchors nor negatives.

    Returns:
        This rank's share: its mean over the ranks is the loss of the whole batch. Exactly 0, with a zero
        gradient, where fewer than two distinct texts are present.

    Source: BLIP-2's ITC (arXiv 2301.12597, section 3.1) with soft targets.
    """
    image_BQK = torch.nn.functional.normalize(image_BQK.float(), dim=-1)
    text_BK = torch.nn.functional.normalize(text_BK.float(), dim=-1)
    image_GQK, text_GK = gather(image_BQK), gather(text_BK)
    with torch.no_grad():
        groups_GN, is_valid_G = gather(groups_BN), gather(is_valid_B.to(torch.uint8)).bool()
        num_valid = is_valid_G.sum()
        enough = torch.unique(groups_GN[is_valid_G, 0]).numel() >= 2
        is_positive_BG = (groups_BN[:, None] == groups_GN[None]).any(-1) & is_valid_G[None]
        target_BG = is_positive_BG / is_positive_BG.sum(1, keepdim=True).clamp(min=1)
        target_BG = (1 - smoothing) * target_BG + smoothing * is_valid_G / num_valid.clamp(min=1)
        # Every rank averages over its own rows; weighting by the count of all makes the ranks' mean exact.
        weight_B = is_valid_B * (world_size() / num_valid.clamp(min=1)) * float(enough)
    # The gradient passes the clamp, so that a temperature beyond a bound can come back.
    temperature = temperature.float()
    temperature = temperature + (temperature.clamp(0.01, 1.0) - temperature).detach()
    image_to_text_BG = torch.einsum("bqk,gk->bgq", image_BQK, text_GK).amax(-1) / temperature
    text_to_image_BG = torch.einsum("bk,gqk->bgq", text_BK, image_GQK).amax(-1) / temperature
    loss = 0.0
    for similarity_BG in (image_to_text_BG, text_to_image_BG):
        similarity_BG = similarity_BG.masked_fill(~is_valid_G[None], -1e4)
        loss = loss - 0.5 * (weight_B * (target_BG * similarity_BG.log_softmax(-1)).sum(-1)).sum()
    return loss


def centred(features: Tensor, is_valid_B: Tensor) -> Tensor:
    """Features in float32 less their mean over the valid samples of all ranks, with the gradient of both.

    What all images, or all texts, share tells nothing about which belong together, but is nearly all of their size in
    a model that has just been made: cosines are then 0.99 for any pair, and the contrast stays where it began.

    Args:
        features: `B K`, or `B Q K` with a mean for each query.
        is_valid_B: samples that count, see `contrastive_loss`.
    """
    features = features.float()
    is_valid = is_valid_B.view(-1, *[1] * (features.ndim - 1)).float()
    total, num_valid = gather((features * is_valid).sum(0, keepdim=True)).sum(0), gather(is_valid_B.float()).sum()
    return features - total / num_valid.clamp(min=1)


def language_loss(logp_BA: Tensor, is_answer_BA: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the answers: mean over a sample's tokens, then over the samples that have one.

    As in `contrastive_loss`, the mean over the ranks is the loss of the whole batch. Weights (see `balance`) multiply
    the samples and are not divided out again: their mean over the data is 1, whatever a batch happens to hold.
    """
    num_tokens_B = is_answer_BA.sum(1)
    has_answer_B = num_tokens_B > 0
    num_answers = gather(has_answer_B.to(logp_BA.dtype).detach()).sum().clamp(min=1)
    per_sample_B = -logp_BA.sum(1) / num_tokens_B.clamp(min=1)
    if weight_B is not None:
        per_sample_B = per_sample_B * weight_B
    return (per_sample_B * has_answer_B).sum() * (world_size() / num_answers)


def balance(samples: list[Sample], by_class: bool, by_subject: bool) -> list[Sample]:
    """The samples with weights for the language loss, of mean 1; none is dropped or repeated.

    By subject: one over the number of the subject's scans. By class: every diagnosis gets the same total weight, scans
    without a diagnosis their own share. With both, the scans of a diagnosis share its total as their subjects do.
    """
    weights = [1.0] * len(samples)
    if by_subject:
        num_scans = Counter(sample.subject for sample in samples)
        weights = [1.0 / num_scans[sample.subject] for sample in samples]
    if by_class:
        totals: Counter[str | None] = Counter()
        for sample, weight in zip(samples, weights, strict=True):
            totals[sample.diagnosis] += weight
        labelled = [total for diagnosis, total in totals.items() if diagnosis is not None]
        mean = sum(labelled) / max(1, len(labelled))
        factors = {name: 1.0 if name is None else mean / total for name, total in totals.items()}
        weights = [weight * factors[s.diagnosis] for s, weight in zip(samples, weights, strict=True)]
    scale = len(samples) / sum(weights)
    return [sample._replace(weight=weight * scale) for sample, weight in zip(samples, weights, strict=True)]
