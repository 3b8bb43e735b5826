"""Items made ahead by worker processes, in their order; one of which a worker dies costs that one alone."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol, TypeVar, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_LARGEST_BLOCK = 31 * 2**20
"""Bytes; glibc learns nothing from blocks of 32 MB or more."""


class Source(Protocol[T_co]):
    """Items by number, which any process can make. Picklable, for any way to start a process."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> T_co: ...

    def without(self, number: int, reason: str) -> T_co:
        """What stands for an item that cannot be made."""


def prefetched(source: Source[T], num_workers: int, pin_memory: bool) -> Iterator[T]:
    """The items in their order, made ahead by `num_workers` one-thread processes (0: in this process).

    A worker that dies (out of memory, a bug in a decoder) is replaced; an item on which one dies again,
    alone, is given up.
    """
    if num_workers > 0:  # or the tokenizer's threads warn about every fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    position, died_at = 0, -1
    while position < len(source):
        try:
            for made in _iterate(source, range(position, len(source)), num_workers, pin_memory):
                yield made
                position += 1
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not _is_death_of_a_worker(error):
                raise
            if died_at == position:
                yield _alone(source, position, pin_memory)
                position += 1
            died_at = position


def _alone(source: Source[T], position: int, pin_memory: bool) -> T:
    """An item made by a worker of its own, or what stands for it if that dies."""
    try:
        return next(_iterate(source, range(position, position + 1), 1, pin_memory))
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _is_death_of_a_worker(error):
            raise
        return source.without(position, f"a loader process died of it: {error}")


def _iterate(source: Source[T], numbers: range, num_workers: int, pin_memory: bool) -> Iterator[T]:
    loader: DataLoader[T] = DataLoader(
        Subset(cast(Dataset[T], source), numbers),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_keep_memory,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever the main thread happens to be, in the middle of a training step;
        # without it a death is noticed where the next batch is asked for.
        signal.signal(signal.SIGCHLD, handler)
    yield from iterator


def _keep_memory(worker: int) -> None:
    """Let a loader process keep the memory of one batch for the next.

    glibc gives freed memory back beyond twice the largest block that was ever mapped and freed; getting the
    pages anew for every picture took a third of the time.
    """
    np.empty(_LARGEST_BLOCK, np.uint8)


def _is_death_of_a_worker(error: Exception) -> bool:
    """torch has no type for it: `DataLoader worker (pid(s) ...) exited unexpectedly`.

    A worker that dies after it has announced a batch, before the tensors are fetched from it, is missed by
    the connection over which they come: on a GPU by the thread that pins memory, which ends of it.
    """
    known = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
    return not isinstance(error, RuntimeError) or str(error).startswith(known)
