"""slurm/stage.sh: the copy of the shards on a node's own disk is whole, or it is said that it is not."""

import os
import subprocess

import pytest
from conftest import ROOT, require_tool


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for name in ("index.json", "train-00000.tar", "train-00001.tar", "more/split 1.csv"):
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def stage(shards, to, **variables):
    command = ["bash", ROOT / "slurm/stage.sh", shards, to]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_copy_is_whole_and_the_second_time_nothing_is_copied(shards, tmp_path):
    to = tmp_path / "node/medblip"
    assert stage(shards, to).returncode == 0
    assert content(to) == content(shards)
    before = {path: path.stat().st_mtime_ns for path in to.glob("*.tar")}
    again = stage(shards, to)
    assert again.returncode == 0 and ": 0 bytes copied" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in to.glob("*.tar")} == before


def test_what_a_kill_left_and_what_is_torn_is_copied_again(shards, tmp_path):
    to = tmp_path / "node"
    assert stage(shards, to).returncode == 0
    (to / "train-00000.tar").write_bytes(b"torn")
    (to / "train-00001.tar").unlink()
    (to / "train-00001.tar.unfinished").write_bytes(b"torn")
    assert stage(shards, to).returncode == 0
    assert content(to) == content(shards)


def test_shards_that_were_built_anew_replace_those_of_the_same_size(shards, tmp_path):
    to = tmp_path / "node"
    assert stage(shards, to).returncode == 0
    for name in ("index.json", "train-00000.tar"):
        (shards / name).write_bytes(bytes((shards / name).stat().st_size))
    assert stage(shards, to).returncode == 0
    assert content(to) == content(shards)


def test_copies_at_once_do_not_disturb_each_other(shards, tmp_path):
    command = ["bash", ROOT / "slurm/stage.sh", shards, tmp_path / "node"]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert content(tmp_path / "node") == content(shards)


def test_too_little_room_is_said_before_anything_is_copied(shards, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/df").write_text("#!/bin/sh\necho Avail\necho 100\n")
    (tmp_path / "bin/df").chmod(0o755)
    refused = stage(shards, tmp_path / "node", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert refused.returncode == 1 and "has room for 100 bytes, " in refused.stderr
    assert not content(tmp_path / "node")


def test_a_file_that_cannot_be_copied_is_named(shards, tmp_path):
    (tmp_path / "node/train-00001.tar.unfinished").mkdir(parents=True)
    refused = stage(shards, tmp_path / "node")
    assert refused.returncode == 1 and "missing or of another size" in refused.stderr
    assert "train-00001.tar" in refused.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_every_script_passes_shellcheck(script):
    shellcheck = require_tool("shellcheck", "apt-get install shellcheck")
    checked = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
