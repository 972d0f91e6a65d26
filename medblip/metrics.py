"""How well probabilities tell diagnoses apart, with intervals that respect that scans of one subject are alike.

scikit-learn gives the scores themselves. Their intervals come of weighted versions that do all draws at once.

N scans, K classes, S subjects, D bootstrap draws, U different scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score, roc_curve

from medblip.bootstrap import (
    auc_interval,
    draw_weights,
    exact_interval,
    interval,
    perfect_auc_limit,
    share_interval,
    two_sided_p,
    widened,
)

NUM_BINS = 10
"""Of equal width between 0 and 1, for ECE and the reliability curve."""

NUM_REDRAWS = 200
"""Of labels from the probabilities, for `ece_if_calibrated`."""

MAX_ROC_POINTS = 200
SUM_TOLERANCE = 1e-3
"""By which a row of probabilities may miss 1: half precision does."""

SCORED = ("balanced_accuracy", "macro_auc", "macro_f1", "brier")
COMPARED = ("balanced_accuracy", "macro_auc")


def score(
    truth: Sequence[str],
    probabilities_NK: ArrayLike,
    classes: Sequence[str],
    subjects: Sequence[str],
    num_draws: int,
    seed: int,
) -> dict[str, Any]:
    """All numbers of one arm in one cohort, ready for JSON.

    Args:
        truth: diagnosis of each scan.
        probabilities_NK: one row per scan, summing to 1.
        classes: in the order of the columns.
        subjects: whose scan it is.
        num_draws: bootstrap draws for the intervals.
        seed: of the draws.

    Returns:
        `n_subjects`, `n_scans` (rows), `classes`; `balanced_accuracy`; `macro_auc` (one class against the rest, mean
        over classes; the plain AUC for two); `macro_f1`; `recall` and `specificity` by class; `confusion` (row: truth,
        column: most probable class, the first of equals); `ece`, `brier`, `reliability` as in `calibration`;
        `ece_if_calibrated`: the mean ECE that so few subjects give where the probabilities are true; `roc` by class;
        and `ci95`: intervals of SCORED, and of `recall` and `specificity` by class, with the number of draws that they
        rest on. ECE has none: redrawing scans biases it upwards. A class that does not occur has recall and roc None
        and is left out of the means. With a single class all scores are None; an interval is None where a class has
        fewer than two subjects.

    Raises:
        ValueError: naming the row of a probability that is none, of a sum other than 1, or of an unknown diagnosis.
    """
    truth_N, p_NK = _checked(truth, probabilities_NK, classes, subjects)
    found: dict[str, Any] = {"n_subjects": len(set(subjects)), "n_scans": len(truth_N), "classes": list(classes)}
    occurring = np.unique(truth_N)
    if len(occurring) < 2:
        names = ("balanced_accuracy", "macro_auc", "macro_f1", "recall", "specificity", "confusion", "ece")
        return found | dict.fromkeys((*names, "ece_if_calibrated", "brier", "reliability", "roc", "ci95"))

    predicted_N, labels = p_NK.argmax(axis=1), range(len(classes))
    confusion_KK = confusion_matrix(truth_N, predicted_N, labels=list(labels))
    right_K, true_K, told_K = confusion_KK.diagonal(), confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    true_negative_K = len(truth_N) - true_K - told_K + right_K
    columns = _columns(occurring, len(classes))
    weight_DN = _drawn(truth_N, subjects, num_draws, seed)
    return found | {
        "balanced_accuracy": float(np.mean(right_K[occurring] / true_K[occurring])),
        "macro_auc": float(np.mean([roc_auc_score(truth_N == column, p_NK[:, column]) for column in columns])),
        "macro_f1": float(f1_score(truth_N, predicted_N, labels=occurring, average="macro", zero_division=0)),
        "recall": {c: float(right_K[k] / true_K[k]) if true_K[k] else None for k, c in enumerate(classes)},
        "specificity": {c: float(true_negative_K[k] / (len(truth_N) - true_K[k])) for k, c in enumerate(classes)},
        "confusion": confusion_KK.tolist(),
        **_calibration(truth_N, p_NK),
        "ece_if_calibrated": _ece_if_calibrated(p_NK, subjects, seed),
        "roc": {c: _roc(truth_N == k, p_NK[:, k]) if true_K[k] else None for k, c in enumerate(classes)},
        "ci95": _intervals(truth_N, p_NK, classes, subjects, confusion_KK, weight_DN),
    }


def score_once(truth: Sequence[str], probabilities_NK: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """SCORED without their intervals, which are what costs time; NaN for a single class.

    Raises:
        ValueError: as `score`.
    """
    return _once(*_checked(truth, probabilities_NK, classes, ["" for _ in truth]))


def compare(
    truth: Sequence[str],
    a_NK: ArrayLike,
    b_NK: ArrayLike,
    classes: Sequence[str],
    subjects: Sequence[str],
    num_draws: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Whether probabilities `a` are better than `b` of the same scans: `difference` (a - b), `ci95`, `p_value`.

    By metric of COMPARED. Both are scored on the same draws of subjects, so what they share cancels out. The p-value
    is two-sided, from the same draws. All None where there is a single class; interval and p-value are None where a
    class has fewer than two subjects.

    Raises:
        ValueError: as `score`.
    """
    truth_N, a_NK = _checked(truth, a_NK, classes, subjects)
    truth_N, b_NK = _checked(truth, b_NK, classes, subjects)
    if len(np.unique(truth_N)) < 2:
        return {name: dict.fromkeys(("difference", "ci95", "p_value")) for name in COMPARED}
    a, b = _once(truth_N, a_NK), _once(truth_N, b_NK)
    weight_DN = _drawn(truth_N, subjects, num_draws, seed)
    if weight_DN is None:
        return {name: {"difference": a[name] - b[name], "ci95": None, "p_value": None} for name in COMPARED}
    draws_a, draws_b = (weighted_scores(truth_N, p_NK, weight_DN) for p_NK in (a_NK, b_NK))
    beyond_a, beyond_b = (_beyond_draws(truth_N, p_NK, subjects) for p_NK in (a_NK, b_NK))
    found = {}
    for name in COMPARED:
        difference, difference_D = a[name] - b[name], draws_a[name] - draws_b[name]
        drawn = interval(difference_D)
        if not np.array_equal(a_NK, b_NK):
            (below_a, above_a), (below_b, above_b) = beyond_a[name], beyond_b[name]
            drawn = widened(difference, drawn, math.hypot(below_a, above_b), math.hypot(above_a, below_b))
        found[name] = {"difference": difference, "ci95": drawn, "p_value": two_sided_p(difference_D)}
    return found


def age_matched(
    truth: Sequence[str],
    probabilities_NK: ArrayLike,
    classes: Sequence[str],
    ages: Sequence[float | None],
    subjects: Sequence[str],
    num_draws: int,
    seed: int,
    caliper_years: float = 2.0,
) -> dict[str, Any] | None:
    """The AUC between pairs of subjects of two classes and about one age, so that age itself tells nothing.

    The first and the last of `classes` (AD and CN of three). Each subject is used once, with its first scan of these
    classes and a known age; as many pairs are made as differ by at most `caliper_years`, and of those with the least
    difference in all. Pairs are redrawn for the interval.

    Args:
        truth, probabilities_NK, classes, subjects, num_draws, seed: as in `score`.
        ages: years at each scan; None or NaN where unknown.
        caliper_years: largest difference within a pair.

    Returns:
        `pairs`, `caliper_years`, `macro_auc` and `ci95` with the interval of it, None for a single pair; or None
        where there is no pair.
    """
    truth_N, p_NK = _checked(truth, probabilities_NK, classes, subjects)
    age_N = np.array([math.nan if age is None else age for age in ages], dtype=np.float64)
    if len(age_N) != len(truth_N):
        raise ValueError(f"{len(age_N)} ages for {len(truth_N)} scans")
    last = len(classes) - 1
    if last < 1:
        return None
    usable = np.flatnonzero(np.isfinite(age_N) & ((truth_N == 0) | (truth_N == last)))
    _, first = np.unique(np.asarray(subjects)[usable], return_index=True)
    rows = usable[np.sort(first)]
    low, high = rows[truth_N[rows] == 0], rows[truth_N[rows] == last]
    apart_years = np.abs(age_N[low][:, None] - age_N[high][None])
    # A pair beyond the caliper costs more than all pairs within it, so that as few as can be are made; then dropped.
    too_far = apart_years > caliper_years
    left, right = linear_sum_assignment(np.where(too_far, (1 + caliper_years) * (1 + len(rows)), apart_years))
    kept = ~too_far[left, right]
    low, high = low[left[kept]], high[right[kept]]
    if not len(low):
        return None
    pairs = np.r_[low, high]
    total = p_NK[pairs, 0] + p_NK[pairs, last]
    score_N = np.divide(p_NK[pairs, last], total, out=np.full(len(pairs), 0.5), where=total > 0)
    is_last_N = truth_N[pairs] == last
    times_DP = np.random.default_rng(seed).multinomial(len(low), np.full(len(low), 1 / len(low)), size=num_draws)
    auc_D = _weighted_auc(np.tile(times_DP, 2).astype(np.float64), score_N, is_last_N)
    auc = float(roc_auc_score(is_last_N, score_N))
    beyond = _beyond_auc(auc, len(low), len(low))
    return {
        "pairs": len(low),
        "caliper_years": caliper_years,
        "macro_auc": auc,
        "ci95": {"macro_auc": widened(auc, auc_interval(auc, auc_D), *beyond) if len(low) > 1 else None},
    }


def calibration(truth: Sequence[str], probabilities_NK: ArrayLike, classes: Sequence[str]) -> dict[str, Any]:
    """Whether probabilities mean what they say.

    Returns:
        `ece`: mean distance of the most probable class's probability from the fraction of scans in which it was
        right, over NUM_BINS bins weighted by their scans; `brier`: mean squared distance of a row from the truth, 0
        to 2 (Brier 1950); `reliability`: of each bin that is not empty its `mean_probability`, `fraction_right`, `n`.
    """
    return _calibration(*_checked(truth, probabilities_NK, classes, ["" for _ in truth]))


def _checked(truth: Sequence[str], p_NK: ArrayLike, classes: Sequence[str], subjects: Sequence[str]) -> tuple:
    """Truth as columns, and the probabilities as float64; not scaled, which would undo ties."""
    p_NK = np.asarray(p_NK, dtype=np.float64)
    if not len(truth):
        raise ValueError("there is no scan to score")
    if p_NK.shape != (len(truth), len(classes)) or len(subjects) != len(truth):
        raise ValueError(
            f"{len(truth)} diagnoses, {len(subjects)} subjects and {len(classes)} classes do not fit "
            f"probabilities of shape {p_NK.shape}"
        )
    for row in np.flatnonzero(~np.isfinite(p_NK).all(axis=1) | (p_NK < 0).any(axis=1)):
        raise ValueError(f"row {row}: {p_NK[row].tolist()} are no probabilities; was the model's output finite?")
    total_N = p_NK.sum(axis=1)
    for row in np.flatnonzero(abs(total_N - 1) > SUM_TOLERANCE):
        raise ValueError(f"row {row}: {p_NK[row].tolist()} sum to {total_N[row]:g} instead of 1; scale the row")
    column_of = {name: column for column, name in enumerate(classes)}
    for row, diagnosis in enumerate(truth):
        if diagnosis not in column_of:
            raise ValueError(f"row {row}: the diagnosis {diagnosis!r} is none of {', '.join(classes)}")
    return np.array([column_of[diagnosis] for diagnosis in truth]), p_NK


def rows_sum_to_1(p_NK: NDArray) -> NDArray:
    """Rows scaled, where more answers were offered than there are columns; one that is all 0 becomes equal."""
    total_N1 = p_NK.sum(axis=1, keepdims=True)
    return np.divide(p_NK, total_N1, out=np.full_like(p_NK, 1 / p_NK.shape[1]), where=total_N1 != 0)


def _once(truth_N: NDArray, p_NK: NDArray) -> dict[str, float]:
    scores = weighted_scores(truth_N, p_NK, np.ones((1, len(truth_N))))
    return {name: float(values_D[0]) for name, values_D in scores.items()}


def _columns(occurring: NDArray, num_classes: int) -> list[int]:
    """Whose AUCs are averaged: of two columns the second is enough, the other is its mirror image."""
    return [1] if num_classes == 2 else occurring.tolist()


def _drawn(truth_N: NDArray, subjects: Sequence[str], num_draws: int, seed: int) -> NDArray | None:
    """Weights of the draws, `D N`; None where a class has fewer than two subjects, so that nothing varies."""
    names = np.asarray(subjects)
    if any(len(np.unique(names[truth_N == k])) < 2 for k in np.unique(truth_N)):
        return None
    return draw_weights(truth_N, subjects, num_draws, seed)


def _intervals(
    truth_N: NDArray,
    p_NK: NDArray,
    classes: Sequence[str],
    subjects: Sequence[str],
    confusion_KK: NDArray,
    weight_DN: NDArray | None,
) -> dict[str, Any]:
    """`ci95` of `score`."""
    if weight_DN is None:
        return dict.fromkeys((*SCORED, "recall", "specificity")) | {"draws": 0}
    once, draws = _once(truth_N, p_NK), weighted_scores(truth_N, p_NK, weight_DN)
    told_N, names, labels = p_NK.argmax(axis=1), np.asarray(subjects), range(len(classes))

    def share(is_right_N: NDArray, of_N: NDArray) -> list[float] | None:
        return share_interval(is_right_N[of_N].astype(float), names[of_N], weight_DN[:, of_N]) if of_N.any() else None

    recalls = [share(told_N == k, truth_N == k) for k in labels]
    of_recalls = {name: interval(draws[name]) for name in ("balanced_accuracy", "macro_f1")}
    if not _is_constant(p_NK):
        of_recalls = _from_recalls(confusion_KK.astype(float), recalls)
    return of_recalls | {
        "macro_auc": widened(
            once["macro_auc"],
            auc_interval(once["macro_auc"], draws["macro_auc"]),
            *_beyond_macro_auc(truth_N, p_NK, subjects),
        ),
        "brier": interval(draws["brier"]),
        "recall": dict(zip(classes, recalls, strict=True)),
        "specificity": {c: share(told_N != k, truth_N != k) for k, c in enumerate(classes)},
        "draws": int((~np.isnan(draws["macro_auc"])).sum()),
    }


def _is_constant(p_NK: NDArray) -> bool:
    """What does not depend on the scan is at chance whoever the subjects are: its interval needs no width."""
    return bool((p_NK == p_NK[0]).all())


def _from_recalls(confusion_KK: NDArray, recalls: list[list[float] | None]) -> dict[str, list[float]]:
    """The intervals of balanced accuracy and macro F1 from those of the recalls.

    Classes have different subjects, so their recalls are independent: each in turn is moved to its limits, and the
    distances by which the score moves are put together in quadrature (Zou & Donner 2008, Statistics in Medicine
    27:1693). Scans that a class loses are told as the class that lowers the score the most.
    """
    occurring = [k for k, limits in enumerate(recalls) if limits is not None]

    def scores(found_KK: NDArray) -> NDArray:
        right_K, true_K, told_K = (n_K[occurring] for n_K in (found_KK.diagonal(), found_KK.sum(1), found_KK.sum(0)))
        return np.array([(right_K / true_K).mean(), (2 * right_K / (true_K + told_K)).mean()])

    now = scores(confusion_KK)
    below, above = np.zeros(2), np.zeros(2)
    for k in occurring:
        low, high = recalls[k]
        recall = confusion_KK[k, k] / confusion_KK[k].sum()
        worse = [now]
        for told in {*range(len(recalls))} - {k}:
            lost_KK = confusion_KK.copy()
            lost_KK[k] *= low / recall if recall else 1.0
            lost_KK[k, told] += confusion_KK[k].sum() - lost_KK[k].sum()
            worse.append(scores(lost_KK))
        won_KK = confusion_KK.copy()
        won_KK[k] *= (1 - high) / (1 - recall) if recall < 1 else 1.0
        won_KK[k, k] += confusion_KK[k].sum() - won_KK[k].sum()
        below += (now - np.min(worse, axis=0)) ** 2
        above += np.maximum(0, scores(won_KK) - now) ** 2
    limits = np.stack([now - np.sqrt(below), now + np.sqrt(above)], axis=1)
    return dict(zip(("balanced_accuracy", "macro_f1"), limits.tolist(), strict=True))


def _beyond_draws(truth_N: NDArray, p_NK: NDArray, subjects: Sequence[str]) -> dict[str, tuple[float, float]]:
    """How far COMPARED may lie below and above for what is the same in every draw, however few the subjects are."""
    if _is_constant(p_NK):
        return dict.fromkeys(COMPARED, (0.0, 0.0))
    occurring, names, is_right_N = np.unique(truth_N), np.asarray(subjects), p_NK.argmax(axis=1) == truth_N
    squares = np.zeros(2)
    for k in occurring:
        of_N = truth_N == k
        if (recall := is_right_N[of_N].mean()) in (0, 1):
            low, high = exact_interval(recall, len(np.unique(names[of_N])))
            squares += np.square([recall - low, high - recall]) / len(occurring) ** 2
    return {
        "balanced_accuracy": tuple(np.sqrt(squares).tolist()),
        "macro_auc": _beyond_macro_auc(truth_N, p_NK, subjects),
    }


def _beyond_macro_auc(truth_N: NDArray, p_NK: NDArray, subjects: Sequence[str]) -> tuple[float, float]:
    """How far macro AUC may lie below and above for those classes whose AUC is at a bound, in quadrature."""
    columns, names, squares = _columns(np.unique(truth_N), p_NK.shape[1]), np.asarray(subjects), np.zeros(2)
    for k in columns:
        sizes = [len(np.unique(names[of_N])) for of_N in (truth_N == k, truth_N != k)]
        squares += np.square(_beyond_auc(float(roc_auc_score(truth_N == k, p_NK[:, k])), *sizes)) / len(columns) ** 2
    return tuple(np.sqrt(squares).tolist())


def _beyond_auc(auc: float, num_subjects: int, num_others: int) -> tuple[float, float]:
    """How far an AUC may lie below and above, if it is at a bound."""
    reach = 1 - perfect_auc_limit(num_subjects, num_others) if auc in (0, 1) else 0.0
    return (reach, 0.0) if auc == 1 else (0.0, reach)


def weighted_scores(truth_N: NDArray, p_NK: NDArray, weight_DN: NDArray) -> dict[str, NDArray]:
    """SCORED for each row of weights; NaN where a class that occurs in the cohort is lost."""
    num_classes, occurring = p_NK.shape[1], np.unique(truth_N)
    is_true_NK = (truth_N[:, None] == np.arange(num_classes)).astype(np.float64)
    is_told_NK = (p_NK.argmax(axis=1)[:, None] == np.arange(num_classes)).astype(np.float64)
    true_DK, told_DK = weight_DN @ is_true_NK, weight_DN @ is_told_NK
    right_DK = weight_DN @ (is_true_NK * is_told_NK)
    with np.errstate(invalid="ignore"):
        recall_DK, f1_DK = right_DK / true_DK, 2 * right_DK / (true_DK + told_DK)
    auc_DK = [_weighted_auc(weight_DN, p_NK[:, k], truth_N == k) for k in _columns(occurring, num_classes)]
    is_lost_D = (true_DK[:, occurring] == 0).any(axis=1)
    brier_D = weight_DN @ ((p_NK - is_true_NK) ** 2).sum(axis=1) / weight_DN.sum(axis=1)
    scores = {
        "balanced_accuracy": recall_DK[:, occurring].mean(axis=1),
        "macro_auc": np.mean(auc_DK, axis=0),
        "macro_f1": f1_DK[:, occurring].mean(axis=1),
        "brier": brier_D,
    }
    return {name: np.where(is_lost_D, np.nan, values_D) for name, values_D in scores.items()}


def _weighted_auc(weight_DN: NDArray, score_N: NDArray, is_class_N: NDArray) -> NDArray:
    """Share of (class, other) pairs in which the class's scan scores higher, ties half, for each draw's weights."""
    order_N = np.argsort(score_N, kind="stable")
    starts_U = np.flatnonzero(np.diff(score_N[order_N], prepend=-np.inf))  # of each run of equal scores
    inside_DU = np.add.reduceat((weight_DN * is_class_N)[:, order_N], starts_U, axis=1)
    outside_DU = np.add.reduceat((weight_DN * ~is_class_N)[:, order_N], starts_U, axis=1)
    below_DU = outside_DU.cumsum(axis=1) - 0.5 * outside_DU
    with np.errstate(invalid="ignore"):
        return (inside_DU * below_DU).sum(axis=1) / (inside_DU.sum(axis=1) * outside_DU.sum(axis=1))


def _calibration(truth_N: NDArray, p_NK: NDArray) -> dict[str, Any]:
    top_N, is_right_N = p_NK.max(axis=1), p_NK.argmax(axis=1) == truth_N
    bin_N = _bins(top_N)
    reliability = [
        {
            "mean_probability": float(top_N[bin_N == place].mean()),
            "fraction_right": float(is_right_N[bin_N == place].mean()),
            "n": int((bin_N == place).sum()),
        }
        for place in np.unique(bin_N)
    ]
    is_true_NK = truth_N[:, None] == np.arange(p_NK.shape[1])
    return {
        "ece": float(_ece(top_N, is_right_N[None], bin_N)[0]),
        "brier": float(((p_NK - is_true_NK) ** 2).sum(axis=1).mean()),
        "reliability": reliability,
    }


def _bins(top_N: NDArray) -> NDArray:
    """The bin of each probability; an edge belongs to the bin below it."""
    return np.searchsorted(np.linspace(0, 1, NUM_BINS + 1)[1:-1], top_N)


def _ece(top_N: NDArray, is_right_DN: NDArray, bin_N: NDArray) -> NDArray:
    gap_DN = is_right_DN - top_N
    in_bin_NB = bin_N[:, None] == np.arange(NUM_BINS)
    return np.abs(gap_DN @ in_bin_NB).sum(axis=1) / len(top_N)


def _ece_if_calibrated(p_NK: NDArray, subjects: Sequence[str], seed: int) -> float:
    """The mean ECE where diagnoses are drawn from the probabilities, for a subject once: its scans share a diagnosis.

    One number a subject picks the class of each of its scans, from the classes laid end to end by their probability.
    """
    _, subject_N = np.unique(np.asarray(subjects), return_inverse=True)
    picked_DN = np.random.default_rng(seed).random((NUM_REDRAWS, subject_N.max() + 1))[:, subject_N]
    ends_NK = p_NK.cumsum(axis=1) / p_NK.sum(axis=1, keepdims=True)
    drawn_DN = sum((picked_DN > ends_NK[:, k]).astype(int) for k in range(p_NK.shape[1] - 1))
    top_N = p_NK.max(axis=1)
    return float(_ece(top_N, drawn_DN == p_NK.argmax(axis=1), _bins(top_N)).mean())


def _roc(is_class_N: NDArray, score_N: NDArray) -> dict[str, list[float]]:
    fpr, tpr, _ = roc_curve(is_class_N, score_N)
    kept = np.unique(np.linspace(0, len(fpr) - 1, MAX_ROC_POINTS).round().astype(int))
    return {"fpr": fpr[kept].tolist(), "tpr": tpr[kept].tolist()}
