"""Procedural mechanical parts with captions: the dummy data, made of the same types as the real ones.

Every length is a whole number of grid steps (half steps for some centres) and the longest side of a part is
`LONGEST` steps, so that a normalised part falls on or near the levels of the quantised command text. One seed
gives one part and one caption, always the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

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

LONGEST = 64
"""Longest side of every part, in grid steps."""
STEP_SIZES_MM = (0.5, 1.0, 1.5, 2.0, 2.5)
"""What one grid step may measure."""

_T = TypeVar("_T")


class _Draw:
    """One part's random choices, and the millimetres behind its grid steps."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.step_mm = self.pick(STEP_SIZES_MM)

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self._rng.integers(len(options)))]

    def whole(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))

    def even(self, low: int, high: int) -> int:
        """An even number of steps in [low, high] (at least `low` rounded up): its half is on the grid too."""
        return 2 * self.whole((low + 1) // 2, max((low + 1) // 2, high // 2))

    def flip(self) -> bool:
        return bool(self._rng.integers(2))

    def mm(self, steps: float) -> str:
        """`steps` as a length in words: "24 mm", "10.5 mm"."""
        return f"{round(steps * self.step_mm, 2):g} mm"

    def by(self, *steps: float) -> str:
        """Several lengths in words: "64 x 32 x 8 mm"."""
        return " x ".join(f"{round(s * self.step_mm, 2):g}" for s in steps) + " mm"


@dataclass(frozen=True)
class _Part:
    """A part in grid steps with the main axis z; `name` fits behind "a", `details` are full sentences."""

    extrudes: tuple[Extrude, ...]
    name: str
    details: tuple[str, ...]


def make_program(seed: int) -> tuple[CadProgram, str]:
    """Make one part, in millimetres, with a caption that states its kind and its main dimensions."""
    draw = _Draw(seed)
    part = draw.pick(_FAMILIES)(draw)
    axis, rotation = draw.pick(_MAIN_AXES)
    program = CadProgram(tuple(_placed(extrude, rotation, draw.step_mm) for extrude in part.extrudes))
    return program, _caption(draw, part, axis)


def _caption(draw: _Draw, part: _Part, axis: str) -> str:
    article = "an" if part.name[0] in "aeiouL" else "a"  # an L bracket, but a U bracket
    opening = draw.pick(
        ("{} {}.", "This is {} {}.", "Create {} {}.", "Model {} {}.", "Design {} {}.", "The part is {} {}.")
    )
    first = opening.format(article, part.name)
    sentences = [first[0].upper() + first[1:], *part.details]
    sentences.append(
        draw.pick((f"Its main axis is {axis}.", f"It is built up along {axis}.", f"It points along {axis}."))
    )
    return " ".join(sentences)


# --- sketches and features, in grid steps -----------------------------------------------------------------


def _chain(*points: Vec2) -> Path:
    return Path(points[0], tuple(Line(p) for p in (*points[1:], points[0])))


def _rectangle(x: float, y: float, width: float, height: float) -> Path:
    return _chain((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def _centered(width: float, height: float) -> Path:
    return _rectangle(-width / 2, -height / 2, width, height)


def _rounded(width: float, height: float, radius: float) -> Path:
    """A centred rectangle with quarter circles for corners; plain for radius 0."""
    if radius == 0:
        return _centered(width, height)
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


def _slot(length: float, width: float) -> Path:
    """A centred stadium along x: two straight sides, two half circles."""
    x, r = (length - width) / 2, width / 2
    return Path((-x, -r), (Line((x, -r)), Arc((x, r), math.pi), Line((-x, r)), Arc((-x, -r), math.pi)))


def _on_circle(count: int, radius: float) -> list[Vec2]:
    turns = [2 * math.pi * i / count for i in range(count)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]


def _flat(z: float = 0.0) -> Plane:
    return Plane((0.0, 0.0, float(z)), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))


def _feature(
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
    return Extrude(plane or _flat(), profiles, Extent(sides, float(length), float(back)), operation)


def _up(draw: _Draw, outline: Loop, height: int, holes: Sequence[Loop] = ()) -> Extrude:
    """The body from z = 0 to `height`, described in one of the ways in which designers do."""
    match draw.whole(0, 3):
        case 0:
            return _feature(outline, -height, plane=_flat(height), holes=holes)
        case 1 if height % 2 == 0:
            return _feature(
                outline, height / 2, plane=_flat(height / 2), holes=holes, sides=ExtentType.SYMMETRIC
            )
        case 2 if height >= 4:
            back = height // 4
            two = ExtentType.TWO_SIDES
            return _feature(outline, height - back, plane=_flat(back), holes=holes, sides=two, back=back)
        case _:
            return _feature(outline, height, holes=holes)


def _holes_through(draw: _Draw, outline: Loop, height: int, holes: Sequence[Loop]) -> tuple[Extrude, ...]:
    """A body with through holes: as loops of its profile, or cut afterwards."""
    if not holes or draw.flip():
        return (_up(draw, outline, height, holes),)
    return _up(draw, outline, height), _feature(holes, -height, Operation.CUT, plane=_flat(height))


_MAIN_AXES = (
    ("z", ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    ("z", ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    ("y", ((1, 0, 0), (0, 0, 1), (0, -1, 0))),
    ("x", ((0, 0, 1), (1, 0, 0), (0, 1, 0))),
)
"""Name of the axis, and the rotation (rows) that turns z into it."""


def _placed(extrude: Extrude, rotation: tuple[Vec3, ...], scale: float) -> Extrude:
    """The feature turned and scaled."""

    def turned(v: Vec3, factor: float = 1.0) -> Vec3:
        x, y, z = (factor * sum(r * c for r, c in zip(row, v, strict=True)) for row in rotation)
        return x, y, z

    def flat(p: Vec2) -> Vec2:
        return p[0] * scale, p[1] * scale

    def loop(it: Loop) -> Loop:
        if isinstance(it, Circle):
            return Circle(flat(it.center), it.radius * scale)
        return Path(flat(it.start), tuple(replace(segment, end=flat(segment.end)) for segment in it.segments))

    plane = extrude.plane
    return Extrude(
        Plane(turned(plane.origin, scale), turned(plane.x_axis), turned(plane.normal)),
        tuple(Profile(loop(p.outer), tuple(loop(hole) for hole in p.holes)) for p in extrude.profiles),
        replace(extrude.extent, one=extrude.extent.one * scale, two=extrude.extent.two * scale),
        extrude.operation,
    )


# --- families ---------------------------------------------------------------------------------------------


def _plate(draw: _Draw) -> _Part:
    width, thickness, radius = draw.even(24, 56), draw.even(4, 12), draw.pick((0, 0, 4, 8))
    hole, inset = draw.whole(2, 4), draw.pick((8, 9, 10))
    x, y = LONGEST / 2 - inset, width / 2 - inset
    pattern, centers = draw.pick(
        (
            ("four holes near its corners", [(-x, -y), (x, -y), (x, y), (-x, y)]),
            ("two holes on its long centre line", [(-x, 0.0), (x, 0.0)]),
            ("a row of three holes", [(-20.0, 0.0), (0.0, 0.0), (20.0, 0.0)]),
            ("five holes, one of them in the centre", [(-x, -y), (x, -y), (x, y), (-x, y), (0.0, 0.0)]),
        )
    )
    corners = f"rounded corners of radius {draw.mm(radius)}" if radius else "square corners"
    size = draw.by(LONGEST, width, thickness)
    return _Part(
        _holes_through(draw, _rounded(LONGEST, width, radius), thickness, [Circle(c, hole) for c in centers]),
        draw.pick(
            (
                f"rectangular plate of {size}",
                f"flat plate, {size}, with {corners}",
                f"mounting plate measuring {size}",
            )
        ),
        (f"It has {corners} and {pattern}, each {draw.mm(2 * hole)} in diameter.",),
    )


def _bracket(draw: _Draw) -> _Part:
    shape = draw.pick(("L", "T", "U"))
    height, wall, depth = draw.even(28, 56), draw.even(6, 12), draw.even(16, 48)
    half = LONGEST / 2
    match shape:
        case "L":
            outline = _chain(
                (-half, 0),
                (half, 0),
                (half, wall),
                (-half + wall, wall),
                (-half + wall, height),
                (-half, height),
            )
            post = -half
        case "T":
            outline = _chain(
                (-half, 0), (half, 0), (half, wall), (wall / 2, wall),
                (wall / 2, height), (-wall / 2, height), (-wall / 2, wall), (-half, wall),
            )  # fmt: skip
            post = -wall / 2
        case _:
            outline = _chain(
                (-half, 0), (half, 0), (half, height), (half - wall, height),
                (half - wall, wall), (-half + wall, wall), (-half + wall, height), (-half, height),
            )  # fmt: skip
            post = -half
    extrudes = [_up(draw, outline, depth)]
    details = [
        f"Its base is {draw.mm(LONGEST)} long, its height {draw.mm(height)}, its depth {draw.mm(depth)}.",
        f"The walls are {draw.mm(wall)} thick.",
    ]
    radius = draw.whole(2, 4)
    if draw.flip():
        middle = Plane((post, (wall + height) / 2, depth / 2), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
        extrudes.append(_feature(Circle((0.0, 0.0), radius), wall, Operation.CUT, plane=middle))
        where = "left upright" if shape == "U" else "upright"
        details.append(f"A hole of {draw.mm(2 * radius)} goes through the {where}.")
    return _Part(
        tuple(extrudes),
        draw.pick(
            (
                f"{shape} bracket",
                f"{shape}-shaped bracket",
                f"bracket with {'an' if shape == 'L' else 'a'} {shape} section",
            )
        ),
        tuple(details),
    )


def _flange(draw: _Draw) -> _Part:
    thickness, bore, count, bolt = (
        draw.even(6, 12),
        draw.whole(6, 10),
        draw.pick((3, 4, 6, 8)),
        draw.pick((2, 3)),
    )
    circle = 25
    holes: list[Loop] = [Circle(c, bolt) for c in _on_circle(count, circle)]
    details = [
        f"The disc is {draw.mm(LONGEST)} in diameter and {draw.mm(thickness)} thick.",
        f"Its bore is {draw.mm(2 * bore)}.",
    ]
    details.append(f"{count} bolt holes of {draw.mm(2 * bolt)} lie on a circle of {draw.mm(2 * circle)}.")
    disc = Circle((0.0, 0.0), LONGEST / 2)
    if draw.flip():
        hub, rise = bore + draw.whole(4, 8), draw.even(8, 24)
        extrudes = (
            *_holes_through(draw, disc, thickness, holes),
            _feature(Circle((0.0, 0.0), hub), rise, Operation.JOIN, plane=_flat(thickness)),
            _feature(Circle((0.0, 0.0), bore), thickness + rise, Operation.CUT),
        )
        details.append(f"A hub of {draw.mm(2 * hub)} rises {draw.mm(rise)} above it.")
        return _Part(extrudes, draw.pick(("flange with a hub", "hubbed round flange")), tuple(details))
    extrudes = _holes_through(draw, disc, thickness, [Circle((0.0, 0.0), bore), *holes])
    return _Part(extrudes, draw.pick(("round flange", "flat circular flange")), tuple(details))


def _shaft(draw: _Draw) -> _Part:
    count = draw.whole(2, 4)
    cuts = sorted(draw.whole(1, 7) + 8 * i for i in range(1, 7))[:: 6 // (count - 1)][: count - 1]
    ends = [0, *cuts, LONGEST]
    radii = [draw.whole(5, 16)]
    while len(radii) < count:
        radii.append(draw.pick([r for r in range(4, 20, 2) if r != radii[-1]]))
    extrudes: list[Extrude] = []
    for low, high, radius in zip(ends, ends[1:], radii, strict=False):
        operation = Operation.JOIN if extrudes else Operation.NEW
        extrudes.append(_feature(Circle((0.0, 0.0), radius), high - low, operation, plane=_flat(low)))
    sections = ", ".join(
        f"{draw.mm(2 * r)} over {draw.mm(b - a)}" for a, b, r in zip(ends, ends[1:], radii, strict=False)
    )
    details = [
        f"It is {draw.mm(LONGEST)} long in {count} sections; the diameters from the start are {sections}."
    ]
    if draw.flip():
        bore = draw.whole(2, min(radii) - 1)
        extrudes.append(_feature(Circle((0.0, 0.0), bore), LONGEST, Operation.CUT))
        details.append(f"A bore of {draw.mm(2 * bore)} runs through its whole length.")
    return _Part(
        tuple(extrudes), draw.pick(("stepped shaft", "turned shaft with steps", "shaft")), tuple(details)
    )


def _link(draw: _Draw) -> _Part:
    width, thickness = draw.even(16, 32), draw.even(4, 12)
    eye = draw.whole(3, width // 2 - 4)
    x = (LONGEST - width) / 2
    size = draw.by(LONGEST, width, thickness)
    if draw.flip():
        holes: list[Loop] = [Circle((-x, 0.0), eye), Circle((x, 0.0), eye)]
        details = f"Both ends are half round, with eyes of {draw.mm(2 * eye)}, {draw.mm(2 * x)} apart."
        name = draw.pick((f"connecting link of {size}", f"link plate, {size}, with two eyes"))
    else:
        slot = draw.even(24, LONGEST - width + 2 * eye)
        holes = [_slot(slot + 0.0, 2 * eye)] if slot > 2 * eye else [Circle((0.0, 0.0), eye)]
        details = f"Both ends are half round. A slot of {draw.by(slot, 2 * eye)} runs along its middle."
        name = draw.pick((f"slotted link of {size}", f"slotted bar, {size}, with round ends"))
    return _Part(_holes_through(draw, _slot(LONGEST, width), thickness, holes), name, (details,))


def _pocket(draw: _Draw) -> _Part:
    width, height, wall = draw.even(28, LONGEST), draw.even(12, 40), draw.whole(3, 7)
    floor, radius = draw.whole(2, 6), draw.pick((0, 2, 4))
    inside = _rounded(LONGEST - 2 * wall, width - 2 * wall, radius)
    extrudes = (
        _up(draw, _centered(LONGEST, width), height),
        _feature(inside, floor - height, Operation.CUT, plane=_flat(height)),
    )
    corners = f", its corners rounded with {draw.mm(radius)}" if radius else ""
    return _Part(
        extrudes,
        draw.pick(
            (
                f"box of {draw.by(LONGEST, width, height)} with a pocket",
                f"open tray, {draw.by(LONGEST, width, height)}",
                f"rectangular housing of {draw.by(LONGEST, width, height)}",
            )
        ),
        (f"The walls are {draw.mm(wall)} thick; the pocket is {draw.mm(height - floor)} deep{corners}.",),
    )


def _ribs(draw: _Draw) -> _Part:
    width, thickness = draw.even(32, 56), draw.even(4, 8)
    count, rib, rise = draw.whole(2, 4), draw.pick((2, 4)), draw.even(6, 24)
    pitch = (LONGEST - 16) // (count - 1) // 2 * 2
    lefts = [-pitch * (count - 1) / 2 + pitch * i - rib / 2 for i in range(count)]
    bars = [_rectangle(x, -width / 2, rib, width) for x in lefts]
    return _Part(
        (
            _up(draw, _centered(LONGEST, width), thickness),
            _feature(bars, rise, Operation.JOIN, plane=_flat(thickness)),
        ),
        draw.pick(
            (f"plate with {count} ribs", f"ribbed plate of {draw.by(LONGEST, width)}", "ribbed base plate")
        ),
        (
            f"The plate measures {draw.by(LONGEST, width, thickness)}.",
            f"{count} parallel ribs, {draw.mm(rib)} thick and {draw.mm(rise)} high, stand across it.",
        ),
    )


def _wedge(draw: _Draw) -> _Part:
    """A block whose top is cut off by a plane tilted about x or y."""
    about_y, degrees = draw.flip(), draw.pick((15, 20, 30, 40))
    width, low = draw.even(24, 48), draw.even(6, 16)
    run, across = (LONGEST, width) if about_y else (width, LONGEST)
    rise = math.tan(math.radians(degrees)) * run
    height = 2 * math.ceil((low + rise) / 2) if low + rise <= LONGEST else LONGEST
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    length = math.hypot(run, rise)
    if about_y:  # rises along x
        plane = Plane((-run / 2, 0.0, float(low)), (cos, 0.0, sin), (-sin, 0.0, cos))
        tool = _rectangle(-4, -across / 2 - 1, length + 8, across + 2)
    else:  # rises along y
        plane = Plane((0.0, -run / 2, float(low)), (1.0, 0.0, 0.0), (0.0, -sin, cos))
        tool = _rectangle(-across / 2 - 1, -4, across + 2, length + 8)
    reach = math.ceil((height - low) * cos) + 2
    extrudes = [
        _up(draw, _centered(LONGEST, width), height),
        _feature(tool, reach, Operation.CUT, plane=plane),
    ]
    direction = "length" if about_y else "width"
    details = [
        f"The sloping top rises by {degrees} degrees along its {direction}.",
        f"It is {draw.mm(low)} high at the low end.",
    ]
    if draw.flip():
        bore = draw.whole(3, 8)
        extrudes.append(_feature(Circle((0.0, 0.0), bore), height, Operation.CUT))
        details.append(f"A vertical hole of {draw.mm(2 * bore)} goes through its centre.")
    base = draw.by(LONGEST, width)
    return _Part(
        tuple(extrudes),
        draw.pick(
            (f"wedge on a base of {base}", f"block of {base} with a slanted top", f"ramp with a {base} base")
        ),
        tuple(details),
    )


def _ring(draw: _Draw) -> _Part:
    kind = draw.pick(("ring", "tube", "half ring"))
    if kind == "tube":
        outer, height = draw.whole(8, 20), LONGEST
    else:
        outer, height = LONGEST // 2, draw.even(6, 32)
    inner = draw.whole(outer // 3, outer - 2)
    if kind == "half ring":
        outline: Loop = Path(
            (float(outer), 0.0),
            (
                Arc((-float(outer), 0.0), math.pi),
                Line((-float(inner), 0.0)),
                Arc((float(inner), 0.0), -math.pi),
                Line((float(outer), 0.0)),
            ),
        )
        extrudes: tuple[Extrude, ...] = (_up(draw, outline, height),)
    else:
        extrudes = _holes_through(draw, Circle((0.0, 0.0), outer), height, [Circle((0.0, 0.0), inner)])
    names = {
        "ring": ("flat ring", "ring", "spacer ring"),
        "tube": ("tube", "hollow cylinder", "straight pipe"),
        "half ring": ("half ring", "semicircular ring segment"),
    }
    word = "long" if kind == "tube" else "thick"
    return _Part(
        extrudes,
        draw.pick(names[kind]),
        (
            f"The outer diameter is {draw.mm(2 * outer)}, the inner {draw.mm(2 * inner)}.",
            f"It is {draw.mm(height)} {word}.",
        ),
    )


def _nut(draw: _Draw) -> _Part:
    sides = draw.pick((6, 6, 6, 8))
    height, bore = draw.even(12, 40), draw.whole(8, 20)
    prefix = {6: "hexagonal", 8: "octagonal"}[sides]
    outline = _chain(*_on_circle(sides, LONGEST / 2))
    return _Part(
        _holes_through(draw, outline, height, [Circle((0.0, 0.0), bore)]),
        draw.pick((f"{prefix} nut", f"{prefix} prism with a hole", f"{sides}-sided nut")),
        (
            f"It is {draw.mm(LONGEST)} across opposite corners and {draw.mm(height)} high.",
            f"Its central hole is {draw.mm(2 * bore)} in diameter.",
        ),
    )


def _oblique_hole(draw: _Draw) -> _Part:
    """A block with a hole drilled at an angle from the centre of its top."""
    width, height, radius = draw.even(24, 48), draw.even(16, 32), draw.whole(3, 6)
    degrees = draw.pick((15, 20, 30))
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    about_y = draw.flip()
    direction = "length" if about_y else "width"
    if about_y:
        plane = Plane((0.0, 0.0, height / 2), (cos, 0.0, -sin), (sin, 0.0, cos))
    else:
        plane = Plane((0.0, 0.0, height / 2), (1.0, 0.0, 0.0), (0.0, -sin, cos))
    reach = math.ceil(height / 2 / cos + radius * math.tan(math.radians(degrees))) + 1
    drill = _feature(
        Circle((0.0, 0.0), radius), reach, Operation.CUT, plane=plane, sides=ExtentType.SYMMETRIC
    )
    size = draw.by(LONGEST, width, height)
    return _Part(
        (_up(draw, _centered(LONGEST, width), height), drill),
        draw.pick(
            (f"block of {size} with an oblique hole", f"rectangular block, {size}, drilled at an angle")
        ),
        (f"The hole of {draw.mm(2 * radius)} is tilted by {degrees} degrees along its {direction}.",),
    )


def _rounded_block(draw: _Draw) -> _Part:
    """A disc with two flats (a disc and a bar, intersected) or with one (an arc and its chord)."""
    height, radius = draw.even(10, 32), LONGEST // 2
    if draw.flip():
        flats = draw.even(28, 48)
        extrudes: tuple[Extrude, ...] = (
            _up(draw, Circle((0.0, 0.0), radius), height),
            _feature(_centered(LONGEST + 2, flats), height, Operation.INTERSECT),
        )
        name = draw.pick(("disc with two parallel flats", "round plate with two flats"))
        detail = f"The flats are {draw.mm(flats)} apart."
    else:
        off = draw.whole(8, 24)
        half_chord = math.sqrt(radius**2 - off**2)
        sweep = 2 * math.pi - 2 * math.atan2(half_chord, off)
        outline = Path(
            (half_chord, -float(off)),
            (Arc((-half_chord, -float(off)), sweep), Line((half_chord, -float(off)))),
        )
        extrudes = (_up(draw, outline, height),)
        name = draw.pick(("D-shaped disc", "disc with one flat"))
        detail = f"The flat lies {draw.mm(off)} from the centre."
    size = f"It is {draw.mm(LONGEST)} in diameter and {draw.mm(height)} thick."
    return _Part(extrudes, name, (size, detail))


_FAMILIES: tuple[Callable[[_Draw], _Part], ...] = (
    _plate,
    _bracket,
    _flange,
    _shaft,
    _link,
    _pocket,
    _ribs,
    _wedge,
    _ring,
    _nut,
    _oblique_hole,
    _rounded_block,
)
