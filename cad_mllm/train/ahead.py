"""The next micro-batch is copied to the device while this one computes."""

from collections.abc import Iterable, Iterator

import torch

from cad_mllm.data.collate import Batch


class CopiedAhead:
    """Micro-batches on the device, each copied there while the one before it computes.

    The copies run on a stream of their own, from pinned memory: in the stream of the model they would wait
    for all of its kernels. On a CPU nothing is copied, nor fetched before it is asked for.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self._batches = batches
        self._device = device

    def __iter__(self) -> Iterator[Batch]:
        if self._device.type != "cuda":
            return iter(self._batches)
        return self._copied()

    def _copied(self) -> Iterator[Batch]:
        copying = torch.cuda.Stream(self._device)
        waiting: Batch | None = None
        for batch in self._batches:
            with torch.cuda.stream(copying):
                ahead = batch.to(self._device)
            if waiting is not None:
                yield waiting
            # Only now: the model's stream must not wait for a copy before the work that it hides behind.
            self._hand_over(ahead, copying)
            waiting = ahead
        if waiting is not None:
            yield waiting

    def _hand_over(self, batch: Batch, copying: torch.cuda.Stream) -> None:
        """Let the current stream use what was copied, and the allocator know that it does."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(copying)
        batch.record_stream(current)
