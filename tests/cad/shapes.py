"""Small hand-made programs for the geometry tests."""

from collections.abc import Sequence

from cad_mllm.cad.program import (
    CadProgram,
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

XY = Plane((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))


def polygon(*points: Vec2) -> Path:
    return Path(points[0], tuple(Line(p) for p in (*points[1:], points[0])))


def square(side: float = 1.0, x: float = 0.0, y: float = 0.0) -> Path:
    return polygon((x, y), (x + side, y), (x + side, y + side), (x, y + side))


def feature(
    outer: Loop,
    length: float = 1.0,
    operation: Operation = Operation.NEW,
    *,
    holes: Sequence[Loop] = (),
    plane: Plane = XY,
    sides: ExtentType = ExtentType.ONE_SIDE,
    back: float = 0.0,
) -> Extrude:
    return Extrude(plane, (Profile(outer, tuple(holes)),), Extent(sides, length, back), operation)


def program(*extrudes: Extrude) -> CadProgram:
    return CadProgram(extrudes)


CUBE = program(feature(square()))
DRILLED = program(feature(square(2.0)), feature(Circle((1.0, 1.0), 0.5), operation=Operation.CUT))
