"""Samples -> one micro-batch of plain tensors: a right-padded row each, or all packed into one row.

Shapes: B rows, T positions, S supervised positions; N images (3, H, W); M clouds of P points with
C = 6 channels (xyz, unit normal). A modality that a sample lacks leaves no trace in its sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate

from cad_mllm.data import order
from cad_mllm.data.clouds import normalise_points
from cad_mllm.data.files import FloatArray
from cad_mllm.data.sequence import Combo, SequenceSpec, build_prompt

__all__ = [
    "IGNORED",
    "Batch",
    "Sample",
    "SequenceSpec",
    "build_prompt",
    "collate",
    "image_array",
    "normalise_images",
    "normalise_points",
    "pack",
    "square_image",
]

IGNORED = -100
"""The label of a position that is not learned."""

ByteArray = npt.NDArray[np.uint8]

_WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One sequence before batching. Without target (generation) nothing in it is supervised."""

    id: str
    combo: Combo
    bos: Sequence[int]
    """`[BOS]` or empty."""
    prompt: Sequence[int]
    """Ids of instruction + caption; never empty."""
    target: Sequence[int]
    """Ids of the target text and EOS; empty for generation."""
    image_3HW: FloatArray | ByteArray | Tensor | None = None
    """Normalised, or uint8 as in the file: then `normalise_images` is left to who gets the batch. A tensor:
    its features (K, D) in its place."""
    points_PC: FloatArray | Tensor | None = None
    """A tensor: its features (K, D) in its place."""
    supervised: bool = True
    """False: the sample only keeps a rank busy, all its labels are ignored."""


class Packed(NamedTuple):
    """Where the samples of a row begin and end; what fills the row up is one of them."""

    position_ids_1T: Tensor
    """int64; from 0 in each sample."""
    cu_seqlens: Tensor
    """int32 (samples + 1,): sample d is [cu_seqlens[d], cu_seqlens[d + 1])."""
    longest: int
    """Tokens of the longest one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch."""

    tokens_BT: Tensor
    """int64; the pad id at modality placeholders and at padding."""
    attention_mask_BT: Tensor
    """int64; 1 on the sequence, 0 on padding."""
    labels_BT: Tensor
    """int64, not shifted; IGNORED except on target text and EOS."""
    images_NCHW: Tensor
    """float32, normalised for the vision encoder; N may be 0. From uint8 samples: uint8, not yet. Of samples
    with features these, (N, K, D)."""
    image_rows: Tensor
    """int64 (N * image_tokens,): where the image tokens go, flat in B * T."""
    points_MPC: Tensor
    """float32; M may be 0. Of samples with features these, (M, K, D)."""
    point_rows: Tensor
    """int64 (M * point_tokens,): where the point tokens go, flat in B * T."""
    sample_ids: tuple[str, ...]
    combos: tuple[Combo, ...]
    num_supervised: int
    """Labels that are not IGNORED."""
    loss_rows: Tensor
    """int64 (S,): flat in B * T, the positions whose next label is supervised, rising; S >= 1: a batch
    without any has position 0, whose next label is IGNORED."""
    packed: "Packed | None" = None
    """None: a sample a row."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device` (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader asks for it by this name."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors: they were made in another one."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        if self.packed is not None:
            packed = Packed(
                change(self.packed.position_ids_1T), change(self.packed.cu_seqlens), self.packed.longest
            )
            changed["packed"] = packed
        return replace(self, **changed)


def select_points(points_NC: FloatArray, spec: SequenceSpec, draw: tuple[int, int, int, str]) -> FloatArray:
    """`spec.num_points` normalised points (P, 6) of a cloud, drawn by (seed, stage, epoch, sample id)."""
    rows = order.draw_points(*draw, len(points_NC), spec.num_points)
    return normalise_points(points_NC, rows)


def square_image(image: Image.Image, spec: SequenceSpec) -> ByteArray:
    """An RGB picture as uint8 (3, H, W), proportions kept on a white square."""
    square = ImageOps.pad(image, (spec.image_size, spec.image_size), Image.Resampling.BICUBIC, color=_WHITE)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def normalise_images(images_3HW: ByteArray, spec: SequenceSpec) -> FloatArray:
    """Pictures (..., 3, H, W) as the vision encoder wants them."""
    values_3HW = images_3HW.astype(np.float32)
    values_3HW /= 255
    values_3HW -= np.asarray(spec.image_mean, np.float32)[:, None, None]
    values_3HW /= np.asarray(spec.image_std, np.float32)[:, None, None]
    return values_3HW


def image_array(image: Image.Image, spec: SequenceSpec) -> FloatArray:
    """An RGB picture as (3, H, W), proportions kept on a white square, normalised for the vision encoder."""
    return normalise_images(square_image(image, spec), spec)


def collate(samples: Sequence[Sample], spec: SequenceSpec, pad_id: int) -> Batch:
    """One batch of the samples in their order, a row each; the index has made sure that each fits."""
    rows = [_layout(sample, spec) for sample in samples]
    longest = max(len(row.tokens) for row in rows)
    assert longest <= spec.max_seq_length, "the index lets no sample through that does not fit"
    starts = [b * longest for b in range(len(rows))]
    return _fill(samples, rows, starts, (len(rows), longest), spec, pad_id)


def pack(samples: Sequence[Sample], spec: SequenceSpec, pad_id: int, length: int) -> Batch:
    """One batch of the samples end to end in one row of `length`, into which they fit."""
    rows = [_layout(sample, spec) for sample in samples]
    ends = np.cumsum([len(row.tokens) for row in rows])
    assert ends[-1] <= length, "the plan lets no pack through that does not fit"
    borders = [0, *ends.tolist()] + ([length] if ends[-1] < length else [])
    sizes = np.diff(borders)
    packed = Packed(
        position_ids_1T=torch.from_numpy(np.concatenate([np.arange(size) for size in sizes])[None]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        longest=int(sizes.max()),
    )
    batch = _fill(samples, rows, borders[: len(rows)], (1, length), spec, pad_id)
    return replace(batch, packed=packed)


def _fill(
    samples: Sequence[Sample],
    rows: Sequence["_Row"],
    starts: Sequence[int],
    shape: tuple[int, int],
    spec: SequenceSpec,
    pad_id: int,
) -> Batch:
    """The rows written at these places of a flat (B * T,) batch, nothing else in it."""
    num_positions = shape[0] * shape[1]
    tokens, mask = np.full(num_positions, pad_id, dtype=np.int64), np.zeros(num_positions, dtype=np.int64)
    labels = np.full(num_positions, IGNORED, dtype=np.int64)
    image_rows: list[np.ndarray] = []
    point_rows: list[np.ndarray] = []
    for start, row, sample in zip(starts, rows, samples, strict=True):
        end = start + len(row.tokens)
        tokens[start:end] = [pad_id if token is None else token for token in row.tokens]
        mask[start:end] = 1
        if sample.supervised:
            # The prompt is never empty: no first token of a sample is supervised, for nothing predicts it.
            assert len(sample.target) < len(row.tokens)
            labels[end - len(sample.target) : end] = sample.target
        image_rows.append(start + np.arange(*row.image))
        point_rows.append(start + np.arange(*row.points))
    supervised = np.flatnonzero(labels != IGNORED)
    size = spec.image_size
    return Batch(
        tokens_BT=torch.from_numpy(tokens.reshape(shape)),
        attention_mask_BT=torch.from_numpy(mask.reshape(shape)),
        labels_BT=torch.from_numpy(labels.reshape(shape)),
        images_NCHW=_stack([s.image_3HW for s in samples], (3, size, size)),
        image_rows=torch.from_numpy(np.concatenate(image_rows)),
        points_MPC=_stack([s.points_PC for s in samples], (spec.num_points, 6)),
        point_rows=torch.from_numpy(np.concatenate(point_rows)),
        sample_ids=tuple(s.id for s in samples),
        combos=tuple(s.combo for s in samples),
        num_supervised=len(supervised),
        loss_rows=torch.from_numpy(supervised - 1 if len(supervised) else np.zeros(1, np.int64)),
    )


@dataclass(frozen=True)
class _Row:
    tokens: list[int | None]
    """None at modality placeholders."""
    image: tuple[int, int]
    """Where the image tokens stand: [start, end)."""
    points: tuple[int, int]


def _layout(sample: Sample, spec: SequenceSpec) -> _Row:
    image_end = len(sample.bos) + (0 if sample.image_3HW is None else spec.image_tokens)
    points_end = image_end + (0 if sample.points_PC is None else spec.point_tokens)
    placeholders: list[int | None] = [None] * (points_end - len(sample.bos))
    return _Row(
        [*sample.bos, *placeholders, *sample.prompt, *sample.target],
        (len(sample.bos), image_end),
        (image_end, points_end),
    )


def _stack(arrays: Sequence[FloatArray | ByteArray | Tensor | None], shape: tuple[int, ...]) -> Tensor:
    present = [torch.as_tensor(array) for array in arrays if array is not None]
    if not present:
        return torch.empty((0, *shape), dtype=torch.float32)
    stacked: Tensor = default_collate(present)  # in a loader process, straight into shared memory
    return stacked
