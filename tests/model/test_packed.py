"""Samples in one row do not see each other: loss and gradients are those of the samples alone."""

import sys
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available

from cad_mllm.data.collate import Sample, collate, pack
from cad_mllm.data.sequence import SequenceSpec
from cad_mllm.errors import ConfigError
from cad_mllm.model.attention import (
    attention_by_sample,
    flash_attention_4_by_sample,
    has_flash_attention_4,
)
from cad_mllm.model.build import Built, build_model, check_attention
from cad_mllm.train.rehearsal import PROJECTORS, micro_batch_loss
from tests.model.conftest import CPU, Case, shake, tiny_config

COMBOS = {
    "text": Case(1),
    "text+points": Case(2, points=True, prompt=15),
    "text+image": Case(3, image=True, target=11),
    "text+points+image": Case(4, image=True, points=True, prompt=3),
}


@cache
def built(attention: str, packed: bool, lora: bool = True) -> Built:
    config = tiny_config(attn_implementation=attention, use_lora=lora)
    result = build_model(config, seed=3, device=CPU, packed=packed)
    if lora:
        shake(result.model)
    return result


def spec_of(model: Built) -> SequenceSpec:
    return SequenceSpec(
        image_tokens=model.image_tokens,
        image_size=model.image_size,
        image_mean=model.image_mean,
        image_std=model.image_std,
        point_tokens=model.point_tokens,
        num_points=model.num_points,
        max_seq_length=2048,
    )


def samples() -> list[Sample]:
    return [
        Sample(
            id=combo,
            combo=combo,  # type: ignore[arg-type]
            bos=[],
            prompt=case.prompt,
            target=case.target,
            image_3HW=None if case.image is None else case.image.numpy(),
            points_PC=None if case.points is None else case.points.numpy(),
        )
        for combo, case in COMBOS.items()
    ]


def total_length(model: Built) -> int:
    return int(collate(samples(), spec_of(model), 256).attention_mask_BT.sum())


def loss_and_gradients(model: Built, *batches: object) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of each batch, and the gradients of their sum."""
    model.model.zero_grad()
    losses = []
    for batch in batches:
        loss = micro_batch_loss(model.model, model.encoders, batch, CPU, trainable=PROJECTORS)  # type: ignore[arg-type]
        loss.backward()
        losses.append(float(loss.detach()))
    grads = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}
    return losses, grads


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("room", [0, 50], ids=["full", "with room"])
def test_a_pack_of_all_combinations_learns_what_its_samples_learn_alone(
    attention: str, room: int, lora: bool
) -> None:
    model, reference = built(attention, True, lora), built("sdpa", False, lora)
    spec = spec_of(model)
    alone, expected = loss_and_gradients(reference, *(collate([s], spec, 256) for s in samples()))
    together, gradients = loss_and_gradients(model, pack(samples(), spec, 256, total_length(model) + room))
    assert together[0] == pytest.approx(sum(alone), rel=1e-6)
    assert_same(gradients, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("combo", COMBOS)
def test_what_stands_beside_a_sample_does_not_change_its_loss(attention: str, combo: str) -> None:
    """Exactly: the neighbours' content is replaced, its gradient must be zero."""
    model = built(attention, True)
    spec, everything = spec_of(model), samples()
    number = list(COMBOS).index(combo)
    only_this = [Sample(**{**vars(s), "supervised": i == number}) for i, s in enumerate(everything)]
    changed = [
        s if i == number else Sample(**{**vars(s), "prompt": [(t + 1) % 256 for t in s.prompt]})
        for i, s in enumerate(only_this)
    ]
    length = total_length(model) + 5
    (before,), _ = loss_and_gradients(model, pack(only_this, spec, 256, length))
    (after,), _ = loss_and_gradients(model, pack(changed, spec, 256, length))
    assert before == after


def test_the_order_in_a_pack_does_not_matter() -> None:
    model = built("sdpa", True)
    spec, length = spec_of(model), total_length(model)
    (one,), first = loss_and_gradients(model, pack(samples(), spec, 256, length))
    (other,), second = loss_and_gradients(model, pack(samples()[::-1], spec, 256, length))
    assert one == pytest.approx(other, rel=1e-6)
    assert_same(second, first)


def test_a_pack_says_where_its_samples_stand() -> None:
    spec = SequenceSpec(
        image_tokens=3, image_size=8, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
        point_tokens=2, num_points=5, max_seq_length=64,
    )  # fmt: skip
    text = Sample(id="a", combo="text", bos=[7], prompt=[1, 2], target=[20, 21])
    cloud = Sample(
        id="b", combo="text+points", bos=[7], prompt=[3], target=[22],
        points_PC=np.zeros((5, 6), np.float32),
    )  # fmt: skip
    batch = pack([text, cloud], spec, 0, 14)
    assert batch.tokens_BT.tolist() == [[7, 1, 2, 20, 21, 7, 0, 0, 3, 22, 0, 0, 0, 0]]
    assert batch.labels_BT.tolist() == [[-100] * 3 + [20, 21] + [-100] * 4 + [22] + [-100] * 4]
    assert batch.loss_rows.tolist() == [2, 3, 8]
    assert batch.point_rows.tolist() == [6, 7] and batch.num_supervised == 3
    assert batch.packed is not None
    assert batch.packed.position_ids_1T.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.packed.cu_seqlens.tolist() == [0, 5, 10, 14]
    assert batch.packed.cu_seqlens.dtype == torch.int32
    assert batch.packed.longest == 5
    exact = pack([text, cloud], spec, 0, 10)
    assert exact.packed is not None and exact.packed.cu_seqlens.tolist() == [0, 5, 10]


def test_a_gpu_packs_in_bfloat16_only() -> None:
    cuda = torch.device("cuda")
    check_attention(tiny_config(dtype="bfloat16"), cuda, packed=True)
    check_attention(tiny_config(), cuda, packed=False)
    with pytest.raises(ConfigError, match="--pack_tokens on a GPU needs --dtype bfloat16"):
        check_attention(tiny_config(), cuda, packed=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_on_a_gpu_a_pack_learns_what_its_samples_learn_alone(attention: str) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    cuda, grads, losses = torch.device("cuda"), [], []
    for packed, kernel in ((True, attention), (False, "sdpa")):
        config = tiny_config(attn_implementation=kernel, dtype="bfloat16")
        model = build_model(config, seed=3, device=cuda, packed=packed)
        spec = spec_of(model)
        batches = [collate([s], spec, 256) for s in samples()]
        if packed:
            batches = [pack(samples(), spec, 256, sum(b.tokens_BT.shape[1] for b in batches) + 7)]
        parts = [
            micro_batch_loss(model.model, model.encoders, batch, cuda, trainable=PROJECTORS)
            for batch in batches
        ]
        total = torch.stack(parts).sum()
        total.backward()
        losses.append(float(total.detach()))
        grads.append(
            torch.cat([p.grad.float().flatten() for p in model.model.parameters() if p.grad is not None])
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


def test_flash_attention_4_gets_the_borders_by_name_and_no_short_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In place of the package: attention sample by sample, for which its signature stands."""

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int | None, int | None],
        softcap: float,
    ) -> tuple[Tensor, None]:
        assert qv is None and causal and window_size == (None, None) and softcap == 0
        assert max_seqlen_q == max_seqlen_k == 256  # the longest here has 7
        assert q.shape[1] == 2 * k.shape[1]  # grouped heads go in as they are
        query, key, value = (t.transpose(0, 1)[None] for t in (q, k, v))
        out, _ = attention_by_sample(
            nn.Module(),
            query,
            key,
            value,
            None,
            scaling=softmax_scale,
            cu_seq_lens_q=cu_seqlens_q,
            max_length_q=7,
        )
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return out[0], None

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    cute = ModuleType("flash_attn.cute")
    cute.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    given = {"scaling": 0.3, "cu_seq_lens_q": borders, "max_length_q": 7}
    ours, _ = flash_attention_4_by_sample(nn.Module(), query, key, value, None, **given)  # type: ignore[arg-type]
    reference, _ = attention_by_sample(nn.Module(), query, key, value, None, **given)  # type: ignore[arg-type]
    assert torch.equal(ours, reference)


def test_flash_attention_4_is_not_looked_for_without_its_gpu() -> None:
    assert torch.cuda.is_available() or not has_flash_attention_4()
