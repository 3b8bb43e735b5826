"""The arithmetic of transformers and peft in fewer kernels: less memory traffic, fewer launches.

Adapters on any device. On CUDA norms, by torch's kernel, and where Liger is installed gates, rotary
embeddings and the norms of heads by its kernels (Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM
Training, 2024). Shapes: T tokens of all rows, I and O channels in and out, R the rank of an adapter.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig, PreTrainedModel

_FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral")
"""Whose norm is weight * x / rms(x), computed in fp32, and whose MLP is down(silu(gate(x)) * up(x))."""
_NORMS, _MLPS, _ATTENTIONS = (
    {f"{family}{part}" for family in _FAMILIES} for part in ("RMSNorm", "MLP", "Attention")
)
_NORMS_OF_HEADS = ("q_norm", "k_norm")
_SHARING_OF_ATTENTION = ("q_proj", "k_proj", "v_proj")
_SHARING_OF_MLP = ("gate_proj", "up_proj")
_SILU = ("silu", "swish")
_ROTARY = "apply_rotary_pos_emb"


class FusedLoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's linear layer with an adapter, whose products are added within the matrix multiplications.

    peft scales the adapter's output and adds it in two passes over (T, O) more, and autograd adds the two
    gradients of the input in another.
    """

    _shared: "_SharedInput | None" = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) to (..., O)."""
        if args or kwargs or not self.is_usual:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        return _adapted_products((self,), x)[0] if self._shared is None else self._shared.product(self, x)

    @property
    def is_usual(self) -> bool:
        """One plain adapter, switched on, not merged."""
        names = self.active_adapters
        usual = len(names) == 1 and names[0] in self.lora_A and names[0] not in self.lora_variant
        return usual and not self.disable_adapters and not self.merged


def share_inputs(lm: nn.Module) -> None:
    """Compute the layers of an LM that have one input together: queries, keys and values; gate and up.

    Their gradients of it are added within the matrix multiplications, and their adapters read it once.
    """
    for module in lm.modules():
        kind = type(module).__name__
        names = _SHARING_OF_ATTENTION if kind in _ATTENTIONS else _SHARING_OF_MLP if kind in _MLPS else ()
        children = (getattr(module, name, None) for name in names)
        layers = tuple(layer for layer in children if isinstance(layer, FusedLoraLinear))
        if len(layers) > 1:
            shared = _SharedInput(layers)
            for layer in layers:
                layer._shared = shared


class _SharedInput:
    """Layers that are called with the same tensor one after the other: the first computes for all."""

    def __init__(self, layers: Sequence[FusedLoraLinear]) -> None:
        self._layers = layers
        self._x: Tensor | None = None
        self._ready: dict[FusedLoraLinear, Tensor] = {}

    def product(self, layer: FusedLoraLinear, x: Tensor) -> Tensor:
        """Of `layer` alone."""
        if layer is self._layers[0] and all(other.is_usual for other in self._layers):
            first, *rest = _adapted_products(self._layers, x)
            self._x, self._ready = x, dict(zip(self._layers[1:], rest, strict=True))
            return first
        if x is not self._x or layer not in self._ready:
            return _adapted_products((layer,), x)[0]
        out = self._ready.pop(layer)
        if not self._ready:
            self._x = None
        return out


def _adapted_products(layers: Sequence[FusedLoraLinear], x: Tensor) -> list[Tensor]:
    """Each layer of (..., I): (..., O)."""
    names = [layer.active_adapters[0] for layer in layers]
    named = list(zip(layers, names, strict=True))
    outs = _AdaptedProducts.apply(
        x.flatten(0, -2),
        tuple(layer.scaling[name] for layer, name in named),
        *(layer.base_layer.weight for layer in layers),
        *(layer.base_layer.bias for layer in layers),
        *(layer.lora_A[name].weight for layer, name in named),
        *(layer.lora_B[name].weight for layer, name in named),
    )
    return [out_TO.view(*x.shape[:-1], -1) for out_TO in outs]


class _AdaptedProducts(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T for each of N frozen W and biases with their A, B and scales."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, scales: tuple[float, ...], *parameters: Any) -> tuple[Tensor, ...]:
        count = len(scales)
        assert not any(ctx.needs_input_grad[2 : 2 + 2 * count]), "the layer under an adapter is frozen"
        weights, biases, a, b = (parameters[n * count : (n + 1) * count] for n in range(4))
        ctx.ranks = [a_RI.shape[0] for a_RI in a]
        ctx.scales = scales
        # The adapters of all layers stand one under the other: N * R rows.
        reduced = x_TI @ _together(a).t()
        outs = []
        parts = reduced.split(ctx.ranks, dim=1)
        for weight_OI, bias_O, b_OR, part_TR, scale in zip(weights, biases, b, parts, scales, strict=True):
            out_TO = x_TI @ weight_OI.t() if bias_O is None else torch.addmm(bias_O, x_TI, weight_OI.t())
            outs.append(out_TO.addmm_(part_TR, b_OR.t(), alpha=scale))
        ctx.save_for_backward(x_TI, reduced, *weights, *a, *b)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(grads)
        x_TI, reduced, *parameters = ctx.saved_tensors
        weights, a, b = (parameters[n * count : (n + 1) * count] for n in range(3))
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[n] for n in (0, 2 + 2 * count, 2 + 3 * count))
        grad_reduced = torch.empty_like(reduced)
        for grad_TO, b_OR, part_TR, scale in zip(
            grads, b, grad_reduced.split(ctx.ranks, dim=1), ctx.scales, strict=True
        ):
            torch.addmm(part_TR, grad_TO, b_OR, beta=0, alpha=scale, out=part_TR)
        grad_x_TI = None
        if needs_x:
            grad_x_TI = grads[0] @ weights[0]
            for grad_TO, weight_OI in zip(grads[1:], weights[1:], strict=True):
                grad_x_TI.addmm_(grad_TO, weight_OI)
            grad_x_TI.addmm_(grad_reduced, _together(a))
        grads_a: Sequence[Tensor | None] = [None] * count
        grads_b: Sequence[Tensor | None] = [None] * count
        if needs_a:
            grads_a = (grad_reduced.t() @ x_TI).split(ctx.ranks)
        if needs_b:
            grads_b = [
                torch.addmm(b_OR, grad_TO.t(), part_TR, beta=0, alpha=scale)
                for b_OR, grad_TO, part_TR, scale in zip(
                    b, grads, reduced.split(ctx.ranks, dim=1), ctx.scales, strict=True
                )
            ]
        return grad_x_TI, None, *[None] * (2 * count), *grads_a, *grads_b


def _together(adapters: Sequence[Tensor]) -> Tensor:
    """(R, I) of each, one under the other; a single one as it is."""
    return adapters[0] if len(adapters) == 1 else torch.cat(tuple(adapters))


def settle_attention() -> None:
    """Keep torch's attention from cuDNN, which plans anew for every number of images or clouds.

    Measured on an H200: 20 ms for a number that had not been there, forward, and 15 ms backward.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def has_liger() -> bool:
    """Whether Liger's kernels can be used here: they are installed, and Triton can compile launchers."""
    installed = all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))
    compilers = [os.environ.get("CC", ""), "clang", "gcc"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return installed and any(shutil.which(name) for name in compilers) and headers.is_file()


def fuses_layers(lm: PretrainedConfig) -> bool:
    """Whether norms, gates and rotary embeddings in the layers of such an LM are fused on CUDA."""
    of_family = lm.model_type in {family.lower() for family in _FAMILIES}
    return of_family and getattr(lm, "hidden_act", None) in _SILU and has_liger()


def fuse_norms(lm: PreTrainedModel) -> None:
    """Let the norms of an LM on CUDA compute in one kernel: torch's.

    Measured on an H200, forward and backward: .16-.4 ms on the host, Liger's through Triton .6-1.2.
    """

    def norm(self: Any, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)

    for module in lm.modules():
        if type(module).__name__ in _NORMS:
            module.forward = MethodType(norm, module)  # type: ignore[method-assign]


def use_liger(lm: PreTrainedModel) -> bool:
    """Let the layers of an LM on CUDA compute with Liger's kernels; whether it has any that can.

    Norms of heads among them: there torch's kernel takes .39 ms of the device where Liger's takes .15. Rotary
    embeddings are a function in transformers: it is replaced by one that takes the kernel for CUDA tensors
    alone.
    """
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    gated = getattr(lm.config, "hidden_act", None) in _SILU

    def norm(self: Any, hidden: Tensor) -> Tensor:
        out: Tensor = liger_rms_norm(hidden, self.weight, self.variance_epsilon)
        return out

    def mlp(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))
        return out

    used = False
    for name, module in lm.named_modules():
        kind = type(module).__name__
        of_heads = kind in _NORMS and name.endswith(_NORMS_OF_HEADS)
        if of_heads or (kind in _MLPS and gated):
            module.forward = MethodType(norm if of_heads else mlp, module)  # type: ignore[method-assign]
            used = True
    for source in {type(m).__module__ for m in lm.modules() if type(m).__name__ in _ATTENTIONS}:
        file = sys.modules[source]
        rotary = getattr(file, _ROTARY)
        if not hasattr(rotary, "eager"):
            setattr(file, _ROTARY, _on_cuda(liger_rope, rotary))
    return used


def _on_cuda(kernel: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        chosen = kernel if q.device.type == "cuda" else eager
        out: tuple[Tensor, Tensor] = chosen(q, k, cos, sin)
        return out

    rotary.eager = eager  # type: ignore[attr-defined]
    return rotary
