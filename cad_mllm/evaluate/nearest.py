"""The nearest training model by chamfer distance: what a model must beat to have learned more than its data.

The search has two steps: by few points among all models of the training set, then by many points among those
that came nearest (`SHORTLIST`). `agreement` measures how often that finds what many points among all find.

Suffixes: M training models, Q queries, K of the shortlist, P points, 3 xyz.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cad_mllm.data.atomic import atomic_path, make_writable
from cad_mllm.data.progress import SlowProgress
from cad_mllm.evaluate.clouds import Models
from cad_mllm.evaluate.files import GENERATED_FILE

POINTS = 2048
"""By which the nearest of the shortlist is found."""
COARSE_POINTS = 512
SHORTLIST = 100

_DISTANCES_AT_ONCE = {"cuda": 1 << 29, "cpu": 1 << 24}
"""Between points: bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The training model that is nearest to a query."""

    number: int
    distance: float
    """Chamfer distance, squared, both ways, added up; clouds in [-1, 1]^3."""


@torch.no_grad()
def find_nearest(
    queries_QP3: NDArray[np.float32],
    clouds_MP3: NDArray[np.float32],
    *,
    shortlist: int = SHORTLIST,
    device: torch.device,
) -> list[Nearest]:
    """For each query the nearest cloud. A `shortlist` as long as there are clouds makes the search exact."""
    clouds = torch.from_numpy(clouds_MP3).to(device)
    found = []
    with SlowProgress("searching", len(queries_QP3)) as progress:
        for query in torch.from_numpy(queries_QP3).to(device):
            listed = torch.arange(len(clouds), device=device)
            if shortlist < len(clouds):
                coarse_M = chamfer(query[:COARSE_POINTS], clouds[:, :COARSE_POINTS])
                listed = coarse_M.topk(shortlist, largest=False).indices.sort().values
            fine_K = chamfer(query, clouds, listed)
            best = int(fine_K.argmin())
            found.append(Nearest(number=int(listed[best]), distance=float(fine_K[best])))
            progress.advance()
    return found


def chamfer(query_P3: Tensor, clouds_MP3: Tensor, rows_K: Tensor | None = None) -> Tensor:
    """(K,) chamfer distances, squared, both ways, of the query to the clouds in these rows; None: to all."""
    rows = torch.arange(len(clouds_MP3), device=clouds_MP3.device) if rows_K is None else rows_K
    # |x - y|^2 = (x, |x|^2, 1) (-2 y, 1, |y|^2): one product gives all.
    squares = query_P3.square().sum(dim=-1, keepdim=True)
    query_5P = torch.cat([-2 * query_P3, torch.ones_like(squares), squares], dim=-1).T
    size = _DISTANCES_AT_ONCE[clouds_MP3.device.type] // (len(query_P3) * clouds_MP3.shape[1])
    parts = []
    for some in rows.split(max(1, size)):
        clouds = clouds_MP3[some]
        squares = clouds.square().sum(dim=-1, keepdim=True)
        squared = torch.cat([clouds, squares, torch.ones_like(squares)], dim=-1) @ query_5P
        there, back = squared.amin(dim=2).clamp(min=0), squared.amin(dim=1).clamp(min=0)
        parts.append(there.mean(dim=1) + back.mean(dim=1))
    return torch.cat(parts)


def agreement(
    queries_QP3: NDArray[np.float32],
    clouds_MP3: NDArray[np.float32],
    found: Sequence[Nearest],
    *,
    device: torch.device,
) -> tuple[int, float]:
    """Compare what was `found` with an exact search: how many are the same; ratio of mean distances."""
    exact = find_nearest(queries_QP3, clouds_MP3, shortlist=len(clouds_MP3), device=device)
    same = sum(one.number == other.number for one, other in zip(found, exact, strict=True))
    return same, sum(one.distance for one in found) / max(sum(one.distance for one in exact), 1e-12)


def write_predictions(out: Path, queries: Models, training: Models, found: Sequence[Nearest]) -> None:
    """Write the nearest models as predictions: `<out>/<id>.json`, and the list that says what they are."""
    make_writable(out, "--out")
    lines = []
    for sample_id, nearest in zip(queries.ids, found, strict=True):
        path = out / f"{sample_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(training.json(nearest.number))
        line = {"id": sample_id, "modalities": "text+points", "nearest": training.ids[nearest.number]}
        lines.append(json.dumps(line | {"distance": nearest.distance}) + "\n")
    with atomic_path(out / GENERATED_FILE) as path:
        path.write_text("".join(lines), encoding="utf-8")
