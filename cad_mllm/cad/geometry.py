"""Plane geometry of loops: centres, areas, extreme points, and the box of a program without a CAD kernel.

Pure Python. Angles are radians, lengths in the program's unit.
"""

import math

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
    Vec2,
    Vec3,
)
from cad_mllm.errors import CadError

Box = tuple[Vec3, Vec3]


def cross(a: Vec3, b: Vec3) -> Vec3:
    """a x b."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def dot(a: Vec3, b: Vec3) -> float:
    """a . b."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def along(start: Vec3, *steps: tuple[Vec3, float]) -> Vec3:
    """`start` moved by each (direction, distance) of `steps`."""
    x, y, z = start
    for direction, distance in steps:
        x, y, z = x + direction[0] * distance, y + direction[1] * distance, z + direction[2] * distance
    return x, y, z


def unit(vector: Vec3) -> Vec3:
    """`vector` with length 1; components off an axis by rounding alone are put on it. CadError for zero."""
    length = math.hypot(*vector)
    if not (math.isfinite(length) and length > 1e-9):
        raise CadError("a direction has no length: give the sketch plane axes that are not zero")
    x, y, z = vector if abs(length - 1) < 1e-12 else (component / length for component in vector)
    clean = tuple(float(round(c)) if abs(c - round(c)) < 1e-7 else c for c in (x, y, z))
    return clean[0], clean[1], clean[2]


def y_axis(plane: Plane) -> Vec3:
    """The sketch's y direction: normal x x_axis."""
    return cross(plane.normal, plane.x_axis)


def arc_center(start: Vec2, arc: Arc) -> Vec2:
    """Centre of the circle on which the arc runs from `start` to `arc.end`."""
    (x0, y0), (x1, y1) = start, arc.end
    to_center = 0.5 / math.tan(arc.sweep / 2)  # in chord lengths, to the left of the chord
    return (x0 + x1) / 2 - (y1 - y0) * to_center, (y0 + y1) / 2 + (x1 - x0) * to_center


def arc_middle(start: Vec2, arc: Arc) -> Vec2:
    """The point halfway along the arc."""
    (x0, y0), (x1, y1) = start, arc.end
    bulge = 0.5 * math.tan(arc.sweep / 4)  # in chord lengths, to the right of the chord
    return (x0 + x1) / 2 + (y1 - y0) * bulge, (y0 + y1) / 2 - (x1 - x0) * bulge


def area(loop: Loop) -> float:
    """Enclosed area, positive for a counter-clockwise loop (and for every circle)."""
    if isinstance(loop, Circle):
        return math.pi * loop.radius**2
    x0, y0 = loop.start  # relative to the start: far from the origin the products would drown the area
    total, here = 0.0, loop.start
    for segment in loop.segments:
        end = segment.end
        total += ((here[0] - x0) * (end[1] - y0) - (end[0] - x0) * (here[1] - y0)) / 2
        if isinstance(segment, Arc):
            chord = math.dist(here, end)
            radius = chord / 2 / abs(math.sin(segment.sweep / 2))
            total += radius**2 / 2 * (segment.sweep - math.sin(segment.sweep))
        here = end
    return total


def reach(loop: Loop, direction: Vec2) -> tuple[float, float]:
    """Smallest and largest value of `p . direction` over the points p of the loop."""
    dx, dy = direction
    if isinstance(loop, Circle):
        middle, half = loop.center[0] * dx + loop.center[1] * dy, loop.radius * math.hypot(dx, dy)
        return middle - half, middle + half
    values = [loop.start[0] * dx + loop.start[1] * dy]
    here = loop.start
    for segment in loop.segments:
        values.append(segment.end[0] * dx + segment.end[1] * dy)
        if isinstance(segment, Arc):
            values.extend(_arc_reach(here, segment, direction))
        here = segment.end
    return min(values), max(values)


def _arc_reach(start: Vec2, arc: Arc, direction: Vec2) -> list[float]:
    """Values of `p . direction` at the points of the arc where it turns back along `direction`."""
    cx, cy = arc_center(start, arc)
    radius = math.dist((cx, cy), start)
    first = math.atan2(start[1] - cy, start[0] - cx)
    facing = math.atan2(direction[1], direction[0])
    found = []
    for angle, sign in ((facing, 1.0), (facing + math.pi, -1.0)):
        turn = (angle - first) % (2 * math.pi) if arc.sweep > 0 else (first - angle) % (2 * math.pi)
        if turn < abs(arc.sweep):
            found.append(cx * direction[0] + cy * direction[1] + sign * radius * math.hypot(*direction))
    return found


def extent_range(extent: Extent) -> tuple[float, float]:
    """Where the body begins and ends along the plane's normal: (low, high), low < high.

    Both sides of a TWO_SIDES extent begin at the plane, whatever their signs. Raises CadError if no length is
    left.
    """
    reaches: tuple[float, ...]
    match extent.type:
        case ExtentType.ONE_SIDE:
            reaches = (extent.one,)
        case ExtentType.TWO_SIDES:
            reaches = (extent.one, -extent.two)
        case ExtentType.SYMMETRIC:
            reaches = (extent.one, -extent.one)
    low, high = min(0.0, *reaches), max(0.0, *reaches)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise CadError(
            f"an extrude of length {high - low:g} has no volume: give it a finite length that is not 0"
        )
    return low, high


def extrude_box(extrude: Extrude) -> Box:
    """Smallest and largest corner of the extruded profiles, exact for arcs and oblique planes."""
    plane = extrude.plane
    up = y_axis(plane)
    span = extent_range(extrude.extent)
    low, high = [], []
    for axis in range(3):
        direction = plane.x_axis[axis], up[axis]
        reaches = [reach(profile.outer, direction) for profile in extrude.profiles]
        lift = sorted(plane.normal[axis] * end for end in span)
        low.append(plane.origin[axis] + min(r[0] for r in reaches) + lift[0])
        high.append(plane.origin[axis] + max(r[1] for r in reaches) + lift[1])
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def program_box(program: CadProgram) -> Box:
    """Box of all that the program adds (New and Join). Cuts and intersections only take away from it."""
    boxes = [extrude_box(e) for e in program.extrudes if e.operation in (Operation.NEW, Operation.JOIN)]
    if not boxes:
        raise CadError("the program adds no body: begin with a New extrude")
    low = [min(box[0][axis] for box in boxes) for axis in range(3)]
    high = [max(box[1][axis] for box in boxes) for axis in range(3)]
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def transform_loop(loop: Loop, rows: tuple[Vec2, Vec2], offset: Vec2, scale: float = 1.0) -> Loop:
    """`loop` under p -> scale * rows p + offset. `rows` is orthonormal; a reflection turns arcs around."""
    (a, b), (c, d) = rows
    turn = 1.0 if a * d - b * c > 0 else -1.0

    def moved(p: Vec2) -> Vec2:
        return scale * (a * p[0] + b * p[1]) + offset[0], scale * (c * p[0] + d * p[1]) + offset[1]

    if isinstance(loop, Circle):
        return Circle(moved(loop.center), loop.radius * scale)
    return Path(
        moved(loop.start),
        tuple(
            Arc(moved(segment.end), segment.sweep * turn)
            if isinstance(segment, Arc)
            else type(segment)(moved(segment.end))
            for segment in loop.segments
        ),
    )
