"""What simpler ways make of the same shards: the most frequent class, a linear SVM on voxels, a regression on fields.

They are fitted on the training split of all cohorts, to the classes that the cohort under test is offered, and give a
probability for each. N scans, K classes, F fields, V voxels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from medblip import volume
from medblip.config import EhrTier
from medblip.shards import READ_AHEAD, Reader, Sample, ShardIndex
from medblip.text import fields_of

COARSE_MM = 4.0
MAX_TRAIN_SCANS = 2000
"""Of the voxel SVM, drawn at random from more: its kernel grows with the square."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""C of the SVM, chosen by folds over subjects; the kernel is a mean over voxels, so about 1 on its diagonal."""
AIR_LEVEL = 10
"""Of 255: voxels above it are head, and scaled to its mean and standard deviation."""
VOXELS_AT_ONCE = 20_000


def fit_and_predict(
    index: ShardIndex,
    reader: Reader,
    train_samples: Sequence[Sample],
    test_samples: Sequence[Sample],
    classes: Sequence[str],
    ehr: EhrTier,
    seed: int,
) -> tuple[dict[str, NDArray], list[str]]:
    """Probabilities `N K` of the test samples by each baseline, and notes on what was left out and why.

    majority: how frequent each class is in training. voxel_svm: the volumes as block means of about 4 mm, left and
    right kept, each scaled within the head; a linear SVM whose C is chosen by folds over subjects, and whose decisions
    become probabilities by a logistic curve through those of left-out folds. record_logistic: the fields of the tier
    as numbers, the unknown replaced by the median with a column that says so, standardised. Free-text reports are not
    read. A baseline that cannot be fitted is missing from the result.

    Args:
        index: the shards of all samples.
        reader: of the same shards.
        train_samples: those without one of the classes are not used.
        test_samples: rows of the result.
        classes: at least two, in the order of the columns.
        ehr: tier whose fields the regression reads.
        seed: of the folds, and of the scans taken where there are more than MAX_TRAIN_SCANS.

    Raises:
        ValueError: if a test sample cannot be read.
    """
    train = [sample for sample in train_samples if sample.diagnosis in classes]
    records, unreadable = {}, []
    for place in _in_order(reader, train):
        try:
            records[place] = reader.record(train[place])
        except ValueError:
            unreadable.append(train[place].key)
    notes = []
    if unreadable:
        notes.append(f"the baselines left out {len(unreadable)} unreadable records: {', '.join(unreadable[:5])}")
    train, train_records = [train[place] for place in sorted(records)], [records[place] for place in sorted(records)]
    if not train:
        return {}, [*notes, "no scan of the split train has a diagnosis of this cohort, so no baseline was fitted"]
    subjects_of = {name: {sample.subject for sample in train if sample.diagnosis == name} for name in classes}
    num_folds = min(5, *(len(subjects) for subjects in subjects_of.values()))
    truth_N = np.array([classes.index(sample.diagnosis) for sample in train])
    frequency_K = np.bincount(truth_N, minlength=len(classes)) / len(truth_N)
    found = {"majority": np.tile(frequency_K, (len(test_samples), 1))}
    if num_folds < 2:
        few = [name for name, subjects in subjects_of.items() if len(subjects) < 2]
        notes.append(f"the split train has fewer than two subjects with {', '.join(few)}: no voxel_svm")
    else:
        spacing_mm = index.recipe.get("spacing_mm") or np.median([record["spacing_mm"] for record in train_records])
        found["voxel_svm"], more = _voxel_svm(reader, train, test_samples, truth_N, spacing_mm, num_folds, seed)
        notes += more
    fields = [name for name in fields_of(ehr) if any(r["fields"].get(name) is not None for r in train_records)]
    if not fields:
        notes.append(f"the tier is {ehr} and training has no field of it: no record_logistic")
    elif (frequency_K == 0).any():
        notes.append("the split train lacks a class: no record_logistic")
    else:
        test_records = {place: reader.record(test_samples[place]) for place in _in_order(reader, test_samples)}
        test = [test_records[place] for place in range(len(test_samples))]
        found["record_logistic"] = _record_logistic(_fields(train_records, fields), truth_N, _fields(test, fields))
    return found, notes


def _voxel_svm(
    reader: Reader,
    train: list[Sample],
    test: Sequence[Sample],
    truth_N: NDArray,
    spacing_mm: float,
    num_folds: int,
    seed: int,
) -> tuple[NDArray, list[str]]:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.svm import SVC

    notes, taken = [], np.arange(len(train))
    if len(train) > MAX_TRAIN_SCANS:
        notes.append(f"voxel_svm was fitted to {MAX_TRAIN_SCANS} of {len(train)} training scans, drawn at random")
        taken = np.sort(np.random.default_rng(seed).choice(len(train), MAX_TRAIN_SCANS, replace=False))
    train = [train[place] for place in taken]
    block = max(1, round(COARSE_MM / spacing_mm))
    train_NV, unreadable = _coarse_volumes(reader, train, reader.index.grid_size, block)
    if unreadable:
        notes.append(f"voxel_svm left out {len(unreadable)} unreadable volumes: {', '.join(unreadable[:5])}")
    test_NV, missing = _coarse_volumes(reader, test, reader.index.grid_size, block)
    if missing:
        raise ValueError(f"the volumes {', '.join(missing[:5])} cannot be read; run python -m sharding.verify")

    readable = [place for place, sample in enumerate(train) if sample.key not in set(unreadable)]
    truth_N, subjects = truth_N[taken][readable], [train[place].subject for place in readable]
    kernel_NN, kernel_TN = _kernel(train_NV[readable], train_NV[readable]), _kernel(test_NV, train_NV[readable])
    folds = list(
        StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed).split(kernel_NN, truth_N, groups=subjects)
    )
    machine = SVC(kernel="precomputed", class_weight="balanced")
    search = GridSearchCV(machine, {"C": PENALTIES}, cv=folds, scoring="balanced_accuracy", refit=False)
    best = machine.set_params(**search.fit(kernel_NN, truth_N).best_params_)
    model = CalibratedClassifierCV(best, cv=folds, ensemble=False).fit(kernel_NN, truth_N)
    return model.predict_proba(kernel_TN), notes


def _coarse_volumes(reader: Reader, samples: Sequence[Sample], grid_size: int, block: int) -> tuple[NDArray, list[str]]:
    """Block means of the head in standard deviations around its mean, air 0, `N V` in half precision.

    Rows that cannot be read stay 0; their KEYs come with it.
    """
    coarse_NV = np.zeros((len(samples), math.ceil(grid_size / block) ** 3), dtype=np.float16)
    unreadable = []
    for row in _in_order(reader, samples):
        sample = samples[row]
        flat = np.empty(sample.num_voxels, dtype=np.uint8)
        try:
            reader.volumes([sample], flat)
        except ValueError:
            unreadable.append(sample.key)
            continue
        size = math.ceil(grid_size / block) * block
        grid_XYZ = volume.place(flat.reshape(sample.shape), sample.pad_before, size).astype(np.float32)
        coarse_V = reduce(grid_XYZ, "(x a) (y b) (z c) -> (x y z)", "mean", a=block, b=block, c=block)
        is_head_V = coarse_V > AIR_LEVEL
        if is_head_V.any():
            head = coarse_V[is_head_V]
            coarse_NV[row, is_head_V] = np.clip((head - head.mean()) / max(head.std(), 1e-6), -3, 3)
    return coarse_NV, unreadable


def _kernel(a_NV: NDArray, b_MV: NDArray) -> NDArray:
    """The mean over voxels of products, `N M`; a part of the voxels at a time is single precision."""
    kernel_NM = np.zeros((len(a_NV), len(b_MV)), dtype=np.float64)
    for start in range(0, a_NV.shape[1], VOXELS_AT_ONCE):
        some = slice(start, start + VOXELS_AT_ONCE)
        kernel_NM += a_NV[:, some].astype(np.float32) @ b_MV[:, some].astype(np.float32).T
    return kernel_NM / a_NV.shape[1]


def _fields(records: list[dict], names: list[str]) -> NDArray:
    """Fields as numbers, `N F`; NaN where unknown, 1 for a woman."""
    rows = [[_as_number(record["fields"].get(name)) for name in names] for record in records]
    return np.array(rows, dtype=np.float64).reshape(len(records), len(names))


def _as_number(value: float | str | None) -> float:
    if value is None:
        return math.nan
    return float(value == "F") if isinstance(value, str) else float(value)


def _record_logistic(train_NF: NDArray, truth_N: NDArray, test_NF: NDArray) -> NDArray:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True), StandardScaler(), LogisticRegression(max_iter=1000)
    )
    return model.fit(train_NF, truth_N).predict_proba(test_NF)


def _in_order(reader: Reader, samples: Sequence[Sample]) -> Iterator[int]:
    """The places of samples in the order of the shards, which are opened ahead."""
    order = sorted(range(len(samples)), key=lambda place: (samples[place].shard, samples[place].volume))
    for number, place in enumerate(order):
        reader.expect(samples[ahead].shard for ahead in order[number : number + READ_AHEAD])
        yield place
