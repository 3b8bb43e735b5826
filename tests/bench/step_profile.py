"""Where a peer's step goes on GPUs: kernels, communication that nothing hides, gaps in which the GPU waits.

    python tests/bench/step_profile.py 2 C zero3 fsdp2        # ranks, workload, peers of `cad-mllm bench`

Each peer runs in fresh processes. Rank 0 profiles one step with torch's profiler and says how long the device
computed, communicated and waited, the largest gaps, for which kernels it waited, and the costliest kernels
and host functions.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cad_mllm.bench.peers import PEERS, build, train_config  # noqa: E402
from cad_mllm.bench.workloads import (  # noqa: E402
    WORKLOADS,
    MicroBatches,
    StepSamples,
    supervised_tokens,
    tiny,
)
from cad_mllm.train.assemble import sequence_spec  # noqa: E402
from cad_mllm.train.distributed import spare_the_collector, world  # noqa: E402
from cad_mllm.train.rehearsal import PROJECTORS, micro_batch_loss  # noqa: E402

WARMUP, TIMED = 3, 6
SHOWN = 20
Span = tuple[float, float]


def union(spans: Sequence[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def milliseconds(spans: Sequence[Span]) -> float:
    """Of microseconds."""
    return sum(end - begin for begin, end in union(spans)) / 1e3


def waits_by_kernel(on_device: Sequence[object]) -> dict[str, list[float]]:
    """Microseconds in which nothing ran, before each kernel of a name that ended such a time."""
    waits: dict[str, list[float]] = {}
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in on_device)  # type: ignore[attr-defined]
    reached = spans[0][0]
    for begin, end, name in spans:
        if begin > reached:
            waits.setdefault(name, []).append(begin - reached)
        reached = max(reached, end)
    return waits


def report(events: Sequence[object], averages: Sequence[object], took: float) -> None:
    """Print what the profiler saw of a step of `took` seconds."""
    on_device = [e for e in events if "CUDA" in str(e.device_type)]  # type: ignore[attr-defined]
    spans = [
        (e.time_range.start, e.time_range.end, "nccl" in e.name.lower())  # type: ignore[attr-defined]
        for e in on_device
    ]
    busy = milliseconds([(b, e) for b, e, _ in spans])
    computing = union([(b, e) for b, e, is_nccl in spans if not is_nccl])
    print(
        f"  profiled {1e3 * took:.0f} ms: computing {milliseconds(computing):.0f}, "
        f"communicating {milliseconds([(b, e) for b, e, is_nccl in spans if is_nccl]):.0f} "
        f"(alone {busy - milliseconds(computing):.0f}), waiting {1e3 * took - busy:.0f}; {len(spans)} kernels"
    )
    gaps = sorted(
        ((later[0] - earlier[1]) / 1e3, (earlier[1] - computing[0][0]) / 1e3)
        for earlier, later in pairwise(computing)
    )[::-1]
    print("  largest gaps (ms @ ms): " + " ".join(f"{gap:.1f}@{at:.0f}" for gap, at in gaps[:12]))
    print("  waited for:")
    for name, waits in sorted(waits_by_kernel(on_device).items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        print(f"    {sum(waits) / 1e3:8.1f} ms {len(waits):6d}  {name[:90]}")
    for title, of_device, key in (
        ("kernels", True, "self_device_time_total"),
        ("host", False, "self_cpu_time_total"),
    ):
        print(f"  {title}:")
        chosen = [e for e in averages if ("CUDA" in str(e.device_type)) is of_device]  # type: ignore[attr-defined]
        for e in sorted(chosen, key=lambda e: -getattr(e, key))[:SHOWN]:
            print(f"    {getattr(e, key) / 1e3:8.1f} ms {e.count:6d}  {e.key[:90]}")  # type: ignore[attr-defined]


def run(rank: int, ranks: int, letter: str, name: str, port: int, folder: Path) -> None:
    """Entry of a fresh process."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
    )  # fmt: skip
    if rank:
        os.dup2(os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT), 1)
    on_gpu = torch.cuda.is_available()
    peer, workload = PEERS[name], WORKLOADS[letter] if on_gpu else tiny(WORKLOADS[letter])
    assert peer.packed, "the original design takes several micro-batches a step"
    config = train_config(
        peer, workload, "qwen3-8b-random" if on_gpu else "tiny", folder=folder, micro_batches=1,
        device="cuda" if on_gpu else "cpu",
    )  # fmt: skip

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    with world(replace(config.run, deepspeed=peer.engine != "plain")) as here:
        setup = build(peer, config, here, lambda _: None)
        spec, steps = sequence_spec(config, setup.built), WARMUP + TIMED + 1
        samples = StepSamples(workload, spec, packs=ranks, steps=steps)
        data = MicroBatches(samples, workload, spec, packed=True, rank=rank, ranks=ranks)
        batches = [data[number].to(here.device) for number in range(steps)]
        spare_the_collector()

        def step(number: int) -> float:
            here.barrier()
            synchronize()
            began = time.perf_counter()
            loss = micro_batch_loss(
                setup.forward,  # type: ignore[arg-type]
                setup.built.encoders,
                batches[number],
                here.device,
                trainable=PROJECTORS,
            )
            setup.backward(loss / supervised_tokens(samples.packs[number]))
            setup.step()
            synchronize()
            return time.perf_counter() - began

        times = [step(number) for number in range(WARMUP + TIMED)][WARMUP:]
        if rank:
            step(steps - 1)
            return
        print(f"{peer.title}, {ranks} ranks: {1e3 * statistics.median(times):.0f} ms a step", flush=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            took = step(steps - 1)
        if on_gpu:
            report(list(profiler.events()), list(profiler.key_averages()), took)


def main() -> None:
    """Profile the peers named on the command line."""
    ranks, letter, *names = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    for number, name in enumerate(names):
        with TemporaryDirectory() as folder:
            given = (int(ranks), letter, name, 29650 + number, Path(folder))
            processes = [context.Process(target=run, args=(rank, *given)) for rank in range(int(ranks))]
            for process in processes:
                process.start()
            for process in processes:
                process.join(300)
                process.kill()


if __name__ == "__main__":
    main()
