"""How the networks are prepared for ZeRO-3."""

import torch
from deepspeed.utils import z3_leaf_module

from cad_mllm.config import ModelConfig
from cad_mllm.model.build import build_model
from cad_mllm.train.gathering import gather_layer_by_layer


def test_zero3_gathers_a_decoder_layer_at_once_and_nothing_larger() -> None:
    config = ModelConfig(llm_model_name="tiny", dtype="bfloat16", lora_r=4)
    built = build_model(config, seed=3, device=torch.device("cpu"), packed=True)
    gather_layer_by_layer(built.model)
    leaves = {name for name, module in built.model.named_modules() if z3_leaf_module(module)}
    assert leaves == {f"lm.base_model.model.model.layers.{number}" for number in range(4)}
    # One dtype over all weights that train, or every product of an adapter runs in fp32.
    assert {p.dtype for p in built.model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_the_head_is_one_parameter_under_one_name() -> None:
    built = build_model(
        ModelConfig(llm_model_name="tiny", use_lora=False), seed=3, device=torch.device("cpu")
    )
    names = [name for name, _ in built.model.named_parameters()]
    assert "lm.lm_head.weight" in names and "loss.weight" not in names
    assert built.model.loss.weight is built.model.lm.lm_head.weight
