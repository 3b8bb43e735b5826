"""Run a function over many items in worker processes, each item under its own time and memory limit.

A geometry kernel can loop for minutes, swallow all memory or take its process down on one bad model; here
that costs this one item, and its worker is replaced. Processes are spawned, never forked: forking a process
that has threads (torch, OpenMP, a progress bar) can deadlock the child.
"""

import ctypes
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import RLock
from pathlib import Path
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from cad_mllm.errors import CadError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_QUEUED_PER_WORKER = 4
"""Batches handed out ahead, so that no worker waits for this process; the rest of the iterable stays unread.
"""

_M_ARENA_MAX = -8
"""mallopt(3)."""
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal to get when the parent dies."""


def run_limited(
    fn: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    workers: int,
    seconds: float,
    memory_mb: int = 4096,
    batch: int = 1,
) -> Generator[tuple[int, _Result | CadError], None, None]:
    """Yield (index of the item, `fn(item)`) as results come in, in any order.

    `fn` must be importable by name, items and results picklable. An item for which `fn` raises CadError, runs
    longer than `seconds`, needs more than `memory_mb` megabytes beyond what its worker began with, or brings
    its worker down, yields a CadError in place of a result. Any other exception is a bug and is raised here.
    Leaving the iterator early, by `break`, `close()` or an exception such as Ctrl-C, ends the workers.

    Handing an item over and its result back takes about a millisecond: items that take little longer should
    go `batch` at a time. A batch that breaks a limit (all of it has `seconds` too) is run again item by item,
    so the limits stay those of an item. `fn` must then be harmless to repeat.
    """
    assert workers >= 1 and seconds > 0 and memory_mb > 0 and batch >= 1, (workers, seconds, memory_mb, batch)
    rest = enumerate(items)
    waiting: deque[list[tuple[int, _Item]]] = deque()
    while len(waiting) < workers and (some := list(islice(rest, batch))):
        waiting.append(some)
    if not waiting:
        return
    context = _Context()  # until all workers have ended
    pool = ProcessPool(
        max_workers=len(waiting),  # a worker without an item would be started for nothing
        context=context,
        initializer=_limit_worker,
        initargs=(fn, memory_mb),
    )
    running: dict[Future[list[_Result | CadError]], list[tuple[int, _Item]]] = {}
    try:
        while True:
            while len(running) < workers * _QUEUED_PER_WORKER:
                some = waiting.popleft() if waiting else list(islice(rest, batch))
                if not some:
                    break
                args = (fn, [item for _, item in some])
                running[pool.schedule(_run_each, args=args, timeout=seconds)] = some
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                some = running.pop(future)
                outcome = _outcome(future, seconds, memory_mb)
                if not isinstance(outcome, CadError):
                    yield from zip((index for index, _ in some), outcome, strict=True)
                elif len(some) == 1:
                    yield some[0][0], outcome
                else:
                    waiting.extend([one] for one in some)
    finally:
        pool.stop()
        pool.join()


def _run_each(fn: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result | CadError]:
    """In a worker: what becomes of each item."""

    def run(item: _Item) -> _Result | CadError:
        try:
            return fn(item)
        except CadError as error:
            return error

    return [run(item) for item in items]


class _Context(SpawnContext):
    """Spawns processes, and keeps the locks that they share as long as it is kept itself.

    A pool that is stopped drops its locks before it ends its workers. The system's lock goes by a name, which
    goes with it: a worker that was just starting would print that there is no such file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._locks: list[RLock] = []

    def RLock(self) -> RLock:  # noqa: N802  # what multiprocessing calls it
        """A lock to share with the processes."""
        lock = super().RLock()
        self._locks.append(lock)
        return lock


def run_in_order(
    fn: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    workers: int,
    seconds: float,
    memory_mb: int = 4096,
) -> Generator[tuple[_Item, _Result | CadError], None, None]:
    """`run_limited` with its results in the order of the items, each with its item.

    What is finished behind an item that takes its time is held back: at most what all other workers do within
    `seconds`.
    """
    waiting: dict[int, _Item] = {}

    def noted() -> Iterator[_Item]:
        for number, item in enumerate(items):
            waiting[number] = item
            yield item

    finished: dict[int, _Result | CadError] = {}
    following = 0
    outcomes = run_limited(fn, noted(), workers=workers, seconds=seconds, memory_mb=memory_mb)
    with closing(outcomes):
        for number, outcome in outcomes:
            finished[number] = outcome
            while following in finished:
                yield waiting.pop(following), finished.pop(following)
                following += 1


def _outcome(
    future: "Future[list[_Result | CadError]]", seconds: float, memory_mb: int
) -> list[_Result | CadError] | CadError:
    """What a batch came to, or which limit it broke."""
    try:
        return future.result()
    except TimeoutError:
        return CadError(f"the model took longer than {seconds:g} s")
    except MemoryError:
        return CadError(f"the model needs more than {memory_mb} MB")
    except ProcessExpired as error:
        code = error.exitcode or 0
        how = f"signal {-code}: {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return CadError(f"the worker died on the model ({how})")


def _die_with_parent() -> None:
    """Nobody keeps the time of a worker whose parent was killed, and a later run may write its files."""
    parent = parent_process()
    assert parent is not None, "this is a worker"
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died before the call
        os._exit(1)


def _limit_worker(fn: Callable[[_Item], _Result], memory_mb: int) -> None:
    """Limit what a worker may add to what it has: receiving `fn` has just imported all that `fn` needs."""
    # Kernel code does not return to Python for minutes: only the default action stops it at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    # One heap: each further thread would reserve another 64 MB.
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    # Writable private memory is what Linux limits reliably. Libraries have theirs already: count from here.
    limit = _memory("VmData") + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


@contextmanager
def on_one_core() -> Iterator[None]:
    """Let libraries that first work in the body believe that the machine has one core.

    TBB (embree, manifold) counts the cores that it may use once, and would start a thread for each of them in
    every worker, where the workers are what keeps the cores busy.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def peak_memory_mb() -> int:
    """Most memory that this process has had resident (unlike `getrusage`, without that of who started it)."""
    return _memory("VmHWM") // 2**20


def _memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith(f"{name}:"))
