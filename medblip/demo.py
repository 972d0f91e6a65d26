"""The whole way on made-up patients: the README's commands, each printed before it runs."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The whole way on made-up patients: scans, shards, training on two ranks, evaluation, one question.

    Examples:
      medblip demo
      medblip demo --out /tmp/demo --subjects 120 --steps 60
    """

    out: str = "demo"
    """Folder for everything; its contents of an earlier demo are replaced."""
    subjects: int = 300
    """Made-up patients, one scan each; four fifths train, a tenth is held out for the test."""
    effect: float = 2.0
    """How strongly the disease changes the made-up brains; 0 makes the image useless."""
    steps: int | None = None
    """Optimizer steps. Without it: the preset's epochs."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.subjects < 60:
            raise ValueError(f"--subjects must be at least 60, or too few are held out; not {self.subjects}")


def demo(options: DemoOptions) -> int:
    """Runs every stage as its own command and returns the first exit code that is not 0."""
    from rich.console import Console
    from rich.rule import Rule

    out = Path(options.out)
    repository = Path(__file__).resolve().parent.parent
    if not (repository / "train.py").is_file():
        raise ValueError("medblip demo runs train.py: call it from a checkout of the repository")
    for name in ("patients", "shards", "run", "evaluation"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    python = sys.executable
    deepspeed = str(Path(python).with_name("deepspeed"))
    shown = {python: "python", deepspeed: "deepspeed"}
    ranks, engine = _hardware()
    stages = [
        (
            f"1/5  {options.subjects} made-up patients",
            [python, "-m", "sharding.madeup", "--out", out / "patients", "--subjects", options.subjects]
            + ["--effect", options.effect, "--seed", options.seed],
        ),
        (
            "2/5  scans to shards, and the shards read back",
            [python, "-m", "sharding.build", "--manifest", out / "patients/manifest.csv", "--out", out / "shards"]
            + ["--size", 96, "--spacing-mm", 2.2, "--shard-samples", 40],
        ),
        ("", [python, "-m", "sharding.verify", out / "shards"]),
        (
            f"3/5  training on {ranks} ranks",
            [deepspeed, "--num_gpus", ranks, "train.py", "--deepspeed_config", f"ds_configs/{engine}"]
            + ["--preset", "tiny", "--data", out / "shards", "--run", out / "run", "--seed", options.seed]
            + (["--steps", options.steps] if options.steps else []),
        ),
        (
            "4/5  held-out patients",
            [python, "-m", "medblip.cli", "evaluate", "--model", out / "run", "--data", out / "shards"]
            + ["--split", "test", "--out", out / "evaluation"],
        ),
    ]
    started_at = time.monotonic()
    for title, command in stages:
        if title:
            console.print(Rule(f"[bold]{title}", align="left"))
        if code := _run(console, command, shown, repository):
            return code
    console.print(Rule("[bold]5/5  one question about one scan", align="left"))
    question = "What will this subject be diagnosed with?"
    patient, diagnosis = _held_out_patient(out)
    command = [python, "-m", "medblip.cli", "ask", out / "patients" / patient, question, "--model", out / "run"]
    if code := _run(console, command, shown, repository):
        return code
    console.print(f"(this made-up patient was {diagnosis})")
    _pictures(out)
    _summary(console, out, time.monotonic() - started_at)
    return 0


def _hardware() -> tuple[int, str]:
    """Ranks, and the DeepSpeed config that suits this machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), "zero2.json"
    # Without bf16 units a CPU computes bf16 many times slower than float32.
    return 2, "zero2.json" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "zero2_fp32.json"


def _run(console, command: list, shown: dict[str, str], repository: Path) -> int:
    words = [str(word) for word in command]
    line = shlex.join([shown.get(word, word) for word in words]).replace("python -m medblip.cli", "medblip")
    console.print(f"[green]$ {line}", highlight=False, soft_wrap=True)
    # The commands stand where the user stands, so that printed paths are theirs; train.py is found from the checkout.
    words = [str(repository / word) if word == "train.py" or word.startswith("ds_configs/") else word for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    code = subprocess.run(words, env=environment).returncode
    if code:
        console.print(f"[red]this command failed with exit code {code}; nothing after it was run")
    return code


def _held_out_patient(out: Path) -> tuple[str, str]:
    """Image path and diagnosis of the first test patient with the disease, from split.csv and the manifest."""
    with open(out / "shards/split.csv", newline="") as file:
        test = {row["scan_id"] for row in csv.DictReader(file) if row["split"] == "test"}
    with open(out / "patients/manifest.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scan_id"] in test]
    row = next((row for row in rows if row["diagnosis"] == "AD"), rows[0])
    return row["image"], row["diagnosis"]


def _pictures(out: Path) -> None:
    from medblip.pictures import draw_losses, draw_montage

    draw_montage(out / "shards", "test", out / "scans.png")
    draw_losses(out / "run/metrics.jsonl", out / "losses.png")
    shutil.copy(out / "evaluation/confusion.png", out / "confusion.png")


def _summary(console, out: Path, elapsed_s: float) -> None:
    from rich.table import Table

    report = json.loads((out / "evaluation/report.json").read_text())
    table = Table(title="held-out patients, balanced accuracy", title_justify="left")
    for heading in ("what the model read", "balanced accuracy", "95 % interval", "chance"):
        table.add_column(heading)
    names = {
        "image": "the scan",
        "text": f"the record ({report['ehr']})",
        "both": "scan and record",
        "shuffled_image": "another patient's scan",
    }
    for cohort in report["cohorts"].values():
        for arm, name in names.items():
            low, high = cohort[arm]["ci95"]["balanced_accuracy"]
            chance = 1 / len(cohort[arm]["classes"])
            table.add_row(name, f"{cohort[arm]['balanced_accuracy']:.2f}", f"{low:.2f} - {high:.2f}", f"{chance:.2f}")
    console.print(table)
    places = Table.grid(padding=(0, 2))
    for what, where in (
        ("scans as the model sees them", "scans.png"),
        ("loss curves", "losses.png"),
        ("confusion matrix", "confusion.png"),
        ("evaluation", "evaluation/report.md"),
        ("the trained run", "run/"),
        ("the shards", "shards/"),
    ):
        places.add_row(what, str(out / where))
    console.print(places)
    console.print(f"the whole way took {elapsed_s / 60:.1f} minutes")
