"""How well each field of the record predicts the diagnosis by itself.

A small tree is trained on one field at a time and tested on other subjects. A field that scores near 1 is the label in
other words: a model that reads it will look good without a look at the scan.
"""

from collections import Counter

from sharding.manifest import NUMBER_FIELDS, Scan

FOLDS = 5
MIN_SUBJECTS_PER_CLASS = FOLDS
GIVES_AWAY, HELPS = 0.75, 0.5
"""On a scale on which chance is 0 and always right is 1."""


def leakage_table(scans: list[Scan]) -> list[dict]:
    """One row per field, the most telling first: `field, balanced_accuracy, chance, known, note`.

    `known` is the share of scans that have the field. That a field is missing counts as a value of it; the row
    `which fields are missing` has that alone. Extra columns of the manifest are judged as categories, `report` by its
    words. Empty if two diagnoses with enough subjects are not there.
    """
    labelled = [scan for scan in scans if scan.diagnosis]
    people = Counter(diagnosis for diagnosis, *_ in {(s.diagnosis, s.cohort, s.subject_id) for s in labelled})
    classes = {name for name, count in people.items() if count >= MIN_SUBJECTS_PER_CLASS}
    labelled = [scan for scan in labelled if scan.diagnosis in classes]
    if len(classes) < 2:
        return []
    columns = {name: [scan.fields[name] for scan in labelled] for name in NUMBER_FIELDS}
    columns |= {"sex": [scan.fields["sex"] for scan in labelled], "cohort": [scan.cohort for scan in labelled]}
    for name in sorted({name for scan in labelled for name in scan.extra}):
        columns[name] = [scan.extra.get(name) or None for scan in labelled]
    rows = []
    for name, values in columns.items():
        known = sum(value is not None for value in values) / len(values)
        if len(set(values)) > 1:
            rows.append(_row(name, _score(_encode(values), labelled), known, classes))
    missing = [[float(column[row] is None) for column in columns.values()] for row in range(len(labelled))]
    rows.append(_row("which fields are missing", _score(missing, labelled), 1.0, classes))
    if any(scan.report for scan in labelled):
        known = sum(bool(scan.report) for scan in labelled) / len(labelled)
        rows.append(_row("report (its words)", _score_words(labelled), known, classes))
    return sorted(rows, key=lambda row: -row["balanced_accuracy"])


def _row(name: str, score: float, known: float, classes: set[str]) -> dict:
    chance = 1 / len(classes)
    beyond_chance = (score - chance) / (1 - chance)
    note = "gives the label away" if beyond_chance >= GIVES_AWAY else "tells much" if beyond_chance >= HELPS else ""
    return {"field": name, "balanced_accuracy": score, "chance": chance, "known": known, "note": note}


def _encode(values: list) -> list[list[float]]:
    """One column for a tree: numbers as they are, categories by frequency, missing as NaN."""
    try:
        return [[float("nan") if value is None else float(value)] for value in values]
    except ValueError:
        pass  # words
    ranks = {value: rank for rank, (value, _) in enumerate(sorted(Counter(values).items(), key=_by_count))}
    return [[float("nan") if value is None else float(ranks[value])] for value in values]


def _by_count(item: tuple) -> tuple:
    value, count = item
    return -count, str(value)


def _score(columns: list[list[float]], scans: list[Scan]) -> float:
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=4, min_samples_leaf=5, class_weight="balanced", random_state=0)
    return _cross_validate(tree, columns, scans)


def _score_words(scans: list[Scan]) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(max_features=5000, min_df=2), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    return _cross_validate(model, [scan.report or "(none)" for scan in scans], scans)


def _cross_validate(model, inputs, scans: list[Scan]) -> float:
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    diagnoses = [scan.diagnosis for scan in scans]
    subjects = [f"{scan.cohort}/{scan.subject_id}" for scan in scans]
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(model, inputs, diagnoses, groups=subjects, cv=folds)
    return float(balanced_accuracy_score(diagnoses, predicted))
