"""Machines that are not there: facts of ranks, and what a run asks for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cad_mllm.train.demand import Demand
from cad_mllm.train.machine import Gpu, Output, RankFacts

GB = 10**9
L40 = "NVIDIA L40"
OUTPUT = Output(free_bytes=500 * GB, fault=None, sees_main=True)


def gpu(number: int, **changes: Any) -> Gpu:
    healthy = Gpu(
        model=L40,
        uuid=f"GPU-{number}",
        total_bytes=48 * GB,
        free_bytes=47 * GB,
        reaches_peers=True,
    )
    return replace(healthy, **changes)


def rank(number: int, **changes: Any) -> RankFacts:
    """A healthy rank on a machine with L40 GPUs."""
    healthy = RankFacts(
        rank=number,
        host="node-a",
        versions={"python": "3.12.3", "torch": "2.11.0", "deepspeed": "0.19.8"},
        config={"--seed": 42, "--batch_size": 2},
        cpu="32 x CPU",
        memory_bytes=256 * GB,
        memory_available_bytes=200 * GB,
        shm_bytes=8 * GB,
        gpu=gpu(number),
        driver="580.65.06",
        driver_cuda=(13, 0),
        torch_cuda=(13, 0),
        flash_attention_fault=None,
        missing_for_ops=(),
        rdma=False,
        nccl={},
        output=OUTPUT,
    )
    return replace(healthy, **changes)


def ranks(number: int, *, hosts: int = 1, **changes: Any) -> list[RankFacts]:
    """Healthy ranks, spread over hosts in equal parts."""
    return [rank(n, host=f"node-{'abcdefgh'[n * hosts // number]}", **changes) for n in range(number)]


def demand(**changes: Any) -> Demand:
    """Qwen3-8B with LoRA under ZeRO-3."""
    healthy = Demand(
        output_dir=Path("outputs/run"),
        may_use_cpu=False,
        flash_attention=False,
        zero_stage=3,
        keeps_weights=False,
        offload_optimizer=False,
        offload_param=False,
        parameters=8_300_000_000,
        trainable=125_000_000,
        weight_bytes=2,
        loader_bytes=16_000_000,
        checkpoints_kept=3,
    )
    return replace(healthy, **changes)
