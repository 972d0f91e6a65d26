"""Packing scans on one core: ours against the published load and a plain NumPy builder, interleaved in one run.

Each builder has a process of its own with one thread, so that none profits from memory that another has warmed.

Ours: read .nii.gz, prepare, zstd, tar, with the checksums that a build writes; both recipes. Published: what the
published code does for each sample in each epoch (SimpleITK, minimum and maximum, interpolate, pad), and stores
nothing. Plain: nibabel's float64, np.percentile, the same interpolation, np.savez_compressed of the padded uint8 grid.

    python bench/build.py [--volumes 6] [--rounds 5] [--json build.json]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before any library asks how many cores there are

import nibabel as nib
import numpy as np
import torch
import tyro
import webdataset as wds
from published import SIZE, load_published, pad, resize
from realistic import write_realistic_scans

from medblip.image import read_image
from medblip.volume import Recipe, prepare
from sharding.pack import encode
from sharding.shard import fingerprint, sha256_of, to_json
from sharding.workers import keep_memory

RECIPES = {
    "standard": Recipe(name="standard", size=SIZE, spacing_mm=1.0),
    "reference": Recipe(name="reference", size=SIZE),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Scans a second and core, ours and the others', and where our time goes."""

    volumes: int = 6
    """Made-up scans of a clinical size, of different contents."""
    rounds: int = 5
    """Rounds; in each, everything is timed once, and the median counts."""
    json: Path | None = None
    """File for the tables."""


def main(options: Options) -> int:
    """Makes the scans, times all builders, prints two tables."""
    try:
        import SimpleITK  # noqa: F401
    except ImportError:
        print("bench/build.py needs SimpleITK: pip install 'medblip[dev]'", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        images = write_realistic_scans(Path(folder) / "scans", options.volumes)
        size_mb = sum(path.stat().st_size for path in images) / len(images) / 1e6
        print(f"{len(images)} scans of {size_mb:.1f} MB .nii.gz, {options.rounds} rounds, one thread", file=sys.stderr)
        builders = measure(options, images, Path(folder))
        steps = measure_steps(options, images, Path(folder))
    print(f"{'builder':<34}{'scans/s/core':>13}{'to published':>14}{'to plain':>10}{'MB/scan':>9}")
    for row in builders:
        print(
            f"{row['builder']:<34}{row['scans_per_s']:>13.2f}{row['to_published']:>14.2f}{row['to_plain']:>10.1f}"
            f"{row['mb_per_scan']:>9.1f}"
        )
    print(f"\n{'ours, by step':<34}{'ms':>13}{'share':>14}")
    for row in steps:
        print(f"{row['recipe'] + ': ' + row['step']:<34}{row['ms']:>13.0f}{row['share']:>14.0%}")
    if options.json:
        options.json.write_text(json.dumps({"builders": builders, "steps": steps}, indent=1) + "\n")
    return 0


def measure(options: Options, images: list[Path], folder: Path) -> list[dict]:
    """One row per builder: scans a second, ratios to the other two, bytes stored."""
    builders: dict[str, Callable[[list[Path], Path], int]] = {
        "published load, nothing stored": load_all_published,
        "plain: nibabel, NumPy, npz": build_plain,
        **{f"ours, {name}, zstd and tar": partial(pack, recipe) for name, recipe in RECIPES.items()},
    }
    processes = {
        name: ProcessPoolExecutor(
            1, get_context("spawn"), initializer=start_ours if name.startswith("ours") else use_one_thread
        )
        for name in builders
    }
    elapsed_s: dict[str, list[float]] = {name: [] for name in builders}
    stored_bytes = {}
    for _ in range(options.rounds + 1):  # the first round starts the processes and warms the page cache
        for name, builder in builders.items():
            done_s, stored_bytes[name] = processes[name].submit(timed, builder, images, folder).result()
            elapsed_s[name].append(done_s)
    for process in processes.values():
        process.shutdown()
    rates = {name: len(images) / statistics.median(found[1:]) for name, found in elapsed_s.items()}
    published, plain = list(rates.values())[:2]
    return [
        {
            "builder": name,
            "scans_per_s": rate,
            "to_published": rate / published,
            "to_plain": rate / plain,
            "mb_per_scan": stored_bytes[name] / len(images) / 1e6,
        }
        for name, rate in rates.items()
    ]


def use_one_thread() -> None:
    """What every process starts with."""
    import SimpleITK

    torch.set_num_threads(1)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def start_ours() -> None:
    """What our builders' processes start with, as a worker of sharding.build does."""
    use_one_thread()
    keep_memory()


def timed(builder: Callable[[list[Path], Path], int], images: list[Path], folder: Path) -> tuple[float, int]:
    """Seconds for all images, and the bytes stored."""
    started_at = time.perf_counter()
    stored_bytes = builder(images, folder)
    return time.perf_counter() - started_at, stored_bytes


def measure_steps(options: Options, images: list[Path], folder: Path) -> list[dict]:
    """Median milliseconds a scan of each of our steps, by recipe."""
    start_ours()
    rows = []
    for name, recipe in RECIPES.items():
        found: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for image in images:
                for step, seconds in steps_of(image, recipe, folder).items():
                    found.setdefault(step, []).append(seconds)
        medians = {step: 1000 * statistics.median(seconds) for step, seconds in found.items()}
        total = sum(medians.values())
        rows += [{"recipe": name, "step": step, "ms": ms, "share": ms / total} for step, ms in medians.items()]
    return rows


def steps_of(image: Path, recipe: Recipe, folder: Path) -> dict[str, float]:
    """Seconds of each step of `pack` for one scan. Reading is timed by itself and taken from preparing."""
    times = [time.perf_counter()]

    def lap() -> float:
        times.append(time.perf_counter())
        return times[-1] - times[-2]

    sha256_of(image)
    checksum_s = lap()
    read_image(image)
    read_s = lap()
    prepared = prepare(image, recipe)
    prepare_s = lap() - read_s
    voxels = prepared.volume_XYZ.tobytes()
    packed = encode(voxels, "zstd")
    encode_s = lap()
    fingerprint(voxels)
    fingerprint_s = lap()
    with open(folder / "step.tar", "wb") as file, wds.TarWriter(file, encoder=False) as writer:
        writer.write({"__key__": "step", "json": b"{}", "vol": packed})
    return {
        "read, gunzip, turn to RAS+": read_s,
        "grid and intensities": prepare_s,
        "zstd": encode_s,
        "sha256 of file and voxels": checksum_s + fingerprint_s,
        "write": lap(),
    }


def pack(recipe: Recipe, images: list[Path], folder: Path) -> int:
    """What sharding.pack does with each scan, into one tar; returns its bytes."""
    path = folder / f"{recipe.name}.tar"
    with open(path, "wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
        for number, image in enumerate(images):
            prepared = prepare(image, recipe)
            voxels = prepared.volume_XYZ.tobytes()
            record = {
                "sha256": sha256_of(image),
                "fingerprint": fingerprint(voxels),
                "shape": list(prepared.volume_XYZ.shape),
                "affine": prepared.affine.tolist(),
            }
            writer.write({"__key__": str(number), "json": to_json(record), "vol": encode(voxels, "zstd")})
    return path.stat().st_size


def load_all_published(images: list[Path], folder: Path) -> int:
    """The published load of every scan; stores nothing."""
    for image in images:
        load_published(image)
    return 0


def build_plain(images: list[Path], folder: Path) -> int:
    """A straightforward builder: float64, percentiles of all voxels, a padded uint8 grid in an .npz; their bytes."""
    stored_bytes = 0
    for image in images:
        volume = nib.as_closest_canonical(nib.load(image)).get_fdata()
        low, high = np.percentile(volume, [0.5, 99.5])
        volume = np.clip((volume - low) / (high - low), 0, 1)
        grid = (pad(resize(volume.astype(np.float32))).numpy() * 255).round().astype(np.uint8)
        np.savez_compressed(folder / "plain.npz", volume=grid)
        stored_bytes += (folder / "plain.npz").stat().st_size
    return stored_bytes


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
