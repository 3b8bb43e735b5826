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
from cad_mllm.data.augment import Variant
from cad_mllm.data.collate import Batch, Sample, collate, image_array, pack, select_points
from cad_mllm.data.files import FloatArray, UnusableFileError
from cad_mllm.data.index import Index
from cad_mllm.data.sequence import MODALITIES, Combo, SequenceSpec, TextTokenizer, bos_ids, pad_id

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
    variant: Variant | None = None
    """The part of its program that is the target; None: all of it."""


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
        pack_tokens: int = 0,
    ) -> None:
        """With `pack_tokens` the samples of a micro-batch become one row of that length, else a row each."""
        self._index = index
        self._spec = spec
        self._seed = seed
        self._stage = stage
        self._seconds = seconds
        self._pack_tokens = pack_tokens
        self._bos = bos_ids(tokenizer)
        self._pad_id = pad_id(tokenizer)

    def build(self, items: Sequence[Item], all_lost: str | None = None) -> Loaded:
        """One micro-batch of the samples, in their order; `all_lost`: why none of them is to be read."""
        samples, lost = [], []
        for item in items:
            try:
                sample = self._sample(item, all_lost)
            except UnusableFileError as fault:
                sample = replace(self._text_of(item), supervised=False)
                if item.supervised:
                    lost.append(
                        Lost(
                            id=sample.id,
                            file=str(fault.path),
                            reason=fault.reason,
                            num_target_tokens=len(sample.target),
                        )
                    )
            samples.append(sample)
        if self._pack_tokens:
            batch = pack(samples, self._spec, self._pad_id, self._pack_tokens)
        else:
            batch = collate(samples, self._spec, self._pad_id)
        return Loaded(batch=batch, lost=tuple(lost))

    def _sample(self, item: Item, all_lost: str | None) -> Sample:
        text = self._text_of(item)
        place = (text.id, self._index.row(item.number))
        if all_lost is not None:
            raise UnusableFileError(self._index.store.place(*place), all_lost)
        if not MODALITIES[item.combo]:
            return text
        read = partial(self._modalities, item, *place)
        image, points = _within(self._seconds, lambda: self._index.store.place(*place), read)
        return replace(text, combo=item.combo, image_3HW=image, points_PC=points)

    def _modalities(
        self, item: Item, sample_id: str, row: int
    ) -> tuple[FloatArray | None, FloatArray | None]:
        """What is read from the store: image (3, H, W) and points (P, 6)."""
        store, draw = self._index.store, (self._seed, self._stage, item.epoch, sample_id)
        image = points = None
        if "image" in MODALITIES[item.combo]:
            num_views = self._index.num_views(item.number)
            assert num_views, "the index was built for this combination"
            view = order.draw_view(*draw, num_views)
            image = image_array(store.image(sample_id, row, view), self._spec)
        if "points" in MODALITIES[item.combo]:
            points = select_points(store.points(sample_id, row), self._spec, draw)
        return image, points

    def _text_of(self, item: Item) -> Sample:
        """The sample without its files."""
        return Sample(
            id=self._index.ids[item.number],
            combo="text",
            bos=self._bos,
            prompt=self._index.prompt(item.number, item.variant),
            target=self._index.target(item.number, item.variant),
            supervised=item.supervised,
        )


def _within(seconds: float, place: Callable[[], Path | str], work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it ends in time; UnusableFileError naming `place()` if it does not.

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
        raise UnusableFileError(place(), f"stalled: its files were not read within {seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
