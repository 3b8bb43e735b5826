"""The steps of a stage as batches, prepared ahead by worker processes.

Batches follow from (index, seed, stage, step, rank) alone: not from the number of workers, nor from where the
run was resumed. Workers read files and make CPU tensors; they touch no device.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from cad_mllm.data import order
from cad_mllm.data.collate import Batch, Sample, collate, image_array, select_points
from cad_mllm.data.files import load_image, load_points
from cad_mllm.data.index import Index
from cad_mllm.data.sequence import (
    MODALITIES,
    Combo,
    Mix,
    SequenceSpec,
    TextTokenizer,
    bos_ids,
    pad_id,
    prompt_ids,
    target_ids,
)
from cad_mllm.errors import DataError

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
    supervised_tokens: int
    """Of the whole step over all ranks: what the loss is divided by."""
    tokens: int
    """Of the whole step over all ranks, padding not counted."""


@dataclass(frozen=True)
class _Item:
    """One sample of a micro-batch, with everything drawn."""

    number: int
    epoch: int
    combo: Combo
    supervised: bool = True


class _MicroBatches(Dataset[Batch | DataError]):
    """Map-style: micro-batch number -> Batch. Picklable, so that it works with any way to start a process."""

    def __init__(self, builder: "_BatchBuilder", items: "_StepItems | Sequence[Sequence[_Item]]") -> None:
        self._builder = builder
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Batch | DataError:
        try:
            return self._builder.build(self._items[number])
        except DataError as error:
            return (
                error  # raised by the reader: a raise in here would bury the message in a worker's traceback
            )


class _BatchBuilder:
    """Reads the files of some samples and collates them."""

    def __init__(
        self, index: Index, tokenizer: TextTokenizer, spec: SequenceSpec, seed: int, stage: int
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._spec = spec
        self._seed = seed
        self._stage = stage
        self._bos = bos_ids(tokenizer)
        self._pad_id = pad_id(tokenizer)

    def build(self, items: Sequence[_Item]) -> Batch:
        return collate([self._sample(item) for item in items], self._spec, self._pad_id)

    def _sample(self, item: _Item) -> Sample:
        index = self._index
        record = index.record(item.number)
        draw = (self._seed, self._stage, item.epoch, record.id)
        image = points = None
        if "image" in MODALITIES[item.combo]:
            assert index.source.images is not None and record.images, (
                "the index was built for this combination"
            )
            view = record.images[order.draw_view(*draw, len(record.images))]
            image = image_array(load_image(index.source.images / view), self._spec)
        if "points" in MODALITIES[item.combo]:
            assert index.source.points is not None and record.points, (
                "the index was built for this combination"
            )
            points = select_points(load_points(index.source.points / record.points), self._spec, draw)
        target = target_ids(self._tokenizer, [record.target])[0]
        assert len(target) == record.num_target_tokens, "the index was built with this tokenizer"
        return Sample(
            id=record.id,
            combo=item.combo,
            bos=self._bos,
            prompt=prompt_ids(self._tokenizer, [record.caption])[0],
            target=target,
            image_3HW=image,
            points_PC=points,
            supervised=item.supervised,
        )


class StepLoader:
    """Iterates over the steps `start_step ... num_steps - 1` of a stage, for one rank.

    Iterating raises DataError, naming the file, for one that became unreadable since the index was built.
    """

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
        pin_memory: bool = False,
    ) -> None:
        self._plan = _StepItems(
            ids=index.ids,
            seed=seed,
            stage=stage,
            mix=dict(mix),
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
            num_steps=num_steps,
        )
        self._index = index
        self._spec = spec
        builder = _BatchBuilder(index, tokenizer, spec, seed, stage)
        self._batches = _MicroBatches(builder, self._plan)
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return self._plan.num_steps - self._plan.start_step

    def __iter__(self) -> Iterator[Step]:
        plan = self._plan
        batches = _prefetched(self._batches, self._num_workers, self._pin_memory)
        for step in range(plan.start_step, plan.num_steps):
            items = plan.of_step(step)
            yield Step(
                index=step,
                epoch=(step + 1) * len(items) / len(self._index),
                micro_batches=[next(batches) for _ in range(plan.accumulation)],
                supervised_tokens=sum(int(self._index.num_target_tokens[item.number]) for item in items),
                tokens=sum(self._length(item) for item in items),
            )

    def _length(self, item: _Item) -> int:
        text = self._index.num_prompt_tokens[item.number] + self._index.num_target_tokens[item.number]
        return int(text) + self._spec.modality_tokens(MODALITIES[item.combo])


@dataclass(frozen=True, kw_only=True)
class _StepItems:
    """A rank's micro-batches of the steps `start_step ... num_steps - 1`, numbered from 0."""

    ids: tuple[str, ...]
    seed: int
    stage: int
    mix: Mix
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    start_step: int
    num_steps: int

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation

    def __getitem__(self, number: int) -> Sequence[_Item]:
        step, accumulated = divmod(number, self.accumulation)
        return order.rank_micro_batches(
            self.of_step(self.start_step + step),
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            rank=self.rank,
            world_size=self.world_size,
        )[accumulated]

    def of_step(self, step: int) -> list[_Item]:
        """All samples of a step, over all ranks."""
        global_batch = self.batch_size * self.accumulation * self.world_size
        samples = order.step_samples(len(self.ids), global_batch, self.seed, self.stage, step)
        return [
            _Item(number, epoch, order.draw_combo(self.seed, self.stage, epoch, self.ids[number], self.mix))
            for number, epoch in samples
        ]


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
) -> Iterator[Batch]:
    """One pass over a validation split with one modality combination; the same batches in every call.

    The samples are those of `eval_samples`.
    Micro-batch j goes to rank j % world_size. Where they do not come out even, the last ranks get a repeated
    one with all labels ignored: every rank computes the same number of micro-batches.
    """
    chosen = eval_samples(len(index))
    starts = range(0, len(chosen), batch_size)
    own: list[list[_Item]] = []
    for first in range(0, len(starts), world_size):
        number = first + rank
        start = starts[min(number, len(starts) - 1)]
        numbers = chosen[start : start + batch_size]
        own.append([_Item(n, 0, combo, supervised=number < len(starts)) for n in numbers])
    batches = _MicroBatches(_BatchBuilder(index, tokenizer, spec, seed, EVAL_STAGE), own)
    return _prefetched(batches, num_workers, pin_memory=False)


def _prefetched(batches: _MicroBatches, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The batches in their order, made ahead by `num_workers` one-thread processes (0: in this process)."""
    if num_workers > 0:  # or the tokenizer's threads warn about every fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader: DataLoader[Batch | DataError] = DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
