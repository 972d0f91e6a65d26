"""How often the 95 % intervals of medblip/metrics.py hold the truth, by simulation.

Made-up studies whose true scores are known: CN and AD three to two, one to three scans a subject, and the score of a
scan normal around its subject's, which is normal around its class's (70 % of the variance between subjects). The true
AUC is then Phi(d / sqrt(2)) and the true balanced accuracy Phi(d / 2), d apart in standard deviations.

- within: what metrics.py does; subjects are redrawn within classes, and the interval is the middle 95 %.
- over all: subjects are redrawn whatever their class.
- scans: scans are redrawn within classes, as if they had nothing to do with each other.
- logit: `within`, but the logit +- 1.96 standard deviations of the redrawn logits (of the AUC).

    python bench/coverage.py [--simulations 1000] [--json coverage.json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from medblip.bootstrap import draw_weights, interval
from medblip.metrics import weighted_scores

BETWEEN_SUBJECTS = 0.7
HEAD = ("subjects", "auc", "method", "metric")
NUMBERS = ("coverage", "too_low", "too_high", "width")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Coverage of nominal 95 % intervals, for two sizes of a study and three AUCs."""

    simulations: int = 1000
    """Studies of each kind; the standard error of a coverage is 0.007 for 1,000."""
    draws: int = 1000
    """Of the bootstrap in each study."""
    seed: int = 0
    """Of everything."""
    json: Path | None = None
    """File for the numbers."""


def simulate(num_subjects: int, auc: float, draw: np.random.Generator) -> tuple[NDArray, NDArray, list[str]]:
    """One study: truth of each scan, probabilities `N 2`, subjects."""
    apart = np.sqrt(2) * norm.ppf(auc)
    truth_S = (np.arange(num_subjects) >= 0.6 * num_subjects).astype(int)
    subject_N = np.repeat(np.arange(num_subjects), draw.integers(1, 4, size=num_subjects))
    truth_N = truth_S[subject_N]
    own_N = draw.normal(scale=np.sqrt(BETWEEN_SUBJECTS), size=num_subjects)[subject_N]
    noise_N = draw.normal(scale=np.sqrt(1 - BETWEEN_SUBJECTS), size=len(subject_N))
    p_N = expit((truth_N - 0.5) * apart + own_N + noise_N)  # half way between the classes is 0.5
    return truth_N, np.c_[1 - p_N, p_N], [str(subject) for subject in subject_N]


def coverage(num_subjects: int, auc: float, simulations: int, draws: int, seed: int) -> list[dict]:
    """The fraction of intervals that hold the true value, their mean width and how many missed on each side."""
    truths = {"macro_auc": auc, "balanced_accuracy": float(norm.cdf(norm.ppf(auc) / np.sqrt(2)))}
    found: dict[tuple[str, str], list] = {}
    for number in range(simulations):
        draw = np.random.default_rng([seed, num_subjects, round(1000 * auc), number])
        truth_N, p_NK, subjects = simulate(num_subjects, auc, draw)
        everyone_N, alone = np.zeros_like(truth_N), [str(scan) for scan in range(len(truth_N))]
        redrawn = {
            "within": draw_weights(truth_N, subjects, draws, number),
            "over all": draw_weights(everyone_N, subjects, draws, number),
            "scans": draw_weights(truth_N, alone, draws, number),
        }
        for method, weight_DN in redrawn.items():
            scores = weighted_scores(truth_N, p_NK, weight_DN)
            for metric in truths:
                found.setdefault((method, metric), []).append(interval(scores[metric]))
            if method == "within":
                found.setdefault(("logit", "macro_auc"), []).append(_logit_interval(truth_N, p_NK, scores["macro_auc"]))
    rows = []
    for (method, metric), intervals in found.items():
        low, high = np.array(intervals).T
        rows.append(
            {
                "subjects": num_subjects,
                "auc": auc,
                "method": method,
                "metric": metric,
                "coverage": float(((low <= truths[metric]) & (truths[metric] <= high)).mean()),
                "too_low": float((high < truths[metric]).mean()),
                "too_high": float((low > truths[metric]).mean()),
                "width": float((high - low).mean()),
            }
        )
    return rows


def _logit_interval(truth_N: NDArray, p_NK: NDArray, auc_D: NDArray) -> list[float]:
    auc = weighted_scores(truth_N, p_NK, np.ones((1, len(truth_N))))["macro_auc"][0]
    inside = np.clip([auc, *auc_D], 1e-4, 1 - 1e-4)
    half = 1.96 * logit(inside[1:]).std()
    return expit([logit(inside[0]) - half, logit(inside[0]) + half]).tolist()


def main(options: Options) -> None:
    """Prints a row for each kind of study, method and metric."""
    rows = []
    print("| " + " | ".join((*HEAD, *NUMBERS)) + " |")
    print("|---" * len((*HEAD, *NUMBERS)) + "|")
    for num_subjects in (150, 40):
        for auc in (0.70, 0.78, 0.85):
            for row in coverage(num_subjects, auc, options.simulations, options.draws, options.seed):
                rows.append(row)
                cells = [str(row[name]) for name in HEAD] + [f"{row[name]:.3f}" for name in NUMBERS]
                print("| " + " | ".join(cells) + " |", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"options": {"simulations": options.simulations, "draws": options.draws}, "rows": rows})
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
