"""From the answers of one cohort to its entries in the report: scores by arm, subgroup and subject, and comparisons.

N predictions, K classes. Cohorts are scored apart and never pooled: the cohort alone predicts much of the class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medblip.arms import classes_of
from medblip.asking import Scan
from medblip.metrics import age_matched, compare, rows_sum_to_1, score

WITHOUT_SHUFFLING = ("image", "text", "both")
"""Arms that are looked at in subgroups, and by one scan per subject."""

COMPARED = (
    ("both", "text"),
    ("both", "image"),
    ("image", "shuffled_image"),
    ("both", "both_shuffled"),
    ("image", "voxel_svm"),
    ("both", "record_logistic"),
)
"""Pairs of arms, or of an arm and a baseline, that are compared scan by scan."""


class Prediction(NamedTuple):
    """One scan in one arm: a probability for each class that was offered, and the answer."""

    scan: Scan
    arm: str
    probabilities: dict[str, float]
    answer: str


class Draws(NamedTuple):
    """Of the bootstrap."""

    number: int
    seed: int


def by_arm(predictions: list[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions in their order, arm by arm."""
    return {
        name: [found for found in predictions if found.arm == name]
        for name in dict.fromkeys(found.arm for found in predictions)
    }


def scans_of(predictions: list[Prediction]) -> list[Scan]:
    """The different scans, in the order in which each arm has them."""
    return list({row.scan.sample.key: row.scan for row in predictions}.values())


def score_arms(predictions: list[Prediction], draws: Draws) -> dict[str, dict[str, Any]]:
    """The scores of each arm."""
    return {name: score_some(rows, draws) for name, rows in by_arm(predictions).items()}


def score_some(rows: list[Prediction], draws: Draws) -> dict[str, Any]:
    """The scores of one arm, or of a part of it; None where it has a single class."""
    samples = [row.scan.sample for row in rows]
    truth, subjects = [sample.diagnosis for sample in samples], [sample.subject for sample in samples]
    classes = classes_of(truth)
    found = score(truth, _matrix(rows, classes), classes, subjects, draws.number, draws.seed)
    return found | {"n_scans": len({sample.key for sample in samples})}  # a shuffled arm has each several times


def score_subgroups(predictions: list[Prediction], draws: Draws) -> dict[str, dict[str, Any]]:
    """The scores of each arm by sex, age band and field strength; a scan without the field is in no group."""
    return {
        name: {
            f"{title} {group}" if title else group: _brief(score_some(members, draws))
            for title, group_of in GROUPS.items()
            for group, members in _grouped(rows, group_of).items()
        }
        for name, rows in by_arm(predictions).items()
        if name in WITHOUT_SHUFFLING
    }


def score_one_scan_per_subject(predictions: list[Prediction], draws: Draws) -> dict[str, dict[str, Any]]:
    """The scores of each arm on one scan of each subject, that of the lowest KEY, which is a hash."""
    entries = {}
    for name, rows in by_arm(predictions).items():
        if name in WITHOUT_SHUFFLING:
            first: dict[str, Prediction] = {}
            for row in sorted(rows, key=lambda row: row.scan.sample.key):
                first.setdefault(row.scan.sample.subject, row)
            entries[name] = _brief(score_some(list(first.values()), draws))
    return entries


def score_baselines(
    predictions: list[Prediction], baselines_NK: dict[str, NDArray], draws: Draws
) -> dict[str, dict[str, Any]]:
    """The scores of each baseline on the scans of a cohort."""
    scans = scans_of(predictions)
    classes = classes_of(scan.sample.diagnosis for scan in scans)
    return {
        name: score_some(
            [
                Prediction(scan, name, dict(zip(classes, p_K, strict=True)), "")
                for scan, p_K in zip(scans, np.asarray(p_NK).tolist(), strict=True)
            ],
            draws,
        )
        for name, p_NK in baselines_NK.items()
    }


def compare_arms(predictions: list[Prediction], baselines_NK: dict[str, NDArray], draws: Draws) -> list[dict[str, Any]]:
    """The paired differences of COMPARED, as far as both were asked.

    Args:
        predictions: of one cohort.
        baselines_NK: each baseline's probabilities of the cohort's classes, in the order of the scans.
        draws: of the bootstrap.
    """
    arms = by_arm(predictions)
    samples = [scan.sample for scan in scans_of(predictions)]
    classes = classes_of(sample.diagnosis for sample in samples)
    found: list[dict[str, Any]] = []
    if len(classes) == 1:
        return found
    p_NK = {name: _matrix(rows, classes) for name, rows in arms.items()} | baselines_NK
    for a, b in COMPARED:
        if a in p_NK and b in p_NK:
            rounds = max(len(p_NK[a]), len(p_NK[b])) // len(samples)  # of a shuffled arm
            a_NK, b_NK = (np.tile(p_NK[name], (rounds * len(samples) // len(p_NK[name]), 1)) for name in (a, b))
            truth, subjects = [s.diagnosis for s in samples] * rounds, [s.subject for s in samples] * rounds
            differences = compare(truth, a_NK, b_NK, classes, subjects, draws.number, draws.seed)
            found += [{"a": a, "b": b, "metric": metric, **entry} for metric, entry in differences.items()]
    return found


def match_ages(predictions: list[Prediction], draws: Draws) -> dict[str, dict[str, Any]]:
    """The AUC of each arm between subjects of an age, as far as there are such; AD against CN where three classes."""
    entries = {}
    for name, rows in by_arm(predictions).items():
        rows = [row for row in rows if row.scan.fields.get("age_years") is not None]
        classes = classes_of(row.scan.sample.diagnosis for row in rows)
        if name in WITHOUT_SHUFFLING and len(classes) > 1:
            samples = [row.scan.sample for row in rows]
            truth, subjects = [s.diagnosis for s in samples], [s.subject for s in samples]
            ages = [row.scan.fields["age_years"] for row in rows]
            entry = age_matched(truth, _matrix(rows, classes), classes, ages, subjects, draws.number, draws.seed)
            if entry is not None:
                entries[name] = entry
    return entries


def worst_mistakes(predictions: list[Prediction], arm: str, count: int) -> list[Prediction]:
    """The predictions of an arm that gave the true class the lowest probability, wrong ones only, one per subject."""
    worst: dict[str, Prediction] = {}
    for row in sorted(predictions, key=lambda row: row.probabilities.get(row.scan.sample.diagnosis, 0.0)):
        if row.arm == arm and max(row.probabilities, key=row.probabilities.get) != row.scan.sample.diagnosis:
            worst.setdefault(row.scan.sample.subject, row)
    return list(worst.values())[:count]


def _age_band(fields: dict) -> str | None:
    age_years = fields.get("age_years")
    return None if age_years is None else f"{age_years // 10 * 10:.0f}-{age_years // 10 * 10 + 9:.0f}"


def _field_strength(fields: dict) -> str | None:
    tesla = fields.get("field_strength_t")
    return None if tesla is None else f"{tesla:.1f} T"


GROUPS: dict[str, Callable[[dict], str | None]] = {
    "sex": lambda fields: fields.get("sex"),
    "age": _age_band,
    "": _field_strength,
}


def _grouped(rows: list[Prediction], group_of: Callable[[dict], str | None]) -> dict[str, list[Prediction]]:
    groups: dict[str, list[Prediction]] = {}
    for row in rows:
        if (group := group_of(row.scan.fields)) is not None:
            groups.setdefault(group, []).append(row)
    return dict(sorted(groups.items()))


def _matrix(rows: list[Prediction], classes: list[str]) -> NDArray:
    """Probabilities of these classes, `N K`; each row sums to 1 again where others were offered too."""
    return rows_sum_to_1(np.array([[row.probabilities[name] for name in classes] for row in rows]))


def _brief(entry: dict[str, Any]) -> dict[str, Any]:
    """Without the curves, which would fill the report with one for every group."""
    return {name: value for name, value in entry.items() if name not in ("roc", "reliability")}
