"""Which sample comes in which step, with which modalities: pure functions of the seed.

Every draw comes from (seed, stage, epoch, sample id) through blake2b, or from the raw stream of a numpy bit
generator keyed by it (raw streams, unlike numpy's samplers, are the same in every numpy version). Nothing
depends on global random state, on the number of workers or ranks, or on what was drawn before.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cad_mllm.data.sequence import MODALITIES, Combo, Mix

T = TypeVar("T")

IntArray = npt.NDArray[np.int64]


def stable_hash(*parts: int | str) -> int:
    """A 64-bit number that follows from the parts alone, in every process and on every machine."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _random_keys(length: int, key: int) -> npt.NDArray[np.uint64]:
    return np.random.Philox(key=key).random_raw(length)


def permutation(length: int, key: int) -> IntArray:
    """The numbers below `length` in an order that follows from the key alone."""
    return np.argsort(_random_keys(length, key), kind="stable").astype(np.int64)


def _smallest(keys: npt.NDArray[np.uint64], count: int) -> IntArray:
    """`np.argsort(keys, kind="stable")[:count]` in less time, for 0 < count < len(keys)."""
    place_bits = len(keys).bit_length()
    places = np.uint64(2**place_bits - 1)
    # Numbers are sorted several times as fast as their places are: so each key takes its place along.
    packed = (keys & ~places) | np.arange(len(keys), dtype=np.uint64)
    packed.partition(count)
    first = np.sort(packed[: count + 1])
    if (np.diff(first >> np.uint64(place_bits)) == 0).any():  # what the places replaced may decide
        return np.argsort(keys, kind="stable")[:count].astype(np.int64)
    return (first[:count] & places).astype(np.int64)


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, stage: int, epoch: int) -> IntArray:
    """Sample indices of one epoch (num_samples,), each exactly once; read-only."""
    order = permutation(num_samples, stable_hash("order", seed, stage, epoch))
    order.setflags(write=False)
    return order


def num_steps(num_samples: int, epochs: int, global_batch: int) -> int:
    """Optimiser steps that see every sample at least `epochs` times; only the last step runs past them."""
    return -(-num_samples * epochs // global_batch)


def step_samples(
    num_samples: int, global_batch: int, seed: int, stage: int, step: int
) -> list[tuple[int, int]]:
    """The `global_batch` samples of a step as (sample index, epoch).

    A stage reads its epochs' orders one after the other; step s takes positions [s * global_batch,
    (s + 1) * global_batch) of that, across the border of two epochs where it falls inside.
    """
    positions = range(step * global_batch, (step + 1) * global_batch)
    return [sample_at(num_samples, seed, stage, position) for position in positions]


def sample_at(num_samples: int, seed: int, stage: int, position: int) -> tuple[int, int]:
    """The sample at a position of a stage, as (sample index, epoch)."""
    epoch, place = divmod(position, num_samples)
    return int(epoch_order(num_samples, seed, stage, epoch)[place]), epoch


def rank_micro_batches(
    samples: Sequence[T], *, batch_size: int, accumulation: int, rank: int, world_size: int
) -> list[Sequence[T]]:
    """One rank's share of a step: micro-batch `a * world_size + rank` for each accumulation index a.

    Micro-batch j of the step is `samples[j * batch_size : (j + 1) * batch_size]`, whoever computes it.
    """
    assert len(samples) == batch_size * accumulation * world_size, "a step is a whole number of micro-batches"
    numbers = (a * world_size + rank for a in range(accumulation))
    return [samples[j * batch_size : (j + 1) * batch_size] for j in numbers]


def draw_combos(
    seed: int, stage: int, epoch: int, sample_ids: Sequence[str], mix: Mix
) -> tuple[list[Combo], IntArray]:
    """The combinations of the mix, and which of them each sample (num_samples,) has in an epoch.

    They are drawn by the shares of `mix`, normalised by their sum.
    """
    combos = [combo for combo in MODALITIES if mix.get(combo, 0.0) > 0]
    assert combos, "a mix has at least one combination"
    if len(combos) == 1:
        return combos, np.zeros(len(sample_ids), np.int64)
    edges = np.cumsum([mix[combo] for combo in combos])
    uniform = _stable_hashes(("combo", seed, stage, epoch), sample_ids) / 2**64
    drawn = np.searchsorted(edges, uniform * edges[-1], side="right")
    return combos, np.minimum(drawn, len(combos) - 1).astype(np.int64)


def draw_captioned(
    seed: int, stage: int, epoch: int, sample_ids: Sequence[str], dropout: float
) -> npt.NDArray[np.bool_]:
    """Whether each sample (num_samples,) keeps its caption in an epoch, where it has something beside it."""
    if dropout == 0:
        return np.ones(len(sample_ids), np.bool_)
    uniform = _stable_hashes(("caption", seed, stage, epoch), sample_ids) / 2**64
    return uniform >= dropout


def _stable_hashes(parts: tuple[int | str, ...], last: Sequence[str]) -> npt.NDArray[np.uint64]:
    """`stable_hash(*parts, text)` for each of the texts; what they share is hashed once."""
    shared = hashlib.blake2b(json.dumps(parts).removesuffix("]").encode() + b", ", digest_size=8)
    digests = bytearray()
    for text in last:
        digest = shared.copy()
        digest.update(json.dumps(text).encode() + b"]")
        digests += digest.digest()
    return np.frombuffer(digests, dtype="<u8")


def draw_view(seed: int, stage: int, epoch: int, sample_id: str, num_views: int) -> int:
    """Which of a sample's views is fed in an epoch: 0 <= view < num_views."""
    return stable_hash("view", seed, stage, epoch, sample_id) % num_views


def draw_points(
    seed: int, stage: int, epoch: int, sample_id: str, num_available: int, num_points: int
) -> IntArray:
    """Rows (num_points,) of a cloud of `num_available` points: all different where there are enough of them.

    A smaller cloud is repeated as evenly as possible: no point is left out.
    """
    key = stable_hash("points", seed, stage, epoch, sample_id)
    if num_points < num_available:
        return _smallest(_random_keys(num_available, key), num_points)
    return np.resize(permutation(num_available, key), num_points)
