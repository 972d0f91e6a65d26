"""A sample of the fault suite (tests/faults/): `make test-faults` plays all of it."""

import os
import subprocess
import sys

from conftest import ROOT

SAMPLE = (
    "SIGKILL at 'save: in the data' *, another",
    "exception at 'optimizer, between its groups' *",
    "moments are not restored",  # planted in the product: the suite must find it
)


def test_a_disturbed_run_ends_bit_for_bit_like_an_undisturbed_one_and_a_planted_fault_is_found(
    made_up_shards, tmp_path
):
    (tmp_path / "shards").symlink_to(made_up_shards)
    command = [sys.executable, "-m", "faults", "matrix", "planted", "--folder", str(tmp_path), "--only", *SAMPLE]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"| all | {len(SAMPLE)}/{len(SAMPLE)} |" in done.stdout, done.stdout
