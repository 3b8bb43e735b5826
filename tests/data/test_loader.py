"""The steps of a stage: the same for any number of ranks and workers, from any start."""

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cad_mllm.data import loader as loader_module
from cad_mllm.data.batches import Loaded
from cad_mllm.data.collate import Batch
from cad_mllm.data.index import Index, IndexReport, load_index
from cad_mllm.data.loader import (
    MAX_EVAL_SAMPLES,
    Step,
    StepLoader,
    eval_batches,
    eval_samples,
    pack_stage,
)
from cad_mllm.data.sequence import Mix, TextTokenizer

from .conftest import SPEC, Folder
from .deadly import DeadlyMicroBatches

MIX: Mix = {"text": 0.2, "text+points": 0.3, "text+image": 0.2, "text+points+image": 0.3}
STEPS = 4


@pytest.fixture
def loader(index: Index, tokenizer: TextTokenizer) -> Callable[..., StepLoader]:
    def make(**changes: Any) -> StepLoader:
        settings: dict[str, Any] = {
            "seed": 3,
            "stage": 3,
            "mix": MIX,
            "batch_size": 2,
            "accumulation": 2,
            "rank": 0,
            "world_size": 1,
            "num_workers": 0,
            "start_step": 0,
            "num_steps": STEPS,
        }
        return StepLoader(index, tokenizer, SPEC, **(settings | changes))

    return make


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(parts(one), parts(other), strict=True)
    )


def parts(batch: Batch) -> list[object]:
    return [value for name, value in vars(batch).items() if name != "packed"] + list(batch.packed or ())


def flat(steps: list[Step]) -> list[Batch]:
    return [batch for step in steps for batch in step.micro_batches]


def test_any_number_of_ranks_computes_the_same_steps(loader: Callable[..., StepLoader]) -> None:
    alone = list(loader(accumulation=4))
    pairs = [list(loader(accumulation=2, world_size=2, rank=rank)) for rank in range(2)]
    fours = [list(loader(accumulation=1, world_size=4, rank=rank)) for rank in range(4)]
    for step in range(STEPS):
        one = alone[step].micro_batches
        two = [pairs[rank][step].micro_batches[a] for a in range(2) for rank in range(2)]
        four = [fours[rank][step].micro_batches[0] for rank in range(4)]
        assert all(same(a, b) and same(a, c) for a, b, c in zip(one, two, four, strict=True))
        counts = {(s[step].supervised_tokens, s[step].tokens, s[step].epoch) for s in (alone, *pairs, *fours)}
        assert len(counts) == 1


def test_the_counts_of_a_step_are_those_of_its_batches(loader: Callable[..., StepLoader]) -> None:
    for step in loader(accumulation=4):
        assert step.supervised_tokens == sum(batch.num_supervised for batch in step.micro_batches)
        assert step.tokens == sum(int(batch.attention_mask_BT.sum()) for batch in step.micro_batches)


def test_steps_are_numbered_and_know_their_epoch(loader: Callable[..., StepLoader]) -> None:
    steps = list(loader(start_step=1))
    assert [step.index for step in steps] == [1, 2, 3]
    assert [step.epoch for step in steps] == pytest.approx([8 / 11, 12 / 11, 16 / 11])
    assert len(loader(start_step=1)) == 3


def test_a_later_start_gives_the_same_remainder(loader: Callable[..., StepLoader]) -> None:
    for full, resumed in zip(flat(list(loader()))[4:], flat(list(loader(start_step=2))), strict=True):
        assert same(full, resumed)


def test_workers_change_nothing(loader: Callable[..., StepLoader]) -> None:
    for here, there in zip(flat(list(loader())), flat(list(loader(num_workers=2))), strict=True):
        assert same(here, there)


def test_a_loader_can_be_sent_to_a_spawned_process(loader: Callable[..., StepLoader]) -> None:
    copy = pickle.loads(pickle.dumps(loader()))
    assert all(same(a, b) for a, b in zip(flat(list(loader())), flat(list(copy)), strict=True))


def test_stages_epochs_and_seeds_draw_anew(loader: Callable[..., StepLoader]) -> None:
    def ids(**changes: Any) -> list[tuple[str, ...]]:
        return [batch.sample_ids for batch in flat(list(loader(**changes)))]

    assert ids() != ids(stage=2)
    assert ids() != ids(seed=4)


def test_batches_hold_what_their_combinations_say(loader: Callable[..., StepLoader]) -> None:
    batches = flat(list(loader()))
    assert {combo for batch in batches for combo in batch.combos} == set(MIX)
    for batch in batches:
        assert len(batch.images_NCHW) == sum("image" in combo for combo in batch.combos)
        assert len(batch.points_MPC) == sum("points" in combo for combo in batch.combos)


def points_of(folder: Folder, tokenizer: TextTokenizer, index: Index, num_workers: int) -> list[Loaded]:
    """One pass over four samples with their points, two micro-batches."""
    return list(
        eval_batches(
            index,
            tokenizer,
            SPEC,
            combo="text+points",
            seed=1,
            batch_size=2,
            rank=0,
            world_size=1,
            num_workers=num_workers,
        )
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_breaks_during_training_is_lost_alone(
    num_workers: int,
    make_folder: Callable[..., Folder],
    build: Callable[..., IndexReport],
    tokenizer: TextTokenizer,
) -> None:
    folder = make_folder(4)
    index = load_index(build(folder).path)
    whole = points_of(folder, tokenizer, index, 0)
    folder.file("pcd", 1).write_bytes(b"torn")
    torn, other = points_of(folder, tokenizer, index, num_workers)
    (lost,) = torn.lost
    assert (lost.id, lost.file) == (folder.ids[1], str(folder.file("pcd", 1)))
    assert "unreadable points" in lost.reason and "\n" not in lost.reason
    assert torn.batch.sample_ids == whole[0].batch.sample_ids
    assert torn.batch.combos == ("text+points", "text")
    assert torn.batch.num_supervised == whole[0].batch.num_supervised - lost.num_target_tokens
    assert same(other.batch, whole[1].batch) and not other.lost


@pytest.mark.usefixtures("deaths_noticed_soon")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_dies_of_a_sample_is_replaced_and_its_micro_batch_given_up(
    num_workers: int,
    make_folder: Callable[..., Folder],
    build: Callable[..., IndexReport],
    tokenizer: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_folder(6)
    index = load_index(build(folder).path)
    whole = points_of(folder, tokenizer, index, 0)
    monkeypatch.setattr(loader_module, "_MicroBatches", DeadlyMicroBatches)
    first, second, third = points_of(folder, tokenizer, index, num_workers)
    assert same(first.batch, whole[0].batch) and same(third.batch, whole[2].batch)
    assert [lost.id for lost in second.lost] == list(folder.ids[2:4])
    assert all("died" in lost.reason for lost in second.lost)
    assert second.batch.num_supervised == 0


@pytest.mark.parametrize("num_samples", [1, MAX_EVAL_SAMPLES, MAX_EVAL_SAMPLES + 1, 27_494, 10**6])
def test_validation_uses_a_bounded_share_that_spans_the_split(num_samples: int) -> None:
    used = eval_samples(num_samples)
    assert len(used) == num_samples if num_samples <= MAX_EVAL_SAMPLES else len(used) > MAX_EVAL_SAMPLES // 2
    assert len(used) <= MAX_EVAL_SAMPLES
    assert used[0] == 0 and num_samples - used.step <= used[-1] < num_samples


@pytest.mark.parametrize("world_size, batch_size", [(1, 2), (2, 2), (4, 3), (3, 20)])
def test_validation_gives_every_rank_the_same_number_of_batches(
    world_size: int, batch_size: int, index: Index, tokenizer: TextTokenizer
) -> None:
    def batches(rank: int) -> list[Batch]:
        return [
            loaded.batch
            for loaded in eval_batches(
                index,
                tokenizer,
                SPEC,
                combo="text+image",
                seed=1,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                num_workers=0,
            )
        ]

    ranks = [batches(rank) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    every = [batch for rank in ranks for batch in rank]
    learned = [batch for batch in every if batch.num_supervised > 0]
    assert sorted(i for batch in learned for i in batch.sample_ids) == sorted(index.ids)
    assert all((batch.labels_BT == -100).all() for batch in every if batch not in learned)
    assert {combo for batch in every for combo in batch.combos} == {"text+image"}
    assert all(same(a, b) for a, b in zip(ranks[0], batches(0), strict=True))


PACK_TOKENS = 900
"""Of a pack of the packed loaders: three samples of the index or so."""


@pytest.fixture
def packed(index: Index, loader: Callable[..., StepLoader]) -> Callable[..., StepLoader]:
    """A loader of the same four packs a step, whatever the ranks."""
    packs = pack_stage(
        index, SPEC, seed=3, stage=3, mix=MIX, epochs=3, pack_tokens=PACK_TOKENS, packs_per_step=4
    )

    def make(*, world_size: int = 1, **changes: Any) -> StepLoader:
        shape = {"world_size": world_size, "accumulation": 4 // world_size, "num_steps": packs.num_steps}
        return loader(packs=packs, pack_tokens=PACK_TOKENS, **(shape | changes))

    return make


def test_any_number_of_ranks_computes_the_same_packs_from_any_start(
    packed: Callable[..., StepLoader],
) -> None:
    alone = list(packed())
    assert len(alone) > 1
    for world_size, start in ((2, 0), (4, 1)):
        ranks = [list(packed(world_size=world_size, rank=r, start_step=start)) for r in range(world_size)]
        for number, step in enumerate(alone[start:]):
            together = [
                ranks[r][number].micro_batches[a] for a in range(4 // world_size) for r in range(world_size)
            ]
            assert all(same(a, b) for a, b in zip(step.micro_batches, together, strict=True))
            assert {(s[number].tokens, s[number].supervised_tokens, s[number].epoch) for s in ranks} == {
                (step.tokens, step.supervised_tokens, step.epoch)
            }


def test_packs_hold_every_sample_of_every_epoch(packed: Callable[..., StepLoader], index: Index) -> None:
    steps = list(packed())
    counts = Counter(i for batch in flat(steps) for i in batch.sample_ids)
    assert set(counts) == set(index.ids) and min(counts.values()) >= 3
    assert all(batch.tokens_BT.shape == (1, PACK_TOKENS) for batch in flat(steps))
    assert steps[-1].epoch >= 3 > steps[-2].epoch - 1e-9
    for step in steps:
        assert step.tokens == sum(int(batch.attention_mask_BT.sum()) for batch in step.micro_batches)
        assert step.supervised_tokens == sum(batch.num_supervised for batch in step.micro_batches)


def test_packs_are_made_by_workers_too(packed: Callable[..., StepLoader]) -> None:
    for here, there in zip(flat(list(packed())), flat(list(packed(num_workers=2))), strict=True):
        assert same(here, there)


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_in_packs_takes_every_sample_once(
    world_size: int, index: Index, tokenizer: TextTokenizer
) -> None:
    ranks = [
        [
            loaded.batch
            for loaded in eval_batches(
                index,
                tokenizer,
                SPEC,
                combo="text+points",
                seed=1,
                batch_size=2,
                rank=rank,
                world_size=world_size,
                num_workers=0,
                pack_tokens=PACK_TOKENS,
            )
        ]
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    learned = [batch for rank in ranks for batch in rank if batch.num_supervised]
    assert sorted(i for batch in learned for i in batch.sample_ids) == sorted(index.ids)
    assert {batch.tokens_BT.shape for rank in ranks for batch in rank} == {(1, PACK_TOKENS)}
    assert max(len(batch.sample_ids) for batch in learned) > 1
