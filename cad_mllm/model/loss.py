"""Cross-entropy of a linear head whose logits are never all there at once.

Shapes: S positions, D hidden channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100

LOGITS_AT_ONCE = 2**26
"""fp32 logits of a chunk: 256 MB, some copies of which are alive at a time."""


class LinearCrossEntropy(nn.Module):
    """Sum of the cross-entropies of `head`'s logits, chunk by chunk.

    The weight is the head's own parameter, held a second time: so the hooks of a sharding engine gather it
    around this module as they do around the head.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
        """An fp32 scalar; int64 targets that are IGNORED_LABEL add nothing."""
        weight_VD: Tensor = self.weight
        bias_V: Tensor | None = self.bias
        if not torch.is_grad_enabled():
            hidden_SD, weight_VD = hidden_SD.detach(), weight_VD.detach()
            bias_V = bias_V.detach() if bias_V is not None else None
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden_SD, weight_VD, bias_V, targets_S)
        return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, while a chunk's logits are there; only they are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_S: Tensor
    ) -> Tensor:
        grads = [
            torch.zeros_like(tensor, dtype=dtype) if needed and tensor is not None else None
            for tensor, needed, dtype in zip(
                (hidden_SD, weight_VD, bias_V),
                ctx.needs_input_grad,
                # Over many chunks a sum in bf16 would lose the small ones.
                (hidden_SD.dtype, torch.float32, torch.float32),
                strict=False,
            )
        ]
        loss = hidden_SD.new_zeros((), dtype=torch.float32)
        rows = max(1, LOGITS_AT_ONCE // weight_VD.shape[0])
        for start in range(0, hidden_SD.shape[0], rows):
            chunk = slice(start, start + rows)
            loss += _chunk(hidden_SD[chunk], weight_VD, bias_V, targets_S[chunk], grads, chunk)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_SD, weight_VD, bias_V)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if g is None else (g * grad).to(dtype) for g, dtype in kept), None)


def _chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_C: Tensor,
    grads: list[Tensor | None],
    chunk: slice,
) -> Tensor:
    """Loss of a chunk; adds to the gradients that are wanted. d loss / d logits = softmax - one-hot."""
    logits_CV = nn.functional.linear(hidden_CD, weight_VD, bias_V)
    supervised_C1 = (targets_C != IGNORED_LABEL)[:, None]
    targets_C1 = targets_C.clamp(min=0)[:, None]
    # One kernel reads the logits in their dtype and writes fp32; of passes over (C, V) there are few.
    log_probabilities_CV = logits_CV.log_softmax(dim=1, dtype=torch.float32)
    own_C1 = log_probabilities_CV.gather(1, targets_C1)
    loss = -(own_C1 * supervised_C1).sum()
    grad_hidden, grad_weight, grad_bias = grads
    if grad_hidden is None and grad_weight is None and grad_bias is None:
        return loss
    grad_CV = torch.exp(log_probabilities_CV, out=logits_CV)
    # From fp32: a probability near 1 that was rounded first would leave nothing of the difference.
    grad_CV.scatter_(1, targets_C1, (own_C1.exp() - 1).to(grad_CV.dtype))
    if grad_hidden is not None:
        grad_hidden[chunk] = (grad_CV @ weight_VD).mul_(supervised_C1)
    if grad_weight is not None:
        grad_weight += grad_CV.T @ (hidden_CD * supervised_C1)
    if grad_bias is not None:
        grad_bias += (grad_CV * supervised_C1).sum(dim=0, dtype=torch.float32)
    return loss
