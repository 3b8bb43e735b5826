"""Fewer kernels compute the same: adapters as peft has them, layers as transformers has them."""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from cad_mllm.model import kernels, presets
from cad_mllm.model.kernels import FusedLoraLinear, fuse_norms, has_liger, share_inputs, use_liger


class TwoLayers(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20, bias=bias), nn.Linear(20, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def adapted(model: nn.Module, *, fused: bool) -> nn.Module:
    """With adapters whose B is not zero, or their A would have no gradient."""
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], bias="none")
    if fused:
        lora._register_custom_module({nn.Linear: FusedLoraLinear})
    wrapped: nn.Module = get_peft_model(copy.deepcopy(model), lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return wrapped.double()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of all that trains and of the input, by name; and the output."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert x.grad is not None
    return {**named, "x": x.grad, "out": out.detach()}


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return TwoLayers(request.param).double()


def test_an_adapter_gives_what_pefts_gives_forward_and_backward(model: nn.Module) -> None:
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    ours, peft = (gradients(adapted(model, fused=fused), x) for fused in (True, False))
    assert ours.keys() == peft.keys() and sum("lora" in name for name in ours) == 4
    for name in ours:
        torch.testing.assert_close(ours[name], peft[name], msg=name)


def test_an_adapter_that_is_switched_off_gives_what_the_layer_gives(model: nn.Module) -> None:
    wrapped, x = adapted(model, fused=True), torch.randn(4, 12, dtype=torch.float64)
    with wrapped.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(wrapped(x), model(x))


def test_a_merged_adapter_gives_the_same(model: nn.Module) -> None:
    wrapped, x = adapted(model, fused=True), torch.randn(4, 12, dtype=torch.float64)
    before = wrapped(x)
    wrapped.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(wrapped(x), before)


def adapted_lm(*, fused: bool, biased: bool = False) -> nn.Module:
    lm = presets.on_the_spot("tiny", torch.float64, "sdpa")
    if biased:  # Qwen2's queries, keys and values
        torch.manual_seed(2)
        config = Qwen2Config(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        lm = Qwen2ForCausalLM(config).double()
    lora = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    if fused:
        lora._register_custom_module({nn.Linear: FusedLoraLinear})
    wrapped: nn.Module = get_peft_model(lm, lora, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 9
    if fused:
        share_inputs(wrapped)
    return wrapped


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were computed together, product by product."""
    seen: list[int] = []
    compute = kernels._adapted_products

    def counted(layers: Sequence[FusedLoraLinear], x: Tensor) -> list[Tensor]:
        seen.append(len(layers))
        return compute(layers, x)

    monkeypatch.setattr(kernels, "_adapted_products", counted)
    return seen


@pytest.mark.parametrize("biased", [False, True], ids=["Qwen3", "Qwen2"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_layers_with_one_input_are_computed_together_and_give_what_pefts_give(
    products: list[int], recomputed: bool, biased: bool
) -> None:
    tokens = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (True, False):
        lm = adapted_lm(fused=fused, biased=biased)
        if recomputed:
            lm.train()
            lm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        found.append(losses_and_gradients(lm, tokens))
    for ours, peft in zip(*found, strict=True):
        torch.testing.assert_close(ours, peft)
    layers = lm.config.num_hidden_layers  # type: ignore[union-attr]
    assert products[:4] == [3, 1, 2, 1]  # queries, keys, values; output; gate, up; down
    assert len(products) == 4 * layers * (1 + recomputed)


def test_a_layer_whose_sibling_has_its_adapter_off_is_computed_alone(products: list[int]) -> None:
    lm, tokens = adapted_lm(fused=True), torch.randint(0, 256, (1, 9))
    for name, module in lm.named_modules():
        if name.endswith("v_proj") and isinstance(module, FusedLoraLinear):
            module.enable_adapters(False)
    ours = lm(tokens, use_cache=False).logits
    assert products[:4] == [1, 1, 1, 2]  # queries; keys; output; gate, up
    peft = adapted_lm(fused=False)
    for name, module in peft.named_modules():
        if name.endswith("v_proj") and hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    torch.testing.assert_close(ours, peft(tokens, use_cache=False).logits)


def test_nothing_of_a_step_is_kept_between_layers() -> None:
    lm, tokens = adapted_lm(fused=True), torch.randint(0, 256, (1, 9))
    lm(tokens, use_cache=False)
    shared = {m._shared for m in lm.modules() if isinstance(m, FusedLoraLinear) and m._shared is not None}
    assert len(shared) == 2 * lm.config.num_hidden_layers  # type: ignore[union-attr, operator]
    assert all(one._x is None and not one._ready for one in shared)


@pytest.fixture
def rotary_restored() -> Iterator[None]:
    before = modeling_qwen3.apply_rotary_pos_emb
    yield
    modeling_qwen3.apply_rotary_pos_emb = before


def losses_and_gradients(lm: nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = lm(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in lm.parameters() if p.grad is not None)]


def assert_the_same(fused: nn.Module, eager: nn.Module, device: str) -> None:
    tokens = torch.randint(0, 256, (2, 50), device=device)
    ours, theirs = losses_and_gradients(fused, tokens), losses_and_gradients(eager, tokens)
    assert len(ours) > 40
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_norms_in_one_kernel_give_what_transformers_gives() -> None:
    eager = presets.on_the_spot("tiny", torch.float32, "sdpa")
    fused = copy.deepcopy(eager)
    fuse_norms(fused)
    assert_the_same(fused, eager, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not has_liger(), reason="needs Liger's kernels")
@pytest.mark.usefixtures("rotary_restored")
def test_ligers_kernels_give_what_transformers_gives() -> None:
    eager = presets.on_the_spot("tiny", torch.float32, "sdpa").cuda()
    fused = copy.deepcopy(eager)
    fuse_norms(fused)
    assert use_liger(fused)
    assert_the_same(fused, eager, "cuda")
