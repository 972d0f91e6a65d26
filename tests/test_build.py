import csv
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import webdataset as wds
import zstandard

from medblip.volume import Recipe, prepare
from sharding.build import Options, build
from sharding.manifest import read_manifest
from sharding.shard import fingerprint

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
    assert row["file"].endswith(DAMAGED) and "gzip" in row["reason"]
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


HOLDER = """
import sys, time
from pathlib import Path
from sharding.locks import Locks
with Locks(Path(sys.argv[1])) as locks:
    locks.to_write(int(sys.argv[2]), sys.argv[3:])
    print("locked", flush=True)
    time.sleep(600)
"""


@contextmanager
def held(out: Path, first: int, *names: str):
    """Another process writes the shards from number `first` on."""
    environment = os.environ | {"SLURM_ARRAY_JOB_ID": "45", "SLURM_ARRAY_TASK_ID": "2"}
    command = [sys.executable, "-c", HOLDER, str(out), str(first), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == "locked\n"
        yield holder
        holder.kill()


def test_a_shard_is_written_by_one_build_and_the_other_is_named(manifest, tmp_path):
    with held(tmp_path, 1, "train-00001") as holder:
        for change in ({}, {"part": "1/1"}, {"part": "1/2"}, {"finish": True}):
            with pytest.raises(ValueError) as error:
                build(options(manifest, tmp_path, shard_samples=1, **change))
            for text in (str(tmp_path), "train-00001", f"process {holder.pid}", "Slurm job 45_2"):
                assert text in str(error.value)
    assert build(options(manifest, tmp_path, shard_samples=1)) == 0


def test_parts_of_one_build_do_not_wait_for_each_other(manifest, tmp_path, caplog):
    caplog.set_level("INFO")
    with held(tmp_path, 1, "train-00001"):
        assert build(options(manifest, tmp_path, shard_samples=1, part="5/5")) == 0
    assert "part 5/5: packed 1, set aside 0 (1 + 0 = 1 in this part)" == caplog.messages[-1]
    assert not (tmp_path / "index.json").exists()


def test_the_part_that_ends_last_finishes_the_folder(manifest, built, tmp_path, caplog):
    caplog.set_level("INFO")
    for part in ("2/2", "1/2"):
        assert not (tmp_path / "index.json").exists()
        assert build(options(manifest, tmp_path, part=part)) == 0
    assert content(tmp_path) == content(built)
    rejected = tmp_path / "rejected.csv"
    assert re.fullmatch(r"part 1/2: packed \d, set aside \d.* \(\d \+ \d = 2 in this part\)", caplog.messages[-2])
    assert caplog.messages[-1] == f"packed 4, set aside 1 -> {rejected} (4 + 1 = 5 in the manifest)"


def test_more_parts_than_shards_is_no_fault(manifest, built, tmp_path):
    for part in range(1, 8):
        assert build(options(manifest, tmp_path, part=f"{part}/7")) == 0
    assert content(tmp_path) == content(built)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/2/3", "-1/3"])
def test_a_part_that_is_none_is_refused(manifest, tmp_path, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        build(options(manifest, tmp_path, part=part))


def test_finish_names_what_is_missing_and_the_command_that_packs_it(manifest, built, tmp_path):
    build(options(manifest, tmp_path, part="1/2"))
    with pytest.raises(ValueError, match="shards are missing") as error:
        build(options(manifest, tmp_path, finish=True))
    command = shlex.split(str(error.value).partition("this packs them: ")[2])
    assert "val-00000" in str(error.value)
    assert command[:3] == ["python", "-m", "sharding.build"] and "--finish" not in command
    assert subprocess.run([sys.executable, *command[1:]]).returncode == 0
    (tmp_path / "index.json").unlink()
    assert build(options(manifest, tmp_path, finish=True)) == 0
    assert content(tmp_path) == content(built)


def test_a_tar_too_many_or_another_s_shard_is_refused_at_the_end(manifest, built, tmp_path):
    out = Path(shutil.copytree(built, tmp_path / "shards"))
    shutil.copy(out / "val-00000.tar", out / "val-00001.tar")
    with pytest.raises(ValueError, match=r"val-00001\.tar"):
        build(options(manifest, out, finish=True))
    (out / "val-00001.tar").unlink()
    notes = out / ".parts" / "train-00001.json"
    notes.write_bytes((out / ".parts" / "train-00000.json").read_bytes())
    shutil.copy(out / "train-00000.tar", out / "train-00001.tar")
    with pytest.raises(ValueError, match=r"does not hold its own scans"):
        build(options(manifest, out, finish=True))
    notes.unlink()
    assert build(options(manifest, out)) == 0
    assert content(out) == content(built)


def test_retry_rejected_packs_mended_files_as_if_they_had_never_been_bad(tmp_path):
    manifest = write_cohort(tmp_path / "images", damaged=())
    assert build(options(manifest, tmp_path / "fresh")) == 0
    whole = (tmp_path / "images" / DAMAGED).read_bytes()
    (tmp_path / "images" / DAMAGED).unlink()
    (tmp_path / "images" / "p4.nii.gz").rename(tmp_path / "p4.nii.gz")
    out = tmp_path / "out"
    build(options(manifest, out))
    with open(out / "rejected.csv", newline="") as file:
        rows = [(row["scan"], row["stage"]) for row in csv.DictReader(file)]
    assert rows == [(DAMAGED, "read"), ("p4.nii.gz", "read")]

    (tmp_path / "images" / DAMAGED).write_bytes(whole)
    (tmp_path / "p4.nii.gz").rename(tmp_path / "images" / "p4.nii.gz")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert build(options(manifest, out)) == 0  # without the option what is set aside stays so
    assert "p4" in (out / "rejected.csv").read_text()
    assert build(options(manifest, out, retry_rejected=True)) == 0
    assert content(out) == content(tmp_path / "fresh")
    assert sum(path.stat().st_mtime_ns == before[path] for path in before) == 1


def test_masks_come_from_a_column_and_a_row_without_one_is_set_aside(tmp_path):
    manifest = write_cohort(tmp_path / "images", damaged=())
    rows = list(csv.reader(manifest.read_text().splitlines()))
    for row in rows[1:]:
        image = nib.load(tmp_path / "images" / row[0])
        mask = np.zeros(image.shape, np.uint8)
        mask[4:16, 5:20, 3:15] = 1
        nib.save(nib.Nifti1Image(mask, AFFINE), tmp_path / "images" / f"mask-{row[0]}")
        row.append("" if row[0] == DAMAGED else f"mask-{row[0]}")
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([[*rows[0], "brain"], *rows[1:]])

    with pytest.raises(ValueError, match="--mask-column 'brian'"):
        build(options(manifest, tmp_path / "out", mask_column="brian"))
    assert build(options(manifest, tmp_path / "out", mask_column="brain")) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_bytes())
    recipe = Recipe("standard", 32, 6.0, brain_mask=True)
    assert index["recipe"] == recipe.to_dict()
    fingerprints = {sample["key"]: sample["fingerprint"] for shard in index["shards"] for sample in shard["samples"]}
    for scan in read_manifest(manifest):
        if scan.image.name != DAMAGED:
            prepared = prepare(scan.image, recipe, scan.image.with_name(f"mask-{scan.image.name}"))
            assert fingerprints.pop(scan.key) == fingerprint(prepared.volume_XYZ.tobytes())
    assert not fingerprints
    with open(tmp_path / "out" / "rejected.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["scan"], row["stage"]) == (DAMAGED, "read") and "'brain'" in row["reason"]
    with pytest.raises(ValueError, match="mask_column was brain, now None"):
        build(options(manifest, tmp_path / "out"))


def test_a_scan_that_may_not_be_read_is_set_aside_with_one_line(tmp_path):
    manifest = write_cohort(tmp_path / "images", damaged=())
    (tmp_path / "images" / "p0.nii.gz").unlink()
    (tmp_path / "images" / "p0.nii.gz").symlink_to("p0.nii.gz")
    build(options(manifest, tmp_path / "out"))
    lines = (tmp_path / "out" / "rejected.csv").read_text().splitlines()
    assert lines[0] == "scan,stage,reason,file"
    assert len(lines) == 2 and lines[1].startswith("p0.nii.gz,read,") and "symbolic links" in lines[1]


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


class StuckFile:
    """A file that nobody can open, for up to 45 s or until `mend`: this process holds a lease on it."""

    def __init__(self, path: Path):
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel says that someone waits
        self._file = os.open(path, os.O_RDONLY)
        fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def mend(self) -> None:
        os.close(self._file)


class StuckBuild:
    """A build whose last shard waits for an image that cannot be opened."""

    def __init__(self, folder: Path):
        self.out = folder / "out"
        self.manifest = write_cohort(folder / "images")
        self._image = StuckFile(folder / "images" / "p4.nii.gz")  # the only scan of the split that is packed last
        self.mend = self._image.mend
        arguments = ["--size", "32", "--spacing-mm", "6", "--shard-samples", "2", "--workers", "1"]
        self.process = start(["--manifest", str(self.manifest), "--out", str(self.out), *arguments])

    def stuck_worker(self, but: int = 0) -> int:
        """The worker that is stuck, once it is, and is another than `but`."""
        deadline = time.monotonic() + 60
        while True:
            assert time.monotonic() < deadline and self.process.poll() is None
            stuck = {int(path.name.split("-")[-1].split(".")[0]) for path in self.out.glob(".val-00000.tar.*.tmp")}
            stuck = {pid for pid in stuck - {but} if _is_alive(pid)}
            if stuck:
                time.sleep(0.3)
                return stuck.pop()
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """The exit status and the log."""
        log = self.process.communicate(timeout=60)[1]
        return self.process.returncode, log


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def stuck(tmp_path):
    build = StuckBuild(tmp_path)
    yield build
    build.process.kill()
    build.process.communicate()


@reads_proc
def test_a_worker_that_is_killed_costs_nothing(stuck, built):
    worker = stuck.stuck_worker()
    stuck.mend()  # before the next one opens it
    os.kill(worker, signal.SIGKILL)
    status, log = stuck.end()
    assert status == 0
    assert "'p4.nii.gz' in hand" in log and "SIGKILL: out of memory?" in log and "Traceback" not in log
    assert content(stuck.out)["index.json"] == content(built)["index.json"]


@reads_proc
def test_a_scan_that_crashes_two_workers_is_set_aside_and_the_rest_goes_on(stuck, built):
    worker = 0
    for _ in range(2):
        worker = stuck.stuck_worker(but=worker)
        os.kill(worker, signal.SIGSEGV)
    status, log = stuck.end()
    assert status == 0 and "the scan is set aside" in log
    with open(stuck.out / "rejected.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert (row["scan"], row["stage"]) == ("p4.nii.gz", "worker") and "SIGSEGV" in row["reason"]

    stuck.mend()
    assert build(options(stuck.manifest, stuck.out, retry_rejected=True)) == 0
    for name in ("index.json", "split.csv", "train-00000.tar", "val-00000.tar"):
        assert content(stuck.out)[name] == content(built)[name]


@reads_proc
def test_a_scan_whose_workers_are_killed_stops_the_build_and_the_next_run_goes_on(stuck, built):
    worker = 0
    for _ in range(3):
        worker = stuck.stuck_worker(but=worker)
        os.kill(worker, signal.SIGKILL)
    status, log = stuck.end()
    assert status == 1
    assert "'p4.nii.gz'" in log.splitlines()[-1] and "--workers" in log.splitlines()[-1] and "Traceback" not in log
    assert not (stuck.out / "index.json").exists() and not list(stuck.out.glob(".*.tmp"))

    stuck.mend()
    kept = (stuck.out / "train-00000.tar").stat().st_mtime_ns
    assert build(options(stuck.manifest, stuck.out)) == 0
    assert (stuck.out / "train-00000.tar").stat().st_mtime_ns == kept
    assert content(stuck.out)["index.json"] == content(built)["index.json"]


@reads_proc
@pytest.mark.slow
@pytest.mark.parametrize("first_the_server", [False, True], ids=["alone", "after their fork server"])
def test_workers_die_with_their_parent_and_the_locks_are_free(stuck, built, first_the_server):
    worker = stuck.stuck_worker()
    if first_the_server:
        server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGKILL)
        time.sleep(0.3)
        assert _is_alive(worker)
    stuck.process.kill()
    stuck.process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while _is_alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (stuck.out / "index.json").exists()

    stuck.mend()
    assert build(options(stuck.manifest, stuck.out)) == 0
    assert content(stuck.out)["index.json"] == content(built)["index.json"]
    assert not list(stuck.out.glob(".*.tmp"))


@reads_proc
@pytest.mark.slow
def test_a_worker_can_be_replaced_after_its_fork_server_was_killed(stuck, built):
    worker = stuck.stuck_worker()
    os.kill(int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    stuck.mend()
    os.kill(worker, signal.SIGKILL)
    status, log = stuck.end()
    assert status == 0, log
    assert content(stuck.out)["index.json"] == content(built)["index.json"]


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_next_run_goes_on(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    manifest = write_cohort(tmp_path / "images", damaged=())
    assert build(options(manifest, tmp_path / "fresh", size=128, spacing_mm=1.5)) == 0
    small = tmp_path / "small"
    small.mkdir()
    arguments = ["--manifest", str(manifest), "--out", str(small / "out"), "--size", "128", "--spacing-mm", "1.5"]
    arguments += ["--shard-samples", "2", "--workers", "2"]
    size = sum(path.stat().st_size for path in (tmp_path / "fresh").glob("*.tar"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 0.7)}", "none", small], check=True)
    try:
        process = start(arguments)
        log = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        last = log.splitlines()[-1]
        assert str(small / "out") in last and "No space left on device" in last and "Traceback" not in log
        assert not list((small / "out").rglob(".*.tmp"))
        for tar in (small / "out").glob("*.tar"):
            assert tar.read_bytes() == (tmp_path / "fresh" / tar.name).read_bytes()

        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        process = start(arguments)
        log = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and "Read-only file system" in log and "Traceback" not in log

        subprocess.run(["mount", "-o", f"remount,rw,size={size * 2 + 2**20}", small], check=True)
        process = start(arguments)
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert content(small / "out") == content(tmp_path / "fresh")
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_command_ends_with_one_summary_line(manifest, tmp_path):
    arguments = ["--manifest", str(manifest), "--out", str(tmp_path / "out"), "--size", "32", "--spacing-mm", "6"]
    process = start(arguments)
    answer, log = process.communicate(timeout=120)
    assert process.returncode == 0
    assert answer.strip() == str(tmp_path / "out")
    rejected = tmp_path / "out" / "rejected.csv"
    assert log.splitlines()[-1] == f"packed 4, set aside 1 -> {rejected} (4 + 1 = 5 in the manifest)"


def test_time_left_is_told_from_the_speed_of_the_last_minutes(monkeypatch, caplog):
    from sharding import workers

    clock_s = [1000.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock_s[0])
    progress = workers.Progress(total=10_000, num_done=2000, num_aside=0)
    with caplog.at_level("INFO"):
        for second in range(1, 601):  # 20 scans/s in the first five minutes, then 5
            clock_s[0] = 1000.0 + second
            progress.add(20 if second <= 300 else 5, 0)
            progress.show([])
    lines = [record.getMessage() for record in caplog.records if "left" in record.getMessage()]
    assert "20 scans/s" in lines[0]
    assert re.search(r"9,\d\d\d of 10,000 scans, 5 scans/s", lines[-1]), lines[-1]
    num_done, told = re.search(r"^([\d,]+) of .* about (\d+) (?:s|min) left", lines[-1]).groups()
    left_s = (10_000 - int(num_done.replace(",", ""))) / 5
    assert int(told) == pytest.approx(left_s if left_s < 90 else left_s / 60, abs=0.6)


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
