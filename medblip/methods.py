"""methods.md: what a paper has to say of an evaluation, written from its report.json and nothing else.

Whatever the report does not hold is said to be unknown, and only what the report says was used is cited.
"""

from __future__ import annotations

from typing import Any

from medblip.references import COHORTS, REFERENCES, TOWERS

UNKNOWN = "unknown"
READ_FIRST = (
    "Written from report.json of this evaluation and nothing else; check it before it goes into a paper. A cohort is "
    "cited by its name: take the citation out if yours is not the public study of that name."
)
IMAGES = {
    "own scan": "the scan itself",
    "no scan": "no scan",
    "blank scan": "a volume without a brain",
    "another subject's scan": "the scan of another subject of the same cohort",
}
TERMS = {"sum": "the sum over its tokens", "per token": "the mean over its tokens", "per character": "the sum over its "
         "tokens divided by its characters"}  # fmt: skip
CHOICES = {
    "val": "chosen on the validation split, as that under which the right answers were most probable, before the split "
    "was evaluated, and kept for all cohorts and arms",
    "given": "given beforehand",
    "default": "the default of the software, not chosen on data",
}
BASELINES = {
    "majority": "the class frequencies of the training split",
    "voxel_svm": "a linear support vector machine on the volumes at 4 mm [@cortes1995svm]",
    "record_logistic": "a logistic regression on the fields of the record",
}
AUGMENTATION = {
    True: "Volumes were augmented in training; report.json does not say by what.",
    False: "Volumes were not augmented.",
}

Report = dict[str, Any]


def methods_markdown(report: Report) -> str:
    """Paragraphs with citations, and the BibTeX entries of these."""
    paragraphs = [_model(report), _data(report), _scoring(report), _statistics(report), _code(report)]
    text = "\n\n".join(" ".join(sentences) for sentences in paragraphs if sentences)
    cited = [key for key in REFERENCES if f"@{key}]" in text or f"@{key};" in text]
    entries = "\n\n".join(REFERENCES[key] for key in cited)
    return (
        f"# Methods\n\n{READ_FIRST}\n\n{text}\n\n"
        f"Research use only; not a medical device.\n\n## References\n\n```bibtex\n{entries}\n```\n"
    )


def _known(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _model(report: Report) -> list[str]:
    trained = report.get("trained_on") or {}
    towers = trained.get("towers") or {}
    parts = ", ".join(f"{part} {name}{_cite_tower(name)}" for part, name in towers.items()) or UNKNOWN
    lora = {True: "adapted with LoRA [@hu2022lora]", False: "frozen", None: f"trained in a way that is {UNKNOWN}"}
    found = [
        f"The model {report['model']} is a MedBLIP [@chen2024medblip], trained with PyTorch and DeepSpeed "
        f"[@paszke2019pytorch; @rajbhandari2020zero].",
        f"Its preset is {_known(trained.get('preset'))}; its towers are: {parts}.",
        f"The language model was {lora.get(trained.get('lora'), lora[None])}.",
        f"It was trained on {_known(trained.get('scans'))} scans of {_known(trained.get('subjects'))} subjects, for "
        f"{_known(trained.get('steps'))} steps of {_known(trained.get('global_batch'))} samples, with records of the "
        f"tier {_known(trained.get('ehr'))}.",
    ]
    if "augment" in trained:
        found.append(AUGMENTATION.get(trained["augment"], f"Whether volumes were augmented is {UNKNOWN}."))
    return found


def _cite_tower(name: str) -> str:
    keys = [key for part, key in TOWERS.items() if part in str(name).lower()]
    return f" [{'; '.join(f'@{key}' for key in keys)}]" if keys else ""


def _data(report: Report) -> list[str]:
    recipe, counts = report.get("recipe") or {}, report.get("counts") or {}
    if recipe:
        size = _known(recipe.get("size"))
        spacing = f" of {recipe['spacing_mm']} mm voxels" if recipe.get("spacing_mm") is not None else ""
        found = [f"Volumes were prepared by the recipe '{_known(recipe.get('name'))}', version "
                 f"{_known(recipe.get('version'))}: a cube of {size} x {size} x {size}{spacing}."]  # fmt: skip
        if recipe.get("low_percentile") is not None and recipe.get("name") == "standard":
            found.append(
                f"Intensities were scaled between percentiles {recipe['low_percentile']} and "
                f"{_known(recipe.get('high_percentile'))}."
            )
    else:
        found = [f"How the volumes were prepared is {UNKNOWN}."]
    found.append(
        f"The split '{report['split']}' has {_known(counts.get('scans'))} scans, {_known(counts.get('scored'))} of "
        f"them scored and {_known(counts.get('without_diagnosis'))} left out for having no diagnosis; the sha256 of "
        f"its split.csv is {_known(report.get('split_sha256'))}."
    )
    for cohort, arms in report["cohorts"].items():
        arm = next(iter(arms.values()))
        cite = f" [@{COHORTS[cohort]}]" if cohort in COHORTS else ""
        found.append(
            f"{cohort}{cite}: {_known(arm.get('n_scans'))} scans of {_known(arm.get('n_subjects'))} subjects, "
            f"{', '.join(arm['classes'])}."
        )
    found.append("No subject of the split was trained on; an evaluation with such a subject is refused.")
    return found


def _scoring(report: Report) -> list[str]:
    rule = report.get("rule") or {}
    arms = [
        f"'{name}' ({IMAGES.get(arm['image'], arm['image'])}, {'with' if arm['record'] else 'without'} the record)"
        for name, arm in report["arms"].items()
    ]
    tier = report["ehr"]
    found = [
        "Diagnosis was asked as a question, zero-shot, and each answer that was offered scored by its log-likelihood.",
        "No arm read a record." if tier == "none" else f"The record held the fields of the tier '{tier}'.",
        f"The model was asked in these arms: {'; '.join(arms)}.",
    ]
    if rule:
        null = ", less that for a blank volume and the question alone" if rule.get("minus_null") else ""
        found.append(
            f"The log-likelihood of an answer was {TERMS.get(rule.get('length'), _known(rule.get('length')))}{null}; "
            f"this rule was {CHOICES.get(rule.get('chosen_on'), f'chosen in a way that is {UNKNOWN}')}."
        )
        if rule.get("balanced"):
            on = rule.get("balanced_on") or {}
            found.append(
                "To it an offset of each answer was added, fitted in each arm so that the mean probability of all "
                f"answers was equal over {_known(on.get('scans'))} scans of the split {_known(on.get('split'))}, each "
                "diagnosis counting the same."
            )
    else:
        found.append(f"How log-likelihoods were compared is {UNKNOWN}.")
    two = [name for name, arms in report["cohorts"].items() if len(next(iter(arms.values()))["classes"]) == 2]
    if two:
        found.append(f"In {', '.join(two)} only two diagnoses occur, and only these were offered.")
    return found


def _statistics(report: Report) -> list[str]:
    arms = [arm for found in report["cohorts"].values() for arm in found.values()]
    found = ["Each cohort was scored by itself, never pooled."]
    if any(arm.get("balanced_accuracy") is not None for arm in arms):
        found += [
            "Scores are balanced accuracy, macro-averaged one-versus-rest AUC and macro F1 [@pedregosa2011scikit].",
            f"Intervals come from {_known(report.get('bootstrap'))} bootstrap draws of subjects with all their "
            f"scans [@efron1993bootstrap], within classes, seed {_known(report.get('seed'))}: percentiles, and exact "
            "limits [@clopper1934limits] where a proportion touches 0 or 1; those of recalls put together in "
            "quadrature for balanced accuracy and macro F1 [@zou2008limits]; for an AUC, the logit with the draws' "
            "standard deviation, and where it is 1, the limit of [@newcombe2006mannwhitney].",
        ]
    if any(arm.get("brier") is not None for arm in arms):
        found.append(
            "Calibration is given as expected calibration error [@naeini2015calibration] and as Brier score "
            "[@brier1950verification]."
        )
    if any((report.get("comparisons") or {}).values()):
        found.append("Arms were compared on the same scans and the same draws; p-values are two-sided.")
    names = dict.fromkeys(name for fitted in (report.get("baselines") or {}).values() for name in fitted or {})
    if names:
        listed = "; ".join(BASELINES.get(name, name) for name in names)
        found.append(f"Baselines were fitted to the training split of the same shards: {listed}.")
    matched = [entry for arms in (report.get("age_matched") or {}).values() for entry in (arms or {}).values() if entry]
    if matched:
        found.append(f"AUC was also computed on pairs at most {matched[0]['caliper_years']:g} years apart in age.")
    if any((report.get("one_scan_per_subject") or {}).values()):
        found.append("Scores were also computed on one scan of each subject.")
    readings = [asked for kinds in (report.get("vqa") or {}).values() for asked in (kinds or {}).values()]
    questions = {name: scores for asked in readings for name, scores in (asked or {}).items()}
    if questions:
        found.append(f"Other questions: {', '.join(questions)}.")
    if any(scores.get("bleu1") is not None for scores in questions.values()):
        found.append(
            "Free answers were scored by exact match, token F1, BLEU [@papineni2002bleu] and ROUGE-L [@lin2004rouge]."
        )
    return found


def _code(report: Report) -> list[str]:
    return [f"The commit of the code is {_known(report.get('commit'))}."]
