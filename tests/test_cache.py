"""Shards behind a URL: read from a real HTTP server that misbehaves as told, and from an S3 server."""

import csv
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, require_tool
from tiny import tiny_words

from medblip import remote
from medblip.data import Loader, SampleStream
from medblip.shards import Reader, ShardIndex
from medblip.text import draw_example

NUM_BLOBS, PER_SHARD = 10, 2
BLOCK_BYTES = 4096  # several to a shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five shards of two small blobs each, zstd."""
    folder = tmp_path_factory.mktemp("shards")
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "subject_id", "diagnosis", "split", "age_years"])
        for number in range(NUM_BLOBS):
            voxels = np.random.default_rng(number).integers(20, 900, (22 + number % 3, 24, 20)).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([6, 6, 6, 1])), folder / f"{number}.nii")
            writer.writerow([f"{number}.nii", f"p{number}", ("CN", "MCI", "AD")[number % 3], "train", 60 + number])
    command = f"-m sharding.build --manifest {folder}/manifest.csv --out {folder}/shards --size 48 --spacing-mm 4"
    command += f" --shard-samples {PER_SHARD} --workers 1"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, capture_output=True)
    return folder / "shards"


class Server(ThreadingHTTPServer):
    """Serves a folder, and does to shards what a test tells it to."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.ranges = True
        self.cut = self.corrupt = self.busy = 0
        """So many of the next answers with a shard are cut in half, have a byte altered, or are 503, even to HEAD."""
        self.stall = False
        """Answers with a shard stop half-way and stay open."""
        self.redirect_to = None
        self.asked: list[tuple[str, int]] = []
        """Name of a file and first byte, of every GET."""

    def handle_error(self, request, client_address):
        pass  # the client went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        server, name = self.server, self.path.lstrip("/").partition("?")[0]
        if server.redirect_to and name.endswith(".tar") and "?" not in self.path:
            return self.head(302, {"Location": server.redirect_to, "Content-Length": 0})
        if "?" in self.path or not (server.folder / name).is_file():
            return self.head(403 if "?" in self.path else 404, {"Content-Length": 0})
        if server.busy and name.endswith(".tar"):
            server.busy -= 1
            return self.head(503, {"Content-Length": 0})
        content = (server.folder / name).read_bytes()
        total, (first, last) = len(content), (0, len(content) - 1)
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and server.ranges:
            first, last = int(asked[1]), min(int(asked[2]), last)
        body = bytearray(content[first : last + 1])
        if with_body:
            server.asked.append((name, first))
        spoilt = with_body and name.endswith(".tar")
        if spoilt and server.corrupt:
            server.corrupt -= 1
            body[len(body) // 2] ^= 1
        more = {"Content-Range": f"bytes {first}-{last}/{total}"} if asked and server.ranges else {}
        self.head(206 if more else 200, {"Content-Length": len(body), **more})
        if not with_body:
            return
        if spoilt and (server.stall or server.cut):
            self.wfile.write(body[: len(body) // 2])
            while server.stall:
                time.sleep(0.05)
            server.cut = max(0, server.cut - 1)
            self.close_connection = True
            return
        self.wfile.write(body)

    def head(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(shards):
    server = Server(shards)
    threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.05), daemon=True).start()
    yield server
    server.stall = False
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MEDBLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDBLIP_CACHE_GB", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def s3(shards, monkeypatch):
    """URL of a bucket with the shards."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "hush-hush"}
    for name, value in {**settings, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="scans")
    for path in (shards / "index.json", *shards.glob("*.tar")):
        client.upload_file(str(path), "scans", f"packed/shards/{path.name}")
    yield "s3://scans/packed/shards"
    server.stop()


def everything(folder) -> list[tuple]:
    """Record and voxels of every sample, shard after shard."""
    index = ShardIndex(folder)
    reader = Reader(index, 2)
    content = []
    try:
        for sample in index.samples("train"):
            reader.expect([sample.shard])
            flat = np.zeros(sample.num_voxels, np.uint8)
            reader.volumes([sample], flat)
            content.append((sample.key, reader.record(sample), hashlib.sha256(flat).hexdigest()))
    finally:
        reader.close()
    return content


def kept(cache: Path) -> set[str]:
    """The sha256 of the shards in the cache."""
    return {path.stem for path in cache.glob("*.tar")}


def unfinished(cache: Path) -> list[Path]:
    return list(cache.glob(".*.part"))


def sha256_of_shards(shards: Path) -> list[str]:
    return [shard["sha256"] for shard in json.loads((shards / "index.json").read_bytes())["shards"]]


# Reading


@pytest.mark.parametrize("ranges", [True, False])
def test_samples_over_http_equal_the_local_ones_and_are_fetched_once(server, shards, cache, ranges):
    server.ranges = ranges
    local = everything(shards)
    assert len(local) == NUM_BLOBS and not cache.exists()
    assert everything(server.url) == local
    assert kept(cache) == set(sha256_of_shards(shards)) and not unfinished(cache)
    server.asked.clear()
    assert everything(server.url + "/") == local
    assert [name for name, _ in server.asked] == ["index.json"]


def test_samples_in_a_bucket_equal_the_local_ones(s3, shards, cache, caplog):
    with caplog.at_level(logging.DEBUG, "medblip"):
        assert everything(s3) == everything(shards)
    assert kept(cache) == set(sha256_of_shards(shards)) and not unfinished(cache)
    assert "hush" not in caplog.text
    with pytest.raises(ValueError, match=r"s3://scans/nothing/index.json cannot be fetched: FileNotFoundError"):
        ShardIndex("s3://scans/nothing")


def test_the_loader_fetches_the_next_window_while_this_one_is_read(server):
    index = ShardIndex(server.url)
    samples = index.samples("train")
    stream = SampleStream([sample.shard for sample in samples], 0, window_shards=2)
    order = [samples[stream.at(position)[1]].shard for position in range(NUM_BLOBS)]
    assert set(stream.shards_from(0)) == set(order[:8]) and set(stream.shards_from(0)[:2]) == set(order[:4])
    assert set(stream.shards_from(5)) == set(order[4:]) and len(set(stream.shards_from(9))) in (2, 3)

    def draw(record, sample, source):
        return draw_example(record["fields"], record["report"], sample.diagnosis, "demographics", source)

    batches = ([position] for position in itertools.count())
    loader = Loader(Reader(index, 1), samples, stream, tiny_words("tiny"), draw, batches, 0, pin=False, depth=1)
    next(loader)
    deadline = time.monotonic() + 20
    while len(fetched := {name for name, _ in server.asked} - {"index.json"}) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fetched == {Path(index.shards[shard]).name for shard in order[:8]}
    for position in range(1, 2 * NUM_BLOBS):
        assert next(loader).samples == [samples[stream.at(position)[1]]]
    loader.close()


def test_plain_webdataset_reads_the_shards_with_the_ten_lines_of_the_docs(server, shards):
    require_tool("curl", "apt-get install curl")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    index = ShardIndex(shards)
    reader = Reader(index, 1)
    expected = {sample.key: sample for sample in index.samples("train")}
    files = sorted(shards.glob("*.tar"))
    for urls in ([str(file) for file in files], [f"{server.url}/{file.name}" for file in files]):
        found = dict((record["key"], grid) for record, grid in names["volumes"](urls, index.grid_size))
        assert set(found) == set(expected)
        for key, sample in expected.items():
            part = np.zeros(sample.shape, np.uint8)
            reader.volumes([sample], part.reshape(-1))
            place = tuple(slice(p, p + n) for p, n in zip(sample.pad_before, sample.shape, strict=True))
            assert np.array_equal(found[key][place], part) and found[key].sum() == part.sum(dtype=np.int64)
    reader.close()


@pytest.mark.slow
def test_train_takes_a_url(server, tmp_path):
    command = f"train.py --deepspeed_config ds_configs/zero2_fp32.json --data {server.url} --run {tmp_path}/run"
    done = subprocess.run(
        [sys.executable, *command.split(), "--dry-run", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(set(re.findall(r"^--- (\w{16})  cohort", done.stdout, re.M))) == 2


# Connections


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_taken_up_again(server, shards, caplog, ranges):
    server.ranges, server.cut = ranges, 3
    assert everything(server.url) == everything(shards)
    starts = Counter(start for name, start in server.asked if name == server.asked[1][0])
    if ranges:  # every block but the cut one is asked for once
        assert caplog.text.count("again in") == 3
        assert len(starts) > 3 and set(starts) == set(range(0, max(starts) + 1, BLOCK_BYTES))
        assert sorted(starts.values())[-1] == 4 and sorted(starts.values())[-2] == 1
    else:
        assert "again in" in caplog.text and server.cut == 0 and set(starts) == {0}


def test_a_busy_server_is_asked_again(server, shards):
    server.busy = 4  # fsspec asks by HEAD and then by GET for the size of a file
    assert everything(server.url) == everything(shards)


def test_a_server_that_stays_cut_off_is_an_error_after_growing_waits(server, cache, monkeypatch):
    server.cut = 10**6
    waits = []
    monkeypatch.setattr(remote, "_wait", lambda seconds, stop: waits.append(seconds) if seconds else None)
    with pytest.raises(ValueError, match=rf"{server.url}/train-00000.tar cannot be fetched: ClientPayloadError.*check"):
        everything(server.url)
    assert len(waits) == remote.SHARD_TRIES - 1
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(waits))
    assert not kept(cache) and not unfinished(cache)


def test_what_is_not_there_is_an_error_at_once(server, tmp_path, shards):
    with pytest.raises(ValueError, match=r"/index.json cannot be fetched: FileNotFoundError"):
        ShardIndex(f"{server.url}/elsewhere")
    server.folder = tmp_path
    (tmp_path / "index.json").write_bytes((shards / "index.json").read_bytes())
    with pytest.raises(ValueError, match=r"/train-00000.tar cannot be fetched: ClientResponseError 404"):
        everything(server.url)
    assert not server.asked[2:]  # no second try
    content = (shards / "train-00000.tar").read_bytes()
    size = len(content)
    (tmp_path / "train-00000.tar").write_bytes(content[:-512])
    with pytest.raises(ValueError, match=rf"train-00000.tar: {size - 512} where index.json says {size} bytes"):
        everything(server.url)


def test_nobody_at_the_address_and_an_unknown_kind_of_url_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/x/index.json cannot be fetched: ClientConnector"):
        ShardIndex("http://127.0.0.1:9/x")
    with pytest.raises(ValueError, match="gopher"):
        ShardIndex("gopher://somewhere/shards")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ValueError, match=r"pip install 'medblip\[remote\]'"):
        ShardIndex("https://somewhere/shards")


def test_secrets_stay_out_of_errors_and_logs(server, caplog):
    for url in ("https://me:s3cret@host/shards", "https://host/shards?sig=s3cret"):
        with pytest.raises(ValueError, match="leave passwords and tokens out of the URL") as refused:
            ShardIndex(url)
        assert "s3cret" not in str(refused.value)
    server.redirect_to = f"{server.url}/signed?X-Amz-Signature=s3cret"
    with pytest.raises(ValueError, match=r"train-00000.tar cannot be fetched: .*403") as failed:
        everything(server.url)
    assert "s3cret" not in str(failed.value) + caplog.text and failed.value.__cause__ is None


# Bytes


def test_an_altered_byte_is_fetched_again(server, shards, cache, caplog):
    server.corrupt = 1
    assert everything(server.url) == everything(shards)
    assert "train-00000.tar: bytes were altered on the way" in caplog.text
    assert kept(cache) == set(sha256_of_shards(shards))


def test_bytes_that_stay_altered_are_an_error_with_both_hashes(server, shards, cache):
    server.corrupt = 10**6
    expected = sha256_of_shards(shards)[0]
    with pytest.raises(ValueError, match=rf"train-00000.tar is damaged: sha256 [0-9a-f]{{64}} twice.* {expected}") as e:
        everything(server.url)
    assert len(set(re.findall(r"[0-9a-f]{64}", str(e.value)))) == 2
    assert not kept(cache) and not unfinished(cache)


# Processes

READ_ALL = """
import sys, numpy as np
from medblip.shards import Reader, ShardIndex
index = ShardIndex(sys.argv[1])
samples = index.samples("train")
reader = Reader(index, 1)
reader.expect(sample.shard for sample in samples)
flat = np.zeros(sum(sample.num_voxels for sample in samples), np.uint8)
reader.volumes(samples, flat)
print(flat.sum(dtype=np.int64))
reader.close()
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_that_want_the_same_shards_fetch_each_of_them_once(server, cache):
    readers = [start(READ_ALL, server.url) for _ in range(3)]
    answers = {reader.communicate(timeout=60)[0] for reader in readers}
    assert [reader.returncode for reader in readers] == [0, 0, 0] and len(answers) == 1
    fetched = Counter(name for name, _ in server.asked)
    assert fetched.pop("index.json") == 3
    assert len(fetched) == NUM_BLOBS // PER_SHARD and set(fetched.values()) == {1}
    assert not unfinished(cache)


def test_killed_while_fetching_leaves_nothing_that_the_next_one_minds(server, shards, cache):
    server.stall = True
    killed = start(READ_ALL, server.url)
    deadline = time.monotonic() + 30
    while not unfinished(cache) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert unfinished(cache) and not kept(cache)
    server.stall = False
    assert everything(server.url) == everything(shards)
    assert not unfinished(cache) and kept(cache) == set(sha256_of_shards(shards))


def test_a_download_does_not_keep_a_program_from_ending(server):
    server.stall = True
    code = READ_ALL.split("flat =")[0] + "import time; time.sleep(0.5); reader.close()"
    started_at = time.monotonic()
    assert start(code, server.url).wait(timeout=30) == 0
    assert time.monotonic() - started_at < 20


# Size


def test_the_cache_keeps_to_its_size_and_drops_what_was_opened_longest_ago(server, shards, cache, monkeypatch):
    sizes = [shard.stat().st_size for shard in sorted(shards.glob("*.tar"))]
    monkeypatch.setenv("MEDBLIP_CACHE_GB", str((sum(sorted(sizes)[-3:]) + 100) / 1e9))  # three of five
    index = ShardIndex(server.url)
    hashes = sha256_of_shards(shards)
    reader = Reader(index, 1)
    for shard in (0, 1, 2, 0, 3, 4):
        reader.expect([shard])
        reader.record(next(sample for sample in index.samples("train") if sample.shard == shard))
        assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= index.cache.limit_bytes
    assert kept(cache) == {hashes[0], hashes[3], hashes[4]}
    reader.close()


def test_a_shard_that_is_open_is_not_removed_and_others_wait_for_room(server, shards, cache, monkeypatch):
    largest = max(shard.stat().st_size for shard in shards.glob("*.tar"))
    monkeypatch.setenv("MEDBLIP_CACHE_GB", str((largest + 100) / 1e9))  # one
    index = ShardIndex(server.url)
    first, last = index.samples("train")[0], index.samples("train")[-1]
    holder, other = Reader(index, 1), Reader(index, 1)
    holder.record(first)
    other.expect([last.shard])
    time.sleep(0.5)
    assert kept(cache) == {sha256_of_shards(shards)[0]}
    holder.expect([])
    assert other.record(last)["key"] == last.key
    assert kept(cache) == {sha256_of_shards(shards)[-1]}
    holder.close(), other.close()


def test_no_room_at_all_is_an_error_that_says_how_much_is_needed(server, shards, monkeypatch):
    from medblip import cache as caching

    sizes = [shard.stat().st_size for shard in shards.glob("*.tar")]
    monkeypatch.setenv("MEDBLIP_CACHE_GB", str((max(sizes) + 100) / 1e9))
    index = ShardIndex(server.url)
    reader = Reader(index, 1)
    with pytest.raises(ValueError, match=r"may hold .* GB, but .* are .* GB; set MEDBLIP_CACHE_GB to at least 0.00"):
        reader.expect([0, 1, 2])
    monkeypatch.setattr(caching, "ROOM_WAIT_S", 0.2)
    reader.record(index.samples("train")[0])
    with pytest.raises(ValueError, match=r"is full of shards that running jobs read; set MEDBLIP_CACHE_GB"):
        Reader(index, 1).record(index.samples("train")[-1])
    reader.close()


@pytest.mark.parametrize("given", ["0", "-3", "lots", "nan"])
def test_a_size_that_is_none_is_refused(server, monkeypatch, given):
    monkeypatch.setenv("MEDBLIP_CACHE_GB", given)
    with pytest.raises(ValueError, match=rf"MEDBLIP_CACHE_GB={given}"):
        ShardIndex(server.url)


def test_the_cache_is_its_owners_alone(server, cache):
    everything(server.url)
    assert os.stat(cache).st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in cache.glob("*.tar"))
