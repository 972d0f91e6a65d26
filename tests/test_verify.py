import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sharding.build import Options as BuildOptions
from sharding.build import build
from sharding.verify import Options, verify


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for n in range(3):
        array = np.random.default_rng(n).integers(1, 900, (20, 20, 18)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([3.0, 3, 3, 1])), folder / f"p{n}.nii")
    (folder / "m.csv").write_text(
        "image,subject_id,split\np0.nii,A,train\np1.nii,B,train\np2.nii,C,val\ngone.nii,D,val\n"
    )
    options = BuildOptions(manifest=folder / "m.csv", out=folder / "shards", size=32, spacing_mm=6.0, shard_samples=2)
    assert build(options) == 0
    return folder / "shards"


@pytest.fixture
def shards(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def change_index(shards: Path, change) -> None:
    index = json.loads((shards / "index.json").read_bytes())
    change(index)
    (shards / "index.json").write_text(json.dumps(index))


def run(shards: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sharding.verify", str(shards)], capture_output=True, text=True)


def test_whole_shards_give_one_line_and_0(shards):
    done = run(shards)
    assert done.returncode == 0
    assert done.stdout == "ok 3 samples (2 train, 1 val) in 2 shards are as index.json says\n"


def test_shards_are_whole_without_the_build_s_own_notes(shards):
    shutil.rmtree(shards / ".parts")
    assert verify(Options(shards))[0] == []


def test_differences_are_listed_and_give_1(shards):
    (shards / "val-00000.tar").unlink()
    (shards / "train-00007.tar").write_bytes(b"")
    done = run(shards)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["train-00007.tar: is not in index.json", "val-00000.tar: missing"]


def test_a_truncated_shard_is_named(shards):
    data = (shards / "train-00000.tar").read_bytes()
    (shards / "train-00000.tar").write_bytes(data[: len(data) // 2])
    (difference,) = verify(Options(shards))[0]
    assert difference.startswith("train-00000.tar: truncated")


@pytest.mark.parametrize("member", ["volume", "record"])
def test_an_altered_shard_is_named_with_its_sample(shards, member):
    sample = json.loads((shards / "index.json").read_bytes())["shards"][0]["samples"][1]
    flip(shards / "train-00000.tar", sample[member][0] + sample[member][1] // 2)
    differences, _ = verify(Options(shards))
    assert any("train-00000.tar: altered" in difference for difference in differences)
    assert any(sample["key"] in difference for difference in differences) or member == "record"


def test_any_flipped_byte_is_found(shards):
    tar = shards / "train-00000.tar"
    whole = tar.read_bytes()
    for position in random.Random(0).sample(range(len(whole)), 40):
        flip(tar, position)
        assert any("train-00000.tar" in difference for difference in verify(Options(shards))[0]), position
        tar.write_bytes(whole)
    assert verify(Options(shards))[0] == []


def test_an_altered_tar_header_is_found(shards):
    flip(shards / "train-00000.tar", 150)  # the first member's checksum
    differences, _ = verify(Options(shards))
    assert any("not a readable tar" in difference or "members" in difference for difference in differences)


INDEX_CHANGES = {
    "diagnosis": lambda index: index["shards"][0]["samples"][0].update(diagnosis="MCI"),
    "shape": lambda index: index["shards"][0]["samples"][0].update(shape=[1, 2, 3]),
    "fingerprint": lambda index: index["shards"][0]["samples"][0].update(fingerprint="0" * 16),
    "offset": lambda index: index["shards"][0]["samples"][0].update(volume=[0, 512]),
    "sha256": lambda index: index["shards"][0].update(sha256="0" * 64),
    "split": lambda index: index["shards"][0].update(split="test"),
    "fewer samples": lambda index: index["shards"][0]["samples"].pop(),
    "fewer shards": lambda index: index["shards"].pop(),
    "order": lambda index: index["shards"][0]["samples"].reverse(),
    "recipe": lambda index: index["recipe"].update(size=33),
    "codec": lambda index: index.update(codec="raw"),
    "format": lambda index: index.update(format=2),
    "no recipe": lambda index: index.pop("recipe"),
}


@pytest.mark.parametrize("change", INDEX_CHANGES)
def test_an_index_that_says_something_else_is_found(shards, change):
    change_index(shards, INDEX_CHANGES[change])
    assert verify(Options(shards))[0]


@pytest.mark.parametrize("name", ["split.csv", "rejected.csv", "index.json"])
def test_a_missing_table_is_named(shards, name):
    (shards / name).unlink()
    assert any(name in difference for difference in verify(Options(shards))[0])


def test_tables_that_disagree_are_found(shards):
    text = (shards / "split.csv").read_text()
    (shards / "split.csv").write_text(text.replace(",C,", ",Z,"))
    assert "split.csv" in verify(Options(shards))[0][0]
    (shards / "split.csv").write_text(text)
    (shards / "rejected.csv").write_text("scan,stage,reason,file\np0.nii,read,gone,p0.nii\n")
    assert "p0.nii" in verify(Options(shards))[0][0]
