import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medblip.config import PRESETS, TrainConfig
from medblip.optim import build_optimizer, learning_rate_factor, set_learning_rate
from medblip.schedule import Schedule, plan_schedule


def config(**options) -> TrainConfig:
    return TrainConfig(data="", run="", deepspeed_config="", **options)


SCHEDULE = Schedule(
    steps=10,
    global_batch=8,
    micro_batch=2,
    accumulation=2,
    warmup_steps=1,
    learning_rate=1e-3,
    lora_learning_rate=5e-3,
    weight_decay=0.1,
)


def test_on_enough_data_the_presets_batches_are_used():
    schedule, notes = plan_schedule(config(), 1000, 1)
    assert (schedule.global_batch, schedule.micro_batch, schedule.accumulation) == (16, 8, 2)
    assert schedule.contrastive_batch == 8
    assert schedule.steps == PRESETS["tiny"].epochs * 1000 // 16 == 2000 and schedule.warmup_steps == 200
    assert notes == ["2000 steps: 32 epochs of 1000 samples in batches of 16"]


def test_the_same_global_batch_at_other_world_sizes():
    for world, micro, accumulation in ((2, 8, 1), (4, 4, 1), (16, 1, 1)):
        schedule, _ = plan_schedule(config(), 1000, world)
        assert (schedule.global_batch, schedule.micro_batch, schedule.accumulation) == (16, micro, accumulation)
        assert schedule.contrastive_batch == 16 and schedule.steps == 2000


@pytest.mark.parametrize(
    ("num_samples", "world", "global_batch", "micro_batch"), [(1, 1, 1, 1), (6, 1, 6, 6), (5, 2, 4, 2), (3, 4, 4, 1)]
)
def test_defaults_are_reduced_to_fit_tiny_data_and_it_is_said(num_samples, world, global_batch, micro_batch):
    schedule, notes = plan_schedule(config(), num_samples, world)
    assert (schedule.global_batch, schedule.micro_batch) == (global_batch, micro_batch)
    assert f"global batch {global_batch}: the data has only {num_samples} training samples" in notes


def test_given_batches_are_taken_as_they_are_even_on_tiny_data():
    schedule, notes = plan_schedule(config(global_batch=12, micro_batch=3, steps=7), 2, 2)
    assert (schedule.global_batch, schedule.micro_batch, schedule.accumulation) == (12, 3, 2)
    assert schedule.steps == 7 and notes == []


def test_batches_that_do_not_divide_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="--global-batch 9 is not a multiple of the 2 ranks"):
        plan_schedule(config(global_batch=9), 100, 2)
    with pytest.raises(ValueError, match="--global-batch 12 over 2 ranks is 6 samples a rank, .*--micro-batch 4 "):
        plan_schedule(config(global_batch=12, micro_batch=4), 100, 2)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 24),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 9),
)
def test_every_plan_adds_up(num_samples, world, micro_batch, groups):
    """Whatever fits together is planned, and what is planned makes whole batches."""
    global_batch = None if groups is None else groups * world * (micro_batch or 1)
    schedule, _ = plan_schedule(config(micro_batch=micro_batch, global_batch=global_batch), num_samples, world)
    assert schedule.micro_batch * schedule.accumulation * world == schedule.global_batch
    assert schedule.contrastive_batch == schedule.micro_batch * world
    assert micro_batch in (None, schedule.micro_batch) and global_batch in (None, schedule.global_batch)
    epochs = schedule.steps * schedule.global_batch / num_samples
    assert PRESETS["tiny"].epochs <= epochs < PRESETS["tiny"].epochs + schedule.global_batch / num_samples
    assert 1 <= schedule.warmup_steps <= schedule.steps


@pytest.mark.parametrize(("step", "factor"), [(0, 0), (50, 0.5), (100, 1), (325, 0.853553391), (550, 0.5), (1000, 0)])
def test_learning_rate_equals_the_published_numbers(step, factor):
    assert learning_rate_factor(step, 1000, 100) == pytest.approx(factor, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_every_step_learns_and_the_peak_is_the_given_rate(steps):
    schedule, _ = plan_schedule(config(steps=steps, learning_rate=0.01), 100, 1)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), schedule, torch.device("cpu"))
    rates = [set_learning_rate(optimizer, schedule, step) for step in range(steps)]
    assert min(rates) > 0 and max(rates) == pytest.approx(0.01) == rates[schedule.warmup_steps - 1]
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    assert rates[schedule.warmup_steps - 1 :] == sorted(rates[schedule.warmup_steps - 1 :], reverse=True)


def test_only_trainable_matrices_are_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    model[2].requires_grad_(False)
    schedule = dataclasses.replace(SCHEDULE, weight_decay=0.3)
    decayed, plain = build_optimizer(model, schedule, torch.device("cpu")).param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    assert decayed["params"] == [model[0].weight]
    assert {id(p) for p in plain["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
