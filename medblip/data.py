"""From shards to batches on the device.

1. `ShardIndex` knows where every sample lies (index.json); nothing is scanned at start.
2. `SampleStream` says which sample stands at which position: one shuffled permutation per epoch, end to end, a pure
   function of (seed, epoch). A run's place in the data is therefore one number, for any number of ranks.
3. `Reader` reads and decompresses samples by offset, with threads, straight into one flat uint8 buffer.
4. `Loader` does this ahead of the training for one rank, in reused (on a GPU: pinned) buffers, and has the samples'
   words tokenised: a `HostBatch`.
5. `to_device` pads, scales, augments and casts on the device: a `Batch`.

What is random about a sample is drawn from (seed, epoch, KEY), never from a rank's stream.
"""

from __future__ import annotations

import functools
import io
import json
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor

from medblip.config import unknown
from medblip.text import Example
from medblip.words import Words

INTENSITY_MEAN, INTENSITY_STD = 0.45, 0.27
"""Volumes are scaled as the images that the 2-D towers were trained on (CLIP's, averaged over its channels)."""


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


class SampleStream:
    """Endless order of samples: the concatenation of one permutation per epoch.

    Shards are shuffled, then the samples within windows of shards, so that reading stays near in the files.
    """

    def __init__(self, shard_of_sample: list[int], seed: int, window_shards: int = 8):
        self._shards = [np.flatnonzero(np.array(shard_of_sample) == shard) for shard in sorted(set(shard_of_sample))]
        self.num_samples = len(shard_of_sample)
        self.seed = seed
        self.window_shards = window_shards
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        draw = np.random.default_rng([self.seed, epoch])
        shards = [self._shards[i] for i in draw.permutation(len(self._shards))]
        windows = [
            np.concatenate(shards[i : i + self.window_shards]) for i in range(0, len(shards), self.window_shards)
        ]
        return np.concatenate([draw.permutation(window) for window in windows])

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index of the sample) at a position of the stream."""
        epoch, place = divmod(position, self.num_samples)
        return epoch, int(self._order(epoch)[place])


class Reader:
    """Reads samples of shards by offset with several threads; safe to share between threads."""

    def __init__(self, index: ShardIndex, threads: int):
        self.index = index
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._files = [os.open(path, os.O_RDONLY) for path in index.shards]
        self._local = threading.local()

    def record(self, sample: Sample) -> dict:
        """The sample's KEY.json."""
        offset, size = sample.record
        return json.loads(os.pread(self._files[sample.shard], size, offset))

    def volumes(self, samples: list[Sample], flat: np.ndarray) -> None:
        """Fills `flat` (uint8) with the samples' voxels, one after the other.

        Raises:
            ValueError: naming the shard and KEY of a sample that does not decode to its shape.
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
        if self.index.codec == "raw":
            num_read = os.preadv(self._files[sample.shard], [into], offset)
        else:
            packed = os.pread(self._files[sample.shard], size, offset)
            if not hasattr(self._local, "zstd"):
                self._local.zstd = zstandard.ZstdDecompressor()
            num_read = 0
            try:
                with self._local.zstd.stream_reader(io.BytesIO(packed)) as stream:
                    while num_read < into.size and (more := stream.readinto(into[num_read:])):
                        num_read += more
            except zstandard.ZstdError as error:
                raise ValueError(
                    f"{self.index.shards[sample.shard]}: sample {sample.key} is damaged: {error}"
                ) from None
        if num_read != into.size:
            raise ValueError(
                f"{self.index.shards[sample.shard]}: sample {sample.key} has {num_read} voxels instead of {into.size}"
            )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files:
            os.close(file)


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch on the device. Masks: True = a token that counts, False = padding."""

    keys: list[str]
    volume_BXYZ: Tensor
    prompt_ids_BT: Tensor
    is_prompt_BT: Tensor
    use_queries_B: Tensor
    answer_ids_BA: Tensor
    is_answer_BA: Tensor
    record_ids_BT: Tensor
    is_record_BT: Tensor
    record_groups_BN: Tensor
    statement_ids_BT: Tensor
    is_statement_BT: Tensor
    statement_groups_BN: Tensor


@dataclass(frozen=True)
class HostBatch:
    """A micro-batch before the device: voxels in one flat uint8 buffer, words as token ids.

    The buffer is filled again after the next batch was taken and `copied`, on a GPU, has passed.
    """

    samples: list[Sample]
    epochs: list[int]
    examples: list[Example]
    flat: Tensor
    words: dict[str, Tensor]
    copied: torch.cuda.Event | None


def sample_draw(seed: int, epoch: int, key: str, purpose: str) -> random.Random:
    """The random source of one sample in one epoch, the same on every rank."""
    return random.Random(f"{seed}/{epoch}/{key}/{purpose}")


class Loader:
    """Micro-batches of one rank from a position of the stream on, read ahead by a thread.

    Args:
        reader: of the shards.
        samples: of the training split, in the stream's numbering.
        stream: the order.
        words: the tokenisers.
        draw_example: (record, Sample, random source) -> Example.
        positions: the stream positions of each micro-batch, endless.
        seed: of the run.
        pin: buffers in pinned memory, for a GPU.
        depth: micro-batches read ahead.
    """

    def __init__(
        self,
        reader: Reader,
        samples: list[Sample],
        stream: SampleStream,
        words: Words,
        draw_example: Callable[[dict, Sample, random.Random], Example],
        positions: Iterator[list[int]],
        seed: int,
        pin: bool,
        depth: int = 2,
    ):
        self._reader, self._samples, self._stream, self._words = reader, samples, stream, words
        self._draw_example, self._positions, self._seed = draw_example, positions, seed
        self._pin = pin
        # Read ahead, in the training's hands, and being filled.
        self._buffers: list[Tensor | None] = [None] * (depth + 2)
        self._copied: list[torch.cuda.Event | None] = [None] * (depth + 2)
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self) -> None:
        try:
            for number, positions in enumerate(self._positions):
                self._put(self._read(positions, number % len(self._buffers)))
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed over to the training's thread, which raises it
            self._put(error)

    def _put(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _read(self, positions: list[int], slot: int) -> HostBatch:
        places = [self._stream.at(position) for position in positions]
        epochs, samples = [epoch for epoch, _ in places], [self._samples[index] for _, index in places]
        num_voxels = sum(sample.num_voxels for sample in samples)
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < num_voxels:
            buffer = self._buffers[slot] = torch.empty(num_voxels, dtype=torch.uint8, pin_memory=self._pin)
        self._reader.volumes(samples, buffer.numpy())
        examples = [
            self._draw_example(self._reader.record(s), s, sample_draw(self._seed, epoch, s.key, "words"))
            for s, epoch in zip(samples, epochs, strict=True)
        ]
        self._copied[slot] = torch.cuda.Event() if self._pin else None
        words = self._words.batch(examples, [sample.subject for sample in samples])
        return HostBatch(samples, epochs, examples, buffer[:num_voxels], words, self._copied[slot])


def to_device(
    host: HostBatch, grid_size: int, device: torch.device, dtype: torch.dtype, augment_seed: int | None
) -> Batch:
    """Moves a batch to the device; see `unpack` for what happens to the volumes."""
    volume_BXYZ = unpack(host.flat, host.samples, grid_size, device, dtype, host.epochs, augment_seed)
    if host.copied is not None:
        host.copied.record()
    words = {name: tensor.to(device, non_blocking=True) for name, tensor in host.words.items()}
    return Batch(keys=[sample.key for sample in host.samples], volume_BXYZ=volume_BXYZ, **words)


def unpack(
    flat: Tensor,
    samples: list[Sample],
    grid_size: int,
    device: torch.device,
    dtype: torch.dtype,
    epochs: list[int] | None = None,
    augment_seed: int | None = None,
    max_shift: int = 2,
) -> Tensor:
    """Flat uint8 voxels to `B X Y Z` on the device: padded with 0, scaled to (v / 255 - mean) / std, cast.

    With an `augment_seed`: a left-right flip in half of the samples, a shift of at most `max_shift` voxels along
    each axis, and an intensity gain of at most 10 %, drawn per (seed, epoch, KEY).
    """
    flat = flat.to(device, non_blocking=True)
    size = (len(samples), grid_size, grid_size, grid_size)
    volume_BXYZ = torch.full(size, -INTENSITY_MEAN / INTENSITY_STD, device=device, dtype=dtype)
    start = 0
    for row, sample in enumerate(samples):
        volume_XYZ = flat[start : start + sample.num_voxels].view(sample.shape)
        start += sample.num_voxels
        corner, gain = sample.pad_before, 1.0
        if augment_seed is not None:
            draw = sample_draw(augment_seed, epochs[row], sample.key, "image")
            if draw.random() < 0.5:
                volume_XYZ = volume_XYZ.flip(0)
                corner = (grid_size - corner[0] - sample.shape[0], *corner[1:])
            corner = tuple(c + draw.randint(-max_shift, max_shift) for c in corner)
            gain = draw.uniform(0.9, 1.1)
        # In float32, since 1/255 has no exact bf16.
        scaled_XYZ = volume_XYZ.float() * (gain / 255 / INTENSITY_STD) - INTENSITY_MEAN / INTENSITY_STD
        source = tuple(slice(max(0, -c), min(n, grid_size - c)) for c, n in zip(corner, sample.shape, strict=True))
        target = tuple(slice(max(0, c), max(0, c) + s.stop - s.start) for c, s in zip(corner, source, strict=True))
        volume_BXYZ[row][target] = scaled_XYZ[source].to(dtype)
    return volume_BXYZ
