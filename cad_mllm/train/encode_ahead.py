"""Frozen encoders before the first step: features of all that the run will feed, computed by all ranks.

Those that are on disk already, of this run or another one, are not computed again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cad_mllm.config import TrainConfig
from cad_mllm.data.atomic import make_writable
from cad_mllm.data.collate import SequenceSpec
from cad_mllm.data.encoder_inputs import EncoderInputs
from cad_mllm.data.features import (
    FeatureFolder,
    Wanted,
    wanted_by_validation,
    wanted_in_epoch,
)
from cad_mllm.data.files import FloatArray
from cad_mllm.data.index import Index
from cad_mllm.data.loader import eval_samples
from cad_mllm.data.prefetch import prefetched
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.sequence import Modality
from cad_mllm.model.build import Built
from cad_mllm.model.encoders import FrozenEncoders, StoredEncoders
from cad_mllm.model.seeding import digest
from cad_mllm.train.distributed import World
from cad_mllm.train.stages import Stage

_AT_ONCE = 32
"""Pictures or clouds that are encoded together."""
_LOOKED_FOR_AT_ONCE = 1000
"""Between two looks at the clock."""


def encode_ahead(
    config: TrainConfig,
    built: Built,
    spec: SequenceSpec,
    stages: Sequence[Stage],
    indices: Sequence[Index],
    world: World,
) -> tuple[Built, list[FeatureFolder], str]:
    """The networks without the encoders, the features of each index (training, validation), a line on them.

    On all ranks alike; the folder must be one that all of them see. ConfigError: it cannot be written.
    """
    root, encoders = config.data.encoder_features, built.encoders
    assert root is not None and isinstance(encoders, FrozenEncoders), "the settings see to that"
    make_writable(root, "--encoder_features")
    seed, dtype = config.run.seed, str(encoders.dtype)
    image_input = [spec.image_size, spec.image_mean, spec.image_std]
    made_by: dict[Modality, object] = {
        "image": [digest(encoders.image), dtype, image_input],
        "points": [digest(encoders.point), dtype, spec.num_points, seed],
    }
    folders, computed, count = [], 0, 0
    unreadable: list[str] = []
    for position, index in enumerate(indices):
        folder = FeatureFolder.of(root, index, made_by)
        if position == 0:
            wanted = _wanted_in_training(index, seed, stages, world)
        else:
            wanted = set(wanted_by_validation(index, eval_samples(len(index)), seed))
        done, lost = _encode(folder, index, sorted(wanted), encoders, spec, config, world)
        computed, unreadable = computed + done, unreadable + lost
        count += len(wanted)
        folders.append(folder)
    total = int(world.sum(float(computed))[0])  # nobody goes on before all are there
    line = f"features of {count} pictures and clouds in {root}, {total} of them computed now"
    reasons = [reason for of_rank in world.gather(unreadable) for reason in of_rank]
    if reasons:
        line += f"; not readable: {len(reasons)}, for instance {reasons[0]}"
    return replace(built, encoders=StoredEncoders(encoders)), folders, line


def _wanted_in_training(index: Index, seed: int, stages: Sequence[Stage], world: World) -> set[Wanted]:
    # The last step of a stage may run into one epoch more.
    epochs = [(stage, epoch) for stage in stages for epoch in range(stage.epochs + 1)]
    wanted: set[Wanted] = set()
    with SlowProgress("Drawing pictures and clouds, epochs", len(epochs)) as progress:
        for stage, epoch in epochs:
            wanted.update(wanted_in_epoch(index, seed, stage.number, stage.mix, epoch))
            if world.is_main:
                progress.advance()
    return wanted


def _encode(
    folder: FeatureFolder,
    index: Index,
    wanted: Sequence[Wanted],
    encoders: FrozenEncoders,
    spec: SequenceSpec,
    config: TrainConfig,
    world: World,
) -> tuple[int, list[str]]:
    """Compute this rank's share of what is not there: how many that were, and why others cannot be."""
    own, missing = wanted[world.rank :: world.size], []
    with SlowProgress("Looking for features", len(own)) as progress:
        for start in range(0, len(own), _LOOKED_FOR_AT_ONCE):
            some = own[start : start + _LOOKED_FOR_AT_ONCE]
            files = [folder.file(one.modality, index.ids[one.number], one.view) for one in some]
            missing += [one for one, file in zip(some, files, strict=True) if not file.exists()]
            if world.is_main:  # one bar: the shares are alike
                progress.advance(len(some))
    groups = [
        several[start : start + _AT_ONCE]
        for several in (
            [one for one in missing if one.modality == "image"],
            [one for one in missing if one.modality == "points"],
        )
        for start in range(0, len(several), _AT_ONCE)
    ]
    inputs = EncoderInputs(index, spec, config.run.seed, [one for group in groups for one in group])
    read = prefetched(inputs, config.data.num_workers, pin_memory=False)
    computed, unreadable = 0, list[str]()
    with SlowProgress("Encoding pictures and clouds", len(missing)) as progress:
        for group in groups:
            arrays = [next(read) for _ in group]
            found = [
                (one, array) for one, array in zip(group, arrays, strict=True) if not isinstance(array, str)
            ]
            unreadable += [reason for reason in arrays if isinstance(reason, str)]
            if found:
                features_NKD = _features(encoders, found[0][0].modality, [array for _, array in found], world)
                for (one, _), features_KD in zip(found, features_NKD.cpu(), strict=True):
                    folder.save(features_KD, one.modality, index.ids[one.number], one.view)
            computed += len(found)
            if world.is_main:
                progress.advance(len(group))
    return computed, unreadable


def _features(
    encoders: FrozenEncoders, modality: Modality, arrays: Iterable[FloatArray], world: World
) -> Tensor:
    """(N, K, D)."""
    inputs = torch.from_numpy(np.stack(list(arrays))).to(world.device)
    return encoders.encode_images(inputs) if modality == "image" else encoders.encode_points(inputs)
