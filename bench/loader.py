"""Reading training volumes: our shards against other loaders, interleaved in one run, on whole heads at 1 x 1 x 1.2 mm.

- published: each sample is read from .nii.gz with SimpleITK, scaled to its minimum and maximum, resized and padded.
- webdataset: the same shards through plain `webdataset` and the ten lines of docs/data.md, padded on the CPU.
- streaming: the same volumes in MosaicML Streaming's format, raw or each packed with zstd-1, padded on the CPU.
- shards: `Reader` fills one flat uint8 buffer per batch, ready for the device, which pads and scales.
  "first epoch" has a new reader and new memory: files are opened and raw voxels hashed.

All but ours run in a torch DataLoader with as many workers as ours has threads. Batches of 4, page cache warm, and the
recipe `reference`, so that all give the same grid. The scans are made-up patients (sharding.madeup) rendered as
256 x 256 x 166 int16 with noise in the air, since gunzip and zstd take their time for noise.

    python bench/loader.py [--volumes 12] [--rounds 5] [--json loader.json]

mosaicml-streaming does not go with our numpy and transformers. For its rows make an environment beside ours (and give
it a torchvision that fits this torch, or an empty one: only its image data sets use it):

    python -m venv /tmp/streaming
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/streaming/lib/python3.11/site-packages/ours.pth
    /tmp/streaming/bin/pip install --no-deps mosaicml-streaming Brotli catalogue python-snappy zstd xxhash
    /tmp/streaming/bin/python bench/loader.py
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
import zstandard
from published import SIZE, load_published
from torch.utils.data import DataLoader

from medblip.shards import Reader, ShardIndex

BATCH = 4
SPACING_MM = np.array([1.2, 1.0, 1.0])
NUM_VOXELS = np.array([166, 256, 256])
CODECS = ("zstd", "raw")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """Volumes a second of each loader with one and two threads or workers, time to the first batch, and bytes."""

    volumes: int = 12
    """Made-up volumes, of different contents."""
    rounds: int = 5
    """Rounds; in each, everything is timed once, and the median counts."""
    json: Path | None = None
    """File for the table."""


def main(options: Options) -> int:
    """Makes the volumes, times everything, prints the tables."""
    try:
        import SimpleITK  # noqa: F401
    except ImportError:
        print("bench/loader.py needs SimpleITK: pip install 'medblip[dev]'", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans_bytes = make_scans(folder / "scans", options.volumes)
        for codec in CODECS:
            pack(folder, codec, "reference", codec, -(-options.volumes // 2))  # a shard for each of two workers
        pack(folder, "standard", "standard", "zstd", options.volumes)
        rows = measure(options, folder)
        first_s = first_batch(folder, options.rounds)
        stored = {name: ShardIndex(folder / name) for name in (*CODECS, "standard")}
    print(f"{'loader':<34}{'1: vol/s':>10}{'ratio':>7}{'2: vol/s':>10}{'ratio':>7}")
    for row in rows:
        cells = [f"{row[f'volumes_per_s_{n}']:>10.1f}{row[f'ratio_{n}']:>7.1f}" for n in (1, 2)]
        print(f"{row['loader']:<34}{''.join(cells)}")
    print(f"first batch of 30,000 samples in 150 shards: {first_s:.2f} s after the imports")
    sizes = {"as .nii.gz": scans_bytes} | {
        f"shards, {name}": statistics.mean(sample.volume[1] for sample in index.samples("train"))
        for name, index in stored.items()
    }
    for name, size in sizes.items():
        print(f"{name}: {size / 1e6:.2f} MB a volume, 224^3 float32 is {SIZE**3 * 4 / size:.1f} times that")
    if options.json:
        table = {"loaders": rows, "first_batch_s": first_s, "bytes_a_volume": sizes, "cores": os.cpu_count()}
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def make_scans(folder: Path, count: int) -> float:
    """Writes `count` made-up heads and their manifest; returns the mean size of a file in bytes."""
    import nibabel as nib

    from sharding import madeup

    (folder / "images").mkdir(parents=True)
    madeup.FIELD_OF_VIEW_MM = NUM_VOXELS * SPACING_MM
    template = madeup.load_template()
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = -(NUM_VOXELS - 1) / 2 * SPACING_MM
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "subject_id", "split"])
        for number in range(count):
            patient = madeup.draw_patient(0, "BENCH", number)
            scan = dataclasses.replace(madeup.draw_scan(0, "BENCH", number, 0, "A"), spacing_mm=SPACING_MM)
            image = madeup.render(template, patient, scan, patient.age_years, 1.0)
            voxels = (image * scan.intensity_range).round().astype(np.int16)
            madeup.write_oriented(folder / f"images/{number:03d}.nii.gz", nib.Nifti1Image(voxels, affine), "PIR")
            writer.writerow([f"images/{number:03d}.nii.gz", f"p{number}", "train"])
    return statistics.mean(path.stat().st_size for path in (folder / "images").iterdir())


def pack(folder: Path, out: str, recipe: str, codec: str, shard_samples: int) -> None:
    """Packs the scans with the command that a user would type."""
    command = f"-m sharding.build --manifest {folder}/scans/manifest.csv --out {folder}/{out} --size {SIZE}"
    command += f" --recipe {recipe} --codec {codec} --shard-samples {shard_samples}"
    subprocess.run([sys.executable, *command.split()], check=True, cwd=ROOT, capture_output=True)


def measure(options: Options, folder: Path) -> list[dict]:
    """One row per loader: volumes a second, and the ratio to the published one with as many workers."""
    contenders: dict[str, Callable[[int], Callable[[], None]]] = {
        "published": lambda workers: consume(Published(sorted((folder / "scans/images").iterdir())), workers)
    }
    for codec in CODECS:
        contenders |= {
            f"shards, {codec}": lambda threads, c=codec: ours(ShardIndex(folder / c), threads, first_epoch=False),
            f"shards, {codec}, first epoch": lambda threads, c=codec: ours(ShardIndex(folder / c), threads, True),
            f"webdataset, {codec}": lambda workers, c=codec: consume(PlainWebDataset(folder / c), workers),
        }
    try:
        for codec in CODECS:
            data = streaming_dataset(folder, codec)
            contenders[f"streaming, {codec}"] = lambda workers, d=data: consume(d, workers)
    except ImportError as error:
        print(f"streaming: not installed ({error}); see the top of this file", file=sys.stderr)
    run = {(name, n): make(n) for name, make in contenders.items() for n in (1, 2)}
    rates: dict[tuple[str, int], list[float]] = {each: [] for each in run}
    for _ in range(options.rounds + 1):  # the first round starts the workers and warms the page cache
        for each, action in run.items():
            rates[each].append(options.volumes / seconds(action))
    rate = {each: statistics.median(found[1:]) for each, found in rates.items()}
    return [
        {"loader": name}
        | {f"volumes_per_s_{n}": rate[name, n] for n in (1, 2)}
        | {f"ratio_{n}": rate[name, n] / rate["published", n] for n in (1, 2)}
        for name in contenders
    ]


def consume(dataset, workers: int) -> Callable[[], None]:
    """Takes every batch of a DataLoader."""
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=True)

    def action() -> None:
        for _ in loader:
            pass

    return action


def ours(index: ShardIndex, threads: int, first_epoch: bool) -> Callable[[], None]:
    """Fills one buffer with batch after batch."""
    samples = index.samples("train")
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    sizes = [sum(sample.num_voxels for sample in batch) for batch in batches]

    def read(reader: Reader, buffer: np.ndarray) -> None:
        for batch, size in zip(batches, sizes, strict=True):
            reader.volumes(batch, buffer[:size])

    def anew() -> None:
        reader = Reader(index, threads)
        read(reader, np.empty(max(sizes), np.uint8))
        reader.close()

    reader, buffer = Reader(index, threads), np.empty(max(sizes), np.uint8)
    return anew if first_epoch else lambda: read(reader, buffer)


class Published(torch.utils.data.Dataset):
    """The published per-sample load as a data set."""

    def __init__(self, images: list[Path]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> torch.Tensor:
        torch.set_num_threads(1)
        return load_published(self.images[row])


class PlainWebDataset(torch.utils.data.IterableDataset):
    """The shards as docs/data.md says that they can be read without this project."""

    def __init__(self, folder: Path):
        self.urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        (self.code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)

    def __iter__(self):
        names: dict = {}
        exec(self.code, names)
        for _, grid in names["volumes"](self.urls, SIZE):
            yield torch.from_numpy(grid)


def streaming_dataset(folder: Path, codec: str):
    """The volumes of the shards, written and read by MosaicML Streaming.

    Raises:
        ImportError: if it is not installed.
    """
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Volumes(StreamingDataset):
        def __getitem__(self, row: int) -> torch.Tensor:
            sample = super().__getitem__(row)
            voxels = sample["vol"] if codec == "raw" else zstandard.decompress(sample["vol"])
            grid = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.uint8)
            place = tuple(slice(p, p + n) for p, n in zip(sample["pad_before"], sample["shape"], strict=True))
            grid[place] = torch.from_numpy(np.frombuffer(voxels, np.uint8).copy()).view(sample["shape"])
            return grid

    index = ShardIndex(folder / "raw")
    reader, out = Reader(index, 1), folder / f"streaming-{codec}"
    with MDSWriter(out=str(out), columns={"vol": "bytes", "shape": "json", "pad_before": "json"}) as writer:
        for sample in index.samples("train"):
            voxels = np.empty(sample.num_voxels, np.uint8)
            reader.volumes([sample], voxels)
            content = voxels.tobytes() if codec == "raw" else zstandard.ZstdCompressor(level=1).compress(voxels)
            writer.write({"vol": content, "shape": list(sample.shape), "pad_before": list(sample.pad_before)})
    reader.close()
    clean_stale_shared_memory()
    return Volumes(local=str(out), shuffle=False, batch_size=BATCH)


FIRST_BATCH = f"""
import sys, time
import numpy as np
from medblip.data import SampleStream
from medblip.shards import Reader, ShardIndex
started_at = time.perf_counter()
index = ShardIndex(sys.argv[1])
samples = index.samples("train")
stream = SampleStream([sample.shard for sample in samples], 0)
reader = Reader(index, 2)
reader.expect(stream.shards_from(0))
batch = [samples[stream.at(position)[1]] for position in range({BATCH})]
reader.volumes(batch, np.empty(sum(sample.num_voxels for sample in batch), np.uint8))
print(time.perf_counter() - started_at)
reader.close()
"""


def first_batch(folder: Path, rounds: int) -> float:
    """Seconds from an index of 30,000 samples to the first batch in memory, in a new process each time."""
    many = folder / "many"
    many.mkdir()
    index = json.loads((folder / "zstd/index.json").read_bytes())
    shard = index["shards"][0]
    tar, size = many / "train-00000.tar", 10**9
    tar.write_bytes((folder / "zstd" / shard["name"]).read_bytes())
    os.truncate(tar, size)  # as large as a real one, but sparse
    for number in range(1, 150):
        os.link(tar, many / f"train-{number:05d}.tar")
    packed = shard["samples"]
    index["shards"] = [
        {**shard, "name": f"train-{number:05d}.tar", "bytes": size}
        | {"samples": [{**packed[i % len(packed)], "key": f"{number:08x}{i:08x}"} for i in range(200)]}
        for number in range(150)
    ]
    (many / "index.json").write_text(json.dumps(index, sort_keys=True, separators=(",", ":")))
    command = [sys.executable, "-c", FIRST_BATCH, str(many)]
    return statistics.median(float(subprocess.check_output(command, cwd=ROOT)) for _ in range(rounds))


def seconds(action: Callable[[], None]) -> float:
    """How long an action takes."""
    started_at = time.perf_counter()
    action()
    return time.perf_counter() - started_at


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
