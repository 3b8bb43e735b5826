"""Orientations of sketch planes on a grid of angles, each with one name.

A plane and its quarter turns and flips carry the same solids: of these eight frames one stands for all.
"""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from cad_mllm.cad.geometry import cross, dot, unit
from cad_mllm.cad.program import Plane, Vec2, Vec3

Angles = tuple[int, int, int]
"""In steps: theta of the normal to Z, phi of the normal about Z, gamma of the sketch about its normal."""

AXIS_FRAMES: dict[str, tuple[Vec3, Vec3]] = {
    "X": ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
    "Y": ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
    "Z": ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
}
"""Sketch x axis and normal of the frames along the axes."""


@dataclass(frozen=True)
class Frame:
    """An orientation: `name` is X, Y or Z, or empty for an oblique one, which has `angles`."""

    name: str
    angles: Angles
    x_axis: Vec3
    normal: Vec3

    @property
    def y_axis(self) -> Vec3:
        """normal x x_axis."""
        return cross(self.normal, self.x_axis)


@dataclass(frozen=True)
class FrameFit:
    """The frame that stands for a plane. `rows` takes the plane's sketch coordinates to the frame's.

    `turned_over`: the frame's normal is the opposite of the plane's. `x_axis` and `normal` are those of the
    plane, turned like the frame but not rounded.
    """

    frame: Frame
    rows: tuple[Vec2, Vec2]
    turned_over: bool
    x_axis: Vec3
    normal: Vec3


def axis_frame(name: str) -> Frame:
    """The frame X, Y or Z."""
    return Frame(name, (0, 0, 0), *AXIS_FRAMES[name])


def oblique_frame(angles: Angles, turn: int) -> Frame:
    """Rz(phi) Ry(theta) Rz(gamma) of the world's frame; `turn` steps are a full turn."""
    (ct, st), (cp, sp), (cg, sg) = (_cos_sin(steps, turn) for steps in angles)
    along_theta, along_phi = (ct * cp, ct * sp, -st), (-sp, cp, 0.0)
    x_axis = tuple(cg * a + sg * b for a, b in zip(along_theta, along_phi, strict=True))
    return Frame("", angles, unit((x_axis[0], x_axis[1], x_axis[2])), unit((st * cp, st * sp, ct)))


_DIRECTIONS = struct.Struct("6d")


def fit_frame(plane: Plane, turn: int) -> FrameFit:
    """The nearest frame on the grid of angles, of the eight that carry the plane's solids."""
    # As bytes, since as numbers 0.0 and -0.0 would be one key.
    return _fit_frame(_DIRECTIONS.pack(*plane.x_axis, *plane.normal), turn)


@lru_cache(maxsize=1024)  # most planes of most files are those of the axes
def _fit_frame(directions: bytes, turn: int) -> FrameFit:
    x0, x1, x2, n0, n1, n2 = _DIRECTIONS.unpack(directions)
    given_x, given_normal = (x0, x1, x2), (n0, n1, n2)
    rounded = oblique_frame(_angles(given_x, given_normal, turn), turn)
    best: FrameFit | None = None
    for quarter, over in product(((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)), (False, True)):
        x_axis, normal = _turned(rounded.x_axis, rounded.normal, quarter, over)
        name = next((name for name, axes in AXIS_FRAMES.items() if _same(axes, (x_axis, normal))), "")
        angles = _angles(x_axis, normal, turn)
        frame = axis_frame(name) if name else oblique_frame(angles, turn)
        if best is None or (not frame.name, frame.angles) < (not best.frame.name, best.frame.angles):
            (a, b), sign = quarter, -1.0 if over else 1.0
            rows = ((a, b), (-sign * b, sign * a))
            best = FrameFit(frame, rows, over, *_turned(given_x, given_normal, quarter, over))
    assert best is not None
    return best


def _turned(x_axis: Vec3, normal: Vec3, quarter: Vec2, over: bool) -> tuple[Vec3, Vec3]:
    """The frame with its sketch turned by quarters, and turned over about its new x axis if `over`."""
    y_axis = cross(normal, x_axis)
    x, y, z = (quarter[0] * a + quarter[1] * b for a, b in zip(x_axis, y_axis, strict=True))
    return (x, y, z), (-normal[0], -normal[1], -normal[2]) if over else normal


def _same(a: tuple[Vec3, Vec3], b: tuple[Vec3, Vec3]) -> bool:
    return all(math.dist(p, q) < 1e-9 for p, q in zip(a, b, strict=True))


def _angles(x_axis: Vec3, normal: Vec3, turn: int) -> Angles:
    """The nearest angles: 0 <= theta <= turn / 2, 0 <= phi, gamma < turn; phi is 0 where theta is."""
    flat = math.hypot(normal[0], normal[1])
    theta = math.atan2(flat, normal[2])
    phi = math.atan2(normal[1], normal[0]) if flat > 1e-9 else 0.0
    along_theta = (math.cos(theta) * math.cos(phi), math.cos(theta) * math.sin(phi), -math.sin(theta))
    along_phi = (-math.sin(phi), math.cos(phi), 0.0)
    gamma = math.atan2(dot(x_axis, along_phi), dot(x_axis, along_theta))
    steps = [round(angle / (2 * math.pi) * turn) for angle in (theta, phi, gamma)]
    return steps[0], steps[1] % turn, steps[2] % turn


def _cos_sin(steps: int, turn: int) -> Vec2:
    """Cosine and sine, exact at the quarters."""
    quarters, rest = divmod(steps * 4, turn)
    angle = rest / 4 / turn * 2 * math.pi
    cos, sin = math.cos(angle), math.sin(angle)
    return ((cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos))[quarters % 4]
