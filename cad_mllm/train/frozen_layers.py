"""Decoder layers under ZeRO-3 whose shared-out weights are all frozen, as with LoRA: gathered by our hooks.

Frozen weights have no gradients and never change. So what DeepSpeed keeps account of for each parameter at
each module falls away: the layer that comes next is received while this one computes, what the forward pass
ends with is what the backward pass begins with, and the host waits for the GPU nowhere.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cad_mllm.train.gathering import Receipt, is_received_whole

_AT_A_TIME = 2
"""Layers whose weights are there: the one that computes and the one that comes next, or was the last."""


Receive = Callable[[Sequence[Any]], tuple[Receipt, list[Tensor]]]
"""Starts to receive parameters: (what to wait with, the whole weights, which are there then)."""


def frozen_layers(zero: Any) -> list[nn.Module]:
    """The layers of a model sharded by DeepSpeed's ZeRO-3 that can be gathered so, in their order."""
    offload = zero.parameter_offload
    if offload.zero_quantized_weights:
        return []
    layers = (layer for layer in offload.module.modules() if getattr(layer, "_z3_leaf", False))
    return [layer for layer in layers if _is_usual(layer)]


def sharded_parameters(layer: nn.Module) -> list[Any]:
    """Those that are not kept whole, in the order of the layer: the same on all ranks."""
    parameters: Iterable[Any] = layer.parameters()
    return [p for p in parameters if not p.ds_persist]


def _is_usual(layer: nn.Module) -> bool:
    sharded = sharded_parameters(layer)
    return bool(sharded) and all(not p.requires_grad and is_received_whole(p) for p in sharded)


class FrozenLayers:
    """Gathers each of the layers before it computes, and drops it after.

    Call it when DeepSpeed has sharded the model; all ranks then run the layers alike. The weights are memory
    of the stream that computes: what a layer leaves, the layer after the next is received into, by a stream
    that waits for it.
    """

    def __init__(self, layers: Sequence[nn.Module], receive: Receive) -> None:
        self._sharded = [sharded_parameters(layer) for layer in layers]
        self._receive = receive
        self._dropped = [[p.data for p in sharded] for sharded in self._sharded]
        self._there: dict[int, tuple[Receipt, list[Tensor]]] = {}
        """By number of the layer, the one received first first."""
        self._computing: set[int] = set()
        for number, layer in enumerate(layers):
            without_deepspeed(layer)
            layer.register_forward_pre_hook(partial(self._before_forward, number))
            layer.register_forward_hook(partial(self._after_forward, number))
            layer.register_full_backward_pre_hook(partial(self._before_backward, number))
            layer.register_full_backward_hook(partial(self._after_backward, number))

    def _before_forward(self, number: int, *_: object) -> None:
        self._enter(number, then=number - 1 if _in_backward() else number + 1)

    def _after_forward(self, number: int, *_: object) -> None:
        if not _in_backward():  # computed anew there: the gradients follow
            self._leave(number)

    def _before_backward(self, number: int, *_: object) -> None:
        self._enter(number, then=number - 1)

    def _after_backward(self, number: int, *_: object) -> None:
        self._leave(number)

    def _enter(self, number: int, then: int) -> None:
        if number in self._computing:
            return
        self._computing.add(number)
        receipt, whole = self._start(number)
        receipt.wait()
        for p, w in zip(self._sharded[number], whole, strict=True):
            p.data = w
            p.ds_status = type(p.ds_status).AVAILABLE
        if 0 <= then < len(self._sharded):
            self._start(then)

    def _start(self, number: int) -> tuple[Receipt, list[Tensor]]:
        """Begin to receive a layer, if that has not begun."""
        if number not in self._there:
            idle = [other for other in self._there if other not in self._computing]
            for other in idle[: max(0, len(self._there) + 1 - _AT_A_TIME)]:
                # Its memory is then free for what this stream does next.
                self._there.pop(other)[0].wait()
            self._there[number] = self._receive(self._sharded[number])
        return self._there[number]

    def _leave(self, number: int) -> None:
        self._computing.discard(number)
        for p, nothing in zip(self._sharded[number], self._dropped[number], strict=True):
            p.data = nothing
            p.ds_status = type(p.ds_status).NOT_AVAILABLE


def mark_others_only(engine: Any, layers: Sequence[nn.Module]) -> None:
    """Let DeepSpeed mark only modules with parameters, and none in these layers, as being in a forward pass.

    It marks all of them before each micro-batch, to gather what one uses of another: 3,000 of an 8B LM with
    LoRA, in 7 ms in which the GPU has nothing to do. In layers that are gathered at once nothing is missing.
    """
    within = {id(part) for layer in layers for part in layer.modules()}
    marked = [part for part in engine.module.modules() if part._parameters and id(part) not in within]

    def over_marked(walk: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            engine.module.modules = lambda: iter(marked)
            try:
                return walk(*given)
            finally:
                del engine.module.modules

        return run

    engine._forward_prologue = over_marked(engine._forward_prologue)
    engine._forward_epilogue = over_marked(engine._forward_epilogue)


def without_deepspeed(module: nn.Module) -> None:
    """Take the hooks of DeepSpeed's ZeRO-3 from a module, by which it gathers and drops its weights."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook.__module__.startswith("deepspeed."):
                del hooks[key]


def _in_backward() -> bool:
    """Whether autograd is at work: with gradient checkpointing a layer's forward pass comes there again."""
    return bool(torch._C._current_graph_task_id() != -1)
