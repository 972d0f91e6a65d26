"""The reader of shards: what it opens, and which bytes it checks, on hand-packed shards."""

import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from medblip.shards import Reader, ShardIndex
from sharding.pack import encode
from sharding.shard import fingerprint

SHAPE = (17, 24, 20)


def write_shards(folder: Path, codec: str, num_shards: int, per_shard: int = 2) -> list[np.ndarray]:
    """Shards of random voxels and their index.json; returns the volumes in the order of the index."""
    folder.mkdir()
    volumes, entries = [], []
    for number in range(num_shards):
        samples, path = [], folder / f"train-{number:05d}.tar"
        with tarfile.open(path, "w") as archive:
            for row in range(per_shard):
                volume = np.random.default_rng([number, row]).integers(0, 40, SHAPE, np.uint8)
                key = f"{number:08x}{row:08x}"
                places = {}
                record = json.dumps({"key": key, "age_years": 71}).encode()
                for member, content in (
                    ("record", record),
                    ("volume", encode(volume.tobytes(), codec)),
                ):
                    info = tarfile.TarInfo(f"{key}.{member}")
                    info.size = len(content)
                    places[member] = [archive.offset + tarfile.BLOCKSIZE, len(content)]
                    archive.addfile(info, io.BytesIO(content))
                samples.append(
                    {"key": key, "shape": SHAPE, "pad_before": [0, 0, 0], "cohort": "C", "subject": key}
                    | {"diagnosis": None, "fingerprint": fingerprint(volume.tobytes())}
                    | {"record_crc32": zlib.crc32(record), **places}
                )
                volumes.append(volume)
        entries.append({"name": path.name, "split": "train", "bytes": path.stat().st_size, "samples": samples})
    index = {"recipe": {"size": 24}, "recipe_id": "r", "codec": codec, "shards": entries}
    (folder / "index.json").write_text(json.dumps(index))
    return volumes


def open_shards(folder: Path) -> set[int]:
    """Numbers of the shards that this process has open."""
    paths = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            paths.append(Path(os.readlink(link)))
        except FileNotFoundError:  # the descriptor of this listing itself
            continue
    return {int(path.stem.split("-")[1]) for path in paths if path.parent == folder and path.suffix == ".tar"}


@pytest.mark.parametrize("codec", ["zstd", "raw"])
@pytest.mark.parametrize("threads", [1, 3])
def test_voxels_equal_what_was_packed_again_and_again(tmp_path, codec, threads):
    volumes = write_shards(tmp_path / "shards", codec, 3)
    index = ShardIndex(tmp_path / "shards")
    samples = index.samples("train")
    reader = Reader(index, threads)
    flat = np.zeros(len(samples) * volumes[0].size, np.uint8)
    for order in (range(6), [5, 0, 3, 3, 1, 2], range(6)):
        flat[:] = 0
        reader.volumes([samples[i] for i in order], flat)
        assert np.array_equal(flat, np.concatenate([volumes[i].ravel() for i in order]))
        assert [reader.record(samples[i])["key"] for i in order] == [samples[i].key for i in order]
    reader.close()


def test_only_the_expected_shards_are_open(tmp_path):
    folder = tmp_path / "shards"
    volumes = write_shards(folder, "raw", 6)
    index = ShardIndex(folder)
    samples = index.samples("train")
    reader = Reader(index, 2)
    assert open_shards(folder) == set()
    reader.record(samples[0])
    assert open_shards(folder) == {0}
    for expected in ([1, 2, 3], [3, 4, 4, 3], [5]):
        reader.expect(expected)
        assert open_shards(folder) == set(expected)
        mine = [i for i, sample in enumerate(samples) if sample.shard in expected]
        flat = np.zeros(len(mine) * volumes[0].size, np.uint8)
        reader.volumes([samples[i] for i in mine], flat)
        assert np.array_equal(flat, np.concatenate([volumes[i].ravel() for i in mine]))
    reader.volumes([samples[2]], np.zeros(volumes[0].size, np.uint8))  # not expected, opened all the same
    assert open_shards(folder) == {1, 5}
    reader.close()
    assert open_shards(folder) == set()


@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_every_flipped_bit_of_a_volume_is_found(tmp_path, codec):
    volumes = write_shards(tmp_path / "shards", codec, 1, per_shard=1)
    index = ShardIndex(tmp_path / "shards")
    (sample,) = index.samples("train")
    offset, size = sample.volume
    content = bytearray(index.shards[0].read_bytes())
    flat = np.zeros(volumes[0].size, np.uint8)
    for place in [*range(16), *range(16, size - 8, 97), *range(size - 8, size)]:
        for bit in (0, 2, 5, 7):
            altered = content.copy()
            altered[offset + place] ^= 1 << bit
            index.shards[0].write_bytes(altered)
            reader = Reader(index, 1)
            try:
                reader.volumes([sample], flat)
                assert np.array_equal(flat, volumes[0].ravel()), (place, bit)  # a bit that changes no voxel
                assert place < 16
            except ValueError as error:
                assert f"train-00000.tar: sample {sample.key} " in str(error)
            reader.close()


def test_every_flipped_bit_of_a_record_is_found_also_where_it_still_is_json(tmp_path):
    write_shards(tmp_path / "shards", "raw", 1, per_shard=1)
    index = ShardIndex(tmp_path / "shards")
    (sample,) = index.samples("train")
    offset, size = sample.record
    content = bytearray(index.shards[0].read_bytes())
    reader = Reader(index, 1)
    assert reader.record(sample)["age_years"] == 71
    for place in range(size):
        altered = content.copy()
        altered[offset + place] ^= 2
        index.shards[0].write_bytes(altered)
        with pytest.raises(ValueError, match=f"train-00000.tar: the record of {sample.key} is damaged"):
            reader.record(sample)
    reader.close()


@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_a_volume_of_another_size_is_an_error_that_names_both(tmp_path, codec):
    write_shards(tmp_path / "shards", codec, 1)
    index = ShardIndex(tmp_path / "shards")
    sample = index.samples("train")[1]
    reader = Reader(index, 1)
    for wrong in (-1, 1):
        other = sample._replace(shape=(SHAPE[0] + wrong, *SHAPE[1:]))
        with pytest.raises(ValueError, match=rf"sample {sample.key} has {sample.num_voxels} voxels instead of"):
            reader.volumes([other], np.zeros(other.num_voxels, np.uint8))
    reader.close()
