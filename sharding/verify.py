"""Re-reads shards and says whatever differs from index.json.

1. every shard of the index is there with its size and sha256, and no other tar;
2. a plain tar reader meets the samples in the index's order, at the index's offsets;
3. every record agrees with the index, every volume decodes to its shape and fingerprint;
4. split.csv names the same subjects, split by split, none in two splits; rejected.csv names no packed scan.

Example:
    python -m sharding.verify shards/
"""

import csv
import errno
import hashlib
import json
import math
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
import zstandard
from tqdm import tqdm

from sharding.manifest import subject_key
from sharding.shard import fingerprint, members_of, to_json

SAME_IN_RECORD = ("key", "shape", "pad_before", "cohort", "diagnosis")


@dataclass(frozen=True)
class Options:
    """What to verify."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder that sharding.build wrote."""
    workers: int | None = None
    """Threads. As many as this job has cores unless given."""


def verify(options: Options) -> tuple[list[str], dict]:
    """Returns every difference, each naming its file, and the index (empty if it cannot be read)."""
    folder = options.shards
    try:
        index = json.loads((folder / "index.json").read_bytes())
        _check_format(index)
    except (OSError, ValueError) as error:
        return [f"{folder / 'index.json'}: {error}"], {}
    differences = []
    if hashlib.sha256(to_json(index["recipe"])).hexdigest()[:12] != index["recipe_id"]:
        differences.append(f"index.json: recipe_id {index['recipe_id']} is not that of its recipe")
    named = {shard["name"] for shard in index["shards"]}
    differences += [
        f"{tar.name}: is not in index.json" for tar in sorted(folder.glob("*.tar")) if tar.name not in named
    ]

    with ThreadPoolExecutor(options.workers or len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda shard: list(_check_shard(folder, shard, index)), index["shards"])
        for shard_differences in tqdm(found, total=len(named), unit="shard", disable=not sys.stderr.isatty()):
            differences += shard_differences
    return differences + list(_check_tables(folder, index)), index


def _check_format(index: dict) -> None:
    if not isinstance(index, dict) or index.get("format") != 1:
        raise ValueError("is not an index of format 1")
    missing = {"recipe", "recipe_id", "codec", "shards"} - index.keys()
    if missing:
        raise ValueError(f"misses {sorted(missing)}")


def _check_shard(folder: Path, shard: dict, index: dict) -> Iterator[str]:
    tar, name = folder / shard["name"], shard["name"]
    if not tar.exists():
        yield f"{name}: missing"
        return
    size_bytes = tar.stat().st_size
    if size_bytes != shard["bytes"]:
        kind = "truncated" if size_bytes < shard["bytes"] else "altered"
        yield f"{name}: {kind}, {size_bytes} bytes where index.json has {shard['bytes']}"
        return
    try:
        yield from _read_through(tar, shard, index)
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror})"


def _read_through(tar: Path, shard: dict, index: dict) -> Iterator[str]:
    """Reads the bytes once, for the shard's sha256 and for its samples, if the tar has them where the index says."""
    name, samples = shard["name"], shard["samples"]
    expected = [
        member
        for sample in samples
        for member in ((sample["key"], "json", sample["record"]), (sample["key"], "vol", sample["volume"]))
    ]
    try:
        members = members_of(tar)
        if members != expected:
            yield f"{name}: its members are not those of index.json in order and place"
    except (tarfile.TarError, ValueError) as error:
        yield f"{name}: not a readable tar ({error})"
        members = []
    sha256 = hashlib.sha256()
    with open(tar, "rb", buffering=0) as file:
        begin = 0
        for sample in samples if members == expected else []:
            (record_begin, record_size), (volume_begin, volume_size) = sample["record"], sample["volume"]
            chunk = memoryview(_read(file, volume_begin + volume_size - begin))
            sha256.update(chunk)
            record = chunk[record_begin - begin :][:record_size]
            for fault in _check_sample(record, chunk[volume_begin - begin :], sample, index):
                yield f"{name}: sample {sample['key']}: {fault}"
            begin = volume_begin + volume_size
        while chunk := file.read(2**22):
            sha256.update(chunk)
    if sha256.hexdigest() != shard["sha256"]:
        yield f"{name}: altered, its sha256 is not that of index.json"


def _read(file, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:
        raise OSError(errno.EIO, "ended early")
    return data


def _check_sample(record, stored, sample: dict, index: dict) -> Iterator[str]:
    try:
        record = json.loads(bytes(record))
        expected = {name: sample[name] for name in SAME_IN_RECORD}
        expected |= {"recipe_id": index["recipe_id"], "codec": index["codec"]}
        for name, value in expected.items():
            if record[name] != value:
                yield f"record has {name} {record[name]!r}, index.json {value!r}"
    except (ValueError, KeyError, TypeError) as error:
        yield f"record cannot be read ({error!r})"

    num_voxels = math.prod(sample["shape"])
    try:
        if index["codec"] == "zstd" and zstandard.frame_content_size(stored) == num_voxels:
            stored = zstandard.ZstdDecompressor().decompress(stored)
    except zstandard.ZstdError as error:
        yield f"volume cannot be decoded ({error})"
        return
    if len(stored) != num_voxels:
        yield f"volume does not have the {num_voxels} voxels of shape {sample['shape']}"
    elif fingerprint(stored) != sample["fingerprint"]:
        yield "volume's voxels are not those of index.json"


def _check_tables(folder: Path, index: dict) -> Iterator[str]:
    try:
        packed, rejected = _rows(folder / "split.csv"), _rows(folder / "rejected.csv")
    except (OSError, ValueError, csv.Error) as error:
        yield f"split.csv or rejected.csv cannot be read ({error})"
        return
    in_table = Counter((row["split"], row["cohort"], subject_key(row["cohort"], row["subject_id"])) for row in packed)
    in_index = Counter(
        (shard["split"], sample["cohort"], sample["subject"])
        for shard in index["shards"]
        for sample in shard["samples"]
    )
    if in_table != in_index:
        more, fewer = (in_table - in_index).total(), (in_index - in_table).total()
        yield f"split.csv: {more} scans that index.json has not, {fewer} of index.json that it has not"
    splits: dict[tuple[str, str], set[str]] = {}
    for split, *subject in in_index:
        splits.setdefault(tuple(subject), set()).add(split)
    for (cohort, subject), names in splits.items():
        if len(names) > 1:
            yield f"index.json: subject {subject} of {cohort} is in {' and '.join(sorted(names))}"
    for scan_id in {row["scan_id"] for row in packed} & {row["scan"] for row in rejected}:
        yield f"rejected.csv: scan {scan_id!r} is packed as well"


def _rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    differences, index = verify(options)
    if differences:
        print("\n".join(differences))
        sys.exit(1)
    counts = Counter(shard["split"] for shard in index["shards"] for _ in shard["samples"])
    sizes = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"ok {counts.total()} samples ({sizes}) in {len(index['shards'])} shards are as index.json says")


if __name__ == "__main__":
    main()
