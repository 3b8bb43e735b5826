"""Frozen weights under ZeRO-3 that the GPUs of one machine read out of each other's memory.

They never change: so a rank copies the others' shards when it wants them, and no rank waits for another. The
copies are made by the GPU's copy engines; an all-gather of NCCL takes multiprocessors from the layer that
computes meanwhile.

Shapes: W ranks, N elements of a shard.
"""

import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cad_mllm.train.distributed import World
from cad_mllm.train.gathering import comes_apart_into_rows
from cad_mllm.train.machine import reaches_peers
from cad_mllm.train.transport import allows_p2p

_LOG = logging.getLogger("DeepSpeed")


class PeerMemory:
    """The shards of lists of parameters, mapped on all ranks of a machine."""

    def __init__(self, lists: Sequence[Sequence[Any]], world: World) -> None:
        """Move this rank's shards to where the others can read them; on all ranks alike.

        Before one reads, all must have come so far.
        """
        assert all(p.ds_process_group.size() == world.size for parameters in lists for p in parameters)
        self._rank = world.rank
        self._shards_WN = {id(parameters[0]): _mapped(parameters) for parameters in lists}
        # One for each rank that is read: together they are 1.4 times as fast.
        self._streams = [torch.cuda.Stream(world.device) for _ in range(world.size)]
        torch.cuda.synchronize(world.device)

    @torch.no_grad()
    def receive(self, parameters: Sequence[Any]) -> tuple["_Copying", list[Tensor]]:
        """As `gathering.receive`, of one of the lists."""
        shards, ranks = self._shards_WN[id(parameters[0])], len(self._streams)
        sizes = [shard_N.numel() for shard_N in shards[0]]
        # One block, and few calls that cut it: a layer takes 28 copies, and the host has to keep up.
        block = shards[0][0].new_empty(ranks * sum(sizes))
        parts = block.split([size for size in sizes for _ in range(ranks)])
        # On the stream that computes this memory is free by now.
        free = torch.cuda.current_stream().record_event()
        copied = []
        for turn in range(ranks):
            rank = (self._rank + turn) % ranks  # not all from the same one at a time
            with torch.cuda.stream(self._streams[rank]):
                self._streams[rank].wait_event(free)
                for part_N, shard_N in zip(parts[rank::ranks], shards[rank], strict=True):
                    part_N.copy_(shard_N)
                copied.append(self._streams[rank].record_event())
        whole = block.split([ranks * size for size in sizes])
        return _Copying(copied), [w.view(p.ds_shape) for p, w in zip(parameters, whole, strict=True)]

    def look_up(self, table: Any, numbers: Tensor) -> Tensor:
        """Rows of a parameter that is a list by itself."""
        width = table.ds_shape[1]
        return rows_of([shard_N.view(-1, width) for (shard_N,) in self._shards_WN[id(table)]], numbers)


class _Copying:
    def __init__(self, copied: Sequence[torch.cuda.Event]) -> None:
        self._copied = copied

    def wait(self) -> None:
        """Let the current stream wait."""
        for event in self._copied:
            torch.cuda.current_stream().wait_event(event)


@torch.no_grad()
def rows_of(shards_WUD: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """Rows, by their numbers, of a table of which each rank has U: the shape of `numbers`, and D."""
    found = shards_WUD[0].new_empty(*numbers.shape, shards_WUD[0].shape[1])
    for rank, own_UD in enumerate(shards_WUD):
        own = numbers - rank * own_UD.shape[0]
        is_own = (own >= 0) & (own < own_UD.shape[0])
        read = nn.functional.embedding(own.clamp(0, own_UD.shape[0] - 1), own_UD)
        found = torch.where(is_own[..., None], read, found)
    return found


def embeddings_by_rows(module: nn.Module) -> list[nn.Embedding]:
    """The embeddings whose rows `PeerMemory.look_up` can find."""
    return [
        part
        for part in module.modules()
        if type(part) is nn.Embedding and part.max_norm is None and comes_apart_into_rows(part.weight)
    ]


def map_peer_memory(lists: Sequence[Sequence[Any]], world: World) -> PeerMemory | None:
    """What the ranks can read of each other; None if there is nothing, or not all can and may. On all alike.

    NCCL_P2P_DISABLE and NCCL_P2P_LEVEL forbid it as they forbid it to NCCL: there are boards where it hangs.
    """
    if not lists:
        return None
    answers = world.gather((_can_read(lists, world), socket.gethostname()))
    if answers != [(True, answers[0][1])] * world.size:  # NCCL, too, takes a host name for a machine
        return None
    memory, fault = None, ""
    try:
        memory = PeerMemory(lists, world)
    except (RuntimeError, ImportError, AttributeError) as error:
        # Driver or container do not allow it; or a later torch, where this is not final, names it otherwise.
        fault = str(error).strip().split("\n")[0] or type(error).__name__
    faults = [f for f in world.gather(fault) if f]  # now all have moved theirs
    if faults:
        if world.is_main:
            _LOG.warning("the GPUs cannot read each other's memory, NCCL gathers the weights: %s", faults[0])
        return None
    return memory


def _can_read(lists: Sequence[Sequence[Any]], world: World) -> bool:
    return (
        world.device.type == "cuda"
        and allows_p2p(os.environ)
        and reaches_peers(world)
        and all(p.ds_tensor.device == world.device for parameters in lists for p in parameters)
    )


def _mapped(parameters: Sequence[Any]) -> list[tuple[Tensor, ...]]:
    """The shards of each rank, by parameter; this rank's are moved."""
    from torch.distributed import _symmetric_memory as symmetric

    first, group = parameters[0].ds_tensor, parameters[0].ds_process_group
    assert all(p.ds_tensor.dtype == first.dtype and p.ds_process_group is group for p in parameters)
    sizes = [p.ds_tensor.numel() for p in parameters]
    # From a pool of torch's allocator: what it holds counts as allocated, as before.
    with torch.cuda.use_mem_pool(symmetric.get_mem_pool(first.device)):
        own_N = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
    mapped = symmetric.rendezvous(own_N, group)
    for p, shard_N in zip(parameters, own_N.split(sizes), strict=True):
        shard_N.copy_(p.ds_tensor.view(-1))
        p.ds_tensor.data = shard_N.view(p.ds_tensor.shape)
    ranks = range(group.size())
    return [mapped.get_buffer(rank, own_N.shape, own_N.dtype).split(sizes) for rank in ranks]
