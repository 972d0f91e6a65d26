import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GRID, PRESETS, make_batch, model_config, tiny_model, tiny_words
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from medblip.config import TrainConfig
from medblip.model import MedBLIP, resolve_attention, trainable
from medblip.optim import build_optimizer
from medblip.schedule import plan_schedule
from medblip.towers import make_tiny

CPU = torch.device("cpu")


SCHEDULE, _ = plan_schedule(TrainConfig(data="", run="", deepspeed_config="", steps=20), 16, 1)


def build(preset: str = "tiny", **changes) -> MedBLIP:
    torch.manual_seed(7)
    return MedBLIP(dataclasses.replace(model_config(preset), **changes), GRID, CPU)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_trainable_parameter_learns_within_two_steps(preset):
    model, batch = tiny_model(preset), make_batch(tiny_words(preset))
    optimizer = build_optimizer(model, SCHEDULE, CPU)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    learned = set()
    for _ in range(2):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        for name, parameter in trainable(model).items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if parameter.grad.any():
                learned.add(name)
        optimizer.step()
    assert learned == set(trainable(model))
    parts = {name.split(".")[0] for name in learned}
    assert parts == {"vision", "qformer", "contrast", "language"} and any("lora_A" in name for name in learned)


def test_lora_learns_at_its_own_rate_without_decay():
    model = tiny_model("tiny")
    groups = {group["peak_lr"]: group for group in build_optimizer(model, SCHEDULE, CPU).param_groups}
    lora = {id(parameter) for name, parameter in trainable(model).items() if "lora_" in name}
    assert lora == {id(parameter) for parameter in groups[SCHEDULE.lora_learning_rate]["params"]}
    assert groups[SCHEDULE.lora_learning_rate]["weight_decay"] == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_frozen_weights_keep_their_bits_through_twenty_steps(preset):
    model, batch = tiny_model(preset), make_batch(tiny_words(preset))
    before = copy.deepcopy(model.state_dict())
    fingerprints = model.frozen_fingerprints()
    optimizer = build_optimizer(model, SCHEDULE, CPU)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trainable(model))
    assert losses[-1] < losses[0] - 0.5
    assert model.frozen_fingerprints() == fingerprints
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(trainable(model).values())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_the_sum_of_its_terms(preset):
    model, batch = tiny_model(preset), make_batch(tiny_words(preset))
    losses = model(batch)
    assert losses["loss_itc"] == losses["loss_itc_record"] + losses["loss_itc_answer"]
    assert losses["loss"].item() == pytest.approx((losses["loss_lm"] + losses["loss_itc"]).item(), abs=1e-6)
    assert min(losses[name] for name in ("loss_lm", "loss_itc_record", "loss_itc_answer")) > 0
    without = model(batch, contrastive=False)
    assert without["loss"] == without["loss_lm"] == losses["loss_lm"]


def test_a_batch_of_one_has_a_language_loss_and_no_contrast():
    losses = tiny_model("tiny")(make_batch(tiny_words("tiny"), 0, 1))
    assert losses["loss_itc"] == 0 and losses["loss"] == losses["loss_lm"] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_of_which_nothing_is_known_costs_zero(preset):
    model, words = tiny_model(preset), tiny_words(preset)
    batch = make_batch(words, 1, 2)
    nothing = make_batch(words, 3, 4)
    empty = dataclasses.replace(
        batch,
        answer_ids_BA=nothing.answer_ids_BA,
        is_answer_BA=nothing.is_answer_BA,
        statement_ids_BT=nothing.statement_ids_BT,
        is_statement_BT=nothing.is_statement_BT,
    )
    loss = model(empty)["loss"]
    loss.backward()
    assert loss.item() == 0
    gradients = [parameter.grad for parameter in trainable(model).values() if parameter.grad is not None]
    assert gradients and not any(gradient.isnan().any() or gradient.any() for gradient in gradients)


@pytest.mark.parametrize("preset", PRESETS)
def test_activation_checkpointing_changes_no_gradient(preset):
    batch = make_batch(tiny_words(preset), 0, 3)
    gradients = []
    for checkpointed in (False, True):
        model = build(preset, activation_checkpointing=checkpointed).train()
        calls = []
        model.vision.encoder.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(batch)["loss"].backward()
        assert len(calls) == 1 + checkpointed  # run again in the backward pass
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-6), name


def test_on_a_cpu_attention_is_the_explicit_product():
    assert {resolve_attention(part, CPU) for part in ("vision", "qformer", "language")} == {"eager"}
    model = tiny_model("tiny")
    assert set(model.attention.values()) == {"eager"}
    assert model.language.lm.config._attn_implementation == "eager"


@pytest.mark.parametrize("part", ["vision", "qformer", "language"])
def test_weights_missing_from_a_checkpoint_stop_the_run_with_their_names(part, tmp_path):
    source = make_tiny({"language": "gpt2"}.get(part, part))
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if ("layers.1" in name or "layer.1" in name or "h.1" in name))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shown = name.removeprefix("transformer.")
    with pytest.raises(ValueError, match=rf"1 weights are missing from the checkpoint \(.*{shown}") as raised:
        build(**{part: str(tmp_path)})
    assert str(tmp_path) in str(raised.value)


def test_a_qformer_that_reads_another_width_is_refused_with_both_widths(tmp_path):
    made = Blip2QFormerConfig.from_pretrained(make_tiny("qformer"))
    made.encoder_hidden_size = 64
    Blip2QFormerModel(made).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="width 64, but the vision tower gives 96"):
        build(qformer=str(tmp_path))


@pytest.mark.parametrize("preset", PRESETS)
def test_fingerprints_are_the_same_for_two_loads_with_and_without_lora(preset):
    first = build(preset).frozen_fingerprints()
    assert build(preset).frozen_fingerprints() == first
    assert build(preset, lora=False).frozen_fingerprints() == first
    assert set(first) == {"vision", "language"}


def test_towers_of_different_models_have_different_fingerprints():
    tiny, t5 = (tiny_model(preset).frozen_fingerprints() for preset in PRESETS)
    assert tiny["vision"] == t5["vision"] and tiny["language"] != t5["language"]


@pytest.mark.parametrize("train_final_layernorm", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_changed_frozen_weight_changes_a_fingerprint_and_a_trained_one_none(preset, train_final_layernorm):
    model = build(preset, train_final_layernorm=train_final_layernorm)
    before = model.frozen_fingerprints()
    unseen = []
    for name, parameter in model.named_parameters():
        value = parameter.data.flatten()[-1].clone()
        parameter.data.view(-1)[-1] = value + 1
        if (model.frozen_fingerprints() == before) != parameter.requires_grad:
            unseen.append(name)
        parameter.data.view(-1)[-1] = value
    assert not unseen
    assert model.frozen_fingerprints() == before


def test_the_image_reaches_every_loss_and_the_record_too():
    model, batch = tiny_model("tiny").eval(), make_batch(tiny_words("tiny"))
    with torch.no_grad():
        losses = model(batch)
        other_image = model(dataclasses.replace(batch, volume_BXYZ=batch.volume_BXYZ.flip(0)))
        other_record = model(dataclasses.replace(batch, record_ids_BT=batch.record_ids_BT.clone().fill_(9)))
    for name in ("loss_lm", "loss_itc_record", "loss_itc_answer"):
        assert abs(other_image[name] - losses[name]) > 1e-5, name
    assert other_record["loss_itc_record"] != losses["loss_itc_record"]
    assert other_record["loss_lm"] == losses["loss_lm"] and other_record["loss_itc_answer"] == losses["loss_itc_answer"]
