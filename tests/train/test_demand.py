"""How many layers a run recomputes, from the memory that it may use."""

import pytest
import torch
from transformers import GemmaConfig, PretrainedConfig, Qwen3Config

from cad_mllm.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from cad_mllm.model import kernels
from cad_mllm.train.demand import recomputed_layers
from cad_mllm.train.distributed import World
from cad_mllm.train.zero import OptimizerSettings, ZeroConfig

LAYERS = 36
FOUR = World(rank=0, size=4, local_rank=0, local_size=4, device=torch.device("cpu"), control=None)


def zero(stage: int, **section: object) -> ZeroConfig:
    return ZeroConfig(
        config={"zero_optimization": section},
        stage=stage,
        offload_optimizer=False,
        offload_param=False,
        optimizer=OptimizerSettings(),
    )


def layers(
    memory_gb: float,
    *,
    stage: int = 3,
    keeps: bool = False,
    pack_tokens: int = 8192,
    card_gb: int | None = None,
    **model: object,
) -> int | None:
    config = TrainConfig(
        model=ModelConfig(
            llm_model_name="qwen3-8b-random",
            use_gradient_checkpointing=True,
            gpu_memory_gb=memory_gb,
            **model,  # type: ignore[arg-type]
        ),
        data=DataConfig(max_seq_length=2048),
        optim=OptimConfig(batch_size=4, pack_tokens=pack_tokens),
    )
    threshold = 10**11 if keeps else 40_960
    settings = zero(stage, stage3_param_persistence_threshold=threshold)
    card_bytes = None if card_gb is None else card_gb * 10**9
    return recomputed_layers(config, settings, FOUR, card_bytes=card_bytes)


def test_without_a_limit_all_layers_are_recomputed() -> None:
    assert layers(0.0) is None


def test_more_memory_recomputes_less_from_all_to_none() -> None:
    counts = [layers(float(gb)) for gb in range(8, 160, 8)]
    assert counts[0] == LAYERS and counts[-1] == 0
    assert counts == sorted(counts, reverse=True)  # type: ignore[type-var]
    assert 0 < layers(48.0) < LAYERS  # type: ignore[operator]  # a card of four with the 8B LM, LoRA


def test_a_card_is_not_taken_for_larger_than_it_is() -> None:
    assert layers(44.0, card_gb=24) == layers(24.0) != layers(44.0)
    assert layers(44.0, card_gb=80) == layers(44.0)
    assert layers(0.0, card_gb=24) is None


def test_what_takes_memory_leaves_less_for_activations() -> None:
    usual = layers(60.0)
    assert usual is not None
    assert layers(60.0, pack_tokens=16384) > usual  # type: ignore[operator]
    assert layers(60.0, stage=2) > usual  # type: ignore[operator]  # all weights on every card
    assert layers(60.0, keeps=True) >= layers(60.0, stage=2)  # type: ignore[operator]  # and a shard of them
    assert layers(60.0, use_lora=False) > usual  # type: ignore[operator]  # optimiser state of all weights
    assert layers(60.0, pack_tokens=0) == usual  # 4 x 2,048 padded tokens


@pytest.mark.parametrize("lm, fused", [(Qwen3Config(), True), (GemmaConfig(), False)])
def test_only_layers_that_fused_kernels_compute_are_counted_as_such(
    lm: PretrainedConfig, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_liger", lambda: True)
    assert kernels.fuses_layers(lm) == fused
    monkeypatch.setattr(kernels, "has_liger", lambda: False)
    assert not kernels.fuses_layers(lm)


def test_fp32_keeps_twice_as_much() -> None:
    assert layers(60.0, dtype="float32") > layers(60.0)  # type: ignore[operator]


@pytest.mark.parametrize("memory_gb", [1.0, 12.0])
def test_too_little_memory_recomputes_all_and_leaves_the_refusal_to_the_preflight(memory_gb: float) -> None:
    assert layers(memory_gb) == LAYERS
