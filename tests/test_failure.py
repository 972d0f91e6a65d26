"""What is left behind for the person when a job ends by an error."""

import json

import pytest
import torch

from medblip.config import TrainConfig
from medblip.distributed import Rank
from medblip.failure import report
from medblip.watch import Watch


@pytest.mark.parametrize("before", [None, '{"state": "training", "saved": 6}', '{"state": "trai', "[]"])
def test_a_job_that_fails_says_so_in_status_json_even_if_that_was_damaged(tmp_path, before):
    if before is not None:
        (tmp_path / "status.json").write_text(before)
    watch = Watch(Rank(0, 1, 0, torch.device("cpu")), 60)
    config = TrainConfig(data="shards", run=str(tmp_path), deepspeed_config="")
    assert report(ValueError("volumes of 90 voxels"), config, watch) == 1
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["error"], status["exit_code"]) == ("failed", "volumes of 90 voxels", 1)
    assert status.get("saved") == (6 if before and "saved" in before else None)
    watch.close()
