"""From an encoder's feature space into the LM's embedding space.

Shapes: N samples, K tokens of D features or of H hidden channels of the LM.
"""

import torch
from torch import Tensor, nn

from cad_mllm.model.seeding import private_rng


class Projector(nn.Module):
    """LayerNorm, Linear, GELU, Linear, token by token."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.norm = nn.LayerNorm(in_features)
        self.fc = nn.Linear(in_features, out_features)
        self.act = nn.GELU()
        self.proj = nn.Linear(out_features, out_features)

    def forward(self, features_NKD: Tensor) -> Tensor:
        """(N, K, in_features) to (N, K, out_features)."""
        out: Tensor = self.proj(self.act(self.fc(self.norm(features_NKD))))
        return out


class EncodedProjector(nn.Module):
    """An encoder that trains, and the projector behind it: one module where else only a projector is."""

    def __init__(self, encoder: nn.Module, projector: Projector) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, inputs: Tensor) -> Tensor:
        """What the encoder takes (N, ...) to (N, K, H)."""
        out: Tensor = self.projector(self.encoder(inputs))
        return out


def build_projector(in_features: int, out_features: int, *, seed: int, dtype: torch.dtype) -> Projector:
    """Draw the weights from `seed`, on the CPU in fp32, then round: equal on every rank."""
    with private_rng(seed):
        projector = Projector(in_features, out_features)
    return projector.to(dtype)
