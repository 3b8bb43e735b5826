"""Time training steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cad_mllm.errors import ExitCode
from cad_mllm.settings import parse_flags, require


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """Time training steps beside other ways to compute the same: JSON, a table and a plot."""

    workload: Literal["A", "B", "C", "D"] = "A"
    """A: multimodal LoRA; B: full fine-tuning; C, D: text LoRA of 2,048 and 4,096 tokens."""
    model: Literal["qwen3-8b-random", "tiny"] = "qwen3-8b-random"
    """Which LM; `tiny` takes the workload in small, for a CPU."""
    ranks: tuple[int, ...] = ()
    """Numbers of GPUs to time on, such as `1 2 4`. Unset: all GPUs, or two processes on a CPU."""
    peers: tuple[str, ...] = ()
    """original-zero3 (the reference for the loss), original-zero2, zero3, zero3-resident, zero3-offload,
    zero2, fsdp2, plain. Unset: all, or the variants alone."""
    transport: Literal["nvlink", "shm", "socket"] = "nvlink"
    """What NCCL may use at most: shm as on a node without NVLink, socket as between one-GPU pods."""
    gpu_memory_cap_gb: float | None = None
    """GPU memory that a rank may allocate, as on a smaller card. Unset: all."""
    micro_batch_tokens: int | None = None
    """Tokens of a micro-batch in place of the workload's: a multiple of its longest sample."""
    variants: Path | None = None
    """JSON file with ZeRO settings to time: [{"name": "x", "peer": "zero3", "zero": {"KEY": VALUE}}]."""
    steps: int = 6
    """Timed steps of each peer."""
    minutes: float = 9.0
    """Time limit of all peers together; what was timed until then is written."""
    out: Path = Path("outputs/bench")
    """Folder for figures, plot and logs."""


def bench(argv: Sequence[str]) -> ExitCode:
    """Time training steps beside other ways to compute them."""
    example = (
        "examples:\n"
        "  cad-mllm bench --workload A --out outputs/bench\n"
        "  cad-mllm bench --workload C --ranks 1 2 4 --peers original-zero3 zero3 zero2 fsdp2 plain\n"
        "  cad-mllm bench --model tiny --steps 2   # about a minute on a CPU\n"
    )
    arguments = parse_flags(BenchArguments, argv, prog="cad-mllm bench", examples=example)
    require("--steps", arguments.steps, 1)
    require("--minutes", arguments.minutes, 0.01)
    for count in arguments.ranks:
        require("--ranks", count, 1)
    if arguments.gpu_memory_cap_gb is not None:
        require("--gpu_memory_cap_gb", arguments.gpu_memory_cap_gb, 0.1)
    from cad_mllm.bench.run import bench as time_peers

    return time_peers(
        arguments.workload,
        model=arguments.model,
        ranks=arguments.ranks,
        peers=arguments.peers,
        steps=arguments.steps,
        minutes=arguments.minutes,
        out=arguments.out,
        transport=arguments.transport,
        gpu_memory_cap_gb=arguments.gpu_memory_cap_gb,
        micro_batch_tokens=arguments.micro_batch_tokens,
        variants=arguments.variants,
    )
