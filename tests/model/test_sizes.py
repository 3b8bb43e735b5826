"""What the estimates say of the layers is what torch keeps of them."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cad_mllm.config import ModelConfig
from cad_mllm.model import sizes
from cad_mllm.model.attention import BY_SAMPLE
from cad_mllm.model.build import _add_lora, build_model
from cad_mllm.model.presets import lm_config
from cad_mllm.model.sizes import layer_sizes, parameter_counts

TOKENS = 32
SHAPE = {
    "hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 320,
}  # fmt: skip


def kept_bytes(model: torch.nn.Module, hidden: int, dtype: torch.dtype) -> int:
    """Bytes that the decoder keeps for its backward pass, parameters not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embeds = torch.randn(1, TOKENS, hidden, dtype=dtype).requires_grad_()
    borders = torch.tensor([0, TOKENS], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(
            inputs_embeds=embeds, position_ids=torch.arange(TOKENS)[None], use_cache=False,
            cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=TOKENS, max_length_k=TOKENS,
        )[0]  # fmt: skip
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_layer_keeps_what_is_estimated(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(llm_model_name="tiny", lora_r=4, use_lora=lora)
    measured = []
    for layers in (1, 3):
        shape = lm_config("tiny")
        shape.update(SHAPE | {"num_hidden_layers": layers})
        shape.layer_types = ["full_attention"] * layers
        lm = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation=BY_SAMPLE)
        if lora:
            _add_lora(lm, config, seed=1, fused=True)
        measured.append(kept_bytes(lm.model.train(), SHAPE["hidden_size"], torch.bfloat16))
        monkeypatch.setattr(sizes, "read_lm_config", lambda _, shape=shape: shape)
    per_token = (measured[1] - measured[0]) / 2 / TOKENS
    estimated = layer_sizes(config, fused=False)
    assert estimated.num_layers == 3
    assert estimated.activation_bytes == pytest.approx(per_token, rel=0.02)
    assert estimated.input_bytes == 2 * SHAPE["hidden_size"]
    assert estimated.parameters == sum(p.numel() for p in lm.model.layers[0].parameters()) - 2 * 32


def test_sizes_of_qwen3_8b() -> None:
    lora = layer_sizes(ModelConfig(llm_model_name="qwen3-8b-random"), fused=False)
    assert lora.num_layers == 36
    assert lora.head_parameters == 151_936 * 4096
    assert 150_000 < lora.activation_bytes < 250_000
    assert lora.input_bytes == 8192
    wide = layer_sizes(ModelConfig(llm_model_name="qwen3-8b-random", dtype="float32"), fused=False)
    assert wide.activation_bytes == 2 * lora.activation_bytes


@pytest.mark.parametrize("ranks, measured_gb", [(2, 100.4), (4, 100.1)])
def test_what_fused_kernels_keep_is_what_a_step_under_zero_2_took(ranks: int, measured_gb: float) -> None:
    """Row D of the benchmark: 16,384 tokens on H200s, nothing recomputed; see tests/bench/results."""
    config = ModelConfig(llm_model_name="qwen3-8b-random", point_encoder="tiny", vision_model_name="tiny")
    layer, counts = layer_sizes(config, fused=True), parameter_counts(config)
    weights, gradients, states = 2 * counts.total, 2 * counts.trainable, 12 * counts.trainable / ranks
    loss = 5 * 2**28
    kept = layer.num_layers * 16_384 * layer.activation_bytes
    assert (weights + gradients + states + loss + kept) / 1e9 == pytest.approx(measured_gb, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize("encoders", [False, True], ids=["frozen encoders", "trained encoders"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_parameters_are_those_of_the_networks(name: str, encoders: bool, lora: bool) -> None:
    config = ModelConfig(llm_model_name=name, use_lora=lora, train_encoders=encoders)
    built = build_model(config, seed=1, device=torch.device("cpu"))
    parameters = list(built.model.parameters())
    counts = parameter_counts(config)
    assert counts.total == pytest.approx(sum(p.numel() for p in parameters), rel=1e-3)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert counts.trainable == pytest.approx(trainable, rel=2e-3)
