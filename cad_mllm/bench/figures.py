"""From what the ranks of a peer measured to the figures that are compared."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cad_mllm.bench.rank import RankFigures

_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "L40S": 362e12, "L40": 181e12, "A100": 312e12}
"""Dense bf16, from the data sheets; the longer names first."""

PARITY = {"cuda": 1e-3, "cpu": 1e-4}
"""Relative difference of the losses from the padded reference's: bf16 on a GPU, fp32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one peer. Medians over the timed steps; the spread is (slowest, fastest)."""

    tokens_per_second_per_gpu: float
    """Padding not counted."""
    spread: tuple[float, float]
    samples_per_second: float
    """Over all GPUs."""
    mfu: float | None
    """Model FLOPs utilisation; None where the device's peak is not known."""
    hfu: float | None
    """The same with recomputation counted."""
    peak_gb: float
    """Of the rank with the highest."""
    non_padding: float
    """Share of the positions."""
    token_imbalance: float
    """(largest / mean - 1) over the ranks, mean over the micro-steps."""
    square_imbalance: float
    """The same of the sum of squared lengths."""
    loader_wait: float
    """Share of the step's time, of the rank that waits longest."""
    start: dict[str, float]
    """Seconds until each part of the start was done, on the slowest rank: see `RankFigures.start`."""
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    parity: float | None = None
    """Largest relative difference of a step's loss from the padded reference's; None: not checked."""
    gradient_parity: float | None = None
    """The same of the norms of the gradients; they say more than the loss, and in bf16 differ more."""


def figures_of(ranks: Sequence[RankFigures], *, use_lora: bool, recompute: bool, device_name: str) -> Figures:
    """The figures of a peer, from all of its ranks."""
    steps = range(len(ranks[0].seconds))
    took = [max(rank.seconds[step] for rank in ranks) for step in steps]
    rates = [sum(rank.tokens[step] for rank in ranks) / took[step] / len(ranks) for step in steps]
    samples = [sum(rank.samples[step] for rank in ranks) / took[step] for step in steps]
    peak = next((flops for name, flops in _PEAK_FLOPS.items() if name in device_name), None)
    used = [_flops(ranks, step, use_lora=use_lora, recompute=recompute) for step in steps]
    model, hardware = (
        None
        if peak is None
        else statistics.median(u[kind] / (t * len(ranks) * peak) for u, t in zip(used, took, strict=True))
        for kind in (0, 1)
    )
    return Figures(
        tokens_per_second_per_gpu=statistics.median(rates),
        spread=(min(rates), max(rates)),
        samples_per_second=statistics.median(samples),
        mfu=model,
        hfu=hardware,
        peak_gb=max(rank.peak_bytes for rank in ranks) / 1e9,
        non_padding=sum(sum(rank.tokens) for rank in ranks) / sum(sum(rank.positions) for rank in ranks),
        token_imbalance=_imbalance([rank.micro_tokens for rank in ranks]),
        square_imbalance=_imbalance([rank.micro_squares for rank in ranks]),
        loader_wait=max(sum(rank.waited) / sum(rank.seconds) for rank in ranks),
        start={part: round(max(rank.start[part] for rank in ranks), 1) for part in ranks[0].start},
        losses=tuple(ranks[0].losses),
        gradient_norms=tuple(ranks[0].gradient_norms),
    )


def _flops(
    ranks: Sequence[RankFigures], step: int, *, use_lora: bool, recompute: bool
) -> tuple[float, float]:
    """(model FLOPs, hardware FLOPs) of a step over all ranks.

    With N matmul parameters of the layers and H of the head (which computes supervised positions alone):
    forward 2 N per token and 2 H per supervised one; backward once more for the gradients of the inputs,
    and once more for those of the weights in full fine-tuning. Causal attention of width A in L layers:
    forward 2 A L sum(length^2), backward twice that. Recomputation adds the forward pass of the layers.
    """
    tokens = sum(rank.tokens[step] for rank in ranks)
    supervised = sum(rank.supervised[step] for rank in ranks)
    squares = sum(rank.squares[step] for rank in ranks)
    sizes = ranks[0].sizes
    layers = 2.0 * sizes["layers"] * tokens
    head = 2.0 * sizes["head"] * supervised
    attention = 2.0 * sizes["attention_width"] * sizes["num_layers"] * squares
    model = (2 if use_lora else 3) * (layers + head) + 3 * attention
    return model, model + (layers + attention if recompute else 0.0)


def _imbalance(of_ranks: Sequence[Sequence[Sequence[int]]]) -> float:
    """[rank][step][micro-batch] -> mean over all micro-steps of (largest / mean - 1)."""
    flat = [[work for step in rank for work in step] for rank in of_ranks]
    micro_steps = list(zip(*flat, strict=True))
    return float(statistics.mean(max(works) / statistics.mean(works) - 1 for works in micro_steps))
