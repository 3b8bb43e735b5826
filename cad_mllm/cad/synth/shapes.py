"""Outlines of composed parts and of their bosses, holes and pockets: one list for all of them.

A shape is made for a box, and for an estimate of the characters of command text that it may take: gears,
scallops and combs get as many teeth as that allows. All lengths in grid steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cad_mllm.cad.program import Arc, Circle, Line, Loop, Path, Vec2
from cad_mllm.cad.synth.draw import Draw
from cad_mllm.cad.synth.sketches import centered, chain, on_circle, rounded, slot

CORNER, STRAIGHT, SLANTED, CURVED = 5.5, 3.7, 7.0, 11.0
"""Characters of a path's first corner, a line along an axis, another line, an arc; estimates."""
ROUND = 9.0
"""Characters of a circle."""


@dataclass(frozen=True)
class Rect:
    """A rectangle along the axes, given by its centre and size."""

    x: float
    y: float
    width: float
    height: float

    def shrunk(self, margin: float) -> "Rect":
        """The rectangle without a margin all around."""
        return Rect(self.x, self.y, self.width - 2 * margin, self.height - 2 * margin)


@dataclass(frozen=True)
class Shape:
    """A loop around the origin, and what composing needs to know of it."""

    loop: Loop
    adjective: str
    noun: str
    """What a body with this outline is called."""
    measure: str
    """Its dimensions in words."""
    inside: Rect
    """A rectangle that lies inside."""
    front: float | None = None
    """Length of the straight edge at its lowest y, around x = 0; None: none to speak of."""


def _round(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    diameter = min(width, height)
    side = math.floor(0.7 * diameter)
    return Shape(
        Circle((0.0, 0.0), diameter / 2),
        "round",
        "disc",
        f"{draw.mm(diameter)} in diameter",
        Rect(0, 0, side, side),
    )


def _rectangular(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    return Shape(
        centered(width, height),
        "square" if width == height else "rectangular",
        "block",
        draw.by(width, height),
        Rect(0, 0, width, height),
        front=width,
    )


def _half_round(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    """A half disc; its straight side is below."""
    radius = min(width / 2, height)
    half = width / 2
    if radius != half or radius < 2:
        return None
    low = -radius / 2
    loop = Path((-half, low), (Line((half, low)), Arc((-half, low), math.pi)))
    inside = Rect(0, low + radius * 0.35, math.floor(1.3 * radius), radius * 0.6)
    return Shape(loop, "half-round", "half disc", f"{draw.mm(width)} wide", inside, front=width)


def _stadium(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    if width < height + 2:
        return None
    inside = Rect(0, 0, width - height, height)
    return Shape(
        slot(width, height), "slot-shaped", "link", draw.by(width, height), inside, front=width - height
    )


def _rounded(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    most = min(width, height) // 2 - 1
    if most < 1:
        return None
    radius = draw.whole(1, min(most, 10))
    inside = Rect(0, 0, width - radius, height - radius)
    words = f"{draw.by(width, height)}, corner radius {draw.mm(radius)}"
    front = width - 2 * radius
    return Shape(rounded(width, height, radius), "rounded", "rounded block", words, inside, front)


def _chamfered(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    most = min(width, height) // 2 - 1
    if most < 1:
        return None
    x, y, cut = width / 2, height / 2, draw.whole(1, min(most, 10))
    loop = chain(
        (-x + cut, -y), (x - cut, -y), (x, -y + cut), (x, y - cut),
        (x - cut, y), (-x + cut, y), (-x, y - cut), (-x, -y + cut),
    )  # fmt: skip
    words = f"{draw.by(width, height)}, chamfered by {draw.mm(cut)}"
    inside, front = Rect(0, 0, width - cut, height - cut), width - 2 * cut
    return Shape(loop, "chamfered", "chamfered block", words, inside, front)


def _polygonal(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    sides = draw.pick((6, 6, 8))
    across = min(width, height)
    side = math.floor(0.6 * across)
    adjective = {6: "hexagonal", 8: "octagonal"}[sides]
    return Shape(
        chain(*on_circle(sides, across / 2)),
        adjective,
        f"{adjective} prism",
        f"{draw.mm(across)} over opposite corners",
        Rect(0, 0, side, side),
    )


def _angle(draw: Draw, width: int, height: int, _: float) -> Shape | None:
    """An L, T, U, or a cross-section with two flanges (H)."""
    if min(width, height) < 6:
        return None
    x, y, wall = width / 2, height / 2, 2 * draw.whole(1, max(1, min(width, height) // 6))
    letter = draw.pick("LTUH")
    inner, middle = -y + wall, wall / 2
    loops = {
        "L": [(-x, -y), (x, -y), (x, inner), (-x + wall, inner), (-x + wall, y), (-x, y)],
        "T": [(-x, -y), (x, -y), (x, inner), (middle, inner), (middle, y), (-middle, y), (-middle, inner),
              (-x, inner)],
        "U": [(-x, -y), (x, -y), (x, y), (x - wall, y), (x - wall, inner), (-x + wall, inner), (-x + wall, y),
              (-x, y)],
        "H": [(-x, -y), (x, -y), (x, inner), (middle, inner), (middle, y - wall), (x, y - wall), (x, y),
              (-x, y), (-x, y - wall), (-middle, y - wall), (-middle, inner), (-x, inner)],
    }  # fmt: skip
    if letter == "H" and 2 * wall >= height - 1:
        return None
    words = f"{draw.by(width, height)}, {draw.mm(wall)} thick"
    inside = Rect(0, -y + wall / 2, width, wall)
    return Shape(chain(*loops[letter]), f"{letter}-shaped", f"{letter} bracket", words, inside, front=width)


def _stepped(draw: Draw, width: int, height: int, budget: float) -> Shape | None:
    """A block that falls in steps to the right."""
    most = int(min((budget - CORNER) / (2 * STRAIGHT), width // 3, height // 3, 12))
    if most < 2:
        return None
    steps = most if most < 4 else draw.whole(most // 2, most)
    tread, riser = width // (steps + 1), height // (steps + 1)
    if tread < 1 or riser < 1:
        return None
    x, y = width / 2, height / 2
    corners: list[Vec2] = [(-x, -y), (x, -y), (x, y - riser * steps)]
    for step in range(steps, 0, -1):
        corners += [(x - tread * (steps - step + 1), y - riser * step),
                    (x - tread * (steps - step + 1), y - riser * (step - 1))]  # fmt: skip
    corners.append((-x, y))
    words = f"{draw.by(width, height)}, {steps} steps of {draw.by(tread, riser)}"
    low = height - riser * steps
    inside = Rect(0, -y + low / 2, width, low)
    return Shape(chain(*corners), "stepped", "stepped block", words, inside, front=width)


def _comb(draw: Draw, width: int, height: int, budget: float) -> Shape | None:
    """A bar with rectangular teeth along one side, or both."""
    both = budget > 200 and draw.flip()
    teeth = int((budget - CORNER - 3 * STRAIGHT) / (4 * STRAIGHT) / (2 if both else 1))
    teeth = min(teeth, (width - 1) // 2)
    depth = max(1, height // 4)
    if teeth < 2 or height < 4:
        return None
    pitch = (width - 1) // teeth
    x, y, tooth = width / 2, height / 2, pitch / 2
    low, high = -y + depth if both else -y, y - depth
    first = -(teeth * pitch - tooth) / 2
    upper: list[Vec2] = []
    for number in reversed(range(teeth)):
        left = first + number * pitch
        upper += [(left + tooth, high), (left + tooth, y), (left, y), (left, high)]
    lower = [(px, -py) for px, py in reversed(upper)] if both else []
    loop = chain((-x, low), *lower, (x, low), (x, high), *upper, (-x, high))
    where = "on both sides" if both else "on one side"
    words = f"{draw.by(width, height)}, {teeth} teeth {draw.mm(depth)} deep every {draw.mm(pitch)} {where}"
    inside = Rect(0, (low + high) / 2, width, high - low)
    return Shape(loop, "comb-shaped", "toothed bar", words, inside, None if both else width)


def _fluted(draw: Draw, width: int, height: int, budget: float) -> Shape | None:
    """A bar with half-round beads or flutes along one side, or both."""
    both = budget > 120 and draw.flip()
    count = int((budget - CORNER - 3 * STRAIGHT) / (STRAIGHT + CURVED) / (2 if both else 1))
    count = min(count, (width - 1) // 2)
    if count < 2:
        return None
    pitch = (width - 1) // count
    across = min(pitch - 1, height // 3) if pitch > 2 else pitch / 2
    if across < 1:
        return None
    beads = draw.flip()
    x, y, turn = width / 2, height / 2, math.pi if beads else -math.pi
    low, high = (-y + across / 2 if both else -y, y - across / 2) if beads else (-y, y)
    first = -(count * pitch - (pitch - across)) / 2
    lefts = [first + number * pitch for number in range(count)]
    segments: list[Line | Arc] = []
    if both:
        for left in lefts:
            segments += [Line((left, low)), Arc((left + across, low), turn)]
    segments += [Line((x, low)), Line((x, high))]
    for left in reversed(lefts):
        segments += [Line((left + across, high)), Arc((left, high), turn)]
    loop = Path((-x, low), (*segments, Line((-x, high)), Line((-x, low))))
    where = "on both sides" if both else "on one side"
    what = "beads" if beads else "flutes"
    words = f"{draw.by(width, height)}, {count} {what} of {draw.mm(across)} every {draw.mm(pitch)} {where}"
    bottom, top = (low, high) if beads else (low + across / 2 if both else low, high - across / 2)
    inside = Rect(0, (bottom + top) / 2, width, top - bottom)
    return Shape(loop, "fluted", "fluted bar", words, inside, None if both else width)


def _gear(draw: Draw, width: int, height: int, budget: float) -> Shape | None:
    """A wheel with trapezoidal teeth, one of them in the direction of x."""
    across = min(width, height)
    most = min((budget - CORNER) / (4 * SLANTED), math.pi * across / 5)
    teeth = int(most) // 2 * 2
    if teeth < 6 or across < 10:
        return None
    pitch = 2 * math.pi / teeth
    tip = across / 2 / math.cos(0.14 * pitch)
    depth = max(1, round(min(across / 10, tip * pitch / 2.5)))
    root = across / 2 - depth
    corners = [
        (radius * math.cos(pitch * (number + turn)), radius * math.sin(pitch * (number + turn)))
        for number in range(teeth)
        for radius, turn in ((root, -0.28), (tip, -0.14), (tip, 0.14), (root, 0.28))
    ]
    side = math.floor(1.3 * root)
    words = f"{draw.mm(across)} over the tips, {teeth} teeth {draw.mm(depth)} deep"
    return Shape(chain(*corners), "gear-shaped", "gear wheel", words, Rect(0, 0, side, side))


def _scalloped(draw: Draw, width: int, height: int, budget: float) -> Shape | None:
    """A wheel of arcs that bulge outwards, one of them in the direction of x."""
    across = min(width, height)
    arcs = int(min((budget - CORNER) / CURVED, across / 2)) // 2 * 2
    if arcs < 4 or across < 6:
        return None
    half, sweep = math.pi / arcs, draw.pick((1.6, 2.0, 2.4))
    # The middle of an arc lies at cos(half) + sin(half) tan(sweep / 4) of the corners' radius.
    radius = across / 2 / (math.cos(half) + math.sin(half) * math.tan(sweep / 4))
    corners = [
        (radius * math.cos(half * (2 * i - 1)), radius * math.sin(half * (2 * i - 1))) for i in range(arcs)
    ]
    loop = Path(corners[0], tuple(Arc(corner, sweep) for corner in (*corners[1:], corners[0])))
    side = math.floor(1.3 * radius * math.cos(half))
    words = f"{draw.mm(across)} over {arcs} bulges"
    return Shape(loop, "scalloped", "scalloped wheel", words, Rect(0, 0, side, side))


Maker = Callable[[Draw, int, int, float], Shape | None]


@dataclass(frozen=True)
class _Entry:
    make: Maker
    least: float
    """Characters of command text that it takes, at the least and at the most."""
    most: float
    weight: float


_ENTRIES = (
    _Entry(_round, ROUND, ROUND, 7),
    _Entry(_rectangular, CORNER + 3 * STRAIGHT, CORNER + 3 * STRAIGHT, 8),
    _Entry(_half_round, CORNER + CURVED, CORNER + CURVED, 2),
    _Entry(_stadium, CORNER + STRAIGHT + 2 * CURVED, CORNER + 2 * STRAIGHT + 2 * CURVED, 6),
    _Entry(_rounded, CORNER + 3 * STRAIGHT + 4 * CURVED, CORNER + 4 * STRAIGHT + 4 * CURVED, 12),
    _Entry(_chamfered, CORNER + 4 * STRAIGHT + 3 * SLANTED, CORNER + 4 * STRAIGHT + 4 * SLANTED, 2),
    _Entry(_polygonal, CORNER + 5 * SLANTED, CORNER + 7 * SLANTED, 2),
    _Entry(_angle, CORNER + 5 * STRAIGHT, CORNER + 11 * STRAIGHT, 3),
    _Entry(_stepped, CORNER + 6 * STRAIGHT, 120.0, 1.5),
    _Entry(_comb, CORNER + 11 * STRAIGHT, 700.0, 1.5),
    _Entry(_fluted, CORNER + 5 * STRAIGHT + 2 * CURVED, 700.0, 9),
    _Entry(_gear, CORNER + 24 * SLANTED, 900.0, 1.5),
    _Entry(_scalloped, CORNER + 4 * CURVED, 600.0, 12),
)
_WHEELS = (_round, _polygonal, _gear, _scalloped)


def shape_for(draw: Draw, width: int, height: int, budget: float, wheel: bool | None = None) -> Shape:
    """A shape as wide as `width` and at most as high as `height`, of about `budget` characters.

    `wheel` asks for one that is as high as wide (whatever `height`), or for one that is none.
    """
    entries = [e for e in _ENTRIES if e.least <= 1.2 * budget and e.most >= 0.6 * budget]
    entries = [e for e in entries if wheel is None or wheel == (e.make in _WHEELS)]
    while entries:
        entry = draw.weighted(entries, [e.weight for e in entries])
        shape = entry.make(draw, width, width if wheel else height, budget)
        if shape is not None:
            return shape
        entries.remove(entry)
    is_round = budget < 12 if wheel is None else wheel
    plain = (_round if is_round else _rectangular)(draw, width, width if wheel else height, budget)
    assert plain is not None
    return plain
