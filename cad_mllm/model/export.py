"""Trained weights on disk, in the forms in which other tools load them.

<folder>/cad_mllm.json            configuration of the networks, sequence settings, digests of random parts
         projectors.safetensors   both projectors
         tokenizer/               as transformers saves it
         adapter/                 LoRA: as `peft` saves it, or
         lm/                      full fine-tuning: as transformers saves a causal LM
"""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cad_mllm.config import ModelConfig
from cad_mllm.errors import CheckpointError
from cad_mllm.model import presets
from cad_mllm.model.build import ADAPTER_NAME, Built, LmSource, build_model, torch_dtype
from cad_mllm.model.multimodal import MultimodalLM, parameter_groups
from cad_mllm.model.names import stored_name

MANIFEST = "cad_mllm.json"
_VERSION = 1
_PROJECTORS, _ADAPTER, _LM, _TOKENIZER = "projectors.safetensors", "adapter", "lm", "tokenizer"
_ADAPTER_FILE = "adapter_model.safetensors"
_LM_PREFIX = "lm."
_ADAPTER_INFIX = f".{ADAPTER_NAME}."
_MAX_SHARD = "5GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export folder holds, ready to generate."""

    built: Built
    """In evaluation mode."""
    config: ModelConfig
    sequence: Mapping[str, Any]
    """The sequence settings that `export_weights` was given."""


def export_weights(
    folder: Path,
    built: Built,
    config: ModelConfig,
    sequence: Mapping[str, object],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the trained weights into `folder`, in the dtype that the model computes in.

    Args:
        folder: an existing, empty folder.
        built: used for its structure and tokenizer only; its live weights may be shards and are not read.
        config: of the run; names that the run resolved itself are written out.
        sequence: JSON-able settings that generation needs to make the sequences of the training.
        tensors: every trainable parameter of `built.model`, by its name in `parameter_groups`, whole, on the
            CPU.

    An OSError (a full disk) is left to the caller.
    """
    assert tensors.keys() == _trainable(built.model).keys(), (
        "every trainable parameter, and nothing else, is exported"
    )
    cast = {name: value.to(torch_dtype(config)).contiguous() for name, value in tensors.items()}
    lm_tensors = {
        name.removeprefix(_LM_PREFIX): value for name, value in cast.items() if name.startswith(_LM_PREFIX)
    }
    save_file(
        {name: value for name, value in cast.items() if not name.startswith(_LM_PREFIX)}, folder / _PROJECTORS
    )
    with _quiet_transformers():
        built.tokenizer.save_pretrained(folder / _TOKENIZER)
        if config.use_lora:
            _write_adapter(folder / _ADAPTER, built.model.lm, _resolved(config.llm_model_name), lm_tensors)
        else:
            assert isinstance(built.model.lm, PreTrainedModel)
            built.model.lm.save_pretrained(folder / _LM, state_dict=lm_tensors, max_shard_size=_MAX_SHARD)
    manifest = {
        "version": _VERSION,
        "model": dataclasses.asdict(_explicit(config, built)),
        "sequence": dict(sequence),
        "random_digests": dict(built.random_digests),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def load_exported(folder: Path, device: torch.device) -> Exported:
    """Build the networks of an export folder on `device`, with its weights.

    Raises:
        CheckpointError: something is missing, damaged, or belongs to other weights.
        ConfigError: the base model or an encoder that it names cannot be had here.
    """
    config, sequence, digests = _read_manifest(folder / MANIFEST)
    if config.use_lora and config.llm_model_name == presets.QWEN3_8B_RANDOM:
        raise CheckpointError(
            f"{folder}: its base `{presets.QWEN3_8B_RANDOM}` has random weights that are not kept; "
            "that preset is for timing, train on a real model to generate"
        )
    for path in (folder / _TOKENIZER, folder / (_ADAPTER if config.use_lora else _LM), folder / _PROJECTORS):
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the checkpoint is not whole, use another one")
    source = LmSource(tokenizer=folder / _TOKENIZER, lm=None if config.use_lora else folder / _LM)
    with _quiet_transformers():
        built = build_model(config, seed=0, device=device, source=source)
    for part, expected in digests.items():
        if built.random_digests.get(part) != expected:
            raise CheckpointError(
                f"{folder}: the random weights of `{part}` are other ones here than where it was trained; "
                "use the versions of torch and transformers that it was trained with (constraints.txt)"
            )
    tensors = _read_tensors(folder / _PROJECTORS)
    if config.use_lora:
        adapter = _read_tensors(folder / _ADAPTER / _ADAPTER_FILE)
        tensors |= {_LM_PREFIX + _live_name(name): value for name, value in adapter.items()}
    _load_strictly(built.model, tensors, folder, skip=() if config.use_lora else (_LM_PREFIX,))
    built.model.eval()
    return Exported(built=built, config=config, sequence=sequence)


def _trainable(model: MultimodalLM) -> dict[str, nn.Parameter]:
    return {name: parameter for group in parameter_groups(model).values() for name, parameter in group}


def _write_adapter(folder: Path, lm: nn.Module, base_name: str, tensors: Mapping[str, Tensor]) -> None:
    assert isinstance(lm, PeftModel)
    folder.mkdir()
    adapter_config = copy.copy(lm.peft_config[ADAPTER_NAME])
    adapter_config.base_model_name_or_path = base_name
    adapter_config.inference_mode = True
    adapter_config.save_pretrained(str(folder))
    # peft's files leave the adapter's name out.
    plain = {name.replace(_ADAPTER_INFIX, "."): value for name, value in tensors.items()}
    save_file(plain, folder / _ADAPTER_FILE, metadata={"format": "pt"})


def _live_name(name: str) -> str:
    """Put the adapter's name back: `...lora_A.weight` to `...lora_A.default.weight`."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}{_ADAPTER_INFIX}{leaf}"


def _resolved(name: str) -> str:
    """Make a local path absolute, so that the export is good from any working directory."""
    path = Path(name).expanduser()
    is_local = name not in presets.PRESETS and path.exists()
    return str(path.resolve()) if is_local else name


def _explicit(config: ModelConfig, built: Built) -> ModelConfig:
    """Write out what the run resolved itself, and leave out how it was trained."""
    return dataclasses.replace(
        config,
        llm_model_name=_resolved(config.llm_model_name),
        vision_model_name=_resolved(built.encoder_names.image),
        point_encoder=_resolved(built.encoder_names.point),
        use_gradient_checkpointing=False,
        attn_implementation="sdpa",
    )


def _read_manifest(path: Path) -> tuple[ModelConfig, dict[str, Any], dict[str, str]]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise CheckpointError(f"{path}: version {manifest['version']}, this program reads {_VERSION}")
        return ModelConfig(**manifest["model"]), dict(manifest["sequence"]), dict(manifest["random_digests"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {path.parent} is not an export of this program") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {stored_name(name): value for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error})") from error


def _load_strictly(
    model: MultimodalLM, tensors: Mapping[str, Tensor], folder: Path, skip: tuple[str, ...]
) -> None:
    """Copy `tensors` into the trainable parameters of the same names; nothing may be missing or left over."""
    wanted = {name: parameter for name, parameter in _trainable(model).items() if not name.startswith(skip)}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if name in wanted else "has an unknown"
        raise CheckpointError(f"{folder} {what} weight {name}: it belongs to another model or is damaged")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if tensors[name].shape != parameter.shape:
                shapes = f"{tuple(tensors[name].shape)}, the model's has {tuple(parameter.shape)}"
                raise CheckpointError(f"{folder}: {name} has shape {shapes}")
            parameter.copy_(tensors[name])


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars in the log of a training run."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
