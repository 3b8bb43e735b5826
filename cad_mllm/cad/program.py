"""The parametric CAD program: sketches on planes, extruded and combined. Plain immutable data.

Lengths are in the file's own unit until `normalised()` scales the program into [-1, 1]^3; angles are
radians. A sketch is two-dimensional, in the frame of its plane.
"""

from dataclasses import dataclass
from enum import Enum

Vec2 = tuple[float, float]
Vec3 = tuple[float, float, float]


class Operation(Enum):
    """How an extruded body meets what stands already."""

    NEW = "new"
    JOIN = "join"
    CUT = "cut"
    INTERSECT = "intersect"


class ExtentType(Enum):
    """On which sides of its plane a profile is extruded."""

    ONE_SIDE = "one"
    TWO_SIDES = "two"
    SYMMETRIC = "symmetric"


@dataclass(frozen=True)
class Line:
    """A straight segment from where the path stands to `end`."""

    end: Vec2


@dataclass(frozen=True)
class Arc:
    """A circular arc from where the path stands to `end`.

    `sweep` is the signed angle in radians, counter-clockwise positive, 0 < |sweep| < 2 pi.
    """

    end: Vec2
    sweep: float


@dataclass(frozen=True)
class Path:
    """A closed chain of lines and arcs: the last segment ends exactly at `start`."""

    start: Vec2
    segments: tuple[Line | Arc, ...]


@dataclass(frozen=True)
class Circle:
    """A full circle; `radius` > 0."""

    center: Vec2
    radius: float


Loop = Path | Circle


@dataclass(frozen=True)
class Profile:
    """A region: inside `outer`, outside every loop of `holes`."""

    outer: Loop
    holes: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Plane:
    """A right-handed frame: sketch x along `x_axis`, extrusion along `normal`, sketch y = normal x x_axis."""

    origin: Vec3
    x_axis: Vec3
    normal: Vec3


@dataclass(frozen=True)
class Extent:
    """Signed distances along +normal (`one`) and, for TWO_SIDES, along -normal (`two`).

    SYMMETRIC reaches `one` to both sides. A negative ONE_SIDE distance extrudes against the normal.
    """

    type: ExtentType
    one: float
    two: float = 0.0


@dataclass(frozen=True)
class Extrude:
    """One feature: all `profiles` of one sketch plane, extruded by one extent, combined by one operation."""

    plane: Plane
    profiles: tuple[Profile, ...]
    extent: Extent
    operation: Operation


@dataclass(frozen=True)
class CadProgram:
    """The features in the order in which they are built. Never empty."""

    extrudes: tuple[Extrude, ...]
