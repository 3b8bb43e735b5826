"""From a `ModelConfig` to networks that are ready to train: the only module here that needs deepspeed."""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

from cad_mllm.config import ModelConfig
from cad_mllm.errors import ConfigError
from cad_mllm.model import presets
from cad_mllm.model.attention import BY_SAMPLE, BY_SAMPLE_FA2, BY_SAMPLE_FA4, has_flash_attention_4
from cad_mllm.model.encoders import (
    SYNTHETIC,
    EncoderNames,
    Encoders,
    FrozenEncoders,
    TrainedEncoders,
    build_encoders,
    describe,
    resolve_names,
)
from cad_mllm.model.image_encoder import IMAGE_MEAN, IMAGE_STD, unfreeze
from cad_mllm.model.kernels import (
    FusedLoraLinear,
    fuse_norms,
    has_liger,
    settle_attention,
    share_inputs,
    use_liger,
)
from cad_mllm.model.multimodal import MultimodalLM
from cad_mllm.model.projectors import EncodedProjector, build_projector
from cad_mllm.model.seeding import digest, private_rng

ADAPTER_NAME = "default"
_LOGIT_SCALINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Where configurations of transformers say that logits are more than what the head gives."""
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises for files that are missing, incomplete or of another kind."""


@dataclass(frozen=True, kw_only=True)
class LmSource:
    """Folders that take the place of what `llm_model_name` names: those of an export."""

    tokenizer: Path
    lm: Path | None
    """None: only the tokenizer is replaced."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """The networks of a run, and what the data must know about them."""

    model: MultimodalLM
    """What the engine trains and shards."""
    encoders: Encoders
    """What runs before the model; frozen ones are whole on every rank."""
    encoder_names: EncoderNames
    """Which ones they are."""
    tokenizer: PreTrainedTokenizerBase
    """With a pad token."""
    notes: tuple[str, ...]
    """One line each on what was loaded and what is random, for the person who started the run."""
    random_digests: Mapping[str, str]
    """sha256 of the frozen parts (`lm`, `image`, `point`) whose weights are random and can be made again."""
    vocab_size: int
    """V of the logits; at least the tokenizer's."""
    hidden_size: int
    """D of the LM."""
    image_size: int
    """Pixels of an image side."""
    image_mean: tuple[float, float, float]
    """Subtracted from pixels in [0, 1]."""
    image_std: tuple[float, float, float]
    """Then divided by this."""
    image_tokens: int
    """K of an image."""
    point_tokens: int
    """K of a point cloud."""
    num_points: int
    """P to which a cloud is sampled."""


def torch_dtype(config: ModelConfig) -> torch.dtype:
    """Name the run's dtype for torch."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]


def lm_shape(config: ModelConfig) -> tuple[int, int]:
    """(hidden size, intermediate size) of the LM, without building it. ConfigError: there is no such LM."""
    lm_config = read_lm_config(config.llm_model_name)
    hidden_size = int(lm_config.hidden_size)
    return hidden_size, int(getattr(lm_config, "intermediate_size", None) or 4 * hidden_size)


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device,
    zero3_config: dict[str, object] | None = None,
    allow_random_encoders: bool = False,
    source: LmSource | None = None,
    packed: bool = False,
    recomputed_layers: int | None = None,
    fused: bool = True,
) -> Built:
    """Build everything that the whole curriculum will use, in `config.dtype`, on `device`.

    Args:
        config: which networks.
        seed: of the initial LoRA and projector weights, equal on all ranks.
        device: where the encoders and (unless sharded) the model go.
        zero3_config: a DeepSpeed config without `auto`, stage 3: the LM is then sharded while it is
            built, except the small presets, which must be the same in every engine. The process
            group must exist.
        allow_random_encoders: use random encoders where `config` names none.
        source: folders to use in place of `config.llm_model_name`.
        packed: all batches will be packed, none padded.
        recomputed_layers: of gradient checkpointing, evenly spread; None: all decoder layers.
        fused: compute with fewer kernels where that can be; False: as transformers and peft do, to compare.

    The global random state is left as it was. ConfigError: something cannot be had, with its remedy.
    """
    check_attention(config, device, packed=packed)
    names = resolve_names(config, allow_random_encoders=allow_random_encoders)
    shard = zero3_config if config.llm_model_name not in presets.ON_THE_SPOT else None
    with private_rng(seed, device):
        return _build(config, names, seed, device, shard, source, packed, recomputed_layers, fused)


def _build(
    config: ModelConfig,
    names: EncoderNames,
    seed: int,
    device: torch.device,
    zero3_config: dict[str, object] | None,
    source: LmSource | None,
    packed: bool,
    recomputed_layers: int | None,
    fused: bool,
) -> Built:
    dtype = torch_dtype(config)
    settle_attention()
    # Before ZeRO-3 is switched on: transformers would shard the image encoder too.
    encoders = build_encoders(names, dtype)
    tokenizer = load_tokenizer(config.llm_model_name if source is None else str(source.tokenizer))
    with _sharded_construction(zero3_config):
        lm = _load_lm(config, dtype, device, source, packed)
        _check_lm(config, lm, tokenizer, packed)
        random_digests = _random_digests(config, names, encoders, lm)
        trained_lm: nn.Module = _add_lora(lm, config, seed=seed, fused=fused) if config.use_lora else lm
    _restore_frequencies(lm)
    notes = [_describe_lm(config)]
    if fused and device.type == "cuda":
        fuse_norms(lm)
        if has_liger() and use_liger(lm):
            notes.append("gates and rotary embeddings: Liger's kernels")
        if lm.config._attn_implementation == BY_SAMPLE_FA4:
            notes.append("attention of packed rows: flash-attn 4")
    if config.use_gradient_checkpointing:
        recomputed, layers = _checkpoint_activations(lm, recomputed_layers)
        notes.append(f"gradient checkpointing: {recomputed} of {layers} layers are recomputed")
    hidden_size = int(lm.config.hidden_size)
    points = build_projector(encoders.point_width, hidden_size, seed=seed + 1, dtype=dtype)
    image = build_projector(encoders.image_width, hidden_size, seed=seed + 2, dtype=dtype)
    model = MultimodalLM(
        trained_lm,
        EncodedProjector(encoders.point.requires_grad_(), points) if config.train_encoders else points,
        EncodedProjector(unfreeze(encoders.image), image) if config.train_encoders else image,
    )
    return Built(
        model=model.to(device).train(),
        encoders=TrainedEncoders() if config.train_encoders else encoders.to(device),
        encoder_names=names,
        tokenizer=tokenizer,
        notes=(*notes, *describe(config, names)),
        random_digests=random_digests,
        vocab_size=int(lm.config.vocab_size),
        hidden_size=hidden_size,
        image_size=encoders.image.image_size,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        image_tokens=encoders.image.num_tokens,
        point_tokens=encoders.point.config.num_tokens,
        num_points=encoders.point.config.num_points,
    )


def check_attention(config: ModelConfig, device: torch.device, *, packed: bool) -> None:
    """Refuse (ConfigError) an attention kernel that cannot run on the device or in the config's dtype."""
    if config.attn_implementation != "flash_attention_2":
        if packed and device.type == "cuda" and config.dtype != "bfloat16":
            raise ConfigError(f"--pack_tokens on a GPU needs --dtype bfloat16, not {config.dtype}")
        return
    remedy = "use --attn_implementation sdpa"
    if device.type != "cuda":
        raise ConfigError(f"flash_attention_2 needs a GPU, this run is on the {device.type}: {remedy}")
    if not is_flash_attn_2_available():
        raise ConfigError(f"flash_attention_2 needs the flash-attn package: {remedy}, or pip install .[gpu]")
    if config.dtype != "bfloat16":
        raise ConfigError(f"flash_attention_2 needs --dtype bfloat16, not {config.dtype}; or {remedy}")


@contextmanager
def _sharded_construction(zero3_config: dict[str, object] | None) -> Iterator[None]:
    """Make transformers partition each parameter as it is created, inside the block only.

    transformers holds the config weakly and reads it while a model is built, loaded or resized; training
    does not need it, so nothing of it outlives the block.
    """
    if zero3_config is None:
        yield
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("ZeRO-3 needs DeepSpeed, which is not installed: pip install deepspeed")
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # zero.Init asks DeepSpeed, not torch, for the world size.
    deepspeed.init_distributed()

    alive = HfDeepSpeedConfig(zero3_config)
    assert alive.is_zero3(), "zero3_config is not of stage 3"
    yield
    del alive


def _restore_frequencies(lm: PreTrainedModel) -> None:
    """Give rotary embeddings the same frequencies however the model was built: in fp32, computed on the CPU.

    While one is built sharded, DeepSpeed makes every floating-point tensor in the dtype of the run.
    transformers keeps RoPE's frequencies out of that, but not in all versions (5.17): rounded to bf16 they
    turn position 2,000 by some radians, and what is trained so is used with others.
    """
    for module in list(lm.modules()):
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            exact = type(module)(module.config)
            for name, buffer in exact.named_buffers(recurse=False):
                setattr(module, name, buffer)


def _whole(parameter: Tensor) -> AbstractContextManager[object]:
    """A parameter that ZeRO-3 shares out is whole inside the block; after it, as rank 0 has left it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)
    return gathered


def read_lm_config(name: str) -> PretrainedConfig:
    """The architecture of the LM of that name, without building it. ConfigError: there is no such LM."""
    if name in presets.PRESETS:
        return presets.lm_config(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise _cannot_load(name, "configuration", error) from error
    return config.get_text_config()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a preset, a local folder or a hub name. Raises ConfigError for one of no use."""
    if name in presets.PRESETS:
        return presets.byte_tokenizer()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise _cannot_load(name, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"--llm_model_name {name}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _packed_attention(implementation: str) -> str:
    """What takes an implementation's place for packed rows. The eager one builds a mask of T x T then."""
    match implementation:
        case "sdpa":
            return BY_SAMPLE
        case "flash_attention_2":
            return BY_SAMPLE_FA4 if has_flash_attention_4() else BY_SAMPLE_FA2
    return implementation


def _load_lm(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, source: LmSource | None, packed: bool
) -> PreTrainedModel:
    exported = source.lm if source is not None else None
    name = config.llm_model_name if exported is None else str(exported)
    attention: str = config.attn_implementation
    if packed:
        attention = _packed_attention(attention)
    if name in presets.ON_THE_SPOT:
        return presets.on_the_spot(name, dtype, attention)
    if name == presets.QWEN3_8B_RANDOM:
        return presets.qwen3_8b_random(dtype, attention, device, _whole)
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except _LOADING_ERRORS as error:
        raise _cannot_load(name, "model", error) from error
    # transformers fills what a file lacks with random numbers.
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise ConfigError(f"--llm_model_name {name} lacks weights, first {missing}")
    assert isinstance(lm, PreTrainedModel)
    return lm


def _cannot_load(name: str, what: str, error: Exception) -> ConfigError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(
        f"--llm_model_name {name}: its {what} cannot be loaded ({first_line}); give a local folder with a "
        "causal LM (config.json, model.safetensors, tokenizer files), a hub name on a machine with network "
        f"access or a filled hub cache, or a preset ({', '.join(presets.PRESETS)})"
    )


def _check_lm(
    config: ModelConfig, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packed: bool
) -> None:
    if not isinstance(lm.get_output_embeddings(), nn.Linear) or lm.base_model is lm:
        raise ConfigError(
            f"--llm_model_name {config.llm_model_name}: {type(lm).__name__} is not a decoder with a linear "
            "head; use a decoder-only LM such as Qwen/Qwen3-8B"
        )
    scaling = next((name for name in _LOGIT_SCALINGS if getattr(lm.config, name, None)), None)
    if scaling is not None:
        raise ConfigError(
            f"--llm_model_name {config.llm_model_name}: its logits are scaled after the head ({scaling}), "
            "which is not supported; use an LM such as Qwen/Qwen3-8B"
        )
    if packed and getattr(lm.config, "sliding_window", None) and config.attn_implementation == "sdpa":
        raise ConfigError(
            f"--llm_model_name {config.llm_model_name}: its attention has a sliding window: with "
            "--pack_tokens use --attn_implementation flash_attention_2 or eager"
        )
    if len(tokenizer) > lm.config.vocab_size:
        raise ConfigError(
            f"--llm_model_name {config.llm_model_name}: its tokenizer has {len(tokenizer)} tokens, "
            f"its model {lm.config.vocab_size}: they do not belong together"
        )


def _random_digests(
    config: ModelConfig, names: EncoderNames, encoders: FrozenEncoders, lm: PreTrainedModel
) -> dict[str, str]:
    digests = {}
    if config.use_lora and config.llm_model_name in presets.ON_THE_SPOT:
        digests["lm"] = digest(lm)
    if config.train_encoders:
        return digests  # their weights are kept
    if names.image in SYNTHETIC:
        digests["image"] = digest(encoders.image)
    if names.point in SYNTHETIC:
        digests["point"] = digest(encoders.point)
    return digests


def _add_lora(lm: PreTrainedModel, config: ModelConfig, *, seed: int, fused: bool) -> nn.Module:
    """Wrap the LM with adapters on every linear layer but the head, drawn from `seed` in fp32 on the CPU."""
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    if fused:
        lora._register_custom_module({nn.Linear: FusedLoraLinear})
    # ZeRO-3 needs one dtype over all trainable weights: no fp32 adapters beside a bf16 base.
    with warnings.catch_warnings():
        # peft asks transformers by a name that is being replaced.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        wrapped: nn.Module = get_peft_model(lm, lora, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    share_inputs(wrapped)
    dtype = torch_dtype(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        # Drawn again here, because what peft draws depends on the device that the base weights are on.
        value = torch.zeros(parameter.shape)
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            value.uniform_(-bound, bound, generator=generator)
        parameter.data = value.to(parameter.device, dtype)
    return wrapped


def _checkpoint_activations(lm: PreTrainedModel, wanted: int | None) -> tuple[int, int]:
    """Switch gradient checkpointing on, for so many layers: (how many, of how many).

    After LoRA, or peft makes the embeddings require gradients.
    """
    with warnings.catch_warnings():
        # Newer versions of transformers call it activation checkpointing; this name is in all of them.
        warnings.simplefilter("ignore", FutureWarning)
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    recomputed = len(layers) if wanted is None else min(wanted, len(layers))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = (number + 1) * recomputed // len(layers) > number * recomputed // len(
            layers
        )
    return recomputed, len(layers)


def _describe_lm(config: ModelConfig) -> str:
    training = f"LoRA r={config.lora_r}" if config.use_lora else "all weights train"
    if config.llm_model_name in presets.PRESETS:
        return f"language model: RANDOM weights, preset `{config.llm_model_name}` ({training})"
    return f"language model: {config.llm_model_name} ({training})"
