"""A build under kill -9, in parts at once, and of many scans."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_build import content

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

NUM_KILLS = 10  # of the build, and as many of a worker
SHARDS_OF_3 = ["--shard-samples", "3", "--workers", "2"]


def write_cohort(folder: Path, num_scans: int, num_images: int, shape: tuple[int, int, int]) -> Path:
    """A manifest whose scans share a few noise images; one of them is damaged."""
    folder.mkdir()
    for n in range(num_images):
        noise = np.random.default_rng(n).integers(1, 900, shape).astype(np.int16)
        nib.save(nib.Nifti1Image(noise, np.diag([3.0, 3, 3, 1])), folder / f"{n}.nii.gz")
    (folder / "bad.nii.gz").write_bytes((folder / "0.nii.gz").read_bytes()[:1000])
    rows = [[f"s{n}", "bad.nii.gz" if n % 50 == 7 else f"{n % num_images}.nii.gz", n] for n in range(num_scans)]
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["scan_id", "image", "subject_id"], *rows])
    return folder / "manifest.csv"


def start(manifest: Path, out: Path, *more: str, size: str = "96", **kwargs) -> subprocess.Popen:
    spacing_mm = str(200 / int(size))
    command = ["-m", "sharding.build", "--manifest", str(manifest), "--out", str(out), "--size", size]
    command += ["--spacing-mm", spacing_mm, *more]
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers_of(build: subprocess.Popen) -> list[int]:
    """Children of the fork server, which is a child of the build."""
    try:
        return [worker for server in children(build.pid) for worker in children(server)]
    except OSError:
        return []


def wait_for_a_moment(build: subprocess.Popen, out: Path, moments: random.Random) -> None:
    """Returns at some moment from the first worker on: in a scan, between shards, at the tables, or past the end."""
    while build.poll() is None and not workers_of(build):
        time.sleep(0.02)
    wanted = len(list(out.glob(".parts/*-*.json"))) + moments.randrange(3)
    while build.poll() is None and len(list(out.glob(".parts/*-*.json"))) < wanted:
        time.sleep(0.005)
    time.sleep(moments.uniform(0, 0.3))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("kill") / "images", 18, 6, (60, 66, 62))


@pytest.fixture(scope="module")
def undisturbed(cohort, tmp_path_factory) -> dict[str, bytes]:
    """What a build leaves."""
    out = tmp_path_factory.mktemp("undisturbed")
    build = start(cohort, out, *SHARDS_OF_3)
    assert build.wait(120) == 0, build.stdout.read()
    return content(out)


def test_kill_9_of_the_build_at_any_moment_and_the_same_command_gives_the_same_bytes(cohort, undisturbed, tmp_path):
    moments = random.Random(0)
    kills = folder = 0
    while kills < NUM_KILLS:
        out = tmp_path / f"{folder}"
        build = start(cohort, out, *SHARDS_OF_3)
        wait_for_a_moment(build, out, moments)
        build.kill()
        if build.wait() == -signal.SIGKILL:
            kills += 1
        else:  # after several kills it came to its end
            assert content(out) == undisturbed
            folder += 1
    build = start(cohort, out, *SHARDS_OF_3)
    assert build.wait(120) == 0, build.stdout.read()
    assert content(out) == undisturbed
    assert not list(tmp_path.rglob(".*.tmp"))


def test_kill_9_of_a_worker_at_any_moment_gives_the_same_bytes(cohort, undisturbed, tmp_path):
    moments = random.Random(1)
    kills = 0
    for folder in range(NUM_KILLS):
        out = tmp_path / f"{folder}"
        build = start(cohort, out, *SHARDS_OF_3)
        wait_for_a_moment(build, out, moments)
        for worker in workers_of(build)[:1]:
            os.kill(worker, signal.SIGKILL)
            kills += 1
        assert build.wait(120) == 0, build.stdout.read()
        assert content(out) == undisturbed
    assert kills > NUM_KILLS / 2


def test_parts_at_once_and_any_number_of_workers_give_the_same_bytes(cohort, undisturbed, tmp_path):
    parts = [start(cohort, tmp_path / "parts", *SHARDS_OF_3, "--part", f"{part}/3") for part in (1, 2, 3)]
    assert [part.wait(180) for part in parts] == [0, 0, 0]
    assert content(tmp_path / "parts") == undisturbed
    assert start(cohort, tmp_path / "one", *SHARDS_OF_3[:2], "--workers", "1").wait(180) == 0
    assert content(tmp_path / "one") == undisturbed


# Lines come every half second here, and the speed is that of the last 10 s.
TALKATIVE = """
import sharding.workers
sharding.workers.SECONDS_BETWEEN_LINES, sharding.workers.RECENT_S = 0.5, 10
from sharding.build import main
main()
"""


def rss_mb(pid: int) -> float:
    try:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return 0.0


def test_thousands_of_scans_take_no_more_memory_and_the_time_left_is_true(tmp_path):
    num_scans = 6000
    manifest = write_cohort(tmp_path / "images", num_scans, 20, (16, 18, 20))
    command = [sys.executable, "-c", TALKATIVE, "--manifest", str(manifest), "--out", str(tmp_path / "out")]
    command += ["--size", "32", "--spacing-mm", "6", "--workers", "2"]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = []  # share done, seconds left as told, moment, MB of the build, MB of its largest worker
    for line in build.stdout:
        match = re.match(r"([\d,]+) of ([\d,]+) scans \(\d.* set aside\), .* scans/s, about (.+) (s|min|h) left", line)
        if match:
            done, of = (int(number.replace(",", "")) for number in match.groups()[:2])
            assert of == num_scans
            left_s = float(match[3]) * {"s": 1, "min": 60, "h": 3600}[match[4]]
            largest = max([rss_mb(worker) for worker in workers_of(build)] or [0.0])
            told.append((done / of, left_s, time.monotonic(), rss_mb(build.pid), largest))
        last = line
    ended_at = time.monotonic()
    assert build.wait() == 0, last
    assert re.search(rf"\+ {num_scans // 50} = {num_scans} in the manifest", last) or last.strip().endswith("out")

    quarter = next(row for row in told if row[0] >= 0.25)
    for column in (3, 4):
        assert max(row[column] for row in told if row[0] >= 0.25) - quarter[column] < 50
    # Half way: what is told is near what it then took; tests/test_build.py has the sum itself, by a clock of its own.
    middle = [row for row in told if 0.4 < row[0] < 0.6]
    told_left_s, took_s = np.mean([row[1] for row in middle]), np.mean([ended_at - row[2] for row in middle])
    assert 0.4 < told_left_s / took_s < 2.5
