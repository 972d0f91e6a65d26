"""Prepares the scans of one shard and packs them into a WebDataset tar.

A sample is two members, `KEY.json` (what is known of the scan, without ids, dates or paths) and `KEY.vol` (the voxels).
"""

import zlib
from collections.abc import Callable

import webdataset as wds
import zstandard

from medblip.volume import Prepared, image_sha256, prepare
from sharding.manifest import Scan
from sharding.shard import (
    Packing,
    Shard,
    fingerprint,
    flush_to_disk,
    members_of,
    part_file,
    rename,
    sha256_of,
    temporary_for,
    to_json,
    write_whole,
)

ZSTD_LEVEL = 1  # higher levels cost up to ten times the time for 6 % fewer bytes: scanner noise does not compress


def pack_shard(
    packing: Packing, shard: Shard, deadly: dict[str, str], starting: Callable[[str | None, int, int], None]
) -> int:
    """Writes `OUT/NAME.tar` and `OUT/.parts/NAME.json`; returns how many scans could not be prepared and are set aside.

    The part file has `shard` (its entry in index.json; None if every scan was set aside, then there is no tar),
    `images` (scan_id to the sha256 of its image) and `rejected` (rows of rejected.csv). `deadly` gives a reason for
    each scan_id that must not be tried. `starting` is called before each scan with its scan_id, and with None before
    the tar is closed; its numbers are the scans done and those set aside so far.

    Raises:
        OSError: the tar or the part file cannot be written.
        MemoryError: a scan did not fit; that says nothing about the scan.
    """
    tar = packing.out / f"{shard.name}.tar"
    temporary = temporary_for(tar)
    part_file(packing.out, shard.name).unlink(missing_ok=True)
    try:
        packed, images, rejected = _write_tar(temporary, packing, shard, deadly, starting)
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
            rename(temporary, tar)
        else:
            tar.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)
    write_whole(part_file(packing.out, shard.name), to_json({"shard": entry, "images": images, "rejected": rejected}))
    return len(rejected)


def _write_tar(temporary, packing, shard, deadly, starting) -> tuple[dict[str, dict], dict[str, str], list[dict]]:
    """Writes the samples; returns what the index says of each KEY, the images' sha256, and what was set aside."""
    packed: dict[str, dict] = {}
    images: dict[str, str] = {}
    rejected: list[dict] = []
    with open(temporary, "wb") as file:
        writer = wds.TarWriter(file, user="root", group="root", mtime=0, encoder=False)
        for number, scan in enumerate(shard.scans):
            starting(scan.scan_id, number, len(rejected))
            try:
                sha256, prepared = _read(scan, packing, deadly)
            except _SetAside as error:
                rejected.append(
                    {"scan": scan.scan_id, "stage": error.stage, "reason": error.reason, "file": str(scan.image)}
                )
                continue
            voxels = prepared.volume_XYZ.tobytes()
            record = to_json(_record(scan, prepared, packing))
            writer.write(
                {
                    "__key__": scan.key,
                    "json": record,
                    "vol": encode(voxels, packing.codec),
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
                "fingerprint": fingerprint(voxels),
                "record_crc32": zlib.crc32(record),
            }
        starting(None, len(shard.scans), len(rejected))
        writer.close()
        flush_to_disk(file)
    return packed, images, rejected


class _SetAside(Exception):
    """A scan that is left out, and why, in one line."""

    def __init__(self, stage: str, reason: str, scan: Scan):
        self.stage = stage
        self.reason = " ".join(reason.removeprefix(f"{scan.image}: ").split())


def _read(scan: Scan, packing: Packing, deadly: dict[str, str]) -> tuple[str, Prepared]:
    """The image's sha256 and the prepared volume. Whatever a damaged file does to the libraries is its own reason."""
    if scan.scan_id in deadly:
        raise _SetAside("worker", deadly[scan.scan_id], scan)
    stage = "read"
    try:
        mask = packing.mask_of(scan)
        sha256 = image_sha256(scan.image)
        stage = "split"
        if scan.expected_sha256 not in ("", sha256):
            raise ValueError(
                f"another image than the split file's: sha256 {sha256[:16]}..., there {scan.expected_sha256[:16]}..."
            )
        stage = "prepare"
        return sha256, prepare(scan.image, packing.recipe, mask)
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "MemoryError" in str(error):
            raise MemoryError(f"scan {scan.scan_id!r}: {error}") from error
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise _SetAside(stage, reason, scan) from error


def encode(voxels: bytes, codec: str) -> bytes:
    """The content of `KEY.vol`."""
    if codec == "raw":
        return voxels
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(voxels)


def _record(scan: Scan, prepared: Prepared, packing: Packing) -> dict:
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
        "recipe_id": packing.recipe.id,
        "codec": packing.codec,
    }
