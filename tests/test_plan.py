"""`medblip plan`: sizes against the published ones, activations against what autograd keeps of a real forward pass."""

import dataclasses
import json
import weakref

import pytest
import torch
from tiny import GRID, model_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medblip import plan as planning
from medblip.config import PRESETS
from medblip.plan import PUBLISHED, PlanOptions, activations, build, count, divide, kept_for_backward, plan
from medblip.words import MAX_ANSWER_TOKENS

ENGINES = {name: json.loads((planning.DS_CONFIGS / f"{name}.json").read_text()) for name in planning.IN_ORDER}
FULL = [name for name in PRESETS if not name.startswith("tiny")]


def planned(capsys, **options) -> tuple[int, dict]:
    code = plan(PlanOptions(**dict(preset="tiny", size=GRID, json=True) | options))
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDBLIP_HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("preset", ["tiny", "tiny-t5"])
def test_the_planned_model_is_the_one_that_trains(preset, lora):
    def parameters(model):
        return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}

    assert parameters(build(model_config(preset, lora), GRID, 4)) == parameters(tiny_model(preset, lora))


@pytest.mark.parametrize(
    "preset, language_millions", [("biomedlm", 2594.2), ("biogpt", 346.8), ("biogpt-large", 1571), ("flan-t5-xl", 2784)]
)
def test_full_presets_have_the_published_sizes_without_a_download(empty_cache, preset, language_millions):
    model = build(dataclasses.replace(PRESETS[preset].model, lora=False), 224, 2)
    assert all(parameter.is_meta for parameter in model.parameters())
    picture_patches_and_positions, biases_of_keys = 829_312 + 361_856, 39 * 1408  # LAVIS has no biases of keys
    assert count(model.vision) == (985_952_256 - picture_patches_and_positions, 46_138_752 + 344 * 1408)
    assert count(model.vision)[0] - biases_of_keys - 2 * 1408 == 984_703_360  # 39 blocks and the class token
    assert count(model.qformer) == (0, 161_825_280 + 23_834_112 + 32 * 768)
    assert count(model.language.lm)[0] / 1e6 == pytest.approx(language_millions, rel=1e-3)
    assert count(model.language.lm)[1] == 0


@pytest.mark.slow
def test_every_full_preset_can_be_planned_before_it_is_fetched():
    for name in FULL:
        model = PRESETS[name].model
        assert {model.vision, model.qformer, model.language} <= PUBLISHED.keys()


def real_model(config, width: int, attention: str):
    """The planned model with numbers in it, on the CPU."""
    torch.manual_seed(0)
    model = build(config, GRID, width).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = attention
    return model


def really_run(model, config, num_samples: int, run=lambda function, *args: function(*args)):
    """Outputs of each part for `num_samples`, one row of each text with a token of padding."""

    def words(length: int, pad: int):
        is_token = torch.ones(num_samples, length, dtype=torch.bool)
        is_token[:1, pad] = False
        return torch.ones(num_samples, length, dtype=torch.long), is_token

    prompt, answer = words(config.max_prompt_tokens, 0), words(MAX_ANSWER_TOKENS, -1)
    record = words(config.max_record_tokens, -1)
    use_queries = torch.ones(num_samples, dtype=torch.bool)
    volume = torch.randn(num_samples, GRID, GRID, GRID).to(model.vision.patch_embedding.weight.dtype)
    patches = run(model.vision, volume)
    queries = run(model.qformer, patches)
    texts = [run(model.qformer.read_text, *record) for _ in ("record", "answer")]
    return queries, *texts, run(model.language, queries, use_queries, *prompt, *answer)


def really_kept(model, config, num_samples: int) -> dict[str, int]:
    """Bytes that autograd keeps of each part."""
    sizes = []

    def run(function, *args):
        output, kept = kept_for_backward(model, function, *args)
        sizes.append(sum(kept))
        return output

    really_run(model, config, num_samples, run)
    vision, queries, record, answer, language = sizes
    return {"vision": vision, "qformer": queries + record + answer, "language": language}


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("preset", ["tiny", "tiny-t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps_of_a_real_forward_pass(preset, width, checkpointing):
    config = model_config(preset)
    found = activations(build(config, GRID, width), config, GRID, 3)[checkpointing]._asdict()
    model = real_model(config, width, "sdpa")
    for name in ("vision", "language"):
        planning._checkpoint_blocks(getattr(model, name), checkpointing)
    for name, measured in really_kept(model, config, 3).items():
        assert found[name] == pytest.approx(measured, rel=0.02), name


@pytest.mark.parametrize("preset", ["tiny", "tiny-t5"])
def test_more_samples_and_longer_texts_need_more(preset):
    config = model_config(preset)
    model = build(config, GRID, 2)
    one, four = (activations(model, config, GRID, num)[False] for num in (1, 4))
    assert 3.8 * sum(one) < sum(four) <= 4 * sum(one)
    shorter = dataclasses.replace(config, max_prompt_tokens=config.max_prompt_tokens // 2)
    assert activations(model, shorter, GRID, 1)[False].language < 0.7 * one.language


def test_frozen_blocks_keep_what_the_formula_says_and_checkpointed_ones_little_more_than_inputs(empty_cache):
    """Per token and block in bf16: both LayerNorms' inputs, queries, keys, values and attention's output (2 bytes each,
    width C) and GELU's input (width 4.4 C); and no input of a frozen linear layer. Compare arXiv 2205.05198, section 4,
    where every layer is trained."""
    config = PRESETS["biogpt"].model
    whole, inputs = activations(build(config, 224, 2), config, 224, 2).values()
    tokens, width, mlp_width = 344, 1408, 6144
    blocks = 39 * tokens * (2 * (2 + 3 + 1) * width + 2 * mlp_width)
    voxels = 2 * 343 * 32**3  # the input of the trained patch embedding
    assert whole.vision == pytest.approx(2 * (blocks + voxels), rel=0.02)
    assert inputs.vision == pytest.approx(2 * (39 * tokens * 2 * width + voxels), rel=0.1)
    assert inputs.language < 0.2 * whole.language
    assert inputs.qformer == whole.qformer
    # The largest tensor, the volume's patches, is larger here than a block that is made again.
    assert inputs.workspace == whole.workspace


def test_a_block_that_is_made_again_counts_where_it_is_larger_than_any_tensor():
    config = model_config("tiny")
    kept, made_again = activations(build(config, GRID, 2), config, GRID, 4).values()
    assert made_again.workspace > kept.workspace


def test_each_stage_divides_what_zero_says_it_divides():
    model = build(model_config("tiny"), GRID, 2)
    frozen, trained = count(model)
    one, eight = ({name: divide(engine, model, gpus, 1) for name, engine in ENGINES.items()} for gpus in (1, 8))
    for name in ("zero1", "zero2"):
        assert one[name]["weights"] == eight[name]["weights"] == 2 * (frozen + trained)
    assert eight["zero2"]["gradients"] == 4 * trained // 8 < eight["zero1"]["gradients"] == 6 * trained
    assert {share["optimizer_state"] for share in eight.values()} == {12 * trained // 8}
    small = 2 * sum(p.numel() for p in model.parameters() if p.numel() <= 100_000)
    assert eight["zero3"]["weights"] == small + 2 * (frozen + trained) // 8
    assert eight["zero3_offload"]["weights"] == small
    assert eight["zero3_offload"]["host_per_node_in_training"] == pytest.approx(2 * (frozen + trained), abs=16)
    assert eight["zero2"]["received_per_step"] == (4 + 2) * trained * 7 // 8
    assert eight["zero3"]["received_per_step"] == (4 * (frozen + trained) + 4 * trained) * 7 // 8
    assert all(share["received_per_step"] == 0 for share in one.values())
    across = divide(ENGINES["zero3_offload"], model, 4, 2)
    assert across["host_per_node_in_training"] == pytest.approx(frozen + trained, abs=16)


def test_a_plan_that_fits_takes_the_config_with_the_least_traffic(capsys):
    code, answer = planned(capsys)
    assert code == 0 and answer["fits"] and answer["deepspeed_config"] == "ds_configs/zero2.json"
    chosen = answer["choices"]["ds_configs/zero2.json"]
    assert answer["gpu_bytes"] == chosen["peak"] and set(answer["choices"]) == {f"ds_configs/{n}.json" for n in ENGINES}
    received = [choice["received_per_step"] for choice in answer["choices"].values()]
    assert chosen["received_per_step"] == min(received)


@pytest.mark.slow
def test_where_a_whole_copy_is_too_large_stage_3_is_taken(capsys, empty_cache):
    full = dict(preset="biogpt", size=224, gpus=8, micro_batch=1)
    _, answer = planned(capsys, **full)
    whole, divided = (answer["choices"][f"ds_configs/{name}.json"]["peak"] for name in ("zero2", "zero3"))
    assert divided < whole
    code, answer = planned(capsys, **full, gpu_gb=(whole + divided) / 2e9)
    assert code == 0 and answer["deepspeed_config"] == "ds_configs/zero3.json"
    assert "ds_configs/zero2.json needs" in answer["reason"]


def test_what_does_not_fit_exits_1_and_says_what_would(capsys):
    _, answer = planned(capsys, micro_batch=64)
    least = min(choice["peak"] for choice in answer["choices"].values()) / 1e9
    code, answer = planned(capsys, micro_batch=64, gpu_gb=least * 0.99)
    assert code == 1 and not answer["fits"]
    largest = max(choice["largest_micro_batch"] for choice in answer["choices"].values())
    assert 0 < largest < 64 and f"--micro-batch {largest}" in answer["reason"]
    assert planned(capsys, micro_batch=largest, gpu_gb=least * 0.99)[0] == 0
    assert planned(capsys, gpu_gb=0.5)[1]["choices"]["ds_configs/zero2.json"]["largest_micro_batch"] == 0


def test_a_config_of_ones_own_is_judged_alone(capsys):
    code, answer = planned(capsys, deepspeed_config=str(planning.DS_CONFIGS / "zero2_fp32.json"))
    assert code == 0 and list(answer["choices"]) == [answer["deepspeed_config"]]
    share = answer["choices"][answer["deepspeed_config"]]
    assert share["weights"] == 4 * sum(answer["all_parameters"].values())


def test_the_table_says_that_it_estimates_and_what_to_take(capsys):
    assert plan(PlanOptions(preset="tiny", size=GRID, gpus=2)) == 0
    table = capsys.readouterr().out
    assert table.startswith("Estimates: preset tiny") and "largest micro batch" in table
    assert "Take ds_configs/zero2.json: it fits" in table


def test_a_model_that_is_neither_here_nor_known_is_named(empty_cache):
    with pytest.raises(ValueError, match="nobody/nothing.*medblip fetch --source nobody/nothing"):
        plan(PlanOptions(preset="biogpt", lm="nobody/nothing"))
    with pytest.raises(ValueError, match="did you mean 'biogpt'"):
        PlanOptions(preset="biogp")
    with pytest.raises(ValueError, match="build shards with --size"):
        plan(PlanOptions(preset="biogpt", size=100))


class Live(TorchDispatchMode):
    """The most bytes alive at once among tensors made while it is on."""

    def __init__(self, own):
        super().__init__()
        self.sizes, self.own, self.most = {}, {tensor.untyped_storage()._cdata for tensor in own}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                number = storage._cdata
                if number not in self.own and number not in self.sizes:
                    self.sizes[number] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, number)
        self.most = max(self.most, sum(self.sizes.values()))
        return output


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "tiny-t5"])
def test_activations_and_workspace_are_what_is_alive_at_the_peak_of_a_real_step(preset, checkpointing):
    """bf16 on the CPU; gradients of weights are thrown away at once, as they are counted by themselves."""
    config = model_config(preset)
    found = activations(build(config, GRID, 2), config, GRID, 4)[checkpointing]
    model = real_model(config, 2, "sdpa")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    for name in ("vision", "language"):
        planning._checkpoint_blocks(getattr(model, name), checkpointing)
    with Live([*model.parameters(), *model.buffers()]) as live:
        outputs = really_run(model, config, 4)
        sum(output.float().sum() for output in outputs).backward()
    assert 0.98 < sum(found) / live.most < 1.12
