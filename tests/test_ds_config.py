"""The DeepSpeed JSON: each fault by name, all at once, and what train.py writes into it."""

import json

import pytest
from conftest import ROOT
from test_schedule import SCHEDULE

from medblip import ds_config
from medblip.ds_config import load_deepspeed_config


def write(folder, content) -> str:
    (folder / "engine.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / "engine.json")


def test_batch_sizes_are_written_into_the_deepspeed_config(tmp_path):
    engine = load_deepspeed_config(write(tmp_path, {"bf16": {"enabled": True}}), SCHEDULE)
    assert engine == {
        "bf16": {"enabled": True},
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
    }
    assert load_deepspeed_config(write(tmp_path, engine), SCHEDULE) == engine


@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [64, "auto"])
def test_a_deepspeed_config_with_other_batch_sizes_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"engine.json: {key} is {value}, but this run needs "):
        load_deepspeed_config(write(tmp_path, {key: value}), SCHEDULE)


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_a_deepspeed_config_with_its_own_optimizer_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"engine.json: remove '{key}'"):
        load_deepspeed_config(write(tmp_path, {key: {}}), SCHEDULE)


def test_a_deepspeed_config_that_is_no_json_object_is_refused_by_name(tmp_path):
    for content in ("{'a': 1}", "[]"):
        with pytest.raises(ValueError, match="engine.json"):
            load_deepspeed_config(write(tmp_path, content), SCHEDULE)
    with pytest.raises(ValueError, match="nowhere.json"):
        load_deepspeed_config(tmp_path / "nowhere.json", SCHEDULE)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_configs_in_the_repository_load_and_say_a_zero_stage(path):
    engine = load_deepspeed_config(path, SCHEDULE)
    assert engine["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])
    assert engine["train_batch_size"] == 8
    assert engine.get("bf16", {}).get("enabled", False) == ("fp32" not in path.stem)


def test_there_is_a_config_for_every_zero_stage():
    assert {"zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme", "zero3_hpz"} <= {
        path.stem for path in (ROOT / "ds_configs").glob("*.json")
    }


@pytest.mark.parametrize(
    "content, message",
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stages": 2}}, "unknown key 'stages'; did you mean 'stage'.*in 'zero_optimization'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pinned": True}}},
            "unknown key 'pinned'.* in 'zero_optimization.offload_param'",
        ),
        ({"bf16": {"enable": True}}, "unknown key 'enable'; did you mean 'enabled'.* in 'bf16'"),
        ({"bf16": True}, "'bf16' must be an object, not true"),
        ({"zero_optimization": {"stage": "auto"}}, "'zero_optimization.stage' is \"auto\""),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "ZeRO stage 3 only, .* stage is 2"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "device is disk: cpu, nvme or none"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "needs nvme_path"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "remove 'zero_optimization.offload_optimizer'",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "zero_hpz_partition_size": 8,
                    "offload_param": {"device": "nvme", "nvme_path": "/local"},
                }
            },
            "zero_hpz_partition_size .* offload to nvme",
        ),
    ],
)
def test_a_fault_is_named_with_what_to_do(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(write(tmp_path, content), SCHEDULE)


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    content = {"train_batch_size": 7, "gradient_cliping": 1.0, "optimizer": {}, "bf16": {"enabeld": True}}
    with pytest.raises(ValueError) as error:
        load_deepspeed_config(write(tmp_path, content), SCHEDULE)
    for name in ("train_batch_size is 7", "gradient_cliping", "remove 'optimizer'", "enabeld"):
        assert name in str(error.value)


def test_every_run_has_a_folder_of_its_own_on_the_nvme_disk(tmp_path):
    offload = {"device": "nvme", "nvme_path": "/local/scratch"}
    path = write(tmp_path, {"zero_optimization": {"stage": 3, "offload_param": offload}})
    first, again, other = (
        ds_config.nvme_of(load_deepspeed_config(path, SCHEDULE, tmp_path / run)) for run in ("a", "b/../a", "b")
    )
    assert first == again != other
    assert {str(folder.parent) for folder in (first, other)} == {"/local/scratch"}
    assert str(ds_config.nvme_of(load_deepspeed_config(path, SCHEDULE))) == "/local/scratch"
    assert ds_config.nvme_of({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}) is None


def test_the_known_keys_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.swap_tensor import constants as aio
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    for known, model in (
        (ds_config.ZERO_KEYS, DeepSpeedZeroConfig),
        (ds_config.OFFLOAD_KEYS, DeepSpeedZeroOffloadParamConfig),
        (ds_config.BF16_KEYS, DeepSpeedBF16Config),
    ):
        assert known == {name for field in model.model_fields.items() for name in (field[0], field[1].alias) if name}
    names = {
        value
        for name, value in vars(aio).items()
        if name.startswith("AIO_") and isinstance(value, str) and "{" not in value
    }
    assert names == ds_config.AIO_KEYS
    for name in ("TRAIN_BATCH_SIZE", "GRADIENT_CLIPPING", "BFLOAT16", "DATA_TYPES", "COMMUNICATION_DATA_TYPE"):
        assert getattr(constants, name) in ds_config.TOP_KEYS
