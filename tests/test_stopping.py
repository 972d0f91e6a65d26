"""Why a run ended early, as its status.json and slurm/pretrain.sh will have it."""

import subprocess
import sys

from conftest import ROOT

SIGNAL_THEN_FILE = """
import os, pathlib, signal, sys, time
from medblip.stopping import Stopping
run = pathlib.Path(sys.argv[1])
stopping = Stopping()
stopping.at_once = False
stopping.watch_file(run)
os.kill(os.getpid(), signal.SIGUSR1)
while not stopping.wanted:
    time.sleep(0.01)
(run / "stop").touch()
stopping.take_file()
print(*stopping.reasons, sep=", ")
"""


def test_a_stop_file_that_comes_with_a_signal_is_not_lost(tmp_path):
    command = [sys.executable, "-c", SIGNAL_THEN_FILE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "SIGUSR1, the stop file", done.stderr
    assert not (tmp_path / "stop").exists()
