"""Models that need no download: random weights and a byte-level tokenizer, built on the spot."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from cad_mllm.model.seeding import FROZEN_SEED, private_rng, redraw_

TINY, SMALL = "tiny", "small"
QWEN3_8B_RANDOM = "qwen3-8b-random"
PRESETS = (TINY, SMALL, QWEN3_8B_RANDOM)
ON_THE_SPOT = (TINY, SMALL)
"""Drawn on the CPU, equal bits everywhere; their encoders have the same names."""

_PAD, _EOS = "<pad>", "<eos>"
_TINY_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": 16384,
}
_SMALL_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 16384,
}
_TINY_HEAD_STD = 0.1
"""LoRA never changes the head: with Qwen3's .02 no logit could exceed 2.6, and no loss fall below 3."""
_QWEN3_8B_SIZES: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (id = the byte), then `<pad>` (256) and `<eos>` (257). No BOS."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_PAD, special=True), AddedToken(_EOS, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS, clean_up_tokenization_spaces=False
    )


def lm_config(name: str) -> Qwen3Config:
    """Give the architecture of a preset: all are Qwen3."""
    tokenizer = byte_tokenizer()
    sizes = {TINY: _TINY_SIZES, SMALL: _SMALL_SIZES, QWEN3_8B_RANDOM: _QWEN3_8B_SIZES}[name]
    return Qwen3Config(
        **sizes,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def on_the_spot(name: str, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Build `tiny` (.9M parameters) or `small` (25M) on the CPU, drawn in fp32, then rounded."""
    config = lm_config(name)
    head_std = _TINY_HEAD_STD if name == TINY else config.initializer_range
    # Built in its dtype, not cast afterwards: that would round the frequencies of the rotary embedding too.
    with private_rng(FROZEN_SEED):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    redraw_(lm, lambda name, matrix: head_std if name == "lm_head.weight" else config.initializer_range)
    return lm


def qwen3_8b_random(
    dtype: torch.dtype,
    attn_implementation: str,
    device: torch.device,
    whole: Callable[[Tensor], AbstractContextManager[object]],
) -> PreTrainedModel:
    """Build Qwen3-8B's shape with random weights, for timing; sharded where ZeRO-3 is switched on.

    The weights are drawn on the device and depend on it: adapters trained on them mean nothing elsewhere.
    Sharded or not they are the same (`whole` as in `redraw_`): transformers draws them in another order then.
    """
    config = lm_config(QWEN3_8B_RANDOM)
    with private_rng(FROZEN_SEED, device), device:
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    redraw_(lm, lambda name, matrix: config.initializer_range, device=device, whole=whole)
    return lm


def _byte_alphabet() -> list[str]:
    """Give the printable character by which byte-level tokenizers write each of the 256 bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
