"""Two processes over gloo against one: the same loss, the same gradient."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import PRESETS, make_batch, tiny_model, tiny_words

from medblip import distributed
from medblip.distributed import Control, Rank, gather, locked, mean_over_ranks, set_timeouts, world_size
from medblip.losses import contrastive_loss, language_loss
from medblip.model import trainable

WORLD = 2
VALUES = torch.randn(WORLD, 3, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.randn(WORLD, WORLD * 3, 4, generator=torch.Generator().manual_seed(1))
# (texts of each sample, which have one): split into two halves, one for each rank.
CONTRASTS = {
    "all distinct": ([1, 2, 3, 4, 5, 6], [True] * 6),
    "one text per rank": ([1, 1, 1, 2, 2, 2], [True] * 6),
    "uneven": ([1, 2, 3, 3, 5, 1], [True, False, True, True, False, False]),
    "a rank without text": ([1, 2, 3, 0, 0, 0], [True] * 3 + [False] * 3),
    "one text in all": ([1, 1, 1, 1, 1, 1], [True] * 6),
}
ANSWER_LENGTHS = [3, 0, 1, 0, 0, 5]


def contrast(name: str, half: slice) -> dict:
    texts, valid = CONTRASTS[name]
    draw = torch.Generator().manual_seed(2)
    image, text = torch.randn(6, 3, 8, generator=draw), torch.randn(6, 8, generator=draw)
    leaves = [leaf.clone().requires_grad_() for leaf in (image[half], text[half], torch.tensor([0.07]))]
    loss = contrastive_loss(leaves[0], leaves[1], torch.tensor(texts)[half, None], torch.tensor(valid)[half], leaves[2])
    loss.backward()
    return {"loss": loss.detach(), "image": leaves[0].grad, "text": leaves[1].grad, "temperature": leaves[2].grad}


def answers(half: slice) -> dict:
    is_answer = torch.tensor([[place < length for place in range(5)] for length in ANSWER_LENGTHS])[half]
    logp = -torch.rand(6, 5, generator=torch.Generator().manual_seed(3))[half]
    logp = logp.masked_fill(~is_answer, 0).requires_grad_()
    loss = language_loss(logp, is_answer)
    loss.backward()
    return {"loss": loss.detach(), "logp": logp.grad}


def whole_model(preset: str, first: int, last: int) -> dict:
    model = tiny_model(preset)
    losses = model(make_batch(tiny_words(preset), first, last))
    losses["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    return {"losses": {name: loss.detach() for name, loss in losses.items()}, "gradients": gradients}


def one_of_two(rank: int, folder: Path) -> None:
    """What each of the two processes does; the results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    set_timeouts(120)
    control = Control(Rank(rank, WORLD, rank, torch.device("cpu")))
    half = slice(3 * rank, 3 * rank + 3)
    mine = VALUES[rank].clone().requires_grad_()
    gathered = gather(mine)
    (gathered * WEIGHTS[rank]).sum().backward()
    result = {
        "world": world_size(),
        "gathered": gathered.detach(),
        "gather_gradient": mine.grad,
        "any": control.any(False, True, rank == 0, rank == 1),
        "all": control.gather({"rank": rank}),
        "main": control.from_main(f"of rank {rank}"),
        "mean": mean_over_ranks(VALUES[rank]),
        "contrast": {name: contrast(name, half) for name in CONTRASTS},
        "answers": answers(half),
        "models": {preset: whole_model(preset, half.start, half.stop) for preset in PRESETS},
    }
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What both ranks found, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    for preset in PRESETS:
        tiny_model(preset)  # so that the towers are there
    mp.spawn(one_of_two, (folder,), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_gather_returns_the_rows_in_rank_order_on_every_rank(ranks):
    for rank in ranks:
        assert rank["world"] == 2 and torch.equal(rank["gathered"], VALUES.flatten(0, 1))


def test_gather_returns_the_gradient_of_every_rank(ranks):
    for number, rank in enumerate(ranks):
        assert torch.allclose(rank["gather_gradient"], WEIGHTS.sum(0)[3 * number : 3 * number + 3])


def test_every_rank_hears_of_a_flag_on_any_and_of_what_the_others_say(ranks):
    for rank in ranks:
        assert rank["any"] == [False, True, True, True]
        assert rank["all"] == [{"rank": 0}, {"rank": 1}] and rank["main"] == "of rank 0"


def test_mean_over_ranks_is_the_same_on_both_and_leaves_its_input(ranks):
    for rank in ranks:
        assert torch.allclose(rank["mean"], VALUES.mean(0))


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrast_over_two_ranks_equals_one_rank_with_both_batches(ranks, name):
    one, two = contrast(name, slice(0, 6)), [rank["contrast"][name] for rank in ranks]
    assert torch.stack([r["loss"] for r in two]).mean().item() == pytest.approx(one["loss"].item(), abs=1e-6)
    # A rank's parameters get the ranks' mean gradient, so a feature's own is half of it.
    for part in ("image", "text"):
        assert torch.allclose(torch.cat([r[part] for r in two]) / 2, one[part], atol=1e-6)
    assert torch.allclose(torch.stack([r["temperature"] for r in two]).mean(0), one["temperature"], atol=1e-5)
    assert (one["loss"] == 0) == (name == "one text in all")


def test_language_loss_over_two_ranks_equals_one_rank_with_both_batches(ranks):
    one, two = answers(slice(0, 6)), [rank["answers"] for rank in ranks]
    assert torch.stack([r["loss"] for r in two]).mean().item() == pytest.approx(one["loss"].item(), abs=1e-6)
    assert torch.allclose(torch.cat([r["logp"] for r in two]) / 2, one["logp"], atol=1e-7)
    # The rank with fewer answers must not weigh as much as the other.
    assert two[0]["loss"] != pytest.approx(two[1]["loss"].item(), abs=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_model_over_two_ranks_equals_one_rank_with_both_batches(ranks, preset):
    one, two = whole_model(preset, 0, 6), [rank["models"][preset] for rank in ranks]
    for name, loss in one["losses"].items():
        assert torch.stack([r["losses"][name] for r in two]).mean().item() == pytest.approx(loss.item(), abs=1e-5)
    largest = max(gradient.abs().max() for gradient in one["gradients"].values())
    assert largest > 0.1
    for name, gradient in one["gradients"].items():
        averaged = torch.stack([r["gradients"][name] for r in two]).mean(0)
        assert (averaged - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name


def test_one_process_without_a_group_is_a_world_of_one():
    values = torch.ones(2, 3, requires_grad=True)
    assert world_size() == 1 and gather(values) is values
    control = Control(Rank(0, 1, 0, torch.device("cpu")))
    assert control.any(True, False) == [True, False] and control.gather(7) == [7] and control.from_main(7) == 7
    assert torch.equal(mean_over_ranks(values), values)
    distributed.barrier()


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
    "SLURM_JOB_ID": "41234",
}
TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def slurm_task(monkeypatch, tmp_path):
    """A Slurm task's environment; the function it returns puts a scontrol on the path."""
    for name in [name for name in os.environ if name in TORCH or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy() | SLURM | {"PATH": str(tmp_path)})

    def scontrol(script: str) -> None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)

    return scontrol


def found() -> dict[str, str]:
    distributed._read_slurm()
    return {name: os.environ[name] for name in TORCH if name in os.environ}


def test_slurm_variables_become_those_of_torch(slurm_task):
    slurm_task('[ "$1 $2 $3" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"')
    assert found() == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node3",
        "MASTER_PORT": "21234",
    }


def test_the_launch_node_is_met_where_scontrol_names_no_host(slurm_task):
    slurm_task("exit 1")
    assert found()["MASTER_ADDR"] == "10.0.0.9"


def test_the_launch_node_is_met_where_there_is_no_scontrol(slurm_task):
    """As in a container."""
    assert found()["MASTER_ADDR"] == "10.0.0.9"


def test_a_launcher_within_slurm_is_believed(slurm_task):
    os.environ["RANK"] = "0"
    assert found() == {"RANK": "0"}


def test_a_shell_within_an_allocation_is_no_task(slurm_task):
    del os.environ["SLURM_STEP_NODELIST"]
    assert found() == {}


def test_a_given_meeting_point_is_kept(slurm_task):
    slurm_task("echo node3")
    os.environ.update(MASTER_ADDR="elsewhere", MASTER_PORT="1")
    assert (found()["MASTER_ADDR"], found()["MASTER_PORT"]) == ("elsewhere", "1")


def test_a_lock_admits_one_at_a_time(tmp_path):
    inside, most = [], []

    def enter():
        with locked(tmp_path / "new/lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
