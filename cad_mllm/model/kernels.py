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
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

_FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral")
"""Whose norm is weight * x / rms(x), computed in fp32, and whose MLP is down(silu(gate(x)) * up(x))."""
_NORMS, _MLPS, _ATTENTIONS = (
    {f"{family}{part}" for family in _FAMILIES} for part in ("RMSNorm", "MLP", "Attention")
)
_NORMS_OF_HEADS = ("q_norm", "k_norm")
_SILU = ("silu", "swish")
_ROTARY = "apply_rotary_pos_emb"


class FusedLoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's linear layer with an adapter, whose products are added within the matrix multiplications.

    peft scales the adapter's output and adds it in two passes over (T, O) more, and autograd adds the two
    gradients of the input in another.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) to (..., O)."""
        names = self.active_adapters
        usual = len(names) == 1 and names[0] in self.lora_A and names[0] not in self.lora_variant
        if not usual or self.disable_adapters or self.merged or args or kwargs:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        (name,) = names
        base = self.base_layer
        x_TI = x.flatten(0, -2)
        out_TO: Tensor = _AdaptedProduct.apply(
            x_TI,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return out_TO.view(*x.shape[:-1], -1)


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, for a frozen W and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        assert not any(ctx.needs_input_grad[1:3]), "the layer under an adapter is frozen"
        out_TO = x_TI @ weight_OI.t() if bias_O is None else torch.addmm(bias_O, x_TI, weight_OI.t())
        reduced_TR = x_TI @ a_RI.t()
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, reduced_TR)
        ctx.scale = scale
        return out_TO.addmm_(reduced_TR, b_OR.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, reduced_TR = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x_TI = grad_a_RI = grad_b_OR = None
        grad_reduced_TR = (grad_TO @ b_OR).mul_(ctx.scale)
        if needs_x:
            grad_x_TI = (grad_TO @ weight_OI).addmm_(grad_reduced_TR, a_RI)
        if needs_a:
            grad_a_RI = grad_reduced_TR.t() @ x_TI
        if needs_b:
            grad_b_OR = (grad_TO.t() @ reduced_TR).mul_(ctx.scale)
        return grad_x_TI, None, None, grad_a_RI, grad_b_OR, None


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
