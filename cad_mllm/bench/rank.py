"""One rank of one peer: builds it, times its steps, and leaves the figures in a file."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from cad_mllm.bench.peers import Peer, Setup, build, train_config
from cad_mllm.bench.workloads import MicroBatches, StepSamples, TimedSample, Workload, supervised_tokens
from cad_mllm.data.atomic import write_json
from cad_mllm.data.prefetch import loader_of
from cad_mllm.data.sequence import SequenceSpec
from cad_mllm.train.ahead import CopiedAhead
from cad_mllm.train.assemble import sequence_spec
from cad_mllm.train.distributed import World, spare_the_collector, world
from cad_mllm.train.rehearsal import PROJECTORS, micro_batch_loss

_WORKERS = 2
_PLACEHOLDERS = {"tiny": (16, 17)}
"""Tokens of an image and of a cloud, for models whose encoders are not the full-size ones."""
_FULL_SIZE = (256, 257)

Transport = Literal["nvlink", "shm", "socket"]
_TRANSPORTS: dict[Transport, dict[str, str]] = {
    "nvlink": {},
    "shm": {"NCCL_P2P_DISABLE": "1"},
    "socket": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
"""What NCCL may use between the GPUs of a machine: the environment that leaves it no more than that."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks of a peer are told."""

    name: str
    peer: Peer
    workload: Workload
    model: str
    device: str
    ranks: int
    packs: int
    """Of a step, whatever the number of ranks."""
    steps: int
    """Timed ones; `warmup` come before."""
    warmup: int
    folder: Path
    transport: Transport
    memory_cap_gb: float | None
    """GPU memory that a rank may allocate; None: all."""


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """What one rank measured. Lists have an entry for each timed step."""

    losses: list[float]
    """Of all ranks together, per supervised token, warm-up included: for the parity with other peers."""
    gradient_norms: list[float]
    """Likewise."""
    seconds: list[float]
    waited: list[float]
    """For batches, within those seconds."""
    tokens: list[int]
    """Of this rank, padding not counted."""
    positions: list[int]
    """Padding counted."""
    supervised: list[int]
    squares: list[int]
    """Sum over samples of the squared length."""
    samples: list[int]
    micro_tokens: list[list[int]]
    """Tokens of each micro-batch of each step."""
    micro_squares: list[list[int]]
    peak_bytes: int
    start: dict[str, float]
    """Seconds from the start of the processes until there was: the `process`, with all that it imports; the
    `networks`; the `engine`; the `first step`, done."""
    sizes: dict[str, int]
    """Matmul parameters of the decoder layers and of the head, number of layers, attention width."""


def run(job: Job, rank: int, port: int, started: float) -> None:
    """Entry of a fresh process, which was started at `time.time()`."""
    log = os.open(job.folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.ranks),
        LOCAL_WORLD_SIZE=str(job.ranks),
        **_TRANSPORTS[job.transport],
    )
    if job.memory_cap_gb is not None and job.device == "cuda":
        of_all = torch.cuda.get_device_properties(rank).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_cap_gb * 1e9 / of_all), rank)
    figures = _measure(job, rank, started)
    write_json(job.folder / f"rank{rank}.json", asdict(figures))


def _measure(job: Job, rank: int, started: float) -> RankFigures:
    peer, workload = job.peer, job.workload
    start: dict[str, float] = {}

    def reached(what: str) -> None:
        start[what] = time.time() - started

    reached("process")
    # The accumulation is known only with the sizes of the networks, the engine wants it before.
    micro_batches = job.packs // job.ranks
    if not peer.packed:
        micro_batches = _padded_micro_batches(job)
    config = train_config(
        peer, workload, job.model, folder=job.folder, micro_batches=micro_batches, device=job.device
    )
    # The process group is DeepSpeed's in a training; FSDP2 needs one too.
    with world(replace(config.run, deepspeed=peer.engine != "plain")) as ranks:
        setup = build(peer, config, ranks, reached)
        reached("engine")
        spec = sequence_spec(config, setup.built)
        samples = _samples(job, spec)
        data = MicroBatches(samples, workload, spec, packed=peer.packed, rank=rank, ranks=job.ranks)
        assert data.per_step == micro_batches, "the engine accumulates what a step has"
        losses, norms, seconds, waited = _time_steps(job, setup, data, samples, ranks, reached)
        timed = _by_step(data.batches, data.per_step)[job.warmup :]
        width = workload.pack_tokens if peer.packed else workload.padded_rows * workload.max_seq_length
        return RankFigures(
            losses=losses,
            gradient_norms=norms,
            seconds=seconds,
            waited=waited,
            tokens=[sum(s.length for batch in step for s in batch) for step in timed],
            positions=[width * len(step) for step in timed],
            supervised=[sum(s.target for batch in step for s in batch) for step in timed],
            squares=[sum(s.length**2 for batch in step for s in batch) for step in timed],
            samples=[sum(len(batch) for batch in step) for step in timed],
            micro_tokens=[[sum(s.length for s in batch) for batch in step] for step in timed],
            micro_squares=[[sum(s.length**2 for s in batch) for batch in step] for step in timed],
            peak_bytes=torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0,
            start=start,
            sizes=_sizes(setup.built.model),
        )


def _time_steps(
    job: Job,
    setup: Setup,
    data: MicroBatches,
    samples: StepSamples,
    ranks: World,
    reached: Callable[[str], None],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(losses, gradient norms) of all steps, (seconds, of which waited for batches) of the timed ones."""
    on_gpu = ranks.device.type == "cuda"
    batches = iter(loader_of(data, _WORKERS if on_gpu else 0, pin_memory=on_gpu))
    losses, norms, seconds, waited = [], [], [], []
    spare_the_collector()
    for step in range(job.warmup + job.steps):
        supervised = supervised_tokens(samples.packs[step])
        ranks.barrier()
        if on_gpu:
            torch.cuda.synchronize()
        began, wait = time.perf_counter(), 0.0
        total = torch.zeros((), device=ranks.device)
        ahead = iter(CopiedAhead(islice(batches, data.per_step), ranks.device))
        for _ in range(data.per_step):
            asked = time.perf_counter()
            batch = next(ahead)
            wait += time.perf_counter() - asked
            loss = micro_batch_loss(
                setup.forward,  # type: ignore[arg-type]
                setup.built.encoders,
                batch,
                ranks.device,
                trainable=PROJECTORS,
            )
            setup.backward(loss / supervised)
            total += loss.detach()
        norms.append(setup.step())
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        losses.append(ranks.sum(float(total))[0] / supervised)
        if step == 0:
            reached("first step")
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
        if step >= job.warmup:
            seconds.append(took)
            waited.append(wait)
    return losses, norms, seconds, waited


def _samples(job: Job, spec: SequenceSpec) -> StepSamples:
    return StepSamples(job.workload, spec, packs=job.packs, steps=job.warmup + job.steps)


def _padded_micro_batches(job: Job) -> int:
    """Micro-batches of a step and rank of a peer that pads; the placeholders are those of the model."""
    placeholders = _PLACEHOLDERS.get(job.model, _FULL_SIZE)
    spec = SequenceSpec(
        image_tokens=placeholders[0], image_size=1, image_mean=(0.0,) * 3, image_std=(1.0,) * 3,
        point_tokens=placeholders[1], num_points=1, max_seq_length=job.workload.max_seq_length,
    )  # fmt: skip
    data = MicroBatches(_samples(job, spec), job.workload, spec, packed=False, rank=0, ranks=job.ranks)
    return data.per_step


def _by_step(
    batches: Sequence[Sequence[TimedSample]], per_step: int
) -> list[Sequence[Sequence[TimedSample]]]:
    return [batches[start : start + per_step] for start in range(0, len(batches), per_step)]


def _sizes(model: Any) -> dict[str, int]:
    """From the LM's configuration: under ZeRO-3 the parameters are not there to be counted."""
    bare = model.lm.get_base_model() if hasattr(model.lm, "get_base_model") else model.lm
    shape = bare.config
    heads, keys = shape.num_attention_heads, shape.num_key_value_heads
    width = shape.head_dim * heads
    layer = (
        2 * shape.hidden_size * shape.head_dim * (heads + keys)
        + 3 * shape.hidden_size * shape.intermediate_size
    )
    return {
        "layers": layer * shape.num_hidden_layers,
        "head": shape.vocab_size * shape.hidden_size,
        "num_layers": shape.num_hidden_layers,
        "attention_width": width,
    }


def read(folder: Path, ranks: int) -> list[RankFigures]:
    """What the ranks of a peer have left; FileNotFoundError if one of them did not come to its end."""
    return [RankFigures(**json.loads((folder / f"rank{rank}.json").read_text())) for rank in range(ranks)]
