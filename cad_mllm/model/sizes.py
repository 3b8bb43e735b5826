"""How many parameters a run has, from the LM's configuration: for estimates before anything is built."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from cad_mllm.config import ModelConfig
from cad_mllm.model import image_encoder, presets
from cad_mllm.model.build import read_lm_config
from cad_mllm.model.point_encoder import TINY as TINY_POINTS
from cad_mllm.model.point_encoder import PointEncoderConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of the LM and both projectors; the frozen encoders are not counted."""

    total: int
    trainable: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count for a dense decoder with gated MLP (Qwen, Llama); for another architecture an estimate.

    With D hidden, I intermediate, V vocabulary, L layers, H heads and G key-value heads of E channels:

        LM         V D (x 2 unless the head is tied) + L (2 D E (H + G) + 3 D I + 2 D) + D
        LoRA       r L (4 D + 2 E (H + G) + 3 (D + I))
        projector  W D + D^2 + 2 D + 2 W, for an encoder of width W

    LoRA and the projectors train, or everything does. ConfigError: there is no such LM.
    """
    lm_config = read_lm_config(config.llm_model_name)
    hidden = int(lm_config.hidden_size)
    projectors = sum(_projector(width, hidden) for width in _encoder_widths(config))
    lm, lora = _lm(lm_config), _lora(lm_config, config.lora_r)
    if config.use_lora:
        return ParameterCounts(total=lm + lora + projectors, trainable=lora + projectors)
    return ParameterCounts(total=lm + projectors, trainable=lm + projectors)


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


def _encoder_widths(config: ModelConfig) -> tuple[int, int]:
    """Those of the encoders that the run uses if it names none; others are taken to be as wide."""
    if config.llm_model_name == presets.TINY:
        return int(image_encoder.tiny_config().hidden_size), TINY_POINTS.width
    return int(image_encoder.large_config().hidden_size), PointEncoderConfig().width
