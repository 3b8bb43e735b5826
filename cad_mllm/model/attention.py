"""Attention among the tokens of one sample only, where several samples stand in one row.

Shapes: T tokens of the row, H query heads, G key-value heads (H a multiple of G), E channels of a head.
"""

import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

BY_SAMPLE = "by_sample"
"""The name under which transformers knows it. It builds no mask for it."""
BY_SAMPLE_FA2 = "by_sample_fa2"
"""The same by the flash-attn package."""
BY_SAMPLE_FA4 = "by_sample_fa4"
"""The same by the flash-attn-4 package: CuTe kernels, compiled at first use."""
_FA4_CAPABILITIES = (9, 10)
"""Hopper and Blackwell."""
_FA4_ONE_KERNEL = 256
"""flash-attn-4 compiles other kernels where the longest sample fits one tile. The length is a key of its
caches and nothing more: a longer one is always right."""


def attention_by_sample(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within [cu_seq_lens_q[d], cu_seq_lens_q[d + 1]) for each sample d: (1, T, H, E).

    On CUDA torch's variable-length flash attention (bf16), elsewhere its attention sample by sample.
    """
    assert attention_mask is None and dropout == 0.0
    queries_per_key = query_1HTE.shape[1] // key_1GTE.shape[1]
    key_1HTE = key_1GTE.repeat_interleave(queries_per_key, dim=1)
    value_1HTE = value_1GTE.repeat_interleave(queries_per_key, dim=1)
    if query_1HTE.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (_tokens_first(t) for t in (query_1HTE, key_1HTE, value_1HTE))
        borders, longest = cu_seq_lens_q, max_length_q
        out_THE = varlen_attn(
            query, key, value, borders, borders, longest, longest, scale=scaling, window_size=(-1, 0)
        )
        assert isinstance(out_THE, Tensor)
        return out_THE[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in zip(
            *(t.split(lengths, dim=2) for t in (query_1HTE, key_1HTE, value_1HTE)), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def flash_attention_by_sample(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `attention_by_sample`, by flash-attn itself.

    transformers' own way to it took 20 to 40 ms of the host in a step of 36 layers that are recomputed.
    """
    from flash_attn import flash_attn_varlen_func

    assert attention_mask is None
    query, key, value = (_tokens_first(t) for t in (query_1HTE, key_1GTE, value_1GTE))
    borders, longest = cu_seq_lens_q, max_length_q
    out_THE: Tensor = flash_attn_varlen_func(
        query, key, value, borders, borders, longest, longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(sliding_window - 1, 0) if sliding_window else (-1, -1),
        softcap=softcap or 0.0,
    )  # fmt: skip
    return out_THE[None], None


@cache
def has_flash_attention_4() -> bool:
    """Whether flash-attn-4 is installed and made for this GPU.

    The wheel of flash-attn 2 has an old `flash_attn/cute` of its own: so the distribution is asked for.
    Measured on an H200, forward and backward, 32 heads of 128 channels on 8: two samples of 4,096 tokens
    take 1.83 ms instead of 3.33, four of 2,048 1.10 instead of 1.89, thirty in 8,192 .64 instead of .86.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in _FA4_CAPABILITIES:
        return False
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec("cutlass") is not None


def flash_attention_4_by_sample(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `flash_attention_by_sample`, by flash-attn-4."""
    from flash_attn.cute import flash_attn_varlen_func

    assert attention_mask is None and dropout == 0.0
    query, key, value = (_tokens_first(t) for t in (query_1HTE, key_1GTE, value_1GTE))
    longest = max(max_length_q, _FA4_ONE_KERNEL)
    out_THE, _lse = flash_attn_varlen_func(  # by name: its fourth argument is another one than flash-attn 2's
        query, key, value,
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_q,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
        window_size=(sliding_window - 1, 0) if sliding_window else (None, None),
        softcap=softcap or 0.0,
    )  # fmt: skip
    return out_THE[None], None


def _tokens_first(heads_1HTE: Tensor) -> Tensor:
    """(T, H, E), as a view; the gradient of an index would be a copy into zeros, with the heads first."""
    return heads_1HTE.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(BY_SAMPLE, attention_by_sample)
AttentionInterface.register(BY_SAMPLE_FA2, flash_attention_by_sample)
AttentionInterface.register(BY_SAMPLE_FA4, flash_attention_4_by_sample)
