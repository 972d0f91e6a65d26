"""How well a trained model tells diagnoses apart on scans of subjects it has never seen.

1. refuse what would make the numbers wrong: a subject seen in training, volumes of another recipe, a higher tier;
2. encode every scan once;
3. ask for the diagnosis in each arm: with and without the record, with and without the image, or with another
   subject's image, so that it shows which of the two an answer comes from;
4. score each cohort by itself and write the report.

Sample KEYs, cohort names and numbers come out; the text of a record never does.
"""

from __future__ import annotations

import csv
import hashlib
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from medblip.config import EhrTier
from medblip.text import DIAGNOSIS_ANSWERS, DIAGNOSIS_QUESTION, TIER_FIELDS, render_prompt, render_record

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` must not wait for it
    from torch import Tensor

    from medblip.inference import Assistant
    from medblip.shards import Reader, Sample, ShardIndex


class Arm(NamedTuple):
    """What the model reads of a scan: the record, and whose image."""

    record: bool
    image: Literal["own scan", "another subject's scan", "no scan"]


ARMS = {
    "image": Arm(record=False, image="own scan"),
    "text": Arm(record=True, image="no scan"),
    "both": Arm(record=True, image="own scan"),
    "shuffled_image": Arm(record=False, image="another subject's scan"),
    "both_shuffled": Arm(record=True, image="another subject's scan"),
}

ArmName = Literal["image", "text", "both", "shuffled_image", "both_shuffled"]

SHUFFLED_PAIRS = 1000
"""Pairs of a scan and another subject in a shuffled arm, in as many rounds: one round's score is a matter of luck."""

READ_AHEAD = 400
"""Samples whose shards are opened, and where need be fetched, ahead of the one that is read."""

OTHER_ANSWER = "other"
"""Stands in predictions.csv for a written answer that is none of the options: it could repeat the record."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Zero-shot diagnosis of the scans of a split, cohort by cohort.

    Examples:
      medblip evaluate --model runs/x --data shards/ --split test --out evaluation/
      medblip evaluate --model runs/x --data shards/ --ehr none --arms image shuffled_image --out image-only/
    """

    model: str
    """A run folder, or one of its checkpoints."""
    data: str
    """Folder of shards or its URL, prepared with the recipe that the model was trained on."""
    split: str = "test"
    """Split of the shards to evaluate."""
    out: str = "evaluation"
    """Folder for report.json, report.md, predictions.csv and confusion.png; made if missing."""
    ehr: EhrTier | None = None
    """Fields of the record that the model may read: the run's own tier, or a lower one."""
    arms: tuple[ArmName, ...] = ("image", "text", "both", "shuffled_image")
    """What the model reads: the scan, the record, both, or another subject's scan (without or with the record)."""
    batch: int = 8
    """Scans at a time."""
    bootstrap: int = 1000
    """Draws of subjects for the 95 % intervals."""
    seed: int = 0
    """Decides who gets whose scan in the shuffled arms, and the draws."""

    def __post_init__(self) -> None:
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms needs names that differ, out of {', '.join(ARMS)}; not {self.arms}")
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, not {self.batch}")
        if self.bootstrap < 1000:
            raise ValueError(f"--bootstrap must be at least 1000, not {self.bootstrap}: fewer draws give no interval")


class Prediction(NamedTuple):
    """One scan in one arm: a probability for each class that was offered, and the answer."""

    sample: Sample
    arm: str
    probabilities: dict[str, float]
    answer: str


def evaluate(options: EvaluateOptions) -> int:
    """Evaluates, writes the folder `--out` and prints the table; returns the exit code.

    Raises:
        ValueError: if the data does not fit the model, or a subject was seen in training.
    """
    from medblip.distributed import log
    from medblip.inference import Assistant
    from medblip.report import plain_table, write_report
    from medblip.shards import Reader, ShardIndex

    index = ShardIndex(options.data)
    everyone = index.samples(options.split)
    samples = [sample for sample in everyone if sample.diagnosis]
    if not samples:
        raise ValueError(f"--data {options.data}: no scan of the split '{options.split}' has a diagnosis")
    assistant = Assistant(options.model)
    check_unseen(everyone, assistant.train_subjects)
    check_recipe(index.recipe, assistant.recipe.to_dict())
    tier = check_tier(options.ehr or assistant.ehr, assistant.ehr)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    reader = Reader(index, threads=2)
    queries_NQC = encode(assistant, reader, samples, options.batch)
    records = []
    for sample in samples:
        reader.expect([sample.shard])
        records.append(_record(reader, sample, tier))
    reader.close()

    notes, cohorts, predictions = [], {}, []
    if len(samples) < len(everyone):
        notes.append(f"{len(everyone) - len(samples)} of {len(everyone)} scans have no diagnosis and were left out")
    if tier == "none":
        notes.append("the tier is none: no arm reads a record")
    for cohort in sorted({sample.cohort for sample in samples}):
        rows = [row for row, sample in enumerate(samples) if sample.cohort == cohort]
        found, more_notes = evaluate_cohort(
            assistant, [samples[row] for row in rows], queries_NQC[rows], [records[row] for row in rows], options
        )
        cohorts[cohort] = score_cohort(found, options)
        notes += [f"{cohort}: {note}" for note in more_notes]
        predictions += found
    for note in notes:
        log.info(note)

    report = {
        "model": assistant.name,
        "split": options.split,
        "ehr": tier,
        "arms": {name: ARMS[name]._asdict() for name in options.arms},
        "cohorts": cohorts,
        "counts": {"scans": len(everyone), "without_diagnosis": len(everyone) - len(samples), "scored": len(samples)},
        "notes": notes,
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "recipe": index.recipe,
        "split_sha256": _split_sha256(index),
        "commit": _commit(),
    }
    _write_predictions(out / "predictions.csv", predictions)
    write_report(out, report)
    print(plain_table(report))
    print(f"\nwritten to {out}/; begin with report.md")
    return 0


def check_unseen(samples: list[Sample], train_subjects: frozenset[str]) -> None:
    """Refuses scans of subjects that the model was trained on.

    Raises:
        ValueError: with the number of such subjects and the first KEYs.
    """
    seen = [sample for sample in samples if sample.subject in train_subjects]
    if seen:
        raise ValueError(
            f"{len({sample.subject for sample in seen})} subjects of this split were trained on ({len(seen)} scans: "
            f"{', '.join(sample.key for sample in seen[:5])}{', ...' if len(seen) > 5 else ''}); "
            "a score on them says nothing about new subjects"
        )


def check_recipe(data: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuses volumes that were prepared in another way than the model's.

    Raises:
        ValueError: naming every parameter that differs, with both values.
    """
    differing = [
        f"{name} is {data.get(name)} in the shards and {model.get(name)} in the model"
        for name in sorted(data.keys() | model.keys())
        if data.get(name) != model.get(name)
    ]
    if differing:
        raise ValueError(f"the shards' recipe is not the model's: {'; '.join(differing)}")


def check_tier(tier: EhrTier, trained: EhrTier) -> EhrTier:
    """The tier to evaluate with.

    Raises:
        ValueError: if it is higher than the one trained with, whose wording is all that the model knows.
    """
    order = list(TIER_FIELDS)
    if order.index(tier) > order.index(trained):
        raise ValueError(f"--ehr {tier}: the model was trained with {trained}; evaluate with that or a lower tier")
    return tier


def encode(assistant: Assistant, reader: Reader, samples: list[Sample], batch: int) -> Tensor:
    """The query tokens of every scan, `N Q C`."""
    import torch
    from tqdm import tqdm

    starts = range(0, len(samples), batch)
    queries = []
    for start in tqdm(starts, desc="encoding", unit="batch", disable=not sys.stderr.isatty()):
        some = samples[start : start + batch]
        flat = torch.empty(sum(sample.num_voxels for sample in some), dtype=torch.uint8)
        reader.expect(sample.shard for sample in samples[start : start + batch + READ_AHEAD])
        reader.volumes(some, flat.numpy())
        queries.append(assistant.encode(assistant.volumes(flat, some)))
    return torch.cat(queries)


def evaluate_cohort(
    assistant: Assistant, samples: list[Sample], queries_NQC: Tensor, records: list[str], options: EvaluateOptions
) -> tuple[list[Prediction], list[str]]:
    """Asks for the diagnosis of each scan of one cohort in each arm.

    Returns the predictions and what a reader of them should know.
    """
    classes = classes_of(samples)
    offered = classes if len(classes) == 2 else list(DIAGNOSIS_ANSWERS)
    predictions, notes = [], []
    if len(classes) == 2:
        notes.append(f"only {classes[0]} and {classes[1]} occur, so only these two were offered as answers")
    if len(classes) == 1:
        notes.append(f"only {classes[0]} occurs, so there is nothing to tell apart and no score")
    own_N = list(range(len(samples)))
    num_rounds = max(1, SHUFFLED_PAIRS // len(samples))
    others = shuffle_over_subjects([sample.subject for sample in samples], num_rounds, options.seed)
    known: dict[tuple[str, int | None], list[float]] = {}  # most shuffled pairs were asked about before
    for name in options.arms:
        arm = ARMS[name]
        rounds = others if arm.image == "another subject's scan" else [own_N]
        if not rounds:
            notes.append(f"there is no other subject, so the arm {name} was left out")
        for image_N in rounds:
            asked = [
                (record if arm.record else "", None if arm.image == "no scan" else image)
                for record, image in zip(records, image_N, strict=True)
            ]
            _diagnose(assistant, queries_NQC, asked, tuple(offered), options.batch, known)
            written_N = [""] * len(samples)
            if name == "both":
                written_N = _write(assistant, queries_NQC, [text for text, _ in asked], options.batch)
            for sample, pair, written in zip(samples, asked, written_N, strict=True):
                p_K = known[pair]
                answer = DIAGNOSIS_ANSWERS[offered[p_K.index(max(p_K))]]
                if name == "both":
                    answer = written if written in DIAGNOSIS_ANSWERS.values() else OTHER_ANSWER
                predictions.append(Prediction(sample, name, dict(zip(offered, p_K, strict=True)), answer))
    return predictions, notes


def _diagnose(assistant: Assistant, queries_NQC: Tensor, asked: list, classes: tuple, batch: int, known: dict) -> None:
    """Puts the probabilities of each asked pair of (record text, image row or None) into `known`."""
    new = [pair for pair in dict.fromkeys(asked) if pair not in known]
    for read_image in (True, False):
        pairs = [pair for pair in new if (pair[1] is not None) == read_image]
        for start in range(0, len(pairs), batch):
            some = pairs[start : start + batch]
            queries_BQC = queries_NQC[[image or 0 for _, image in some]]
            p_BK = assistant.diagnose(queries_BQC, [text for text, _ in some], classes, use_queries=read_image)
            known |= dict(zip(some, p_BK.tolist(), strict=True))


def _write(assistant: Assistant, queries_NQC: Tensor, records: list[str], batch: int) -> list[str]:
    """The model's own words about each scan."""
    prompts = [render_prompt(record, DIAGNOSIS_QUESTION) for record in records]
    answers = []
    for start in range(0, len(prompts), batch):
        answers += assistant.answer(queries_NQC[start : start + batch], prompts[start : start + batch])
    return answers


def classes_of(samples: list[Sample]) -> list[str]:
    """The diagnoses that occur, in the order of DIAGNOSIS_ANSWERS."""
    return [name for name in DIAGNOSIS_ANSWERS if any(sample.diagnosis == name for sample in samples)]


def shuffle_over_subjects(subjects: list[str], num_rounds: int, seed: int) -> list[list[int]]:
    """For each round and scan, the row of a scan of another subject; no round where there is only one subject.

    The subjects stand in a ring in random order, and in round k everybody takes from the k-th neighbour: everybody
    gives to one and takes from one, another one in each round.
    """
    draw = random.Random(seed)
    ring = sorted(set(subjects))
    draw.shuffle(ring)
    rows_of: dict[str, list[int]] = {}
    for row, subject in enumerate(subjects):
        rows_of.setdefault(subject, []).append(row)
    rounds = []
    for shift in range(1, min(num_rounds, len(ring) - 1) + 1):
        giver = dict(zip(ring, ring[shift:] + ring[:shift], strict=True))
        rounds.append([draw.choice(rows_of[giver[subject]]) for subject in subjects])
    return rounds


def score_cohort(predictions: list[Prediction], options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """The report's entry of one cohort, arm by arm; the scores are None where it has a single class."""
    from medblip.metrics import score

    arms = {}
    for name in dict.fromkeys(prediction.arm for prediction in predictions):
        rows = [prediction for prediction in predictions if prediction.arm == name]
        samples = [row.sample for row in rows]
        classes, subjects = classes_of(samples), [sample.subject for sample in samples]
        num_scans = len({sample.key for sample in samples})
        arms[name] = {"n_subjects": len(set(subjects)), "n_scans": num_scans, "classes": classes}
        if len(classes) == 1:
            arms[name] |= dict.fromkeys(("balanced_accuracy", "macro_auc", "macro_f1", "recall", "confusion", "ci95"))
            continue
        p_NK = [list(row.probabilities.values()) for row in rows]
        truth = [sample.diagnosis for sample in samples]
        arms[name] |= score(truth, p_NK, classes, subjects, options.bootstrap, options.seed)
    return arms


def _record(reader: Reader, sample: Sample, tier: EhrTier) -> str:
    record = reader.record(sample)
    return render_record(record["fields"], record["report"], tier)


def _write_predictions(path: Path, predictions: list[Prediction]) -> None:
    """One row per scan and arm, under KEY and hashed subject; the probability of a class not offered is empty.

    `answer` is what the model wrote in the arm `both`, and the most probable option in the others.
    """
    header = ["scan_id", "subject_id", "cohort", "arm", "diagnosis", *(f"p_{c}" for c in DIAGNOSIS_ANSWERS), "answer"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for sample, arm, p, answer in predictions:
            columns = [f"{p[c]:.9g}" if c in p else "" for c in DIAGNOSIS_ANSWERS]
            writer.writerow([sample.key, sample.subject, sample.cohort, arm, sample.diagnosis, *columns, answer])


def _split_sha256(index: ShardIndex) -> str | None:
    try:
        return hashlib.sha256(index.read("split.csv")).hexdigest()
    except ValueError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None if it was installed otherwise."""
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
        top, commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit if Path(top) == root else None
