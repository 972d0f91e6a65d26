"""Real scans, nothing but their files, all the way: the README's commands on public images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port

REAL = Path(os.environ.get("MEDBLIP_REAL_DATA", ROOT.parent / "shared" / "real"))
BIN = Path(sys.executable).parent
QUESTION = "What will this subject be diagnosed with?"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.is_dir(), reason=f"no public scans in {REAL}; set MEDBLIP_REAL_DATA"),
]


def run(*command):
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    images = sorted([*REAL.glob("*.nii"), *REAL.glob("*.nii.gz"), *REAL.glob("*.hdr")])
    assert len(images) >= 7
    (folder / "real.csv").write_text("image\n" + "".join(f"{image}\n" for image in images))
    run(sys.executable, "-m", "sharding.build", "--manifest", folder / "real.csv", "--out", folder / "shards",
        "--size", 96, "--spacing-mm", 2.2)  # fmt: skip
    run(sys.executable, "-m", "sharding.verify", folder / "shards")
    index = json.loads((folder / "shards/index.json").read_text())
    assert sum(len(shard["samples"]) for shard in index["shards"]) == len(images), "a real scan was set aside"
    return folder / "shards"


@pytest.mark.parametrize("engine", ["zero2", "zero1", "zero3", "zero3_offload", "zero2_fp32"])
def test_real_scans_train_with_every_ds_config_and_answer(shards, tmp_path, engine):
    folder = tmp_path / "run"
    run(BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "train.py",
        "--deepspeed_config", f"ds_configs/{engine}.json",
        "--preset", "tiny", "--data", shards, "--run", folder, "--steps", 20)  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5]), "the loss did not fall"
    answer = json.loads(
        run(sys.executable, "-m", "medblip.cli", "ask", REAL / "chris_t1.nii.gz", QUESTION, "--model", folder, "--json")
    )
    assert answer["answer"] and sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert list(answer["probabilities"]) == ["CN", "MCI", "AD"]
