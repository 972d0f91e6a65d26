"""Reading training volumes: our shards against the published loader, interleaved in one run.

Published: each sample is read from .nii.gz with SimpleITK, scaled to its minimum and maximum, resized and padded, by a
torch DataLoader with as many workers as ours has threads. Ours: `Reader` fills one flat uint8 buffer from shards of the
same volumes and the same grid (recipe `reference`), ready for the device, which pads and scales.

    python bench/loader.py [--volumes 12] [--rounds 5] [--json loader.json]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from medblip.shards import Reader, ShardIndex

SIZE = 224


@dataclass(frozen=True, kw_only=True)
class Options:
    """Volumes a second, ours and the published loader's, with one and two threads or workers."""

    volumes: int = 12
    """Made-up volumes, of different contents."""
    rounds: int = 5
    """Rounds; in each, everything is timed once, and the median counts."""
    json: Path | None = None
    """File for the table."""


class Published(torch.utils.data.Dataset):
    """The published per-sample load. Source: Qybc/MedBLIP, medblip/dataset.py, written anew."""

    def __init__(self, images: list[Path]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> torch.Tensor:
        import SimpleITK

        torch.set_num_threads(1)
        volume = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(self.images[row]))).astype(np.float32)
        volume = (volume - volume.min()) / (volume.max() - volume.min())
        new = [SIZE * n // max(volume.shape) for n in volume.shape]
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(volume)[None, None], size=new, mode="trilinear", align_corners=True
        )[0, 0]
        padded = torch.zeros(SIZE, SIZE, SIZE)
        low = [(SIZE - n) // 2 for n in new]
        padded[tuple(slice(a, a + n) for a, n in zip(low, new, strict=True))] = resized
        return padded


def main(options: Options) -> int:
    """Makes the volumes, times both, prints the table."""
    try:
        import SimpleITK  # noqa: F401
    except ImportError:
        print("bench/loader.py needs SimpleITK: pip install 'medblip[dev]'", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    print(f"{'loader':<34}{'volumes/s':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row['loader']:<34}{row['volumes_per_s']:>10.1f}{row['ratio']:>8.1f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(options: Options, folder: Path) -> list[dict]:
    """One row per loader: volumes a second and the ratio to the published one with as many workers."""
    run = [sys.executable, "-m"]
    subprocess.run([*run, "sharding.madeup", "--out", folder / "p", "--subjects", str(options.volumes)], check=True)
    readers = {}
    for codec in ("zstd", "raw"):
        command = ["sharding.build", "--manifest", folder / "p/manifest.csv", "--out", folder / codec]
        subprocess.run([*run, *command, "--recipe", "reference", "--size", str(SIZE), "--codec", codec], check=True)
        index = ShardIndex(folder / codec)
        for threads in (1, 2):
            readers[codec, threads] = (Reader(index, threads), index.samples("train"))
    images = sorted((folder / "p/images").iterdir())
    buffer = np.empty(options.volumes * SIZE**3, np.uint8)
    published = {
        workers: torch.utils.data.DataLoader(
            Published(images), batch_size=4, num_workers=workers, persistent_workers=True
        )
        for workers in (1, 2)
    }
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds + 1):  # the first round starts the workers and warms the page cache
        for workers in (1, 2):
            elapsed_s = seconds(lambda: list(published[workers]))  # noqa: B023
            rates.setdefault(("published", workers), []).append(options.volumes / elapsed_s)
            for codec in ("zstd", "raw"):
                reader, samples = readers[codec, workers]
                flat = buffer[: sum(sample.num_voxels for sample in samples)]
                elapsed_s = seconds(lambda: reader.volumes(samples, flat))  # noqa: B023
                rates.setdefault((codec, workers), []).append(options.volumes / elapsed_s)
    rows = []
    for (name, workers), found in rates.items():
        rate = statistics.median(found[1:])
        title = f"published, {workers} worker(s)" if name == "published" else f"shards, {name}, {workers} thread(s)"
        baseline = statistics.median(rates["published", workers][1:])
        rows.append({"loader": title, "volumes_per_s": rate, "ratio": rate / baseline})
    return rows


def seconds(action) -> float:
    """How long an action takes."""
    started_at = time.perf_counter()
    action()
    return time.perf_counter() - started_at


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
