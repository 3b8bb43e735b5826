"""How many parameters a run has, from the LM's configuration: for estimates before anything is built."""

from dataclasses import dataclass

import torch
from transformers import Dinov2Model, PretrainedConfig

from cad_mllm.config import ModelConfig
from cad_mllm.model.build import read_lm_config
from cad_mllm.model.encoders import image_config, point_config, resolve_names
from cad_mllm.model.point_encoder import PointEncoder


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of the LM, both projectors, and the encoders if they train."""

    total: int
    trainable: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count for a dense decoder with gated MLP (Qwen, Llama); for another architecture an estimate.

    With D hidden, I intermediate, V vocabulary, L layers, H heads and G key-value heads of E channels:

        LM         V D (x 2 unless the head is tied) + L (2 D E (H + G) + 3 D I + 2 D) + D
        LoRA       r L (4 D + 2 E (H + G) + 3 (D + I))
        projector  W D + D^2 + 2 D + 2 W, for an encoder of width W

    LoRA and the projectors train (with their encoders, under --train_encoders), or everything does.
    ConfigError: there is no such LM.
    """
    lm_config = read_lm_config(config.llm_model_name)
    hidden = int(lm_config.hidden_size)
    projectors = _projectors(config, hidden)
    lm, lora = _lm(lm_config), _lora(lm_config, config.lora_r)
    if config.use_lora:
        return ParameterCounts(total=lm + lora + projectors, trainable=lora + projectors)
    return ParameterCounts(total=lm + projectors, trainable=lm + projectors)


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """What the decoder layers of the LM hold."""

    num_layers: int
    parameters: int
    """Of one layer, with its adapters."""
    head_parameters: int
    """V D: of the head, and of the embeddings."""
    input_bytes: int
    """Per token: what is kept of a layer that is recomputed."""
    activation_bytes: int
    """Per token: what is kept of a layer that is not."""


def layer_sizes(config: ModelConfig, *, fused: bool) -> LayerSizes:
    """Sizes of a decoder with gated MLP and normed queries and keys (Qwen3), more than of Llama or Qwen2.

    A layer keeps for its backward pass, in bytes per token of a bf16 run, with the letters of
    `parameter_counts`, A = E H and K = E G:

        LoRA    12 D + 14 A + 4 K + 8 I + 14 r
        full    16 D + 16 A + 6 K + 8 I
        fused    8 D +  6 A + 6 K + 6 I + 14 r (LoRA)

    The first two are measured on a CPU (fp32 copies in the norms and repeated key-value heads included).
    `fused`: norms, gates and rotary embeddings are Liger's and attention is flash-attn's, which keep their
    inputs alone. Of 8B with LoRA that is 138 kB, which is what steps of 16,384 tokens took on H200s.

    ConfigError: there is no such LM.
    """
    lm_config = read_lm_config(config.llm_model_name)
    hidden, intermediate, attention, layers = _shape(lm_config)
    heads = int(lm_config.num_attention_heads)
    key_value_heads = int(getattr(lm_config, "num_key_value_heads", None) or heads)
    keys = attention * key_value_heads // (heads + key_value_heads)
    queries = attention - keys
    if fused:
        low_rank = 14 * config.lora_r if config.use_lora else 0
        kept = 8 * hidden + 6 * queries + 6 * keys + 6 * intermediate + low_rank
    elif config.use_lora:
        kept = 12 * hidden + 14 * queries + 4 * keys + 8 * intermediate + 14 * config.lora_r
    else:
        kept = 16 * hidden + 16 * queries + 6 * keys + 8 * intermediate
    adapters = _lora(lm_config, config.lora_r) // layers if config.use_lora else 0
    width = 1 if config.dtype == "bfloat16" else 2
    return LayerSizes(
        num_layers=layers,
        parameters=2 * hidden * attention + 3 * hidden * intermediate + 2 * hidden + adapters,
        head_parameters=int(lm_config.vocab_size) * hidden,
        input_bytes=2 * hidden * width,
        activation_bytes=kept * width,
    )


def _lm(lm: PretrainedConfig) -> int:
    hidden, intermediate, attention, layers = _shape(lm)
    embeddings = int(lm.vocab_size) * hidden * (1 if getattr(lm, "tie_word_embeddings", False) else 2)
    layer = 2 * hidden * attention + 3 * hidden * intermediate + 2 * hidden
    return embeddings + layers * layer + hidden


def _lora(lm: PretrainedConfig, rank: int) -> int:
    hidden, intermediate, attention, layers = _shape(lm)
    return rank * layers * (4 * hidden + 2 * attention + 3 * (hidden + intermediate))


def _shape(lm: PretrainedConfig) -> tuple[int, int, int, int]:
    """D, I, E (H + G), L."""
    hidden, heads = int(lm.hidden_size), int(lm.num_attention_heads)
    key_value_heads = int(getattr(lm, "num_key_value_heads", None) or heads)
    channels = int(getattr(lm, "head_dim", None) or hidden // heads)
    intermediate = int(getattr(lm, "intermediate_size", None) or 4 * hidden)
    return hidden, intermediate, channels * (heads + key_value_heads), int(lm.num_hidden_layers)


def _projector(width: int, hidden: int) -> int:
    return width * hidden + hidden**2 + 2 * hidden + 2 * width


def _projectors(config: ModelConfig, hidden: int) -> int:
    """Both, with the encoders that train; an encoder that is not of a preset is taken to be full-size."""
    names = resolve_names(config, allow_random_encoders=True)
    image, points = image_config(names.image), point_config(names.point)
    count = _projector(int(image.hidden_size), hidden) + _projector(points.width, hidden)
    if config.train_encoders:
        with torch.device("meta"):
            encoders = (Dinov2Model(image), PointEncoder(points))
        count += sum(p.numel() for encoder in encoders for p in encoder.parameters())
    return count
