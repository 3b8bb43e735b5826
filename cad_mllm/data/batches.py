"""Samples -> one micro-batch: reads their files, and stands in for what cannot be read any more.

A sample that became unreadable since the index was built (a damaged file, a mount that stalls) is `Lost`: its
caption and target alone take its place, unsupervised, so that all ranks stay in step.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from cad_mllm.data import order
from cad_mllm.data.collate import Batch, Sample, collate, image_array, select_points
from cad_mllm.data.files import UnusableFileError, load_image, load_points
from cad_mllm.data.index import Index, Record
from cad_mllm.data.sequence import (
    MODALITIES,
    Combo,
    SequenceSpec,
    TextTokenizer,
    bos_ids,
    pad_id,
    prompt_ids,
    target_ids,
)

T = TypeVar("T")

SECONDS_PER_SAMPLE = 120.0
"""A sample whose files take longer to read is lost: its mount stalls."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A sample of the index that could not be read when its turn came."""

    id: str
    file: str
    reason: str
    num_target_tokens: int
    """Supervised tokens that the step lacks for it."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A micro-batch, and what is missing in it."""

    batch: Batch
    lost: tuple[Lost, ...] = ()

    def pin_memory(self) -> "Loaded":
        """See `Batch.pin_memory`."""
        return Loaded(batch=self.batch.pin_memory(), lost=self.lost)


@dataclass(frozen=True)
class Item:
    """One sample of a micro-batch, with everything drawn."""

    number: int
    epoch: int
    combo: Combo
    supervised: bool = True


class BatchBuilder:
    """Reads the files of some samples and collates them."""

    def __init__(
        self,
        index: Index,
        tokenizer: TextTokenizer,
        spec: SequenceSpec,
        seed: int,
        stage: int,
        seconds: float,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._spec = spec
        self._seed = seed
        self._stage = stage
        self._seconds = seconds
        self._bos = bos_ids(tokenizer)
        self._pad_id = pad_id(tokenizer)

    def build(self, items: Sequence[Item], all_lost: str | None = None) -> Loaded:
        """One micro-batch of the samples, in their order; `all_lost`: why none of them is to be read."""
        samples, lost = [], []
        for item in items:
            record = self._index.record(item.number)
            try:
                if all_lost is not None:
                    raise UnusableFileError(self._named(record), all_lost)
                sample = _within(self._seconds, self._named(record), partial(self._sample, item, record))
            except UnusableFileError as fault:
                sample = self._text_of(item, record, supervised=False)
                if item.supervised:
                    lost.append(
                        Lost(
                            id=record.id,
                            file=str(fault.path),
                            reason=fault.reason,
                            num_target_tokens=record.num_target_tokens,
                        )
                    )
            samples.append(sample)
        return Loaded(batch=collate(samples, self._spec, self._pad_id), lost=tuple(lost))

    def _named(self, record: Record) -> Path:
        """The file that stands for a sample where no single one is at fault."""
        return self._index.source.json / record.json

    def _sample(self, item: Item, record: Record) -> Sample:
        index = self._index
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
        text = self._text_of(item, record, supervised=item.supervised)
        return replace(text, combo=item.combo, image_3HW=image, points_PC=points)

    def _text_of(self, item: Item, record: Record, *, supervised: bool) -> Sample:
        """The sample without its files."""
        target = target_ids(self._tokenizer, [record.target])[0]
        assert len(target) == record.num_target_tokens, "the index was built with this tokenizer"
        return Sample(
            id=record.id,
            combo="text",
            bos=self._bos,
            prompt=prompt_ids(self._tokenizer, [record.caption])[0],
            target=target,
            supervised=supervised,
        )


def _within(seconds: float, path: Path, work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it ends in time; UnusableFileError naming `path` if it does not.

    A read from a mount that is gone cannot be interrupted: its thread is left behind.
    """
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # raised again below, in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise UnusableFileError(path, f"stalled: its files were not read within {seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
