"""Prepares the scans of one shard and packs them into a WebDataset tar.

A sample is two members, `KEY.json` (what is known of the scan, without ids, dates or paths) and `KEY.vol` (the voxels).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import webdataset as wds
import zstandard

from medblip.volume import Prepared, Recipe, prepare, voxel_file
from sharding.manifest import Scan
from sharding.shard import Shard, fingerprint, flush_to_disk, members_of, part_file, sha256_of, to_json, write_whole

Codec = Literal["zstd", "raw"]
ZSTD_LEVEL = 1  # higher levels cost up to ten times the time for 6 % fewer bytes: scanner noise does not compress


def pack_shard(out: Path, shard: Shard, recipe: Recipe, codec: Codec, starting: Callable[[Scan], None]) -> None:
    """Writes `out/NAME.tar` and `out/.parts/NAME.json`; a scan that cannot be prepared is set aside.

    The part file has `shard` (its entry in index.json; None if every scan was set aside, then there is no tar),
    `images` (scan_id to the sha256 of its voxel file) and `rejected` (rows of rejected.csv). `starting` is called
    before each scan.
    """
    tar = out / f"{shard.name}.tar"
    temporary = out / f".{shard.name}.tar.tmp"
    packed: dict[str, dict] = {}
    images: dict[str, str] = {}
    rejected: list[dict] = []
    with open(temporary, "wb") as file:
        writer = wds.TarWriter(file, user="root", group="root", mtime=0, encoder=False)
        for scan in shard.scans:
            starting(scan)
            stage = "read"
            try:
                sha256 = sha256_of(voxel_file(scan.image))
                stage = "prepare"
                prepared = prepare(scan.image, recipe)
            except (OSError, ValueError) as error:
                reason = str(error).removeprefix(f"{scan.image}: ")
                rejected.append({"scan": scan.scan_id, "stage": stage, "reason": reason, "file": str(scan.image)})
                continue
            writer.write(
                {
                    "__key__": scan.key,
                    "json": to_json(_record(scan, prepared, recipe, codec)),
                    "vol": encode(prepared.volume_XYZ.tobytes(), codec),
                }
            )
            images[scan.scan_id] = sha256
            packed[scan.key] = {
                "key": scan.key,
                "shape": list(prepared.volume_XYZ.shape),
                "pad_before": list(prepared.pad_before),
                "cohort": scan.cohort,
                "subject": scan.subject_key,
                "diagnosis": scan.diagnosis,
                "fingerprint": fingerprint(prepared.volume_XYZ.tobytes()),
            }
        writer.close()
        flush_to_disk(file)

    entry = None
    if packed:
        for key, member, place in members_of(temporary):
            packed[key][{"vol": "volume", "json": "record"}[member]] = place
        entry = {
            "name": tar.name,
            "split": shard.split,
            "sha256": sha256_of(temporary),
            "bytes": temporary.stat().st_size,
            "samples": list(packed.values()),
        }
        os.replace(temporary, tar)
    else:
        temporary.unlink()
        tar.unlink(missing_ok=True)
    write_whole(part_file(out, shard.name), to_json({"shard": entry, "images": images, "rejected": rejected}))


def encode(voxels: bytes, codec: Codec) -> bytes:
    """The content of `KEY.vol`."""
    if codec == "raw":
        return voxels
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(voxels)


def _record(scan: Scan, prepared: Prepared, recipe: Recipe, codec: Codec) -> dict:
    return {
        "key": scan.key,
        "cohort": scan.cohort,
        "diagnosis": scan.diagnosis,
        "fields": scan.fields,
        "report": scan.report,
        "shape": list(prepared.volume_XYZ.shape),
        "pad_before": list(prepared.pad_before),
        "spacing_mm": list(prepared.spacing_mm),
        "affine": prepared.affine.tolist(),
        "intensity": [prepared.intensity_low, prepared.intensity_high],
        "recipe_id": recipe.id,
        "codec": codec,
    }
