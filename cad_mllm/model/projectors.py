"""From an encoder's feature space into the LM's embedding space. Shapes: N samples, K tokens, D features."""

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


def build_projector(in_features: int, out_features: int, *, seed: int, dtype: torch.dtype) -> Projector:
    """Draw the weights from `seed`, on the CPU in fp32, then round: equal on every rank."""
    with private_rng(seed):
        projector = Projector(in_features, out_features)
    return projector.to(dtype)
