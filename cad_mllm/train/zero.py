"""From the user's DeepSpeed JSON to the configuration that the engine is given.

The JSON stays the user's (design, decision 7): every `auto` is resolved from the flags, a value that
contradicts a flag is an error that names both, and an `auto` that nobody resolved never reaches
DeepSpeed (`deepspeed.initialize` raises a TypeError on it).
"""

import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.config import TrainConfig
from cad_mllm.errors import ConfigError

JsonDict = dict[str, object]

_ABOVE_ALL = 10**9
"""Elements that no single weight has."""

_SCHEDULES = {"WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedulers, by the name of ours that has the same shape."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the `auto` values need to know of the LM."""

    hidden_size: int
    intermediate_size: int
    layer_parameters: int
    """Of one decoder layer, with its adapters."""
    lora_r: int | None
    """None: full fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW's constants, from the JSON where it names them."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """A DeepSpeed configuration without `auto`."""

    config: JsonDict
    """For `deepspeed.initialize`: no optimizer or scheduler section, those are ours."""
    stage: int
    offload_optimizer: bool
    offload_param: bool
    optimizer: OptimizerSettings

    @property
    def keeps_weights(self) -> bool:
        """Whether ZeRO-3 keeps whole what it gathers: the threshold of persistence is above every weight."""
        zero = self.config.get("zero_optimization", {})
        assert isinstance(zero, dict)
        threshold = zero.get("stage3_param_persistence_threshold", 0)
        return self.stage == 3 and isinstance(threshold, int) and threshold >= _ABOVE_ALL

    @property
    def for_sharded_construction(self) -> JsonDict | None:
        """The same, if the model must be built shard by shard (ZeRO-3); None otherwise."""
        return self.config if self.stage == 3 else None


def read_deepspeed_json(path: Path) -> JsonDict:
    """Read the user's file.

    Raises:
        ConfigError: the file is missing, unreadable, or no JSON object.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(
            f"--deepspeed_config {path}: no such file. Shipped ones are in configs/deepspeed/."
        ) from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"--deepspeed_config {path}: not readable as JSON ({e}).") from e
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"--deepspeed_config {path}: a JSON object is needed, found {type(loaded).__name__}."
        )
    return loaded


def resolve(raw: JsonDict, config: TrainConfig, *, world_size: int, shape: ModelShape) -> ZeroConfig:
    """Resolve every `auto` of a DeepSpeed configuration from the flags.

    Raises:
        ConfigError: a value contradicts a flag, is not supported, or is an `auto` without a meaning here.
    """
    ds: JsonDict = json.loads(json.dumps(raw))
    optim = config.optim
    micro, accumulation = optim.rows, optim.gradient_accumulation_steps
    flag = "--pack_tokens (one row)" if optim.pack_tokens else "--batch_size"
    _settle(ds, "train_micro_batch_size_per_gpu", micro, flag)
    _settle(ds, "gradient_accumulation_steps", accumulation, "--gradient_accumulation_steps")
    _settle(
        ds,
        "train_batch_size",
        micro * accumulation * world_size,
        f"{flag} x --gradient_accumulation_steps x {world_size} ranks",
    )
    _settle(ds, "gradient_clipping", optim.max_grad_norm, "--max_grad_norm")
    _settle(_section(ds, "bf16"), "enabled", config.model.dtype == "bfloat16", "--dtype", parent="bf16.")
    if _section(ds, "bf16").get("check_grad_overflow", True) is not True:
        raise ConfigError(
            "bf16.check_grad_overflow is off in the DeepSpeed JSON: a gradient that is not finite would "
            "reach the weights. Remove it."
        )
    if "fp16" in ds:
        _settle(_section(ds, "fp16"), "enabled", False, "--dtype (float16 is not supported)", parent="fp16.")
    zero = _section(ds, "zero_optimization")
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"zero_optimization.stage is {stage!r} in the DeepSpeed JSON; it must be 1, 2 or 3."
        )
    for key, value in _zero_autos(shape).items():
        if zero.get(key) == "auto":
            zero[key] = value
    offload = _offload_device(zero, "offload_optimizer")
    offload_param = _offload_device(zero, "offload_param")
    settings = _optimizer_settings(ds, config)
    _check_scheduler(ds, config)
    leftover = next(_autos(ds), None)
    if leftover is not None:
        raise ConfigError(
            f'{leftover} is "auto" in the DeepSpeed JSON, and no flag decides it. Write a value or remove it.'
        )
    assert isinstance(stage, int)
    return ZeroConfig(
        config=ds, stage=stage, offload_optimizer=offload, offload_param=offload_param, optimizer=settings
    )


def needed_ops(zero: ZeroConfig, device_type: str) -> tuple[str, ...]:
    """DeepSpeed's compiled ops that a run uses, by DeepSpeed's names."""
    ops = []
    if zero.offload_optimizer:
        ops.append("cpu_adam")
    if device_type == "cpu":
        ops.append("deepspeed_shm_comm")
    return tuple(ops)


def missing_for_ops(ops: Sequence[str]) -> tuple[str, ...]:
    """What this machine lacks to compile these ops; nothing where DeepSpeed was installed with them."""
    if not ops:
        return ()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from torch.utils import cpp_extension

    device = get_accelerator().device_name()
    if accelerator_name == device and all(installed_ops.get(op) for op in ops):
        return ()
    tools = {
        "a C++ compiler (g++)": shutil.which(os.environ.get("CXX", "c++")) is not None,
        "ninja": cpp_extension.is_ninja_available(),
        "Python's headers (Python.h)": Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        "the CUDA toolkit (nvcc)": device != "cuda" or cpp_extension.CUDA_HOME is not None,
    }
    return tuple(name for name, present in tools.items() if not present)


def _zero_autos(shape: ModelShape) -> dict[str, int]:
    """Bucket sizes (in elements) from the LM's shape.

    Persistence: a LoRA matrix (r x intermediate) sits just above DeepSpeed's default threshold of 1e5,
    and gathering hundreds of them one by one dominates the step, so the threshold goes above it.
    Prefetch: a whole decoder layer. With less, the layer that comes next lacks a part when its turn comes,
    which is gathered by itself while the device waits. Live parameters: the layer that computes and the one
    that comes next; DeepSpeed's 1e9 are five layers of an 8B LM, 2 GB.
    """
    hidden = shape.hidden_size
    largest_lora = (shape.lora_r or 0) * max(hidden, shape.intermediate_size)
    return {
        "reduce_bucket_size": hidden * hidden,
        "allgather_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": max(hidden * hidden, shape.layer_parameters),
        "stage3_max_live_parameters": 2 * max(hidden * hidden, shape.layer_parameters),
        "stage3_param_persistence_threshold": max(10 * hidden, largest_lora),
    }


def _section(ds: JsonDict, key: str) -> JsonDict:
    section = ds.setdefault(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{key} in the DeepSpeed JSON must be an object, found {section!r}.")
    return section


def _settle(section: JsonDict, key: str, wanted: bool | int | float, flag: str, *, parent: str = "") -> None:
    """Fill in `auto` or a missing key; refuse a value that says something else than the flag."""
    found = section.get(key, "auto")
    if found == "auto":
        section[key] = wanted
    elif found != wanted:
        raise ConfigError(
            f"{parent}{key} is {json.dumps(found)} in the DeepSpeed JSON, "
            f"but {flag} gives {json.dumps(wanted)}. "
            f'Change one of them, or write "auto" in the JSON.'
        )


def _offload_device(zero: JsonDict, key: str) -> bool:
    """Whether `key` offloads to host memory.

    NVMe and partial offload keep the optimiser state where our checkpoints cannot see it: refused.
    """
    if key not in zero:
        return False
    section = _section(zero, key)
    device = section.get("device", "none")
    if device not in ("cpu", "none"):
        raise ConfigError(f"zero_optimization.{key}.device is {device!r}; supported are cpu and none.")
    if section.get("ratio", 1.0) != 1.0:
        raise ConfigError(f"zero_optimization.{key}.ratio is {section['ratio']!r}; only 1.0 is supported.")
    return device == "cpu"


def _optimizer_settings(ds: JsonDict, config: TrainConfig) -> OptimizerSettings:
    """Take AdamW's constants out of the JSON: the optimiser is built by the trainer, with its groups."""
    section = ds.pop("optimizer", {"type": "AdamW", "params": {}})
    if not isinstance(section, dict) or str(section.get("type", "")).lower() != "adamw":
        raise ConfigError(f"optimizer in the DeepSpeed JSON is {section!r}; supported is the type AdamW.")
    params: Mapping[str, object] = dict(section.get("params", {}))
    unknown = sorted(set(params) - {"lr", "betas", "eps", "weight_decay"})
    if unknown:
        raise ConfigError(f"optimizer.params.{unknown[0]} in the DeepSpeed JSON is not supported; remove it.")
    curriculum = config.curriculum
    for flag in ("stage1_lr", "stage2_lr", "stage3_lr"):
        _agree(params, "lr", getattr(curriculum, flag), f"--{flag}", "optimizer.params.")
    _agree(params, "weight_decay", config.optim.weight_decay, "--weight_decay", "optimizer.params.")
    settings = OptimizerSettings(weight_decay=config.optim.weight_decay)
    betas, eps = params.get("betas", "auto"), params.get("eps", "auto")
    if betas != "auto":
        if not (isinstance(betas, list) and len(betas) == 2 and all(_is_fraction(b) for b in betas)):
            raise ConfigError(
                f"optimizer.params.betas is {betas!r} in the DeepSpeed JSON; "
                f"two numbers in [0, 1) are needed."
            )
        settings = OptimizerSettings(
            betas=(betas[0], betas[1]), eps=settings.eps, weight_decay=settings.weight_decay
        )
    if eps != "auto":
        if not (isinstance(eps, int | float) and eps > 0):
            raise ConfigError(
                f"optimizer.params.eps is {eps!r} in the DeepSpeed JSON; a positive number is needed."
            )
        settings = OptimizerSettings(betas=settings.betas, eps=float(eps), weight_decay=settings.weight_decay)
    return settings


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _check_scheduler(ds: JsonDict, config: TrainConfig) -> None:
    """Take the schedule out of the JSON: each stage has its own, from the flags; it must say the same."""
    section = ds.pop("scheduler", None)
    if section is None:
        return
    if not isinstance(section, dict) or section.get("type") not in _SCHEDULES:
        raise ConfigError(
            f"scheduler in the DeepSpeed JSON is {section!r}; supported types: {', '.join(_SCHEDULES)}."
        )
    wanted = config.optim.lr_scheduler_type
    if _SCHEDULES[str(section["type"])] != wanted:
        raise ConfigError(
            f"scheduler.type is {section['type']} in the DeepSpeed JSON, "
            f"but --lr_scheduler_type is {wanted}. "
            f"Change one of them, or remove the scheduler from the JSON."
        )
    params: Mapping[str, object] = dict(section.get("params", {}))
    parent = "scheduler.params."
    _agree(params, "warmup_num_steps", config.optim.warmup_steps, "--warmup_steps", parent)
    _agree(params, "warmup_min_lr", 0, "the schedule's start", parent)
    for flag in ("stage1_lr", "stage2_lr", "stage3_lr"):
        _agree(params, "warmup_max_lr", getattr(config.curriculum, flag), f"--{flag}", parent)
    for key in sorted(set(params) - {"warmup_num_steps", "warmup_min_lr", "warmup_max_lr"}):
        _agree(params, key, None, "the length of each stage", parent)


def _agree(params: Mapping[str, object], key: str, wanted: object, flag: str, parent: str) -> None:
    found = params.get(key, "auto")
    if found not in ("auto", wanted):
        gives = "decides it" if wanted is None else f"gives {json.dumps(wanted)}"
        raise ConfigError(
            f"{parent}{key} is {json.dumps(found)} in the DeepSpeed JSON, but {flag} {gives}. "
            f'Change one of them, or write "auto" in the JSON.'
        )


def _autos(node: object, path: str = "") -> Iterator[str]:
    """Paths of the `auto` values that are left."""
    if node == "auto":
        yield path
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _autos(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _autos(value, f"{path}[{i}]")
