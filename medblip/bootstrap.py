"""Cohorts redrawn from a cohort, subject by subject within classes, as weights of its scans; and intervals from them.

A subject comes with all its scans, since they are alike. Subjects are drawn within classes because studies choose how
many of each to scan; it also keeps every class in (nearly) every draw.

What is the same in every subject is the same in every draw, and an interval of the draws would have no width, however
few they are; near a bound it is too short and lies too close to it. There the limits are exact ones that count
subjects.

N scans, S subjects, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import beta

Z_95 = 1.959964
"""Standard deviations of a normal that hold 95 % on both sides of its mean."""
TOUCHES = 1e-9
"""Closer to a bound than any share of subjects is."""


def draw_weights(truth_N: NDArray, subjects: Sequence[str], num_draws: int, seed: int) -> NDArray:
    """How often each scan occurs in each draw, `D N`; equal for the scans of one subject.

    Args:
        truth_N: the class of each scan, any integers.
        subjects: whose scan it is. A subject whose class changes is drawn among those of its first scan's class.
        num_draws: rows of the result.
        seed: of the draws.
    """
    _, first_S, subject_N = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    stratum_S = np.asarray(truth_N)[first_S]
    draw = np.random.default_rng(seed)
    times_DS = np.empty((num_draws, len(first_S)))
    for stratum in np.unique(stratum_S):
        members = np.flatnonzero(stratum_S == stratum)
        times_DS[:, members] = draw.multinomial(len(members), np.full(len(members), 1 / len(members)), size=num_draws)
    return times_DS[:, subject_N]


def interval(values_D: NDArray) -> list[float] | None:
    """The middle 95 % of what the draws gave; draws without a value (NaN) are left out. None if all are."""
    known = values_D[~np.isnan(values_D)]
    return np.percentile(known, [2.5, 97.5]).tolist() if len(known) else None


def weighted_mean(weight_DN: NDArray, value_N: NDArray) -> NDArray:
    """The mean of the values that are known, in each draw; NaN in a draw that holds none of them."""
    known_N = np.isfinite(value_N)
    with np.errstate(invalid="ignore"):
        return weight_DN[:, known_N] @ value_N[known_N] / weight_DN[:, known_N].sum(axis=1)


def exact_interval(share: float, num_subjects: int) -> list[float]:
    """The 95 % limits of a share that so many subjects have (Clopper & Pearson 1934); 0 and 1 where it is at them.

    For n subjects that are all right it is [0.025 ** (1 / n), 1]: were the share lower, n right ones would be rarer
    than 2.5 %. Between whole numbers of subjects the beta distribution interpolates.
    """
    right, wrong = share * num_subjects, (1 - share) * num_subjects
    low = float(beta.ppf(0.025, right, wrong + 1)) if right else 0.0
    return [low, float(beta.ppf(0.975, right + 1, wrong)) if wrong else 1.0]


def share_interval(value_N: NDArray, subjects: Sequence[str], weight_DN: NDArray) -> list[float] | None:
    """The interval of a mean of values from 0 to 1: of a share, if they are 0 and 1. None without a draw.

    That of the draws; where it touches 0 or 1 or has no width, `exact_interval`.
    """
    found = interval(weighted_mean(weight_DN, value_N))
    if found is None or (found[0] > TOUCHES and found[1] < 1 - TOUCHES and found[1] - found[0] > TOUCHES):
        return found
    return exact_interval(float(value_N.mean()), len(set(subjects)))


def perfect_auc_limit(num_subjects: int, num_others: int) -> float:
    """The lower 95 % limit of an AUC that is 1.

    The lowest AUC that is no more than 1.96 standard errors below 1, the error being that of Hanley & McNeil (1982) at
    that AUC: method 5 of Newcombe (2006, Statistics in Medicine 25:559).
    """
    rest = (num_subjects + num_others) / 2 - 1

    def slack(auc: float) -> float:  # both sides divided by 1 - auc, which is a root as well
        variance = auc * (1 + rest * ((1 - auc) / (2 - auc) + auc / (1 + auc))) / (num_subjects * num_others)
        return 1 - auc - Z_95**2 * variance

    return float(brentq(slack, 0, 1))


def auc_interval(auc: float, auc_D: NDArray) -> list[float] | None:
    """The 95 % interval of an AUC, symmetric in its logit, from the draws' standard deviation. None without a draw.

    Source: Perme & Manevski (2019, Statistical Methods in Medical Research 28:3755), who compare what there is.
    """
    known = auc_D[~np.isnan(auc_D)]
    if not len(known):
        return None
    if auc in (0, 1):
        return [auc, auc]
    half = Z_95 * known.std() / (auc * (1 - auc))  # of the logit: its slope is the denominator's inverse
    return expit(logit(auc) + np.array([-half, half])).tolist()


def widened(value: float, drawn: list[float] | None, below: float, above: float) -> list[float] | None:
    """An interval from draws, and how far the value may lie beyond for what does not vary among them, in quadrature.

    As limits of a sum of independent parts are put together (Zou & Donner 2008, Statistics in Medicine 27:1693).
    """
    if drawn is None:
        return None
    low, high = drawn
    if below:
        low = value - math.hypot(max(0.0, value - low), below)
    if above:
        high = value + math.hypot(max(0.0, high - value), above)
    return [low, high]


def two_sided_p(differences_D: NDArray) -> float | None:
    """How often a difference of this sign would come of no difference, from the draws beyond zero; never 0.

    (1 + the rarer side) / (1 + D), twice, at most 1 (Davison & Hinkley 1997, section 4.2). None without draws.
    """
    known = differences_D[~np.isnan(differences_D)]
    if not len(known):
        return None
    beyond = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (1 + beyond) / (1 + len(known))))
