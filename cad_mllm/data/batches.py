"""Samples -> one micro-batch: reads their files, and stands in for what cannot be read any more.

A sample that became unreadable since the index was built (a damaged file, a mount that stalls) is `Lost`: its
caption and target alone take its place, unsupervised, so that all ranks stay in step.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from cad_mllm.data import order
from cad_mllm.data.augment import Variant
from cad_mllm.data.collate import (
    Batch,
    ByteArray,
    Sample,
    collate,
    normalise_images,
    pack,
    select_points,
    square_image,
)
from cad_mllm.data.features import FeatureFolder
from cad_mllm.data.files import FloatArray, UnusableFileError
from cad_mllm.data.index import Index
from cad_mllm.data.sequence import MODALITIES, Combo, SequenceSpec, TextTokenizer, bos_ids, pad_id

T = TypeVar("T")

_Read = tuple[ByteArray | Tensor | None, FloatArray | Tensor | None]
"""Image (3, H, W) and points (P, 6), or the features of each."""

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
    spec: SequenceSpec
    lost: tuple[Lost, ...] = ()

    def finished(self) -> "Loaded":
        """With its pictures normalised: who gets it does that, for a quarter of the bytes on the way."""
        images_NCHW = self.batch.images_NCHW
        if images_NCHW.dtype != torch.uint8:
            return self
        normalised = torch.from_numpy(normalise_images(images_NCHW.numpy(), self.spec))
        return replace(self, batch=replace(self.batch, images_NCHW=normalised))

    def pin_memory(self) -> "Loaded":
        """See `Batch.pin_memory`; done by a thread of its own, so the pictures are normalised there."""
        finished = self.finished()
        return replace(finished, batch=finished.batch.pin_memory())


@dataclass(frozen=True)
class Item:
    """One sample of a micro-batch, with everything drawn."""

    number: int
    epoch: int
    combo: Combo
    supervised: bool = True
    variant: Variant | None = None
    """The part of its program that is the target; None: all of it."""
    captioned: bool = True
    """Whether its prompt has its caption."""


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
        features: FeatureFolder | None = None,
    ) -> None:
        """With `pack_tokens` the samples of a micro-batch become one row of that length, else a row each.

        With `features` these are read in place of pictures and clouds.
        """
        self._index = index
        self._spec = spec
        self._seed = seed
        self._stage = stage
        self._seconds = seconds
        self._pack_tokens = pack_tokens
        self._features = features
        self._bos = bos_ids(tokenizer)
        self._pad_id = pad_id(tokenizer)

    def build(self, items: Sequence[Item], all_lost: str | None = None) -> Loaded:
        """One micro-batch of the samples, in their order; `all_lost`: why none of them is to be read."""
        texts = [self._text_of(item) for item in items]
        rows = [self._index.row(item.number) for item in items]
        reads = {
            n: partial(self._modalities, item, texts[n].id, rows[n])
            for n, item in enumerate(items)
            if MODALITIES[item.combo] and all_lost is None
        }
        outcomes = dict(zip(reads, _each_within(self._seconds, list(reads.values())), strict=True))
        samples, lost = [], []
        for n, (item, text) in enumerate(zip(items, texts, strict=True)):
            outcome = outcomes.get(n, (None, None))
            reason = all_lost
            if outcome is None:
                reason = f"stalled: its files were not read within {self._seconds:g} s"
            if reason is not None:
                outcome = UnusableFileError(self._index.store.place(text.id, rows[n]), reason)
            if isinstance(outcome, UnusableFileError):
                samples.append(replace(text, supervised=False))
                if item.supervised:
                    lost.append(
                        Lost(
                            id=text.id,
                            file=str(outcome.path),
                            reason=outcome.reason,
                            num_target_tokens=len(text.target),
                        )
                    )
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                assert outcome is not None
                image, points = outcome
                samples.append(replace(text, combo=item.combo, image_3HW=image, points_PC=points))
        if self._pack_tokens:
            batch = pack(samples, self._spec, self._pad_id, self._pack_tokens)
        else:
            batch = collate(samples, self._spec, self._pad_id)
        return Loaded(batch=batch, spec=self._spec, lost=tuple(lost))

    def _modalities(self, item: Item, sample_id: str, row: int) -> _Read:
        """What is read from the store: image (3, H, W) and points (P, 6); or their features."""
        draw = (self._seed, self._stage, item.epoch, sample_id)
        image = points = None
        if "image" in MODALITIES[item.combo]:
            num_views = self._index.num_views(item.number)
            assert num_views, "the index was built for this combination"
            image = self._image(sample_id, row, order.draw_view(*draw, num_views))
        if "points" in MODALITIES[item.combo]:
            points = self._points(sample_id, row, draw)
        return image, points

    def _image(self, sample_id: str, row: int, view: int) -> ByteArray | Tensor:
        read = partial(read_image, self._index, sample_id, row, view, self._spec)
        return read() if self._features is None else self._features.load("image", sample_id, read, view)

    def _points(self, sample_id: str, row: int, draw: tuple[int, int, int, str]) -> FloatArray | Tensor:
        read = partial(read_points, self._index, sample_id, row, draw, self._spec)
        return read() if self._features is None else self._features.load("points", sample_id, read)

    def _text_of(self, item: Item) -> Sample:
        """The sample without its files."""
        return Sample(
            id=self._index.ids[item.number],
            combo="text",
            bos=self._bos,
            prompt=self._index.prompt(item.number, item.variant, captioned=item.captioned),
            target=self._index.target(item.number, item.variant),
            supervised=item.supervised,
        )


def read_image(index: Index, sample_id: str, row: int, view: int, spec: SequenceSpec) -> ByteArray:
    """A view as uint8 (3, H, W). UnusableFileError: it cannot be read."""
    return square_image(index.store.image(sample_id, row, view), spec)


def read_points(
    index: Index, sample_id: str, row: int, draw: tuple[int, int, int, str], spec: SequenceSpec
) -> FloatArray:
    """The points (P, 6) of a cloud that are drawn. UnusableFileError: it cannot be read."""
    return select_points(index.store.points(sample_id, row), spec, draw)


def _each_within(seconds: float, works: Sequence[Callable[[], T]]) -> list[T | BaseException | None]:
    """What each work returns or raises, one after the other; None for one that does not end in time.

    A read from a mount that is gone cannot be interrupted: its thread is left behind, and another goes on
    with the works after it.
    """
    outcomes: list[T | BaseException | None] = []
    while len(outcomes) < len(works):
        done: SimpleQueue[T | BaseException] = SimpleQueue()
        rest = works[len(outcomes) :]
        threading.Thread(target=_work_off, args=(rest, done), daemon=True).start()
        try:
            for _ in rest:
                outcomes.append(done.get(timeout=seconds))
        except Empty:
            outcomes.append(None)
    return outcomes


def _work_off(works: Sequence[Callable[[], T]], done: "SimpleQueue[T | BaseException]") -> None:
    for work in works:
        try:
            done.put(work())
        except BaseException as error:  # raised again in the caller's thread
            done.put(error)
