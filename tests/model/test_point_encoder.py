"""The point encoder against its description, and its checkpoints."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cad_mllm.errors import CheckpointError, ConfigError
from cad_mllm.model.point_encoder import (
    PointEncoder,
    PointEncoderConfig,
    load_point_encoder,
    pick_faces,
    random_point_encoder,
)

SMALL = PointEncoderConfig(width=24, heads=3, layers=2, num_latents=5, num_freqs=4, num_points=32)
FACES = replace(SMALL, num_faces=4)


def _cloud(clouds: int = 2, points: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    xyz = 2 * torch.rand(clouds, points, 3, generator=generator) - 1
    normals = torch.nn.functional.normalize(torch.randn(clouds, points, 3, generator=generator), dim=-1)
    return torch.cat([xyz, normals], dim=-1)


def _shaken(config: PointEncoderConfig) -> PointEncoder:
    """An encoder none of whose weights, norms and biases included, is trivial."""
    encoder = random_point_encoder(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def _checkpoint(encoder: PointEncoder, prefix: str = "") -> dict[str, Tensor]:
    own = {f"{prefix}encoder.{name}": value.clone() for name, value in encoder.state_dict().items()}
    foreign = {
        f"{prefix}pre_kl.weight": torch.zeros(2, 2),
        f"{prefix}post_kl.bias": torch.zeros(2),
        f"{prefix}transformer.resblocks.0.attn.c_qkv.weight": torch.zeros(2, 2),
        f"{prefix}geo_decoder.output_proj.weight": torch.zeros(1, 2),
    }
    return own | foreign


@pytest.fixture(scope="module")
def full_size() -> PointEncoder:
    return PointEncoder(PointEncoderConfig())


def test_the_real_size_has_64_million_parameters_and_gives_257_tokens_of_768(full_size: PointEncoder) -> None:
    assert sum(p.numel() for p in full_size.parameters()) == 64_012_800
    with torch.no_grad():
        assert full_size(_cloud(2, 64)).shape == (2, 257, 768)


def test_the_state_dict_has_the_keys_of_the_checkpoint(full_size: PointEncoder) -> None:
    mlp = [f"mlp.{layer}.{kind}" for layer in ("c_fc", "c_proj") for kind in ("weight", "bias")]
    norms = [f"{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    out = ["attn.c_proj.weight", "attn.c_proj.bias"]
    expected = {"query", "input_proj.weight", "input_proj.bias", "ln_post.weight", "ln_post.bias"}
    cross = ["attn.c_q.weight", "attn.c_kv.weight", *out, *norms, "ln_3.weight", "ln_3.bias", *mlp]
    expected |= {f"cross_attn.{name}" for name in cross}
    block = ["attn.c_qkv.weight", *out, *norms, *mlp]
    expected |= {f"self_attn.resblocks.{layer}.{name}" for layer in range(8) for name in block}
    assert set(full_size.state_dict()) == expected


def _reference(weights: dict[str, Tensor], config: PointEncoderConfig, cloud_PC: Tensor) -> Tensor:
    """The encoder for one cloud, written out from the description with scalars, loops and einsum."""
    heads, channels = config.heads, config.width // config.heads

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str, bias: bool = True) -> Tensor:
        out = torch.einsum("ti,oi->to", x, weights[f"{name}.weight"])
        return out + weights[f"{name}.bias"] if bias else out

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("the,she->hts", q, k) / math.sqrt(channels)
        return torch.einsum("hts,she->the", scores.softmax(-1), v).reshape(len(q), -1)

    def mlp(x: Tensor, name: str) -> Tensor:
        hidden = linear(x, f"{name}.c_fc")
        return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.c_proj")

    rows = []
    for point in cloud_PC:
        angles = [float(c) * 2.0**octave for c in point[:3] for octave in range(config.num_freqs)]
        xyz, normal = point[:3].tolist(), point[3:].tolist()
        rows.append([*xyz, *map(math.sin, angles), *map(math.cos, angles), *normal])
    data = linear(torch.tensor(rows), "input_proj")
    x = weights["query"]
    q = linear(norm(x, "cross_attn.ln_1"), "cross_attn.attn.c_q", bias=False).reshape(-1, heads, channels)
    packed = linear(norm(data, "cross_attn.ln_2"), "cross_attn.attn.c_kv", bias=False)
    # Head h owns columns [h * 2E, (h + 1) * 2E): its keys, then its values.
    k, v = packed.reshape(-1, heads, 2, channels).unbind(2)
    x = x + linear(attend(q, k, v), "cross_attn.attn.c_proj")
    x = x + mlp(norm(x, "cross_attn.ln_3"), "cross_attn.mlp")
    for layer in range(config.layers):
        name = f"self_attn.resblocks.{layer}"
        packed = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_qkv", bias=False)
        q, k, v = packed.reshape(-1, heads, 3, channels).unbind(2)
        x = x + linear(attend(q, k, v), f"{name}.attn.c_proj")
        x = x + mlp(norm(x, f"{name}.ln_2"), f"{name}.mlp")
    return norm(x, "ln_post")


def test_it_computes_what_the_description_says_heads_interleaved() -> None:
    encoder, clouds = _shaken(SMALL), _cloud()
    with torch.no_grad():
        out = encoder(clouds)
        expected = torch.stack([_reference(encoder.state_dict(), SMALL, cloud) for cloud in clouds])
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


def _squares(*faces: tuple[int, float, float], points: int = 50) -> Tensor:
    """(F * points, 6): squares at right angles to an axis: (axis, place and sign of the normal, side)."""
    draw = torch.Generator().manual_seed(0)
    parts = []
    for axis, place, side in faces:
        xyz_P3 = (torch.rand(points, 3, generator=draw) - 0.5) * side
        xyz_P3[:, axis] = abs(place)
        normal_P3 = torch.zeros(points, 3)
        normal_P3[:, axis] = math.copysign(1.0, place)
        parts.append(torch.cat([xyz_P3, normal_P3], dim=-1))
    return torch.cat(parts)


def test_every_face_is_picked_before_one_is_picked_twice_however_small_it_is() -> None:
    faces = ((0, 0.9, 2.0), (0, -0.1, 2.0), (1, 0.5, 2.0), (1, -0.5, 2.0), (0, 0.3, 0.01), (2, 0.0, 0.01))
    cloud_PC = _squares(*faces)
    order = torch.randperm(len(cloud_PC), generator=torch.Generator().manual_seed(1))
    rows_MQ, low_MQ3, high_MQ3 = pick_faces(torch.stack([cloud_PC, cloud_PC[order]]), 12)
    face_Q = rows_MQ[0] // 50
    assert sorted(face_Q[:6].tolist()) == list(range(6))
    assert torch.equal(cloud_PC[rows_MQ[0]], cloud_PC[order][rows_MQ[1]])
    for number in range(6):
        xyz_P3 = cloud_PC[number * 50 : (number + 1) * 50, :3]
        for row in torch.nonzero(face_Q == number).flatten():
            assert torch.equal(low_MQ3[0, row], xyz_P3.amin(dim=0))
            assert torch.equal(high_MQ3[1, row], xyz_P3.amax(dim=0))


def test_faces_repeat_where_a_cloud_has_too_few_points() -> None:
    rows_MQ, low_MQ3, high_MQ3 = pick_faces(_cloud(1, 3), 5)
    assert set(rows_MQ[0].tolist()) == {0, 1, 2}
    assert low_MQ3.isfinite().all() and high_MQ3.isfinite().all()


def test_faces_become_tokens_behind_the_latents() -> None:
    assert FACES.num_tokens == 9
    encoder = _shaken(FACES)
    assert encoder.state_dict().keys() - _shaken(SMALL).state_dict().keys() == {
        "box_proj.weight",
        "box_proj.bias",
    }
    with torch.no_grad():
        assert encoder(_cloud(2)).shape == (2, 9, 24)


@pytest.mark.parametrize("config", [SMALL, FACES])
def test_the_order_of_the_points_does_not_matter_but_their_normals_do(config: PointEncoderConfig) -> None:
    encoder, cloud = _shaken(config), _cloud(1)
    with torch.no_grad():
        out = encoder(cloud)
        torch.testing.assert_close(encoder(cloud[:, torch.randperm(40)]), out, atol=1e-5, rtol=1e-4)
        flipped = torch.cat([cloud[..., :3], -cloud[..., 3:]], dim=-1)
        assert (encoder(flipped) - out).abs().max() > 1e-2


def test_in_bfloat16_the_fourier_features_keep_their_precision() -> None:
    encoder, cloud = _shaken(SMALL), _cloud(1)
    with torch.no_grad():
        exact = encoder(cloud)
        rounded = encoder.to(torch.bfloat16)(cloud)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).pow(2).mean().sqrt() < 0.03


def test_random_weights_are_the_same_each_time_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    first = random_point_encoder(SMALL)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    second = random_point_encoder(SMALL)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(3), drawn, atol=0, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_random_features_tell_clouds_apart() -> None:
    encoder, clouds = random_point_encoder(SMALL), _cloud(2, 64)
    clouds[1, :, 2] *= 0.1
    with torch.no_grad():
        first, second = encoder(clouds)
    assert (first - second).pow(2).mean().sqrt() > 0.1


@pytest.mark.parametrize("prefix", ["", "model.shape_model."])
@pytest.mark.parametrize("kind", [".safetensors", ".ckpt", "lightning.ckpt"])
def test_a_checkpoint_loads_with_foreign_keys_beside(tmp_path: Path, prefix: str, kind: str) -> None:
    encoder, path = _shaken(SMALL), tmp_path / f"encoder{kind}"
    tensors = _checkpoint(encoder, prefix)
    if kind == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3} if "lightning" in kind else tensors, path)
    loaded = load_point_encoder(path, SMALL)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("encoder.cross_attn.ln_3.bias"), r"encoder\.cross_attn\.ln_3\.bias"),
        (lambda t: t.update({"encoder.query": torch.zeros(6, 24)}), r"encoder\.query has shape \(6, 24\)"),
        (lambda t: t.update({"encoder.cross_attn.attn.c_q.bias": torch.zeros(24)}), r"c_q\.bias"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("encoder.")], r"encoder\.query"),
    ],
    ids=["missing key", "other shape", "unknown encoder key", "no encoder at all"],
)
def test_loading_is_strict_and_says_how_to_get_the_file(tmp_path: Path, change, named: str) -> None:
    tensors = _checkpoint(_shaken(SMALL))
    change(tensors)
    save_file(tensors, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=named) as caught:
        load_point_encoder(tmp_path / "encoder.safetensors", SMALL)
    assert "neuralcarver/michelangelo" in str(caught.value)


def test_a_missing_file_and_a_file_with_code_in_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*neuralcarver/michelangelo"):
        load_point_encoder(tmp_path / "absent.ckpt")
    torch.save({"state_dict": Path("an object that is not a tensor")}, tmp_path / "pickle.ckpt")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "noise.ckpt").write_bytes(b"not a checkpoint")
    for name in ("pickle.ckpt", "noise.safetensors", "noise.ckpt"):
        with pytest.raises(CheckpointError, match=name):
            load_point_encoder(tmp_path / name)
