import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import webdataset as wds
import zstandard

from medblip.volume import Recipe, prepare
from sharding.build import Options, build
from sharding.manifest import read_manifest

RECIPE = Recipe("standard", 32, 6.0)
AFFINE = np.diag([3.0, 3, 3, 1])
DAMAGED = "p3.nii.gz"


def write_cohort(folder: Path, subjects: int = 5, damaged: tuple[str, ...] = (DAMAGED,)) -> Path:
    """Small images with a record each, in two splits; returns their manifest."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(subjects):
        name = f"p{n}.nii.gz"
        array = np.random.default_rng(n).integers(1, 900, (20, 24 + n % 3, 18)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, AFFINE), folder / name)
        if name in damaged:
            (folder / name).write_bytes((folder / name).read_bytes()[:2000])
        rows.append([name, f"SECRET{n}", "2011-03-04", "AD" if n % 2 else "", 60 + n, "val" if n == 4 else "train"])
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "subject_id", "acquired", "diagnosis", "age_years", "split"], *rows])
    return folder / "manifest.csv"


def options(manifest: Path, out: Path, **changes) -> Options:
    values = dict(size=32, spacing_mm=6.0, shard_samples=2, workers=1) | changes
    return Options(manifest=manifest, out=out, **values)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def built(manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    assert build(options(manifest, out)) == 0
    return out


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sharding.build", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, the youngest generation last."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def test_rebuild_gives_same_bytes_whatever_the_workers(manifest, built, tmp_path):
    assert build(options(manifest, tmp_path / "again", workers=3)) == 0
    assert content(tmp_path / "again") == content(built)
    assert {"index.json", "split.csv", "rejected.csv", "train-00000.tar", "val-00000.tar"} <= content(built).keys()


def test_every_packed_sample_is_its_image_prepared(manifest, built):
    index = json.loads((built / "index.json").read_bytes())
    assert index["recipe"] == RECIPE.to_dict()
    assert index["recipe_id"] == RECIPE.id
    scans = {scan.key: scan for scan in read_manifest(manifest) if scan.image.name != DAMAGED}
    for shard in index["shards"]:
        data = (built / shard["name"]).read_bytes()
        for sample in shard["samples"]:
            scan = scans.pop(sample["key"])
            (begin, size), (record_begin, record_size) = sample["volume"], sample["record"]
            voxels = zstandard.ZstdDecompressor().decompress(data[begin : begin + size])
            record = json.loads(data[record_begin : record_begin + record_size])
            prepared = prepare(scan.image, RECIPE)
            assert voxels == prepared.volume_XYZ.tobytes()
            assert tuple(sample["shape"]) == tuple(record["shape"]) == prepared.volume_XYZ.shape
            assert tuple(sample["pad_before"]) == tuple(record["pad_before"]) == prepared.pad_before
            assert record["affine"] == prepared.affine.tolist()
            assert record["intensity"] == [prepared.intensity_low, prepared.intensity_high]
            assert record["fields"] == scan.fields
            assert (
                (record["diagnosis"], shard["split"])
                == (scan.diagnosis, scan.split)
                == (sample["diagnosis"], scan.split)
            )
    assert not scans


def test_plain_webdataset_reads_the_shards(built):
    index = json.loads((built / "index.json").read_bytes())
    for shard in index["shards"]:
        samples = list(wds.WebDataset(str(built / shard["name"]), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [sample["key"] for sample in shard["samples"]]
        for sample in samples:
            record = json.loads(sample["json"])
            voxels = zstandard.ZstdDecompressor().decompress(sample["vol"])
            assert np.frombuffer(voxels, np.uint8).reshape(record["shape"]).max() == 255


def test_shards_hold_no_ids_dates_or_paths(built, manifest):
    for path in [*built.glob("*.tar"), built / "index.json"]:
        data = path.read_bytes()
        for word in (b"SECRET", b"2011-03-04", b".nii", str(manifest.parent).encode(), b"images"):
            assert word not in data
    with tarfile.open(built / "train-00000.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in archive} == {(0, 0, 0, "root", "root")}


def test_raw_codec_stores_the_voxels_themselves(manifest, tmp_path):
    build(options(manifest, tmp_path, codec="raw", recipe="reference", spacing_mm=None))
    index = json.loads((tmp_path / "index.json").read_bytes())
    shard = index["shards"][0]
    assert index["codec"] == "raw"
    assert all(sample["volume"][1] == np.prod(sample["shape"]) for sample in shard["samples"])


def test_a_bad_scan_leaves_a_gap_and_a_reason(built):
    index = json.loads((built / "index.json").read_bytes())
    with open(built / "rejected.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["scan"], row["stage"]) == (DAMAGED, "prepare")
    assert row["file"].endswith(DAMAGED) and "EOFError" in row["reason"]
    assert sum(len(shard["samples"]) for shard in index["shards"]) == 4
    with open(built / "split.csv", newline="") as file:
        assert [row["scan_id"] for row in csv.DictReader(file)] == ["p0.nii.gz", "p1.nii.gz", "p2.nii.gz", "p4.nii.gz"]


def test_a_pair_is_named_in_split_csv_by_its_voxel_file(tmp_path):
    import hashlib

    nib.save(nib.Nifti1Pair(np.random.default_rng(0).random((20, 20, 20), np.float32), AFFINE), tmp_path / "a.img")
    (tmp_path / "m.csv").write_text("image\na.hdr\n")
    build(options(tmp_path / "m.csv", tmp_path / "out"))
    assert hashlib.sha256((tmp_path / "a.img").read_bytes()).hexdigest() in (tmp_path / "out" / "split.csv").read_text()


def test_running_again_recomputes_nothing_and_restores_what_is_missing(manifest, built, tmp_path):
    out = tmp_path / "shards"
    build(options(manifest, out))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "val-00000.tar").unlink()
    assert build(options(manifest, out, workers=2)) == 0
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert [path.name for path in before if before[path] != after[path]] == ["val-00000.tar"]
    assert content(out) == content(built)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 40}, ["recipe size was 32, now 40"]),
        ({"codec": "raw"}, ["codec was zstd, now raw"]),
        ({"recipe": "reference", "spacing_mm": None}, ["recipe name was standard, now reference"]),
        ({"shard_samples": 3}, ["shard_samples was 2, now 3"]),
        ({"test_cohorts": "X"}, ["test_cohorts"]),
    ],
)
def test_another_build_in_the_same_folder_is_refused_by_name_and_value(manifest, built, change, named):
    before = content(built)
    with pytest.raises(ValueError) as error:
        build(options(manifest, built, **change))
    for text in [str(built), *named]:
        assert text in str(error.value)
    assert content(built) == before


def test_another_manifest_in_the_same_folder_is_refused(built, tmp_path):
    with pytest.raises(ValueError, match="manifest was"):
        build(options(write_cohort(tmp_path / "other", subjects=2), built))


def test_a_folder_with_other_shards_is_refused(manifest, tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"someone else's")
    with pytest.raises(ValueError, match=r"train-00000\.tar"):
        build(options(manifest, tmp_path))


def test_a_folder_is_written_by_one_job(manifest, built):
    with open(built / ".parts" / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build"):
            build(options(manifest, built))


def test_too_many_rejected_is_a_failure_after_the_rest_is_packed(tmp_path, caplog):
    manifest = write_cohort(tmp_path / "images", subjects=21, damaged=("p1.nii.gz", "p2.nii.gz"))
    out = tmp_path / "out"
    caplog.set_level("INFO")
    assert build(options(manifest, out, shard_samples=50)) == 1
    assert any(message.startswith("packed 19, set aside 2 -> ") for message in caplog.messages)
    assert len((out / "split.csv").read_text().splitlines()) == 20
    assert build(options(manifest, out, shard_samples=50, max_rejected=0.1)) == 0


def test_a_build_that_packs_nothing_fails(tmp_path):
    manifest = write_cohort(tmp_path / "images", subjects=1, damaged=("p0.nii.gz",))
    assert build(options(manifest, tmp_path / "out")) == 1
    assert json.loads((tmp_path / "out" / "index.json").read_bytes())["shards"] == []
    assert not list((tmp_path / "out").glob("*.tar"))


def _start_with_a_stuck_scan(folder: Path) -> tuple[subprocess.Popen, Path, int]:
    """A build whose second shard waits on a named pipe in place of an image; returns it, `out`, and the worker."""
    manifest = write_cohort(folder / "images")
    stuck = folder / "images" / "p4.nii.gz"  # the only scan of the split that is packed last
    stuck.rename(folder / "p4.nii.gz")
    os.mkfifo(stuck)
    out = folder / "out"
    arguments = ["--size", "32", "--spacing-mm", "6", "--shard-samples", "2", "--workers", "1"]
    process = start(["--manifest", str(manifest), "--out", str(out), *arguments])
    deadline = time.monotonic() + 60
    while not (out / ".val-00000.tar.tmp").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    return process, out, descendants(process.pid)[-1]


def _repair(folder: Path) -> None:
    (folder / "images" / "p4.nii.gz").unlink()
    (folder / "p4.nii.gz").rename(folder / "images" / "p4.nii.gz")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_dead_worker_is_reported_with_its_scan_and_the_next_run_goes_on(built, tmp_path):
    process, out, worker = _start_with_a_stuck_scan(tmp_path)
    os.kill(worker, signal.SIGKILL)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "'p4.nii.gz' in hand" in log and "-9" in log and "Traceback" not in log

    _repair(tmp_path)
    kept = (out / "train-00000.tar").stat().st_mtime_ns
    assert build(options(tmp_path / "images" / "manifest.csv", out)) == 0
    assert (out / "train-00000.tar").stat().st_mtime_ns == kept
    tars = [name for name in content(built) if name.endswith(".tar")] + ["index.json", "split.csv"]
    assert {name: content(out)[name] for name in tars} == {name: content(built)[name] for name in tars}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_their_parent_and_the_lock_is_free(built, tmp_path):
    process, out, worker = _start_with_a_stuck_scan(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while _is_alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (out / "index.json").exists()

    _repair(tmp_path)
    assert build(options(tmp_path / "images" / "manifest.csv", out)) == 0
    assert content(out)["index.json"] == content(built)["index.json"]
    assert not list(out.glob(".*.tmp"))


def test_command_ends_with_one_summary_line(manifest, tmp_path):
    arguments = ["--manifest", str(manifest), "--out", str(tmp_path / "out"), "--size", "32", "--spacing-mm", "6"]
    process = start(arguments)
    answer, log = process.communicate(timeout=120)
    assert process.returncode == 0
    assert answer.strip() == str(tmp_path / "out")
    rejected = tmp_path / "out" / "rejected.csv"
    assert log.splitlines()[-1] == f"packed 4, set aside 1 -> {rejected} (4 + 1 = 5 in the manifest)"


def test_wrong_usage_is_2_and_wrong_data_is_1(tmp_path):
    process = start(["--manifest", "m.csv", "--out", str(tmp_path), "--shard-sample", "3"])
    assert "--shard-samples" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    process = start(["--manifest", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out")])
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "none.csv" in log and "Traceback" not in log


def test_help_waits_for_no_heavy_library():
    code = "import sys, sharding.build; sys.exit(bool({'torch', 'numpy', 'nibabel', 'webdataset'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
