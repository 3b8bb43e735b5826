"""Normalised programs as compact command text: the language that the model writes.

    NZ0,0,127,254,254E60P0,0H254V254H0Q64,64V190H190V64;CZ127,127,187,0,0F40R0,0,50

is a square plate with a square hole, into which a round pocket is cut from above. `cad_mllm.cad.grammar` has
the syntax and the ranges; here is what it means. G is the largest grid value (8 bits: 254, 10 bits: 1022),
s = 2/G is the step of space.

Features are separated by `;`. A feature is, in this order:

- The operation: `N`ew, `J`oin, `C`ut, `I`ntersect. The first is New. Cuts and intersections may reach out of
  the cube [-1, 1]^3: a digit d behind the letter makes s 2^d times as large in this feature.
- The plane: `X`, `Y` or `Z` is its normal; the sketch then runs along (Y, Z), (Z, X) or (X, Y).
  `O`theta,phi,gamma is an oblique one, in steps of 360/T degrees (T = 240 or 720): Rz(phi) Ry(theta)
  Rz(gamma) turns the sketch's x, y and normal out of X, Y and Z.
- The frame, five numbers: x,y,z of the sketch's corner in space (0..G for -1..1, so G/2 is the middle), then
  width and height of the sketch, in s. On an oblique plane the corner is given along the sketch's x, y and
  normal, and all lengths are sqrt(3) times as long, so that 0..G spans the cube's diagonal. The frame is the
  box of the sketch's *control points*: the corners of its paths and the centres of its circles, so its size
  is 0,0 for a single circle.
- The extent, in the same unit: `E`n along the normal, `F`n against it, `M`n to both sides (2n in all), `T`a,b
  a along and b against.
- Profiles. `P` begins the outer loop of a profile as a path, `R` as a circle; `Q` (path) and `D` (circle) are
  its holes. Coordinates u, v run from 0 to G over the frame's width and height.
  - A path is its first corner u,v and segments: `L`u,v a line, `H`u a line along u, `V`v along v, `A`u,v,w an
    arc to u,v that turns by w steps of 360/T degrees counter-clockwise, `B`u,v,w clockwise. A line closes it.
  - A circle is u,v of its centre and its radius in s/2 (oblique: sqrt(3) s/2).

Texts that `encode` writes are canonical: planes are turned and flipped to the one of eight frames that has
the smallest name, paths run counter-clockwise from their lowest u (then v) behind a line if there is one,
arcs of more than a half turn are two, lines that go straight on are one, loops are sorted, what rounding
flattens to nothing is left out. So `encode(decode(t)) == t` for them. `decode` takes any text of the grammar
in which every feature has a loop with an area.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from cad_mllm.cad.frames import Frame, FrameFit, axis_frame, fit_frame, oblique_frame
from cad_mllm.cad.geometry import along, area, cross, dot, extent_range, transform_loop
from cad_mllm.cad.grammar import CommandGrammar, Levels, levels
from cad_mllm.cad.gridloops import (
    Box2,
    Grid,
    GridPath,
    control_box,
    control_points,
    halve_long_arcs,
    rounded,
    simplify,
    to_path,
)
from cad_mllm.cad.program import (
    Arc,
    CadProgram,
    Circle,
    Extent,
    ExtentType,
    Extrude,
    Loop,
    Operation,
    Path,
    Plane,
    Profile,
    Vec3,
)
from cad_mllm.errors import CadError

MAX_TEXT = 400_000
"""Most characters of a text that is decoded: more than the largest model that `omnicad` reads takes."""

_LETTERS = {Operation.NEW: "N", Operation.JOIN: "J", Operation.CUT: "C", Operation.INTERSECT: "I"}
_OPERATIONS = {letter: operation for operation, letter in _LETTERS.items()}
_TOOLS = (Operation.CUT, Operation.INTERSECT)
_MAX_DOUBLINGS = 9
_MAX_PASSES = 20
_SLACK = 2
"""Steps by which rounding its orientation may carry a sketch out of the cube; it is set back to the edge."""
_NO_AREA = 1e-13
"""A loop with less area than this, relative to its size squared, encloses nothing."""


# --- encode -----------------------------------------------------------------------------------------------


def encode(program: CadProgram, bits: int = 8) -> str:
    """The canonical command text of a normalised program, at 8 or 10 bits.

    Raises CadError for a program that is not in [-1, 1]^3 (`normalise` it first), and for one of which
    nothing is left at that many bits.
    """
    sizes = levels(bits)
    features: list[str] = []
    for extrude in program.extrudes:
        if not features and extrude.operation in _TOOLS:
            continue  # takes away from nothing
        text = _encode_feature(extrude, sizes)
        if text is not None:
            letter = _LETTERS[extrude.operation] if features else "N"
            features.append(letter + text)
    if not features:
        raise CadError(f"the model is too small for {bits} bits: nothing of it is left after rounding")
    return ";".join(features)


def _encode_feature(extrude: Extrude, sizes: Levels) -> str | None:
    """What follows the operation letter; None for a feature that rounding leaves without effect."""
    text = _encode_once(extrude, sizes)
    for _ in range(_MAX_PASSES):
        if text is None:
            return None
        # Once is nearly always enough. But a cut may fit the finer grid only after rounding, for example.
        again = _encode_once(_decode_feature(text, extrude.operation, sizes), sizes)
        if again == text:
            return text
        text = again
    raise CadError("an extrude finds no stable rounding: its sketch is too fine for the grid")


@dataclass(frozen=True)
class _Placed:
    """An extrude in its frame, reaching from `origin` `up` along the normal and `down` against it."""

    frame: Frame
    origin: Vec3
    profiles: tuple[Profile, ...]
    up: float
    down: float
    symmetric: bool


def _encode_once(extrude: Extrude, sizes: Levels) -> str | None:
    _check_numbers(extrude)
    is_tool = extrude.operation in _TOOLS
    placed = _place(extrude, sizes)
    for doublings in range(_MAX_DOUBLINGS + 1 if is_tool else 1):
        written = _write(placed, sizes, doublings) if placed is not None else None
        if written is None and extrude.operation is Operation.INTERSECT:
            raise CadError("an intersection leaves nothing: its sketch is too small or apart from the model")
        if written is None:
            return None
        if written.sketch_fits and (is_tool or written.extent_fits):
            return (str(doublings) if doublings else "") + written.text
    raise CadError(
        "a cut or intersection reaches too far out of the model to be written"
        if is_tool
        else "an extrude reaches out of [-1, 1]^3: normalise the program first"
    )


def _check_numbers(extrude: Extrude) -> None:
    loops = [loop for profile in extrude.profiles for loop in (profile.outer, *profile.holes)]
    numbers = [*extrude.plane.origin, *extrude.plane.x_axis, *extrude.plane.normal]
    numbers += [extrude.extent.one, extrude.extent.two]
    numbers += [x for loop in loops for point in control_points(loop) for x in point]
    numbers += [loop.radius for loop in loops if isinstance(loop, Circle)]
    if not all(-1e9 < x < 1e9 for x in numbers):
        raise CadError("a program holds a number that is not finite or far out of range")
    sweeps = [
        s.sweep for loop in loops if isinstance(loop, Path) for s in loop.segments if isinstance(s, Arc)
    ]
    if not all(0 < abs(sweep) < 2 * math.pi for sweep in sweeps):
        raise CadError("a program holds an arc that does not sweep between 0 and a full turn")
    if not all(loop.radius > 0 for loop in loops if isinstance(loop, Circle)):
        raise CadError("a program holds a circle whose radius is not above 0")


def _place(extrude: Extrude, sizes: Levels) -> _Placed | None:
    """Move an extrude to the frame that stands for its plane; None for a tool that misses the cube."""
    extent = extrude.extent
    low, high = extent_range(extent)
    symmetric = extent.type is ExtentType.SYMMETRIC
    origin = extrude.plane.origin
    if extrude.operation in _TOOLS:
        # A tool's plane may lie outside of the cube. What the tool does there is nothing: begin at the cube.
        level, limit = dot(origin, extrude.plane.normal), sum(abs(n) for n in extrude.plane.normal)
        if abs(level) > limit:
            low, high, symmetric = max(low, -limit - level), min(high, limit - level), False
            if low >= high:
                return None
            shift = low if level < 0 else high
            origin = along(origin, (extrude.plane.normal, shift))
            low, high = low - shift, high - shift
    fit = fit_frame(extrude.plane, sizes.turn)
    if fit.turned_over:
        low, high = -high, -low

    def moved(loop: Loop) -> Loop:
        return halve_long_arcs(transform_loop(loop, fit.rows, (0.0, 0.0)))

    profiles = tuple(
        Profile(moved(p.outer), tuple(moved(hole) for hole in p.holes)) for p in extrude.profiles
    )
    return _Placed(
        fit.frame, _turned_origin(origin, fit, profiles, (low + high) / 2), profiles, high, -low, symmetric
    )


def _turned_origin(origin: Vec3, fit: FrameFit, profiles: Sequence[Profile], middle: float) -> Vec3:
    """Where the frame's origin must lie so that rounding its axes leaves the extrude's middle in place."""
    u0, v0, u1, v1 = control_box(_loops(profiles))
    u, v = (u0 + u1) / 2, (v0 + v1) / 2
    exact_y = cross(fit.normal, fit.x_axis)
    center = along(origin, (fit.x_axis, u), (exact_y, v), (fit.normal, middle))
    frame = fit.frame
    return along(center, (frame.x_axis, -u), (frame.y_axis, -v), (frame.normal, -middle))


def _loops(profiles: Sequence[Profile]) -> list[Loop]:
    return [loop for profile in profiles for loop in (profile.outer, *profile.holes)]


@dataclass(frozen=True)
class _Written:
    """A feature's text, and which of its numbers were in range.

    A tool's extent need not be: the tool begins in the cube and, cut to the range, still reaches through it.
    """

    text: str
    sketch_fits: bool
    extent_fits: bool


def _write(placed: _Placed, sizes: Levels, doublings: int) -> _Written | None:
    """The feature's text behind operation and doublings; None if no loop with an area is left."""
    profiles = placed.profiles
    while True:
        # What rounding takes out of the sketch may be what its frame was measured on: until nothing changes.
        layout = _Layout.of(placed, control_box(_loops(profiles)), sizes, doublings)
        simplified = _simplified(profiles, layout.grid)
        if not simplified:
            return None
        if simplified == profiles:
            break
        profiles = simplified
    radii = [layout.grid.radius_steps(loop.radius) for loop in _loops(profiles) if isinstance(loop, Circle)]
    sketch = _write_profiles(profiles, layout.grid)
    if not sketch:
        return None
    sketch_fits, extent_fits = (
        all(-_SLACK <= number <= sizes.grid + _SLACK for number in numbers)
        for numbers in ((*layout.corner, *layout.span, *radii), (layout.up, layout.down))
    )
    return _Written(layout.text(placed) + sketch, sketch_fits, extent_fits)


def _simplified(profiles: Sequence[Profile], grid: Grid) -> tuple[Profile, ...]:
    found = []
    for profile in profiles:
        outer = _simplified_loop(profile.outer, grid)
        if outer is not None:
            holes = (_simplified_loop(hole, grid) for hole in profile.holes)
            found.append(Profile(outer, tuple(hole for hole in holes if hole is not None)))
    return tuple(found)


def _simplified_loop(loop: Loop, grid: Grid) -> Loop | None:
    if isinstance(loop, Circle):
        return loop
    path = simplify(loop, grid)
    if path is None:
        return None
    on_grid = to_path(rounded(path, grid), grid)
    u0, v0, u1, v1 = control_box([on_grid])
    return path if abs(area(on_grid)) > _NO_AREA * ((u1 - u0) ** 2 + (v1 - v0) ** 2) else None


@dataclass(frozen=True)
class _Layout:
    """The numbers of a feature's frame and extent."""

    corner: tuple[int, int, int]
    span: tuple[int, int]
    up: int
    down: int
    grid: Grid

    @staticmethod
    def of(placed: _Placed, box: Box2, sizes: Levels, doublings: int) -> "_Layout":
        """Round the frame, both ends of each side on the grid of space, so that what is flush stays flush."""
        frame, unit_ = placed.frame, _unit(placed.frame, sizes, doublings)

        def level(direction: Vec3, offset: float) -> int:
            return round((dot(placed.origin, direction) + offset) / unit_ + sizes.grid / 2)

        def steps(direction: Vec3, low: float, high: float) -> int:
            return level(direction, high) - level(direction, low)

        u0, v0, u1, v1 = box
        by_axis = {frame.x_axis: u0, frame.y_axis: v0, frame.normal: 0.0}
        order = by_axis if not frame.name else sorted(by_axis, reverse=True)  # along the axes: X, Y, Z
        x, y, z = (level(axis, by_axis[axis]) for axis in order)
        width, height = steps(frame.x_axis, u0, u1), steps(frame.y_axis, v0, v1)
        if any(isinstance(loop, Path) for loop in _loops(placed.profiles)):
            width, height = max(width, int(u1 - u0 > 1e-9)), max(height, int(v1 - v0 > 1e-9))
        up, down = steps(frame.normal, 0.0, placed.up), steps(frame.normal, -placed.down, 0.0)
        if up + down == 0:
            up, down = int(placed.up >= placed.down), int(placed.up < placed.down)
        grid = Grid(box, (width * unit_, height * unit_), sizes.grid, sizes.turn, unit_ / 2)
        return _Layout((x, y, z), (width, height), up, down, grid)

    def text(self, placed: _Placed) -> str:
        """Plane, frame and extent."""
        top = self.grid.top
        plane = placed.frame.name or "O{},{},{},".format(*placed.frame.angles)
        frame = ",".join(str(_clamped(number, 0, top)) for number in (*self.corner, *self.span))
        up, down = (_clamped(number, 0, top) for number in (self.up, self.down))
        if placed.symmetric:
            extent = f"M{max(1, up, down)}"
        elif up and down:
            extent = f"T{up},{down}"
        else:
            extent = f"E{up}" if up else f"F{down}"
        return plane + frame + extent


def _clamped(number: int, low: int, high: int) -> int:
    return max(low, min(high, number))


def _unit(frame: Frame, sizes: Levels, doublings: int) -> float:
    """The step of lengths: a box that is turned within the cube can be sqrt(3) times as long as its side."""
    return 2 / sizes.grid * 2.0**doublings * (1.0 if frame.name else math.sqrt(3))


def _write_profiles(profiles: Sequence[Profile], grid: Grid) -> str:
    """Sorted and without doubles; empty if every profile is its own hole."""
    written: dict[str, tuple[int, ...]] = {}
    for profile in profiles:
        outer, key = _write_loop(profile.outer, grid, "PR")
        holes: dict[str, tuple[int, ...]] = {}
        for hole in profile.holes:
            fitted = _inside(hole, profile.outer, grid)
            if fitted is not None:
                text, hole_key = _write_loop(fitted, grid, "QD")
                holes[text] = hole_key
        if not any(text[1:] == outer[1:] and (text[0] == "Q") == (outer[0] == "P") for text in holes):
            written[outer + "".join(sorted(holes, key=lambda text: (holes[text], text)))] = key
    return "".join(sorted(written, key=lambda text: (written[text], text)))


def _inside(hole: Loop, outer: Loop, grid: Grid) -> Loop | None:
    """Keep the wall of a thin ring that rounding would close; None for a hole without room in its ring."""
    if not (isinstance(hole, Circle) and isinstance(outer, Circle)):
        return hole
    if grid.cell(hole.center) != grid.cell(outer.center):
        return hole
    largest = grid.radius_steps(outer.radius) - 1
    if largest == 0:
        return None
    return Circle(hole.center, min(hole.radius, largest * grid.radius_step))


def _write_loop(loop: Loop, grid: Grid, letters: str) -> tuple[str, tuple[int, ...]]:
    """Text of a loop, begun with `letters[0]` for a path, `letters[1]` for a circle; and its sort key."""
    if isinstance(loop, Circle):
        u, v = grid.cell(loop.center)
        radius = _clamped(grid.radius_steps(loop.radius), 1, grid.top)
        return f"{letters[1]}{u},{v},{radius}", (u, v, radius)
    path = rounded(loop, grid)
    if area(to_path(path, grid)) < 0:
        path = path.reversed()
    path = path.canonical_start()
    u, v = path.cells[0]
    return f"{letters[0]}{u},{v}" + _write_segments(path), (u, v)


def _write_segments(path: GridPath) -> str:
    words = []
    ends = (*path.cells[1:], path.cells[0])
    for (u0, v0), (u, v), steps in zip(path.cells, ends, path.steps, strict=True):
        if steps:
            words.append(f"{'A' if steps > 0 else 'B'}{u},{v},{abs(steps)}")
        elif v == v0:
            words.append(f"H{u}")
        else:
            words.append(f"V{v}" if u == u0 else f"L{u},{v}")
    return "".join(words if path.steps[-1] else words[:-1])  # the closing line is understood


# --- decode -----------------------------------------------------------------------------------------------


@cache
def _grammar(bits: int) -> CommandGrammar:
    return CommandGrammar(bits)


_FEATURE = re.compile(
    r"(?P<doublings>\d?)(?:(?P<axis>[XYZ])|O(?P<angles>\d+,\d+,\d+),)"
    r"(?P<frame>\d+,\d+,\d+,\d+,\d+)(?P<kind>[EFMT])(?P<extent>[\d,]+)(?P<loops>.+)"
)
_LOOP = re.compile(r"([PRQD])([\d,]+)([^PRQD]*)")
_SEGMENT = re.compile(r"([HVLAB])([\d,]+)")


def decode(text: str, bits: int = 8) -> CadProgram:
    """The program that a command text describes, in [-1, 1]^3 or little beyond.

    Loops without area are left out. Raises CadError, and nothing else, for what the grammar does not allow
    and for a feature without any loop that encloses an area.
    """
    sizes = levels(bits)
    if len(text) > MAX_TEXT:
        raise CadError(f"the command text has {len(text):,} characters: at most {MAX_TEXT:,} are read")
    _check_syntax(text, _grammar(bits))
    features = [(_OPERATIONS[feature[0]], feature[1:]) for feature in text.split(";")]
    return CadProgram(tuple(_decode_feature(rest, operation, sizes) for operation, rest in features))


def is_feature(text: str, bits: int = 8) -> bool:
    """Whether `decode` takes a feature that follows the grammar: one of its loops encloses an area."""
    try:
        _decode_feature(text[1:], _OPERATIONS[text[0]], levels(bits))
    except CadError:
        return False
    return True


def _check_syntax(text: str, grammar: CommandGrammar) -> None:
    state = grammar.start
    for place, char in enumerate(text):
        following = grammar.advance(state, char)
        if following is None:
            near = ascii(text[max(0, place - 12) : place + 1])
            raise CadError(
                f"the command text is wrong at character {place}, {near}: "
                f"expected one of {grammar.expected(state)}"
            )
        state = following
    if not grammar.is_complete(state):
        raise CadError(f"the command text breaks off after {len(text)} characters, {text[-12:]!a}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _decode_feature(text: str, operation: Operation, sizes: Levels) -> Extrude:
    """An extrude from what follows its operation letter. The text is known to follow the grammar."""
    match = _FEATURE.fullmatch(text)
    assert match is not None, text
    doublings = int(match["doublings"] or 0)
    if match["axis"]:
        frame = axis_frame(match["axis"])
    else:
        theta, phi, gamma = _numbers(match["angles"])
        frame = oblique_frame((theta, phi, gamma), sizes.turn)
    *corner, width, height = _numbers(match["frame"])
    unit_ = _unit(frame, sizes, doublings)

    axes = (frame.x_axis, frame.y_axis, frame.normal)
    order = axes if not frame.name else sorted(axes, reverse=True)

    def position(level: int) -> float:
        return _exact((level - sizes.grid / 2) * unit_)

    def length(direction: Vec3, steps: int) -> float:
        level = corner[order.index(direction)]
        return position(level + steps) - position(level)

    size = length(frame.x_axis, width), length(frame.y_axis, height)
    grid = Grid((0.0, 0.0, *size), size, sizes.grid, sizes.turn, unit_ / 2)
    profiles = _read_profiles(match["loops"], grid)
    if not profiles:
        raise CadError(f"a feature has no loop that encloses an area: {text[:60]!a}")
    origin = along(
        (0.0, 0.0, 0.0), *((axis, position(level)) for axis, level in zip(order, corner, strict=True))
    )
    one, *two = _numbers(match["extent"])
    match match["kind"]:
        case "E":
            extent = Extent(ExtentType.ONE_SIDE, length(frame.normal, one))
        case "F":
            extent = Extent(ExtentType.ONE_SIDE, length(frame.normal, -one))
        case "M":
            extent = Extent(ExtentType.SYMMETRIC, length(frame.normal, one))
        case _:
            extent = Extent(ExtentType.TWO_SIDES, length(frame.normal, one), -length(frame.normal, -two[0]))
    return Extrude(Plane(origin, frame.x_axis, frame.normal), profiles, extent, operation)


def _exact(position: float) -> float:
    """Round to 2^-40, so that sums and differences of positions are exact.

    Faces that lie in one plane of the grid then do so to the last bit: no kernel finds a gap between them.
    """
    return float(round(position * 2.0**40)) / 2.0**40


def _read_profiles(text: str, grid: Grid) -> tuple[Profile, ...]:
    """Profiles whose outer loop has an area, with those of their holes that have one."""
    found: list[tuple[Loop | None, list[Loop]]] = []
    for letter, start, segments in _LOOP.findall(text):
        loop = _read_loop(_numbers(start), segments, grid)
        if letter in "PR":
            found.append((loop, []))
        elif loop is not None:
            found[-1][1].append(loop)
    return tuple(Profile(outer, tuple(holes)) for outer, holes in found if outer is not None)


def _read_loop(start: Sequence[int], segments: str, grid: Grid) -> Loop | None:
    if not segments:
        u, v, radius = start
        return Circle(grid.point((u, v)), radius * grid.radius_step)
    cells, steps = [(start[0], start[1])], []
    for letter, text in _SEGMENT.findall(segments):
        numbers, (u, v) = _numbers(text), cells[-1]
        match letter:
            case "H":
                end, turn = (numbers[0], v), 0
            case "V":
                end, turn = (u, numbers[0]), 0
            case "L":
                end, turn = (numbers[0], numbers[1]), 0
            case _:
                end, turn = (numbers[0], numbers[1]), numbers[2] if letter == "A" else -numbers[2]
        if end != (u, v):  # a segment without length is no segment
            cells.append(end)
            steps.append(turn)
    if cells[-1] == cells[0]:
        cells.pop()
    else:
        steps.append(0)
    loop = _simplified_loop(to_path(GridPath(tuple(cells), tuple(steps)), grid), grid) if cells else None
    return loop
