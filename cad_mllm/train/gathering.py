"""What ZeRO-3 gathers at once, what it keeps whole, and how little Python there is between the layers.

Measured on two H200, an 8B LM with LoRA: the GPUs wait for DeepSpeed's loops over parameters, not for NVLink.
The private attributes of DeepSpeed's ZeRO-3 that are read here are the ones of DeepSpeed 0.19.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d

from cad_mllm.model.loss import LinearCrossEntropy

_GATHERS_AHEAD = 2
_PORTION_BYTES = 2**29
"""Of weights that are gathered in one call: it takes as much memory again, and all of an 8B LM are 16 GB."""


def gather_layer_by_layer(module: nn.Module) -> None:
    """Let ZeRO-3 gather a whole decoder layer at once instead of each weight by itself.

    Measured on an 8B LM with LoRA: 2.7 times the tokens per second; the time went into hundreds of small
    all-gathers and the Python hooks around them.
    """
    from deepspeed.utils import set_z3_leaf_modules

    named = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    # Without the embeddings among them: pictures need no gradient, and DeepSpeed then takes a leaf module for
    # finished before its weights have theirs.
    layers = named & {type(part).__name__ for part in module.modules() if _is_layer(part)}
    if layers:
        set_z3_leaf_modules(module, sorted(layers), raise_if_not_found=False)


def _is_layer(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def gather_for_the_forward_pass_alone(zero: Any) -> None:
    """Leave frozen embeddings and a frozen head where they are in the backward pass, which needs neither.

    DeepSpeed gathers them there as any module's weights: of an 8B LM 1.2 GB each. (The gradients of the loss
    are computed with it: see `LinearCrossEntropy`.)
    """
    offload = zero.parameter_offload
    idle = {
        module
        for module in offload.module.modules()
        if isinstance(module, nn.Embedding | LinearCrossEntropy)
        and not any(p.requires_grad for p in module.parameters())
    }

    def unless_idle(hook: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def run(module: nn.Module) -> None:
            if module not in idle:
                hook(module)

        return run

    for name in ("pre_sub_module_backward_function", "post_sub_module_backward_function"):
        setattr(offload, name, unless_idle(getattr(offload, name)))


class KeptWhole:
    """The persistent parameters of ZeRO-3: whole on every rank, from the start to the end of a run.

    DeepSpeed releases them before each update and gathers each by itself after it: on an 8B LM with LoRA 649
    of the 717 all-gathers of a step. Here an update is followed by one all-gather of all that it changed
    (some, if all weights train). And where DeepSpeed walks through a layer, ten times a micro-batch, it does
    not see them any more.
    """

    def __init__(self, zero: Any) -> None:
        offload = zero.parameter_offload
        assert zero.persistent_parameters is offload.persistent_parameters
        assert callable(offload.partition_all_parameters)
        # What DeepSpeed holds quantised it has to gather itself.
        kept = [p for p in offload.persistent_parameters if not hasattr(p.ds_tensor, "ds_quant_scale")]
        assert all(p.ds_persist for p in kept)
        of_deepspeed = [p for p in offload.persistent_parameters if hasattr(p.ds_tensor, "ds_quant_scale")]
        offload.persistent_parameters[:] = of_deepspeed
        for p in kept:
            p.data = torch.empty(p.ds_shape, dtype=p.dtype, device=p.device)
            p.ds_status = type(p.ds_status).AVAILABLE
            p.ds_active_sub_modules.clear()
        for shards in _portions(kept, zero.dp_process_group):
            shards.gather()
        self._trained = _portions([p for p in kept if p.requires_grad], zero.dp_process_group)
        _let_the_host_run_ahead(offload.get_param_coordinator(), _gathered_at_once(offload.module))
        hidden = frozenset(id(p) for p in kept)
        sharded = _Shown(offload.module, hidden)
        offload.partition_all_parameters = lambda: offload.get_param_coordinator().release_and_reset_all(
            sharded
        )
        for layer in offload.module.modules():
            if getattr(layer, "_z3_leaf", False):
                layer.named_parameters = _Shown(layer, hidden).named_parameters  # type: ignore[method-assign]

    def refresh(self) -> None:
        """Gather what an update has changed; on all ranks alike."""
        for shards in self._trained:
            shards.gather()


def _gathered_at_once(module: nn.Module) -> int:
    """Most parameters that are gathered together."""
    layers = (layer for layer in module.modules() if getattr(layer, "_z3_leaf", False))
    return max((sum(not p.ds_persist for p in layer.parameters()) for layer in layers), default=1)  # type: ignore[attr-defined]


def _let_the_host_run_ahead(coordinator: Any, gathered_at_once: int) -> None:
    """Let it start two gathers that the GPU has not finished: it is what DeepSpeed means.

    But DeepSpeed counts parameters: with a layer at a time it waited in each for the layer's own gather.
    """
    name = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"
    assert getattr(coordinator, name) == _GATHERS_AHEAD
    setattr(coordinator, name, _GATHERS_AHEAD * max(1, gathered_at_once))


class _Shards:
    """Parameters of one dtype, gathered in one call."""

    def __init__(self, parameters: Sequence[Any], group: Any) -> None:
        self._parameters = parameters
        self._group = group
        self._own = [p.ds_tensor.view(-1) for p in parameters]
        self._sizes = [own.numel() for own in self._own]

    @torch.no_grad()
    def gather(self) -> None:
        """Make the whole parameters what the ranks' shards are; on all ranks alike."""
        from deepspeed import comm

        ranks = comm.get_world_size(self._group)
        own_L = torch.cat(self._own).to(self._parameters[0].device)
        all_WL = own_L.new_empty(ranks, own_L.numel())
        comm.all_gather_into_tensor(all_WL.view(-1), own_L, group=self._group)
        padded: list[tuple[Tensor, Tensor]] = []
        whole_WN = []
        # Looked up each time: outside of the layers DeepSpeed may have gathered them anew.
        for parameter, size in zip(self._parameters, self._sizes, strict=True):
            data: Tensor = parameter.data
            if data.numel() == ranks * size:
                whole_WN.append(data.view(ranks, size))
            else:  # the last ranks' shards are longer than what is left of the parameter
                whole_WN.append(data.new_empty(ranks, size))
                padded.append((data, whole_WN[-1]))
        torch.split_with_sizes_copy(all_WL, self._sizes, dim=1, out=whole_WN)
        for data, part_WN in padded:
            data.copy_(part_WN.view(-1)[: data.numel()].view_as(data))


def _portions(parameters: Sequence[Any], group: Any) -> list[_Shards]:
    """Of one dtype and of limited size each; a parameter is in one of them."""
    portions: list[list[Any]] = []
    for dtype in sorted({p.ds_tensor.dtype for p in parameters}, key=str):
        room = 0
        for p in parameters:
            if p.ds_tensor.dtype == dtype:
                size = p.ds_numel * dtype.itemsize
                if size > room:
                    portions.append([])
                    room = _PORTION_BYTES
                portions[-1].append(p)
                room -= size
    return [_Shards(portion, group) for portion in portions]


def gather_in_place(module: nn.Module) -> None:
    """Let the shards of a layer's weights be received where the weights are used.

    DeepSpeed copies them into one buffer, gathers that, and copies each weight out of it: 27 ms of the GPU in
    a step of an 8B LM with LoRA, and twice the memory of a layer.
    """
    # All parameters: DeepSpeed calls this of the first of a set, which on each rank is another one, and ranks
    # that gather in different ways wait for each other for ever.
    for p in module.parameters():
        p.all_gather_coalesced = partial(_gather_in_place, p.all_gather_coalesced)  # type: ignore[attr-defined]


def _gather_in_place(
    of_deepspeed: Callable[..., Any], params: Iterable[Any], safe_mode: bool = False, quantize: bool = False
) -> Any:
    """As `Parameter.all_gather_coalesced`, which does what is rare: padded or quantised shards."""
    ordered = sorted(params, key=lambda p: p.ds_id)  # the same on all ranks
    group = ordered[0].ds_process_group
    usual = not (safe_mode or quantize) and all(
        p.ds_process_group is group and is_received_whole(p) for p in ordered
    )
    if not usual:
        return of_deepspeed(ordered, safe_mode=safe_mode, quantize=quantize)
    for p in ordered:
        assert p.ds_status is type(p.ds_status).NOT_AVAILABLE
        p.ds_status = type(p.ds_status).INFLIGHT
    gathered, whole = receive(ordered)
    return _InFlight(gathered, ordered, whole)


def is_received_whole(parameter: Any) -> bool:
    """Whether the shards of all ranks, one after the other, are a parameter of DeepSpeed's ZeRO-3."""
    ranks, shard = distributed.get_world_size(parameter.ds_process_group), parameter.ds_tensor
    return bool(
        ranks > 1
        and parameter.ds_secondary_tensor is None
        and parameter.ds_numel == ranks * shard.ds_numel
        and shard.numel() == shard.ds_numel
        and not hasattr(shard, "ds_quant_scale")
    )


def comes_apart_into_rows(parameter: Any) -> bool:
    """Whether a parameter is frozen and shared out, and each rank has as many whole rows of it."""
    return (
        not parameter.requires_grad
        and not parameter.ds_persist
        and is_received_whole(parameter)
        and parameter.ds_shape[0] % distributed.get_world_size(parameter.ds_process_group) == 0
    )


def receive(parameters: Sequence[Any]) -> tuple["Receipt", list[Tensor]]:
    """Start to gather parameters for which `is_received_whole`, of one group; on all ranks alike.

    Returns what to wait with, and the whole weights, which are there then.
    """
    group = parameters[0].ds_process_group
    whole = [p.ds_tensor.new_empty(p.ds_shape, device=p.device) for p in parameters]
    # They may rest in host memory.
    shards = [p.ds_tensor.to(p.device, non_blocking=True) for p in parameters]
    if whole[0].device.type == "cpu":
        # Coalesced, gloo's threads aborted now and then on a busy machine, their heap damaged.
        with torch.no_grad():
            works = [
                distributed.all_gather_into_tensor(w.view(-1), shard, group=group, async_op=True)
                for w, shard in zip(whole, shards, strict=True)
            ]
        return _Several(works), whole
    with torch.no_grad(), distributed_c10d._coalescing_manager(group, async_ops=True) as gathered:
        for w, shard in zip(whole, shards, strict=True):
            distributed.all_gather_into_tensor(w.view(-1), shard, group=group)
    return gathered, whole


class Receipt(Protocol):
    """Weights on their way."""

    def wait(self) -> object:
        """Let the current stream, not the host, wait for them."""


@dataclass(frozen=True)
class _Several:
    works: Sequence[distributed.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class _InFlight:
    """Parameters that are being received; DeepSpeed waits for it."""

    def __init__(self, gathered: Any, params: Sequence[Any], whole: Sequence[Tensor]) -> None:
        self._gathered, self._params, self._whole = gathered, params, whole

    def wait(self, handle_dependency: bool = True) -> None:
        """Let the current stream wait, and make the parameters whole."""
        if self._whole:
            self._gathered.wait()
            for p, w in zip(self._params, self._whole, strict=True):
                p.data = w
                p.ds_status = type(p.ds_status).AVAILABLE
            self._whole = ()


@dataclass(frozen=True)
class _Shown:
    """Stands for a module where DeepSpeed goes through its parameters: those that it is to see."""

    module: Any
    hidden: frozenset[int]
    """By id."""

    def __post_init__(self) -> None:
        named = tuple((n, p) for n, p in self.module.named_parameters() if id(p) not in self.hidden)
        object.__setattr__(self, "_named", named)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of a module."""
        assert not prefix and remove_duplicate
        named: tuple[tuple[str, nn.Parameter], ...] = self._named  # type: ignore[attr-defined]
        return iter(named if recurse else [(n, p) for n, p in named if "." not in n])

    def ds_external_parameters(self) -> Iterable[tuple[Any, nn.Parameter]]:
        """As DeepSpeed adds it to a module."""
        external: Iterable[tuple[Any, nn.Parameter]] = self.module.ds_external_parameters()
        return external


def without_profiler_ranges() -> None:
    """Let DeepSpeed leave out its marks for NVIDIA's profiler: two calls around each of its own."""
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
