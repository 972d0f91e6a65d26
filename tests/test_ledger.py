"""The ledger proves what a run read, across restarts and numbers of ranks, and finds what is not as planned."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from medblip import ledger
from medblip.data import SampleStream
from medblip.lines import Appender
from medblip.shards import ShardIndex

GLOBAL_BATCH = 4


class Run:
    """A run folder in which ranks write the samples that the plan gives them."""

    def __init__(self, folder, shards):
        self.folder = folder
        folder.mkdir()
        config = {"train": {"data": str(shards), "seed": 3}, "schedule": {"global_batch": GLOBAL_BATCH}}
        (folder / "config.json").write_text(json.dumps(config))
        self.samples = ShardIndex(shards).samples("train")
        self.stream = SampleStream([sample.shard for sample in self.samples], 3)

    def train(self, start, end, world, micro_batch, change=lambda step, rank, keys: keys):
        """Steps start + 1 to end on so many ranks; `change` alters what a rank writes down."""
        ledger.cut_back(self.folder, start)
        accumulation = GLOBAL_BATCH // (world * micro_batch)
        for rank in range(world):
            layout = {"rank": rank, "world": world, "micro_batch": micro_batch, "accumulation": accumulation}
            account = ledger.Ledger(self.folder, start, layout)
            for step in range(start + 1, end + 1):
                keys = []
                for micro in range(accumulation):
                    first = (step - 1) * GLOBAL_BATCH + (micro * world + rank) * micro_batch
                    keys += [self.samples[self.stream.at(first + j)[1]].key for j in range(micro_batch)]
                keys = change(step, rank, keys)
                if keys:
                    account.step(step, keys)
            account.close()

    def compare(self):
        return ledger.compare(self.folder)


@pytest.fixture
def run(made_up_shards, tmp_path):
    return Run(tmp_path / "run", made_up_shards)


def test_ledger_is_exact_over_4_2_1_4_ranks_and_steps_done_again(run):
    run.train(0, 5, world=4, micro_batch=1)
    run.train(3, 8, world=2, micro_batch=1)  # from a checkpoint two steps back
    run.train(8, 11, world=1, micro_batch=2)
    run.train(10, 14, world=4, micro_batch=1)
    found = run.compare()
    assert found["faults"] == [] and found["steps"] == 14 and found["samples"] == 56
    assert found["restarts"] == 3 and found["steps_done_again"] == 2 + 0 + 1
    assert found["epochs_complete"] == 56 // len(run.samples)
    assert found["samples_of_epoch_in_hand"] == 56 % len(run.samples)


FAULTS = {
    "a step left out": (lambda step, rank, keys: [] if step == 3 else keys, "steps 3 are missing"),
    "order changed": (lambda step, rank, keys: keys[::-1] if step == 2 else keys, "step 2 used in another order"),
    "a sample twice": (lambda step, rank, keys: [keys[0], keys[0]] if step == 4 else keys, "used more than once"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_planned_is_found(run, fault):
    change, message = FAULTS[fault]
    run.train(0, 6, world=2, micro_batch=2, change=change)
    assert any(message in found for found in run.compare()["faults"])


def test_a_rank_that_wrote_nothing_is_found(run):
    run.train(0, 3, world=2, micro_batch=2, change=lambda step, rank, keys: keys if rank or step != 2 else [])
    with pytest.raises(ValueError, match="step 2 has ranks"):
        run.compare()


def test_a_torn_record_is_no_step_and_is_cut_away(run):
    run.train(0, 4, world=1, micro_batch=2)
    path = next((run.folder / "ledger").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-5])
    assert sorted(ledger.read(run.folder)) == [1, 2, 3]
    run.train(3, 5, world=1, micro_batch=2)
    assert run.compare()["faults"] == [] and run.compare()["steps"] == 5


def test_a_ledger_that_does_not_reach_the_checkpoint_is_said_and_stays_a_fault(run, caplog):
    run.train(0, 4, world=2, micro_batch=1)
    path = next((run.folder / "ledger").glob("*-00001.bin"))
    path.write_bytes(path.read_bytes()[:-5])
    run.train(4, 5, world=2, micro_batch=1)
    assert "step 4 is not whole" in caplog.text
    with pytest.raises(ValueError, match="step 4 has ranks"):
        run.compare()


def test_skipped_samples_and_steps_are_listed_with_their_reason_and_cut_back(run):
    run.train(0, 2, world=1, micro_batch=2)
    account = ledger.Ledger(run.folder, 2, {"rank": 0, "world": 1, "micro_batch": 2, "accumulation": 2})
    account.event(1, "sample skipped", "it is damaged", ["00ff"])
    account.event(9, "step skipped", "not finite", ["11ff"])
    account.close()
    run.train(2, 3, world=1, micro_batch=2)
    assert [event["why"] for event in run.compare()["skipped"]] == ["it is damaged"]


def test_what_a_full_disk_refused_is_written_when_it_has_room_again(tmp_path, caplog):
    class Full:
        def __init__(self, file):
            self.file, self.room = file, 3

        def write(self, content):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            size, self.room = min(self.room, len(content)), 0
            return self.file.write(content[:size])

        def close(self):
            self.file.close()

    appender = Appender(tmp_path / "file")
    disk = appender._file = Full(appender._file)
    appender.append(b"hello ")
    appender.append(b"world")
    assert (tmp_path / "file").read_bytes() == b"hel" and caplog.text.count("No space left") == 1
    disk.room = 100
    appender.append(b"!")
    appender.close()
    assert (tmp_path / "file").read_bytes() == b"hello world!"


def test_the_command_prints_the_proof_and_fails_on_a_fault(run):
    def command():
        words = [sys.executable, "-m", "medblip.cli", "ledger", str(run.folder)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    run.train(0, 4, world=2, micro_batch=2)
    done = command()
    assert done.returncode == 0 and "exactly once per epoch, in the planned order" in done.stdout
    run.train(4, 6, world=2, micro_batch=2, change=lambda step, rank, keys: keys[::-1])
    done = command()
    assert done.returncode == 1 and "FAULT: step 5 used in another order than planned" in done.stdout
