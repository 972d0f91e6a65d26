"""Cohorts redrawn from a cohort, subject by subject within classes, as weights of its scans.

A subject comes with all its scans, since they are alike. Subjects are drawn within classes because studies choose how
many of each to scan; it also keeps every class in (nearly) every draw.

N scans, S subjects, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


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


def two_sided_p(differences_D: NDArray) -> float | None:
    """How often a difference of this sign would come of no difference, from the draws beyond zero; never 0.

    (1 + the rarer side) / (1 + D), twice, at most 1 (Davison & Hinkley 1997, section 4.2). None without draws.
    """
    known = differences_D[~np.isnan(differences_D)]
    if not len(known):
        return None
    beyond = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (1 + beyond) / (1 + len(known))))
