"""What a run asks of its machines, from its configuration and the model's sizes; nothing is built."""

import math
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.config import TrainConfig
from cad_mllm.model.build import read_lm_config
from cad_mllm.model.image_encoder import IMAGE_SIZE
from cad_mllm.model.kernels import fuses_layers
from cad_mllm.model.point_encoder import PointEncoderConfig
from cad_mllm.model.sizes import layer_sizes, parameter_counts
from cad_mllm.train.distributed import World
from cad_mllm.train.zero import ZeroConfig

_STATE_BYTES = 12
"""fp32 master weight and two Adam moments, for each trainable parameter."""
_MODALITY_TOKENS = 513
"""Of a picture and a cloud, with the encoders that a run uses if it names none."""
_GATHERED_LAYERS = 3
"""Decoder layers that ZeRO-3 holds at a time: the current one and those that it prefetches."""
_LOSS_BYTES = 5 * 2**28
"""A chunk of fp32 logits, and its copies."""
_CONTEXT_BYTES = 2 * 10**9
"""CUDA context, NCCL's buffers, the frozen encoders."""
_USABLE = 0.92
"""The rest is lost between blocks of the allocator."""
_PREFETCHED = 2
"""Batches that torch's loader keeps ready for each worker."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run asks of its machines."""

    output_dir: Path
    may_use_cpu: bool
    """The user asked for the CPU."""
    flash_attention: bool
    zero_stage: int
    """0: without DeepSpeed."""
    keeps_weights: bool
    """ZeRO-3 keeps whole what it has gathered."""
    offload_optimizer: bool
    offload_param: bool
    parameters: int
    trainable: int
    weight_bytes: int
    """Of one parameter in the dtype of the run."""
    loader_bytes: int
    """Batches in /dev/shm, for each rank."""
    checkpoints_kept: int
    """0: all of them."""

    @property
    def gathers_in_micro_batches(self) -> bool:
        """ZeRO-3 gathers all weights twice in each micro-batch."""
        return self.zero_stage == 3 and not self.keeps_weights

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 master weights, two moments, and the export in the dtype of the run."""
        return self.trainable * (_STATE_BYTES + self.weight_bytes)

    def offload_bytes(self, world_size: int, ranks_here: int) -> int:
        """Host memory that offload takes on a machine, before pinning rounds it up.

        Shared out among all ranks: with `offload_param` the weights in the dtype of the run, the trainable
        ones once more (the shards that were read stay pinned beside the buffer they are copied to); with
        `offload_optimizer` 16 bytes (fp32 weight, gradient, two moments) of each trainable parameter, and its
        gradient in the dtype of the run. Measured: 23 bytes where this says 22 (8B, all weights, bf16).
        """
        weights = (self.parameters + self.trainable) * self.weight_bytes if self.offload_param else 0
        state = self.trainable * (_STATE_BYTES + 4 + self.weight_bytes) if self.offload_optimizer else 0
        return (weights + state) * ranks_here // world_size

    def gpu_bytes(self, world_size: int) -> int:
        """Least GPU memory of a rank: weights and optimiser state, without gradients and activations."""
        weights = 0 if self.offload_param else self.parameters * self.weight_bytes
        # Without DeepSpeed an fp32 parameter is its own master weight.
        each = _STATE_BYTES - 4 if not self.zero_stage and self.weight_bytes == 4 else _STATE_BYTES
        state = 0 if self.offload_optimizer else self.trainable * each
        if self.zero_stage == 3:
            weights //= world_size
            if self.keeps_weights:  # beside the shards
                weights += self.parameters * self.weight_bytes
        if self.zero_stage:
            state //= world_size
        return weights + state


def recomputed_layers(
    config: TrainConfig, zero: ZeroConfig | None, world: World, *, card_bytes: int | None
) -> int | None:
    """Decoder layers to recompute so that a rank stays below --gpu_memory_gb, by estimate; None: all.

    `card_bytes`, the memory of the smallest GPU of all ranks (None on a CPU), is the limit where it is less.
    Counted are weights and optimiser state, gradients, what ZeRO-3 has gathered at a time, the chunk of
    logits, the input of each recomputed layer, one layer that is being recomputed (with its gradients), and
    all activations of the others.
    """
    if not config.model.gpu_memory_gb:
        return None
    demand = demand_of(config, zero, world)
    fused = demand.flash_attention and fuses_layers(read_lm_config(config.model.llm_model_name))
    layer = layer_sizes(config.model, fused=fused)
    tokens = config.optim.pack_tokens or config.optim.batch_size * config.data.max_seq_length
    gradients = demand.trainable * (demand.weight_bytes if zero is not None else 4)
    if demand.zero_stage >= 2:
        gradients //= world.size
    gathered = 0
    if demand.gathers_in_micro_batches:
        # A frozen head and frozen embeddings are whole for a moment each, if at all.
        heads = 1 if config.model.use_lora else 2
        at_a_time = _GATHERED_LAYERS * layer.parameters + heads * layer.head_parameters
        gathered = at_a_time * demand.weight_bytes
    loss = _LOSS_BYTES + (0 if config.model.use_lora else 4 * layer.head_parameters)
    least = (
        demand.gpu_bytes(world.size)
        + gradients
        + gathered
        + loss
        + tokens * (layer.num_layers * layer.input_bytes + 2 * layer.activation_bytes)
    )
    budget = min(config.model.gpu_memory_gb * 1e9, math.inf if card_bytes is None else card_bytes)
    room = budget * _USABLE - _CONTEXT_BYTES - least
    kept = int(max(0.0, room) // (tokens * (layer.activation_bytes - layer.input_bytes)))
    return max(0, layer.num_layers - kept)


def demand_of(config: TrainConfig, zero: ZeroConfig | None, world: World) -> Demand:
    """What the configuration asks of the machines. ConfigError: there is no such LM."""
    counts = parameter_counts(config.model)
    picture, cloud = 3 * IMAGE_SIZE**2 * 4, PointEncoderConfig().num_points * 6 * 4
    longest, pack = config.data.max_seq_length, config.optim.pack_tokens
    # In a pack there is a cloud and a picture for every 513 tokens that they take, at most.
    files = pack // _MODALITY_TOKENS if pack else config.optim.batch_size
    batch = files * (picture + cloud) + 3 * (pack or config.optim.batch_size * longest) * 8
    return Demand(
        output_dir=config.run.output_dir,
        may_use_cpu=config.run.device == "cpu",
        flash_attention=config.model.attn_implementation == "flash_attention_2"
        and world.device.type == "cuda",
        zero_stage=zero.stage if zero is not None else 0,
        keeps_weights=zero is not None and zero.keeps_weights,
        offload_optimizer=zero is not None and zero.offload_optimizer,
        offload_param=zero is not None and zero.offload_param,
        parameters=counts.total,
        trainable=counts.trainable,
        weight_bytes=2 if config.model.dtype == "bfloat16" else 4,
        loader_bytes=batch * config.data.num_workers * _PREFETCHED,
        checkpoints_kept=config.run.keep_last_n_checkpoints,
    )
