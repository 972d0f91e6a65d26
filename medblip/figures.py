"""The pictures of an evaluation, each from report.json's numbers alone: forest plot, confusion, ROC and reliability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, GREY, RED = "#1f77b4", "#d95f02", "#2a9d5c", "#777777", "#b2182b"
CLASS_COLOURS = {"CN": BLUE, "MCI": ORANGE, "AD": RED}
CURVES_OF = ("image", "both")
"""Arms whose ROC and confusion are drawn, where they were asked."""
RELIABILITY_OF = {"image": BLUE, "text": ORANGE, "both": GREEN}
DOTS_PER_INCH = 130

Scores = dict[str, Any]


def draw_forest(path: Path, title: str, arms: dict[str, Scores], baselines: dict[str, Scores]) -> bool:
    """Balanced accuracy and macro AUC of each arm and baseline with its interval, and the line of chance.

    Returns:
        Whether there was a score to draw; False writes nothing.
    """
    rows = [(name, scores, BLUE) for name, scores in arms.items() if scores.get("balanced_accuracy") is not None]
    rows += [(name, scores, GREY) for name, scores in baselines.items() if scores.get("balanced_accuracy") is not None]
    if not rows:
        return False
    figure = _figure(9.0, 1.3 + 0.34 * len(rows))
    axes = figure.subplots(1, 2, sharey=True)
    chances = {"balanced_accuracy": 1 / len(rows[0][1]["classes"]), "macro_auc": 0.5}
    for axis, (metric, chance) in zip(axes, chances.items(), strict=True):
        axis.axvline(chance, color=RED, linestyle="--", linewidth=1)
        axis.annotate("chance", (chance, 1), xycoords=("data", "axes fraction"), xytext=(3, -3), fontsize=8, color=RED,
                      textcoords="offset points", va="top", annotation_clip=False)  # fmt: skip
        for y, (_, scores, colour) in enumerate(rows):
            if scores.get(metric) is None:
                continue
            interval = (scores.get("ci95") or {}).get(metric)
            if interval:
                axis.plot(interval, [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            axis.plot(scores[metric], y, "o" if colour == BLUE else "s", color=colour, markersize=6)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel(f"{metric.replace('_', ' ')}, 95 % interval".replace("auc", "AUC"))
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), [name.replace("_", " ") for name, *_ in rows])
    axes[0].set_ylim(len(rows) - 0.4, -1.0)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)
    return True


def draw_confusion(path: Path, cohorts: dict[str, dict[str, Scores]]) -> bool:
    """A panel per cohort and arm of CURVES_OF: counts, shaded by the share of the row.

    A picture of an earlier evaluation does not stay. Returns False if there is nothing to draw.
    """
    path.unlink(missing_ok=True)
    scored = {cohort: arms for cohort, arms in cohorts.items() if any(arm.get("confusion") for arm in arms.values())}
    names = [name for name in CURVES_OF if any((arms.get(name) or {}).get("confusion") for arms in scored.values())]
    if not names:
        return False
    figure = _figure(3.4 * len(names) + 0.4, 3.5 * len(scored))
    axes = figure.subplots(len(scored), len(names), squeeze=False)
    for row, (cohort, arms) in zip(axes, scored.items(), strict=True):
        for panel, name in zip(row, names, strict=True):
            if (arms.get(name) or {}).get("confusion"):
                _draw_confusion(panel, f"{cohort}, arm {name}", arms[name])
            else:
                panel.axis("off")
    _save(figure, path)
    return True


def _draw_confusion(panel, title: str, arm: Scores) -> None:
    classes, counts = arm["classes"], arm["confusion"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            colour = "white" if shares[y][x] > 0.6 else "black"
            panel.text(x, y, f"{count}\n{shares[y][x]:.0%}", ha="center", va="center", color=colour)
    panel.set_title(f"{title}\nbalanced accuracy {arm['balanced_accuracy']:.2f}", fontsize=10)
    panel.set_xticks(range(len(classes)), classes)
    panel.set_yticks(range(len(classes)), classes)
    panel.set_xlabel("answer")
    panel.set_ylabel("diagnosis")


def draw_curves(path: Path, arms: dict[str, Scores]) -> bool:
    """ROC curves by class of each arm of CURVES_OF, and beside them the reliability of the arms that are not shuffled.

    Returns:
        Whether there was a curve to draw; False writes nothing.
    """
    with_roc = [name for name in CURVES_OF if (arms.get(name) or {}).get("roc")]
    with_reliability = [name for name in RELIABILITY_OF if (arms.get(name) or {}).get("reliability")]
    num_panels = len(with_roc) + bool(with_reliability)
    if not num_panels:
        return False
    figure = _figure(3.6 * num_panels, 3.7)
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for panel, name in zip(panels, with_roc, strict=False):
        for diagnosis, roc in arms[name]["roc"].items():
            if roc:
                panel.plot(roc["fpr"], roc["tpr"], color=CLASS_COLOURS.get(diagnosis, GREY), label=diagnosis)
        panel.set_title(f"ROC, arm {name}", fontsize=10)
        _unit_square(panel, "1 - specificity", "sensitivity")
        panel.legend(frameon=False, loc="lower right", fontsize=9, title="class vs rest", title_fontsize=9)
    if with_reliability:
        panel = panels[-1]
        for name in with_reliability:
            bins = arms[name]["reliability"]
            x, y = [b["mean_probability"] for b in bins], [b["fraction_right"] for b in bins]
            panel.plot(x, y, color=RELIABILITY_OF[name], linewidth=1.2, label=name)
            largest = max(b["n"] for b in bins)
            panel.scatter(x, y, [8 + 60 * b["n"] / largest for b in bins], color=RELIABILITY_OF[name], alpha=0.7)
        panel.set_title("reliability (area: scans)", fontsize=10)
        _unit_square(panel, "probability of the answer", "fraction right")
        panel.legend(frameon=False, loc="upper left", fontsize=9)
    _save(figure, path)
    return True


def _unit_square(panel, x_label: str, y_label: str) -> None:
    panel.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8)
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.02, 1.02)
    panel.set_aspect("equal")
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.spines[["top", "right"]].set_visible(False)


def _figure(width_in: float, height_in: float):
    """Without pyplot, which keeps every figure and would choose a backend for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
