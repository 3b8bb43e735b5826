"""The fp32 state that AdamW keeps, seen parameter by parameter.

Engines keep their fp32 master weights in flat buffers, each rank a part of them. A `Flat` says which part
of which parameter lies where, so that moments can be reset per group and checkpoints can be written and
read whatever the engine and the number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NamedGroups = Mapping[Any, Sequence[tuple[str, nn.Parameter]]]
"""Group name -> (parameter name, parameter), the trainable ones, in a fixed order."""

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [start, start + length) of a flattened parameter, at `offset` in a flat buffer."""

    name: str
    numel: int
    """Of the whole parameter."""
    shape: tuple[int, ...]
    start: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Flat:
    """One fp32 master buffer of this rank, all of one parameter group."""

    group: str
    master: Tensor
    """1-D, fp32; the key of the optimiser's state."""
    fragments: tuple[Fragment, ...]


def zero_moments(optimizer: torch.optim.Optimizer, flats: Iterable[Flat]) -> None:
    """Give these buffers the Adam state of a first step: zero moments, step 0.

    Creates the state where the optimiser has none yet (both AdamW variants make it lazily).
    """
    for flat in flats:
        state = optimizer.state[flat.master]
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat.master)
        set_step(optimizer, flat, 0)


def set_step(optimizer: torch.optim.Optimizer, flat: Flat, step: int) -> None:
    """Set the number of updates that the bias correction of this buffer counts."""
    state = optimizer.state[flat.master]
    if isinstance(optimizer, torch.optim.AdamW):
        # torch keeps it as a tensor, on the parameter's device when fused
        fused = bool(optimizer.defaults.get("fused"))
        state["step"] = torch.tensor(float(step), device=flat.master.device if fused else "cpu")
    else:
        state["step"] = step


def replay_steps(optimizer: torch.optim.Optimizer, flats: Sequence[Flat]) -> None:
    """Bring what DeepSpeed's CPU Adam keeps beside its state to where the steps of these buffers left it.

    The C++ object holds the powers of the betas in fp32, for all buffers: multiplied on where a call's step
    follows that of the call before, taken anew by `pow` elsewhere. Both round; early in a run 1 - beta2^step
    then differs by 1e-5 of itself, and so do the updates. So the calls of the run so far are made again, on a
    number that does not move: some microseconds each. A buffer that has seen fewer steps than others counted
    on with them until its moments were made fresh.
    """
    adam: Any = optimizer
    if not hasattr(adam, "ds_opt_adam"):
        return
    steps = [get_step(optimizer, flat) for flat in flats]
    last = max(steps, default=0)
    (beta1, beta2), eps = adam.param_groups[0]["betas"], adam.param_groups[0]["eps"]
    number, grad, exp_avg, exp_avg_sq = torch.zeros(4, 1)
    for now in range(1, last + 1):
        for step in steps:
            then = step - (last - now)
            adam.ds_opt_adam.adam_update(
                adam.opt_id, then if then > 0 else now, 0.0, beta1, beta2, eps,
                0.0, True, number, grad, exp_avg, exp_avg_sq,
            )  # fmt: skip


def get_step(optimizer: torch.optim.Optimizer, flat: Flat) -> int:
    """How many updates this buffer has seen since its moments were fresh."""
    return int(optimizer.state[flat.master].get("step", 0))
