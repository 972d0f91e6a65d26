"""The whole way on made-up patients: the README's commands, each printed before it runs.

The patients come in seven releases, laid out as ADNI, NACC, OASIS-1, -2, -3, AIBL and MIRIAD are downloaded. AIBL and
MIRIAD, from another scanner, are only tested on.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

STUDIES = ("adni", "nacc", "oasis1", "oasis2", "oasis3", "aibl", "miriad")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The whole way on made-up patients: releases, manifest, shards, training, evaluation, one question.

    Examples:
      medblip demo
      medblip demo --out /tmp/demo --subjects 120 --steps 60
    """

    out: str = "demo"
    """Folder for everything; its contents of an earlier demo are replaced."""
    subjects: int = 300
    """Made-up patients of seven studies; those of AIBL and MIRIAD, and a tenth of ADNI and NACC, are held out."""
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
    for name in ("releases", "manifests", "shards", "quality", "run", "evaluation"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    python = sys.executable
    deepspeed = str(Path(python).with_name("deepspeed"))
    shown = {python: "python", deepspeed: "deepspeed"}
    ranks, engine = _hardware()
    manifests = [out / f"manifests/{name}.csv" for name in STUDIES]
    manifest = out / "manifests/all.csv"
    stages = [
        (
            f"1/6  {options.subjects} made-up patients, in seven releases as they are downloaded",
            [python, "-m", "sharding.releases", "--out", out / "releases", "--subjects", options.subjects]
            + ["--effect", options.effect, "--seed", options.seed],
        ),
        *(
            (
                "2/6  releases to one manifest" if name == STUDIES[0] else "",
                [python, "-m", "sharding.manifest", name, "--images", out / f"releases/{name}/images"]
                + ["--tables", out / f"releases/{name}/tables", "--out", path],
            )
            for name, path in zip(STUDIES, manifests, strict=True)
        ),
        ("", [python, "-m", "sharding.merge", *manifests, "--out", manifest]),
        ("", [python, "-m", "sharding.audit", manifest]),
        (
            "3/6  scans to shards, the shards read back, and a page to look at",
            [python, "-m", "sharding.build", "--manifest", manifest, "--out", out / "shards"]
            + ["--size", 96, "--spacing-mm", 2.2, "--shard-samples", 40],
        ),
        ("", [python, "-m", "sharding.verify", out / "shards"]),
        ("", [python, "-m", "sharding.quality", out / "shards", "--out", out / "quality"]),
        (
            f"4/6  training on {ranks} ranks",
            [deepspeed, "--num_gpus", ranks, "--master_port", _free_port(), "train.py"]
            + ["--deepspeed_config", f"ds_configs/{engine}"]
            + ["--preset", "tiny", "--data", out / "shards", "--run", out / "run", "--seed", options.seed]
            + (["--steps", options.steps] if options.steps else []),
        ),
        (
            "5/6  held-out patients",
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
    console.print(Rule("[bold]6/6  one question about one scan", align="left"))
    question = "What will this subject be diagnosed with?"
    scan, diagnosis = _held_out_scan(out / "shards/split.csv", manifest)
    command = [python, "-m", "medblip.cli", "ask", scan, question, "--model", out / "run"]
    if code := _run(console, command, shown, repository):
        return code
    console.print(f"(this made-up patient was {diagnosis})")
    _pictures(out)
    _summary(console, out, time.monotonic() - started_at)
    return 0


def _free_port() -> int:
    """Where the ranks meet; DeepSpeed's own 29500 is taken where another training runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


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


def _held_out_scan(split: Path, manifest: Path) -> tuple[Path, str]:
    """Image and diagnosis of a test scan of somebody with the disease, of a cohort that was not trained on."""
    with open(split, newline="") as file:
        test = {row["scan_id"] for row in csv.DictReader(file) if row["split"] == "test"}
    with open(manifest, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scan_id"] in test]
    row = next((row for row in rows if (row["cohort"], row["diagnosis"]) == ("AIBL", "AD")), rows[0])
    return manifest.parent / row["image"], row["diagnosis"]


def _pictures(out: Path) -> None:
    from medblip.pictures import draw_losses, draw_montage

    draw_montage(out / "shards", "test", out / "scans.png")
    draw_losses(out / "run/metrics.jsonl", out / "losses.png")
    shutil.copy(out / "evaluation/confusion.png", out / "confusion.png")


def _summary(console, out: Path, elapsed_s: float) -> None:
    from rich.table import Table

    report = json.loads((out / "evaluation/report.json").read_text())
    table = Table(title="held-out patients, balanced accuracy", title_justify="left")
    for heading in ("cohort", "what the model read", "balanced accuracy", "95 % interval", "chance"):
        table.add_column(heading)
    names = {
        "image": "the scan",
        "text": f"the record ({report['ehr']})",
        "both": "scan and record",
        "shuffled_image": "another patient's scan",
    }
    for cohort_name, cohort in report["cohorts"].items():
        for arm, name in names.items():
            score = cohort[arm]["balanced_accuracy"]
            if score is None:
                table.add_row(cohort_name, name, "one diagnosis only", "", "")
                continue
            interval = cohort[arm]["ci95"]["balanced_accuracy"]
            shown = f"{interval[0]:.2f} - {interval[1]:.2f}" if interval else "too few subjects"
            table.add_row(cohort_name, name, f"{score:.2f}", shown, f"{1 / len(cohort[arm]['classes']):.2f}")
    console.print(table)
    places = Table.grid(padding=(0, 2))
    for what, where in (
        ("scans as the model sees them", "scans.png"),
        ("every scan, to look at", "quality/index.html"),
        ("loss curves", "losses.png"),
        ("confusion matrix", "confusion.png"),
        ("evaluation", "evaluation/report.html"),
        ("for the paper", "evaluation/methods.md"),
        ("the trained run", "run/"),
        ("the shards", "shards/"),
    ):
        places.add_row(what, str(out / where))
    console.print(places)
    console.print(f"the whole way took {elapsed_s / 60:.1f} minutes")
