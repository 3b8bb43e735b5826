"""Samples -> packs: which samples share a row of a token budget, in which optimiser step.

The samples of a stage are one stream: the orders of its epochs, one after the other. A window of the stream
is packed at a time, into the packs of a few optimiser steps; what is left over comes first in the next
window. Long samples are dealt to the pack with the least attention work (the sum of squared lengths) so far,
short ones fill the rooms that are left. The packs of a window are then alike; those that are most alike form
a step. Where its packs still differ, they exchange samples, so that ranks wait for each other little, however
many of them share a step.

Everything follows from the lengths, the budget and the packs of a step: the number of ranks is not known.
"""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cad_mllm.data.order import IntArray, permutation, stable_hash
from cad_mllm.data.progress import SlowProgress

_WINDOW_PACKS = 128
"""Packs of a window, about: more are more alike, and move a sample further from its place in the order."""
_POOL = 1.02
"""Tokens that a window chooses from, relative to the room of its packs."""
_FILLERS = 0.3
"""Share of the room that is kept for the shortest samples, which fill what the others leave."""
_ALIKE = 0.025
"""(most / least - 1) of the attention work of a step's packs at which they are left as they are."""
_FULL = 0.99
"""Share of its budget that an exchange leaves in a pack, if it was there."""
_CHOICES = 200
"""Pairs of samples that a pack offers for an exchange: the time of one grows with the square."""
_EXCHANGES = 20
"""Of a step, for each of its packs: most need none, and what is not alike by then has no means to be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackPlan:
    """The packs of a stage, step by step."""

    positions: npt.NDArray[np.int32]
    """Places in the stream of the stage (epoch * samples + place in the epoch's order), pack by pack."""
    starts: IntArray
    """(packs + 1,): pack p holds `positions[starts[p] : starts[p + 1]]`."""
    packs_per_step: int

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the stage."""
        return (len(self.starts) - 1) // self.packs_per_step

    def pack(self, number: int) -> list[int]:
        """Places in the stream of the samples of one pack, in the order in which they stand there."""
        return [int(p) for p in self.positions[self.starts[number] : self.starts[number + 1]]]

    def step(self, number: int) -> list[int]:
        """The same for all packs of a step together."""
        first, last = number * self.packs_per_step, (number + 1) * self.packs_per_step
        return [int(p) for p in self.positions[self.starts[first] : self.starts[last]]]

    def samples_until(self, step: int) -> int:
        """Samples of the steps before `step`."""
        return int(self.starts[step * self.packs_per_step])


def plan_packs(
    lengths_of_epoch: Callable[[int], IntArray],
    *,
    epochs: int,
    budget: int,
    packs_per_step: int,
    key: int,
) -> PackPlan:
    """Pack a stage: every sample of its epochs is in it once; what the last step lacks comes from the next.

    Args:
        lengths_of_epoch: tokens of the samples of an epoch, in its order; none is above the budget.
        epochs: of the stage.
        budget: tokens of a pack.
        packs_per_step: accumulation times ranks.
        key: of the order of the steps within a window.
    """
    stream = _Stream(lengths_of_epoch)
    stream.reach(epochs)
    required = stream.size
    room_of_step = budget * packs_per_step
    # No window is longer than an epoch, or the epochs of a small data set would be stirred together.
    per_epoch = stream.tokens(0, required) // epochs // room_of_step
    steps_of_window = max(1, min(per_epoch, -(-_WINDOW_PACKS // packs_per_step)))
    packs: list[npt.NDArray[np.int32]] = []
    waiting = np.empty(0, np.int32)
    at = window = 0
    with SlowProgress("Packing samples", required) as progress:
        while at < required or len(waiting):
            held = int(stream.lengths[waiting].sum())
            left = held + stream.tokens(at, required)
            num_steps = min(steps_of_window, -(-left // room_of_step))
            end = stream.after(at, int(num_steps * room_of_step * _POOL) - held)
            pool = np.concatenate([waiting, np.arange(at, end, dtype=np.int32)])
            progress.advance(max(0, min(end, required) - at))
            lengths, room = stream.lengths[pool], num_steps * room_of_step
            if end <= required:
                first, kept = len(waiting), int((_POOL - 1 + _FILLERS) * room)
            else:  # what comes after the stage's own samples only fills the rooms that they leave
                first, kept = int((pool < required).sum()), stream.tokens(required, end)
            placed, rest = _pack_window(
                lengths, budget, num_steps * packs_per_step, first=first, filler_tokens=kept
            )
            for step in _steps(placed, lengths, packs_per_step, stable_hash("packs", key, window)):
                packs += [pool[pack] for pack in _alike(step, lengths, budget)]
            waiting = pool[rest]
            waiting = waiting[waiting < required]
            at, window = end, window + 1
    sizes = [len(pack) for pack in packs]
    return PackPlan(
        positions=np.concatenate(packs),
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        packs_per_step=packs_per_step,
    )


class _Stream:
    """Lengths of the samples of a stage, epoch after epoch, as far as they were needed."""

    def __init__(self, lengths_of_epoch: Callable[[int], IntArray]) -> None:
        self._lengths_of_epoch = lengths_of_epoch
        self._epochs = 0
        self.lengths = np.empty(0, np.int32)
        self._ends = np.zeros(1, np.int64)

    @property
    def size(self) -> int:
        return len(self.lengths)

    def reach(self, epochs: int) -> None:
        """Read the epochs below this one."""
        parts = [self._lengths_of_epoch(epoch).astype(np.int32) for epoch in range(self._epochs, epochs)]
        self.lengths = np.concatenate([self.lengths, *parts])
        self._ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._epochs = max(self._epochs, epochs)

    def tokens(self, start: int, end: int) -> int:
        """Of the samples [start, end); 0 where that is empty."""
        return int(self._ends[end] - self._ends[start]) if start < end else 0

    def after(self, start: int, tokens: int) -> int:
        """The place behind so many tokens from `start`, in this epoch or a later one."""
        while self._ends[-1] - self._ends[start] < tokens:
            self.reach(2 * self._epochs)
        return max(start, int(np.searchsorted(self._ends, self._ends[start] + tokens)))


def _pack_window(
    lengths: npt.NDArray[np.int32], budget: int, num_packs: int, *, first: int, filler_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """The samples of each pack, and those that are left over, rising.

    The leading `first` samples are dealt; of the others, the shortest are fillers.
    """
    by_length = first + np.argsort(lengths[first:], kind="stable")
    reserve = np.cumsum(lengths[by_length]) <= filler_tokens
    fillers = by_length[reserve]
    dealt = np.concatenate([np.arange(first), by_length[~reserve]])
    dealt = dealt[np.argsort(-lengths[dealt], kind="stable")]

    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [budget] * num_packs
    rest = []
    by_work = [(0, pack) for pack in range(num_packs)]
    for sample, length in zip(dealt.tolist(), lengths[dealt].tolist(), strict=True):
        full = []
        while by_work and room[by_work[0][1]] < length:
            full.append(heapq.heappop(by_work))
        if by_work:
            work, pack = by_work[0]
            heapq.heapreplace(by_work, (work + length * length, pack))
            packs[pack].append(sample)
            room[pack] -= length
        else:
            rest.append(sample)
        for entry in full:  # something shorter may fit
            heapq.heappush(by_work, entry)

    # The emptiest pack gets the longest filler that fits.
    samples, sizes = fillers.tolist(), lengths[fillers].tolist()
    by_room = [(-room[pack], pack) for pack in range(num_packs)]
    heapq.heapify(by_room)
    while by_room and sizes:
        free, pack = -by_room[0][0], by_room[0][1]
        fits = bisect_right(sizes, free)
        if fits:
            packs[pack].append(samples.pop(fits - 1))
            heapq.heapreplace(by_room, (sizes.pop(fits - 1) - free, pack))
        else:
            heapq.heappop(by_room)
    return packs, sorted(samples + rest)


def _steps(
    packs: list[list[int]], lengths: npt.NDArray[np.int32], packs_per_step: int, key: int
) -> Iterator[list[list[int]]]:
    """Neighbours in attention work form a step.

    The steps come in a random order, or the work would rise within each window.
    """
    squares = lengths.astype(np.int64) ** 2
    by_work = np.argsort([int(squares[pack].sum()) for pack in packs], kind="stable")
    for step in permutation(len(packs) // packs_per_step, key):
        yield [packs[number] for number in by_work[step * packs_per_step : (step + 1) * packs_per_step]]


def _alike(packs: list[list[int]], lengths: npt.NDArray[np.int32], budget: int) -> list[list[int]]:
    """The packs of a step after exchanges of a few samples that even out their attention work.

    One sample of a pack for two of another moves much work and few tokens: full packs stay full.
    """
    sizes = lengths.astype(np.int64)
    packs = [list(pack) for pack in packs]
    works = [int((sizes[pack] ** 2).sum()) for pack in packs]
    for _ in range(_EXCHANGES * len(packs)):
        if max(works) <= (1 + _ALIKE) * min(works):
            break
        order = sorted(range(len(packs)), key=works.__getitem__)
        pairs = [(order[-1], light) for light in order[:-1]] + [(heavy, order[0]) for heavy in order[-2:0:-1]]
        for heavy, light in pairs:
            exchange = _exchange(packs[heavy], packs[light], sizes, budget)
            if exchange is None:
                continue
            gives, takes, work = exchange
            packs[heavy] = [sample for sample in packs[heavy] if sample not in gives] + takes
            packs[light] = [sample for sample in packs[light] if sample not in takes] + gives
            works[heavy], works[light] = works[heavy] - work, works[light] + work
            break
        else:
            break
    return packs


def _exchange(
    heavy: list[int], light: list[int], sizes: npt.NDArray[np.int64], budget: int
) -> tuple[list[int], list[int], int] | None:
    """What the first pack gives and takes, and the work that it is rid of; None: they cannot be more alike.

    At most two samples each way, so that what is left of the difference is least. Both fit the budget, and
    none is less than `_FULL` that was not before.
    """
    sets_h, sets_l = _offers(sizes[heavy]), _offers(sizes[light])
    (tokens_h, work_h), (tokens_l, work_l) = (
        (padded[sets].sum(axis=1), (padded[sets] ** 2).sum(axis=1))
        for padded, sets in ((np.append(sizes[heavy], 0), sets_h), (np.append(sizes[light], 0), sets_l))
    )
    moved, rid = tokens_h[:, None] - tokens_l, work_h[:, None] - work_l
    gap = int((sizes[heavy] ** 2).sum() - (sizes[light] ** 2).sum())
    left = np.abs(gap - 2 * rid)
    held_h, held_l, full = int(sizes[heavy].sum()), int(sizes[light].sum()), int(_FULL * budget)
    low, high = max(held_h - budget, min(held_l, full) - held_l), budget - held_l
    high = min(high, held_h - min(held_h, full))
    left[(moved < low) | (moved > high)] = gap
    gives, takes = np.unravel_index(int(left.argmin()), left.shape)
    if left[gives, takes] >= gap:
        return None
    return (
        [heavy[at] for at in sets_h[gives] if at < len(heavy)],
        [light[at] for at in sets_l[takes] if at < len(light)],
        int(rid[gives, takes]),
    )


def _offers(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(sets, 2): places of the samples of sets of at most two; `len(sizes)` stands for no sample.

    Of the many pairs of a pack of short samples, some of each sum.
    """
    none = len(sizes)
    first, second = np.triu_indices(none, k=1)
    by_sum = np.argsort(sizes[first] + sizes[second], kind="stable")
    some = by_sum[:: max(1, -(-len(by_sum) // _CHOICES))]
    alone = np.arange(none + 1)
    return np.concatenate(
        [np.stack([alone, np.full(none + 1, none)], axis=1), np.stack([first, second], axis=1)[some]]
    )
