"""What lies where in a folder of shards (index.json), and reading it by offset with several threads.

The folder may be behind a URL: then whole shards are fetched into this node's cache (cache.py) and read there.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

from medblip.config import is_url, unknown

FETCHES_AT_ONCE = 8
READ_AHEAD = 400
"""Samples whose shards are opened, and where need be fetched, ahead of the one that is read in an evaluation."""


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
    weight: float = 1.0  # in the language loss; see losses.py
    record_crc32: int | None = None  # of KEY.json; shards of older builds have none

    @property
    def num_voxels(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]


class ShardIndex:
    """The contents of a folder of shards, local or behind a URL, from its index.json.

    Raises:
        ValueError: if the folder has no index, or a local shard is missing or has another size than the index says.
    """

    def __init__(self, folder: str | Path):
        self.remote = self.cache = None
        if is_url(str(folder)):
            from medblip.cache import Cache
            from medblip.remote import Remote

            self.remote, self.cache = Remote(str(folder)), Cache()
        self.folder: Path | str = self.remote.url if self.remote else Path(folder)
        try:
            content = json.loads(self.read("index.json"))
        except json.JSONDecodeError:
            raise ValueError(f"{self.folder}/index.json: damaged, no JSON; fetch or build the folder again") from None
        self.recipe: dict = content["recipe"]
        self.recipe_id: str = content["recipe_id"]
        self.codec: str = content["codec"]
        self._entries: list[dict] = content["shards"]
        names = [shard["name"] for shard in self._entries]
        self.shards: list[Path | str] = [f"{self.folder}/{n}" if self.remote else self.folder / n for n in names]
        self._samples: dict[str, list[Sample]] = {}
        for number, shard in enumerate(self._entries):
            if self.remote is None:
                _check_size(self.shards[number], shard["bytes"])
            self._samples.setdefault(shard["split"], []).extend(_samples_of(shard.pop("samples"), number))
        keys = Counter(sample.key for samples in self._samples.values() for sample in samples)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise ValueError(
                f"{self.folder}/index.json: the same KEY stands twice: {', '.join(twice[:5])}; build again"
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

    def read(self, name: str) -> bytes:
        """The content of a small file of the folder.

        Raises:
            ValueError: if it is missing or cannot be fetched.
        """
        if self.remote is not None:
            return self.remote.read(name)
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: not a finished folder of shards; run python -m sharding.build")
        return path.read_bytes()

    def open(self, shard: int, stop: threading.Event) -> int:
        """A file descriptor of a shard, fetched first where need be; given up soon after `stop` was set."""
        if self.remote is None:
            return os.open(self.shards[shard], os.O_RDONLY)
        entry = self._entries[shard]
        return self.cache.open(self.remote, entry["name"], entry["bytes"], entry["sha256"], stop)

    def check_fits(self, shards: list[int]) -> None:
        """Refuses shards of a URL that are too large to be in this node's cache together."""
        if self.cache is not None:
            self.cache.check_fits(sum(self._entries[shard]["bytes"] for shard in shards))


def _refuse(constant: str):
    raise ValueError(f"{constant} is no number of a record")


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else "missing"
    if size != expected:
        raise ValueError(
            f"{path}: {size} where index.json says {expected} bytes; run python -m sharding.verify {path.parent}"
        )


def _samples_of(entries: list[dict], shard: int) -> list[Sample]:
    return [
        Sample(
            entry["key"],
            shard,
            tuple(entry["volume"]),
            tuple(entry["record"]),
            tuple(entry["shape"]),
            tuple(entry["pad_before"]),
            entry["cohort"],
            entry["subject"],
            entry["diagnosis"],
            entry["fingerprint"],
            record_crc32=entry.get("record_crc32"),
        )
        for entry in entries
    ]


class Reader:
    """Reads samples of shards by offset with several threads; safe to share between threads.

    A shard is opened when it is first read or `expect`ed, and stays open until others are expected.
    """

    def __init__(self, index: ShardIndex, threads: int):
        self.index = index
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._files: dict[int, Future[int]] = {}
        self._expected: list[int] | None = None
        self._opening = threading.Lock()
        self._fetching = threading.Semaphore(FETCHES_AT_ONCE)
        self._stop = threading.Event()
        self._local = threading.local()
        self._checked: set[str] = set()

    def expect(self, shards: Iterable[int]) -> None:
        """Says which shards are read next: they are opened ahead in this order, and all others are closed.

        Not while another thread reads.

        Raises:
            ValueError: if they are too large to be in this node's cache together.
        """
        expected = list(dict.fromkeys(shards))
        if expected == self._expected:
            return
        self.index.check_fits(expected)
        self._expected = expected
        for shard in set(self._files) - set(expected):
            self._close(self._files.pop(shard))
        for shard in expected:
            self._file(shard)

    def record(self, sample: Sample) -> dict:
        """The sample's KEY.json.

        Raises:
            ValueError: if it is not what was packed.
        """
        offset, size = sample.record
        content = os.pread(self._file(sample.shard).result(), size, offset)
        if sample.record_crc32 is not None and zlib.crc32(content) != sample.record_crc32:
            raise ValueError(f"{self.index.shards[sample.shard]}: the record of {sample.key} is damaged")
        return json.loads(content, parse_constant=_refuse)

    def volumes(self, samples: list[Sample], flat: np.ndarray) -> None:
        """Fills `flat` (uint8) with the samples' voxels, one after the other.

        Raises:
            ValueError: naming the shard and KEY of a sample that does not decode to its shape, or whose voxels are
                not those that were packed: zstd's own checksum, always; of raw voxels a hash, the first time.
        """
        files = {shard: self._file(shard) for shard in {sample.shard for sample in samples}}
        starts = np.cumsum([0] + [sample.num_voxels for sample in samples]).tolist()
        jobs = [
            self._pool.submit(self._fill, files[sample.shard].result(), sample, flat[begin:end])
            for sample, begin, end in zip(samples, starts[:-1], starts[1:], strict=True)
        ]
        for job in jobs:
            job.result()

    def give_up(self) -> None:
        """Ends downloads soon, with an error for whoever waits for one."""
        self._stop.set()

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self.give_up()
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            self._close(file)
        self._files = {}

    def _file(self, shard: int) -> Future[int]:
        with self._opening:
            if shard not in self._files:
                file = self._files[shard] = Future()
                if self.index.remote is None:
                    self._open(shard, file)
                else:  # a daemon: a download must not keep a program from ending
                    threading.Thread(target=self._open, args=(shard, file), name="fetch", daemon=True).start()
            return self._files[shard]

    def _open(self, shard: int, file: Future[int]) -> None:
        with self._fetching:
            if file.set_running_or_notify_cancel():
                try:
                    file.set_result(self.index.open(shard, self._stop))
                except BaseException as error:  # raised where the shard is read
                    file.set_exception(error)

    def _close(self, file: Future[int]) -> None:
        if not file.cancel():
            file.add_done_callback(lambda done: done.exception() or os.close(done.result()))

    def _fill(self, file: int, sample: Sample, into: np.ndarray) -> None:
        offset, size = sample.volume
        name = f"{self.index.shards[sample.shard]}: sample {sample.key}"
        if self.index.codec == "raw":
            num_read = os.preadv(file, [into], offset) if size == into.size else size
        else:
            num_read = self._decompress(os.pread(file, size, offset), into, name)
        if num_read != into.size:
            raise ValueError(f"{name} has {num_read} voxels instead of {into.size}")
        if self.index.codec == "raw" and sample.key not in self._checked:
            if hashlib.sha256(into).hexdigest()[:16] != sample.fingerprint:
                raise ValueError(f"{name} is damaged: its voxels are not those of index.json")
            self._checked.add(sample.key)

    def _decompress(self, packed: bytes, into: np.ndarray, name: str) -> int:
        if not hasattr(self._local, "zstd"):
            self._local.zstd = zstandard.ZstdDecompressor()
        try:
            size = zstandard.frame_content_size(packed)
            if size != into.size:
                return size
            # All of the frame and all of its room at once: zstd then decodes in place and compares its checksum.
            with self._local.zstd.stream_reader(packed, read_size=len(packed)) as stream:
                return stream.readinto(into)
        except zstandard.ZstdError as error:
            raise ValueError(f"{name} is damaged: {error}") from None
