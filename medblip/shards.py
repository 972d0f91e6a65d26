"""What lies where in a folder of shards (index.json), and reading it by offset with several threads."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

from medblip.config import unknown


class Sample(NamedTuple):
    """One packed scan: who (hashed) and where."""

    key: str
    shard: int
    volume: tuple[int, int]
    record: tuple[int, int]
    shape: tuple[int, int, int]
    pad_before: tuple[int, int, int]
    cohort: str
    subject: str
    diagnosis: str | None
    fingerprint: str = ""

    @property
    def num_voxels(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]


class ShardIndex:
    """The contents of a folder of shards, from its index.json.

    Raises:
        ValueError: if the folder has no index, or a shard is missing or has another size than the index says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: not a finished folder of shards; run python -m sharding.build")
        content = json.loads(path.read_bytes())
        self.recipe: dict = content["recipe"]
        self.recipe_id: str = content["recipe_id"]
        self.codec: str = content["codec"]
        self.shards: list[Path] = [self.folder / shard["name"] for shard in content["shards"]]
        self._samples: dict[str, list[Sample]] = {}
        for number, shard in enumerate(content["shards"]):
            size = self.shards[number].stat().st_size if self.shards[number].is_file() else "missing"
            if size != shard["bytes"]:
                raise ValueError(
                    f"{self.shards[number]}: {size} where index.json says {shard['bytes']} bytes; "
                    f"run python -m sharding.verify {self.folder}"
                )
            self._samples.setdefault(shard["split"], []).extend(
                Sample(
                    sample["key"],
                    number,
                    tuple(sample["volume"]),
                    tuple(sample["record"]),
                    tuple(sample["shape"]),
                    tuple(sample["pad_before"]),
                    sample["cohort"],
                    sample["subject"],
                    sample["diagnosis"],
                    sample["fingerprint"],
                )
                for sample in shard["samples"]
            )

    @property
    def grid_size(self) -> int:
        """Voxels along each edge of a padded volume."""
        return self.recipe["size"]

    def samples(self, split: str) -> list[Sample]:
        """All samples of a split, in the order of the shards.

        Raises:
            ValueError: if the split holds none.
        """
        if not self._samples.get(split):
            raise ValueError(f"{self.folder}: {unknown('split', split, self._samples)}")
        return self._samples[split]


class Reader:
    """Reads samples of shards by offset with several threads; safe to share between threads."""

    def __init__(self, index: ShardIndex, threads: int):
        self.index = index
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._files = [os.open(path, os.O_RDONLY) for path in index.shards]
        self._local = threading.local()
        self._checked: set[str] = set()

    def record(self, sample: Sample) -> dict:
        """The sample's KEY.json."""
        offset, size = sample.record
        return json.loads(os.pread(self._files[sample.shard], size, offset))

    def volumes(self, samples: list[Sample], flat: np.ndarray) -> None:
        """Fills `flat` (uint8) with the samples' voxels, one after the other.

        Raises:
            ValueError: naming the shard and KEY of a sample that does not decode to its shape, or whose voxels
                are not those of the index (checked the first time that a sample is read).
        """
        starts = np.cumsum([0] + [sample.num_voxels for sample in samples]).tolist()
        jobs = [
            self._pool.submit(self._fill, sample, flat[begin:end])
            for sample, begin, end in zip(samples, starts[:-1], starts[1:], strict=True)
        ]
        for job in jobs:
            job.result()

    def _fill(self, sample: Sample, into: np.ndarray) -> None:
        offset, size = sample.volume
        name = f"{self.index.shards[sample.shard]}: sample {sample.key}"
        if self.index.codec == "raw":
            num_read = os.preadv(self._files[sample.shard], [into], offset) if size == into.size else size
        else:
            num_read = self._decompress(os.pread(self._files[sample.shard], size, offset), into, name)
        if num_read != into.size:
            raise ValueError(f"{name} has {num_read} voxels instead of {into.size}")
        if sample.key not in self._checked:
            if hashlib.sha256(into).hexdigest()[:16] != sample.fingerprint:
                raise ValueError(f"{name} is damaged: its voxels are not those of index.json")
            self._checked.add(sample.key)

    def _decompress(self, packed: bytes, into: np.ndarray, name: str) -> int:
        if not hasattr(self._local, "zstd"):
            self._local.zstd = zstandard.ZstdDecompressor()
        num_read = 0
        try:
            with self._local.zstd.stream_reader(io.BytesIO(packed)) as stream:
                while num_read < into.size and (more := stream.readinto(into[num_read:])):
                    num_read += more
                return num_read + len(stream.read(1))  # reaches the end of the frame, and with it the checksum
        except zstandard.ZstdError as error:
            raise ValueError(f"{name} is damaged: {error}") from None

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files:
            os.close(file)
