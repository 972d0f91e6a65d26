"""What an evaluation costs, against the least that it can: one vision forward per scan, one LM prompt pass per arm.

- floor: each volume, already on the device, is encoded once (vision tower and MedQFormer, whose queries the prompts
  need); each prompt with the scan's queries (without them in the arm `text`) goes through the language model once per
  scan and arm, for the logits of one token.
- ours: what `medblip evaluate` does from the shards on, in the default arms: reading, unpacking, vision tower,
  MedQFormer, prompts, all options of the answer, every shuffled round, the null. It asks equal questions once: those of
  the arm `shuffled_image` are those of `image`, and `blank_image` is one. Then, apart, the scores with their 1,000
  bootstrap draws, subgroups and one scan per subject.

Both in one process on the same made-up scans, in alternation; the median of the rounds counts. On a CPU twice: of the
processor, where reading counts in full although threads do it ahead, and other jobs do not; and as time passes, which
is what somebody waits for. The weights are those of an untrained model: what it says costs the same.

    python bench/evaluate.py [--scans 200] [--rounds 5] [--preset tiny] [--json evaluate.json]
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from medblip.analysis import Draws
from medblip.arms import DEFAULT_ARMS, ask_diagnosis
from medblip.asking import Interview, encode
from medblip.config import TrainConfig
from medblip.distributed import Control, Rank
from medblip.evaluate import EvaluateOptions, analyse, ask_cohort
from medblip.inference import Asker
from medblip.model import MedBLIP
from medblip.scoring import DEFAULT_RULE
from medblip.shards import Reader, ShardIndex
from medblip.share import Crew
from medblip.words import build_words

TIER = "demographics"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time of an evaluation against its floor."""

    scans: int = 200
    """Made-up scans, of as many subjects."""
    rounds: int = 5
    """Times that each is measured."""
    preset: str = "tiny"
    """Whose model; its weights must be in the cache."""
    size: int = 96
    """Voxels along each edge."""
    batch: int = 8
    """Scans at a time."""
    json: Path | None = None
    """File for the table."""


def main(options: Options) -> int:
    """Makes the scans, times both, prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        index = ShardIndex(make_shards(Path(folder), options.scans, options.size))
        found = measure(index, options)
    for name, value in found.items():
        print(f"{name:<36}{value if isinstance(value, int) else format(value, '.3f')}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def make_shards(folder: Path, scans: int, size: int) -> Path:
    """Packs made-up patients, all of the split test."""
    run = [sys.executable, "-m"]
    subprocess.run([*run, "sharding.madeup", "--out", folder / "raw", "--subjects", str(scans)], check=True)
    with open(folder / "raw/manifest.csv", newline="") as file:
        rows = [row | {"split": "test"} for row in csv.DictReader(file)]
    with open(folder / "raw/manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    command = [*run, "sharding.build", "--manifest", folder / "raw/manifest.csv", "--out", folder / "shards"]
    subprocess.run([*command, "--size", str(size), "--spacing-mm", str(2.2 * 96 / size)], check=True)
    return folder / "shards"


def measure(index: ShardIndex, options: Options) -> dict[str, float]:
    """Seconds of each part, and ours as multiples of the floor."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(data="", run="", deepspeed_config="", preset=options.preset).model_config()
    model = MedBLIP(config, index.grid_size, device).to(device).eval()
    asker = Asker(model, build_words(config), index.grid_size, device)
    rank = Rank(0, 1, 0, device)
    crew, samples = Crew(rank, Control(rank)), index.samples("test")
    settings = EvaluateOptions(model="", data="", batch=options.batch)
    reader = Reader(index, threads=2)
    volumes_of_batches, interview = [], encode(asker, reader, samples, TIER, options.batch, crew)
    for start in range(0, len(samples), options.batch):
        some = samples[start : start + options.batch]
        flat = torch.empty(sum(sample.num_voxels for sample in some), dtype=torch.uint8)
        reader.volumes(some, flat.numpy())
        volumes_of_batches.append(asker.volumes(flat, some))
    rows = list(range(len(samples)))
    prompts = prompts_of_batches(interview, rows, interview.batch)

    times: dict[str, list[Seconds]] = {"floor": [], "encoding": [], "asking": [], "scores": []}
    for _ in range(options.rounds):
        times["floor"].append(timed(device, floor, asker, volumes_of_batches, prompts, interview))
        asker.options.cache_clear()
        times["encoding"].append(timed(device, encode, asker, reader, samples, TIER, options.batch, crew))
        times["asking"].append(timed(device, ask_cohort, interview, rows, DEFAULT_RULE, settings))
        predictions, *_ = ask_cohort(interview, rows, DEFAULT_RULE, settings)
        times["scores"].append(timed(device, analyse, {"MADEUP": predictions}, {"MADEUP": {}}, Draws(1000, 0)))
    reader.close()
    found: dict[str, float] = {"scans": len(samples), "arms": len(DEFAULT_ARMS)}
    for clock in Seconds._fields:
        seconds = {name: [getattr(value, clock) for value in values] for name, values in times.items()}
        ratios = [
            (encoding + asking) / least
            for encoding, asking, least in zip(seconds["encoding"], seconds["asking"], seconds["floor"], strict=True)
        ]
        found |= {f"{name}_s_{clock}": statistics.median(values) for name, values in seconds.items()}
        found |= {f"ours_over_floor_{clock}": statistics.median(ratios)}
        found |= {f"ours_over_floor_{clock}_min": min(ratios), f"ours_over_floor_{clock}_max": max(ratios)}
    return found


def prompts_of_batches(interview: Interview, rows: list[int], batch: int) -> list[tuple[list[int], list[str], bool]]:
    """Rows, prompts and whether queries are read, of one pass per scan and arm; prompts of a length together."""
    subjects = [scan.sample.subject for scan in interview.scans]
    batches = []
    for arm in DEFAULT_ARMS:
        asked, _ = ask_diagnosis((arm,), rows, subjects, interview.records(rows), seed=0)
        asked = sorted(asked[: len(rows)], key=lambda one: len(one.ask.prompt))
        for start in range(0, len(asked), batch):
            some = asked[start : start + batch]
            batches.append(([one.row for one in some], [one.ask.prompt for one in some], arm != "text"))
    return batches


@torch.no_grad()
def floor(asker: Asker, volumes_of_batches, prompts, interview: Interview) -> None:
    """One encoding per scan, one prompt pass per scan and arm."""
    for volume_BXYZ in volumes_of_batches:
        asker.encode(volume_BXYZ)
    language = asker.model.language
    for rows, texts, reads_image in prompts:
        queries_BQC = interview.queries_NQC[rows].to(asker.device)
        prompt_ids_BT, is_prompt_BT = (tensor.to(asker.device) for tensor in asker.words.prompts(texts))
        use_queries_B = torch.full((len(rows),), reads_image, device=asker.device)
        queries_BQC = queries_BQC if reads_image else queries_BQC[:, :0]
        prefix = language.prefix(queries_BQC, use_queries_B, prompt_ids_BT, is_prompt_BT)
        mask_BS = prefix.is_read_BS.long()
        if language.is_encoder_decoder:
            start_B1 = torch.full_like(mask_BS[:, :1], language.start_id)
            more = {"decoder_input_ids": start_B1}
        else:
            more = {"position_ids": (mask_BS.cumsum(1) - 1).clamp(min=0), "logits_to_keep": 1}
        language.lm(inputs_embeds=prefix.embeddings_BSE, attention_mask=mask_BS, use_cache=False, **more).logits.cpu()


class Seconds(NamedTuple):
    """How long a call took."""

    processor: float
    """All threads of this process; on a GPU without its own work."""
    wall: float


def timed(device: torch.device, do, *arguments) -> Seconds:
    """How long a call takes, a GPU's work included in `wall`; nothing of what was begun before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began_at, began_at_processor = time.perf_counter(), time.process_time()
    do(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.process_time() - began_at_processor, time.perf_counter() - began_at)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
