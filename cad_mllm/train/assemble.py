"""The parts of a run, from its configuration: shared by training and by `cad-mllm doctor`."""

from pathlib import Path

from cad_mllm.config import TrainConfig
from cad_mllm.data.collate import SequenceSpec
from cad_mllm.model.build import Built, build_model, lm_shape
from cad_mllm.model.multimodal import parameter_groups
from cad_mllm.model.sizes import layer_sizes
from cad_mllm.train.demand import recomputed_layers
from cad_mllm.train.distributed import World
from cad_mllm.train.engine import Engine, PlainEngine, ZeroEngine
from cad_mllm.train.machine import smallest_gpu
from cad_mllm.train.zero import ModelShape, OptimizerSettings, ZeroConfig, read_deepspeed_json, resolve


def resolve_zero(config: TrainConfig, world: World) -> ZeroConfig | None:
    """The DeepSpeed configuration of a run; None without DeepSpeed. ConfigError: it cannot be honoured."""
    if not config.run.deepspeed:
        return None
    assert config.run.deepspeed_config is not None, "the settings refuse --deepspeed without a JSON"
    hidden_size, intermediate_size = lm_shape(config.model)
    shape = ModelShape(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layer_parameters=layer_sizes(config.model, fused=False).parameters,
        lora_r=config.model.lora_r if config.model.use_lora else None,
    )
    raw = read_deepspeed_json(config.run.deepspeed_config)
    return resolve(raw, config, world_size=world.size, shape=shape)


def build_networks(
    config: TrainConfig, zero: ZeroConfig | None, world: World, *, fused: bool = True
) -> Built:
    """LM, encoders and projectors; sharded while they are built under ZeRO-3. `fused` as in `build_model`."""
    return build_model(
        config.model,
        seed=config.run.seed,
        device=world.device,
        zero3_config=zero.for_sharded_construction if zero is not None else None,
        allow_random_encoders=config.data.create_dummy_data,
        packed=config.optim.pack_tokens > 0,
        recomputed_layers=recomputed_layers(config, zero, world, card_bytes=smallest_gpu(world)),
        fused=fused,
    )


def sequence_spec(config: TrainConfig, built: Built) -> SequenceSpec:
    """The sizes that the data must have for these networks."""
    return SequenceSpec(
        image_tokens=built.image_tokens,
        image_size=built.image_size,
        image_mean=built.image_mean,
        image_std=built.image_std,
        point_tokens=built.point_tokens,
        num_points=built.num_points,
        max_seq_length=config.data.max_seq_length,
    )


def build_engine(
    config: TrainConfig, built: Built, zero: ZeroConfig | None, world: World, *, log_dir: Path
) -> Engine:
    """What trains them: ZeRO where it was asked for, plain torch otherwise."""
    groups = parameter_groups(built.model)
    if zero is not None:
        return ZeroEngine(built.model, groups, zero, world, log_dir=log_dir)
    settings = OptimizerSettings(weight_decay=config.optim.weight_decay)
    return PlainEngine(built.model, groups, settings, max_grad_norm=config.optim.max_grad_norm)
