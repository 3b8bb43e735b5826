"""One model of a data set, from its JSON: points with normals, views, command texts.

Meant for worker processes (`cad_mllm.cad.worker`). This module imports what builds and draws: training on
ready data does without it, so import it where models are built, not before.

Shapes: N points of a cloud, C = 6 channels (xyz, unit normal).
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np
from PIL.Image import Image

from cad_mllm.cad import codec, omnicad, render
from cad_mllm.cad.jsonfile import loads
from cad_mllm.cad.normalise import Normalised, normalise
from cad_mllm.cad.surface import Kernel, installed_kernel, surface_of
from cad_mllm.cad.worker import on_one_core, peak_memory_mb
from cad_mllm.data.archive import Caption, is_text
from cad_mllm.data.captions import TEMPLATE, count_curves, template_caption
from cad_mllm.data.layout import ModelSettings
from cad_mllm.data.order import stable_hash
from cad_mllm.data.shards import HalfArray, ModelRow
from cad_mllm.data.survey import command_text
from cad_mllm.errors import CadError

if installed_kernel() is Kernel.OPENCASCADE:
    # Now, though it is used later: a worker's memory limit counts from where its imports end.
    import_module("cad_mllm.cad.solid")


def build_model(
    sample_id: str, normalised: Normalised, settings: ModelSettings, kernel: Kernel = Kernel.OPENCASCADE
) -> tuple[HalfArray, list[Image]]:
    """Points (N, 6) and views of a model. Raises CadError for one that cannot be built."""
    body = surface_of(normalised.program, kernel)
    points_NC = body.sample(settings.points, seed=stable_hash("prepare", sample_id) % 2**32)
    images = (
        render.render_views(body.mesh(), size=settings.size, views=settings.views) if settings.views else []
    )
    # half precision is finer than a tenth of the 10-bit grid, and half the disk
    return points_NC.astype(np.float16), images


@dataclass(frozen=True, kw_only=True)
class RowJob:
    """A model to make a row of."""

    shard: str
    id: str
    content: bytes
    """Its JSON file."""
    caption: Caption | None
    settings: ModelSettings


@dataclass(frozen=True, kw_only=True)
class BuiltRow:
    """A row, and what the quality report counts."""

    row: ModelRow
    operations: dict[str, int]
    extents: dict[str, int]
    curves: dict[str, int]
    peak_mb: int
    """Memory of the worker that made it, at its highest."""


@cache
def warm_up(kernel: Kernel) -> None:
    """Build a square plate, so that all libraries have met the one core that a worker is for."""
    plate = normalise(codec.decode("NZ0,0,127,254,254E60P0,0H254V254H0"))
    with on_one_core():
        build_model("warm-up", plate, ModelSettings(points=8, views=1, size=8), kernel)


def build_row(job: RowJob) -> BuiltRow:
    """In a worker process. Raises CadError for a model that cannot be built."""
    warm_up(Kernel.OPENCASCADE)
    data = loads(job.content)
    normalised = normalise(omnicad.parse(data))
    program = normalised.program
    minified = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    if not is_text(minified):
        raise CadError("holds half of a surrogate pair, which is no text")
    points_NC, images = build_model(job.id, normalised, job.settings)
    caption = job.caption or Caption(template_caption(program, points_NC.astype(np.float32)), TEMPLATE)
    curves = count_curves(program)
    row = ModelRow(
        id=job.id,
        caption=caption.text,
        caption_source=caption.source,
        json=minified,
        command_8=command_text(program, 8),
        command_10=command_text(program, 10),
        points=points_NC,
        views=tuple(_png(image) for image in images),
        scale=normalised.scale,
        center=normalised.center,
        num_extrudes=len(program.extrudes),
        num_curves=sum(curves.values()),
    )
    return BuiltRow(
        row=row,
        operations=Counter(extrude.operation.value for extrude in program.extrudes),
        extents=Counter(extrude.extent.type.value for extrude in program.extrudes),
        curves=curves,
        peak_mb=peak_memory_mb(),
    )


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
