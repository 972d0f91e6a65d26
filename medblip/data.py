"""From shards to batches on the device.

1. shards.py knows where every sample lies, and reads samples by offset straight into one flat uint8 buffer.
2. `SampleStream` says which sample stands at which position: one shuffled permutation per epoch, end to end, a pure
   function of (seed, epoch). A run's place in the data is therefore one number, for any number of ranks.
3. `Loader` does the reading ahead of the training for one rank, in reused (on a GPU: pinned) buffers, and has the
   samples' words tokenised: a `HostBatch`.
4. `to_device` pads, scales, augments and casts on the device: a `Batch`.

What is random about a sample is drawn from (seed, epoch, KEY), never from a rank's stream.
"""

from __future__ import annotations

import functools
import queue
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medblip.augment import apply_change, draw_change
from medblip.shards import Reader, Sample
from medblip.text import DIAGNOSIS_QUESTION, Example, render_prompt
from medblip.words import Words

SECONDS_BETWEEN_LOOKS = 0.2  # of a loader's user at whether it should stop waiting

UNREADABLE = Example(render_prompt("", DIAGNOSIS_QUESTION), "unreadable", "", "", "", False)
"""Words of a sample that could not be read: no record and no answer, so no loss counts it."""

INTENSITY_MEAN, INTENSITY_STD = 0.45, 0.27
"""Volumes are scaled as the images that the 2-D towers were trained on (CLIP's, averaged over its channels)."""


class SampleStream:
    """Endless order of samples: the concatenation of one permutation per epoch.

    Shards are shuffled, then the samples within windows of shards, so that reading stays near in the files.
    """

    def __init__(self, shard_of_sample: list[int], seed: int, window_shards: int = 8):
        shards = np.array(shard_of_sample)
        self._numbers = sorted(set(shard_of_sample))
        self._shards = [np.flatnonzero(shards == number) for number in self._numbers]
        self.num_samples = len(shard_of_sample)
        self.seed = seed
        self.window_shards = window_shards
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
        """The order of the samples in an epoch; its windows of shards, and the place where each ends."""
        draw = np.random.default_rng([self.seed, epoch])
        shards = draw.permutation(len(self._shards)).tolist()
        windows = [shards[i : i + self.window_shards] for i in range(0, len(shards), self.window_shards)]
        parts = [draw.permutation(np.concatenate([self._shards[i] for i in window])) for window in windows]
        return np.concatenate(parts), windows, np.cumsum([len(part) for part in parts])

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index of the sample) at a position of the stream."""
        epoch, place = divmod(position, self.num_samples)
        return epoch, int(self._order(epoch)[0][place])

    def shards_from(self, position: int) -> list[int]:
        """The shards of the window at a position, then those of the window after it."""
        epoch, place = divmod(position, self.num_samples)
        _, windows, ends = self._order(epoch)
        now = int(np.searchsorted(ends, place, side="right"))
        after = windows[now + 1] if now + 1 < len(windows) else self._order(epoch + 1)[1][0]
        return [self._numbers[i] for i in windows[now] + after]


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch on the device. Masks: True = a token that counts, False = padding.

    With several questions a scan, words, groups and weights have that many rows for each volume, next to each other.
    """

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
    weight_B: Tensor | None = None


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
    unreadable: dict[str, str]
    """KEYs of samples that could not be read, and why: they are in the batch as a blank image without words."""


def sample_draw(seed: int, epoch: int, key: str, purpose: str) -> random.Random:
    """The random source of one sample in one epoch, the same on every rank."""
    return random.Random(f"{seed}/{epoch}/{key}/{purpose}")


class Loader:
    """Micro-batches of one rank from a position of the stream on, read ahead by a thread.

    Args:
        reader: of the shards; the loader's from now on.
        samples: of the training split, in the stream's numbering.
        stream: the order.
        words: the tokenisers.
        draw_example: (record, Sample, random source) -> Example.
        positions: the stream positions of each micro-batch, endless.
        seed: of the run.
        pin: buffers in pinned memory, for a GPU.
        questions: examples drawn of each sample.
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
        questions: int = 1,
        depth: int = 2,
    ):
        self._reader, self._samples, self._stream, self._words = reader, samples, stream, words
        self._draw_example, self._positions, self._seed = draw_example, positions, seed
        self._pin, self._questions = pin, questions
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
        return self.next_unless(lambda: False)

    def next_unless(self, is_stopping: Callable[[], bool]) -> HostBatch | None:
        """The next batch; None if `is_stopping` came true while waiting for it.

        Raises:
            ValueError, OSError, ...: what ended the thread.
            RuntimeError: if the thread is gone without a word.
        """
        while True:
            try:
                batch = self._ready.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                if is_stopping():
                    return None
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the loader's thread is dead") from None
                continue
            if isinstance(batch, BaseException):
                raise batch
            return batch

    def close(self) -> None:
        """Stops the thread and closes the reader."""
        self._stop.set()
        self._reader.give_up()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._reader.close()

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
        self._reader.expect(self._stream.shards_from(positions[0]))
        places = [self._stream.at(position) for position in positions]
        epochs, samples = [epoch for epoch, _ in places], [self._samples[index] for _, index in places]
        num_voxels = sum(sample.num_voxels for sample in samples)
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < num_voxels:
            buffer = self._buffers[slot] = torch.empty(num_voxels, dtype=torch.uint8, pin_memory=self._pin)
        unreadable = self._fill(samples, buffer.numpy())
        examples = []
        for sample, epoch in zip(samples, epochs, strict=True):
            drawn = [UNREADABLE] * self._questions
            if sample.key not in unreadable:
                try:
                    record = self._reader.record(sample)
                    sources = (sample_draw(self._seed, epoch, sample.key, f"words{n or ''}") for n in range(len(drawn)))
                    drawn = [self._draw_example(record, sample, source) for source in sources]
                except (ValueError, KeyError, TypeError, OSError) as error:
                    unreadable[sample.key] = f"its record: {type(error).__name__}"  # its text may be in the message
            examples += drawn
        self._copied[slot] = torch.cuda.Event() if self._pin else None
        asked = [sample for sample in samples for _ in range(self._questions)]
        words = self._words.batch(examples, [s.subject for s in asked], [s.key for s in asked])
        return HostBatch(samples, epochs, examples, buffer[:num_voxels], words, self._copied[slot], unreadable)

    def _fill(self, samples: list[Sample], flat: np.ndarray) -> dict[str, str]:
        """Reads the volumes; one that cannot be read is left blank. Returns why, by KEY."""
        try:
            self._reader.volumes(samples, flat)
            return {}
        except (ValueError, OSError):
            pass  # now one by one, to find which
        unreadable, start = {}, 0
        for sample in samples:
            place = flat[start : start + sample.num_voxels]
            start += sample.num_voxels
            try:
                self._reader.volumes([sample], place)
            except (ValueError, OSError) as error:
                place[:] = 0
                unreadable[sample.key] = str(error)
        return unreadable


def to_device(
    host: HostBatch, grid_size: int, device: torch.device, dtype: torch.dtype, augment_seed: int | None
) -> Batch:
    """Moves a batch to the device; see `unpack` for what happens to the volumes."""
    volume_BXYZ = unpack(host.flat, host.samples, grid_size, device, dtype, host.epochs, augment_seed)
    if host.copied is not None:
        host.copied.record()
    words = {name: tensor.to(device, non_blocking=True) for name, tensor in host.words.items()}
    weight_B = torch.tensor([sample.weight for sample in host.samples], device=device)
    weight_B = weight_B.repeat_interleave(len(host.examples) // len(host.samples))
    return Batch(keys=[s.key for s in host.samples], volume_BXYZ=volume_BXYZ, weight_B=weight_B, **words)


def unpack(
    flat: Tensor,
    samples: list[Sample],
    grid_size: int,
    device: torch.device,
    dtype: torch.dtype,
    epochs: list[int] | None = None,
    augment_seed: int | None = None,
) -> Tensor:
    """Flat uint8 voxels to `B X Y Z` on the device: padded with 0, scaled to (v / 255 - mean) / std, cast.

    With an `augment_seed` each volume is changed before it is scaled (augment.py), as drawn per (seed, epoch, KEY).
    """
    flat = flat.to(device, non_blocking=True)
    size = (grid_size, grid_size, grid_size)
    volume_BXYZ = torch.full((len(samples), *size), -INTENSITY_MEAN / INTENSITY_STD, device=device, dtype=dtype)
    start = 0
    for row, sample in enumerate(samples):
        place = tuple(slice(p, p + n) for p, n in zip(sample.pad_before, sample.shape, strict=True))
        # In float32, since 1/255 has no exact bf16.
        volume_XYZ = flat[start : start + sample.num_voxels].view(sample.shape).float()
        start += sample.num_voxels
        if augment_seed is not None:
            padded_XYZ = torch.zeros(size, device=device)
            padded_XYZ[place] = volume_XYZ.div_(255)
            change = draw_change(sample_draw(augment_seed, epochs[row], sample.key, "image"), grid_size)
            volume_XYZ, place = apply_change(padded_XYZ, change).mul_(255), ...
        volume_BXYZ[row][place] = volume_XYZ.mul_(1 / 255 / INTENSITY_STD).sub_(INTENSITY_MEAN / INTENSITY_STD)
    return volume_BXYZ
