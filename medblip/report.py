"""An evaluation for people: report.md and report.html, both from report.json's entries, and the table on the terminal.

Sections follow what the report has; one whose entry is missing or empty is left out. Every number is printed as it is
in report.json, rounded to three places.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from medblip.figures import draw_confusion, draw_curves, draw_forest
from medblip.methods import methods_markdown
from medblip.progress import write_json
from medblip.report_page import Block, Bullets, Gallery, Heading, Paragraph, Picture, Table, in_columns, write_pages

NO_SCORE = "-"
RESEARCH_ONLY = "Research use only; not a medical device. No number here says anything about one person's health."
ARM_COLUMNS = ("balanced accuracy [95 % CI]", "macro AUC [95 % CI]", "macro F1 [95 % CI]", "scans", "subjects")
TERMINAL_COLUMNS = ("cohort", "arm", ARM_COLUMNS[0], ARM_COLUMNS[1], "scans", "subjects")
BASELINES = {
    "majority": "baseline: most frequent class",
    "voxel_svm": "baseline: linear SVM on 4 mm voxels",
    "record_logistic": "baseline: logistic regression on the record",
}
VQA_COLUMNS = {
    "closed": ("accuracy", "accuracy_by_likelihood", "majority_accuracy", "unparsable"),
    "number": ("mae", "within_tolerance", "tolerance", "unparsable"),
    "open": ("exact_match", "token_f1", "bleu1", "bleu4", "rouge_l"),
}
"""Columns of a question's table by its type; the first one tells the type."""

Report = dict[str, Any]
Scores = dict[str, Any]


def write_report(out: Path, report: Report) -> None:
    """Writes report.json, report.md, report.html, methods.md and the pictures into a folder that exists."""
    write_json(out / "report.json", report)
    draw_confusion(out / "confusion.png", report["cohorts"])
    shutil.rmtree(out / "figures", ignore_errors=True)  # of an earlier evaluation
    write_pages(out, "report", blocks(report, out))
    (out / "methods.md").write_text(methods_markdown(report), encoding="utf-8")


def plain_table(report: Report) -> str:
    """One row per cohort and arm, in columns, for a terminal."""
    rows: list[tuple[str, ...]] = [TERMINAL_COLUMNS]
    for cohort, arms in report["cohorts"].items():
        for name, arm in arms.items():
            accuracy, auc, _, *counts = score_cells(arm)
            rows.append((cohort, name, accuracy, auc, *counts))
        rows.append((cohort, "chance", *chance_cells(next(iter(arms.values())))[:2], "", ""))
    title = f"{report['model']} on the split '{report['split']}', record tier {report['ehr']}"
    return "\n".join([title, "", *in_columns(rows)])


def blocks(report: Report, out: Path) -> list[Block]:
    """The document; draws the pictures of each cohort into `figures/` on the way."""
    found: list[Block] = [
        Heading(1, f"Zero-shot diagnosis: {report['model']}"),
        Paragraph(RESEARCH_ONLY, is_warning=True),
        Paragraph(
            f"Split {report['split']}, record tier {report['ehr']}. Cohorts are scored apart and never pooled, because "
            "the cohort alone tells much of the diagnosis."
        ),
        *_summary(report),
        *([Heading(2, "Notes"), Bullets(report["notes"])] if report.get("notes") else []),
    ]
    for number, cohort in enumerate(report["cohorts"]):
        found += _cohort(report, cohort, f"figures/{number}-{re.sub(r'[^A-Za-z0-9_-]', '_', cohort)}", out)
    for cohort in sorted((report.get("vqa") or {}).keys() - report["cohorts"].keys()):
        found += [Heading(2, cohort), Paragraph("No scan has a diagnosis."), *_vqa(report["vqa"][cohort])]
    return [*found, *_provenance(report), Paragraph(RESEARCH_ONLY, is_warning=True)]


def number(value: float | int | None) -> str:
    """A score to three places, a count whole, what is missing as a dash."""
    if value is None:
        return NO_SCORE
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def with_interval(value: float | None, interval: list[float] | None) -> str:
    """`0.512 [0.401, 0.633]`; without the interval where there is none."""
    if value is None or not interval:
        return number(value)
    return f"{number(value)} [{interval[0]:.3f}, {interval[1]:.3f}]"


def score_cell(scores: Scores | None, metric: str) -> str:
    """A score with its interval, out of an arm or a baseline that may be missing."""
    return with_interval((scores or {}).get(metric), ((scores or {}).get("ci95") or {}).get(metric))


def score_cells(scores: Scores) -> list[str]:
    """ARM_COLUMNS of an arm or a baseline."""
    cells = [score_cell(scores, metric) for metric in ("balanced_accuracy", "macro_auc", "macro_f1")]
    return [*cells, number(scores.get("n_scans")), number(scores.get("n_subjects"))]


def chance_cells(scores: Scores) -> list[str]:
    """ARM_COLUMNS of guessing."""
    has_score = scores.get("balanced_accuracy") is not None
    cells = [f"{1 / len(scores['classes']):.3f}", "0.500"] if has_score else [NO_SCORE, NO_SCORE]
    return [*cells, NO_SCORE, "", ""]


def p_value(value: float | None) -> str:
    """To three places, small ones as a bound."""
    return "< 0.001" if value is not None and value < 0.001 else number(value)


def _of(report: Report, entry: str, cohort: str) -> Any:
    """What an entry of the report has of a cohort; None where either is missing."""
    return (report.get(entry) or {}).get(cohort)


def _summary(report: Report) -> list[Block]:
    """Of each cohort the arm `image` beside what it must beat, and whether the scan adds to the record."""
    arms = [name for name in ("image", "shuffled_image", "text", "both") if name in report["arms"]]
    fitted = [found or {} for found in (report.get("baselines") or {}).values()]
    names = [
        name for name in BASELINES if name != "majority" and any(name in found for found in fitted)
    ]  # it is chance
    found: list[Block] = [Heading(2, "Summary")]
    for metric, title in (("balanced_accuracy", "Balanced accuracy"), ("macro_auc", "Macro AUC")):
        rows = []
        for cohort, scored in report["cohorts"].items():
            baselines = _of(report, "baselines", cohort) or {}
            pairs = _of(report, "comparisons", cohort) or []
            both = [pair for pair in pairs if (pair["a"], pair["b"], pair["metric"]) == ("both", "text", metric)]
            first = next(iter(scored.values()))
            chance = chance_cells(first)[0 if metric == "balanced_accuracy" else 1]
            rows.append(
                [cohort, ", ".join(first["classes"]), number(first.get("n_subjects"))]
                + [score_cell(scored.get(name), metric) for name in arms]
                + [score_cell(baselines.get(name), metric) for name in names]
                + [chance, with_interval(both[0]["difference"], both[0].get("ci95")) if both else NO_SCORE]
            )
        titles = [name.replace("_", " ") for name in (*arms, *names)]
        found += [
            Heading(3, f"{title} [95 % interval]"),
            Table(("cohort", "classes", "subjects", *titles, "chance", "both - text"), rows),
        ]
    found.append(
        Paragraph(
            "image: the scan alone, the number to report. shuffled image: another subject's scan, which must be at "
            "chance. both - text: what the scan adds to the record."
        )
    )
    return found


def _cohort(report: Report, cohort: str, prefix: str, out: Path) -> list[Block]:
    arms, baselines = report["cohorts"][cohort], _of(report, "baselines", cohort) or {}
    first = next(iter(arms.values()))
    rows = [[name, *score_cells(arm)] for name, arm in arms.items()]
    rows += [[BASELINES.get(name, name), *score_cells(scores)] for name, scores in baselines.items()]
    found: list[Block] = [
        Heading(2, cohort),
        Paragraph(f"Classes: {', '.join(first['classes'])}."),
        Table(("arm", *ARM_COLUMNS), [*rows, ["chance", *chance_cells(first)]]),
    ]
    if draw_forest(out / f"{prefix}-forest.png", cohort, arms, baselines):
        found.append(Picture(f"{prefix}-forest.png", f"{cohort}: scores of arms (round) and baselines (square)"))
    if draw_curves(out / f"{prefix}-curves.png", arms):
        found.append(Picture(f"{prefix}-curves.png", f"{cohort}: ROC and reliability"))
    if draw_confusion(out / f"{prefix}-confusion.png", {cohort: arms}):
        found.append(Picture(f"{prefix}-confusion.png", f"{cohort}: confusion of diagnoses"))
    found += _confusions(arms) + _calibration(arms) + _comparisons(_of(report, "comparisons", cohort))
    found += _age_matched(_of(report, "age_matched", cohort))
    found += _one_scan(_of(report, "one_scan_per_subject", cohort)) + _subgroups(_of(report, "subgroups", cohort))
    return found + _vqa(_of(report, "vqa", cohort)) + _worst(report, cohort)


def _confusions(arms: dict[str, Scores]) -> list[Block]:
    scored = {name: arm for name, arm in arms.items() if arm.get("confusion")}
    if not scored:
        return []
    classes = next(iter(scored.values()))["classes"]
    rows = [
        [name, diagnosis, *map(str, counts)]
        + [
            with_interval(
                (arm.get(rate) or {}).get(diagnosis), ((arm.get("ci95") or {}).get(rate) or {}).get(diagnosis)
            )
            for rate in ("recall", "specificity")
        ]
        for name, arm in scored.items()
        for diagnosis, counts in zip(arm["classes"], arm["confusion"], strict=True)
    ]
    head = (
        "arm",
        "diagnosis",
        *(f"answer {name}" for name in classes),
        "sensitivity [95 % CI]",
        "specificity [95 % CI]",
    )
    return [Heading(3, "Confusion; a shuffled arm counts each scan once per round"), Table(head, rows)]


def _calibration(arms: dict[str, Scores]) -> list[Block]:
    rows = [
        [name, number(arm["ece"]), number(arm.get("ece_if_calibrated")), score_cell(arm, "brier")]
        for name, arm in arms.items()
        if arm.get("ece") is not None
    ]
    head = ("arm", "ECE", "ECE if calibrated", "Brier [95 % CI]")
    text = "ECE if calibrated: what so few subjects would give even if every probability were true."
    return [Heading(3, "Calibration"), Table(head, rows), Paragraph(text)] if rows else []


def _comparisons(pairs: list[dict[str, Any]] | None) -> list[Block]:
    rows = [
        [
            f"{pair['a']} - {pair['b']}",
            pair["metric"].replace("_", " ").replace("auc", "AUC"),
            with_interval(pair["difference"], pair.get("ci95")),
        ]
        + [p_value(pair.get("p_value"))]
        for pair in pairs or []
    ]
    head = ("arms", "metric", "difference [95 % CI]", "p")
    return [Heading(3, "Paired comparisons, on the same scans"), Table(head, rows)] if rows else []


def _age_matched(arms: dict[str, Any] | None) -> list[Block]:
    rows = [
        [name, score_cell(entry, "macro_auc"), str(entry["pairs"])] for name, entry in (arms or {}).items() if entry
    ]
    if not rows:
        return []
    caliper = next(entry["caliper_years"] for entry in (arms or {}).values() if entry)
    title = f"Pairs of subjects at most {caliper:g} years apart in age, the first against the last class"
    return [Heading(3, title), Table(("arm", "AUC [95 % CI]", "pairs"), rows)]


def _one_scan(arms: dict[str, Scores] | None) -> list[Block]:
    rows = [[name, *score_cells(scores)] for name, scores in (arms or {}).items()]
    return [Heading(3, "One scan per subject"), Table(("arm", *ARM_COLUMNS), rows)] if rows else []


def _subgroups(arms: dict[str, dict[str, Scores]] | None) -> list[Block]:
    rows = [
        [name, group, ", ".join(scores["classes"]), *score_cells(scores)]
        for name, groups in (arms or {}).items()
        for group, scores in (groups or {}).items()
    ]
    head = ("arm", "group", "classes", *ARM_COLUMNS)
    return [Heading(3, "Subgroups"), Table(head, rows)] if rows else []


def _vqa(readings: dict[str, dict[str, Scores]] | None) -> list[Block]:
    """A table for each type of question, its rows the questions by what the model was shown."""
    found: list[Block] = []
    for kind, columns in VQA_COLUMNS.items():
        rows = [
            [question, reading, number(scores.get("n")), *(score_cell(scores, column) for column in columns)]
            for question in dict.fromkeys(name for questions in (readings or {}).values() for name in questions)
            for reading, questions in (readings or {}).items()
            if columns[0] in (scores := questions.get(question) or {})
        ]
        if rows:
            titles = [column.replace("_", " ").replace("mae", "mean absolute error") for column in columns]
            found.append(Table((f"{kind} question", "the model saw", "answers", *titles), rows))
    return [Heading(3, "Other questions"), *found] if found else []


def _worst(report: Report, cohort: str) -> list[Block]:
    pictures = [
        Picture(
            entry["picture"],
            f"{entry['key']}: {entry['diagnosis']}, taken for {entry['answer']}; probability of "
            f"{entry['diagnosis']} {number(entry.get('probability'))} (arm {entry['arm']})",
        )
        for entry in report.get("worst") or []
        if entry["cohort"] == cohort and entry.get("picture")
    ]
    return [Heading(3, "Worst mistakes"), Gallery(pictures)] if pictures else []


def _provenance(report: Report) -> list[Block]:
    """What was evaluated, on what, and how; enough to do it again."""
    counts, rule = report.get("counts") or {}, report.get("rule") or {}
    rows = [
        ["model", report["model"]],
        ["code", report.get("commit") or "not from a git checkout"],
        ["split", f"{report['split']}; sha256 of split.csv: {report.get('split_sha256') or 'no split.csv'}"],
        ["record tier", report["ehr"]],
        ["scans", "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in counts.items())],
        *([["rule", rule_text(rule)]] if rule else []),
        ["intervals", f"95 %, from {report.get('bootstrap')} draws of subjects with all their scans, seed "
         f"{report.get('seed')}; exact limits for few subjects who are all right or all wrong"],
    ]  # fmt: skip
    rows += [[f"arm {name}", f"{arm['image']}, {'the record' if arm['record'] else 'no record'}"]
             for name, arm in report["arms"].items()]  # fmt: skip
    rows.append(["recipe of the volumes", options_text(report.get("recipe"))])
    rows.append(["trained on", options_text(report.get("trained_on"))])
    found: list[Block] = [Heading(2, "How it was made"), Table(("", ""), rows, is_words=True)]
    if rule.get("scores"):
        scores = [[name, number(value)] for name, value in rule["scores"].items()]
        title = "Rules on the validation split, mean log-probability of the right answer"
        found += [Heading(3, title), Table(("rule", "log-probability"), scores)]
    return found


def rule_text(rule: dict[str, Any]) -> str:
    """How likelihoods of answers were compared, in words."""
    chosen = {"val": "chosen on the split val", "given": "given by option", "default": "the default"}
    null = "with the null taken off" if rule.get("minus_null") else "without taking the null off"
    if rule.get("balanced"):
        on = rule.get("balanced_on") or {}
        null = f"balanced over {on.get('scans')} scans of the split {on.get('split')}"
    return f"log-likelihood, {rule.get('length')}, {null}; {chosen.get(rule.get('chosen_on'), 'unknown how chosen')}"


def options_text(options: dict[str, Any] | None) -> str:
    """Names and values, those that are None left out."""
    known = {name: value for name, value in (options or {}).items() if value is not None}
    parts = [
        f"{name}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}"
        for name, value in known.items()
    ]
    return "; ".join(parts) or "unknown"
