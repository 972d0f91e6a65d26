"""From shards to batches, on twelve small blobs packed by the command that a user would type."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_words

from medblip.augment import apply_change, draw_change
from medblip.data import INTENSITY_MEAN, INTENSITY_STD, Loader, SampleStream, sample_draw, to_device, unpack
from medblip.schedule import Schedule, positions
from medblip.shards import Reader, Sample, ShardIndex
from medblip.text import draw_example
from medblip.volume import Recipe, prepare
from sharding.manifest import read_manifest

NUM_BLOBS = 12
CPU = torch.device("cpu")
PADDING = -INTENSITY_MEAN / INTENSITY_STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """raw/ with the blobs, and zstd/ and raw-codec/ with shards of them: 5 + 5 + 2."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "raw").mkdir()
    with open(folder / "raw/manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "subject_id", "diagnosis", "split", "age_years", "sex"])
        for number in range(NUM_BLOBS):
            shape = (22 + number % 3, 24, 20)
            voxels = np.random.default_rng(number).integers(20, 900, shape).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([6, 6, 6, 1])), folder / f"raw/{number}.nii")
            writer.writerow([f"{number}.nii", f"p{number}", ("CN", "MCI", "AD")[number % 3], "train", 60 + number, "F"])
    for codec, out in (("zstd", "zstd"), ("raw", "raw-codec")):
        command = (
            f"-m sharding.build --manifest {folder}/raw/manifest.csv --out {folder}/{out} --size 48 --spacing-mm 4"
        )
        command += f" --shard-samples 5 --workers 1 --codec {codec}"
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(params=["zstd", "raw-codec"])
def shards(request, folder) -> Path:
    return folder / request.param


def read(index: ShardIndex, samples: list[Sample], threads: int = 2) -> list[np.ndarray]:
    reader = Reader(index, threads)
    flat = np.zeros(sum(sample.num_voxels for sample in samples), np.uint8)
    try:
        reader.volumes(samples, flat)
    finally:
        reader.close()
    ends = np.cumsum([sample.num_voxels for sample in samples])
    return [part.reshape(s.shape) for part, s in zip(np.split(flat, ends[:-1]), samples, strict=True)]


# The reader


def test_voxels_equal_the_prepared_ones_bit_for_bit(folder, shards):
    index = ShardIndex(shards)
    samples = index.samples("train")
    scans = {scan.key: scan for scan in read_manifest(folder / "raw/manifest.csv")}
    assert len(samples) == NUM_BLOBS and {sample.key for sample in samples} == set(scans)
    for sample, volume in zip(samples, read(index, samples), strict=True):
        prepared = prepare(scans[sample.key].image, Recipe("standard", 48, 4.0))
        assert np.array_equal(volume, prepared.volume_XYZ) and volume.std() > 0
        assert sample.pad_before == tuple(prepared.pad_before)
    assert len({sample.shape for sample in samples}) > 1
    assert index.grid_size == 48


def test_a_record_belongs_to_its_sample(folder, shards):
    index = ShardIndex(shards)
    reader = Reader(index, 1)
    ages = {scan.key: float(scan.image.stem) + 60 for scan in read_manifest(folder / "raw/manifest.csv")}
    for sample in index.samples("train"):
        record = reader.record(sample)
        assert record["key"] == sample.key and record["fields"]["age_years"] == ages[sample.key]
        assert record["diagnosis"] == sample.diagnosis
    reader.close()


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.6, 0.95])
def test_a_flipped_byte_is_an_error_that_names_shard_and_key(shards, tmp_path, place):
    copy = shutil.copytree(shards, tmp_path / "copy")
    index = ShardIndex(copy)
    sample = index.samples("train")[3]
    offset, size = sample.volume
    with open(index.shards[sample.shard], "r+b") as file:
        file.seek(offset + int(place * size))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x20]))
    with pytest.raises(ValueError, match=rf"{index.shards[sample.shard].name}: sample {sample.key} "):
        read(index, [sample])


@pytest.mark.parametrize("wrong", [1, -1])
def test_a_volume_of_another_size_than_the_index_says_is_an_error(shards, wrong):
    index = ShardIndex(shards)
    sample = index.samples("train")[-1]
    other = sample._replace(shape=(sample.shape[0] + wrong, *sample.shape[1:]))
    with pytest.raises(ValueError, match=rf"{index.shards[sample.shard].name}: sample {sample.key} "):
        read(index, [other])


def test_a_truncated_or_missing_shard_is_found_before_anything_is_read(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    shard = ShardIndex(copy).shards[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=rf"{shard.name}: {len(content) - 512} where index.json says {len(content)}"):
        ShardIndex(copy)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: missing where index.json says"):
        ShardIndex(copy)


def test_a_folder_without_index_and_an_unknown_split_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="index.json is missing"):
        ShardIndex(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'trian'; did you mean 'train'"):
        ShardIndex(shards).samples("trian")


# The order


def order(stream: SampleStream, first: int, last: int) -> list[tuple[int, int]]:
    return [stream.at(position) for position in range(first, last)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 9), st.integers(1, 4))
def test_the_stream_is_one_permutation_after_the_other(shard_of_sample, seed, window):
    n = len(shard_of_sample)
    stream = SampleStream(shard_of_sample, seed, window)
    for epoch in range(3):
        places = order(stream, epoch * n, (epoch + 1) * n)
        assert [e for e, _ in places] == [epoch] * n
        assert sorted(i for _, i in places) == list(range(n))


def test_the_order_is_a_pure_function_of_the_seed_and_epochs_differ():
    shard_of_sample = [number // 5 for number in range(40)]
    stream = SampleStream(shard_of_sample, 3)
    whole = order(stream, 0, 160)
    assert order(SampleStream(shard_of_sample, 3), 0, 160) == whole
    assert [stream.at(position) for position in reversed(range(160))] == whole[::-1]  # any place, in any order
    epochs = [tuple(i for _, i in whole[n : n + 40]) for n in range(0, 160, 40)]
    assert len(set(epochs)) == 4
    assert order(SampleStream(shard_of_sample, 4), 0, 40) != whole[:40]


def test_a_single_sample_makes_a_stream():
    assert order(SampleStream([0], 0), 0, 4) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_reading_stays_within_a_window_of_shards():
    per_shard, window = 7, 3
    shard_of_sample = [number // per_shard for number in range(per_shard * 12)]
    stream = SampleStream(shard_of_sample, 0, window)
    epoch = [shard_of_sample[i] for _, i in order(stream, 0, len(shard_of_sample))]
    parts = [epoch[n : n + window * per_shard] for n in range(0, len(epoch), window * per_shard)]
    for part in parts:
        assert set(Counter(part).values()) == {per_shard} and len(set(part)) == window
        assert part != sorted(part, key=part.index)  # mixed, not shard after shard
    assert [set(part) for part in parts] != [set(range(n, n + window)) for n in range(0, 12, window)]


@pytest.mark.parametrize("first_step", [0, 2])
def test_any_number_of_ranks_and_micro_steps_sees_the_same_global_batches(first_step):
    for world, micro in itertools.product((1, 2, 4), (1, 2, 3, 6)):
        schedule = Schedule(
            steps=5,
            global_batch=24,
            micro_batch=micro,
            accumulation=24 // world // micro,
            warmup_steps=1,
            learning_rate=1,
            lora_learning_rate=1,
            weight_decay=0,
        )
        ranks = [list(positions(first_step, schedule, rank, world)) for rank in range(world)]
        assert all(len(batch) == micro for rank in ranks for batch in rank)
        accumulation = schedule.accumulation
        for number, step in enumerate(range(first_step, 5)):
            batches = [rank[number * accumulation : (number + 1) * accumulation] for rank in ranks]
            # Micro-step by micro-step over the ranks: the contrast too is made of the same samples in the same order.
            seen = [p for micro_step in zip(*batches, strict=True) for batch in micro_step for p in batch]
            assert seen == list(range(step * 24, (step + 1) * 24))
        assert all(len(rank) == (5 - first_step) * accumulation for rank in ranks)


# The loader


def draw_words(record, sample, draw):
    return draw_example(record["fields"], record["report"], sample.diagnosis, "demographics", draw, field_dropout=0.4)


def load(index: ShardIndex, batches, threads: int = 2, draw=draw_words, samples=None, **options) -> Loader:
    samples = samples or index.samples("train")
    stream = SampleStream([sample.shard for sample in samples], 0)
    return Loader(Reader(index, threads), samples, stream, tiny_words("tiny"), draw, batches, 5, pin=False, **options)


def endless(size: int):
    return (list(range(first, first + size)) for first in itertools.count(0, size))


def content(batch) -> tuple:
    return (
        [sample.key for sample in batch.samples],
        batch.epochs,
        batch.examples,
        batch.flat.tolist(),
        {name: tensor.tolist() for name, tensor in batch.words.items()},
    )


def test_batches_are_the_same_with_one_and_with_four_threads(shards):
    index = ShardIndex(shards)
    loaders = [load(index, endless(5), threads) for threads in (1, 4)]
    for number in range(6):  # two and a half epochs
        one, four = (content(next(loader)) for loader in loaders)
        assert one == four
        assert len(one[0]) == 5 and one[1] == [place // NUM_BLOBS for place in range(number * 5, number * 5 + 5)]
    for loader in loaders:
        loader.close()


def test_a_batch_holds_the_voxels_and_words_of_its_samples(shards):
    index = ShardIndex(shards)
    loader = load(index, endless(4))
    for _ in range(4):
        batch = next(loader)
        volumes = read(index, batch.samples)
        assert batch.flat.tolist() == np.concatenate([volume.ravel() for volume in volumes]).tolist()
        subjects, keys = [s.subject for s in batch.samples], [s.key for s in batch.samples]
        for key, value in tiny_words("tiny").batch(batch.examples, subjects, keys).items():
            assert torch.equal(batch.words[key], value)
        for sample, example in zip(batch.samples, batch.examples, strict=True):
            assert (
                example.answer
                == {
                    "CN": "Not demented",
                    "MCI": "mild cognitive impairment (MCI)",
                    "AD": "Dementia",
                }[sample.diagnosis]
            )
    loader.close()


def test_a_scan_asked_twice_has_both_questions_and_its_weight_side_by_side(shards):
    """The first question is the one of a run with a single question: asking more changes nothing about it."""
    index = ShardIndex(shards)
    samples = [s._replace(weight=1.0 + n) for n, s in enumerate(index.samples("train"))]
    once, twice = (load(index, endless(3), samples=samples, questions=number) for number in (1, 2))
    differ = 0
    for _ in range(4):
        one, two = next(once), next(twice)
        assert [s.key for s in one.samples] == [s.key for s in two.samples] and torch.equal(one.flat, two.flat)
        assert one.examples == two.examples[::2]
        differ += one.examples != two.examples[1::2]
        batch = to_device(two, index.grid_size, torch.device("cpu"), torch.float32, None)
        assert len(batch.volume_BXYZ) == 3 and len(batch.prompt_ids_BT) == len(batch.answer_ids_BA) == 6
        assert batch.weight_B.tolist() == [s.weight for s in two.samples for _ in range(2)]
        subjects = batch.record_groups_BN[:, 1]
        assert torch.equal(subjects[::2], subjects[1::2])
        assert torch.equal(batch.statement_groups_BN[::2, 1], batch.statement_groups_BN[1::2, 1])
    assert differ
    once.close(), twice.close()


def test_words_depend_on_epoch_and_key_and_not_on_the_batch(shards):
    index = ShardIndex(shards)

    def examples(size: int, count: int) -> dict:
        loader = load(index, endless(size))
        batches = [next(loader) for _ in range(count)]
        loader.close()
        return {(e, s.key): x for b in batches for e, s, x in zip(b.epochs, b.samples, b.examples, strict=True)}

    by_four, by_six = examples(4, 9), examples(6, 6)
    assert by_four == by_six and len(by_four) == 3 * NUM_BLOBS
    assert any(by_four[0, key] != by_four[1, key] for _, key in by_four)  # fields are dropped anew in each epoch


def test_a_damaged_sample_is_left_blank_and_named_and_the_others_are_read(folder, tmp_path):
    copy = shutil.copytree(folder / "zstd", tmp_path / "copy")
    index = ShardIndex(copy)
    damaged = index.samples("train")[0]
    with open(index.shards[damaged.shard], "r+b") as file:
        file.seek(damaged.volume[0])
        file.write(b"\0\0\0\0")
    whole, loader = load(ShardIndex(folder / "zstd"), endless(3)), load(index, endless(3))
    found = {}
    for _ in range(NUM_BLOBS // 3):
        batch, expected = next(loader), next(whole)
        found |= batch.unreadable
        start = 0
        for row, sample in enumerate(batch.samples):
            place = slice(start, start + sample.num_voxels)
            start = place.stop
            if sample.key == damaged.key:
                assert not batch.flat[place].any()
                assert not batch.words["is_answer_BA"][row].any() and not batch.words["is_record_BT"][row].any()
            else:
                assert torch.equal(batch.flat[place], expected.flat[place])
    assert list(found) == [damaged.key] and "damaged" in found[damaged.key]
    loader.close()
    whole.close()


def test_a_record_without_its_fields_is_a_sample_that_cannot_be_read_and_shows_no_text(shards):
    def fail(record, sample, draw):
        raise KeyError("the text of a record")

    loader = load(ShardIndex(shards), endless(3), draw=fail)
    batch = next(loader)
    assert set(batch.unreadable) == {sample.key for sample in batch.samples}
    assert not any("text" in why for why in batch.unreadable.values())
    loader.close()


def test_a_loader_whose_thread_died_says_so_and_one_that_waits_can_be_stopped(shards):
    loader = load(ShardIndex(shards), iter([[0, 1]]))  # its thread ends after one batch
    next(loader)
    with pytest.raises(RuntimeError, match="the loader's thread is dead"):
        next(loader)
    assert loader.next_unless(lambda: True) is None
    loader.close()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_close_ends_the_thread(shards, taken):
    loader = load(ShardIndex(shards), endless(2))
    for _ in range(taken):
        next(loader)
    assert loader._thread.is_alive()
    started = time.monotonic()
    loader.close()
    assert not loader._thread.is_alive() and time.monotonic() - started < 3
    assert "loader" not in [thread.name for thread in threading.enumerate()]


def test_buffers_are_used_again_and_no_more_are_made(shards):
    index = ShardIndex(shards)
    same_shape = [sample for sample in index.samples("train") if sample.shape == index.samples("train")[0].shape]
    loader = load(index, endless(2), samples=same_shape, depth=3)
    held = []  # holding the batches, so that memory cannot be given out twice
    for _ in range(20):
        held.append(next(loader).flat)
    loader.close()
    places = [flat.data_ptr() for flat in held]
    count = len(set(places))
    assert count <= 3 + 4 and places == (places[:count] * 20)[:20]


def test_a_batch_stays_as_it_is_until_the_next_one_is_taken(shards):
    loader = load(ShardIndex(shards), endless(3))
    for _ in range(6):
        batch = next(loader)
        kept = batch.flat.clone()
        time.sleep(0.15)  # the thread reads ahead as far as it can
        assert torch.equal(batch.flat, kept)
    loader.close()


# On the device


def sample(key: str, shape, pad_before) -> Sample:
    return Sample(key, 0, (0, 0), (0, 0), tuple(shape), tuple(pad_before), "custom", "s", None)


def voxels_of(shape, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_unpacking_pads_with_black_and_scales_exactly():
    first, second = voxels_of((4, 6, 3)), voxels_of((8, 8, 8), 1)
    first[0, 0, 0], first[3, 5, 2] = 0, 255
    samples = [sample("a", (4, 6, 3), (1, 0, 4)), sample("b", (8, 8, 8), (0, 0, 0))]
    volume = unpack(torch.cat([first.flatten(), second.flatten()]), samples, 8, CPU, torch.float32)
    expected = np.zeros((2, 8, 8, 8))
    expected[0, 1:5, 0:6, 4:7], expected[1] = first, second
    expected = (expected / 255 - INTENSITY_MEAN) / INTENSITY_STD
    assert volume.shape == (2, 8, 8, 8) and np.abs(volume.numpy() - expected).max() < 1e-6
    outside = torch.ones(8, 8, 8, dtype=torch.bool)
    outside[1:5, 0:6, 4:7] = False
    assert (volume[0][outside] == torch.tensor(PADDING)).all()
    assert volume[0, 1, 0, 4] == pytest.approx(PADDING, abs=1e-6)  # a black voxel is as black as the padding
    half = unpack(torch.cat([first.flatten(), second.flatten()]), samples, 8, CPU, torch.bfloat16)
    assert torch.equal(half, volume.bfloat16())


GRID = 10


def test_a_volume_is_padded_then_changed_then_scaled():
    voxels, corner = voxels_of((5, 8, 7)), (2, 1, 1)
    padded = torch.zeros(GRID, GRID, GRID)
    padded[2:7, 1:9, 1:8] = voxels / 255
    for epoch in range(20):
        seen = unpack(voxels.flatten(), [sample("a", (5, 8, 7), corner)], GRID, CPU, torch.float32, [epoch], 0)
        expected = apply_change(padded, draw_change(sample_draw(0, epoch, "a", "image"), GRID))
        assert torch.allclose(seen[0], (expected - INTENSITY_MEAN) / INTENSITY_STD, atol=1e-5)
        plain = unpack(voxels.flatten(), [sample("a", (5, 8, 7), corner)], GRID, CPU, torch.float32)
        assert not torch.allclose(seen, plain, atol=1e-3)


def test_augmentation_depends_on_seed_epoch_and_key_and_on_nothing_else():
    voxels = voxels_of((5, 8, 7))
    other = voxels_of((9, 9, 9), 1)

    def augmented(seed: int, epoch: int, key: str, batch: int = 1) -> torch.Tensor:
        """Alone, or as the last of a batch."""
        torch.manual_seed(batch)
        flat = torch.cat([other.flatten()] * (batch - 1) + [voxels.flatten()])
        samples = [sample("z", (9, 9, 9), (0, 0, 0))] * (batch - 1) + [sample(key, (5, 8, 7), (2, 1, 1))]
        return unpack(flat, samples, GRID, CPU, torch.float32, [7] * (batch - 1) + [epoch], seed)[-1]

    first = augmented(0, 0, "a")
    assert torch.equal(augmented(0, 0, "a", batch=3), first)
    for change in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        assert not torch.equal(augmented(*change), first)


def test_words_and_image_are_drawn_from_different_sources():
    """Else a flipped image would always come with the same dropped fields."""
    draws = [(sample_draw(0, e, "a", "words").random(), sample_draw(0, e, "a", "image").random()) for e in range(200)]
    assert all(words != image for words, image in draws)
    assert abs(np.corrcoef(np.array(draws).T)[0, 1]) < 0.25


def test_a_sample_of_the_index_is_what_the_shard_says(shards):
    content = json.loads((shards / "index.json").read_bytes())
    by_key = {s["key"]: s for shard in content["shards"] for s in shard["samples"]}
    for found in ShardIndex(shards).samples("train"):
        assert dict(found._asdict(), shard=None) == {
            **{
                name: by_key[found.key][name]
                for name in ("key", "cohort", "subject", "diagnosis", "fingerprint", "record_crc32")
            },
            **{name: tuple(by_key[found.key][name]) for name in ("volume", "record", "shape", "pad_before")},
            "shard": None,
            "weight": 1.0,
        }
