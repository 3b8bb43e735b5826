"""The cross-entropy of a frozen LM head under ZeRO-3, whose rows are never gathered.

A rank holds V / W rows of the head, W ranks. Instead of 1.2 GB of weights (an 8B LM) the hidden states
travel: each rank computes the logits of its rows of the vocabulary for the positions of all ranks, a few of
each at a time, as Megatron-LM does (Shoeybi et al., Megatron-LM, 2019, section 3).

Shapes: S positions of this rank, P of each rank that are computed at once, W ranks, U rows of the head on a
rank, V = W U of the vocabulary, D hidden channels.
"""

from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from cad_mllm.model import loss as unsharded
from cad_mllm.model.loss import IGNORED_LABEL, LinearCrossEntropy
from cad_mllm.train.frozen_layers import without_deepspeed
from cad_mllm.train.gathering import comes_apart_into_rows


def spread_head(module: nn.Module, control: distributed.ProcessGroup) -> None:
    """Let the ranks compute the loss of all of them together, where a model's head is frozen and shared out.

    Call it when DeepSpeed has sharded the model, on all ranks alike. What is rare stays as it is: a head with
    a bias, one that does not come apart into whole rows, one that is kept whole or quantised.

    Args:
        module: what DeepSpeed has sharded.
        control: the ranks' group for what their hosts tell each other; without the GPU, which computes
            meanwhile.
    """
    for loss in module.modules():
        weights = list(loss.parameters()) if isinstance(loss, LinearCrossEntropy) else []
        if len(weights) == 1 and comes_apart_into_rows(weights[0]):
            (weight,) = weights
            loss.forward = partial(_forward, weight, control)  # type: ignore[method-assign]
            without_deepspeed(loss)


def _forward(weight: Any, control: distributed.ProcessGroup, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
    """As `LinearCrossEntropy.forward`; on all ranks alike, each with positions of its own.

    DeepSpeed gathers a parameter that a module is asked for: so the parameter comes from outside.
    """
    rows_UD = weight.ds_tensor.view(-1, weight.ds_shape[1]).to(hidden_SD.device, non_blocking=True)
    if not torch.is_grad_enabled():
        hidden_SD = hidden_SD.detach()
    count = torch.tensor(hidden_SD.shape[0])
    distributed.all_reduce(count, op=distributed.ReduceOp.MAX, group=control)
    loss: Tensor = _SpreadCrossEntropy.apply(
        hidden_SD, rows_UD, targets_S, weight.ds_process_group, int(count)
    )
    return loss


class _SpreadCrossEntropy(torch.autograd.Function):
    """The gradient is computed with the loss, while the logits are there; only it is kept.

    The hidden states of the next positions, and the gradients of the ones before, travel meanwhile.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, rows_UD: Tensor, targets_S: Tensor, group: Any, most: int
    ) -> Tensor:
        ranks = distributed.get_world_size(group)
        # Ranks with fewer positions fill up with ones that add nothing.
        missing = most - hidden_SD.shape[0]
        all_SD = nn.functional.pad(hidden_SD, (0, 0, 0, missing)) if missing else hidden_SD.contiguous()
        targets_S = nn.functional.pad(targets_S, (0, missing), value=IGNORED_LABEL)
        targets_WS = targets_S.new_empty(ranks, most)
        distributed.all_gather_into_tensor(targets_WS.view(-1), targets_S, group=group)
        grad_SD = torch.empty_like(all_SD) if ctx.needs_input_grad[0] else None
        loss = hidden_SD.new_zeros((), dtype=torch.float32)
        at_once = max(1, unsharded.LOGITS_AT_ONCE // (ranks * rows_UD.shape[0]))
        chunks = [slice(start, min(start + at_once, most)) for start in range(0, most, at_once)]
        arriving = [_gather(all_SD[chunk], group) for chunk in chunks[:1]]
        leaving = None
        for chunk, after in zip_longest(chunks, chunks[1:]):
            hidden_QD, received = arriving.pop()
            received.wait()
            if after is not None:
                arriving.append(_gather(all_SD[after], group))
            part, grad_QD = _chunk(hidden_QD, targets_WS[:, chunk], rows_UD, grad_SD is not None, group)
            loss += part
            if leaving is not None:
                leaving.wait()
            if grad_SD is not None and grad_QD is not None:
                leaving = distributed.reduce_scatter_tensor(
                    grad_SD[chunk], grad_QD, group=group, async_op=True
                )
        if leaving is not None:
            leaving.wait()
        ctx.save_for_backward(None if grad_SD is None else grad_SD[: hidden_SD.shape[0]])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SD,) = ctx.saved_tensors
        return None if grad_SD is None else (grad_SD * grad).to(grad_SD.dtype), None, None, None, None


def _gather(hidden_PD: Tensor, group: Any) -> tuple[Tensor, distributed.Work]:
    """The states of all ranks, which are there when one has waited for them."""
    ranks = distributed.get_world_size(group)
    hidden_QD = hidden_PD.new_empty(ranks * hidden_PD.shape[0], hidden_PD.shape[1])
    work = distributed.all_gather_into_tensor(hidden_QD, hidden_PD, group=group, async_op=True)
    return hidden_QD, work


def _chunk(
    hidden_QD: Tensor, targets_WP: Tensor, rows_UD: Tensor, wanted: bool, group: Any
) -> tuple[Tensor, Tensor | None]:
    """Loss of this rank's positions, and the gradients of all hidden states by these rows if they are wanted.

    d loss / d logits = softmax - one-hot. Q = W P positions of all ranks.
    """
    rank, (ranks, positions), rows = distributed.get_rank(group), targets_WP.shape, rows_UD.shape[0]
    targets_Q = targets_WP.reshape(-1)
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
    return loss, (grad_QU @ rows_UD).mul_(supervised_Q[:, None])
