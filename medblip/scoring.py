"""From the log-likelihoods of the options to probabilities, by a rule that is chosen on validation and then fixed.

N asks, O options. An option's log-likelihood may be taken whole, per token or per character, and with or without the
null: what the same option gets with a blank volume and the question alone. Without the null a short or frequent answer
wins whatever the scan shows; source: domain-conditional PMI (arXiv 2104.08315). Or it is taken whole and balanced: with
an offset of each option by which all are equally probable over scans of each diagnosis, that are not those evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # `medblip --help` must not wait for numpy
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Rule(NamedTuple):
    """How options are compared."""

    length: Literal["sum", "per token", "per character"]
    minus_null: bool
    balanced: bool = False
    """With the options' offsets, see `balancing_offsets`."""


RuleName = Literal[
    "sum-minus-null",
    "sum",
    "per-token-minus-null",
    "per-token",
    "per-character-minus-null",
    "per-character",
    "sum-balanced",
]
RULES: dict[RuleName, Rule] = {
    "sum-minus-null": Rule("sum", True),
    "sum": Rule("sum", False),
    "per-token-minus-null": Rule("per token", True),
    "per-token": Rule("per token", False),
    "per-character-minus-null": Rule("per character", True),
    "per-character": Rule("per character", False),
    "sum-balanced": Rule("sum", False, balanced=True),
}
DEFAULT_RULE = RULES["sum-minus-null"]

LEAST_PROBABILITY = 1e-9
"""Of a right answer when rules are compared: one that is ruled out costs much, but not everything."""


class Options(NamedTuple):
    """Answers to choose from, with what a rule needs to know of them."""

    answers: tuple[str, ...]
    num_tokens: tuple[int, ...]
    """With the end token."""
    null_logp: tuple[float, ...]


def probabilities(logp_NO: NDArray, options: Options, rule: Rule, offset_O: NDArray | float = 0.0) -> NDArray:
    """Softmax over the options, `N O` in float64; NaN where a log-likelihood is NaN.

    Args:
        logp_NO: log-likelihood of each whole option with its end token.
        options: what they are.
        rule: how they are compared.
        offset_O: added before the softmax; of a rule that is `balanced`.
    """
    import numpy as np

    score_NO = np.array(logp_NO, dtype=np.float64).reshape(-1, len(options.answers))
    if rule.minus_null:
        score_NO = score_NO - np.array(options.null_logp)
    if rule.length == "per token":
        score_NO = score_NO / np.array(options.num_tokens)
    if rule.length == "per character":
        score_NO = score_NO / np.array([len(answer) for answer in options.answers])
    with np.errstate(invalid="ignore"):
        score_NO = score_NO + offset_O
        score_NO = np.exp(score_NO - score_NO.max(axis=1, keepdims=True))
    return score_NO / score_NO.sum(axis=1, keepdims=True)


def balancing_offsets(truth_N: NDArray, logp_NO: NDArray) -> NDArray:
    """What to add to each option's log-likelihood so that all are equally probable on the average of these asks.

    Each right option counts the same, however often it occurs. This moves the boundaries between the options and
    nothing else: a fitted intercept without a slope ("calibration in the large", Van Calster 2019). Training needs it:
    it weighs an answer's token by one over the answer's length, so that "Dementia" comes out more probable than longer
    answers, and a short training ends with a lean of its own.

    Args:
        truth_N: number of the right option.
        logp_NO: as in `probabilities`. An option that is never right keeps its place: its offset is 0.

    Returns:
        `O` in float64; those of the options that occur sum to 0.
    """
    import numpy as np

    logp_NO, offset_O = np.asarray(logp_NO, dtype=np.float64), np.zeros(np.shape(logp_NO)[1])
    occurring, place_N = np.unique(truth_N, return_inverse=True)
    logp_NO = np.maximum(logp_NO - logp_NO.max(axis=1, keepdims=True), -100)  # an option may be ruled out
    logp_NO = logp_NO[:, occurring]
    weight_N = 1 / np.bincount(place_N)[place_N] / len(occurring)
    found_O = np.zeros(len(occurring))
    for _ in range(1000):
        p_NO = np.exp(logp_NO + found_O - (logp_NO + found_O).max(axis=1, keepdims=True))
        step_O = np.log(len(occurring) * np.maximum(weight_N @ (p_NO / p_NO.sum(axis=1, keepdims=True)), 1e-300))
        found_O -= step_O
        if np.abs(step_O).max() < 1e-9:
            break
    offset_O[occurring] = found_O - found_O.mean()
    return offset_O


def check_likelihoods(logp_NO: NDArray, options: Options, names: Sequence[str]) -> None:
    """Refuses likelihoods that give no probability, since any answer would then do.

    Args:
        logp_NO, options: as in `probabilities`.
        names: of each ask, that a user can find: the KEY of its scan and the arm.

    Raises:
        ValueError: with the number of such asks, and the names and log-likelihoods of the first.
    """
    import numpy as np

    bad = np.flatnonzero(np.isnan(probabilities(logp_NO, options, DEFAULT_RULE)).any(axis=1))
    if len(bad):
        first = "; ".join(f"{names[row]}: {np.array(logp_NO[row]).tolist()}" for row in bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(names)} answers have log-likelihoods that are not finite ({first}"
            f"{'; ...' if len(bad) > 5 else ''}; of a blank scan: {list(options.null_logp)}); the model's output is "
            "broken for these scans: evaluate an earlier checkpoint, or look at these scans"
        )


def choose_rule(truth_N: NDArray, logp_NO: NDArray, options: Options) -> tuple[Rule, dict[str, float]]:
    """The rule under which the truth is most probable, the earlier of RULES where they are equal; and each one's score.

    The score is the mean natural logarithm of the right option's probability, each right option counting the same
    however often it occurs; a balanced rule is judged on each ask with the offsets of all others. Of some thirty
    scans, balanced accuracies of two rules differ by a scan or two; this looks at every probability, and is highest
    for the true ones (a proper score: Gneiting and Raftery 2007).

    Args:
        truth_N: number of the right option.
        logp_NO: as in `probabilities`.
        options: what they are.
    """
    import numpy as np

    scores = {}
    for name, rule in RULES.items():
        offset_NO = _offsets_of_others(truth_N, np.asarray(logp_NO)) if rule.balanced else 0.0
        p_N = probabilities(logp_NO, options, rule, offset_NO)[np.arange(len(truth_N)), truth_N]
        log_N = np.log(np.maximum(p_N, LEAST_PROBABILITY))
        scores[name] = float(np.mean([log_N[truth_N == option].mean() for option in np.unique(truth_N)]))
    return RULES[max(scores, key=scores.get)], scores


def _offsets_of_others(truth_N: NDArray, logp_NO: NDArray) -> NDArray:
    import numpy as np

    others = (np.arange(len(truth_N)) != row for row in range(len(truth_N)))
    return np.array([balancing_offsets(truth_N[rest], logp_NO[rest]) for rest in others])
