"""What a shard is on disk: its scans, its tar, and the part file that says it is complete.

A tar is written under another name, flushed to the disk and renamed, and then its part file: whatever interrupts, a
part file means a whole shard.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sharding.manifest import Scan

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Shard:
    """What goes into one tar, decided before any image is read."""

    name: str
    """Without `.tar`, e.g. train-00003."""
    split: str
    scans: list[Scan]


def cut_into_shards(scans: list[Scan], shard_samples: int) -> list[Shard]:
    """Slices each split, in an order that no one chose, by count; needs no image."""
    shards = []
    for split in SPLITS:
        rows = sorted((scan for scan in scans if scan.split == split), key=_order)
        for number, first in enumerate(range(0, len(rows), shard_samples)):
            shards.append(Shard(f"{split}-{number:05d}", split, rows[first : first + shard_samples]))
    return shards


def _order(scan: Scan) -> str:
    return hashlib.sha256(f"order/{scan.key}".encode()).hexdigest()


def part_file(out: Path, name: str) -> Path:
    """The file whose existence says that the shard is complete."""
    return out / ".parts" / f"{name}.json"


def is_complete(out: Path, shard: Shard) -> bool:
    """Whether the shard's part file and tar are there; that the tar's bytes are right is for verify to say."""
    path = part_file(out, shard.name)
    if not path.exists():
        return False
    entry = json.loads(path.read_bytes())["shard"]
    tar = out / f"{shard.name}.tar"
    return entry is None or (tar.exists() and tar.stat().st_size == entry["bytes"])


def fingerprint(voxels: bytes) -> str:
    """Names the uncompressed voxels, whatever the codec: 16 hex digits."""
    return hashlib.sha256(voxels).hexdigest()[:16]


def members_of(tar: Path) -> list[tuple[str, str, list[int]]]:
    """Every member of a plain tar in its order: key, extension, and [offset, size] of its bytes in the file."""
    with tarfile.open(tar, "r:") as archive:
        return [(*member.name.split(".", 1), [member.offset_data, member.size]) for member in archive]


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: dict) -> bytes:
    """Canonical JSON: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is either all there or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        flush_to_disk(file)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def flush_to_disk(file: BinaryIO) -> None:
    """Returns when the bytes survive a power cut."""
    file.flush()
    os.fsync(file.fileno())
