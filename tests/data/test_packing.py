"""Packs: full, balanced, the same for any number of ranks, and nobody waits long."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cad_mllm import bench
from cad_mllm.data import order
from cad_mllm.data.order import IntArray
from cad_mllm.data.packing import PackPlan, plan_packs

from .conftest import draw_combo

REAL = json.loads((Path(bench.__file__).parent / "lengths.json").read_text())
MAX_SEQ_LENGTH = 2048
PLACEHOLDERS, SHARES = (0, 257, 256, 513), (0.2, 0.3, 0.2, 0.3)
"""Tokens that the combinations of stage 3 add, and how often they are drawn."""


def real_lengths(num_samples: int, seed: int) -> IntArray:
    """An epoch as long as those of stage 3: the lengths of the real files, those that fit."""
    rng = np.random.default_rng(seed)
    text = np.asarray(REAL["prompt"]) + np.asarray(REAL["target"])
    text = text[text + max(PLACEHOLDERS) <= MAX_SEQ_LENGTH]
    return rng.choice(text, num_samples) + rng.choice(PLACEHOLDERS, num_samples, p=SHARES)


def plan(lengths: IntArray, *, epochs: int = 1, budget: int = 8192, packs_per_step: int = 8) -> PackPlan:
    """A stage all of whose epochs have the same lengths."""
    return plan_packs(lambda _: lengths, epochs=epochs, budget=budget, packs_per_step=packs_per_step, key=5)


def sums(packs: PackPlan, lengths: IntArray, power: int = 1) -> IntArray:
    """(steps, packs of a step): the lengths of each pack, to a power, summed."""
    values = lengths[packs.positions % len(lengths)] ** power
    return np.add.reduceat(values, packs.starts[:-1]).reshape(packs.num_steps, packs.packs_per_step)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    epochs=st.integers(1, 3),
    budget=st.integers(50, 300),
    packs_per_step=st.integers(1, 9),
)
def test_every_sample_is_packed_once_an_epoch_and_every_pack_has_room_for_its_samples(
    lengths: list[int], epochs: int, budget: int, packs_per_step: int
) -> None:
    array = np.asarray(lengths)
    packs = plan(array, epochs=epochs, budget=budget, packs_per_step=packs_per_step)
    own = packs.positions[packs.positions < len(lengths) * epochs]
    assert sorted(own) == list(range(len(lengths) * epochs))
    assert len(set(packs.positions.tolist())) == len(packs.positions)
    assert sums(packs, array).max() <= budget
    assert np.diff(packs.starts).min() > 0


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_packs_of_real_lengths_are_full(budget: int) -> None:
    lengths = real_lengths(20_000, seed=1)
    packs = plan(lengths, budget=budget)
    assert sums(packs, lengths).mean() / budget >= 0.985
    of_steps = sums(packs, lengths).mean(axis=1) / budget
    assert of_steps.min() >= (0.97 if budget >= 4 * MAX_SEQ_LENGTH else 0.96)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_ranks_have_the_same_work_in_every_micro_step(world_size: int) -> None:
    lengths = real_lengths(20_000, seed=2)
    packs = plan(lengths, budget=8192, packs_per_step=16)
    tokens, squares = sums(packs, lengths), sums(packs, lengths, power=2)
    for work, mean, worst in ((tokens, 0.005, 0.03), (squares, 0.01, 0.03)):
        of_ranks = work.reshape(-1, world_size)
        imbalance = of_ranks.max(axis=1) / of_ranks.mean(axis=1) - 1
        assert imbalance.mean() <= mean
        assert imbalance.max() <= worst
    per_step = squares.reshape(packs.num_steps, -1, world_size).sum(axis=1)
    assert (per_step.max(axis=1) / per_step.mean(axis=1) - 1).max() <= 0.03


@pytest.mark.parametrize(
    ("num_samples", "budget", "packs_per_step", "epochs"),
    [
        (300, 16384, 4, 2),
        (1000, 16384, 16, 3),
        (3000, 8192, 8, 2),
        (3000, 16384, 4, 2),
        (20_000, 16384, 8, 1),
    ],
)
def test_no_step_of_any_data_set_keeps_a_rank_waiting(
    num_samples: int, budget: int, packs_per_step: int, epochs: int
) -> None:
    """Not the first, the last, or those of a set that fills few steps; for any number of ranks."""
    lengths = real_lengths(num_samples, seed=3)
    packs = plan(lengths, budget=budget, packs_per_step=packs_per_step, epochs=epochs)
    assert sums(packs, lengths).mean() / budget >= 0.99
    squares = sums(packs, lengths, power=2)
    for ranks in (ranks for ranks in range(2, packs_per_step + 1) if packs_per_step % ranks == 0):
        of_ranks = squares.reshape(-1, ranks)
        assert (of_ranks.max(axis=1) / of_ranks.mean(axis=1) - 1).max() <= 0.03


def test_no_sample_moves_further_than_two_windows_from_its_place() -> None:
    lengths = real_lengths(20_000, seed=3)
    packs = plan(lengths, packs_per_step=8)
    per_window = 128 * 8192 / lengths.mean()
    step_of_sample = np.repeat(np.arange(packs.num_steps), np.diff(packs.starts[:: packs.packs_per_step]))
    expected = packs.positions / (8 * 8192 / lengths.mean())
    assert np.abs(step_of_sample - expected).max() <= 2 * per_window / (8 * 8192 / lengths.mean())


def test_a_small_data_set_keeps_its_epochs_apart() -> None:
    lengths = real_lengths(200, seed=4)
    packs = plan(lengths, epochs=10, packs_per_step=4)
    epoch_of_step = [
        np.mean(packs.positions[a:b] // 200)
        for a, b in zip(packs.starts[:-4:4], packs.starts[4::4], strict=False)
    ]
    assert np.abs(np.asarray(epoch_of_step) - np.linspace(0, 10, len(epoch_of_step))).max() < 1.5
    assert packs.num_steps * 4 * 8192 <= lengths.sum() * 10 * 1.03 + 4 * 8192


def test_long_samples_do_not_gather_in_some_steps() -> None:
    lengths = real_lengths(20_000, seed=5)
    squares = sums(plan(lengths, packs_per_step=8), lengths, power=2).sum(axis=1)
    neighbours = np.corrcoef(squares[:-1], squares[1:])[0, 1]
    assert squares.std() / squares.mean() < 0.1
    assert neighbours < 0.6


def test_the_plan_is_the_same_every_time_and_knows_nothing_of_ranks() -> None:
    lengths = real_lengths(2_000, seed=6)
    one, other = plan(lengths), plan(lengths)
    assert np.array_equal(one.positions, other.positions) and np.array_equal(one.starts, other.starts)
    assert one.step(3) == [p for pack in range(24, 32) for p in one.pack(pack)]
    assert one.samples_until(3) == sum(len(one.step(step)) for step in range(3))


def test_ten_times_as_many_samples_are_planned_in_about_ten_times_the_time_and_few_bytes() -> None:
    def seconds_to_plan(count: int) -> float:
        """Of this process: other work on the machine does not count."""
        lengths = real_lengths(count, seed=7)
        started = time.process_time()
        packs = plan(lengths)
        taken = time.process_time() - started
        assert packs.positions.nbytes + packs.starts.nbytes < 6 * len(lengths)
        return taken

    # Of the size of Omni-CAD. Each sample held against each other would take a hundred times as long.
    assert seconds_to_plan(100_000) < 30 * seconds_to_plan(10_000)


def test_many_draws_are_those_of_one_sample_each() -> None:
    mix = {"text": 0.2, "text+points": 0.3, "text+image": 0.2, "text+points+image": 0.3}
    ids = [f'0000/{number:08d}_00001 ä"' for number in range(50)]
    combos, drawn = order.draw_combos(7, 3, 2, ids, mix)  # type: ignore[arg-type]
    assert [combos[d] for d in drawn] == [draw_combo(7, 3, 2, i, mix) for i in ids]  # type: ignore[arg-type]
    assert draw_combo(7, 3, 2, "0000/00000350_00007", mix) == "text+points"  # type: ignore[arg-type]
