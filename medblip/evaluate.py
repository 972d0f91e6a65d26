"""How well a trained model tells diagnoses apart on scans of subjects it has never seen.

1. refuse what would make the numbers wrong: a subject seen in training, volumes of another recipe, a higher tier;
2. encode every scan once;
3. choose on the validation split how answers are compared, and keep to it;
4. ask for the diagnosis in each arm (arms.py), cohort by cohort;
5. score each cohort by itself and write the report.

Under deepspeed, torchrun or srun the ranks share the asking, and rank 0 writes. Sample KEYs, cohort names and numbers
come out; the text of a record never does.
"""

from __future__ import annotations

import csv
import hashlib
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from medblip.arms import ARMS, DEFAULT_ARMS, ArmName, classes_of
from medblip.config import EhrTier
from medblip.scoring import DEFAULT_RULE, RULES, RuleName
from medblip.text import DIAGNOSIS_ANSWERS

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` must not wait for it
    from numpy.typing import NDArray

    from medblip.analysis import Draws, Prediction
    from medblip.asking import Diagnosed, Interview
    from medblip.scoring import Options, Rule
    from medblip.shards import Sample, ShardIndex

OTHER_ANSWER = "other"
"""Stands in predictions.csv for a written answer that is none of the options: it could repeat the record."""

WORST_MISTAKES = 6
"""Pictures of a cohort, at most."""

RULE_SCANS = 400
"""Scans, at most, on which the rule is chosen and balanced."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Zero-shot diagnosis of the scans of a split, cohort by cohort.

    Examples:
      medblip evaluate --model runs/x --data shards/ --split test --out evaluation/
      medblip evaluate --model runs/x --data shards/ --ehr none --arms image shuffled_image --out image-only/
      torchrun --nproc-per-node 8 -m medblip.cli evaluate --model runs/x --data shards/ --out evaluation/
    """

    model: str
    """A run folder, or one of its checkpoints."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Of a run folder: the latest checkpoint, or the one that validation during training found best."""
    data: str
    """Folder of shards or its URL, prepared with the recipe that the model was trained on."""
    split: str = "test"
    """Split of the shards to evaluate."""
    out: str = "evaluation"
    """Folder for report.html, report.md, report.json, methods.md, predictions.csv and pictures; made if missing."""
    ehr: EhrTier | None = None
    """Fields of the record that the model may read: the run's own tier, or a lower one."""
    arms: tuple[ArmName, ...] = DEFAULT_ARMS
    """What the model reads: the scan, the record, both, another subject's scan or a blank one."""
    rule: Literal["val"] | RuleName = "val"
    """How the likelihoods of the answers are compared. val: as is best on the split val of the same shards.
    sum-balanced: so that each diagnosis is equally probable over scans of val or, where there is no val, of train."""
    vqa_scans: int = 100
    """Scans of each cohort, with a diagnosis or not, that are also asked other questions (age, sex, ...), without the
    record; 0: none."""
    baselines: bool = True
    """Fit a voxel SVM and a regression on the record's fields on the split train of the same shards."""
    batch: int = 8
    """Scans at a time, on each rank."""
    bootstrap: int = 1000
    """Draws of subjects for the 95 % intervals."""
    seed: int = 0
    """Decides who gets whose scan in the shuffled arms, and the draws."""

    def __post_init__(self) -> None:
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms needs names that differ, out of {', '.join(ARMS)}; not {self.arms}")
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, not {self.batch}")
        if self.vqa_scans < 0:
            raise ValueError(f"--vqa-scans must not be negative, not {self.vqa_scans}")
        if self.bootstrap < 1000:
            raise ValueError(f"--bootstrap must be at least 1000, not {self.bootstrap}: fewer draws give no interval")


def evaluate(options: EvaluateOptions) -> int:
    """Evaluates, writes the folder `--out` and prints the table; returns the exit code.

    Raises:
        ValueError: if the data does not fit the model, or a subject was seen in training.
    """
    from medblip.analysis import Draws
    from medblip.asking import encode
    from medblip.distributed import Control, join_launched, leave, log
    from medblip.guards import check_recipe, check_tier, check_unseen
    from medblip.inference import Assistant
    from medblip.report import plain_table, write_report
    from medblip.shards import Reader, ShardIndex
    from medblip.share import Crew
    from medblip.vqa import ask_questions

    rank = join_launched()
    crew = Crew(rank, Control(rank))
    index = ShardIndex(options.data)
    everyone = index.samples(options.split)
    samples = [sample for sample in everyone if sample.diagnosis]
    if not samples:
        raise ValueError(f"--data {options.data}: no scan of the split '{options.split}' has a diagnosis")
    assistant = Assistant(options.model, rank.device, options.checkpoint)
    check_unseen(everyone, assistant.train_subjects)
    check_recipe(index.recipe, assistant.recipe.to_dict())
    tier = check_tier(options.ehr or assistant.ehr, assistant.ehr)

    notes = []
    questioned = samples_for_vqa(everyone, options.vqa_scans)
    undiagnosed = [sample for some in questioned.values() for sample in some if not sample.diagnosis]
    if len(samples) < len(everyone):
        notes.append(
            f"{len(everyone) - len(samples)} of {len(everyone)} scans have no diagnosis and are not scored on it; "
            f"{len(undiagnosed)} of these were asked other questions"
        )
    if tier == "none":
        notes.append("the tier is none: no arm reads a record")
    rule_samples, why_not = samples_for_rule(index, options, assistant.train_subjects)
    reader = Reader(index, threads=2)
    encoded = rule_samples + samples + undiagnosed
    interview = encode(assistant, reader, encoded, tier, options.batch, crew)
    reader.close()

    rule, reference, rule_entry = DEFAULT_RULE, None, {"chosen_on": "default", "scores": {}}
    if rule_samples:
        reference = ask_reference(interview, list(range(len(rule_samples))), options)
    if options.rule != "val":
        rule, rule_entry = RULES[options.rule], {"chosen_on": "given", "scores": {}}
    elif why_not:
        notes.append(f"answers are compared by the default rule, sum-minus-null: {why_not}")
    else:
        rule, scores = rule_on_validation(reference)
        rule_entry = {"chosen_on": "val", "scores": scores}
    if rule.balanced:
        if why_not:
            notes.append(f"the answers were balanced on scans that were trained on: {why_not}")
        on = {"split": "train" if why_not else "val", "scans": len(rule_samples)}
        rule_entry |= {"balanced_on": on, "offsets": {}}
    cohorts, vqa, draws = {}, {}, Draws(options.bootstrap, options.seed)
    for cohort in sorted({sample.cohort for sample in samples}):
        rows = [len(rule_samples) + row for row, sample in enumerate(samples) if sample.cohort == cohort]
        cohorts[cohort], offsets, more_notes = ask_cohort(interview, rows, rule, options, reference)
        if rule.balanced:
            rule_entry["offsets"][cohort] = offsets
        notes += [f"{cohort}: {note}" for note in more_notes]
    row_of = {sample.key: row for row, sample in enumerate(encoded)}
    for cohort, some in questioned.items():
        vqa[cohort] = ask_questions(interview, [row_of[sample.key] for sample in some], rule, draws)
    if not rank.is_main:
        leave(0)
    baselines_NK, more_notes = fit_baselines(index, cohorts, tier, options)
    notes += more_notes
    for note in notes:
        log.info(note)

    report = {
        "model": assistant.name,
        "split": options.split,
        "ehr": tier,
        "arms": {name: ARMS[name]._asdict() for name in options.arms},
        "rule": rule._asdict() | rule_entry,
        **analyse(cohorts, baselines_NK, draws),
        "vqa": vqa,
        "trained_on": assistant.trained_on,
        "counts": {"scans": len(everyone), "without_diagnosis": len(everyone) - len(samples), "scored": len(samples)},
        "notes": notes,
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "recipe": index.recipe,
        "split_sha256": _split_sha256(index),
        "commit": _commit(),
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    report["worst"] = draw_worst(index, cohorts, options, out)
    _write_predictions(out / "predictions.csv", [found for some in cohorts.values() for found in some])
    write_report(out, without_nan(report))
    print(plain_table(report))
    print(f"\nwritten to {out}/; begin with report.html")
    return 0


def samples_for_vqa(samples: list[Sample], num_scans: int) -> dict[str, list[Sample]]:
    """By cohort, the scans that are asked other questions, with a diagnosis or without: those of the lowest KEYs."""
    by_cohort: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.cohort, sample.key)):  # KEYs are hashes
        by_cohort.setdefault(sample.cohort, []).append(sample)
    return {cohort: some[:num_scans] for cohort, some in by_cohort.items() if num_scans}


def samples_for_rule(
    index: ShardIndex, options: EvaluateOptions, train_subjects: frozenset[str]
) -> tuple[list[Sample], str]:
    """The scans that the rule is chosen and balanced on, at most RULE_SCANS; and why it is not those of val, or "".

    Those are none, or of train where a balanced rule was given.
    """
    is_balanced = options.rule != "val" and RULES[options.rule].balanced
    if options.rule != "val" and not is_balanced:
        return [], "a rule was given"

    def diagnosed(split: str) -> list[Sample]:
        try:
            samples = [sample for sample in index.samples(split) if sample.diagnosis]
        except ValueError:
            return []
        return sorted(samples, key=lambda sample: sample.key)  # KEYs are hashes

    samples = [sample for sample in diagnosed("val") if sample.subject not in train_subjects]
    if options.split == "val":
        why_not = "the split val is the one that is evaluated"
    elif len(classes_of(sample.diagnosis for sample in samples)) < 2:
        why_not = "the shards have no split val with two diagnoses of subjects that were not trained on"
    else:
        return samples[:RULE_SCANS], ""
    if not is_balanced:
        return [], why_not
    samples = diagnosed("train")
    if len(classes_of(sample.diagnosis for sample in samples)) < 2:
        raise ValueError(
            f"--rule {options.rule}: {why_not}, and the split train has no two diagnoses; give another rule"
        )
    return samples[:RULE_SCANS], why_not


class Reference(NamedTuple):
    """What the scans that the rule is chosen and balanced on were answered, in each arm that reads its own scan."""

    options: Options
    offered: list[str]
    truth: dict[str, list[str]]
    """By arm: the diagnoses."""
    logp: dict[str, NDArray]
    """By arm: the log-likelihoods, `N O`."""

    def offsets(self, arm: str, offered: list[str]) -> NDArray:
        """What balances these answers in this arm; those of the arm with a scan's own image where it is another's."""
        import numpy as np

        from medblip.scoring import balancing_offsets

        arm = _own_arm(arm)
        known = [name for name in offered if name in self.offered]
        rows = [row for row, name in enumerate(self.truth[arm]) if name in known]
        truth_N = np.array([known.index(self.truth[arm][row]) for row in rows], dtype=int)
        columns = [self.offered.index(name) for name in known]
        offset_O = np.zeros(len(offered))
        offset_O[[offered.index(name) for name in known]] = balancing_offsets(
            truth_N, self.logp[arm][np.ix_(rows, columns)]
        )
        return offset_O


def _own_arm(name: str) -> str:
    """The arm that reads as much of a record, and a scan's own image if it reads one."""
    if ARMS[name].image == "no scan":
        return name
    return "both" if ARMS[name].record else "image"


def ask_reference(interview: Interview, rows: list[int], options: EvaluateOptions) -> Reference:
    """Asks for the diagnosis of the scans that the rule is chosen and balanced on.

    Raises:
        ValueError: naming the KEY of a scan whose likelihoods are not finite.
    """
    import numpy as np

    from medblip.scoring import check_likelihoods

    arms = dict.fromkeys(_own_arm(name) for name in options.arms)
    if interview.tier != "none" and any(ARMS[name].record for name in options.arms):
        arms |= {"both": None}
    found = interview.diagnose(rows, tuple(arms), options.seed)
    check_likelihoods(found.logp_NO, found.options, names_of(interview, found))
    truth: dict[str, list[str]] = {arm: [] for arm in arms}
    logp: dict[str, list] = {arm: [] for arm in arms}
    for one, logp_O in zip(found.asked, found.logp_NO, strict=True):
        truth[one.arm].append(interview.scans[one.row].sample.diagnosis)
        logp[one.arm].append(logp_O)
    return Reference(found.options, found.offered, truth, {arm: np.array(rows) for arm, rows in logp.items()})


def rule_on_validation(reference: Reference) -> tuple[Rule, dict[str, float]]:
    """The rule that is best on these scans, in the arm `both`, or `image` if no arm that is asked reads a record."""
    import numpy as np

    from medblip.scoring import choose_rule

    arm = "both" if "both" in reference.logp else "image"
    truth_N = np.array([reference.offered.index(name) for name in reference.truth[arm]])
    return choose_rule(truth_N, reference.logp[arm], reference.options)


def names_of(interview: Interview, found: Diagnosed) -> list[str]:
    """The KEY and the arm of each ask, for a message."""
    return [f"{interview.scans[one.row].sample.key}, arm {one.arm}" for one in found.asked]


def ask_cohort(
    interview: Interview, rows: list[int], rule: Rule, options: EvaluateOptions, reference: Reference | None = None
) -> tuple[list[Prediction], dict[str, dict[str, float]], list[str]]:
    """Asks for the diagnosis of each scan of one cohort in each arm.

    Returns the predictions, by arm the offsets of the answers (of a rule that is balanced), and what a reader of them
    should know.

    Raises:
        ValueError: naming the KEY of a scan whose likelihoods are not finite.
    """
    import numpy as np

    from medblip.analysis import Prediction
    from medblip.scoring import check_likelihoods, probabilities

    found = interview.diagnose(rows, options.arms, options.seed)
    check_likelihoods(found.logp_NO, found.options, names_of(interview, found))
    classes, offered, answers = found.classes, found.offered, found.options.answers
    notes = []
    if len(classes) == 2:
        notes.append(f"only {classes[0]} and {classes[1]} occur, so only these two were offered as answers")
    if len(classes) == 1:
        notes.append(f"only {classes[0]} occurs, so there is nothing to tell apart and no score")
    offsets: dict[str, NDArray] = {}
    if rule.balanced:
        assert reference is not None
        offsets = {arm: reference.offsets(arm, offered) for arm in dict.fromkeys(one.arm for one in found.asked)}
    offset_NO = [offsets.get(one.arm, [0.0] * len(offered)) for one in found.asked]
    p_NO = probabilities(found.logp_NO, found.options, rule, np.array(offset_NO)).tolist()
    predictions = []
    for one, p_O, written in zip(found.asked, p_NO, found.written, strict=True):
        answer = answers[p_O.index(max(p_O))]
        if one.arm == "both":
            answer = OTHER_ANSWER if written is None else answers[written]
        predictions.append(Prediction(interview.scans[one.row], one.arm, dict(zip(offered, p_O, strict=True)), answer))
    by_name = {arm: dict(zip(offered, offset_O.tolist(), strict=True)) for arm, offset_O in offsets.items()}
    return predictions, by_name, notes + found.notes


def fit_baselines(
    index: ShardIndex, cohorts: dict[str, list[Prediction]], tier: EhrTier, options: EvaluateOptions
) -> tuple[dict[str, dict[str, NDArray]], list[str]]:
    """Each cohort's probabilities by baselines that were fitted on the split train, and notes on what was left out."""
    found, notes = {cohort: {} for cohort in cohorts}, []
    if not options.baselines:
        return found, notes
    from medblip.analysis import scans_of
    from medblip.baselines import fit_and_predict
    from medblip.shards import Reader

    try:
        train = [sample for sample in index.samples("train") if sample.diagnosis]
    except ValueError:
        return found, ["the shards have no split train, so no baseline was fitted"]
    test_of = {cohort: [scan.sample for scan in scans_of(predictions)] for cohort, predictions in cohorts.items()}
    alike: dict[tuple[str, ...], list[str]] = {}  # fitted once for all cohorts of the same classes
    for cohort, test in test_of.items():
        alike.setdefault(tuple(classes_of(sample.diagnosis for sample in test)), []).append(cohort)
    reader = Reader(index, threads=2)
    for classes, names in alike.items():
        if len(classes) > 1:
            test = [sample for name in names for sample in test_of[name]]
            fitted, more = fit_and_predict(index, reader, train, test, classes, tier, options.seed)
            notes += [f"{', '.join(names)}: {note}" for note in more]
            start = 0
            for name in names:
                rows = slice(start, start := start + len(test_of[name]))
                found[name] = {baseline: p_NK[rows] for baseline, p_NK in fitted.items()}
    reader.close()
    return found, notes


def analyse(
    cohorts: dict[str, list[Prediction]], baselines_NK: dict[str, dict[str, NDArray]], draws: Draws
) -> dict[str, Any]:
    """The report's entries about the predictions, cohort by cohort."""
    from medblip import analysis

    return {
        "cohorts": {name: analysis.score_arms(found, draws) for name, found in cohorts.items()},
        "baselines": {
            name: analysis.score_baselines(found, baselines_NK[name], draws) for name, found in cohorts.items()
        },
        "comparisons": {
            name: analysis.compare_arms(found, baselines_NK[name], draws) for name, found in cohorts.items()
        },
        "subgroups": {name: analysis.score_subgroups(found, draws) for name, found in cohorts.items()},
        "age_matched": {name: analysis.match_ages(found, draws) for name, found in cohorts.items()},
        "one_scan_per_subject": {
            name: analysis.score_one_scan_per_subject(found, draws) for name, found in cohorts.items()
        },
    }


def draw_worst(
    index: ShardIndex, cohorts: dict[str, list[Prediction]], options: EvaluateOptions, out: Path
) -> list[dict[str, Any]]:
    """Draws the worst mistakes of each cohort in the arm `image`, or `both`, into `worst/`; the report's entries."""
    from medblip.analysis import worst_mistakes
    from medblip.pictures import draw_scan
    from medblip.shards import Reader

    arm = next((name for name in ("image", "both") if name in options.arms), None)
    reader, entries = Reader(index, threads=1), []
    for cohort, predictions in cohorts.items():
        for found in worst_mistakes(predictions, arm, WORST_MISTAKES) if arm else []:
            sample = found.scan.sample
            picture = f"worst/{sample.key}.png"
            (out / "worst").mkdir(exist_ok=True)
            draw_scan(reader, sample, out / picture)
            answer = max(found.probabilities, key=found.probabilities.get)
            entries.append(
                {"key": sample.key, "cohort": cohort, "arm": arm, "diagnosis": sample.diagnosis, "answer": answer}
                | {"probability": found.probabilities.get(sample.diagnosis), "picture": picture}
            )
    reader.close()
    return entries


def without_nan(content: Any) -> Any:
    """The same with None for each number that is not finite, which JSON does not have."""
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write_predictions(path: Path, predictions: list[Prediction]) -> None:
    """One row per scan and arm, under KEY and hashed subject; the probability of a class not offered is empty.

    `answer` is the option that the model would write in the arm `both`, and the most probable one in the others.
    """
    header = ["scan_id", "subject_id", "cohort", "arm", "diagnosis", *(f"p_{c}" for c in DIAGNOSIS_ANSWERS), "answer"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for scan, arm, p, answer in predictions:
            sample = scan.sample
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
