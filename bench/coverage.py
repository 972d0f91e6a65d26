"""How often the 95 % intervals of medblip/metrics.py hold the truth, by simulation.

Made-up studies whose true scores are known. One to three scans a subject; what tells classes apart is normal around its
subject's, which is normal around its class's (70 % of the variance between subjects). Two classes, CN and AD three to
two: the true AUC is Phi(d / sqrt(2)) and the true recall of each class Phi(d / 2), d apart in standard deviations.
Three classes of a size, each with a direction of its own; their true scores are those of one study of 100,000 subjects.

- taken: what metrics.py does.
- percentiles: subjects redrawn within classes, and the middle 95 %, which has no width where nothing varies.
- scans: the same with scans redrawn as if they had nothing to do with each other.

    python bench/coverage.py [--simulations 1000] [--subjects 14 40] [--json coverage.json]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, softmax
from scipy.stats import norm

from medblip.bootstrap import draw_weights, interval
from medblip.metrics import score, score_once, weighted_scores

BETWEEN_SUBJECTS = 0.7
CLASSES = {2: ["CN", "AD"], 3: ["CN", "MCI", "AD"]}
METRICS = ("macro_auc", "balanced_accuracy", "macro_f1")
RECALL_OF = "AD"
MANY = 100_000
HEAD = ("classes", "subjects", "auc", "method", "metric")
NUMBERS = ("true", "coverage", "too_low", "too_high", "width", "no_width")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Coverage of nominal 95 % intervals, for sizes of a study and true AUCs."""

    simulations: int = 1000
    """Studies of each kind; the standard error of a coverage is 0.007 for 1,000."""
    draws: int = 1000
    """Of the bootstrap in each study."""
    classes: tuple[int, ...] = (2, 3)
    """Two or three."""
    subjects: tuple[int, ...] = (150, 40, 14)
    """Sizes of a study."""
    aucs: tuple[float, ...] = (0.70, 0.78, 0.85, 0.95, 0.99)
    """True AUCs; of three classes the macro AUC."""
    seed: int = 0
    """Of everything."""
    json: Path | None = None
    """File for the numbers."""


def simulate(truth_S: NDArray, apart: float, draw: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
    """One study of subjects of these classes: truth of each scan, probabilities `N K`, the subject of each scan."""
    subject_N = np.repeat(np.arange(len(truth_S)), draw.integers(1, 4, size=len(truth_S)))
    truth_N, num_classes = truth_S[subject_N], truth_S.max() + 1
    directions = 1 if num_classes == 2 else num_classes
    own_ND = draw.normal(scale=np.sqrt(BETWEEN_SUBJECTS), size=(len(truth_S), directions))[subject_N]
    seen_ND = own_ND + draw.normal(scale=np.sqrt(1 - BETWEEN_SUBJECTS), size=(len(subject_N), directions))
    if num_classes == 2:  # half way between the classes is 0.5
        p_N = expit((truth_N - 0.5) * apart + seen_ND[:, 0])
        return truth_N, np.c_[1 - p_N, p_N], subject_N
    return truth_N, softmax(seen_ND + apart * np.eye(num_classes)[truth_N], axis=1), subject_N


def classes_of_subjects(num_classes: int, num_subjects: int) -> NDArray:
    """CN and AD three to two, or three classes of a size."""
    if num_classes == 2:
        return (np.arange(num_subjects) >= 0.6 * num_subjects).astype(int)
    return np.arange(num_subjects) % num_classes


def true_scores(num_classes: int, num_subjects: int, auc: float) -> tuple[float, dict[str, float]]:
    """How far classes are apart for this AUC, and the true scores of such a study."""
    if num_classes == 2:
        apart = float(np.sqrt(2) * norm.ppf(auc))
        right = float(norm.cdf(apart / 2))
        share_K = np.bincount(classes_of_subjects(2, num_subjects)) / num_subjects
        f1 = float((2 * share_K * right / (2 * share_K * right + 1 - right)).mean())
        return apart, dict(zip((*METRICS, "recall"), (auc, right, f1, right), strict=True))

    def scores(apart: float) -> dict[str, float]:
        truth_N, p_NK, _ = simulate(np.arange(MANY) % num_classes, apart, np.random.default_rng(0))
        return score_once([CLASSES[3][k] for k in truth_N], p_NK, CLASSES[3])

    apart = float(brentq(lambda apart: scores(apart)["macro_auc"] - auc, 0.1, 8, xtol=1e-3))
    found = scores(apart)
    return apart, {name: found[name] for name in METRICS} | {"recall": found["balanced_accuracy"]}


def coverage(num_classes: int, num_subjects: int, auc: float, simulations: int, draws: int, seed: int) -> list[dict]:
    """The fraction of intervals that hold the true value, their mean width, and how many missed on each side."""
    classes, truth_S = CLASSES[num_classes], classes_of_subjects(num_classes, num_subjects)
    apart, truths = true_scores(num_classes, num_subjects, auc)
    found: dict[tuple[str, str], list] = {}
    for number in range(simulations):
        draw = np.random.default_rng([seed, num_classes, num_subjects, round(1000 * auc), number])
        truth_N, p_NK, subject_N = simulate(truth_S, apart, draw)
        subjects, alone = ([str(name) for name in names] for names in (subject_N, range(len(truth_N))))
        intervals = score([classes[k] for k in truth_N], p_NK, classes, subjects, draws, number)["ci95"]
        for metric in METRICS:
            found.setdefault(("taken", metric), []).append(intervals[metric])
        found.setdefault(("taken", "recall"), []).append(intervals["recall"][RECALL_OF])
        for method, names in {"percentiles": subjects, "scans": alone}.items():
            scores = weighted_scores(truth_N, p_NK, draw_weights(truth_N, names, draws, number))
            for metric in METRICS:
                found.setdefault((method, metric), []).append(interval(scores[metric]))
    rows = []
    for (method, metric), intervals in found.items():
        low, high = np.array(intervals).T
        true = truths[metric]
        numbers = (true, ((low <= true) & (true <= high)).mean(), (high < true).mean(), (low > true).mean())
        numbers += ((high - low).mean(), (high - low < 1e-9).mean())
        row = dict(zip(HEAD, (num_classes, num_subjects, auc, method, metric), strict=True))
        rows.append(row | {name: float(number) for name, number in zip(NUMBERS, numbers, strict=True)})
    return rows


def main(options: Options) -> None:
    """Prints a row for each kind of study, method and metric."""
    rows = []
    print("| " + " | ".join((*HEAD, *NUMBERS)) + " |")
    print("|---" * len((*HEAD, *NUMBERS)) + "|")
    for num_classes in options.classes:
        for num_subjects in options.subjects:
            for auc in options.aucs:
                study = (num_classes, num_subjects, auc)
                for row in coverage(*study, options.simulations, options.draws, options.seed):
                    rows.append(row)
                    cells = [str(row[name]) for name in HEAD] + [f"{row[name]:.3f}" for name in NUMBERS]
                    print("| " + " | ".join(cells) + " |", flush=True)
    if options.json:
        settings = {name: getattr(options, name) for name in ("simulations", "draws", "seed")}
        options.json.write_text(json.dumps({"options": settings, "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Options))
