"""The engines: plain torch in one process, or DeepSpeed ZeRO over many ranks, behind one interface.

The fit loop sees `backward`, `step`, and the fp32 state as `Flat` buffers; where that state lives inside
DeepSpeed is known here and nowhere else. The private attributes of DeepSpeed's ZeRO optimisers that are
read below are the ones of DeepSpeed 0.19; `_flats_*` asserts what it relies on.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cad_mllm.train.distributed import World
from cad_mllm.train.frozen_layers import (
    FrozenLayers,
    frozen_layers,
    mark_others_only,
    sharded_parameters,
    without_deepspeed,
)
from cad_mllm.train.gathering import (
    KeptWhole,
    gather_for_the_forward_pass_alone,
    gather_in_place,
    gather_layer_by_layer,
    receive,
    without_profiler_ranges,
)
from cad_mllm.train.gradients import measure_at_once, update_at_once
from cad_mllm.train.optim import Flat, Fragment, NamedGroups, zero_moments
from cad_mllm.train.peer_memory import embeddings_by_rows, map_peer_memory
from cad_mllm.train.spread_head import spread_head
from cad_mllm.train.zero import OptimizerSettings, ZeroConfig

_LOG = logging.getLogger("DeepSpeed")


class Engine(Protocol):
    """What the trainer needs of an engine."""

    module: nn.Module
    """Call this for the forward pass."""
    optimizer: torch.optim.Optimizer
    """Holds the Adam state, keyed by the master buffers of `flats`."""
    flats: tuple[Flat, ...]

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Summed over micro-batches and ranks they are those of the summed losses."""

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """Clip, update, clear the gradients; call after the last micro-batch. Returns the gradient norm.

        A norm that is not finite (on all ranks alike) means that nothing was updated.
        """

    def rehearse(self, compute_loss: Callable[[], Tensor], *, micro_batches: int) -> None:
        """A whole optimiser step that changes nothing, for the memory that it takes (on all ranks alike).

        Its gradients are made NaN, so it is skipped as every step with such gradients is.
        """

    def refresh(self) -> None:
        """Make the model's weights follow the master buffers (after a checkpoint was read into them)."""

    def profile_communication(self, on: bool) -> None:
        """Measure the collectives; off writes their statistics to the engine's log (call on all ranks)."""


def reset_groups(engine: Engine, groups: Iterable[str]) -> None:
    """Fresh Adam moments for the groups that start to train now."""
    wanted = set(groups)
    zero_moments(engine.optimizer, [flat for flat in engine.flats if flat.group in wanted])


def _set_learning_rates(optimizer: torch.optim.Optimizer, learning_rates: Mapping[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rates[group["name"]]


class PlainEngine:
    """One process, no DeepSpeed; fp32 master weights beside a bf16 model, as in ZeRO."""

    def __init__(
        self,
        module: nn.Module,
        groups: NamedGroups,
        settings: OptimizerSettings,
        *,
        max_grad_norm: float,
    ) -> None:
        self.module = module
        self._max_grad_norm = max_grad_norm or math.inf  # 0: no clipping, as in DeepSpeed
        self._params = [p for params in groups.values() for _, p in params]
        # An fp32 parameter is its own master: the same storage, so that nothing has to be copied back.
        self._masters = [nn.Parameter(p.detach().float().view(-1)) for p in self._params]
        pairs = zip(self._params, self._masters, strict=True)
        rounded = [(p, m) for p, m in pairs if p.data_ptr() != m.data_ptr()]
        self._copies = [p.detach().view(-1) for p, _ in rounded]
        self._originals = [m.detach() for _, m in rounded]
        masters = iter(self._masters)
        master_groups = {name: [(n, next(masters)) for n, _ in params] for name, params in groups.items()}
        self.optimizer = _build_optimizer(master_groups, settings, offload=False)
        self.flats = tuple(
            Flat(
                group=name,
                master=master,
                fragments=(
                    Fragment(
                        name=n, numel=p.numel(), shape=tuple(p.shape), start=0, offset=0, length=p.numel()
                    ),
                ),
            )
            for name, params in groups.items()
            for (n, p), (_, master) in zip(params, master_groups[name], strict=True)
        )

    def backward(self, loss: Tensor) -> None:
        """Accumulate into fp32: bf16 sums over many micro-batches lose the small ones."""
        loss.backward()
        added: list[tuple[Tensor, Tensor]] = []
        for p, master in zip(self._params, self._masters, strict=True):
            if p.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            added.append((master.grad, p.grad.view(-1)))
            p.grad = None
        # A small model waits for Python, not for its kernels: one call for all parameters.
        if added:
            torch._foreach_add_([to for to, _ in added], [grad for _, grad in added])

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """See `Engine.step`. The clipping factor is DeepSpeed's: max_norm / (norm + 1e-6), at most 1."""
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm))
        if math.isfinite(norm):
            _set_learning_rates(self.optimizer, learning_rates)
            self.optimizer.step()
            self.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def rehearse(self, compute_loss: Callable[[], Tensor], *, micro_batches: int) -> None:
        """See `Engine.rehearse`."""
        for _ in range(micro_batches):
            self.backward(compute_loss() * math.nan)
        self.step({})

    @torch.no_grad()
    def refresh(self) -> None:
        """See `Engine.refresh`."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)

    def profile_communication(self, on: bool) -> None:
        """One process: there is no communication to measure."""


class ZeroEngine:
    """DeepSpeed ZeRO-1, 2 or 3, with or without offload to host memory."""

    def __init__(
        self, module: nn.Module, groups: NamedGroups, zero: ZeroConfig, world: World, *, log_dir: Path
    ) -> None:
        import deepspeed

        # DeepSpeed 0.19 calls collectives by names that torch is renaming: a warning for each call.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        _log_to_file(log_dir / f"deepspeed_rank{world.rank}.log")
        if world.device.type == "cpu":
            # Every reduction of gradients starts `numactl` to count what it takes for devices: a thousand
            # processes in twenty steps. Not by LOCAL_SIZE, see `distributed.world`.
            accelerator = deepspeed.accelerator.get_accelerator()
            accelerator.device_count = lambda: world.local_size
        deepspeed.init_distributed()
        optimizer = _build_optimizer(groups, zero.optimizer, offload=zero.offload_optimizer)
        without_profiler_ranges()
        if zero.stage == 3:
            gather_layer_by_layer(module)
        # DeepSpeed moves parameters into groups of its own: the names are ours to keep.
        names = {id(p): n for params in groups.values() for n, p in params}
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=zero.config
        )
        self._kept = None
        if zero.stage == 3:
            gather_for_the_forward_pass_alone(self._zero)
            self._kept = KeptWhole(self._zero)
            assert world.control is not None, "DeepSpeed runs in a process group"
            spread_head(self._engine.module, world.control)
            gather_in_place(self._engine.module)
            _gather_frozen(self._engine, self._zero, world)
        (update_at_once if zero.stage == 3 else measure_at_once)(self._zero)
        self.module: nn.Module = self._engine
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        self._stage = zero.stage
        accumulation = zero.config["gradient_accumulation_steps"]
        assert isinstance(accumulation, int)
        self._accumulation = accumulation
        # DeepSpeed divides by the micro-batches of a step and averages over ranks; we want the sum.
        self._loss_scale = accumulation * world.size
        comms_logger = deepspeed.comm.comm.comms_logger
        # Switched on for single steps only: measuring makes every collective wait for the device.
        self._comms_logger = comms_logger if comms_logger.enabled else None
        comms_logger.enabled = False
        build = _flats_zero3 if zero.stage == 3 else _flats_zero12
        self.flats = build(self._zero, names, world.rank)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        self._engine.backward(loss * self._loss_scale)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; updates nothing

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """See `Engine.step`."""
        assert self._engine.is_gradient_accumulation_boundary(), "step() before the last micro-batch"
        _set_learning_rates(self.optimizer, learning_rates)
        self._engine.step()
        if self._kept is not None:
            self._kept.refresh()
        return float(self._engine.get_global_grad_norm())

    def rehearse(self, compute_loss: Callable[[], Tensor], *, micro_batches: int) -> None:
        """See `Engine.rehearse`; between two steps only."""
        assert self._engine.micro_steps % self._accumulation == 0, "rehearse() in the middle of a step"
        # These stand for all micro-batches of the step: the others count as done.
        self._engine.micro_steps += self._accumulation - micro_batches
        with _unsaid("OVERFLOW"):  # meant, here: nobody should take it for a step of the training
            for _ in range(micro_batches):
                self.backward(compute_loss() * math.nan)
            self._engine.step()

    @torch.no_grad()
    def refresh(self) -> None:
        """See `Engine.refresh`: what DeepSpeed does at the end of its own step."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        assert self._kept is not None
        self._kept.refresh()

    def profile_communication(self, on: bool) -> None:
        """See `Engine.profile_communication`; does nothing if the JSON does not enable comms_logger."""
        if self._comms_logger is None:
            return
        self._comms_logger.enabled = on
        if on:
            self._comms_logger.comms_dict.clear()
        else:
            # The ranks' own counts: no collective, so a rank that is late delays nobody.
            measured = self._comms_logger.log_all(print_log=False, return_dict=True)
            _LOG.info(
                "communication of one micro-batch and the step after it:\n%s",
                _communication_table(measured["summary"]),
            )


def _gather_frozen(engine: Any, zero: Any, world: World) -> None:
    """Frozen layers of ZeRO-3 and frozen embeddings: out of each other's memory where the GPUs can."""
    layers = frozen_layers(zero)
    embeddings = embeddings_by_rows(zero.parameter_offload.module)
    of_layers = [sharded_parameters(layer) for layer in layers]
    memory = map_peer_memory([*of_layers, *([e.weight] for e in embeddings)], world)
    FrozenLayers(layers, receive if memory is None else memory.receive)
    mark_others_only(engine, layers)
    if memory is not None:
        for embedding in embeddings:
            embedding.forward = partial(memory.look_up, embedding.weight)  # type: ignore[method-assign]
            without_deepspeed(embedding)


def _communication_table(summary: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    lines = [f"{'operation':<40}{'message':>12}{'count':>8}{'total ms':>12}{'GB/s (bus)':>12}"]
    for operation, sizes in sorted(summary.items()):
        for row in (sizes[size] for size in sorted(sizes)):
            lines.append(
                f"{operation:<40}{row['msg_size_str']:>12}{row['count']:>8}"
                f"{row['total_latency_ms']:>12.2f}{row['busbw_avg_gbps']:>12.2f}"
            )
    return "\n".join(lines)


@contextmanager
def _unsaid(word: str) -> Iterator[None]:
    """Keep what DeepSpeed logs with `word` in it from log and console."""

    def others(record: logging.LogRecord) -> bool:
        return word not in record.getMessage()

    _LOG.addFilter(others)
    try:
        yield
    finally:
        _LOG.removeFilter(others)


def _log_to_file(path: Path) -> None:
    """DeepSpeed's own log goes to a file; only its warnings reach the console."""
    for handler in _LOG.handlers:
        handler.setLevel(logging.WARNING)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    _LOG.addHandler(to_file)
    _LOG.setLevel(logging.INFO)


def _flats_zero12(zero: Any, names: Mapping[int, str], rank: int) -> tuple[Flat, ...]:
    """ZeRO-1/2: the parameters of a group lie end to end; each rank owns one equal slice of that line."""
    flats = []
    for i, group in enumerate(zero.optimizer.param_groups):
        size = int(zero.partition_size[i])
        low, high = rank * size, (rank + 1) * size
        fragments = []
        for p, meta, at in zip(
            zero.round_robin_bit16_groups[i],
            zero.round_robin_bit16_meta[i],
            zero.round_robin_bit16_offsets[i],
            strict=True,
        ):
            begin, end = max(at, low), min(at + meta.numel(), high)
            if begin < end:
                fragments.append(
                    Fragment(
                        name=names[id(p)],
                        numel=meta.numel(),
                        shape=tuple(meta.shape),
                        start=begin - at,
                        offset=begin - low,
                        length=end - begin,
                    )
                )
        master = zero.single_partition_of_fp32_groups[i]
        assert master.numel() == size and master.dtype == torch.float32
        flats.append(Flat(group=group["name"], master=master, fragments=tuple(fragments)))
    return tuple(flats)


def _flats_zero3(zero: Any, names: Mapping[int, str], rank: int) -> tuple[Flat, ...]:
    """ZeRO-3: each parameter is cut into equal slices by itself; a sub-group lines up this rank's slices."""
    flats = []
    for i, params in enumerate(zero.fp16_groups):
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]
        fragments, offset = [], 0
        for p in params:
            size = int(p.partition_numel())
            begin, end = rank * size, min((rank + 1) * size, int(p.ds_numel))
            if begin < end:
                fragments.append(
                    Fragment(
                        name=names[id(p)],
                        numel=int(p.ds_numel),
                        shape=tuple(p.ds_shape),
                        start=begin,
                        offset=offset,
                        length=end - begin,
                    )
                )
            offset += size
        master = zero.fp32_partitioned_groups_flat[i]
        assert master.numel() == offset and master.dtype == torch.float32
        flats.append(Flat(group=group["name"], master=master, fragments=tuple(fragments)))
    return tuple(flats)


def _build_optimizer(
    groups: NamedGroups, settings: OptimizerSettings, *, offload: bool
) -> torch.optim.Optimizer:
    """AdamW with one parameter group per name; the learning rates are set before each step.

    With `offload` DeepSpeed's CPU Adam (a compiled op), otherwise torch's, fused: on CUDA the same speed as
    DeepSpeed's fused Adam and nothing to compile.
    """
    param_groups: list[dict[str, Any]] = [
        {"params": [p for _, p in params], "name": name} for name, params in groups.items()
    ]
    betas, eps, weight_decay = settings.betas, settings.eps, settings.weight_decay
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu_adam: torch.optim.Optimizer = DeepSpeedCPUAdam(
            param_groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, adamw_mode=True
        )
        return cpu_adam
    return torch.optim.AdamW(
        param_groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )
