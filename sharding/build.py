"""Packs the scans of a manifest into shards: prepared once, read many times.

1. read the manifest and cut each split, in hashed order, into shards of a fixed number of rows;
2. pack the shards of this part that are not there yet, each by one worker process;
3. once the shards of all parts are there: write split.csv, rejected.csv and, last, index.json from what they say.

The same manifest and recipe give the same bytes, whatever the workers, parts and interruptions. Running it again goes
on where it stopped and keeps what is complete. Scans that were set aside stay so until --retry-rejected.

Examples:
    python -m sharding.build --manifest manifest.csv --out shards/
    python -m sharding.build --manifest manifest.csv --out shards/ --part 2/4
    python -m sharding.build --manifest manifest.csv --out small/ --size 96 --spacing-mm 2
    python -m sharding.build --manifest manifest.csv --out as-published/ --recipe reference
    python -m sharding.build --manifest manifest.csv --out theirs/ --split-file their-split.csv
"""

import dataclasses
import json
import logging
import os
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from sharding import split
from sharding.locks import Busy, Locks
from sharding.manifest import Scan, names_in, read_manifest
from sharding.shard import (
    Packing,
    Shard,
    cut_into_shards,
    part_file,
    read_part,
    remove_leftovers,
    sha256_of,
    to_csv,
    to_json,
    write_whole,
)
from sharding.workers import Progress, WorkerDied, pack_all

log = logging.getLogger(__name__)

LIBRARIES = ("numpy", "torch", "nibabel", "pydicom", "zstandard", "webdataset")  # those that have a say in the bytes
MIN_ROWS_TO_JUDGE = 20  # below, one bad scan of a handful is no reason to fail
TABLES = {"build", "index", "split", "rejected"}  # what is not a shard, by name without extension


class Incomplete(ValueError):
    """Shards are missing; the message names them and the command that packs them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to pack a manifest."""

    manifest: Path
    """CSV with one row per scan; only the column `image` is needed."""
    out: Path
    """Folder of the shards; made if missing. Several parts may write to it at once, on several nodes."""
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
    split_file: Path | None = None
    """A split.csv from elsewhere: only its scans are packed, in its splits, if their images have its sha256."""
    mask_column: str | None = None
    """Column of the manifest that names a brain mask for each scan, relative to the manifest."""
    part: str | None = None
    """I/N: pack the I-th of N shares of the shards; the part that ends last finishes the folder."""
    finish: bool = False
    """Pack nothing: check that every shard is there, and write the tables and index.json."""
    retry_rejected: bool = False
    """Pack the shards anew that have scans set aside, for when their files have been mended."""


def build(options: Options) -> int:
    """Packs everything, or a part, and returns the exit status: 0, or 1 if too many scans, or all, were set aside.

    Raises:
        ValueError: the manifest or an option is wrong, `out` belongs to another build, or shards are missing.
        WorkerDied: the shards that are complete are kept, and the next run goes on.
        OSError: `out` cannot be written.
    """
    part, num_parts = _part(options)
    test_cohorts = names_in(options.test_cohorts)
    scans = read_manifest(options.manifest, test_cohorts=test_cohorts)
    _check_keys(options.manifest, scans)
    missing = None
    if options.split_file:
        scans, missing = split.apply_split(scans, options.split_file)
    packing = _packing(options, scans)
    plan = {
        "manifest": sha256_of(options.manifest),
        "test_cohorts": list(test_cohorts),
        "split_file": sha256_of(options.split_file) if options.split_file else None,
        "shard_samples": options.shard_samples,
        "codec": options.codec,
        "mask_column": options.mask_column,
        "recipe": packing.recipe.to_dict(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    shards = cut_into_shards(scans, options.shard_samples)
    names = [shard.name for shard in shards]
    begin, end = (part - 1) * len(shards) // num_parts, part * len(shards) // num_parts
    with Locks(options.out) as locks:
        with locks.tables():
            _check_same_build(options.out, plan, names)
        if not options.finish:
            locks.to_write(begin, names[begin:end])
            _pack(options, packing, shards[begin:end], locks)
            locks.to_read(begin, names[begin:end])
        try:
            locks.to_read(0, names)  # from here on no shard changes
            _check_all_there(options, shards)
        except (Busy, Incomplete) as error:
            if num_parts == 1:
                raise
            log.info("%s; the part that ends last finishes the folder", str(error).partition(";")[0])
            _tell_part(options, shards[begin:end])
            return 0
        if num_parts > 1:
            _tell_part(options, shards[begin:end])
        with locks.tables():
            if missing:
                write_whole(options.out / "split.missing.csv", missing)
            packed, rejected = _write_tables(options.out, scans, shards, plan, packing.recipe.id)
    return _judge(options, packed, rejected)


def _part(options: Options) -> tuple[int, int]:
    if options.shard_samples < 1 or (options.workers or 1) < 1:
        raise ValueError("--shard-samples and --workers must be at least 1")
    if options.finish and (options.part or options.retry_rejected):
        raise ValueError("--finish packs nothing: give it without --part and --retry-rejected")
    match = re.fullmatch(r"(\d+)/(\d+)", options.part or "1/1")
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {options.part!r} is not I/N with I from 1 to N, such as 2/4")
    return int(match[1]), int(match[2])


def _check_keys(manifest: Path, scans: list[Scan]) -> None:
    first: dict[str, Scan] = {}
    for scan in scans:
        other = first.setdefault(scan.key, scan)
        if other is not scan:
            raise ValueError(f"{manifest}: rows {other.row} and {scan.row} would get the same KEY; rename one scan_id")


def _packing(options: Options, scans: list[Scan]) -> Packing:
    from medblip.volume import Recipe  # imports torch, which --help need not wait for

    spacing_mm = options.spacing_mm
    if spacing_mm is None and options.recipe == "standard":
        spacing_mm = 1.0
    if spacing_mm and spacing_mm * options.size < 180:
        log.warning(
            "the grid covers %g mm; a brain needs about 180 mm, what is beyond is cut", spacing_mm * options.size
        )
    if options.mask_column and options.mask_column not in scans[0].extra:
        raise ValueError(
            f"{options.manifest}: --mask-column {options.mask_column!r} is none of its own columns {[*scans[0].extra]}"
        )
    has_masks = options.mask_column is not None
    recipe = Recipe(name=options.recipe, size=options.size, spacing_mm=spacing_mm, brain_mask=has_masks)
    return Packing(options.out, recipe, options.codec, options.mask_column, options.manifest.parent)


def _check_same_build(out: Path, plan: dict, names: list[str]) -> None:
    """Compares the plan with that of the build that began here; the first one writes it down."""
    remove_leftovers(out, TABLES)
    path = out / ".parts" / "build.json"
    if not path.exists():
        _refuse_strangers(out, set())
        write_whole(path, to_json(plan))
        return
    begun, now = _flat(json.loads(path.read_bytes())), _flat(plan)
    changes = [
        f"{name} was {begun.get(name)}, now {now.get(name)}" for name in now | begun if begun.get(name) != now.get(name)
    ]
    if changes:
        raise ValueError(f"{out}: holds another build ({'; '.join(changes)}); take another --out")
    _refuse_strangers(out, set(names))


def _flat(plan: dict) -> dict:
    nested = {
        f"{outer} {name}": v for outer, value in plan.items() if isinstance(value, dict) for name, v in value.items()
    }
    return {name: value for name, value in plan.items() if not isinstance(value, dict)} | nested


def _refuse_strangers(out: Path, names: set[str]) -> None:
    strangers = sorted(tar.name for tar in out.glob("*.tar") if tar.stem not in names)
    if strangers:
        raise ValueError(
            f"{out}: holds {', '.join(strangers[:3])}{', ...' if strangers[3:] else ''}, which this build did not "
            "make; move it away or take another --out"
        )


def _pack(options: Options, packing: Packing, shards: list[Shard], locks: Locks) -> None:
    """Packs those of the shards, all locked, that are not complete."""
    names = {shard.name for shard in shards}
    remove_leftovers(options.out, names)
    num_done = num_aside = 0
    pending = []
    for shard in shards:
        part = read_part(options.out, shard)
        if part is not None and options.retry_rejected and part["rejected"]:
            # The index is wrong from here on. Without its part file the shard stays due if this run is stopped.
            with locks.tables():
                (options.out / "index.json").unlink(missing_ok=True)
            part_file(options.out, shard.name).unlink()
            part = None
        if part is None:
            pending.append(shard)
        else:
            num_done += len(shard.scans)
            num_aside += len(part["rejected"])
    num_workers = min(options.workers or len(os.sched_getaffinity(0)), len(pending))
    try:
        with Progress(sum(len(shard.scans) for shard in shards), num_done, num_aside) as progress:
            pack_all(packing, pending, num_workers, progress)
    finally:
        remove_leftovers(options.out, names)


def _check_all_there(options: Options, shards: list[Shard]) -> None:
    missing = [shard.name for shard in shards if read_part(options.out, shard) is None]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise Incomplete(
            f"{options.out}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:5])}{more}; "
            f"this packs them: {_command(options)}"
        )


def _tell_part(options: Options, shards: list[Shard]) -> None:
    total = sum(len(shard.scans) for shard in shards)
    rejected = sum(len(read_part(options.out, shard)["rejected"]) for shard in shards)
    log.info("part %s: %s in this part)", options.part, _sum_up(options, total - rejected, rejected, total))


def _sum_up(options: Options, packed: int, rejected: int, total: int) -> str:
    aside = f" -> {options.out / 'rejected.csv'}" if rejected else ""
    return f"packed {packed}, set aside {rejected}{aside} ({packed} + {rejected} = {total}"


def _command(options: Options) -> str:
    """The command line that packs what is missing."""
    words = ["python", "-m", "sharding.build"]
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if value != option.default and option.name not in ("part", "finish", "retry_rejected"):
            words += [f"--{option.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _write_tables(out: Path, scans: list[Scan], shards: list[Shard], plan: dict, recipe_id: str) -> tuple[list, list]:
    """Writes split.csv and rejected.csv, in the manifest's order, and index.json; returns the rows of the tables."""
    parts = [read_part(out, shard) for shard in shards]
    images, rejected = _check_parts(out, shards, parts)
    packed_rows = [
        [scan.scan_id, scan.subject_id, scan.cohort, scan.split, images[scan.scan_id], scan.key]
        for scan in scans
        if scan.scan_id in images
    ]
    columns = ["scan", "stage", "reason", "file"]
    rejected_rows = [[rejected[scan.scan_id][name] for name in columns] for scan in scans if scan.scan_id in rejected]
    write_whole(out / "split.csv", to_csv(split.COLUMNS, packed_rows))
    write_whole(out / "rejected.csv", to_csv(columns, rejected_rows))
    index = {
        "format": 1,
        "recipe": plan["recipe"],
        "recipe_id": recipe_id,
        "versions": plan["versions"],
        "codec": plan["codec"],
        "shards": [part["shard"] for part in parts if part["shard"]],
    }
    write_whole(out / "index.json", to_json(index))
    return packed_rows, rejected_rows


def _check_parts(out: Path, shards: list[Shard], parts: list[dict]) -> tuple[dict[str, str], dict[str, dict]]:
    """The sha256 of every packed image and the rejected rows, by scan_id.

    Raises:
        ValueError: a shard holds other scans than it should, a KEY is in two, or there is a tar too many.
    """
    _refuse_strangers(out, {shard.name for shard, part in zip(shards, parts, strict=True) if part["shard"]})
    images: dict[str, str] = {}
    rejected: dict[str, dict] = {}
    keys = Counter(sample["key"] for part in parts if part["shard"] for sample in part["shard"]["samples"])
    for shard, part in zip(shards, parts, strict=True):
        aside = {row["scan"]: row for row in part["rejected"]}
        entry = part["shard"] or {"samples": []}
        due = {scan.key for scan in shard.scans if scan.scan_id not in aside}
        held = [sample["key"] for sample in entry["samples"]]
        if set(held) != due or any(keys[key] > 1 for key in held) or len(part["images"]) != len(due):
            raise ValueError(
                f"{out}: {shard.name} does not hold its own scans, each once; delete {part_file(out, shard.name)} "
                "and run the same command"
            )
        images |= part["images"]
        rejected |= aside
    return images, rejected


def _judge(options: Options, packed_rows: list, rejected_rows: list) -> int:
    packed, rejected = len(packed_rows), len(rejected_rows)
    total = packed + rejected
    unread = sum(stage == "read" for _, stage, _, _ in rejected_rows)
    if unread:
        log.warning("%d scans could not be opened; once they can, add --retry-rejected", unread)
    log.info("%s in the manifest)", _sum_up(options, packed, rejected, total))
    if packed == 0:
        log.error("error: nothing could be packed; %s says why", options.out / "rejected.csv")
        return 1
    if total >= MIN_ROWS_TO_JUDGE and rejected > options.max_rejected * total:
        log.error(
            "error: %.1f %% set aside, more than --max-rejected %g; once the files are mended, add --retry-rejected",
            100 * rejected / total,
            options.max_rejected,
        )
        return 1
    return 0


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status = build(options)
    except (ValueError, WorkerDied) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"error: {options.out}: cannot be written ({error}); make room or mend it. What is complete is kept, and "
            "the same command goes on"
        )
    except KeyboardInterrupt:
        sys.exit("stopped; what is complete is kept, and the same command goes on")
    print(options.out)
    sys.exit(status)


if __name__ == "__main__":
    main()
