"""Parts without a family: an outline and a few large features, each of whose dimensions is free.

Some fifteen lengths, each anything from a tenth of the part to all of it, are more than a training set can
hold in all combinations: the nearest known part is a poor answer, lengths must be read off the input.

A part stands on z = 0 with its lower left corner at the origin, from where positions are told. Whatever is
drawn, no two edges of different features coincide or touch (`_Taken`), and cuts keep a wall around them: so
every part is one valid solid. All lengths in grid steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from cad_mllm.cad.program import Circle, Loop, Operation, Plane, Vec2
from cad_mllm.cad.synth.compose import moved
from cad_mllm.cad.synth.draw import LONGEST, Draw, Part, plural, with_article
from cad_mllm.cad.synth.sketches import chain, feature, flat, rectangle, rounded, up

_ADDED = (0, 1, 1, 2, 2)
_CUT = (0, 1, 1)
"""How many features, each number as often as it stands here."""
_TRIES = 60
_GAP = 2
"""Least distance of two features' edges along each axis, and thickness of the wall around a cut."""
_FLOOR = 3
"""Least thickness under a pocket, and above and below a cross hole."""
_WIDEST = 0.9
_NARROWEST = 0.3
"""Width of a feature, in that of the piece that carries it."""


@dataclass(frozen=True)
class _Area:
    """A rectangle along the axes, by its corners."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def depth(self) -> float:
        return self.y1 - self.y0

    def shared(self, other: "_Area") -> tuple[float, float]:
        """Width and depth of what both cover; not above 0 where they are apart."""
        return (
            min(self.x1, other.x1) - max(self.x0, other.x0),
            min(self.y1, other.y1) - max(self.y0, other.y0),
        )


@dataclass(frozen=True)
class _Outline:
    """What a base is extruded from."""

    loop: Loop
    noun: str
    words: str
    depth: int
    """Its extent along y; along x it has the whole of `LONGEST`."""
    pieces: tuple[_Area, ...]
    """Rectangles that lie inside."""
    corners: tuple[Vec2, ...]


@dataclass(frozen=True)
class _Foot:
    """The loop of a feature, around an area that it fills or that is its bounding square."""

    loop: Loop
    area: _Area
    adjective: str
    words: str


@dataclass
class _Taken:
    """Where edges are, along each axis of the part, so that no others come to lie beside or upon them."""

    axes: tuple[list[float], list[float], list[float]] = field(default_factory=lambda: ([], [], []))
    corners: list[Vec2] = field(default_factory=list)
    rounds: list[tuple[Vec2, float]] = field(default_factory=list)

    def is_free(self, axis: int, *values: float) -> bool:
        """Whether all values keep their distance along an axis."""
        return all(abs(value - taken) >= _GAP for value in values for taken in self.axes[axis])

    def admits(self, foot: _Foot) -> bool:
        """Whether an upright feature with this foot meets no edge of another one lengthwise."""
        area, loop = foot.area, foot.loop
        if not (self.is_free(0, area.x0, area.x1) and self.is_free(1, area.y0, area.y1)):
            return False
        if isinstance(loop, Circle):
            return all(abs(math.dist(c, loop.center) - loop.radius) >= 1 for c in self.corners)
        return all(abs(math.dist(c, at) - r) >= 1 for c in _corners(area) for at, r in self.rounds)

    def take(self, foot: _Foot) -> None:
        """Note the edges of an upright feature."""
        area, loop = foot.area, foot.loop
        self.axes[0].extend((area.x0, area.x1))
        self.axes[1].extend((area.y0, area.y1))
        if isinstance(loop, Circle):
            self.rounds.append((loop.center, loop.radius))
        else:
            self.corners.extend(_corners(area))


def varied(draw: Draw) -> Part:
    """A base and up to three features."""
    return _Varied(draw).part()


class _Varied:
    """A part in the making."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._outline = outline = draw.weighted(_OUTLINES, _WEIGHTS)(draw)
        self._height = self._top = draw.whole(6, 44)
        self._taken = _Taken(
            axes=([x for x, _ in outline.corners], [y for _, y in outline.corners], [0, self._height]),
            corners=list(outline.corners),
        )
        if isinstance(outline.loop, Circle):
            self._taken.rounds.append((outline.loop.center, outline.loop.radius))
        self._bodies = [(piece, self._height) for piece in outline.pieces]
        """What carries features: rectangles, and how high each reaches."""
        as_some_do = draw.flip(0.2)
        self._extrudes = [
            up(draw, outline.loop, self._height) if as_some_do else feature(outline.loop, self._height)
        ]
        self._details = [outline.words]
        self._nouns: dict[str, int] = {}

    def part(self) -> Part:
        """The whole part, without the features that find no room."""
        draw, outline = self._draw, self._outline
        features = [self._boss if draw.flip() else self._adjoin for _ in range(draw.pick(_ADDED))]
        # What is cut is cut last: through all that is there.
        features += [self._cross if draw.flip(0.25) else self._cut for _ in range(draw.pick(_CUT))]
        for place in features:
            any(place() for _ in range(_TRIES))  # until it has found room
        listed = [
            with_article(noun) if count == 1 else f"{count} {plural(noun)}"
            for noun, count in self._nouns.items()
        ]
        with_what = " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)
        return Part(
            tuple(self._extrudes),
            f"{outline.noun} with {with_what}" if listed else outline.noun,
            f"It measures {draw.by(LONGEST, outline.depth, self._top)} over all.",
            tuple(self._details),
        )

    # --- features: each returns whether it found room ---

    def _boss(self) -> bool:
        """Something that stands on a piece of the base."""
        draw = self._draw
        piece, below = draw.pick(self._bodies)
        foot, rise = self._foot_in(piece), draw.whole(3, 40)
        top = below + rise
        if foot is None or top > LONGEST or not self._taken.is_free(2, top) or self._covered(foot, below):
            return False
        self._stand(foot, below, top)
        self._tell("boss", foot, f"{draw.mm(rise)} high, stands on it")
        return True

    def _adjoin(self) -> bool:
        """A body beside the base and partly in it, on the same ground."""
        draw, outline = self._draw, self._outline
        x0, y0 = draw.whole(0, LONGEST - 8), draw.whole(0, max(0, outline.depth - 8))
        width, depth = draw.whole(8, 48), draw.whole(8, 48)
        foot = _round(draw, x0, y0, width) if draw.flip(0.25) else _rectangle(draw, x0, y0, width, depth)
        top = draw.whole(4, LONGEST)
        fits = foot.area.x1 <= LONGEST and foot.area.y1 <= outline.depth
        if not fits or not self._taken.is_free(2, top) or not self._taken.admits(foot):
            return False
        shares = [foot.area.shared(piece) for piece in outline.pieces]
        if not any(min(share) >= 4 for share in shares):
            return False
        inside = sum(max(0.0, w) * max(0.0, d) for w, d in shares) / foot.area.width / foot.area.depth
        if top < self._height and inside > 0.6:  # little of it would show
            return False
        self._stand(foot, 0, top)
        noun = "pillar" if isinstance(foot.loop, Circle) else "block"
        self._tell(noun, foot, f"{draw.mm(top)} high, is joined to it")
        return True

    def _cut(self) -> bool:
        """A hole through everything, or a pocket that is open above."""
        draw = self._draw
        piece, below = draw.pick(self._bodies)
        foot = self._foot_in(piece)
        floor = 0 if draw.flip() else draw.whole(_FLOOR, max(_FLOOR, below - 2))
        if foot is None or floor > below - 2 or (floor and not self._taken.is_free(2, floor)):
            return False
        self._taken.take(foot)
        self._taken.axes[2].append(floor)
        self._extrudes.append(feature(foot.loop, self._top - floor, Operation.CUT, plane=flat(floor)))
        if floor:
            self._tell("pocket", foot, f"ends {draw.mm(floor)} above the bottom")
        else:
            self._tell("through hole", foot, "goes through it from top to bottom")
        return True

    def _cross(self) -> bool:
        """A hole from front to back through the base."""
        draw, taken = self._draw, self._taken
        piece = draw.pick(self._outline.pieces)
        side = _Area(piece.x0, 0.0, piece.x1, float(self._height))
        foot = _foot_within(draw, side, _FLOOR)
        if foot is None:
            return False
        area = foot.area
        if not (taken.is_free(0, area.x0, area.x1) and taken.is_free(2, area.y0, area.y1)):
            return False
        taken.axes[0].extend((area.x0, area.x1))
        taken.axes[2].extend((area.y0, area.y1))
        front = Plane((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, -1.0, 0.0))
        self._extrudes.append(feature(foot.loop, -self._outline.depth, Operation.CUT, plane=front))
        self._tell("cross hole", foot, "goes through it from front to back")
        return True

    # --- what they share ---

    def _foot_in(self, piece: _Area) -> _Foot | None:
        foot = _foot_within(self._draw, piece, _GAP)
        return foot if foot is not None and self._taken.admits(foot) else None

    def _covered(self, foot: _Foot, level: int) -> bool:
        """Whether a higher body stands where something shall stand on `level`."""
        return any(top > level and min(foot.area.shared(body)) > -_GAP for body, top in self._bodies)

    def _stand(self, foot: _Foot, bottom: int, top: int) -> None:
        self._taken.take(foot)
        self._taken.axes[2].append(top)
        self._extrudes.append(feature(foot.loop, top - bottom, Operation.JOIN, plane=flat(bottom)))
        self._top = max(self._top, top)
        if not isinstance(foot.loop, Circle):
            self._bodies.append((foot.area, top))

    def _tell(self, noun: str, foot: _Foot, what: str) -> None:
        self._details.append(f"A {foot.adjective} {noun}, {foot.words}, {what}.")
        self._nouns[noun] = self._nouns.get(noun, 0) + 1


# --- feet ---


def _foot_within(draw: Draw, piece: _Area, margin: int) -> _Foot | None:
    """A foot inside a piece, as large as a good part of it; None where the piece is too small."""
    room_x, room_y = math.floor(piece.width) - 2 * margin, math.floor(piece.depth) - 2 * margin
    if min(room_x, room_y) < 4:
        return None
    width, depth = (
        draw.whole(max(4, math.ceil(room * _NARROWEST)), max(4, math.floor(room * _WIDEST)))
        for room in (room_x, room_y)
    )
    is_round = draw.flip(0.45)
    if is_round:
        width = depth = 2 * (min(width, depth) // 2)
    x0 = math.ceil(piece.x0) + margin + draw.whole(0, room_x - width)
    y0 = math.ceil(piece.y0) + margin + draw.whole(0, room_y - depth)
    return _round(draw, x0, y0, width) if is_round else _rectangle(draw, x0, y0, width, depth)


def _round(draw: Draw, x0: int, y0: int, diameter: int) -> _Foot:
    center = x0 + diameter / 2, y0 + diameter / 2
    words = f"{draw.mm(diameter)} in diameter, centred at {draw.at(*center)}"
    area = _Area(x0, y0, x0 + diameter, y0 + diameter)
    return _Foot(Circle(center, diameter / 2), area, "round", words)


def _rectangle(draw: Draw, x0: int, y0: int, width: int, depth: int) -> _Foot:
    words = f"{draw.by(width, depth)}, with its corner at {draw.at(x0, y0)}"
    area = _Area(x0, y0, x0 + width, y0 + depth)
    return _Foot(rectangle(x0, y0, width, depth), area, "rectangular", words)


def _corners(area: _Area) -> tuple[Vec2, ...]:
    return (area.x0, area.y0), (area.x1, area.y0), (area.x1, area.y1), (area.x0, area.y1)


# --- outlines ---


def _cuts(draw: Draw, columns: int, least: int) -> list[int]:
    """Where columns that are at least so wide begin and end, from 0 to `LONGEST`."""
    spare = LONGEST - columns * least
    inner = sorted(draw.whole(0, spare) for _ in range(columns - 1))
    return [0, *(at + least * number for number, at in enumerate(inner, start=1)), LONGEST]


def _stepped(draw: Draw) -> _Outline:
    """Columns side by side on one ground, each of its own width and depth."""
    columns = draw.pick((2, 3, 3, 4))
    xs, most = _cuts(draw, columns, 7), draw.whole(14, LONGEST)
    depths = [draw.whole(6, most)]
    while len(depths) < columns:
        depth = draw.whole(6, most)
        if abs(depth - depths[-1]) >= 3:
            depths.append(depth)
    upper: list[Vec2] = []
    for number in reversed(range(columns)):
        upper += [(xs[number + 1], depths[number]), (xs[number], depths[number])]
    loop = chain((0, 0), (LONGEST, 0), *upper)
    widths = [b - a for a, b in pairwise(xs)]
    measures = [draw.by(w, d) for w, d in zip(widths, depths, strict=True)]
    return _Outline(
        loop,
        {2: "L-shaped block", 3: "block of three steps", 4: "block of four steps"}[columns],
        f"From left to right its steps are {', '.join(measures)}.",
        max(depths),
        tuple(_Area(a, 0, b, d) for a, b, d in zip(xs, xs[1:], depths, strict=False)),
        ((0, 0), (LONGEST, 0), *upper),
    )


def _slanted(draw: Draw) -> _Outline:
    """A straight lower edge and an upper one that bends, at places and depths of its own."""
    columns = draw.pick((1, 2, 3))
    xs, most = _cuts(draw, columns, 12), draw.whole(16, LONGEST)
    depths = [draw.whole(8, most)]
    while len(depths) <= columns:
        depth = draw.whole(8, most)
        if abs(depth - depths[-1]) >= 4:
            depths.append(depth)
    upper: list[Vec2] = list(zip(xs, depths, strict=True))
    pairs = pairwise(upper)
    return _Outline(
        chain((0, 0), (LONGEST, 0), *reversed(upper)),
        {1: "trapezoid block", 2: "block with a bent top edge", 3: "block with a twice bent top edge"}[
            columns
        ],
        f"Its upper edge runs through {', '.join(draw.at(*point) for point in upper)}.",
        max(depths),
        tuple(_Area(a, 0, b, min(c, d)) for (a, c), (b, d) in pairs),
        ((0, 0), (LONGEST, 0), *upper),
    )


def _block(draw: Draw) -> _Outline:
    """A rectangle, its corners sharp or round."""
    depth = draw.whole(14, LONGEST)
    radius = draw.whole(2, depth // 2 - 1) if draw.flip() else 0
    return _Outline(
        moved(rounded(LONGEST, depth, radius), (LONGEST / 2, depth / 2)),
        "rounded block" if radius else "block",
        f"Its corners are rounded with {draw.mm(radius)}." if radius else "Its corners are square.",
        depth,
        (_Area(radius, 0, LONGEST - radius, depth),),
        ((radius, 0), (LONGEST, radius), (LONGEST - radius, depth), (0, depth - radius)),
    )


def _disc(draw: Draw) -> _Outline:
    half, inset = LONGEST // 2, LONGEST // 6
    return _Outline(
        Circle((half, half), half),
        "disc",
        f"Its diameter is {draw.mm(LONGEST)}.",
        LONGEST,
        (_Area(inset, inset, LONGEST - inset, LONGEST - inset),),
        ((0, half), (half, 0), (LONGEST, half), (half, LONGEST)),
    )


_OUTLINES: tuple[Callable[[Draw], _Outline], ...] = (_stepped, _slanted, _block, _disc)
_WEIGHTS = (6, 4, 2, 1)
