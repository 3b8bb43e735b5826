"""Ranks: who am I, how do we meet, how does one rank go first.

Launched by `deepspeed`, `torchrun` or an MPI-style launcher the environment says it all (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT); plain `python` is a world of one.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from cad_mllm.config import RunConfig
from cad_mllm.errors import CadMllmError, ConfigError

T = TypeVar("T")

_CONTROL_TIMEOUT = timedelta(hours=12)
"""For waits that are as long as the work of one rank: preparing data, loading a model."""

_GRACE = timedelta(minutes=1)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks on this machine."""
    device: torch.device
    control: dist.ProcessGroup | None
    """A gloo group for everything that is not training; None where no process group is needed."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and talks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks, for as long as the control time-out allows."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` (small, picklable, our own) on every rank."""
        if self.size == 1:
            return value
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (small, picklable, our own), by rank, on every rank."""
        if self.size == 1:
            return [value]
        box: list[T] = [value] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def fork(self) -> "World":
        """The same ranks with a control group of their own, for a thread beside the training."""
        if self.size == 1:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT))

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; the others wait.

        A user's mistake found on rank 0 ends every rank with the same error instead of leaving them waiting.
        """
        outcome: tuple[T | None, CadMllmError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except CadMllmError as e:
                outcome = (None, e)
        result, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return cast(T, result)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Element-wise sum of Python numbers over the ranks, in fp64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tuple(tensor.tolist())


def _choose_device(config: RunConfig, local_rank: int) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is visible. Check nvidia-smi, or use --device cpu.")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible. "
            f"Start at most that many processes on this machine."
        )
    return torch.device("cuda", local_rank)


def _from_environment(config: RunConfig) -> tuple[int, int, int]:
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", max(config.local_rank, 0)))
    except ValueError as e:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers ({e}).") from e
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE is {size}: the launcher's environment contradicts itself."
        )
    return rank, size, local_rank


@contextmanager
def world(config: RunConfig) -> Iterator[World]:
    """Join the process group that the environment describes, and leave it at the end.

    Raises:
        ConfigError: several ranks without --deepspeed, or a device that is not there.
    """
    rank, size, local_rank = _from_environment(config)
    device = _choose_device(config, local_rank)
    if size > 1 and not config.deepspeed:
        raise ConfigError(
            f"{size} processes without DeepSpeed: "
            f"add --deepspeed --deepspeed_config configs/deepspeed/ds_zero3_config.json."
        )
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported
    else:
        torch.cuda.set_device(device)
    if not config.deepspeed:
        yield World(rank=0, size=1, local_rank=0, local_size=1, device=device, control=None)
        return
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }.items():
        os.environ.setdefault(name, value)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # After the watchdog, which shows where each rank stands.
    timeout = timedelta(minutes=config.hang_timeout_minutes) + _GRACE
    dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
    # torchrun and the deepspeed launcher call it by different names
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    if device.type == "cpu":
        # With it DeepSpeed reduces in shared memory, 69 MB a rank that nobody removes.
        os.environ.pop("LOCAL_SIZE", None)
    yield World(
        rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=device, control=control
    )
    # Only a run that ended well comes here. After an error there is no collective and no tear-down: the
    # other ranks may be anywhere, and the launcher ends them when this process exits.
    dist.barrier(group=control)
    dist.destroy_process_group()


def spare_the_collector() -> None:
    """Take what is there now out of Python's garbage collection; call before the steps.

    Networks, DeepSpeed and torch are millions of objects that stay. The collector walks through all of them
    now and then, the device waits for it, and at the next collective all other ranks do.
    """
    gc.collect()
    gc.freeze()
