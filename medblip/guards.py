"""What an evaluation refuses, since its numbers would be wrong: leaked subjects, another recipe, a higher tier."""

from __future__ import annotations

from typing import Any

from medblip.config import EhrTier
from medblip.shards import Sample
from medblip.text import TIER_FIELDS


def check_unseen(samples: list[Sample], train_subjects: frozenset[str]) -> None:
    """Refuses scans of subjects that the model was trained on.

    Raises:
        ValueError: with the number of such subjects and the first KEYs.
    """
    seen = [sample for sample in samples if sample.subject in train_subjects]
    if seen:
        raise ValueError(
            f"{len({sample.subject for sample in seen})} subjects of this split were trained on ({len(seen)} scans: "
            f"{', '.join(sample.key for sample in seen[:5])}{', ...' if len(seen) > 5 else ''}); "
            "a score on them says nothing about new subjects"
        )


def check_recipe(data: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuses volumes that were prepared in another way than the model's.

    Raises:
        ValueError: naming every parameter that differs, with both values.
    """
    if differing := recipe_differences(data, model):
        raise ValueError(f"the shards' recipe is not the model's: {'; '.join(differing)}")


def recipe_differences(data: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Each parameter of the shards' recipe that is not the model's, with both values."""
    return [
        f"{name} is {data.get(name)} in the shards and {model.get(name)} in the model"
        for name in sorted(data.keys() | model.keys())
        if data.get(name) != model.get(name)
    ]


def check_tier(tier: EhrTier, trained: EhrTier) -> EhrTier:
    """The tier to evaluate with.

    Raises:
        ValueError: if it is higher than the one trained with, whose wording is all that the model knows.
    """
    order = list(TIER_FIELDS)
    if order.index(tier) > order.index(trained):
        raise ValueError(f"--ehr {tier}: the model was trained with {trained}; evaluate with that or a lower tier")
    return tier
