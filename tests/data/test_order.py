"""The order of the data follows from the seed alone, for any number of ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cad_mllm.data import order
from cad_mllm.data.sequence import Combo, Mix

from .conftest import draw_combo

STAGE_3: Mix = {"text": 0.2, "text+points": 0.3, "text+image": 0.2, "text+points+image": 0.3}


def stream(num_samples: int, global_batch: int, steps: int) -> list[tuple[int, int]]:
    return [s for step in range(steps) for s in order.step_samples(num_samples, global_batch, 7, 2, step)]


@given(num_samples=st.integers(1, 40), epochs=st.integers(1, 4), global_batch=st.integers(1, 50))
def test_every_epoch_holds_every_sample_once_and_nothing_is_dropped(
    num_samples: int, epochs: int, global_batch: int
) -> None:
    steps = order.num_steps(num_samples, epochs, global_batch)
    seen = stream(num_samples, global_batch, steps)
    assert len(seen) == steps * global_batch >= num_samples * epochs > (steps - 1) * global_batch
    for epoch in range(epochs):
        of_epoch = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(of_epoch) == [(sample, epoch) for sample in range(num_samples)]


def test_a_step_runs_into_the_next_epoch() -> None:
    step = order.step_samples(10, 4, 7, 2, 2)
    assert [epoch for _, epoch in step] == [0, 0, 1, 1]


def test_the_order_changes_with_seed_stage_and_epoch_and_with_nothing_else() -> None:
    np.random.seed(1)
    orders = {
        (seed, stage, epoch): tuple(order.epoch_order(50, seed, stage, epoch))
        for seed, stage, epoch in itertools.product((1, 2), (1, 2, 3), (0, 1))
    }
    assert len(set(orders.values())) == len(orders)
    np.random.seed(2)
    order.epoch_order.cache_clear()
    assert tuple(order.epoch_order(50, 1, 1, 0)) == orders[1, 1, 0]


def test_the_order_is_the_same_in_every_version() -> None:
    """Checkpoints remember a position in this order: it must never change."""
    assert order.epoch_order(8, 42, 1, 0).tolist() == [5, 1, 7, 2, 0, 6, 4, 3]
    assert order.draw_points(42, 1, 0, "0000/00000071_00005", 6, 6).tolist() == [1, 2, 3, 0, 5, 4]


@pytest.mark.parametrize("world_size, accumulation", [(1, 4), (2, 2), (4, 1)])
def test_any_number_of_ranks_sees_the_same_micro_batches(world_size: int, accumulation: int) -> None:
    samples = list(range(12))
    ranks = [
        order.rank_micro_batches(
            samples, batch_size=3, accumulation=accumulation, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert all(len(micro_batches) == accumulation for micro_batches in ranks)
    # what all ranks compute at once, one accumulation index after the other
    in_time = [ranks[rank][a] for a in range(accumulation) for rank in range(world_size)]
    assert in_time == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_the_shares_of_a_mix_are_met() -> None:
    drawn = Counter(draw_combo(1, 3, 0, f"0000/{n:08d}", STAGE_3) for n in range(20_000))
    assert {combo: count / 20_000 for combo, count in drawn.items()} == pytest.approx(
        dict(STAGE_3), abs=0.012
    )


def test_a_combination_without_share_is_never_drawn() -> None:
    mix: Mix = {"text": 0.0, "text+points": 1.0}
    assert {draw_combo(1, 2, 0, str(n), mix) for n in range(500)} == {"text+points"}


def test_a_draw_depends_on_seed_stage_epoch_and_id_alone() -> None:
    def combos(seed: int = 1, stage: int = 3, epoch: int = 0, mix: Mix = STAGE_3) -> list[Combo]:
        return [draw_combo(seed, stage, epoch, str(n), mix) for n in range(64)]

    reordered: Mix = dict(reversed(STAGE_3.items()))
    assert combos() == combos(mix=reordered)
    assert combos()[5] == draw_combo(1, 3, 0, "5", STAGE_3)
    assert len({tuple(combos(**change)) for change in ({}, {"seed": 2}, {"stage": 2}, {"epoch": 1})}) == 4


def test_views_are_all_drawn_about_equally() -> None:
    views = [order.draw_view(1, 3, 0, str(n), 8) for n in range(8_000)]
    assert views == [order.draw_view(1, 3, 0, str(n), 8) for n in range(8_000)]
    counts = Counter(views)
    assert sorted(counts) == list(range(8))
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_points_are_drawn_without_repetition_where_there_are_enough() -> None:
    rows = order.draw_points(1, 2, 0, "a", 100, 60)
    assert len(set(rows.tolist())) == 60
    assert set(rows.tolist()) <= set(range(100))
    assert (rows == order.draw_points(1, 2, 0, "a", 100, 60)).all()
    assert (rows != order.draw_points(1, 2, 1, "a", 100, 60)).any()


def test_a_small_cloud_is_repeated_evenly() -> None:
    counts = Counter(order.draw_points(1, 2, 0, "a", 7, 17).tolist())
    assert sorted(counts) == list(range(7))
    assert set(counts.values()) == {2, 3}


@pytest.mark.parametrize("distinct", [2**64 - 1, 40, 2])
@pytest.mark.parametrize("count", [1, 30, 99])
def test_the_smallest_keys_are_the_first_of_the_stable_order(distinct: int, count: int) -> None:
    keys = np.random.default_rng(count).integers(0, distinct, 100, dtype=np.uint64)
    expected = np.argsort(keys, kind="stable")[:count]
    assert (order._smallest(keys, count) == expected).all()


def test_fewer_points_are_the_first_of_all_of_them() -> None:
    whole = order.draw_points(1, 2, 0, "a", 500, 500)
    assert (order.draw_points(1, 2, 0, "a", 500, 120) == whole[:120]).all()
