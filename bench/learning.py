"""Does it learn from the image? Made-up patients with a known truth, other scanners and other studies in the test.

Trained on ADNI-, NACC- and OASIS-like patients (scanner A), tested on AIBL-like ones (CN, MCI, AD) and MIRIAD-like ones
(CN, AD) of scanner B. Only severity, which overlaps between the diagnoses, links brains to labels; shape,
pose, contrast, bias and noise are drawn apart from it. Each variant and seed has patients of its own:

- base: an effect at which a linear SVM on the same voxels has an AUC of 0.70 to 0.80 for CN against AD.
- doubled: twice that effect.
- permuted: base with the training diagnoses mixed evenly within each true one of each study.
- frozen: base without LoRA.
- no-contrast: base without the contrast.

    python bench/learning.py --out learning/ --variants base doubled --seeds 0 1 2 --json learning.json
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
TRAINED = {"ADNI": 120, "NACC": 90, "OASIS": 60}
TESTED = {"AIBL": 90, "MIRIAD": 135}
VAL_SHARE = 9
"""One subject in so many of the studies trained on is of the split val, on which the rule is chosen."""
EFFECT, TIER = 0.7, "cognition"
SETTINGS = {"frozen": ["--no-lora"], "no-contrast": ["--no-contrastive"]}
Variant = Literal["base", "doubled", "permuted", "frozen", "no-contrast"]


@dataclass(frozen=True)
class Options:
    """Variants of the training, each with several seeds."""

    out: Path
    """Folder for everything; what is there of an earlier call is used again."""
    variants: tuple[Variant, ...] = ("base", "doubled", "permuted", "frozen", "no-contrast")
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the patients and of the training."""
    effect: float = EFFECT
    """Of base; see sharding.madeup."""
    steps: int = 400
    json: Path | None = None
    """Where the table goes as JSON."""


def run(*words: object) -> None:
    """Runs one command of the product."""
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def make_shards(out: Path, seed: int, effect: float, is_permuted: bool) -> Path:
    """Patients of all five studies as one manifest and as shards; MIRIAD's without MCI, as the real one."""
    images = out / f"patients-seed{seed}-effect{effect:g}"
    shards = out / f"shards-seed{seed}-effect{effect:g}{'-permuted' * is_permuted}"
    if (shards / "index.json").is_file():
        return shards
    rows, draw = [], np.random.default_rng([seed, 1])
    for cohort, subjects in {**TRAINED, **TESTED}.items():
        folder = images / cohort
        if not (folder / "manifest.csv").is_file():
            scanner = "A" if cohort in TRAINED else "B"
            patients = ("--cohort", cohort, "--subjects", subjects, "--effect", effect, "--seed", seed)
            run("-m", "sharding.madeup", "--out", folder, "--scanner", scanner, *patients)
        with open(folder / "manifest.csv", newline="") as file:
            scans = list(csv.DictReader(file))
        if is_permuted and cohort in TRAINED:
            scans = permuted(scans, draw)
        for number, scan in enumerate(scans):
            split = "test" if cohort in TESTED else "train" if number % VAL_SHARE else "val"
            if (cohort, scan["diagnosis"]) != ("MIRIAD", "MCI"):
                rows.append(scan | {"image": f"{images.name}/{cohort}/{scan['image']}", "split": split})
    manifest = out / f"{shards.name}.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run("-m", "sharding.build", "--manifest", manifest, "--out", shards, "--size", 96, "--spacing-mm", 2.2)
    return shards


def permuted(scans: list[dict], draw: np.random.Generator) -> list[dict]:
    """With the diagnoses mixed so that within each true one all are as frequent: none of the disease is left."""
    diagnoses = np.array([scan["diagnosis"] for scan in scans])
    told = diagnoses.copy()
    for diagnosis in np.unique(diagnoses):
        rows = draw.permutation(np.flatnonzero(diagnoses == diagnosis))
        told[rows] = np.resize(np.unique(diagnoses), len(rows))
    return [scan | {"diagnosis": str(name)} for scan, name in zip(scans, told, strict=True)]


def train_and_evaluate(out: Path, shards: Path, variant: str, seed: int, steps: int) -> dict:
    """The report of one training."""
    folder = out / f"{variant}-seed{seed}"
    report = folder / "evaluation/report.json"
    if not report.is_file():
        settings = ["--preset", "tiny", "--ehr", TIER, "--steps", steps, "--seed", seed]
        settings += SETTINGS.get(variant, [])
        launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", 2, "train.py")
        engine = ("--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", shards, "--run", folder / "run")
        run(*launcher, *engine, *settings)
        run("-m", "medblip.cli", "evaluate", "--model", folder / "run", "--data", shards, "--out", report.parent)
    return json.loads(report.read_text())


def scores(report: dict, cohort: str) -> dict[str, dict]:
    """Of each arm and of the voxel SVM: macro AUC and balanced accuracy with their 95 % intervals over subjects."""
    arms = dict(report["cohorts"][cohort])
    arms["voxel_svm"] = report["baselines"][cohort]["voxel_svm"]
    names = ("macro_auc", "balanced_accuracy")
    return {
        arm: {name: [score[name], *(score["ci95"].get(name) or ())] for name in names} for arm, score in arms.items()
    }


def main() -> int:
    """Runs what is missing, prints a line for each variant, seed, cohort and arm, and the means over the seeds."""
    options = tyro.cli(Options, description=__doc__)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    table, started_at = [], time.monotonic()
    for variant in options.variants:
        for seed in options.seeds:
            effect = options.effect * (2 if variant == "doubled" else 1)
            shards = make_shards(out, seed, effect, variant == "permuted")
            report = train_and_evaluate(out, shards, variant, seed, options.steps)
            for cohort in TESTED:
                for arm, score in scores(report, cohort).items():
                    table.append({"variant": variant, "seed": seed, "cohort": cohort, "arm": arm, **score})
        for cohort in TESTED:
            rows = [row for row in table if (row["variant"], row["cohort"]) == (variant, cohort)]
            for arm in dict.fromkeys(row["arm"] for row in rows):
                print_line(variant, cohort, arm, [row for row in rows if row["arm"] == arm])
        print(f"{(time.monotonic() - started_at) / 60:.1f} minutes", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def print_line(variant: str, cohort: str, arm: str, rows: list[dict]) -> None:
    """Mean over the seeds, then each seed with its interval."""
    cells = []
    for name, title in (("macro_auc", "AUC"), ("balanced_accuracy", "balanced accuracy")):
        mean = np.mean([row[name][0] for row in rows])
        each = ", ".join(f"{row[name][0]:.2f} [{', '.join(f'{v:.2f}' for v in row[name][1:])}]" for row in rows)
        cells.append(f"{title} {mean:.3f} ({each})")
    print(f"{variant:<12}{cohort:<8}{arm:<15}" + "  ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
