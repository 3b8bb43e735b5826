"""Sketches and features that the families are made of, in grid steps."""

import math
from collections.abc import Sequence

from cad_mllm.cad.program import (
    Arc,
    Circle,
    Extent,
    ExtentType,
    Extrude,
    Line,
    Loop,
    Operation,
    Path,
    Plane,
    Profile,
    Vec2,
)
from cad_mllm.cad.synth.draw import Draw


def chain(*points: Vec2) -> Path:
    """The closed polygon through the points."""
    return Path(points[0], tuple(Line(p) for p in (*points[1:], points[0])))


def rectangle(x: float, y: float, width: float, height: float) -> Path:
    """A rectangle from its lower left corner."""
    return chain((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def centered(width: float, height: float) -> Path:
    """A rectangle around the origin."""
    return rectangle(-width / 2, -height / 2, width, height)


def rounded(width: float, height: float, radius: float) -> Path:
    """A centred rectangle with quarter circles for corners; plain for radius 0."""
    if radius == 0:
        return centered(width, height)
    x, y, quarter = width / 2, height / 2, math.pi / 2
    return Path(
        (-x + radius, -y),
        (
            Line((x - radius, -y)),
            Arc((x, -y + radius), quarter),
            Line((x, y - radius)),
            Arc((x - radius, y), quarter),
            Line((-x + radius, y)),
            Arc((-x, y - radius), quarter),
            Line((-x, -y + radius)),
            Arc((-x + radius, -y), quarter),
        ),
    )


def slot(length: float, width: float) -> Path:
    """A centred stadium along x: two straight sides, two half circles."""
    x, r = (length - width) / 2, width / 2
    return Path((-x, -r), (Line((x, -r)), Arc((x, r), math.pi), Line((-x, r)), Arc((-x, -r), math.pi)))


def on_circle(count: int, radius: float) -> list[Vec2]:
    """Points evenly on a circle around the origin, the first one on the x axis."""
    turns = [2 * math.pi * i / count for i in range(count)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]


def flat(z: float = 0.0) -> Plane:
    """The plane at height z, seen from above."""
    return Plane((0.0, 0.0, float(z)), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))


def feature(
    outlines: Loop | Sequence[Loop],
    length: float,
    operation: Operation = Operation.NEW,
    *,
    plane: Plane | None = None,
    holes: Sequence[Loop] = (),
    sides: ExtentType = ExtentType.ONE_SIDE,
    back: float = 0.0,
) -> Extrude:
    """One extrude of one or several outlines; `holes` belong to a single outline."""
    loops = [outlines] if isinstance(outlines, Path | Circle) else outlines
    profiles = tuple(Profile(loop, tuple(holes)) for loop in loops)
    return Extrude(plane or flat(), profiles, Extent(sides, float(length), float(back)), operation)


def up(draw: Draw, outline: Loop, height: int, holes: Sequence[Loop] = ()) -> Extrude:
    """The body from z = 0 to `height`, described in one of the ways in which designers do."""
    match draw.whole(0, 3):
        case 0:
            return feature(outline, -height, plane=flat(height), holes=holes)
        case 1 if height % 2 == 0:
            return feature(
                outline, height / 2, plane=flat(height / 2), holes=holes, sides=ExtentType.SYMMETRIC
            )
        case 2 if height >= 4:
            back = height // 4
            two = ExtentType.TWO_SIDES
            return feature(outline, height - back, plane=flat(back), holes=holes, sides=two, back=back)
        case _:
            return feature(outline, height, holes=holes)


def holes_through(draw: Draw, outline: Loop, height: int, holes: Sequence[Loop]) -> tuple[Extrude, ...]:
    """A body with through holes: as loops of its profile, or cut afterwards."""
    if not holes or draw.flip():
        return (up(draw, outline, height, holes),)
    return up(draw, outline, height), feature(holes, -height, Operation.CUT, plane=flat(height))
