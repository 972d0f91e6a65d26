"""What every test stands on: no network, one thread a process, and tools that CI must have."""

import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["PATH"] += os.pathsep + "/usr/sbin"  # Debian keeps daemons there, off a plain user's path

ROOT = Path(__file__).parent.parent


def require_tool(name: str, hint: str) -> str:
    """The path of a program; without it the test is skipped, and fails in CI, where nothing may be missing."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed ({hint})"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return path


def free_port() -> str:
    """A port for the ranks of one run to meet, so that tests can run side by side."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


# The files that take longest, for xdist to hand out first, so that no worker ends on one. The first makes the tiny
# towers on a fresh machine; the next ones, which another worker begins with, need none and do not wait for them.
LONG_FILES = (
    "test_train.py",
    "test_build.py",
    "test_cache.py",
    "test_baselines.py",
    "test_madeup.py",
    "test_data.py",
    "test_faults.py",
    "test_evaluate.py",
    "test_validation.py",
    "test_doctor.py",
    "test_zero.py",
    "test_distributed.py",
    "test_checkpoint.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def made_up_shards(tmp_path_factory) -> Path:
    """Shards of six made-up patients at 48^3, written by the commands that a user would type, once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "made_up"
    with FileLock(f"{folder}.lock"):
        if not (folder / "shards/index.json").exists():
            for command in (
                f"sharding.madeup --out {folder}/release --subjects 6 --workers 1",
                f"sharding.build --manifest {folder}/release/manifest.csv --out {folder}/shards --size 48"
                " --spacing-mm 4.5",
            ):
                subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, check=True)
    return folder / "shards"


@pytest.fixture
def medblip(monkeypatch, capfd):
    """Runs a command of the product in this process: (exit code, stdout, stderr)."""
    from medblip import cli

    monkeypatch.setattr(logging.root, "handlers", [])  # the command sets its own; pytest's come back afterwards

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medblip", *map(str, arguments)])
        code = cli.main()
        return code, *capfd.readouterr()

    return run
