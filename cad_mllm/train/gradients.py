"""What ZeRO does between the last gradient and the next micro-batch, without a loop over parameters.

Nothing else runs on the GPU then: on an 8B LM with LoRA, of 504 matrices, each such loop is a gap of 2 to
5 ms. The private attributes of DeepSpeed's optimisers that are read here are the ones of DeepSpeed 0.19.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def measure_at_once(zero: Any) -> None:
    """The norm of each group of ZeRO-1/2 in a few kernels, for clipping and overflow alike.

    And let the streams, not the host, wait for the last reduction: what the host does with each gradient
    after it is then done while the device still computes.
    """
    for params, flat in zip(zero.round_robin_bit16_groups, zero.bit16_groups_flat, strict=True):
        within = range(flat.data_ptr(), flat.data_ptr() + flat.numel() * flat.element_size())
        assert all(p.data_ptr() in within for p in params)
    # They are views of the flat buffer from the start; DeepSpeed makes them so again after each update.
    zero._update_model_bit16_weights = lambda group: None
    if zero.cpu_offload:
        return

    def norm(gradients: Iterable[Tensor], params: object, norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        norms = torch._foreach_norm(list(gradients), 2, torch.float32)
        return _norm_over_ranks(torch.stack(norms).square().sum(), zero.dp_process_group)

    zero.get_grad_norm_direct = norm
    # A norm that is not finite skips the step as well.
    zero.check_overflow = lambda partition_gradients=True: None
    _update_without_the_host(zero)
    stream = zero.reduction_stream
    if zero.overlap_comm and isinstance(stream, torch.cuda.Stream):
        epilogue = zero.independent_gradient_partition_epilogue

        def without_the_host() -> None:
            with _streams_wait(stream):
                epilogue()

        zero.independent_gradient_partition_epilogue = without_the_host


def _update_without_the_host(zero: Any) -> None:
    """Let the optimiser's kernel look whether the norm is finite, and change nothing if it is not.

    DeepSpeed's host waits for the norm, and so for the whole backward pass, before it starts what comes then:
    4 ms, in which the GPU has next to nothing to do. (In fp32 it still does: there it does not let that be.)
    """
    optimizer, of_deepspeed = zero.optimizer, zero.scaled_global_norm
    assert optimizer.defaults["fused"], "this kernel can"

    def norm_of_groups(norm_type: float = 2) -> Tensor:
        total: Tensor = of_deepspeed(norm_type)  # infinite if that of a group is not finite
        optimizer.found_inf = (~total.isfinite()).to(torch.float32)
        return total

    def clip(gradients: Iterable[Tensor], total: Tensor) -> None:
        if zero.clip_grad > 0:
            torch._foreach_mul_(list(gradients), 1 / ((total + 1e-6) / zero.clip_grad).clamp(min=1))

    assert zero.loss_scale == 1, "scaled losses come with fp16"
    zero.check_grad_overflow = False
    zero.scaled_global_norm, zero.unscale_and_clip_grads = norm_of_groups, clip


def update_at_once(zero: Any) -> None:
    """Treat the gradients and the weights of each sub-group of ZeRO-3 as the flat buffers that they lie in.

    And let the stream of the update, not the host, wait for the last reduction; not where the host updates.
    """
    flats, offset = zero.fp16_partitioned_groups_flat, 0
    if any(flat is None for flat in flats):  # on a disk
        return
    for shards, flat in zip(zero.fp16_partitioned_groups, flats, strict=True):
        starts = accumulate((shard.numel() for shard in shards), initial=0)
        step = flat.element_size()
        assert all(s.data_ptr() == flat.data_ptr() + step * at for s, at in zip(shards, starts, strict=False))
    # They are views of the flat buffer from the start; DeepSpeed makes them so again after each update.
    zero._unflatten_partitioned_parameters = lambda sub_group: None
    if zero.offload_optimizer:
        return
    stream = zero.reduce_and_partition_stream
    if isinstance(stream, torch.cuda.Stream) and stream != torch.cuda.default_stream():
        zero.reduce_and_partition_stream = _ForTheUpdate(zero.device)
    gradients: list[Tensor] = []
    for flat in flats:
        gradients.append(zero.grad_partitions_flat_buffer.narrow(0, offset, flat.numel()))
        offset += flat.numel()
    assert offset == zero.grad_partitions_flat_buffer.numel()

    def norm(of_parameters: object, params: object, norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        number = next(n for n, group in enumerate(zero.fp16_groups) if group is params)
        total = torch.linalg.vector_norm(gradients[number], dtype=torch.float32).square()
        return _norm_over_ranks(total, zero.dp_process_group)

    def prepare(number: int) -> None:
        master = zero.fp32_partitioned_groups_flat[number]
        master.grad = gradients[number].to(master.dtype, copy=True)  # it is scaled in place
        zero.averaged_gradients[number] = None

    zero.get_grad_norm_direct = norm
    zero._prepare_fp32_grad_for_sub_group = prepare


def _norm_over_ranks(squared: Tensor, group: Any) -> Tensor:
    """The norm of what all ranks hold, as of one vector; -1 if it is not finite."""
    from deepspeed import comm

    comm.all_reduce(squared, op=comm.ReduceOp.SUM, group=group)
    norm = squared.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


@contextmanager
def _streams_wait(stream: torch.cuda.Stream) -> Iterator[None]:
    """Where DeepSpeed synchronises with the device, this stream and the current one wait for each other."""
    from deepspeed.accelerator import get_accelerator

    accelerator, current = get_accelerator(), torch.cuda.current_stream(stream.device)

    def synchronize(device_index: int | None = None) -> None:
        current.wait_stream(stream)
        stream.wait_stream(current)

    accelerator.synchronize = synchronize
    try:
        yield
    finally:
        del accelerator.synchronize


class _ForTheUpdate(torch.cuda.Stream):
    """DeepSpeed synchronises with it where the gradients have to be there."""

    def synchronize(self) -> None:
        """Let what comes next on the current stream wait; the host goes on."""
        torch.cuda.current_stream(self.device).wait_stream(self)
