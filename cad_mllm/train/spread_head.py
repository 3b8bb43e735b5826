"""The cross-entropy of a frozen LM head under ZeRO-3, whose rows are never gathered.

A rank holds V / W rows of the head, W ranks. Instead of 1.2 GB of weights (an 8B LM) the hidden states
travel: each rank computes the logits of its rows of the vocabulary for the positions of all ranks, a few of
each at a time, as Megatron-LM does (Shoeybi et al., Megatron-LM, 2019, section 3).

Shapes: S positions of this rank, P of each rank that are computed at once, W ranks, U rows of the head on a
rank, V = W U of the vocabulary, D hidden channels.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from cad_mllm.model import loss as unsharded
from cad_mllm.model.loss import IGNORED_LABEL, LinearCrossEntropy


def spread_head(module: nn.Module) -> None:
    """Let the ranks compute the loss of all of them together, where a model's head is frozen and shared out.

    Call it when DeepSpeed has sharded the model, on all ranks alike. What is rare stays as it is: a head with
    a bias, one that does not come apart into whole rows, one that is kept whole or quantised.
    """
    for loss in module.modules():
        if isinstance(loss, LinearCrossEntropy) and _comes_apart(loss):
            (weight,) = loss.parameters()
            loss.forward = partial(_forward, weight)  # type: ignore[method-assign]
            # DeepSpeed's, by which it would gather the head.
            loss._forward_pre_hooks.clear()
            loss._forward_hooks.clear()


def _comes_apart(loss: LinearCrossEntropy) -> bool:
    weights: list[Any] = list(loss.parameters())
    return len(weights) == 1 and all(
        not weight.requires_grad
        and not weight.ds_persist
        and weight.ds_shape[0] % distributed.get_world_size(weight.ds_process_group) == 0
        and weight.ds_tensor.dtype == weight.dtype
        and weight.ds_secondary_tensor is None
        for weight in weights
    )


def _forward(weight: Any, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
    """As `LinearCrossEntropy.forward`; on all ranks alike, each with positions of its own.

    DeepSpeed gathers a parameter that a module is asked for: so the parameter comes from outside.
    """
    rows_UD = weight.ds_tensor.view(-1, weight.ds_shape[1]).to(hidden_SD.device, non_blocking=True)
    if not torch.is_grad_enabled():
        hidden_SD = hidden_SD.detach()
    loss: Tensor = _SpreadCrossEntropy.apply(hidden_SD, rows_UD, targets_S, weight.ds_process_group)
    return loss


class _SpreadCrossEntropy(torch.autograd.Function):
    """The gradient is computed with the loss, while the logits are there; only it is kept."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, rows_UD: Tensor, targets_S: Tensor, group: Any) -> Tensor:
        rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
        count = torch.tensor([hidden_SD.shape[0]], device=hidden_SD.device)
        distributed.all_reduce(count, op=distributed.ReduceOp.MAX, group=group)
        most = int(count)
        at_once = max(1, unsharded.LOGITS_AT_ONCE // (ranks * rows_UD.shape[0]))
        grad_SD = torch.empty_like(hidden_SD) if ctx.needs_input_grad[0] else None
        loss = hidden_SD.new_zeros((), dtype=torch.float32)
        for start in range(0, most, at_once):
            chunk = slice(start, min(start + at_once, most))
            # Ranks with fewer positions fill up with ones that add nothing.
            missing = chunk.stop - max(chunk.start, min(chunk.stop, hidden_SD.shape[0]))
            hidden_PD = nn.functional.pad(hidden_SD[chunk], (0, 0, 0, missing))
            targets_P = nn.functional.pad(targets_S[chunk], (0, missing), value=IGNORED_LABEL)
            part, grad_PD = _chunk(hidden_PD, targets_P, rows_UD, grad_SD is not None, rank, ranks, group)
            loss += part
            if grad_SD is not None and grad_PD is not None:
                grad_SD[chunk] = grad_PD[: grad_PD.shape[0] - missing]
        ctx.save_for_backward(grad_SD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SD,) = ctx.saved_tensors
        return None if grad_SD is None else (grad_SD * grad).to(grad_SD.dtype), None, None, None


def _chunk(
    hidden_PD: Tensor, targets_P: Tensor, rows_UD: Tensor, wanted: bool, rank: int, ranks: int, group: Any
) -> tuple[Tensor, Tensor | None]:
    """Loss of this rank's positions, and the gradient of their hidden states if it is wanted.

    d loss / d logits = softmax - one-hot. Q = W P positions of all ranks.
    """
    positions, rows = hidden_PD.shape[0], rows_UD.shape[0]
    hidden_QD = hidden_PD.new_empty(ranks * positions, hidden_PD.shape[1])
    targets_Q = targets_P.new_empty(ranks * positions)
    distributed.all_gather_into_tensor(hidden_QD, hidden_PD.contiguous(), group=group)
    distributed.all_gather_into_tensor(targets_Q, targets_P.contiguous(), group=group)
    logits_QU = hidden_QD @ rows_UD.t()
    # Within these rows at first: one kernel reads the logits in their dtype and writes fp32.
    log_probabilities_QU = logits_QU.log_softmax(dim=1, dtype=torch.float32)
    sums_Q = logits_QU[:, 0].float() - log_probabilities_QU[:, 0]  # log sum exp
    own_Q = targets_Q - rank * rows
    is_own_Q1 = ((own_Q >= 0) & (own_Q < rows))[:, None]
    own_Q1 = own_Q.clamp(0, rows - 1)[:, None]
    found_Q1 = log_probabilities_QU.gather(1, own_Q1)
    both_2Q = torch.stack(
        [sums_Q, torch.where(is_own_Q1, found_Q1, 0.0).squeeze(1) + sums_Q * is_own_Q1[:, 0]]
    )
    both_W2Q = both_2Q.new_empty(ranks, *both_2Q.shape)
    distributed.all_gather_into_tensor(both_W2Q.view(-1), both_2Q.view(-1), group=group)
    total_Q = both_W2Q[:, 0].logsumexp(dim=0)
    logits_of_targets_Q = both_W2Q[:, 1].sum(dim=0)
    supervised_Q = targets_Q != IGNORED_LABEL
    losses_Q = (total_Q - logits_of_targets_Q) * supervised_Q
    loss = losses_Q.view(ranks, positions)[rank].sum()
    if not wanted:
        return loss, None
    log_probabilities_QU += (sums_Q - total_Q)[:, None]
    # From fp32: a probability near 1 that was rounded first would leave nothing of the difference.
    of_targets_Q1 = log_probabilities_QU.gather(1, own_Q1).exp() - is_own_Q1.float()
    grad_QU = torch.exp(log_probabilities_QU, out=logits_QU)
    grad_QU.scatter_(1, own_Q1, of_targets_Q1.to(grad_QU.dtype))
    grad_QD = (grad_QU @ rows_UD).mul_(supervised_Q[:, None])
    grad_PD = torch.empty_like(hidden_PD)
    distributed.reduce_scatter_tensor(grad_PD, grad_QD, group=group)
    return loss, grad_PD
