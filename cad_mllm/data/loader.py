"""The steps of a stage as batches, prepared ahead by worker processes.

Batches follow from (index, seed, stage, step, rank) alone: not from the number of workers, nor from where the
run was resumed. Workers read files and make CPU tensors; they touch no device.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cad_mllm.data import order
from cad_mllm.data.augment import WHOLE, Augmentation
from cad_mllm.data.batches import SECONDS_PER_SAMPLE, BatchBuilder, Item, Loaded, Lost
from cad_mllm.data.collate import Batch
from cad_mllm.data.features import FeatureFolder
from cad_mllm.data.index import Index
from cad_mllm.data.packing import PackPlan, plan_packs
from cad_mllm.data.prefetch import prefetched
from cad_mllm.data.sequence import MODALITIES, Combo, Mix, SequenceSpec, TextTokenizer

EVAL_STAGE = 0
"""Draws of validation come from stage 0, epoch 0: the same points and views every time."""

MAX_EVAL_SAMPLES = 1024
"""Most samples of a validation pass: Omni-CAD's whole test split would take longer than many a stage."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank computes in one optimiser step."""

    index: int
    """Number of the step in its stage, from 0."""
    epoch: float
    """Passes over the data when the step is done."""
    micro_batches: list[Batch]
    """One per accumulation index."""
    lost: tuple[Lost, ...]
    """Samples of this rank that could not be read."""
    supervised_tokens: int
    """Of the whole step over all ranks, those of lost samples counted."""
    tokens: int
    """Of the whole step over all ranks, padding not counted."""


class _MicroBatches:
    """Map-style: micro-batch number -> Loaded. Picklable."""

    def __init__(
        self, builder: "BatchBuilder", items: "_StepItems | _PackedItems | Sequence[Sequence[Item]]"
    ) -> None:
        self._builder = builder
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Loaded:
        return self._builder.build(self._items[number])

    def without(self, number: int, reason: str) -> Loaded:
        """The micro-batch with all of its samples lost."""
        return self._builder.build(self._items[number], all_lost=reason)


class StepLoader:
    """Iterates over the steps `start_step ... num_steps - 1` of a stage, for one rank."""

    def __init__(
        self,
        index: Index,
        tokenizer: TextTokenizer,
        spec: SequenceSpec,
        *,
        seed: int,
        stage: int,
        mix: Mix,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        num_workers: int,
        start_step: int,
        num_steps: int,
        augmentation: Augmentation = WHOLE,
        pin_memory: bool = False,
        seconds_per_sample: float = SECONDS_PER_SAMPLE,
        packs: PackPlan | None = None,
        pack_tokens: int = 0,
        features: FeatureFolder | None = None,
    ) -> None:
        """`packs` (with their budget `pack_tokens`) take the place of batches of `batch_size`, and `features`
        that of pictures and clouds.
        """
        draws = _Draws(index=index, augmentation=augmentation, seed=seed, stage=stage, mix=dict(mix))
        self._plan: _StepItems | _PackedItems
        if packs is None:
            self._plan = _StepItems(
                draws=draws,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                start_step=start_step,
                num_steps=num_steps,
            )
        else:
            assert packs.packs_per_step == accumulation * world_size, "the plan is for these ranks"
            self._plan = _PackedItems(
                draws=draws,
                packs=packs,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                start_step=start_step,
                num_steps=num_steps,
            )
        self._index = index
        self._spec = spec
        builder = BatchBuilder(index, tokenizer, spec, seed, stage, seconds_per_sample, pack_tokens, features)
        self._batches = _MicroBatches(builder, self._plan)
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return self._plan.num_steps - self._plan.start_step

    def __iter__(self) -> Iterator[Step]:
        plan = self._plan
        batches = (
            loaded.finished() for loaded in prefetched(self._batches, self._num_workers, self._pin_memory)
        )
        for step in range(plan.start_step, plan.num_steps):
            items = plan.of_step(step)
            counts = [self._num_tokens(item) for item in items]
            loaded = [next(batches) for _ in range(plan.accumulation)]
            yield Step(
                index=step,
                epoch=plan.samples_until(step + 1) / len(self._index),
                micro_batches=[one.batch for one in loaded],
                lost=tuple(lost for one in loaded for lost in one.lost),
                supervised_tokens=sum(supervised for _, supervised in counts),
                tokens=sum(given + supervised for given, supervised in counts),
            )

    def _num_tokens(self, item: Item) -> tuple[int, int]:
        """Tokens that are given (placeholders, prompt) and those that are supervised."""
        prompt, target = self._index.num_tokens(item.number, item.variant, captioned=item.captioned)
        return self._spec.modality_tokens(MODALITIES[item.combo]) + prompt, target


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """The samples of a stage with their modalities."""

    index: Index
    augmentation: Augmentation
    seed: int
    stage: int
    mix: Mix

    def items(self, samples: Iterable[tuple[int, int]]) -> list[Item]:
        """Samples (number, epoch) with what is drawn for them, in their order.

        Those of an epoch are drawn together: a thousand draws one by one keep a GPU waiting for 40 ms.
        """
        places: dict[int, list[tuple[int, int]]] = {}
        for place, (number, epoch) in enumerate(samples):
            places.setdefault(epoch, []).append((place, number))
        found: dict[int, Item] = {}
        for epoch, several in places.items():
            draw = (self.seed, self.stage, epoch)
            ids = [self.index.ids[number] for _, number in several]
            combos, drawn = order.draw_combos(*draw, ids, self.mix)
            keeps = order.draw_captioned(*draw, ids, self.augmentation.caption_dropout).tolist()
            for (place, number), which, captioned in zip(several, drawn.tolist(), keeps, strict=True):
                combo = combos[which]
                found[place] = Item(
                    number,
                    epoch,
                    combo,
                    variant=self.index.draw_variant(number, self.augmentation, *draw),
                    captioned=captioned or not MODALITIES[combo],
                )
        return [found[place] for place in range(len(found))]


@dataclass(frozen=True, kw_only=True)
class _StepItems:
    """A rank's micro-batches of the steps `start_step ... num_steps - 1`, numbered from 0."""

    draws: _Draws
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    start_step: int
    num_steps: int

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation

    def __getitem__(self, number: int) -> Sequence[Item]:
        step, accumulated = divmod(number, self.accumulation)
        return order.rank_micro_batches(
            self.of_step(self.start_step + step),
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            rank=self.rank,
            world_size=self.world_size,
        )[accumulated]

    def samples_until(self, step: int) -> int:
        """Samples of the steps before `step`, over all ranks."""
        return step * self.batch_size * self.accumulation * self.world_size

    def of_step(self, step: int) -> list[Item]:
        """All samples of a step, over all ranks."""
        global_batch = self.batch_size * self.accumulation * self.world_size
        draws = self.draws
        samples = order.step_samples(len(draws.index), global_batch, draws.seed, draws.stage, step)
        return draws.items(samples)


@dataclass(frozen=True, kw_only=True)
class _PackedItems:
    """The same for packs: pack `a * world_size + rank` of a step for each accumulation index a."""

    draws: _Draws
    packs: PackPlan
    accumulation: int
    rank: int
    world_size: int
    start_step: int
    num_steps: int

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation

    def __getitem__(self, number: int) -> Sequence[Item]:
        pack = (self.start_step * self.accumulation + number) * self.world_size + self.rank
        return self._at(self.packs.pack(pack))

    def samples_until(self, step: int) -> int:
        """Samples of the steps before `step`, over all ranks."""
        return self.packs.samples_until(step)

    def of_step(self, step: int) -> list[Item]:
        """All samples of a step, over all ranks."""
        return self._at(self.packs.step(step))

    def _at(self, positions: Sequence[int]) -> list[Item]:
        draws = self.draws
        samples = (order.sample_at(len(draws.index), draws.seed, draws.stage, p) for p in positions)
        return draws.items(samples)


def pack_stage(
    index: Index,
    spec: SequenceSpec,
    *,
    seed: int,
    stage: int,
    mix: Mix,
    epochs: int,
    pack_tokens: int,
    packs_per_step: int,
    augmentation: Augmentation = WHOLE,
) -> PackPlan:
    """The packs of a stage: `packs_per_step` (accumulation x ranks) of `pack_tokens` tokens in each step."""
    whole = index.num_prompt_tokens + index.num_target_tokens

    def lengths(epoch: int) -> order.IntArray:
        combos, drawn = order.draw_combos(seed, stage, epoch, index.ids, mix)
        text = whole
        if augmentation.parts:
            variants = (
                index.draw_variant(number, augmentation, seed, stage, epoch) for number in range(len(index))
            )
            text = np.asarray([sum(index.num_tokens(*drawn)) for drawn in enumerate(variants)])
        placeholders = np.asarray([spec.modality_tokens(MODALITIES[combo]) for combo in combos])
        captioned = order.draw_captioned(seed, stage, epoch, index.ids, augmentation.caption_dropout)
        captioned |= np.asarray([not MODALITIES[combo] for combo in combos])[drawn]
        text = text - np.where(captioned, 0, index.num_prompt_tokens - index.num_instruction_tokens)
        in_order: order.IntArray = (text + placeholders[drawn])[
            order.epoch_order(len(index), seed, stage, epoch)
        ]
        return in_order

    return plan_packs(
        lengths,
        epochs=epochs,
        budget=pack_tokens,
        packs_per_step=packs_per_step,
        key=order.stable_hash("packs", seed, stage),
    )


def eval_samples(num_samples: int) -> range:
    """Which samples of a validation split are used: all, or at most MAX_EVAL_SAMPLES, evenly spread."""
    return range(0, num_samples, -(-num_samples // MAX_EVAL_SAMPLES))


def eval_batches(
    index: Index,
    tokenizer: TextTokenizer,
    spec: SequenceSpec,
    *,
    combo: Combo,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pack_tokens: int = 0,
    features: FeatureFolder | None = None,
) -> Iterator[Loaded]:
    """One pass over a validation split with one modality combination; the same batches in every call.

    The samples are those of `eval_samples`, in batches of `batch_size` or packs of `pack_tokens`.
    Micro-batch j goes to rank j % world_size. Where they do not come out even, the last ranks get a repeated
    one with all labels ignored: every rank computes the same number of micro-batches.
    """
    chosen = eval_samples(len(index))
    if pack_tokens:
        groups = _in_packs(chosen, index, spec, combo, pack_tokens)
    else:
        groups = [list(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]
    own: list[list[Item]] = []
    for first in range(0, len(groups), world_size):
        number = first + rank
        numbers = groups[min(number, len(groups) - 1)]
        own.append([Item(n, 0, combo, supervised=number < len(groups)) for n in numbers])
    builder = BatchBuilder(
        index, tokenizer, spec, seed, EVAL_STAGE, SECONDS_PER_SAMPLE, pack_tokens, features
    )
    batches = _MicroBatches(builder, own)
    return (loaded.finished() for loaded in prefetched(batches, num_workers, pin_memory=False))


def _in_packs(
    numbers: range, index: Index, spec: SequenceSpec, combo: Combo, pack_tokens: int
) -> list[list[int]]:
    """The samples in their order, as many as fit in each pack."""
    groups: list[list[int]] = []
    room = 0
    for number in numbers:
        text = int(index.num_prompt_tokens[number] + index.num_target_tokens[number])
        length = text + spec.modality_tokens(MODALITIES[combo])
        if length > room:
            groups.append([])
            room = pack_tokens
        groups[-1].append(number)
        room -= length
    return groups
