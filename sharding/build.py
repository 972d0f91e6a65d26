"""Packs the scans of a manifest into shards: prepared once, read many times.

1. read the manifest and cut each split, in hashed order, into shards of a fixed number of rows;
2. pack the shards that are not there yet, each by one worker process;
3. write split.csv, rejected.csv and, last, index.json from what the shards say.

The same manifest and recipe give the same bytes, whatever the workers and interruptions. Running it again goes on where
it stopped and keeps what is complete; scans that were set aside stay so until OUT is a new folder.

Examples:
    python -m sharding.build --manifest manifest.csv --out shards/
    python -m sharding.build --manifest manifest.csv --out small/ --size 96 --spacing-mm 2
    python -m sharding.build --manifest manifest.csv --out as-published/ --recipe reference
"""

import csv
import fcntl
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from sharding.manifest import Scan, read_manifest
from sharding.shard import Shard, cut_into_shards, is_complete, part_file, sha256_of, to_json, write_whole
from sharding.workers import WorkerDied, pack_all

log = logging.getLogger(__name__)

LIBRARIES = ("numpy", "torch", "nibabel", "zstandard", "webdataset")  # those that have a say in the bytes
MIN_ROWS_TO_JUDGE = 20  # below, one bad scan of a handful is no reason to fail


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to pack a manifest."""

    manifest: Path
    """CSV with one row per scan; only the column `image` is needed."""
    out: Path
    """Folder of the shards; made if missing. One job at a time."""
    recipe: Literal["standard", "reference"] = "standard"
    """standard: a physical grid around the head. reference: as published, longest side by voxel count."""
    size: int = 224
    """Voxels along each edge of the grid."""
    spacing_mm: float | None = None
    """Edge of a grid voxel, 1 mm unless given; the reference recipe has none."""
    shard_samples: int = 200
    """Rows per shard; 200 are about 1 GB at 224^3."""
    codec: Literal["zstd", "raw"] = "zstd"
    """raw takes 1.6 to 9 times the space and is faster to read from a fast disk."""
    workers: int | None = None
    """Processes; each packs one shard at a time. As many as this job has cores unless given."""
    test_cohorts: str = "AIBL,MIRIAD"
    """Cohorts that are only ever tested on, separated by commas."""
    max_rejected: float = 0.05
    """Share of the rows that may be set aside; with more, the rest is packed and the exit status is 1."""


def build(options: Options) -> int:
    """Packs everything and returns the exit status: 0, or 1 if too many scans, or all, were set aside.

    Raises:
        ValueError: the manifest or an option is wrong, or `out` belongs to another build.
        WorkerDied: the shards that are complete are kept, and the next run goes on.
    """
    from medblip.volume import Recipe  # imports torch, which --help need not wait for

    if options.shard_samples < 1 or (options.workers or 1) < 1:
        raise ValueError("--shard-samples and --workers must be at least 1")
    spacing_mm = options.spacing_mm
    if spacing_mm is None and options.recipe == "standard":
        spacing_mm = 1.0
    recipe = Recipe(name=options.recipe, size=options.size, spacing_mm=spacing_mm)
    if spacing_mm and spacing_mm * options.size < 180:
        log.warning(
            "the grid covers %g mm; a brain needs about 180 mm, what is beyond is cut", spacing_mm * options.size
        )

    test_cohorts = tuple(name.strip() for name in options.test_cohorts.split(",") if name.strip())
    scans = read_manifest(options.manifest, test_cohorts=test_cohorts)
    plan = {
        "manifest": sha256_of(options.manifest),
        "test_cohorts": list(test_cohorts),
        "shard_samples": options.shard_samples,
        "codec": options.codec,
        "recipe": recipe.to_dict(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    with _locked(options.out):
        _check_same_build(options.out, plan)
        shards = cut_into_shards(scans, options.shard_samples)
        pending = [shard for shard in shards if not is_complete(options.out, shard)]
        workers = min(options.workers or len(os.sched_getaffinity(0)), len(pending))
        pack_all(options.out, pending, recipe, options.codec, workers)
        packed, rejected = _write_tables(options.out, scans, shards, plan, recipe.id)
    return _judge(options, len(scans), packed, rejected)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds `out` for this job; the lock goes with the process, however it ends."""
    (out / ".parts").mkdir(parents=True, exist_ok=True)
    with open(out / ".parts" / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another build is writing here; wait for it or take another --out") from None
        for leftover in (*out.glob(".*.tmp"), *(out / ".parts").glob(".*.tmp")):
            leftover.unlink()
        yield


def _check_same_build(out: Path, plan: dict) -> None:
    path = out / ".parts" / "build.json"
    if not path.exists():
        strangers = sorted(tar.name for tar in out.glob("*.tar"))
        if strangers:
            raise ValueError(f"{out}: holds {strangers[0]}, which no build here made; take another --out")
        write_whole(path, to_json(plan))
        return
    begun, now = _flat(json.loads(path.read_bytes())), _flat(plan)
    changes = [
        f"{name} was {begun.get(name)}, now {now.get(name)}" for name in now | begun if begun.get(name) != now.get(name)
    ]
    if changes:
        raise ValueError(f"{out}: holds another build ({'; '.join(changes)}); take another --out")


def _flat(plan: dict) -> dict:
    nested = {
        f"{outer} {name}": v for outer, value in plan.items() if isinstance(value, dict) for name, v in value.items()
    }
    return {name: value for name, value in plan.items() if not isinstance(value, dict)} | nested


def _write_tables(out: Path, scans: list[Scan], shards: list[Shard], plan: dict, recipe_id: str) -> tuple[int, int]:
    """Writes split.csv and rejected.csv, in the manifest's order, and index.json; returns how many rows each has."""
    parts = [json.loads(part_file(out, shard.name).read_bytes()) for shard in shards]
    images = {scan_id: sha256 for part in parts for scan_id, sha256 in part["images"].items()}
    rejected = {row["scan"]: row for part in parts for row in part["rejected"]}
    assert len(images) + len(rejected) == len(scans)

    packed_rows = [
        [scan.scan_id, scan.subject_id, scan.cohort, scan.split, images[scan.scan_id]]
        for scan in scans
        if scan.scan_id in images
    ]
    columns = ["scan", "stage", "reason", "file"]
    rejected_rows = [[rejected[scan.scan_id][name] for name in columns] for scan in scans if scan.scan_id in rejected]
    write_whole(out / "split.csv", _csv(["scan_id", "subject_id", "cohort", "split", "sha256"], packed_rows))
    write_whole(out / "rejected.csv", _csv(columns, rejected_rows))
    index = {
        "format": 1,
        "recipe": plan["recipe"],
        "recipe_id": recipe_id,
        "versions": plan["versions"],
        "codec": plan["codec"],
        "shards": [part["shard"] for part in parts if part["shard"]],
    }
    write_whole(out / "index.json", to_json(index))
    return len(packed_rows), len(rejected_rows)


def _csv(header: list[str], rows: list[list]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def _judge(options: Options, total: int, packed: int, rejected: int) -> int:
    aside = f" -> {options.out / 'rejected.csv'}" if rejected else ""
    log.info(
        "packed %d, set aside %d%s (%d + %d = %d in the manifest)", packed, rejected, aside, packed, rejected, total
    )
    if packed == 0:
        log.error("error: nothing could be packed; %s says why", options.out / "rejected.csv")
        return 1
    if total >= MIN_ROWS_TO_JUDGE and rejected > options.max_rejected * total:
        log.error("error: %.1f %% set aside, more than --max-rejected %g", 100 * rejected / total, options.max_rejected)
        return 1
    return 0


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status = build(options)
    except (ValueError, WorkerDied, OSError) as error:
        sys.exit(f"error: {error}")
    print(options.out)
    sys.exit(status)


if __name__ == "__main__":
    main()
