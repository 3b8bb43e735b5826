"""`cad-mllm bench`: every peer in fresh processes on the same samples; JSON, a table and a plot."""

import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cad_mllm.bench.figures import PARITY, Figures, figures_of
from cad_mllm.bench.peers import PEERS, Peer, read_variants
from cad_mllm.bench.rank import Job, Transport, read, run
from cad_mllm.bench.workloads import WORKLOADS, tiny, with_micro_batch
from cad_mllm.data.atomic import make_writable, write_json
from cad_mllm.errors import ConfigError, ExitCode

_REFERENCE = "original-zero3"
"""Pads, and computes the loss as transformers does: what the others must agree with."""
_ALONE = "plain-1"
"""One GPU without ZeRO, by which scaling is measured."""
_LOG_LINES = 15


def bench(
    workload: str,
    *,
    model: str,
    ranks: Sequence[int],
    peers: Sequence[str],
    steps: int,
    minutes: float,
    out: Path,
    transport: Transport = "nvlink",
    gpu_memory_cap_gb: float | None = None,
    micro_batch_tokens: int | None = None,
    variants: Path | None = None,
) -> ExitCode:
    """Time the peers one after the other on each number of ranks; partial results are written as they come.

    Args:
        workload: its letter.
        model: which LM.
        ranks: numbers of them to time on; none: all GPUs, or two processes on a CPU.
        peers: names; none: all, or only the variants if there are some.
        steps: timed ones of each peer.
        minutes: limit of all peers together.
        out: folder for figures, plot and logs.
        transport: what NCCL may use at most.
        gpu_memory_cap_gb: GPU memory that a rank may allocate.
        micro_batch_tokens: in place of the workload's.
        variants: a file of variations of ZeRO peers, see `read_variants`.

    Raises:
        ConfigError: a peer, a number of ranks, a micro-batch or a variant that there cannot be; a large model
            without a GPU (its ranks would fill the machine's memory until the kernel kills something).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and model != "tiny":
        raise ConfigError(f"--model {model} needs a GPU, and there is none here: use --model tiny")
    counts = list(ranks) or [torch.cuda.device_count() if device == "cuda" else 2]
    varied = {} if variants is None else read_variants(variants)
    chosen = _chosen([*peers, *varied], counts, device, PEERS | varied)
    make_writable(out, "--out")
    timed = tiny(WORKLOADS[workload]) if model == "tiny" else WORKLOADS[workload]
    if micro_batch_tokens is not None:
        timed = with_micro_batch(timed, micro_batch_tokens)
    jobs = [
        Job(
            name=name,
            peer=(PEERS | varied)[name],
            workload=timed,
            model=model,
            device=device,
            ranks=count,
            packs=max(counts),
            steps=steps,
            warmup=2 if device == "cuda" else 1,
            folder=out / f"{name}-{count}",
            transport=transport,
            memory_cap_gb=gpu_memory_cap_gb,
        )
        for name, count in chosen
    ]
    results: dict[str, Any] = {
        "workload": workload,
        "title": timed.title,
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "settings": asdict(timed),
        "steps": steps,
        "transport": transport,
        "gpu_memory_cap_gb": gpu_memory_cap_gb,
        "variants": {name: {"zero": p.zero, "compile": p.compile} for name, p in varied.items()},
        "peers": {},
    }
    console = Console()
    file = out / f"bench-{workload}.json"
    _time_all(jobs, results, minutes * 60, file, console)
    _add_scaling(results["peers"])
    write_json(file, results)
    for table in _tables(results, console.width):
        console.print(table)
    _plot(results, out / f"bench-{workload}.png")
    console.print(f"figures, plot and logs are in {out}")
    return ExitCode.DONE


def _time_all(
    jobs: Sequence[Job], results: dict[str, Any], seconds: float, file: Path, console: Console
) -> None:
    """Add the figures of each peer, or why there are none, to the results, and write them each time."""
    began = time.monotonic()
    end = began + seconds
    reference: Figures | None = None
    for done, job in enumerate(jobs):
        left = (time.monotonic() - began) / done * (len(jobs) - done) if done else None
        about = "" if left is None else f", {math.ceil(left / 60)} min left"
        ranks = f"{job.ranks} rank{'s' if job.ranks > 1 else ''}"
        console.print(f"{done + 1}/{len(jobs)} {job.peer.title}, {ranks}{about} ...", highlight=False)
        outcome = _timed(job, end - time.monotonic(), results["device"])
        if isinstance(outcome, Figures):
            reference = outcome if reference is None and job.name == _REFERENCE else reference
            outcome = _compared(outcome, reference, PARITY[job.device])
        entry = asdict(outcome) if isinstance(outcome, Figures) else {"failed": outcome}
        results["peers"][job.folder.name] = {"title": job.peer.title, "ranks": job.ranks, **entry}
        write_json(file, results)


def _chosen(
    peers: Sequence[str], counts: Sequence[int], device: str, known: Mapping[str, Peer] = PEERS
) -> list[tuple[str, int]]:
    """(peer, ranks) in their order: the reference first."""
    unknown = [name for name in peers if name not in known]
    if unknown:
        raise ConfigError(f"--peers {unknown[0]}: there is no such peer; one of {', '.join(PEERS)}")
    if device == "cuda" and max(counts) > torch.cuda.device_count():
        raise ConfigError(f"--ranks {max(counts)}: this machine has {torch.cuda.device_count()} GPUs")
    uneven = [count for count in counts if max(counts) % count]
    if uneven:
        raise ConfigError(
            f"--ranks {uneven[0]}: a step has {max(counts)} packs, they cannot be shared evenly"
        )
    names = sorted(peers or PEERS, key=lambda name: name != _REFERENCE)
    pairs = [(name, count) for count in sorted(counts, reverse=True) for name in names]
    alone = [("plain", 1)] if "plain" in names else []
    return [pair for pair in pairs if pair[0] != "plain"] + alone


def _timed(job: Job, seconds: float, device_name: str) -> Figures | str:
    """The figures of a peer, or in a line why there are none."""
    if seconds < 1:
        return "not run: the time was up (--minutes)"
    job.folder.mkdir(parents=True, exist_ok=True)
    for old in job.folder.glob("rank*"):
        old.unlink()
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    processes = [
        context.Process(target=run, args=(job, rank, port, time.time())) for rank in range(job.ranks)
    ]
    end = time.monotonic() + seconds
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                break  # the others wait for it
            time.sleep(0.1)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    if not failed:
        workload = job.workload
        return figures_of(
            read(job.folder, job.ranks),
            use_lora=workload.use_lora,
            recompute=workload.recompute,
            device_name=device_name,
        )
    if time.monotonic() >= end:
        return "stopped: the time was up (--minutes)"
    rank = next((r for r in failed if processes[r].exitcode not in (None, -9)), failed[0])
    lines = (job.folder / f"rank{rank}.log").read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines[-_LOG_LINES:] if "Error" in line]
    return f"failed: {(errors or lines[-1:] or ['no output'])[-1][:200]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _compared(figures: Figures, reference: Figures | None, tolerance: float) -> Figures | str:
    """The figures with their parity; void if the peer does not compute the reference's losses.

    Compared are the losses and gradient norms of all steps, warm-up included: of each the largest difference.
    """
    if reference is None:
        return figures
    parity, gradient_parity = (
        max(
            abs(ours / theirs - 1)
            for ours, theirs in zip(getattr(figures, of), getattr(reference, of), strict=True)
        )
        for of in ("losses", "gradient_norms")
    )
    if not (parity <= tolerance and all(map(math.isfinite, figures.losses))):
        return (
            f"void: its losses are {_numbers(figures.losses)}, the reference's {_numbers(reference.losses)}"
        )
    return replace(figures, parity=parity, gradient_parity=gradient_parity)


def _add_scaling(peers: dict[str, Any]) -> None:
    """How many times the samples per second of one GPU without ZeRO a peer computes; None: not known."""
    alone = peers.get(_ALONE, {}).get("samples_per_second")
    for peer in peers.values():
        rate = peer.get("samples_per_second")
        peer["scaling"] = None if alone is None or rate is None else rate / alone


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.5f}" for value in values)


def _tables(results: dict[str, Any], width: int) -> Iterator[Table]:
    """A column for each peer, as many in a table as `width` characters hold; last, who has none and why."""
    done = {name: peer for name, peer in results["peers"].items() if "failed" not in peer}
    failed = [f"{name}: {peer['failed']}" for name, peer in results["peers"].items() if "failed" in peer]
    labels = ["peer-ranks", *_ROWS]
    columns = [[name, *(show(peer) for show in _ROWS.values())] for name, peer in done.items()]
    groups: list[list[list[str]]] = [[labels]]
    for column in columns:
        if len(groups[-1]) > 1 and _width([*groups[-1], column]) > width:
            groups.append([labels])
        groups[-1].append(column)
    title = f"{results['workload']}: {results['title']} ({results['model']}, {results['device']})"
    for number, group in enumerate(groups, 1):
        caption = Text("\n".join(failed)) if failed and number == len(groups) else None
        table = Table(title=title if number == 1 else None, caption=caption)
        for place, column in enumerate(group):
            table.add_column(column[0], justify="right" if place else "left", overflow="fold")
        for cells in list(zip(*group, strict=True))[1:]:
            table.add_row(*cells)
        yield table


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Characters of a table with its lines."""
    return 1 + sum(3 + max(map(len, column)) for column in columns)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _difference(value: float | None) -> str:
    return "not checked" if value is None else f"{value:.0e}"


_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s/GPU": lambda peer: f"{peer['tokens_per_second_per_gpu']:,.0f}",
    "  slowest step": lambda peer: f"{peer['spread'][0]:,.0f}",
    "  fastest step": lambda peer: f"{peer['spread'][1]:,.0f}",
    "samples/s": lambda peer: f"{peer['samples_per_second']:.2f}",
    "x one GPU": lambda peer: "-" if peer["scaling"] is None else f"{peer['scaling']:.2f}",
    "MFU": lambda peer: _share(peer["mfu"]),
    "HFU": lambda peer: _share(peer["hfu"]),
    "peak GB": lambda peer: f"{peer['peak_gb']:.1f}",
    "non-padding": lambda peer: _share(peer["non_padding"]),
    "imbalance, tokens": lambda peer: _share(peer["token_imbalance"]),
    "imbalance, squares": lambda peer: _share(peer["square_imbalance"]),
    "loader wait": lambda peer: _share(peer["loader_wait"]),
    "first step after s": lambda peer: f"{peer['start']['first step']:.0f}",
    "loss differs by": lambda peer: _difference(peer["parity"]),
    "gradient differs by": lambda peer: _difference(peer["gradient_parity"]),
}


def _plot(results: dict[str, Any], path: Path) -> None:
    """Tokens per second and GPU, with the spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = {name: peer for name, peer in results["peers"].items() if "failed" not in peer}
    figure, axes = pyplot.subplots(figsize=(7, 0.6 * max(2, len(done)) + 1), layout="constrained")
    names = [f"{peer['title']}, {peer['ranks']}" for peer in done.values()]
    rates = [peer["tokens_per_second_per_gpu"] for peer in done.values()]
    around = [
        [rate - peer["spread"][0] for rate, peer in zip(rates, done.values(), strict=True)],
        [peer["spread"][1] - rate for rate, peer in zip(rates, done.values(), strict=True)],
    ]
    axes.barh(names, rates, xerr=around if done else None)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second and GPU, padding not counted")
    axes.set_title(f"{results['workload']}: {results['title']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
