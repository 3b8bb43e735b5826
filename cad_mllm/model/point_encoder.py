"""Michelangelo-compatible point cloud encoder: a perceiver over points with normals.

Shapes: M clouds, P points each, C = 6 (xyz, unit normal), F Fourier channels, K latent tokens,
H heads of E channels, D = H * E width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from cad_mllm.errors import CheckpointError, ConfigError
from cad_mllm.model.seeding import FROZEN_SEED, private_rng, redraw_

HOW_TO_GET_WEIGHTS = (
    "download the shape VAE checkpoint of `neuralcarver/michelangelo` from the Hugging Face hub "
    "and give its path as --point_encoder FILE.ckpt (or .safetensors)"
)
_KEY_PREFIXES = ("model.shape_model.", "shape_model.", "")
_ENCODER = "encoder."
# Buffers that some versions store; they are constants here.
_CONSTANT_KEYS = ("fourier_embedder.",)


@dataclass(frozen=True)
class PointEncoderConfig:
    """Sizes of a point encoder. The defaults are Michelangelo's (64.0M parameters)."""

    width: int = 768
    """D: channels of a latent token; a multiple of `heads`."""
    heads: int = 12
    """H: attention heads."""
    layers: int = 8
    """Self-attention blocks after the one cross-attention block."""
    num_latents: int = 257
    """K: one global token, then 256 tokens of local shape."""
    num_freqs: int = 8
    """Octaves of the Fourier embedding of a coordinate."""
    num_points: int = 4096
    """P: points a cloud is sampled to before it comes here (the module itself takes any number)."""
    num_faces: int = 0
    """Tokens beside the latents, each of which begins as a face of the cloud (`pick_faces`): to latents, that
    are drawn from all points at once, small faces are lost until late in training."""

    @property
    def num_tokens(self) -> int:
        """K: tokens that a cloud becomes."""
        return self.num_latents + self.num_faces


TINY = PointEncoderConfig(width=64, heads=2, layers=2, num_latents=17, num_points=256)
"""For tests and the demo."""
SMALL = PointEncoderConfig(width=256, heads=4, layers=4, num_latents=32, num_points=2048, num_faces=64)
"""To be trained from scratch with the small LM."""

_OFFSET, _POSITION, _SAME_PLANE = 3.0, 0.25, 0.15
"""How unlike two points are as parts of faces: the distance of their normals (2 for opposite ones), that of
their planes' distances from the origin times the first figure, that of their places times the second. Without
the last, points nearer than the third are of one plane: planes .05 apart, or normals 9 degrees, are not."""


class FourierEmbedding(nn.Module):
    """Coordinates to `[x, sin(x f), cos(x f)]` with f = 2^0 .. 2^(n-1), f varying fastest."""

    frequencies: Tensor

    def __init__(self, num_freqs: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(num_freqs), persistent=False)

    def forward(self, xyz_MP3: Tensor) -> Tensor:
        """Embed (..., 3) float32 into (..., 3 + 3 * 2 * num_freqs) float32."""
        # In half precision sin(128 x) would be noise: the angles stay in fp32 whatever the weights are.
        angles = (xyz_MP3.float().unsqueeze(-1) * self.frequencies.float()).flatten(-2)
        return torch.cat([xyz_MP3.float(), angles.sin(), angles.cos()], dim=-1)


class Mlp(nn.Module):
    """Linear to four times the width, GELU, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_MKD: Tensor) -> Tensor:
        """Keep the shape."""
        out: Tensor = self.c_proj(functional.gelu(self.c_fc(x_MKD)))
        return out


def _split_heads(packed: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """(M, T, H * parts * E), heads outermost, to `parts` tensors (M, H, T, E)."""
    per_head = packed.unflatten(-1, (heads, -1)).transpose(1, 2)
    return torch.chunk(per_head, parts, dim=-1)


def _attend(q_MHTE: Tensor, k_MHSE: Tensor, v_MHSE: Tensor) -> Tensor:
    """Softmax attention scaled by 1 / sqrt(E); heads are joined again: (M, T, D)."""
    out = functional.scaled_dot_product_attention(q_MHTE, k_MHSE, v_MHSE)
    return out.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Multi-head self-attention; q, k and v of one head lie side by side in `c_qkv`'s output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x_MKD: Tensor) -> Tensor:
        """Keep the shape."""
        q, k, v = _split_heads(self.c_qkv(x_MKD), self.heads, 3)
        out: Tensor = self.c_proj(_attend(q, k, v))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of latents to data; k and v of one head lie side by side in `c_kv`'s output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_kv = nn.Linear(width, 2 * width, bias=False)
        self.c_proj = nn.Linear(width, width)

    def forward(self, latents_MKD: Tensor, data_MPD: Tensor) -> Tensor:
        """Give (M, K, D)."""
        (q,) = _split_heads(self.c_q(latents_MKD), self.heads, 1)
        k, v = _split_heads(self.c_kv(data_MPD), self.heads, 2)
        out: Tensor = self.c_proj(_attend(q, k, v))
        return out


class CrossAttentionBlock(nn.Module):
    """Pre-norm: `ln_1` on the latents, `ln_2` on the data, `ln_3` before the MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_3 = nn.LayerNorm(width)

    def forward(self, latents_MKD: Tensor, data_MPD: Tensor) -> Tensor:
        """Give (M, K, D)."""
        x_MKD = latents_MKD + self.attn(self.ln_1(latents_MKD), self.ln_2(data_MPD))
        out: Tensor = x_MKD + self.mlp(self.ln_3(x_MKD))
        return out


class SelfAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x_MKD: Tensor) -> Tensor:
        """Keep the shape."""
        x_MKD = x_MKD + self.attn(self.ln_1(x_MKD))
        out: Tensor = x_MKD + self.mlp(self.ln_2(x_MKD))
        return out


class SelfAttentionStack(nn.Module):
    """The blocks after the cross-attention (a module of its own for the checkpoint's key names)."""

    def __init__(self, config: PointEncoderConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            SelfAttentionBlock(config.width, config.heads) for _ in range(config.layers)
        )

    def forward(self, x_MKD: Tensor) -> Tensor:
        """Keep the shape."""
        for block in self.resblocks:
            x_MKD = block(x_MKD)
        return x_MKD


class PointEncoder(nn.Module):
    """Points with normals to latent tokens: permutation-invariant, differentiable, no randomness."""

    def __init__(self, config: PointEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.fourier = FourierEmbedding(config.num_freqs)
        embedded = 3 + 3 * 2 * config.num_freqs
        self.query = nn.Parameter(torch.randn(config.num_latents, config.width))
        self.input_proj = nn.Linear(embedded + 3, config.width)
        if config.num_faces:
            self.box_proj = nn.Linear(2 * embedded, config.width)
        self.cross_attn = CrossAttentionBlock(config.width, config.heads)
        self.self_attn = SelfAttentionStack(config)
        self.ln_post = nn.LayerNorm(config.width)

    def forward(self, points_MPC: Tensor) -> Tensor:
        """Encode (M, P, 6) xyz in [-1, 1] + unit normals, float32, to (M, K, D) in the weights' dtype."""
        xyz_MP3, normals_MP3 = points_MPC[..., :3], points_MPC[..., 3:]
        embedded_MPF = torch.cat([self.fourier(xyz_MP3), normals_MP3.float()], dim=-1)
        embedded_MPF = embedded_MPF.to(self.query.dtype)
        data_MPD = self.input_proj(embedded_MPF)
        latents_MKD = self.query.expand(points_MPC.shape[0], -1, -1)
        if self.config.num_faces:
            faces_MQD = self._begin_faces(points_MPC, embedded_MPF)
            latents_MKD = torch.cat([latents_MKD, faces_MQD], dim=1)
        out: Tensor = self.ln_post(self.self_attn(self.cross_attn(latents_MKD, data_MPD)))
        return out

    def _begin_faces(self, points_MPC: Tensor, embedded_MPF: Tensor) -> Tensor:
        """Give what the face tokens begin as (M, Q, D): a point, and the box of what lies in its plane."""
        rows_MQ, low_MQ3, high_MQ3 = pick_faces(points_MPC, self.config.num_faces)
        box_MQG = torch.cat([self.fourier(low_MQ3), self.fourier(high_MQ3)], dim=-1)
        # Projected again, few as they are: the gradient of a gather would add up in any order.
        point_MQD = self.input_proj(embedded_MPF.take_along_dim(rows_MQ[..., None], dim=1))
        out: Tensor = point_MQD + self.box_proj(box_MQG.to(point_MQD.dtype))
        return out


@torch.no_grad()
def pick_faces(points_MPC: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points on as many different faces as there are, however small a face is, and how far its plane reaches.

    Each point is the farthest from all before it (farthest point sampling; Eldar et al. 1997), but not in
    space alone: what tells faces apart are their normals and the distances of their planes from the origin.
    The same points in whatever order a cloud is given; they repeat where it has fewer than `count`.

    Returns:
        Rows of the points (M, count), and the least and greatest coordinates (M, count, 3) of the cloud's
        points that lie in the same plane (in a strip of a curved face).
    """
    xyz_MP3, normals_MP3 = points_MPC[..., :3].float(), points_MPC[..., 3:].float()
    offset_MP1 = (xyz_MP3 * normals_MP3).sum(dim=-1, keepdim=True)
    plane_MP4 = torch.cat([normals_MP3, _OFFSET * offset_MP1], dim=-1)
    face_MPF = torch.cat([plane_MP4, _POSITION * xyz_MP3], dim=-1)
    row_M = (face_MPF - face_MPF.mean(dim=1, keepdim=True)).square().sum(dim=-1).argmax(dim=-1)
    nearest_MP = torch.full(face_MPF.shape[:2], torch.inf, device=face_MPF.device)
    rows = [row_M]
    while len(rows) < count:
        chosen_M1F = face_MPF.take_along_dim(row_M[:, None, None], dim=1)
        nearest_MP = torch.minimum(nearest_MP, (face_MPF - chosen_M1F).square().sum(dim=-1))
        row_M = nearest_MP.argmax(dim=-1)
        rows.append(row_M)
    rows_MQ = torch.stack(rows, dim=1)
    plane_MQ4 = plane_MP4.take_along_dim(rows_MQ[..., None], dim=1)
    distance_MQP = torch.cdist(plane_MQ4, plane_MP4, compute_mode="donot_use_mm_for_euclid_dist")
    other_MQP1 = (distance_MQP >= _SAME_PLANE)[..., None]
    xyz_M1P3 = xyz_MP3[:, None]
    return (
        rows_MQ,
        xyz_M1P3.masked_fill(other_MQP1, torch.inf).amin(dim=2),
        xyz_M1P3.masked_fill(other_MQP1, -torch.inf).amax(dim=2),
    )


def random_point_encoder(config: PointEncoderConfig) -> PointEncoder:
    """Build an encoder with random weights, the same bits in every process.

    The weights are scaled to keep unit variance, so that attention is far from uniform and different
    clouds give visibly different tokens: a random encoder is a usable random feature map.
    """
    with private_rng(FROZEN_SEED):
        encoder = PointEncoder(config)
    redraw_(encoder, lambda name, matrix: 1.0 if name == "query" else matrix.shape[1] ** -0.5)
    for module in encoder.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return encoder


def load_point_encoder(path: Path, config: PointEncoderConfig | None = None) -> PointEncoder:
    """Load `encoder.*` of a Michelangelo checkpoint strictly; every other part of it is ignored.

    Takes .safetensors, or a torch file (.ckpt, .pt), plain or of Lightning (weights under `state_dict`).
    ConfigError: there is no such file. CheckpointError: it cannot be read, a key is missing, is unknown
    or has another shape.
    """
    tensors = _encoder_tensors(_read_tensors(path))
    encoder = PointEncoder(config or PointEncoderConfig())
    wanted = encoder.state_dict()
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(wanted)} keys of the point encoder are missing, "
            f"first {', '.join(_ENCODER + key for key in missing[:5])}; {HOW_TO_GET_WEIGHTS}"
        )
    unknown = [key for key in tensors if key not in wanted]
    if unknown:
        raise CheckpointError(
            f"{path}: keys that this point encoder does not have, first "
            f"{', '.join(_ENCODER + key for key in unknown[:5])}; {HOW_TO_GET_WEIGHTS}"
        )
    for key, value in wanted.items():
        if tensors[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: {_ENCODER}{key} has shape {tuple(tensors[key].shape)}, "
                f"expected {tuple(value.shape)}; {HOW_TO_GET_WEIGHTS}"
            )
    encoder.load_state_dict(tensors)
    return encoder


def _read_tensors(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise ConfigError(f"--point_encoder {path}: no such file; {HOW_TO_GET_WEIGHTS}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"--point_encoder {path} is not a file of plain tensors ({str(error).splitlines()[0]}); "
            f"{HOW_TO_GET_WEIGHTS}"
        ) from error
    nested = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"--point_encoder {path} holds no state dict; {HOW_TO_GET_WEIGHTS}")
    return nested


def _encoder_tensors(tensors: Mapping[str, object]) -> dict[str, Tensor]:
    """Pick the encoder's tensors, named as in `PointEncoder.state_dict()`."""
    for prefix in _KEY_PREFIXES:
        start = prefix + _ENCODER
        found = {
            key.removeprefix(start): value
            for key, value in tensors.items()
            if isinstance(key, str) and key.startswith(start) and isinstance(value, Tensor)
        }
        if found:
            return {key: value for key, value in found.items() if not key.startswith(_CONSTANT_KEYS)}
    return {}
