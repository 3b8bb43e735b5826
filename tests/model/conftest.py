"""Small networks and batches that several tests use."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cad_mllm.config import ModelConfig
from cad_mllm.model.build import Built, build_model
from cad_mllm.model.loss import IGNORED_LABEL

CPU = torch.device("cpu")
PROJECTORS = frozenset({"point_projector", "image_projector"})


def tiny_config(**changes: object) -> ModelConfig:
    """The tiny preset in fp32 with small adapters."""
    settings: dict[str, object] = {"llm_model_name": "tiny", "dtype": "float32", "lora_r": 4} | changes
    return ModelConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def built() -> Built:
    """A tiny LoRA model whose adapters do something. Shared: tests must not change it."""
    result = build_model(tiny_config(), seed=3, device=CPU)
    shake(result.model)
    return result


def shake(module: torch.nn.Module, seed: int = 0) -> None:
    """Move every trainable weight a little, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


class Case:
    """One sample: which modalities it has, and random content. Batches are made from several."""

    def __init__(
        self, seed: int, *, image: bool = False, points: bool = False, prompt: int = 9, target: int = 5
    ):
        generator = torch.Generator().manual_seed(seed)
        self.prompt = torch.randint(0, 256, (prompt,), generator=generator).tolist()
        self.target = torch.randint(0, 256, (target,), generator=generator).tolist()
        self.image = torch.randn(3, 56, 56, generator=generator) if image else None
        self.points = torch.randn(256, 6, generator=generator) if points else None


LossOf = Callable[..., Tensor]


def loss_of(built: Built, cases: Sequence[Case], trainable: frozenset[str] = PROJECTORS) -> Tensor:
    """Lay the cases out as one right-padded batch, and give the model's loss."""
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    spans: list[tuple[int, int, int]] = []
    for case in cases:
        image = built.image_tokens * (case.image is not None)
        points = built.point_tokens * (case.points is not None)
        rows.append([256] * (image + points) + case.prompt + case.target)
        labels.append([IGNORED_LABEL] * (image + points + len(case.prompt)) + case.target)
        spans.append((image, image + points, len(rows[-1])))
    longest = max(len(row) for row in rows)
    image_rows = [b * longest + t for b, (end, _, _) in enumerate(spans) for t in range(end)]
    point_rows = [b * longest + t for b, (start, end, _) in enumerate(spans) for t in range(start, end)]
    images = [case.image for case in cases if case.image is not None]
    clouds = [case.points for case in cases if case.points is not None]
    flat = torch.tensor([row + [IGNORED_LABEL] * (longest - len(row)) for row in labels]).flatten()
    loss_rows = (flat[1:] != IGNORED_LABEL).nonzero().squeeze(1)
    return built.model(
        torch.tensor([row + [256] * (longest - len(row)) for row in rows]),
        torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        flat.view(len(rows), longest),
        loss_rows if len(loss_rows) else torch.zeros(1, dtype=torch.long),
        built.encoders.encode_images(torch.stack(images) if images else torch.zeros(0, 3, 56, 56)),
        torch.tensor(image_rows, dtype=torch.long),
        built.encoders.encode_points(torch.stack(clouds) if clouds else torch.zeros(0, 256, 6)),
        torch.tensor(point_rows, dtype=torch.long),
        trainable,
    )
