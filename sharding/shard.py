"""What a shard is on disk: its scans, its tar, and the part file that says it is complete.

A tar is written under another name, flushed to the disk and renamed, and then its part file: whatever interrupts, a
part file means a whole shard.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import socket
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from sharding.manifest import Scan

if TYPE_CHECKING:
    from medblip.volume import Recipe  # imports torch

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Shard:
    """What goes into one tar, decided before any image is read."""

    name: str
    """Without `.tar`, e.g. train-00003."""
    split: str
    scans: list[Scan]


@dataclass(frozen=True)
class Packing:
    """What all shards of a build have in common."""

    out: Path
    recipe: Recipe
    codec: Literal["zstd", "raw"]
    mask_column: str | None
    """Column of the manifest that names each scan's brain mask, if masks are used."""
    manifest_folder: Path
    """What the masks' paths are relative to."""

    def mask_of(self, scan: Scan) -> Path | None:
        """The scan's brain mask, None where the build uses none.

        Raises:
            ValueError: the scan's cell is empty.
        """
        if self.mask_column is None:
            return None
        cell = scan.extra[self.mask_column].strip()
        if not cell:
            raise ValueError(f"row {scan.row} of the manifest names no brain mask in column {self.mask_column!r}")
        return self.manifest_folder / cell


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


def read_part(out: Path, shard: Shard) -> dict | None:
    """What the part file says of a complete shard; None if file or tar are missing, or the tar has another size.

    That the tar's bytes are right is for verify to say.
    """
    try:
        part = json.loads(part_file(out, shard.name).read_bytes())
        size_bytes = (out / f"{shard.name}.tar").stat().st_size if part["shard"] else 0
    except FileNotFoundError:
        return None
    return part if part["shard"] is None or size_bytes == part["shard"]["bytes"] else None


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


def to_csv(header: Sequence[str], rows: Iterable[Sequence]) -> bytes:
    """A table as CSV: the same rows give the same bytes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is either all there or not there."""
    temporary = temporary_for(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            flush_to_disk(file)
        rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def temporary_for(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses, on whatever node."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def remove_leftovers(out: Path, stems: set[str]) -> None:
    """Removes the temporary files of shards or tables (by name, without extension) that a killed build left."""
    for folder in (out, out / ".parts"):
        for path in folder.glob(".*.tmp"):
            if path.name[1:].split(".")[0] in stems:
                path.unlink(missing_ok=True)


def flush_to_disk(file: BinaryIO) -> None:
    """Returns when the bytes survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def rename(temporary: Path, path: Path) -> None:
    """Gives a file its final name, in place of an older one; returns when that survives a power cut."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
