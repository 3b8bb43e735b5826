"""Loops on an integer grid: what rounding flattens is taken out, and every loop gets one canonical form.

A loop here knows its exact shape beside its rounded one, because what is left of the sketch decides the frame
in which it is rounded.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from cad_mllm.cad.geometry import arc_middle
from cad_mllm.cad.program import Arc, Circle, Line, Loop, Path, Vec2

Cell = tuple[int, int]
Box2 = tuple[float, float, float, float]
"""Smallest u, v and largest u, v."""


@dataclass(frozen=True)
class Grid:
    """Where the levels 0..`top` of a sketch lie: on `box`, whose rounded size in space is `size`."""

    box: Box2
    size: Vec2
    top: int
    turn: int
    radius_step: float

    def cell(self, point: Vec2) -> Cell:
        """The nearest level of a point of the exact sketch."""
        u0, v0, u1, v1 = self.box
        width, height = self.size
        return (
            round((point[0] - u0) / (u1 - u0) * self.top) if width > 0 and u1 > u0 else 0,
            round((point[1] - v0) / (v1 - v0) * self.top) if height > 0 and v1 > v0 else 0,
        )

    def point(self, cell: Cell) -> Vec2:
        """Where a level lies, from the frame's corner, in space."""
        return cell[0] * self.size[0] / self.top, cell[1] * self.size[1] / self.top

    def sweep_steps(self, sweep: float) -> int:
        """Signed steps of an arc; 0 for one that is as good as straight."""
        return round(sweep / (2 * math.pi) * self.turn)

    def radius_steps(self, radius: float) -> int:
        """Steps of a circle's radius, at least 1."""
        return max(1, round(radius / self.radius_step))


def control_points(loop: Loop) -> list[Vec2]:
    """The points that the frame holds: the corners of a path, the centre of a circle."""
    if isinstance(loop, Circle):
        return [loop.center]
    return [loop.start, *[segment.end for segment in loop.segments]]


def control_box(loops: list[Loop]) -> Box2:
    """The box of the control points of some loops."""
    us, vs = zip(*(point for loop in loops for point in control_points(loop)), strict=True)
    return min(us), min(vs), max(us), max(vs)


def halve_long_arcs(loop: Loop) -> Loop:
    """Make two of every arc of more than half a turn: the nearer to a full turn, the less its ends say."""
    if isinstance(loop, Circle):
        return loop
    segments: list[Line | Arc] = []
    here = loop.start
    for segment in loop.segments:
        if isinstance(segment, Arc) and abs(segment.sweep) > math.pi * (1 + 1e-9):
            segments.append(Arc(arc_middle(here, segment), segment.sweep / 2))
            segments.append(Arc(segment.end, segment.sweep / 2))
        else:
            segments.append(segment)
        here = segment.end
    return Path(loop.start, tuple(segments))


class _Corner(NamedTuple):
    """A corner of a path, exact and rounded, and the segment that leaves it."""

    exact: Vec2
    cell: Cell
    sweep: float
    steps: int


def simplify(path: Path, grid: Grid) -> Path | None:
    """The exact path without the corners that mean nothing once rounded; None if nothing is left.

    Out go segments without length, and corners at which a line goes straight on or straight back.
    """
    corners = _corners(path, grid)
    given = len(corners)
    i, kept = 0, 0
    while kept < len(corners):  # the `kept` corners before i stay as long as their neighbours do
        before, here, after = corners[i - 1], corners[i], corners[(i + 1) % len(corners)]
        straight = here.steps == before.steps == 0 and _turn(before.cell, here.cell, after.cell) == 0
        if here.cell == after.cell or straight:
            kept = max(0, kept - 1) if kept + 1 < len(corners) else 0
            del corners[i]
            i = (i - 1) % len(corners) if corners else 0
        else:
            i, kept = (i + 1) % len(corners), kept + 1
    if len(corners) < 2:
        return None
    if len(corners) == given:  # nearly always
        return path
    ends = [corner.exact for corner in corners[1:]] + [corners[0].exact]
    return Path(
        corners[0].exact,
        tuple(Arc(end, c.sweep) if c.sweep else Line(end) for end, c in zip(ends, corners, strict=True)),
    )


def _corners(path: Path, grid: Grid) -> list[_Corner]:
    corners = []
    cell, here = grid.cell, path.start
    for segment in path.segments:
        if isinstance(segment, Arc):
            corners.append(_Corner(here, cell(here), segment.sweep, grid.sweep_steps(segment.sweep)))
        else:
            corners.append(_Corner(here, cell(here), 0.0, 0))
        here = segment.end
    return corners


def _turn(a: Cell, b: Cell, c: Cell) -> int:
    """Twice the signed area of the triangle a b c."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


@dataclass(frozen=True)
class GridPath:
    """A closed path on the grid: from each cell a segment to the next one, `steps` of it 0 for a line."""

    cells: tuple[Cell, ...]
    steps: tuple[int, ...]

    def reversed(self) -> "GridPath":
        """The same points, run through the other way."""
        return GridPath((self.cells[0], *self.cells[:0:-1]), tuple(-steps for steps in reversed(self.steps)))

    def canonical_start(self) -> "GridPath":
        """The same path from the smallest cell behind a line, or of all cells if there is no line."""
        starts = [i for i in range(len(self.cells)) if self.steps[i - 1] == 0] or range(len(self.cells))
        lowest = min(self.cells[i] for i in starts)
        candidates = (self._from(i) for i in starts if self.cells[i] == lowest)
        return min(candidates, key=lambda path: (path.cells, path.steps))

    def _from(self, i: int) -> "GridPath":
        return GridPath(self.cells[i:] + self.cells[:i], self.steps[i:] + self.steps[:i])


def rounded(path: Path, grid: Grid) -> GridPath:
    """A simplified path on the grid."""
    corners = _corners(path, grid)
    return GridPath(tuple([c.cell for c in corners]), tuple([c.steps for c in corners]))


def to_path(path: GridPath, grid: Grid) -> Path:
    """The path in space units, from the frame's corner."""
    ends = [grid.point(cell) for cell in (*path.cells[1:], path.cells[0])]
    segments = [
        Arc(end, steps / grid.turn * 2 * math.pi) if steps else Line(end)
        for end, steps in zip(ends, path.steps, strict=True)
    ]
    return Path(grid.point(path.cells[0]), tuple(segments))
