"""Evaluations of the same scans side by side, and whether one is better than another: `medblip compare`.

Reads report.json and predictions.csv only: no model, no shards. Scans are paired by KEY, cohort by cohort and arm by
arm, and subjects are redrawn with all their scans for both at once, so that what the two share cancels out.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from medblip.arms import classes_of
from medblip.text import DIAGNOSIS_ANSWERS

if TYPE_CHECKING:
    from medblip.report_page import Block

METRICS = {"balanced_accuracy": "balanced accuracy", "macro_auc": "macro AUC"}
SAME_OR_SAID = ("ehr", "recipe", "rule", "commit", "bootstrap", "seed")
"""Entries of report.json whose difference is noted: it may be what is compared, or may spoil the comparison."""
OF_EACH_MODEL = ("scores", "offsets")
"""Of an entry `rule`, what any two models differ in."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Two or more evaluations of the same scans side by side, with paired tests.

    Examples:
      medblip compare evaluation/ other-evaluation/ --out comparison/
    """

    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders that `medblip evaluate` wrote, of the same split.csv."""
    out: str = "comparison"
    """Folder for compare.json, compare.md and compare.html; made if missing."""
    bootstrap: int = 1000
    """Draws of subjects for intervals and p-values."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not 2 <= len(self.evaluations) <= len(ascii_uppercase):
            raise ValueError(f"compare needs 2 to {len(ascii_uppercase)} evaluations, not {len(self.evaluations)}")
        if self.bootstrap < 1000:
            raise ValueError(f"--bootstrap must be at least 1000, not {self.bootstrap}: fewer draws give no interval")


class Answer(NamedTuple):
    """A row of predictions.csv; a class that was not offered has no probability."""

    subject: str
    diagnosis: str
    probabilities: dict[str, float]


Answers = dict[tuple[str, str], dict[str, list[Answer]]]
"""By cohort and arm, then by KEY: one, or in a shuffled arm one of each round."""


class Evaluation(NamedTuple):
    """A folder that `medblip evaluate` wrote, under a letter."""

    letter: str
    folder: str
    report: dict[str, Any]
    answers: Answers


def compare(options: CompareOptions) -> int:
    """Compares, writes the folder `--out` and prints the paired differences; returns the exit code.

    Raises:
        ValueError: if the evaluations are of different splits, have no scan in common, or are not whole.
    """
    from medblip.progress import write_json
    from medblip.report_page import write_pages

    found = [read(letter, Path(path)) for letter, path in zip(ascii_uppercase, options.evaluations, strict=False)]
    check_same_split(found)
    result = {
        "evaluations": {one.letter: identity(one) for one in found},
        "split": found[0].report["split"],
        "split_sha256": found[0].report.get("split_sha256"),
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "cohorts": {},
        "notes": differences(found),
    }
    for cohort in sorted({cohort for one in found for cohort in one.report["cohorts"]}):
        pairs, notes = compare_cohort(found, cohort, options)
        result["cohorts"][cohort] = {
            "arms": scores_side_by_side(found, "cohorts", cohort),
            "baselines": scores_side_by_side(found, "baselines", cohort),
            "paired": pairs,
        }
        result["notes"] += [f"{cohort}: {note}" for note in notes]
    if not any(cohort["paired"] for cohort in result["cohorts"].values()):
        raise ValueError("no cohort has an arm with two diagnoses on common scans: " + "; ".join(result["notes"]))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", result)
    write_pages(out, "compare", blocks(result, out))
    print(plain_table(result))
    print(f"\nwritten to {out}/; begin with compare.md")
    return 0


def read(letter: str, folder: Path) -> Evaluation:
    """An evaluation from its files.

    Raises:
        ValueError: naming the file and the row that does not fit.
    """
    for name in ("report.json", "predictions.csv"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give a folder that `medblip evaluate` wrote")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    answers: Answers = defaultdict(lambda: defaultdict(list))
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                p = {name: float(row[f"p_{name}"]) for name in DIAGNOSIS_ANSWERS if row[f"p_{name}"]}
                answer = Answer(row["subject_id"], row["diagnosis"], p)
                answers[row["cohort"], row["arm"]][row["scan_id"]].append(answer)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{folder}/predictions.csv, line {number}: {error!r}; evaluate again") from None
    return Evaluation(letter, folder.resolve().name, report, answers)


def check_same_split(found: list[Evaluation]) -> None:
    """Raises ValueError, naming each evaluation, if they are of different split.csv files or splits."""
    for name in ("split_sha256", "split"):
        if len({one.report.get(name) for one in found}) > 1:
            told = "; ".join(f"{one.letter} ({one.folder}) has {one.report.get(name) or 'none'}" for one in found)
            raise ValueError(f"the evaluations differ in {name}, so their scores are of different scans: {told}")


def differences(found: list[Evaluation]) -> list[str]:
    """What is not the same in all evaluations beside the model."""
    notes = []
    for name in SAME_OR_SAID:
        entries = [one.report.get(name) for one in found]
        parts = {name: entries}
        if all(isinstance(entry, dict) for entry in entries):
            keys = dict.fromkeys(key for entry in entries for key in entry)
            parts = {f"{name} {key}": [entry.get(key) for entry in entries] for key in keys if key not in OF_EACH_MODEL}
        for title, values in parts.items():
            if any(value != values[0] for value in values):
                told = "; ".join(f"{one.letter}: {value}" for one, value in zip(found, values, strict=True))
                notes.append(f"{title} differs: {told}")
    return notes


def identity(one: Evaluation) -> dict[str, Any]:
    """What tells an evaluation from the others: the model, what of the record it read, and how it was trained."""
    trained = one.report.get("trained_on") or {}
    return {
        "folder": one.folder,
        "model": one.report["model"],
        "ehr": one.report["ehr"],
        "trained_scans": trained.get("scans"),
        "steps": trained.get("steps"),
        "train_seed": trained.get("seed"),
        "commit": one.report.get("commit"),
    }


def scores_side_by_side(found: list[Evaluation], entry: str, cohort: str) -> dict[str, dict[str, Any]]:
    """By arm or baseline, then by letter: the numbers of each report.json as they stand, curves left out."""
    scores: dict[str, dict[str, Any]] = defaultdict(dict)
    for one in found:
        for name, arm in ((one.report.get(entry) or {}).get(cohort) or {}).items():
            scores[name][one.letter] = {
                key: arm.get(key) for key in ("n_scans", "n_subjects", "classes", *METRICS, "ci95")
            }
    return dict(scores)


def compare_cohort(
    found: list[Evaluation], cohort: str, options: CompareOptions
) -> tuple[list[dict[str, Any]], list[str]]:
    """The paired difference of each two evaluations in each arm that both have, and what could not be compared.

    Raises:
        ValueError: naming a scan that has two diagnoses or subjects.
    """
    import numpy as np

    from medblip import metrics

    pairs, notes = [], []
    for a, b in combinations(found, 2):
        arms = [arm for name, arm in a.answers if name == cohort and (cohort, arm) in b.answers]
        if not arms:
            notes.append(f"{a.letter} and {b.letter} have no arm in common")
        for arm in arms:
            title = f"{a.letter} - {b.letter}, arm {arm}"
            in_a, in_b = a.answers[cohort, arm], b.answers[cohort, arm]
            keys = sorted(in_a.keys() & in_b.keys())
            if len(keys) < len(in_a.keys() | in_b.keys()):
                notes.append(f"{title}: {len(keys)} common scans, of {len(in_a)} and {len(in_b)}")
            # A scan of a shuffled arm is there once a round; rounds beyond those of the other are left out.
            rows = [(key, *both) for key in keys for both in zip(in_a[key], in_b[key], strict=False)]
            for key, x, y in rows:
                if (x.subject, x.diagnosis) != (y.subject, y.diagnosis):
                    raise ValueError(
                        f"{title}: scan {key} has another subject or diagnosis in {a.folder} than in {b.folder}"
                    )
            truth = [x.diagnosis for _, x, _ in rows]
            classes = classes_of(truth)
            if len(classes) < 2:
                notes.append(f"{title}: {len(classes)} diagnoses on the common scans, so there is nothing to compare")
                continue
            if any(name not in answer.probabilities for _, *both in rows for answer in both for name in classes):
                notes.append(f"{title}: not all of {', '.join(classes)} were offered in both, so they are not compared")
                continue
            p_a_NK, p_b_NK = (
                metrics.rows_sum_to_1(np.array([[answer.probabilities[name] for name in classes] for answer in side]))
                for side in ([x for _, x, _ in rows], [y for *_, y in rows])
            )
            subjects = [x.subject for _, x, _ in rows]
            tested = metrics.compare(truth, p_a_NK, p_b_NK, classes, subjects, options.bootstrap, options.seed)
            counts = {"common_scans": len(keys), "common_subjects": len(set(subjects)), "classes": classes}
            pairs += [
                {"arm": arm, "a": a.letter, "b": b.letter, "metric": metric, **tested[metric], **counts}
                for metric in METRICS
            ]
    return pairs, notes


PAIRED_COLUMNS = ("arm", "evaluations", "metric", "difference [95 % CI]", "p", "common scans", "subjects")


def _paired_rows(cohort: dict[str, Any]) -> list[list[str]]:
    from medblip.report import p_value, with_interval

    return [
        [pair["arm"], f"{pair['a']} - {pair['b']}", METRICS[pair["metric"]]]
        + [with_interval(pair["difference"], pair["ci95"]), p_value(pair["p_value"])]
        + [str(pair["common_scans"]), str(pair["common_subjects"])]
        for pair in cohort["paired"]
    ]


def plain_table(result: dict[str, Any]) -> str:
    """The paired differences in columns, for a terminal."""
    from medblip.report_page import in_columns

    rows = [("cohort", *PAIRED_COLUMNS)]
    rows += [(name, *row) for name, cohort in result["cohorts"].items() for row in _paired_rows(cohort)]
    names = [
        f"{letter}: {one['folder']} ({one['model']}), record tier {one['ehr']}"
        for letter, one in result["evaluations"].items()
    ]
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join([*names, "", *in_columns(rows), *notes])


def blocks(result: dict[str, Any], out: Path) -> list[Block]:
    """The document; draws a forest plot of each cohort into `figures/` on the way."""
    from medblip.figures import draw_forest
    from medblip.report import RESEARCH_ONLY, score_cell
    from medblip.report_page import Bullets, Heading, Paragraph, Picture, Table

    letters = list(result["evaluations"])
    num_tests = sum(len(cohort["paired"]) for cohort in result["cohorts"].values())
    found: list[Block] = [
        Heading(1, f"Comparison of {len(letters)} evaluations"),
        Paragraph(RESEARCH_ONLY, is_warning=True),
        Table(
            ("", "folder", "model", "record tier", "trained on scans", "steps", "seed", "code"),
            [
                [letter, *("unknown" if value is None else str(value) for value in one.values())]
                for letter, one in result["evaluations"].items()
            ],
            is_words=True,
        ),
        Paragraph(
            f"Split {result['split']}; sha256 of split.csv: {result['split_sha256'] or 'no split.csv'}. Differences "
            f"are on common scans, paired, with {result['bootstrap']} bootstrap draws of subjects (seed "
            f"{result['seed']}). {num_tests} tests are made here and their p-values are not corrected for that."
        ),
        *([Heading(2, "Notes"), Bullets(result["notes"])] if result["notes"] else []),
    ]
    for number, (name, cohort) in enumerate(result["cohorts"].items()):
        found.append(Heading(2, name))
        for metric, title in METRICS.items():
            rows = [
                [arm, *(score_cell(scores.get(letter), metric) for letter in letters)]
                for entry in ("arms", "baselines")
                for arm, scores in cohort[entry].items()
            ]
            found += [
                Heading(3, f"{title[0].upper()}{title[1:]} [95 % interval], each on all its scans"),
                Table(("arm", *letters), rows),
            ]
        if cohort["paired"]:
            found += [Heading(3, "Paired differences on common scans"), Table(PAIRED_COLUMNS, _paired_rows(cohort))]
        arms, baselines = (
            {f"{arm}, {letter}": scores[letter] for arm, scores in cohort[entry].items() for letter in scores}
            for entry in ("arms", "baselines")
        )
        if draw_forest(out / f"figures/compare-{number}.png", name, arms, baselines):
            found.append(Picture(f"figures/compare-{number}.png", f"{name}: scores of arms and baselines"))
    return [*found, Paragraph(RESEARCH_ONLY, is_warning=True)]
