"""Layers of frozen weights under ZeRO-3: there when they compute, received while the one before does."""

import weakref
from collections.abc import Sequence
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cad_mllm.train.frozen_layers import FrozenLayers, mark_others_only

LAYERS, WIDTH = 6, 5


class Status(Enum):
    NOT_AVAILABLE = 0
    AVAILABLE = 1


class Layer(nn.Module):
    """A frozen weight that is shared out, and one that trains and is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.trained = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.frozen.weight)
        return (y + self.trained(x)).tanh()


class _Product(torch.autograd.Function):
    """As ZeRO-3 and our kernels compute it: the parameter is kept for the backward pass, not a view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


class Sent:
    """Stands for the other ranks: what was asked of them, and what of it is still in memory."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.asked: list[int] = []
        self.most = 0
        self._waited: list[bool] = []
        self._alive: list[weakref.ref[Tensor]] = []
        self._weights = {id(layer.frozen.weight): layer.frozen.weight.data.clone() for layer in layers}
        self._numbers = {id(layer.frozen.weight): number for number, layer in enumerate(layers)}

    def receive(self, parameters: Sequence[Any]) -> tuple["Receipt", list[Tensor]]:
        (parameter,) = parameters
        self.asked.append(self._numbers[id(parameter)])
        whole = torch.full_like(self._weights[id(parameter)], torch.nan)
        self._alive = [ref for ref in self._alive if ref() is not None] + [weakref.ref(whole)]
        self.most = max(self.most, len(self._alive))
        return Receipt(whole, self._weights[id(parameter)]), [whole]


class Receipt:
    """The weights are there once one has waited."""

    def __init__(self, whole: Tensor, sent: Tensor) -> None:
        self._whole, self._sent = whole, sent

    def wait(self) -> None:
        self._whole.copy_(self._sent)


def stack() -> list[Layer]:
    torch.manual_seed(1)
    return [Layer().double() for _ in range(LAYERS)]


def shared_out(layers: Sequence[Layer]) -> Sent:
    """The layers as DeepSpeed leaves them: of the frozen weights nothing is there."""
    sent = Sent(layers)
    for layer in layers:
        for p in layer.parameters():
            p.ds_persist = p.requires_grad  # type: ignore[attr-defined]
        frozen: Any = layer.frozen.weight
        frozen.ds_status, frozen.data = Status.NOT_AVAILABLE, torch.empty(0, dtype=torch.float64)
        layer.register_forward_pre_hook(lambda *_: None)  # somebody else's: it stays
    FrozenLayers(layers, sent.receive)
    return sent


def step(layers: Sequence[Layer], recompute: bool) -> list[Tensor]:
    """The input's gradient and those of the weights that train."""
    x = torch.linspace(-1, 1, 3 * WIDTH, dtype=torch.float64).view(3, WIDTH).requires_grad_()
    y = x
    for layer in layers:
        y = checkpoint(layer, y, use_reentrant=False) if recompute else layer(y)
    y.square().sum().backward()
    grads = [x.grad, *(layer.trained.weight.grad for layer in layers)]
    for layer in layers:
        layer.trained.weight.grad = None
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_whole_layers_and_what_a_pass_ends_with_begins_the_next(
    recompute: bool,
) -> None:
    expected = step(stack(), recompute)
    layers = stack()
    sent = shared_out(layers)
    for _ in range(3):
        found = step(layers, recompute)
        assert len(found) == LAYERS + 1
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    last = LAYERS - 1
    forward, backward = list(range(2, LAYERS)), list(range(last - 2, -1, -1))
    assert sent.asked == [0, 1, *forward, *backward, *forward, *backward, *forward, *backward]
    assert sent.most == 2


def test_the_next_layer_is_asked_for_before_this_one_computes() -> None:
    layers = stack()
    sent = shared_out(layers)
    seen = []
    for layer in layers:
        layer.trained.register_forward_hook(lambda *_: seen.append(sent.asked[-1]))
    step(layers, recompute=False)
    assert seen == [1, 2, 3, 4, 5, 5]


def test_between_steps_and_after_a_validation_nothing_looks_as_if_it_were_there() -> None:
    layers = stack()
    whole = stack()
    shared_out(layers)
    x = torch.ones(1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(nn.Sequential(*layers)(x), nn.Sequential(*whole)(x))
    step(layers, recompute=True)
    frozen: list[Any] = [layer.frozen.weight for layer in layers]
    assert all(p.numel() == 0 and p.ds_status is Status.NOT_AVAILABLE for p in frozen)


def test_layers_in_any_order_are_the_same() -> None:
    layers, whole = stack(), stack()
    shared_out(layers)
    order = [3, 0, 0, 5, 2]
    found, expected = (step([part[n] for n in order], recompute=False) for part in (layers, whole))
    for ours, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_hooks_of_others_stay_and_those_of_deepspeed_go() -> None:
    def gathers(*_: object) -> None:
        raise AssertionError("DeepSpeed's")

    gathers.__module__ = "deepspeed.runtime.zero.parameter_offload"
    layers = stack()
    called: list[int] = []
    layers[2].register_forward_hook(lambda *_: called.append(2))
    layers[2].register_forward_hook(gathers)
    layers[4].register_forward_pre_hook(gathers)
    shared_out(layers)
    step(layers, recompute=False)
    assert called == [2]


def test_what_is_marked_for_a_forward_pass_has_parameters_and_lies_outside_of_the_layers() -> None:
    class Engine:
        """Goes through the modules as DeepSpeed's does."""

        def __init__(self) -> None:
            self.module = nn.Sequential(nn.Linear(2, 2), nn.GELU(), Layer(), nn.LayerNorm(2))
            self.seen: list[str] = []

        def _forward_prologue(self, inputs: object, kwargs: object) -> None:
            self.seen += [type(part).__name__ for part in self.module.modules()]

        def _forward_epilogue(self) -> None:
            self.seen += [type(part).__name__ for part in self.module.modules()]
            raise RuntimeError("midway")

    engine = Engine()
    everything = list(engine.module.modules())
    mark_others_only(engine, [engine.module[2]])
    engine._forward_prologue((), {})
    assert engine.seen == ["Linear", "LayerNorm"]
    with pytest.raises(RuntimeError, match="midway"):
        engine._forward_epilogue()
    assert engine.seen == ["Linear", "LayerNorm"] * 2
    assert list(engine.module.modules()) == everything
