"""Which samples a person looks at, and their pictures: input, prediction and truth."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cad_mllm.cad.mesh import Mesh
from cad_mllm.cad.metrics import unit_box
from cad_mllm.cad.render import render_views
from cad_mllm.cad.shapefile import read_shape
from cad_mllm.cad.worker import run_limited
from cad_mllm.data.files import FloatArray, UnusableFileError, load_image, load_points
from cad_mllm.data.preview import draw_input
from cad_mllm.data.progress import SlowProgress
from cad_mllm.errors import CadError
from cad_mllm.evaluate.files import Given, InShard
from cad_mllm.evaluate.score import COUNTED, Outcome, Pair, Sample

MAX_SHOWN = 60
"""More make the page heavy; the table of all is in samples.csv."""
VIEWS = 4
"""From all sides, from above."""
VIEW_SIZE = 208

_FAILURES, _WORST = 1 / 4, 1 / 3
"""Shares of what is shown; the rest is spread evenly over all others."""
_COLOURS = 48
_MAX_PROGRAM = 4_000


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """PNG files, each a row of `VIEWS` views, but for the input; None where there is nothing to see."""

    truth: bytes | None
    prediction: bytes | None
    given: bytes | None
    program: str
    """What was generated, if it is text; cut if it is long."""


def badness(sample: Sample) -> float:
    """By what the worst comes first: failures, then the distance beyond what random points alone leave."""
    distance, floor = ((sample.figures or {}).get(name) for name in ("chamfer", "chamfer_floor"))
    return math.inf if distance is None or floor is None else distance - floor


def choose(samples: Sequence[Sample], modalities: dict[str, str], limit: int = MAX_SHOWN) -> list[Sample]:
    """At most `limit` samples, worst first: failures, the worst, an even spread, of each modality alike."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.outcome in COUNTED:
            groups.setdefault(modalities[sample.id], []).append(sample)
    chosen = [entry for group in groups.values() for entry in _spread(group, limit // len(groups))]
    return sorted(chosen, key=lambda sample: (-badness(sample), sample.id))


def _spread(group: list[Sample], limit: int) -> list[Sample]:
    ranked = sorted(group, key=lambda sample: (-badness(sample), sample.id))
    if len(ranked) <= limit:
        return ranked
    failed = [sample for sample in ranked if sample.outcome is not Outcome.SCORED][: int(limit * _FAILURES)]
    scored = [sample for sample in ranked if sample.outcome is Outcome.SCORED]
    worst = scored[: int(limit * _WORST)]
    rest = scored[len(worst) :]
    left = min(limit - len(failed) - len(worst), len(rest))
    places = np.unique(np.linspace(0, len(rest) - 1, left).round().astype(int)).tolist() if left else []
    return failed + worst + [rest[place] for place in places]


@dataclass(frozen=True)
class _Job:
    pair: Pair
    given: Given


def draw(jobs: Sequence[tuple[Pair, Given]], *, workers: int, seconds: float) -> dict[str, Pictures]:
    """Pictures of each pair, by id, drawn in worker processes; without those that take too long."""
    drawn: dict[str, Pictures] = {}
    items = [_Job(pair, given) for pair, given in jobs]
    with SlowProgress("drawing", len(items)) as progress:
        for index, outcome in run_limited(
            _draw, items, workers=min(workers, max(len(items), 1)), seconds=seconds
        ):
            progress.advance()
            pair = items[index].pair
            drawn[pair.id] = (
                Pictures(truth=None, prediction=None, given=None, program=_program(pair.predicted))
                if isinstance(outcome, CadError)
                else outcome
            )
    return drawn


def _draw(job: _Job) -> Pictures:
    return Pictures(
        truth=_views(job.pair.true),
        prediction=None if job.pair.predicted is None else _views(job.pair.predicted),
        given=_given(job.given),
        program=_program(job.pair.predicted),
    )


def _views(shape: Path | bytes) -> bytes | None:
    try:
        centred = unit_box(read_shape(shape).mesh)
    except CadError:
        return None
    views = render_views(Mesh(centred.vertices * 2, centred.faces), size=VIEW_SIZE, views=VIEWS)
    sheet = Image.new("RGB", (VIEW_SIZE * VIEWS, VIEW_SIZE), "white")
    for number, view in enumerate(views):
        sheet.paste(view, (VIEW_SIZE * number, 0))
    return _png(sheet)


def _given(given: Given) -> bytes | None:
    try:
        image, points_NC = _image(given.image), _points(given.points)
    except UnusableFileError:
        return None
    picture = draw_input(image, points_NC, VIEW_SIZE)
    return None if picture is None else _png(picture)


def _image(where: Path | InShard | None) -> Image.Image | None:
    return load_image(where) if isinstance(where, Path) else None if where is None else where.image()


def _points(where: Path | InShard | None) -> FloatArray | None:
    return load_points(where) if isinstance(where, Path) else None if where is None else where.points()


def _png(picture: Image.Image) -> bytes:
    """A few kilobytes: the pictures are of few colours."""
    buffer = io.BytesIO()
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _program(path: Path | None) -> str:
    if path is None or path.suffix.lower() not in (".txt", ".json"):
        return ""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_PROGRAM + 1).decode("utf-8", errors="replace")
    except OSError:
        return ""
    return text[:_MAX_PROGRAM] + " ..." if len(text) > _MAX_PROGRAM else text
