"""Parts composed of features: a base, and bosses, holes and pockets, each with a piece of a face of its own.

A composition follows the operations that it is given and an estimate of the characters that its command text
may take. No two features meet: each takes a rectangle out of the faces that are still free ("lands"), so
that whatever is composed is a valid solid, and what the caption says of a feature stays true. All lengths in
grid steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cad_mllm.cad.geometry import transform_loop
from cad_mllm.cad.program import (
    Circle,
    Extent,
    ExtentType,
    Extrude,
    Loop,
    Operation,
    Path,
    Plane,
    Profile,
    Vec2,
)
from cad_mllm.cad.synth.draw import LONGEST, Draw, Part, plural, with_article
from cad_mllm.cad.synth.shapes import ROUND, Rect, Shape, shape_for
from cad_mllm.cad.synth.sketches import flat, on_circle, up

FEATURE = 21.0
"""Characters of a feature without its loops; an estimate."""
_SMALLEST = 5
"""Least width and height of a land that still takes a feature."""
_MARGIN = 3
"""Distance of everything on the base from its edges: more than a cut into the front is deep."""

_OPERATIONS = {"N": Operation.NEW, "J": Operation.JOIN, "C": Operation.CUT, "I": Operation.INTERSECT}
_ADDS = (Operation.NEW, Operation.JOIN)


@dataclass(frozen=True)
class _Land:
    """A free rectangle on a face, in the coordinates of its plane."""

    rect: Rect
    plane: Plane
    face: str
    """The face in words: "its top"."""
    depth: int
    """How deep the material below is."""
    through: bool
    """Whether a cut may go through all of it."""
    rise: int
    """How high a boss may be."""
    radius: float | None = None
    """Of the largest circle on it around the middle, where the face is a wheel's and all free."""

    @property
    def room(self) -> float:
        return self.rect.width * self.rect.height

    @property
    def usable(self) -> bool:
        return min(self.rect.width, self.rect.height) >= _SMALLEST


@dataclass(frozen=True)
class _Pattern:
    """Equal shapes side by side."""

    shape: Shape
    centers: tuple[Vec2, ...]
    layout: str
    """Where they lie, in words."""
    left: tuple[Rect, ...] = ()
    """What it leaves of the land."""

    @property
    def loops(self) -> tuple[Loop, ...]:
        return tuple(moved(self.shape.loop, center) for center in self.centers)

    def words(self, noun: str) -> str:
        """ "4 round holes, 6 mm in diameter, in a row ..."."""
        count = len(self.centers)
        named = f"{self.shape.adjective} {noun}"
        start = with_article(named) if count == 1 else f"{count} {plural(named)}"
        return f"{start}, {self.shape.measure}, {self.layout}"


def moved(loop: Loop, offset: Vec2) -> Loop:
    """The loop moved by `offset`."""
    return transform_loop(loop, ((1.0, 0.0), (0.0, 1.0)), offset)


def compose(draw: Draw, operations: str, budget: float) -> Part | None:
    """A part with these operations (letters N, J, C, I; the first is N) and about `budget` characters.

    None where the features find no room: draw again.
    """
    shares = draw.shares(len(operations))
    extra = max(0.0, budget - len(operations) * (FEATURE + ROUND))
    budgets = [ROUND + share * extra for share in shares]
    return _Composition(draw, operations, budgets).part()


class _Composition:
    """A part in the making."""

    def __init__(self, draw: Draw, operations: str, budgets: Sequence[float]) -> None:
        self._draw = draw
        self._operations = operations
        self._budgets = list(budgets)
        self._extrudes: list[Extrude] = []
        self._details: list[str] = []
        self._nouns: dict[str, int] = {}
        self._lands: list[_Land] = []
        self._top = 0.0

    def part(self) -> Part | None:
        """The whole part; None where a feature finds no room."""
        if len(self._operations) == 1 and self._budgets[0] > 4 * ROUND and self._draw.flip(0.25):
            return self._several_bodies()
        return self._built_up()

    def _several_bodies(self) -> Part | None:
        """Equal bodies that stand apart, in a grid as long as the part."""
        draw = self._draw
        height, thickness = draw.whole(8, LONGEST), draw.whole(2, 32)
        columns = draw.whole(2, 9)
        pitches = [
            step / 2
            for step in range(6, 2 * LONGEST)
            if (width := LONGEST - step / 2 * (columns - 1)) == int(width) and 2 <= width <= step / 2 - 1
        ]
        if not pitches:
            return None
        pitch = draw.pick(pitches)
        width = int(LONGEST - pitch * (columns - 1))
        rows = draw.whole(1, max(1, min(9, round(self._budgets[0] / ROUND / columns), height // (width + 1))))
        across = min(width, height // rows - 1)
        unit = self._budgets[0] / columns / rows
        if across < 2 or unit < ROUND / 2:
            return None
        shape = shape_for(draw, width, across, unit, wheel=None if across == width else False)
        centers = _grid(columns, rows, pitch, height // rows, 0.0, 0.0)
        words = f"{columns * rows} equal {shape.adjective} bodies"
        layout = self._layout(columns, rows, pitch, height // rows)
        extrude = Extrude(
            flat(0.0),
            tuple(Profile(moved(shape.loop, center)) for center in centers),
            Extent(ExtentType.ONE_SIDE, float(thickness)),
            Operation.NEW,
        )
        return Part(
            (extrude,),
            f"set of {words}",
            f"Each is {shape.measure}, and {draw.mm(thickness)} high; the row is {draw.mm(LONGEST)} long.",
            (f"They stand {layout}.",),
        )

    def _built_up(self) -> Part | None:
        draw = self._draw
        rest = list(zip(self._operations, self._budgets, strict=True))
        legs = len(rest) > 1 and rest[1][0] in "NJ" and rest[0][1] > 2 * ROUND and draw.flip(0.15)
        leg_budget = rest.pop(0)[1] if legs else None
        letter, budget = rest.pop(0)
        wheel = draw.flip(0.35)
        height = LONGEST if wheel else draw.whole(12, LONGEST)
        with_holes = budget > 2 * ROUND and not legs and draw.flip(0.55 if budget < 60 else 0.7)
        share = draw.shares(2)[0] if with_holes else 1.0
        outline = shape_for(draw, LONGEST, height, max(ROUND, budget * share), wheel)
        inside = outline.inside.shrunk(_MARGIN)
        if min(inside.width, inside.height) < _SMALLEST and (legs or rest):
            return None
        if leg_budget is not None:
            self._stand_on_legs(inside, leg_budget)
        size = self._base(letter, outline, height, budget * (1 - share), with_features=bool(rest))
        for number, (letter, budget) in enumerate(rest):
            if letter == "I":
                if number or legs or not self._trim(outline):
                    return None
            elif not self._feature(_OPERATIONS[letter], budget, remaining=len(rest) - number - 1):
                return None
        if self._top > self._thickness:
            size += f" Over all it is {draw.mm(self._top)} high."
        listed = [with_article(n) if count == 1 else plural(n) for n, count in self._nouns.items()]
        with_what = f" with {' and '.join([', '.join(listed[:-1]), listed[-1]] if listed[1:] else listed)}"
        return Part(
            tuple(self._extrudes), outline.noun + (with_what if listed else ""), size, tuple(self._details)
        )

    # --- the base ---

    def _stand_on_legs(self, inside: Rect, budget: float) -> None:
        """Legs from z = 0; the base stands on them."""
        draw = self._draw
        length = draw.whole(4, 30)
        pattern = self._pattern(inside, None, budget)
        self._extrudes.append(
            Extrude(
                flat(0.0),
                tuple(Profile(loop) for loop in pattern.loops),
                Extent(ExtentType.ONE_SIDE, float(length)),
                Operation.NEW,
            )
        )
        self._top = float(length)
        self._count("leg", len(pattern.centers))
        self._details.append(f"It stands on {pattern.words('leg')}, {draw.mm(length)} long.")

    def _base(
        self, letter: str, outline: Shape, height: int, hole_budget: float, *, with_features: bool
    ) -> str:
        """The base from where the part ends so far; its size in words."""
        draw, bottom = self._draw, self._top
        thickness = draw.whole(3, 24) if with_features else draw.whole(2, LONGEST - int(bottom))
        wheel = outline.front is None and height == LONGEST
        self._thickness, self._top = thickness, bottom + thickness
        self._lands = [
            _Land(
                outline.inside.shrunk(_MARGIN),
                flat(self._top),
                "its top",
                depth=thickness,
                through=not bottom,
                rise=LONGEST - int(self._top),
                radius=LONGEST * 0.36 if wheel else None,
            )
        ]
        holes: tuple[Loop, ...] = ()
        if hole_budget > 0 and self._lands[0].usable:
            land = self._take(remaining=2 if with_features else 0)
            pattern = self._pattern(land.rect, land.radius, max(ROUND, hole_budget))
            self._give_back(land, pattern)
            holes = pattern.loops
            self._tell(pattern, "through hole", land, "")
        if not bottom and draw.flip(0.1):
            extrude = up(draw, outline.loop, thickness, holes)
        else:
            extent = Extent(ExtentType.ONE_SIDE, float(thickness))
            profile = Profile(outline.loop, holes)
            extrude = Extrude(flat(bottom), (profile,), extent, _OPERATIONS[letter])
        self._extrudes.append(extrude)
        if outline.front is not None and outline.front > 20 and thickness >= 9 and not bottom:
            face = Rect(0, thickness / 2, outline.front - 2 * _MARGIN, thickness - 4)
            plane, out = _front_plane(_lowest(outline)), min(6, LONGEST - height)
            self._lands.append(_Land(face, plane, "its front", depth=2, through=False, rise=out))
        return f"The {outline.noun} is {outline.measure}; it is {draw.mm(thickness)} high."

    def _trim(self, base: Shape) -> bool:
        """Intersect the base with another outline; False if it is not a plain block."""
        draw = self._draw
        if base.noun != "block" or self._extrudes[0].profiles[0].holes:
            return False
        height = math.floor(base.inside.height)
        if height < 12:
            return False
        shape = shape_for(draw, LONGEST, height, draw.pick((40.0, 60.0)), wheel=False)
        self._extrudes.append(
            Extrude(
                flat(0.0),
                (Profile(shape.loop),),
                Extent(ExtentType.ONE_SIDE, float(self._thickness)),
                Operation.INTERSECT,
            )
        )
        top, *_ = self._lands
        self._lands = [replace(top, rect=shape.inside.shrunk(_MARGIN))]
        self._details.append(f"It is trimmed to {with_article(shape.adjective)} outline, {shape.measure}.")
        return True

    # --- features ---

    def _feature(self, operation: Operation, budget: float, *, remaining: int) -> bool:
        """One more feature; False if it finds no room."""
        draw, adds = self._draw, operation in _ADDS
        lands = [
            land for land in self._lands if land.usable and (land.rise >= 1 if adds else land.depth >= 1)
        ]
        if not lands:
            return False
        others = [land for land in self._lands if land not in lands]
        self._lands = lands
        land = self._take(remaining)
        self._lands += others
        pattern = self._pattern(land.rect, land.radius if not adds or draw.flip() else None, budget)
        self._give_back(land, pattern)
        if adds:
            self._raise(land, pattern, operation, budget)
        else:
            self._sink(land, pattern, draw.flip(0.5))
        return True

    def _raise(self, land: _Land, pattern: _Pattern, operation: Operation, budget: float) -> None:
        draw, shape = self._draw, pattern.shape
        rise = draw.whole(1, min(16, land.rise))
        bores: tuple[Loop, ...] = ()
        diameter = draw.whole(1, 6)
        hollow = (
            shape.adjective == "round"
            and diameter + 1.5 <= _diameter(shape)
            and budget > 1.7 * ROUND * len(pattern.centers)
        )
        if hollow:
            bores = (Circle((0.0, 0.0), diameter / 2),)
        self._add(land, pattern, bores, float(rise), operation)
        ribs = shape.adjective == "rectangular" and _is_rib(shape)
        noun = "rib" if ribs else "hollow boss" if hollow else "boss"
        tail = f", {draw.mm(rise)} high"
        if hollow:
            tail += f", with a hole of {draw.mm(diameter)} in {'it' if len(pattern.centers) == 1 else 'each'}"
        self._tell(pattern, noun, land, tail)
        on_top = land.face != "its front"
        if on_top:
            height = land.plane.origin[2] + rise
            self._top = max(self._top, height)
        if on_top and len(pattern.centers) == 1 and not hollow:
            (cx, cy), inside = pattern.centers[0], shape.inside.shrunk(1)
            self._lands.append(
                _Land(
                    replace(inside, x=inside.x + cx, y=inside.y + cy),
                    flat(height),
                    f"the {noun} of {draw.mm(rise)}",
                    rise + land.depth,
                    land.through,
                    LONGEST - int(height),
                )
            )

    def _sink(self, land: _Land, pattern: _Pattern, prefer_through: bool) -> None:
        draw = self._draw
        through = land.through and (prefer_through or land.depth < 2)
        depth = land.depth if through else draw.whole(1, max(1, min(land.depth - 1, 24)))
        self._add(land, pattern, (), -float(depth), Operation.CUT)
        noun = "through hole" if through else "pocket"
        self._tell(pattern, noun, land, f", {draw.mm(depth)} deep")

    def _add(
        self, land: _Land, pattern: _Pattern, bores: tuple[Loop, ...], length: float, operation: Operation
    ) -> None:
        profiles = tuple(
            Profile(moved(pattern.shape.loop, center), tuple(moved(bore, center) for bore in bores))
            for center in pattern.centers
        )
        extent = Extent(ExtentType.ONE_SIDE, length)
        self._extrudes.append(Extrude(land.plane, profiles, extent, operation))

    def _tell(self, pattern: _Pattern, noun: str, land: _Land, tail: str) -> None:
        words = pattern.words(noun)
        self._details.append(f"On {land.face}: {words}{tail}.")
        self._count(noun, len(pattern.centers))

    def _count(self, noun: str, count: int) -> None:
        self._nouns[noun] = self._nouns.get(noun, 0) + count

    # --- room ---

    def _take(self, remaining: int) -> _Land:
        """A usable land, or a part of it where `remaining` more features need room; it is free no longer."""
        draw = self._draw
        usable = [land for land in self._lands if land.usable]
        land = draw.weighted(usable, [each.room for each in usable])
        self._lands.remove(land)
        rect = land.rect
        longer = max(rect.width, rect.height)
        if not remaining or longer < 2 * _SMALLEST + 2 or (land.radius is not None and draw.flip(0.6)):
            return land
        most = longer - _SMALLEST - 1
        first = draw.whole(_SMALLEST, max(_SMALLEST, math.floor(min(most, longer * 0.7))))
        if rect.width >= rect.height:
            left = rect.x - rect.width / 2
            one = Rect(left + first / 2, rect.y, first, rect.height)
            other = Rect(left + (first + 1 + rect.width) / 2, rect.y, rect.width - first - 1, rect.height)
        else:
            low = rect.y - rect.height / 2
            one = Rect(rect.x, low + first / 2, rect.width, first)
            other = Rect(rect.x, low + (first + 1 + rect.height) / 2, rect.width, rect.height - first - 1)
        self._lands.append(replace(land, rect=other, radius=None))
        return replace(land, rect=one, radius=None)

    def _give_back(self, land: _Land, pattern: _Pattern) -> None:
        self._lands += [replace(land, rect=rect, radius=None) for rect in pattern.left]

    def _pattern(self, rect: Rect, radius: float | None, budget: float) -> _Pattern:
        """Equal shapes on a land, of about `budget` characters in all."""
        draw = self._draw
        units = [
            unit for unit in (budget, budget, budget / 2, 65.0, 32.0, 17.0, ROUND, ROUND) if unit <= budget
        ]
        unit = draw.pick(units)
        count = max(1, round(budget / unit))
        if radius is not None and 3 <= count <= 24 and draw.flip(0.75):
            ring = self._ring(radius, count)
            if ring is not None:
                return ring
        columns = max(1, min(count, round(math.sqrt(count * rect.width / rect.height))))
        columns = min(columns, max(1, int(rect.width / 4)))
        rows = max(1, min(round(count / columns), int(rect.height / 4)))
        pitch_x, pitch_y = math.floor(2 * rect.width / columns) / 2, math.floor(2 * rect.height / rows) / 2
        widest, highest = math.floor(pitch_x - 1), math.floor(pitch_y - 1)
        width = draw.whole(max(2, math.ceil(widest * 0.5)), widest)
        height = draw.whole(max(2, math.ceil(highest * 0.5)), highest)
        shape = shape_for(draw, width, height, unit)
        x, y = _half(rect.x), _half(rect.y)
        layout = self._layout(columns, rows, pitch_x, pitch_y)
        at = f"centred at {draw.at(x, y)}"
        return _Pattern(
            shape,
            _grid(columns, rows, pitch_x, pitch_y, x, y),
            f"{layout}, {at}" if layout else at,
        )

    def _ring(self, radius: float, count: int) -> _Pattern | None:
        """Round shapes on a circle, as the bolt holes of a flange."""
        draw = self._draw
        middle = math.floor(radius * draw.pick((0.6, 0.7, 0.75)))
        chord = 2 * middle * math.sin(math.pi / count)
        widest = math.floor(min(chord - 1, 2 * (radius - middle) - 1))
        if widest < 2:
            return None
        diameter = draw.whole(2, min(widest, 10))
        shape = shape_for(draw, diameter, diameter, ROUND, wheel=True)
        side = math.floor(1.4 * (middle - diameter / 2 - 1))
        return _Pattern(
            shape,
            tuple(on_circle(count, float(middle))),
            f"on a circle of {draw.mm(2 * middle)}",
            (Rect(0, 0, side, side),),
        )

    def _layout(self, columns: int, rows: int, pitch_x: float, pitch_y: float) -> str:
        draw = self._draw
        if columns * rows == 1:
            return ""
        if rows == 1:
            return f"in a row along its length, {draw.mm(pitch_x)} apart"
        if columns == 1:
            return f"in a row across its length, {draw.mm(pitch_y)} apart"
        return f"in {columns} columns and {rows} rows with a pitch of {draw.by(pitch_x, pitch_y)}"


def _grid(columns: int, rows: int, pitch_x: float, pitch_y: float, x: float, y: float) -> tuple[Vec2, ...]:
    return tuple(
        (x + (column - (columns - 1) / 2) * pitch_x, y + (row - (rows - 1) / 2) * pitch_y)
        for row in range(rows)
        for column in range(columns)
    )


def _lowest(shape: Shape) -> float:
    """The y of its straight edge below."""
    assert isinstance(shape.loop, Path)
    return min(shape.loop.start[1], *(segment.end[1] for segment in shape.loop.segments))


def _half(value: float) -> float:
    """The nearest half step."""
    return round(2 * value) / 2


def _diameter(shape: Shape) -> float:
    return 2 * shape.loop.radius if isinstance(shape.loop, Circle) else 0.0


def _is_rib(shape: Shape) -> bool:
    long, short = sorted((shape.inside.width, shape.inside.height), reverse=True)
    return long > 3 * short


def _front_plane(y: float) -> Plane:
    """The plane of the front, from the middle of its lower edge: x to the right, y upwards."""
    return Plane((0.0, y, 0.0), (1.0, 0.0, 0.0), (0.0, -1.0, 0.0))
