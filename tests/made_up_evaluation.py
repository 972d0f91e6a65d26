"""A report.json as `medblip evaluate` writes it, with made-up probabilities and real scores: no model is needed."""

import copy
import csv
import functools
from pathlib import Path

import numpy as np

from medblip.answers import score_answers
from medblip.arms import ARMS
from medblip.metrics import age_matched, compare, score
from medblip.text import DIAGNOSIS_ANSWERS, QUESTIONS

COHORTS = {"AIBL": ["CN", "MCI", "AD"], "MIRIAD": ["CN", "AD"], "ONE": ["AD"]}
SKILL = {"image": 1.2, "text": 0.8, "both": 1.8, "shuffled_image": 0.0, "blank_image": 0.0, "both_shuffled": 0.7}
DRAWS = 200


def made_up_evaluation(seed: int = 0, skill: float = 1.0, num_scans: int = 60) -> tuple[dict, list[dict]]:
    """(report.json, rows of predictions.csv). Another seed gives other probabilities of the same scans."""
    return copy.deepcopy(_made_up(seed, skill, num_scans))


@functools.cache
def _made_up(seed: int, skill: float, num_scans: int) -> tuple[dict, list[dict]]:
    draw = np.random.default_rng(seed)
    report = {
        "model": f"run/step-{800 + seed}",
        "split": "test",
        "ehr": "cognition",
        "arms": {name: ARMS[name]._asdict() for name in SKILL},
        "rule": {"length": "sum", "minus_null": True, "chosen_on": "val",
                 "scores": {"sum-minus-null": -0.71, "sum": -0.9}},
        "cohorts": {}, "baselines": {}, "comparisons": {}, "subgroups": {}, "age_matched": {},
        "one_scan_per_subject": {}, "vqa": {}, "worst": [],
        "trained_on": {"subjects": 210, "scans": 600, "steps": 800, "global_batch": 32, "preset": "biogpt",
                       "lora": True, "ehr": "cognition", "augment": True, "seed": seed,
                       "towers": {"vision": "blip2-itm-vit-g", "language": "biogpt"}},
        "counts": {"scans": 130, "without_diagnosis": 2, "scored": 128},
        "notes": ["MIRIAD: only CN and AD occur, so only these two were offered as answers",
                  "ONE: only AD occurs, so there is nothing to tell apart and no score"],
        "bootstrap": DRAWS, "seed": 0,
        "recipe": {"name": "standard", "size": 96, "spacing_mm": 2.2, "low_percentile": 0.5, "high_percentile": 99.5,
                   "brain_mask": False, "version": 3},
        "split_sha256": "5e" * 32, "commit": "c0ffee" * 6 + "c0ff",
    }  # fmt: skip
    predictions = []
    for cohort, classes in COHORTS.items():
        if len(classes) == 1:
            entry = score(["AD"] * 3, np.ones((3, 1)), classes, list("abc"), DRAWS, 0)
            report["cohorts"][cohort] = {name: entry for name in ("image", "text", "both", "blank_image")}
            continue
        truth = [classes[i // 2 % len(classes)] for i in range(num_scans)]
        subjects = [f"{cohort}-{i // 2:03}" for i in range(num_scans)]
        p = {name: _probabilities(draw, truth, classes, strength * skill) for name, strength in SKILL.items()}
        p["blank_image"] = np.full((num_scans, len(classes)), 1 / len(classes))
        whole = (truth, classes, subjects)
        report["cohorts"][cohort] = {name: _score(*whole, p[name]) for name in SKILL}
        baselines = {"voxel_svm": 0.9, "record_logistic": 0.8}
        report["baselines"][cohort] = {"majority": _score(*whole, p["blank_image"])} | {
            name: _score(*whole, _probabilities(draw, truth, classes, strength)) for name, strength in baselines.items()
        }
        report["comparisons"][cohort] = [
            {"a": a, "b": b, "metric": metric, **entry}
            for a, b in (("both", "text"), ("image", "shuffled_image"))
            for metric, entry in compare(truth, p[a], p[b], classes, subjects, DRAWS, 0).items()
        ]
        half = slice(0, num_scans // 2)
        some = (truth[half], classes, subjects[half])
        report["subgroups"][cohort] = {
            name: {group: _brief(_score(*some, p[name][half])) for group in ("sex F", "age 70-79", "1.5 T")}
            for name in ("image", "text", "both")
        }
        report["one_scan_per_subject"][cohort] = {
            name: _brief(_score(truth[::2], classes, subjects[::2], p[name][::2])) for name in ("image", "text", "both")
        }
        ages = draw.integers(60, 85, num_scans).astype(float)
        report["age_matched"][cohort] = {
            "image": age_matched(truth, p["image"], classes, ages, subjects, DRAWS, 0, caliper_years=2.0)
        }
        report["vqa"][cohort] = {
            reading: {
                "sex": _answers("sex", ["female", "male"] * 4, ["female"] * 7 + ["?"]),
                "age": _answers("age", ["70", "80"] * 2, ["71", "90", "x", "82"]),
            }
            for reading in ("own scan", "question only", "another subject's scan")
        }  # fmt: skip
        for key in range(2):
            report["worst"].append(
                {"key": f"{cohort}-{key:08x}", "cohort": cohort, "arm": "image", "diagnosis": "AD", "answer": "CN",
                 "probability": 0.01 * (1 + key), "picture": f"worst/{cohort}-{key:08x}.png"}
            )  # fmt: skip
        for name in SKILL:
            for i in range(num_scans):
                columns = {f"p_{c}": "" for c in DIAGNOSIS_ANSWERS}
                columns |= {f"p_{c}": f"{value:.9g}" for c, value in zip(classes, p[name][i], strict=True)}
                answer = DIAGNOSIS_ANSWERS[classes[int(p[name][i].argmax())]]
                predictions.append(
                    {"scan_id": f"{cohort}-{i:08x}", "subject_id": subjects[i], "cohort": cohort, "arm": name,
                     "diagnosis": truth[i], **columns, "answer": answer}
                )  # fmt: skip
    return report, predictions


def write_made_up(folder: Path, **options) -> dict:
    """The folder that `medblip evaluate` would leave, with grey squares for scans; returns report.json's content."""
    from matplotlib.image import imsave

    from medblip.report import write_report

    report, predictions = made_up_evaluation(**options)
    (folder / "worst").mkdir(parents=True)
    for entry in report["worst"]:
        imsave(folder / entry["picture"], np.tile(np.linspace(0, 1, 64), (40, 2)), cmap="gray")
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, predictions[0].keys())
        writer.writeheader()
        writer.writerows(predictions)
    write_report(folder, report)
    return report


def _probabilities(draw, truth, classes, strength):
    logits_NK = draw.normal(size=(len(truth), len(classes)))
    logits_NK[np.arange(len(truth)), [classes.index(name) for name in truth]] += strength
    e_NK = np.exp(logits_NK)
    return e_NK / e_NK.sum(axis=1, keepdims=True)


def _score(truth, classes, subjects, p_NK):
    return score(truth, p_NK, classes, subjects, DRAWS, 0)


def _answers(kind, truths, answers):
    return score_answers(QUESTIONS[kind], truths, answers, [str(i) for i in range(len(truths))], DRAWS, 0)


def _brief(entry):
    return {name: value for name, value in entry.items() if name not in ("roc", "reliability")}
