"""Items made ahead by worker processes, in their order; one of which a worker dies costs that one alone.

Workers come from a small process that has imported what they need, and never from the one that trains. A fork
of a rank keeps the memory of the rank as it was: with weights and optimiser state in host memory, each update
writes them anew beside what the workers keep, and 8B parameters take 100 GB more. A fork can deadlock where
threads (NCCL, gloo, the tokenizer) held a lock. And where a child dies, torch raises wherever the main thread
is, in the middle of a training step; of these it is noticed where the next item is asked for.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Protocol, TypeVar, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from cad_mllm.errors import ConfigError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_WORKERS = multiprocessing.get_context("forkserver")
_WORKERS.set_forkserver_preload(["cad_mllm.data.loader"])

_LONGEST_TMPDIR = 75
"""Characters: a socket's path has at most 107, and Python adds `/pymp-????????/listener-????????`."""

_LARGEST_BLOCK = 31 * 2**20
"""Bytes; glibc learns nothing from blocks of 32 MB or more."""


class Source(Protocol[T_co]):
    """Items by number, which any process can make. Picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> T_co: ...

    def without(self, number: int, reason: str) -> T_co:
        """What stands for an item that cannot be made."""


def prefetched(source: Source[T], num_workers: int, pin_memory: bool) -> Iterator[T]:
    """The items in their order, made ahead by `num_workers` one-thread processes (0: in this process).

    A worker that dies (out of memory, a bug in a decoder) is replaced; an item on which one dies again,
    alone, is given up.
    """
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
    yield from loader_of(Subset(cast(Dataset[T], source), numbers), num_workers, pin_memory)


def loader_of(items: Dataset[T], num_workers: int, pin_memory: bool) -> "DataLoader[T]":
    """torch's loader of picklable items, one by one, made by `num_workers` processes (0: in this one).

    ConfigError: there can be no sockets in the folder for temporary files.
    """
    if num_workers and len(tempfile.gettempdir()) > _LONGEST_TMPDIR:
        raise ConfigError(
            f"{tempfile.gettempdir()} is too long for the sockets of loader processes (at most "
            f"{_LONGEST_TMPDIR} characters): export TMPDIR=/tmp, or use --num_workers 0"
        )
    return DataLoader(
        items,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_set_up,
        multiprocessing_context=_WORKERS if num_workers else None,
    )


def _set_up(worker: int) -> None:
    """In a loader process: it lives as long as its reader does, and keeps the memory of a batch for the next.

    glibc gives freed memory back beyond twice the largest block that was ever mapped and freed; getting the
    pages anew for every picture took a third of the time.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the rank ends its step first
    reader = multiprocessing.parent_process()
    assert reader is not None, "this is a loader process"
    threading.Thread(target=_end_with, args=(reader.sentinel,), daemon=True).start()
    np.empty(_LARGEST_BLOCK, np.uint8)


def _end_with(reader: int) -> None:
    """torch's workers look whether their parent is there, which is not the process that reads from them."""
    wait([reader])
    os._exit(1)


def _is_death_of_a_worker(error: Exception) -> bool:
    """torch has no type for it: `DataLoader worker (pid(s) ...) exited unexpectedly`.

    A worker that dies after it has announced a batch, before the tensors are fetched from it, is missed by
    the connection over which they come: on a GPU by the thread that pins memory, which ends of it.
    """
    known = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
    return not isinstance(error, RuntimeError) or str(error).startswith(known)
