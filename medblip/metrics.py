"""How well probabilities tell diagnoses apart, with intervals that respect that scans of one subject are alike.

N scans, K classes, S subjects, D bootstrap draws, P scans of a class, Q scans of the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, recall_score, roc_auc_score


def score(
    truth: list[str],
    probabilities_NK: NDArray,
    classes: list[str],
    subjects: list[str],
    num_draws: int,
    seed: int,
) -> dict[str, Any]:
    """All numbers of one arm in one cohort, ready for JSON.

    Args:
        truth: diagnosis of each scan; every class occurs.
        probabilities_NK: one row per scan, summing to 1.
        classes: at least two, in the order of the columns.
        subjects: whose scan it is.
        num_draws: bootstrap draws for the intervals.
        seed: of the draws.

    Returns:
        `balanced_accuracy`, `macro_auc` (one class against the rest, mean over classes; the plain AUC for two),
        `macro_f1`, `recall` by class, `confusion` (row: truth, column: most probable class), and `ci95`: the
        interval of the first two, with the number of draws that it rests on.
    """
    truth_N = np.array([classes.index(diagnosis) for diagnosis in truth])
    probabilities_NK = np.asarray(probabilities_NK, dtype=np.float64)
    predicted_N = probabilities_NK.argmax(axis=1)
    labels = list(range(len(classes)))
    recall_K = recall_score(truth_N, predicted_N, labels=labels, average=None)
    if len(classes) == 2:
        auc = roc_auc_score(truth_N, probabilities_NK[:, 1])
    else:
        auc = roc_auc_score(truth_N, probabilities_NK, multi_class="ovr", average="macro", labels=labels)
    accuracy_D, auc_D = bootstrap(truth_N, probabilities_NK, subjects, num_draws, seed)
    return {
        "balanced_accuracy": float(balanced_accuracy_score(truth_N, predicted_N)),
        "macro_auc": float(auc),
        "macro_f1": float(f1_score(truth_N, predicted_N, labels=labels, average="macro", zero_division=0)),
        "recall": dict(zip(classes, recall_K.tolist(), strict=True)),
        "confusion": confusion_matrix(truth_N, predicted_N, labels=labels).tolist(),
        "ci95": {
            "balanced_accuracy": np.percentile(accuracy_D, [2.5, 97.5]).tolist(),
            "macro_auc": np.percentile(auc_D, [2.5, 97.5]).tolist(),
            "draws": len(accuracy_D),
        },
    }


def bootstrap(
    truth_N: NDArray, probabilities_NK: NDArray, subjects: list[str], num_draws: int, seed: int
) -> tuple[NDArray, NDArray]:
    """Balanced accuracy and macro AUC of cohorts redrawn from this one, subject by subject with replacement.

    A subject comes with all its scans. A draw that holds no scan of some class has no balanced accuracy and is
    left out, so fewer values than `num_draws` may come back.
    """
    names, subject_N = np.unique(subjects, return_inverse=True)
    # How often each subject is drawn says everything about a draw; a scan then counts that often.
    times_DS = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_draws)
    weight_DN = times_DS[:, subject_N].astype(np.float64)
    is_class_KN = truth_N == np.arange(probabilities_NK.shape[1])[:, None]
    weight_DN = weight_DN[((weight_DN @ is_class_KN.T) > 0).all(axis=1)]

    is_right_N = probabilities_NK.argmax(axis=1) == truth_N
    recall_DK = (weight_DN @ (is_class_KN & is_right_N).T) / (weight_DN @ is_class_KN.T)
    auc_DK = [
        _weighted_auc(weight_DN, scores_N, is_class_N)
        for scores_N, is_class_N in zip(probabilities_NK.T, is_class_KN, strict=True)
    ]
    return recall_DK.mean(axis=1), np.mean(auc_DK, axis=0)


def _weighted_auc(weight_DN: NDArray, scores_N: NDArray, is_class_N: NDArray) -> NDArray:
    """Share of (class, other) pairs in which the class's scan scores higher, ties half, for each draw's weights."""
    inside_P, outside_Q = scores_N[is_class_N][:, None], scores_N[~is_class_N][None]
    wins_PQ = (inside_P > outside_Q) + 0.5 * (inside_P == outside_Q)
    inside_DP, outside_DQ = weight_DN[:, is_class_N], weight_DN[:, ~is_class_N]
    won_D = ((inside_DP @ wins_PQ) * outside_DQ).sum(axis=1)
    return won_D / (inside_DP.sum(axis=1) * outside_DQ.sum(axis=1))
