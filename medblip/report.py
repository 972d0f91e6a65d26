"""An evaluation for people: report.json, report.md, the table on the terminal, and the confusion picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medblip.progress import write_json

COLUMNS = ("arm", "balanced accuracy [95 % CI]", "macro AUC [95 % CI]", "scans", "subjects")
NO_SCORE = "-"


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Writes report.json, report.md and, where a cohort has scores, confusion.png into a folder that exists."""
    write_json(out / "report.json", report)
    has_picture = draw_confusion(out / "confusion.png", report["cohorts"])
    (out / "report.md").write_text(markdown(report, has_picture), encoding="utf-8")


def plain_table(report: dict[str, Any]) -> str:
    """One row per cohort and arm, in columns, for a terminal."""
    rows = [("cohort", *COLUMNS)]
    for cohort, arms in report["cohorts"].items():
        rows += [(cohort, *_cells(name, arm)) for name, arm in arms.items()]
        rows.append((cohort, "chance", *_chance(next(iter(arms.values()))), "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    title = f"{report['model']} on the split '{report['split']}', record tier {report['ehr']}"
    return "\n".join([title, "", head, "-" * len(head), *body])


def markdown(report: dict[str, Any], has_picture: bool) -> str:
    """The whole of report.md."""
    counts = report["counts"]
    lines = [
        f"# Zero-shot diagnosis: {report['model']}",
        "",
        f"- split: {report['split']}",
        f"- record tier: {report['ehr']}",
        f"- scans: {counts['scored']} scored, {counts['without_diagnosis']} left out for having no diagnosis, "
        f"{counts['scans']} in the split",
        f"- intervals: 95 %, percentiles of {report['bootstrap']} bootstrap draws of subjects with all their scans; "
        "draws that lose a class are left out",
        f"- code: {report['commit'] or 'not from a git checkout'}; seed: {report['seed']}; "
        f"sha256 of split.csv: {report['split_sha256'] or 'no split.csv'}",
        *(
            f"- arm {name}: {arm['image']}, {'the record' if arm['record'] else 'no record'}"
            for name, arm in report["arms"].items()
        ),
        *(f"- note: {note}" for note in report["notes"]),
    ]
    for cohort, arms in report["cohorts"].items():
        first = next(iter(arms.values()))
        lines += ["", f"## {cohort}", "", f"Classes: {', '.join(first['classes'])}.", "", *_markdown_row(COLUMNS)]
        lines += _markdown_row(["---"] * len(COLUMNS))
        for name, arm in arms.items():
            lines += _markdown_row(_cells(name, arm))
        lines += _markdown_row(["chance", *_chance(first), "", ""])
        for name, arm in arms.items():
            if arm["confusion"]:
                lines += ["", *_markdown_confusion(name, arm)]
    if has_picture:
        lines += ["", "![Confusion of diagnoses](confusion.png)"]
    lines += ["", "Research use only; not a medical device."]
    return "\n".join(lines) + "\n"


def draw_confusion(path: Path, cohorts: dict[str, Any], shown: tuple[str, ...] = ("image", "both")) -> bool:
    """Draws a panel per cohort and arm: counts, shaded by the share of the row; False if there is nothing to draw.

    A picture of an earlier evaluation does not stay.
    """
    path.unlink(missing_ok=True)
    scored = {cohort: arms for cohort, arms in cohorts.items() if any(arm["confusion"] for arm in arms.values())}
    names = [name for name in shown if any(name in arms for arms in scored.values())]
    if not names:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(names) + 0.4, 3.5 * len(scored)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(scored), len(names), squeeze=False)
    for row, (cohort, arms) in zip(axes, scored.items(), strict=True):
        for panel, name in zip(row, names, strict=True):
            _draw_panel(panel, f"{cohort}, arm {name}", arms[name])
    figure.savefig(path, dpi=150)
    return True


def _draw_panel(panel, title: str, arm: dict[str, Any]) -> None:
    classes, counts = arm["classes"], arm["confusion"]
    shares = [[count / sum(row) for count in row] for row in counts]
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            share = shares[y][x]
            colour = "white" if share > 0.6 else "black"
            panel.text(x, y, f"{count}\n{share:.0%}", ha="center", va="center", color=colour)
    panel.set_title(f"{title}\nbalanced accuracy {arm['balanced_accuracy']:.2f}", fontsize=10)
    panel.set_xticks(range(len(classes)), classes)
    panel.set_yticks(range(len(classes)), classes)
    panel.set_xlabel("answer")
    panel.set_ylabel("diagnosis")


def _cells(name: str, arm: dict[str, Any]) -> list[str]:
    scores = [NO_SCORE, NO_SCORE]
    if arm["ci95"]:
        scores = [
            f"{arm[metric]:.3f} [{arm['ci95'][metric][0]:.3f}, {arm['ci95'][metric][1]:.3f}]"
            for metric in ("balanced_accuracy", "macro_auc")
        ]
    return [name, *scores, str(arm["n_scans"]), str(arm["n_subjects"])]


def _chance(arm: dict[str, Any]) -> list[str]:
    return [f"{1 / len(arm['classes']):.3f}", "0.500"] if arm["ci95"] else [NO_SCORE, NO_SCORE]


def _markdown_row(cells) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _markdown_confusion(name: str, arm: dict[str, Any]) -> list[str]:
    classes = arm["classes"]
    rows = _markdown_row([f"{name}: diagnosis \\ answer", *classes, "recall"]) + _markdown_row(
        ["---"] * (len(classes) + 2)
    )
    for diagnosis, counts in zip(classes, arm["confusion"], strict=True):
        rows += _markdown_row([diagnosis, *map(str, counts), f"{arm['recall'][diagnosis]:.3f}"])
    return [*rows, "", f"Macro F1 {arm['macro_f1']:.3f}; {arm['ci95']['draws']} draws."]
