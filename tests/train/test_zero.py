"""The user's DeepSpeed JSON: `auto` follows the flags, contradictions are named, no `auto` gets through."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cad_mllm.config import ModelConfig, OptimConfig, TrainConfig
from cad_mllm.errors import ConfigError
from cad_mllm.train.zero import ModelShape, ZeroConfig, read_deepspeed_json, resolve

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs" / "deepspeed").glob("*.json"))
QWEN3_8B = ModelShape(hidden_size=4096, intermediate_size=12288, layer_parameters=195_371_008, lora_r=32)
CONFIG = TrainConfig(optim=OptimConfig(batch_size=2, gradient_accumulation_steps=4, max_grad_norm=1.0))


def resolved(raw: dict[str, Any], config: TrainConfig = CONFIG, world_size: int = 4) -> ZeroConfig:
    return resolve({"zero_optimization": {"stage": 2}, **raw}, config, world_size=world_size, shape=QWEN3_8B)


def test_there_are_shipped_files() -> None:
    assert len(SHIPPED) >= 3


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve_without_a_trace_of_auto(path: Path) -> None:
    zero = resolve(read_deepspeed_json(path), CONFIG, world_size=4, shape=QWEN3_8B)
    assert '"auto"' not in json.dumps(zero.config)
    assert zero.config["train_batch_size"] == 2 * 4 * 4
    assert zero.config["train_micro_batch_size_per_gpu"] == 2
    assert zero.config["gradient_accumulation_steps"] == 4
    assert zero.config["gradient_clipping"] == 1.0
    assert zero.config["bf16"] == {"enabled": True}
    assert zero.stage == (2 if "zero2" in path.stem else 3)
    assert zero.offload_optimizer == ("offload" in path.stem)


def test_fp32_turns_bf16_off() -> None:
    config = replace(CONFIG, model=ModelConfig(dtype="float32"))
    assert resolved({"bf16": {"enabled": "auto"}}, config).config["bf16"] == {"enabled": False}


def test_lora_matrices_stay_below_the_persistence_threshold() -> None:
    raw = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"}}
    zero = resolved(raw).config["zero_optimization"]
    assert isinstance(zero, dict)
    assert (
        32 * 12288 <= zero["stage3_param_persistence_threshold"] < 4096 * 1024
    )  # all of LoRA, no base matrix


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_resident_file_keeps_what_it_gathers_and_no_other(path: Path) -> None:
    zero = resolve(read_deepspeed_json(path), CONFIG, world_size=4, shape=QWEN3_8B)
    assert zero.keeps_weights == (path.stem == "ds_zero3_resident")


def test_a_whole_decoder_layer_is_prefetched() -> None:
    raw = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}}
    zero = resolved(raw).config["zero_optimization"]
    assert isinstance(zero, dict)
    assert zero["stage3_prefetch_bucket_size"] >= QWEN3_8B.layer_parameters


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            {"train_micro_batch_size_per_gpu": 8},
            ["train_micro_batch_size_per_gpu is 8", "--batch_size gives 2"],
        ),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps is 1", "gives 4"]),
        (
            {"train_batch_size": 64},
            ["train_batch_size is 64", "--batch_size x --gradient_accumulation_steps", "32"],
        ),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "--max_grad_norm"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled is false", "--dtype"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is true", "--dtype"]),
        ({"zero_optimization": {"stage": 0}}, ["stage is 0", "1, 2 or 3"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["nvme", "cpu"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "AdamW"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr", "--stage1_lr"]),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 2]}}}, ["betas", "[0, 1)"]),
        ({"optimizer": {"type": "AdamW", "params": {"eps": "small"}}}, ["eps", "positive"]),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, ["amsgrad", "remove"]),
        ({"scheduler": {"type": "WarmupDecayLR"}}, ["WarmupDecayLR", "--lr_scheduler_type is cosine"]),
        ({"scheduler": {"type": "OneCycle"}}, ["OneCycle", "supported types"]),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 7}}},
            ["warmup_num_steps is 7", "--warmup_steps gives 100"],
        ),
        (
            {"activation_checkpointing": {"number_checkpoints": "auto"}},
            ["activation_checkpointing.number_checkpoints"],
        ),
        ({"bf16": True}, ["bf16", "must be an object"]),
    ],
)
def test_contradictions_name_both_sides(raw: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(raw)
    assert all(words in str(error.value) for words in said)


def test_values_that_agree_with_the_flags_are_kept() -> None:
    raw = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 32, "steps_per_print": 5}
    assert resolved(raw).config["steps_per_print"] == 5


def test_adam_constants_of_the_json_reach_the_optimizer() -> None:
    settings = resolved(
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.95], "eps": 1e-6}}}
    ).optimizer
    assert (settings.betas, settings.eps, settings.weight_decay) == (
        (0.8, 0.95),
        1e-6,
        CONFIG.optim.weight_decay,
    )


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_an_unreadable_json_is_one_clear_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"ds\.json"):
        read_deepspeed_json(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_deepspeed_json(tmp_path / "other.json")
