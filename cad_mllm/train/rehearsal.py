"""The largest batch that a run can meet, computed before the first step: memory runs out at once or never.

Shapes as in `data.collate`.
"""

import numpy as np
import torch
from torch import Tensor, nn

from cad_mllm.config import OptimConfig
from cad_mllm.data.collate import Batch, Sample, collate, pack
from cad_mllm.data.sequence import MODALITIES, Modality, SequenceSpec
from cad_mllm.model.encoders import Encoders
from cad_mllm.train.engine import Engine
from cad_mllm.train.stages import IMAGE_PROJECTOR, POINT_PROJECTOR

PROJECTORS = frozenset({POINT_PROJECTOR, IMAGE_PROJECTOR})


def micro_batch_loss(
    module: nn.Module,
    encoders: Encoders,
    cpu_batch: Batch,
    device: torch.device,
    *,
    trainable: frozenset[str],
) -> Tensor:
    """Summed loss of a micro-batch: encoders that are frozen first, then the engine's module."""
    batch = cpu_batch.to(device)
    loss: Tensor = module(
        batch.tokens_BT,
        batch.attention_mask_BT,
        batch.labels_BT,
        batch.loss_rows,
        encoders.encode_images(batch.images_NCHW),
        batch.image_rows,
        encoders.encode_points(batch.points_MPC),
        batch.point_rows,
        trainable=trainable,
        packed=batch.packed,
    )
    return loss


def largest_batch(
    spec: SequenceSpec,
    optim: OptimConfig,
    *,
    modalities: frozenset[Modality],
    prompt_tokens: int,
    text_tokens: int,
) -> Batch:
    """Samples with these modalities and `text_tokens` of text, supervised after `prompt_tokens`.

    As many as a micro-batch has, or as fit a pack.
    """
    combo = next(combo for combo, fed in MODALITIES.items() if fed == modalities)
    sample = Sample(
        id="rehearsal",
        combo=combo,
        bos=[],
        prompt=[0] * prompt_tokens,
        target=[0] * (text_tokens - prompt_tokens),
        image_3HW=np.zeros((3, spec.image_size, spec.image_size), np.float32)
        if "image" in modalities
        else None,
        points_PC=np.zeros((spec.num_points, 6), np.float32) if "points" in modalities else None,
    )
    if optim.pack_tokens:
        count = optim.pack_tokens // (text_tokens + spec.modality_tokens(modalities))
        return pack([sample] * count, spec, 0, optim.pack_tokens)
    return collate([sample] * optim.batch_size, spec, pad_id=0)


def rehearse_largest(
    engine: Engine,
    encoders: Encoders,
    spec: SequenceSpec,
    optim: OptimConfig,
    device: torch.device,
    *,
    modalities: frozenset[Modality],
    trainable: frozenset[str],
    prompt_tokens: int,
    text_tokens: int,
) -> int:
    """One step of the largest batch that changes neither weights nor optimiser state, nor any random state.

    `trainable` are the projectors that the next step trains: ZeRO-3 keeps the gradient of a parameter until
    it gets another one, so what the rehearsal leaves there must be overwritten.
    Returns the most GPU memory allocated so far, in bytes (0 on a CPU). torch.OutOfMemoryError: this run will
    not fit.
    """
    batch = largest_batch(
        spec,
        optim,
        modalities=modalities,
        prompt_tokens=prompt_tokens,
        text_tokens=text_tokens,
    )
    engine.module.train()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        engine.rehearse(
            lambda: micro_batch_loss(engine.module, encoders, batch, device, trainable=trainable),
            # With a second one the gradients of the first are there as well.
            micro_batches=min(2, optim.gradient_accumulation_steps),
        )
    if device.type != "cuda":
        return 0
    peak = int(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return peak
