"""The README's "small data" recipe, whole, on a made-up study of 198 people with a diagnosis (bench/small_cohort.py).

For each seed and fold: shards, training, two evaluations (tier cognition and tier demographics). The scores of the
folds' test people are pooled: AUC of all of them together, with a 95 % interval over people, and the seeds' mean score.

    python bench/small_data.py --out small/ --seeds 0 1 --json small.json
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from sklearn.metrics import roc_auc_score
from small_cohort import NUM_FOLDS, write_images, write_manifest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text().split("### Small data")[1]


@dataclass(frozen=True)
class Options:
    """Five folds by the README's recipe, for every seed."""

    out: Path
    """Folder for everything; what is there of an earlier call is used again."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the training."""
    folds: tuple[int, ...] = tuple(range(NUM_FOLDS))
    cohort_seed: int = 3
    """Of the made-up people."""
    json: Path | None = None
    """Where the table goes as JSON."""


def recipe(**names: str) -> list[list[str]]:
    """The README's commands with this fold's names put in."""
    commands = []
    for line in README.split("```")[1].strip().replace("\\\n", " ").splitlines():
        words = [names.get(word, word) for word in shlex.split(line)]
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
        program = {"python": [sys.executable], "medblip": [sys.executable, "-m", "medblip.cli"]}
        commands.append(program.get(words[0], [str(Path(sys.executable).with_name(words[0]))]) + words[1:])
    return commands


def run_fold(out: Path, manifest: Path, seed: int) -> float:
    """Runs the recipe for one fold; returns the seconds it took."""
    started_at = time.monotonic()
    names = {"fold0.csv": str(manifest), "fold0-shards/": str(out / "shards"), "runs/fold0": str(out / "run")}
    names |= {"fold0-cognition/": str(out / "cognition"), "fold0-demographics/": str(out / "demographics")}
    for command in recipe(**names):
        if "train.py" in " ".join(command):
            command += ["--seed", str(seed)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
    return time.monotonic() - started_at


def read_scores(folders: list[Path]) -> dict[str, dict[str, list[float]]]:
    """For each arm the probability of AD of each scan (several in a shuffled arm), by KEY; and the truth."""
    scores: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        for tier in ("cognition", "demographics"):
            with open(folder / tier / "predictions.csv", newline="") as file:
                for row in csv.DictReader(file):
                    reads_record = row["arm"] in ("both", "text")
                    arm = f"{row['arm']}, {tier}" if reads_record else row["arm"]
                    if reads_record or tier == "cognition":
                        scores.setdefault(arm, {}).setdefault(row["scan_id"], []).append(float(row["p_AD"]))
                    scores.setdefault("truth", {})[row["scan_id"]] = [float(row["diagnosis"] == "AD")]
    return scores


def pooled(scores: dict[str, list[float]], truth: dict[str, list[float]], draws: int = 1000) -> dict[str, object]:
    """AUC of all folds' people together, with the 95 % interval over people drawn within their diagnosis."""
    keys = sorted(scores)
    # A shuffled arm has many scores of each person: one of them at a time.
    rounds = min(len(scores[key]) for key in keys)
    p_RN = np.array([scores[key][:rounds] for key in keys]).T
    is_ad_N = np.array([truth[key][0] for key in keys])
    source = np.random.default_rng(0)
    groups = [np.flatnonzero(is_ad_N == value) for value in (0, 1)]
    aucs = []
    for _ in range(draws):
        rows = np.concatenate([source.choice(group, len(group)) for group in groups])
        aucs.append(roc_auc_score(is_ad_N[rows], p_RN[source.integers(rounds), rows]))
    auc = float(np.mean([roc_auc_score(is_ad_N, p_N) for p_N in p_RN]))
    return {"auc": round(auc, 3), "ci95": [round(float(v), 3) for v in np.percentile(aucs, [2.5, 97.5])]}


def main() -> None:
    """Draws the study, runs every fold of every seed, and prints the table."""
    options = tyro.cli(Options, description=__doc__)
    rows_file = options.out / "rows.json"
    if not rows_file.is_file():
        rows = write_images(options.out, options.cohort_seed)
        rows_file.write_text(json.dumps(rows))
    rows = json.loads(rows_file.read_text())
    table, by_seed = [], []
    for seed in options.seeds:
        folders, elapsed_s = [], 0.0
        for fold in options.folds:
            folder = options.out / f"seed{seed}-fold{fold}"
            if not (folder / "demographics/predictions.csv").is_file():
                manifest = options.out / f"fold{fold}.csv"
                write_manifest(manifest, rows, fold)
                elapsed_s += run_fold(folder, manifest, seed)
            folders.append(folder)
        scores = read_scores(folders)
        by_seed.append(scores)
        for arm in sorted(scores.keys() - {"truth"}):
            table.append({"seed": seed, "arm": arm, **pooled(scores[arm], scores["truth"])})
        print(f"seed {seed}: {elapsed_s / 60:.1f} minutes for {len(folders)} folds", file=sys.stderr)
    for arm in sorted(by_seed[0].keys() - {"truth", "shuffled_image"}):
        truth = by_seed[0]["truth"]
        mean = {key: [float(np.mean([scores[arm][key][0] for scores in by_seed]))] for key in truth}
        table.append({"seed": "mean score of all", "arm": arm, **pooled(mean, truth)})
    for row in table:
        print(f"{row['seed']!s:>18}  {row['arm']:<22} AUC {row['auc']:.3f}  {row['ci95']}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
