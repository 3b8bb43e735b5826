"""How the ranks' tensors travel: worked out from facts, and measured."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from cad_mllm.train.checks import Finding, by_host
from cad_mllm.train.demand import Demand
from cad_mllm.train.distributed import World
from cad_mllm.train.machine import RankFacts

_SOCKETS_REMEDY = (
    "ZeRO-3 gathers every weight in every micro-step; over sockets it ran 4.3 times slower than over shared "
    "memory. Use one pod for all GPUs of a node (the overlays -1x4), or ds_zero2_config.json, or "
    "ds_zero3_resident.json (which keeps them), or larger micro-batches (--pack_tokens, --batch_size) with "
    "fewer --gradient_accumulation_steps"
)
_SLOW = 4e9
"""Bytes per second; sockets bring about 3e9, shared memory over PCIe 4 more than 10e9."""
_SHARD_BYTES = 64 * 2**20
"""What each rank gives to the measured all-gather."""
_WARM_UP, _MEASURED = 3, 10


def check_transport(ranks: Sequence[RankFacts], demand: Demand) -> Finding | None:
    """How NCCL will carry data: it knows machines by host name, so that two pods are never one machine."""
    if len(ranks) == 1:
        return None
    if ranks[0].gpu is None:
        return Finding(check="transport", found="gloo over TCP")
    within, between = _within(ranks), _between(ranks)
    hosts = by_host(ranks)
    parts = []
    if any(len(here) > 1 for here in hosts.values()):
        parts.append(f"{within} on each host")
    if len(hosts) > 1:
        parts.append(f"{between} between {len(hosts)} hosts")
    found = "NCCL: " + ", ".join(parts)
    if demand.gathers_in_micro_batches and any("sockets" in part for part in parts):
        return Finding(check="transport", found=found, verdict="warning", remedy=_SOCKETS_REMEDY)
    return Finding(check="transport", found=found)


def measure_all_gather(world: World) -> float:
    """Bytes per second that reach a rank in an all-gather of bf16 weights: the slowest rank's (CUDA only)."""
    shard = torch.zeros(_SHARD_BYTES // 2, dtype=torch.bfloat16, device=world.device)
    whole = torch.empty(world.size * shard.numel(), dtype=torch.bfloat16, device=world.device)
    for _ in range(_WARM_UP):
        dist.all_gather_into_tensor(whole, shard)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_MEASURED):
        dist.all_gather_into_tensor(whole, shard)
    end.record()
    end.synchronize()
    seconds = float(begin.elapsed_time(end)) / 1e3
    return min(world.gather((world.size - 1) * _SHARD_BYTES * _MEASURED / seconds))


def judge_bandwidth(bytes_per_second: float, demand: Demand) -> Finding:
    """What the measured all-gather means for this run."""
    found = f"{bytes_per_second / 1e9:.1f} GB/s into each rank"
    if not demand.gathers_in_micro_batches:
        return Finding(check="all-gather", found=found)
    gathers = 2 * demand.parameters * demand.weight_bytes / bytes_per_second
    found += f"; ZeRO-3 gathers the weights twice a micro-step, {gathers:.1f} s"
    if bytes_per_second < _SLOW:
        return Finding(check="all-gather", found=found, verdict="warning", remedy=_SOCKETS_REMEDY)
    return Finding(check="all-gather", found=found)


def _within(ranks: Sequence[RankFacts]) -> str:
    if all(facts.gpu is not None and facts.gpu.reaches_peers and allows_p2p(facts.nccl) for facts in ranks):
        return "P2P"
    if all(facts.nccl.get("NCCL_SHM_DISABLE", "0") == "0" for facts in ranks):
        return "shared memory"
    return _between(ranks)


def allows_p2p(environment: Mapping[str, str]) -> bool:
    """Whether NCCL may let GPUs of a machine read each other's memory."""
    return environment.get("NCCL_P2P_DISABLE", "0") == "0" and environment.get("NCCL_P2P_LEVEL", "") not in (
        "LOC",
        "0",
    )


def _between(ranks: Sequence[RankFacts]) -> str:
    has_rdma = all(
        facts.rdma
        and facts.nccl.get("NCCL_IB_DISABLE", "0") == "0"
        and facts.nccl.get("NCCL_NET", "").lower() != "socket"
        for facts in ranks
    )
    return "RDMA" if has_rdma else "sockets"
