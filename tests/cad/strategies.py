"""Hypothesis strategies: programs as a person could have drawn them, texts as a model could write them."""

import math
from collections.abc import Callable

from hypothesis import strategies as st

from cad_mllm.cad.geometry import cross, unit
from cad_mllm.cad.grammar import CommandGrammar
from cad_mllm.cad.program import (
    Arc,
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
    Vec3,
)

Draw = Callable[[st.SearchStrategy], object]

lengths = st.floats(0.05, 3.0)
coordinates = st.floats(-3.0, 3.0)


@st.composite
def star_paths(draw: Draw, center: Vec2, radius: float) -> Path:
    """A path around `center`, between .6 and 1 times `radius` away from it, of lines and flat arcs."""
    count = draw(st.integers(3, 7))
    turn = draw(st.floats(0, 2 * math.pi))
    corners = [
        (
            center[0] + r * math.cos(turn + i * 2 * math.pi / count),
            center[1] + r * math.sin(turn + i * 2 * math.pi / count),
        )
        for i in range(count)
        for r in [radius * draw(st.floats(0.6, 0.9))]
    ]
    if draw(st.booleans()):
        corners.reverse()
    sweeps = [
        draw(st.one_of(st.none(), st.floats(-0.5, 0.5).filter(lambda s: abs(s) > 0.01))) for _ in corners
    ]
    ends = corners[1:] + corners[:1]
    return Path(
        corners[0],
        tuple(Line(end) if s is None else Arc(end, s) for end, s in zip(ends, sweeps, strict=True)),
    )


@st.composite
def slots(draw: Draw, center: Vec2, radius: float) -> Path:
    """Two lines and two half circles."""
    x, y, h = center[0], center[1], radius * draw(st.floats(0.2, 0.5))
    w = radius - h
    return Path(
        (x - w, y - h),
        (
            Line((x + w, y - h)),
            Arc((x + w, y + h), math.pi),
            Line((x - w, y + h)),
            Arc((x - w, y - h), math.pi),
        ),
    )


@st.composite
def rectangles(draw: Draw, center: Vec2, radius: float) -> Path:
    """Sides along the sketch's axes."""
    (x, y), w, h = center, radius * draw(st.floats(0.1, 0.7)), radius * draw(st.floats(0.1, 0.7))
    return Path(
        (x - w, y - h),
        tuple(Line(p) for p in ((x + w, y - h), (x + w, y + h), (x - w, y + h), (x - w, y - h))),
    )


def loops(center: Vec2, radius: float) -> st.SearchStrategy[Loop]:
    """A closed loop within `radius` of `center`."""
    return st.one_of(
        star_paths(center, radius),
        slots(center, radius),
        rectangles(center, radius),
        st.floats(0.2, 1.0).map(lambda part: Circle(center, radius * part)),
    )


@st.composite
def profiles(draw: Draw, center: Vec2, radius: float) -> Profile:
    """A profile; its hole, if it has one, keeps clear of the outer loop.

    A side of a three-cornered star path comes within .3 of the centre, its arc within .235.
    """
    outer = draw(st.one_of(star_paths(center, radius), st.just(Circle(center, radius))))
    return Profile(outer, (draw(loops(center, 0.2 * radius)),) if draw(st.booleans()) else ())


axes = st.sampled_from(
    [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)]
)
directions = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: math.hypot(*v) > 0.2).map(unit)


@st.composite
def planes(draw: Draw) -> Plane:
    """Along the axes or oblique."""
    source = draw(st.sampled_from([axes, directions]))
    normal: Vec3 = draw(source)
    side = draw(source.filter(lambda v: math.hypot(*cross(normal, v)) > 0.3))
    return Plane(draw(st.tuples(coordinates, coordinates, coordinates)), unit(cross(side, normal)), normal)


@st.composite
def extents(draw: Draw) -> Extent:
    """Every type; a one-sided extent of either sign."""
    kind = draw(st.sampled_from(ExtentType))
    match kind:
        case ExtentType.ONE_SIDE:
            return Extent(kind, draw(lengths) * draw(st.sampled_from([1, -1])))
        case ExtentType.SYMMETRIC:
            return Extent(kind, draw(lengths))
        case ExtentType.TWO_SIDES:
            return Extent(kind, draw(lengths), draw(lengths))


@st.composite
def extrudes(draw: Draw, operation: Operation) -> Extrude:
    """One or two profiles side by side."""
    radius = draw(lengths)
    x, y = draw(coordinates), draw(coordinates)
    found = [draw(profiles((x + 2.5 * radius * i, y), radius)) for i in range(draw(st.integers(1, 2)))]
    return Extrude(draw(planes()), tuple(found), draw(extents()), operation)


@st.composite
def programs(draw: Draw) -> CadProgram:
    """One to three extrudes, in any unit."""
    operations = [Operation.NEW, *draw(st.lists(st.sampled_from(Operation), max_size=2))]
    return CadProgram(tuple(draw(extrudes(operation)) for operation in operations))


@st.composite
def command_texts(draw: Draw, grammar: CommandGrammar) -> str:
    """A walk through the grammar: any text that a generator could write under its mask."""
    characters = []
    state = grammar.start
    for _ in range(draw(st.integers(1, 300))):
        char = draw(st.sampled_from(grammar.expected(state)))
        characters.append(char)
        following = grammar.advance(state, char)
        assert following is not None
        state = following
    while not grammar.is_complete(state):
        # The way out is always short: end the number, then take what the syntax asks for.
        char = draw(st.sampled_from(grammar.expected(state)))
        characters.append(char)
        following = grammar.advance(state, char)
        assert following is not None
        state = following
    return "".join(characters)
