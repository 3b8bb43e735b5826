"""From loose curves to loops, and from loose loops to profiles with holes.

Array suffixes: K curves, L loops, P points, V corners of a polygon, C coordinates.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import manifold3d
import numpy as np
from numpy.typing import NDArray

from cad_mllm.cad.geometry import arc_center, arc_middle, area, reach
from cad_mllm.cad.program import Arc, Circle, Line, Loop, Path, Profile, Vec2
from cad_mllm.errors import CadError

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

FloatArray = NDArray[np.float64]

GAP_TOLERANCE = 1e-3
"""Largest gap between the end points of neighbouring curves, in sizes of their loop."""
CROSSING = 1e-2
"""Loops may cross in their roundings: they enclose an area that differs by less than this share."""
POINT_TOLERANCE = 1e-9
"""What is shorter or smaller than this, in sizes of its loop (squared for an area), is nothing."""
_NEIGHBOURS = 8
"""End points that are looked at first for one that is not used yet."""
_SEGMENTS_PER_TURN = 64
_PROBES = 8
_CHUNK = 1 << 20  # cells of a point-in-polygon table that are held at a time


@dataclass(frozen=True)
class OpenCurve:
    """A curve that is not closed in itself: a line (`sweep` 0) or an arc from `start` to `end`."""

    start: Vec2
    end: Vec2
    sweep: float = 0.0

    def reversed(self) -> "OpenCurve":
        """The same points, run through the other way."""
        return OpenCurve(self.end, self.start, -self.sweep)

    def either_way(self) -> "OpenCurve":
        """One name for the curve and its reverse."""
        return self if self.start <= self.end else self.reversed()


def chain(curves: Sequence[OpenCurve]) -> list[Loop]:
    """Join curves, in any order and direction, into closed loops; end points are snapped together exactly.

    A curve that is given several times counts once. Curves without length and loops without area are left
    out. Raises CadError where a gap stays open.
    """
    curves = _without_repeats(curves)
    if not curves:
        return []
    loose = _LooseEnds(curves)
    loops = []
    while (first := loose.first()) is not None:
        loop = _closed(_run(first, loose, len(curves)))
        if abs(area(loop)) > POINT_TOLERANCE * loose.size**2:
            loops.append(loop)
    return loops


def _without_repeats(curves: Sequence[OpenCurve]) -> Sequence[OpenCurve]:
    """Each curve once, and those not at all that only lead out to a free end and back."""
    times = Counter(curve.either_way() for curve in curves)
    if len(times) == len(curves):
        return curves
    kept = list(times)
    while True:
        ends = Counter(point for curve in kept for point in (curve.start, curve.end))
        firm = [c for c in kept if times[c] == 1 or min(ends[c.start], ends[c.end]) > 1]
        if len(firm) == len(kept):
            return firm
        kept = firm


class _LooseEnds:
    """The curves that are not in a loop yet, found by their end points."""

    def __init__(self, curves: Sequence[OpenCurve]) -> None:
        self._curves = curves
        ends = [point for curve in curves for point in (curve.start, curve.end)]
        us, vs = zip(*ends, strict=True)
        self.size = max(max(us) - min(us), max(vs) - min(vs))
        # Without numpy: a loop has a handful of curves.
        self._used = [math.dist(c.start, c.end) <= POINT_TOLERANCE * self.size for c in curves]
        self._all_used_before = 0
        self._at: dict[Vec2, list[tuple[int, int]]] = {}
        for index, curve in enumerate(curves):
            self._at.setdefault(curve.start, []).append((index, 0))
            self._at.setdefault(curve.end, []).append((index, 1))

    @cached_property
    def _tree(self) -> "cKDTree":
        from scipy.spatial import cKDTree  # takes longer to import than all that a worker needs besides

        ends = [point for curve in self._curves for point in (curve.start, curve.end)]
        return cKDTree(np.array(ends, dtype=np.float64))

    def first(self) -> OpenCurve | None:
        """Take the first curve that is left."""
        for index in range(self._all_used_before, len(self._used)):
            if not self._used[index]:
                self._all_used_before = index
                return self.take(index, 0)
        return None

    def take(self, index: int, end: int) -> OpenCurve:
        """Take a curve, turned so that it begins at `end` (0: its start)."""
        self._used[index] = True
        return self._curves[index] if end == 0 else self._curves[index].reversed()

    def nearest(self, point: Vec2) -> tuple[float, int, int]:
        """Distance to the nearest loose end (infinity if none is left), its curve's index, and which end."""
        here = self._at.get(point, [])
        while here and self._used[here[-1][0]]:
            here.pop()
        if here:  # in nearly all files the ends meet exactly
            return 0.0, *here[-1]
        total = 2 * len(self._used)
        count = min(_NEIGHBOURS, total)
        while True:
            found = self._tree.query(point, k=count)
            for gap, place in zip(np.atleast_1d(found[0]), np.atleast_1d(found[1]), strict=True):
                index, end = divmod(int(place), 2)
                if not self._used[index]:
                    return float(gap), index, end
            if count == total:
                return math.inf, 0, 0
            count = min(4 * count, total)


def _run(first: OpenCurve, loose: _LooseEnds, count: int) -> list[OpenCurve]:
    """Follow nearest end points from the first curve until the run is closed."""
    run, tolerance = [first], GAP_TOLERANCE * loose.size
    while True:
        here = run[-1].end
        to_start = math.dist(here, run[0].start)
        gap, index, end = loose.nearest(here) if to_start > 0 else (math.inf, 0, 0)
        if to_start <= min(gap, tolerance):
            return run
        if gap > tolerance:
            raise CadError(
                f"a sketch loop of {count} curves is open: a gap of {min(gap, to_start):.3g} at "
                f"({here[0]:.6g}, {here[1]:.6g}); close the sketch"
            )
        run.append(loose.take(index, end))


def _closed(run: Sequence[OpenCurve]) -> Loop:
    ends = [curve.end for curve in run[:-1]] + [run[0].start]
    path = Path(
        run[0].start,
        tuple(
            Arc(end, curve.sweep) if curve.sweep else Line(end) for curve, end in zip(run, ends, strict=True)
        ),
    )
    return _as_circle(path) or path


def _as_circle(path: Path) -> Circle | None:
    """The circle that arcs of one turn about one centre make up together, if that is what the path is."""
    arcs = [segment for segment in path.segments if isinstance(segment, Arc)]
    if len(arcs) != len(path.segments) or abs(abs(math.fsum(a.sweep for a in arcs)) - 2 * math.pi) > 1e-6:
        return None
    starts = [path.start, *(a.end for a in arcs[:-1])]
    if any(start == arc.end for start, arc in zip(starts, arcs, strict=True)):
        return None
    centers = [arc_center(start, arc) for start, arc in zip(starts, arcs, strict=True)]
    radius = math.dist(centers[0], path.start)
    if any(math.dist(center, centers[0]) > 1e-6 * radius for center in centers):
        return None
    return Circle(centers[0], radius)


def nest(loops: Sequence[Loop]) -> list[Profile]:
    """Sort loops into profiles, by even-odd containment. A loop that is given several times counts once.

    Loops may touch: whether a loop lies in another is put to the vote of points along it. Raises CadError for
    loops that cross.
    """
    if len(loops) > 1:
        loops = list({_outline(loop): loop for loop in reversed(loops)}.values())[::-1]
    if len(loops) < 2:  # most: nothing to compare it with
        return [Profile(loop) for loop in loops]
    order = sorted(range(len(loops)), key=lambda i: -abs(area(loops[i])))
    ranked = [loops[i] for i in order]
    box_L4 = np.array([(*reach(loop, (1.0, 0.0)), *reach(loop, (0.0, 1.0))) for loop in ranked])
    probes_LPC = np.stack([_probes(loop) for loop in ranked])
    slack = 1e-6 * float(np.ptp(box_L4[:, :2]) + np.ptp(box_L4[:, 2:]))
    depths, parents = [0] * len(ranked), [-1] * len(ranked)
    for i, loop in enumerate(ranked):
        low, high = box_L4[i, ::2] - slack, box_L4[i, 1::2] + slack
        within_L = (box_L4[:, ::2] >= low).all(axis=1) & (box_L4[:, 1::2] <= high).all(axis=1)
        candidates = [j for j in np.flatnonzero(within_L) if j > i]
        inside_LP = _contains(loop, probes_LPC[candidates].reshape(-1, 2)).reshape(-1, _PROBES)
        for j, votes in zip(candidates, inside_LP.sum(axis=1), strict=True):
            if 2 * votes > _PROBES:
                depths[j] += 1
                parents[j] = i  # the smallest container so far: containers come in order of falling area
    outers = sorted((i for i in range(len(ranked)) if depths[i] % 2 == 0), key=lambda i: order[i])
    holes: dict[int, list[int]] = {i: [] for i in outers}
    for i in sorted(range(len(ranked)), key=lambda i: order[i]):
        if depths[i] % 2:
            holes[parents[i]].append(i)
    profiles = [Profile(ranked[i], tuple(ranked[j] for j in holes[i])) for i in outers]
    _require_nested(profiles)
    return profiles


def _outline(loop: Loop) -> Circle | frozenset[OpenCurve]:
    """The curves of a loop, wherever it starts and whichever way it runs."""
    if isinstance(loop, Circle):
        return loop
    starts = [loop.start, *(segment.end for segment in loop.segments)]
    return frozenset(
        OpenCurve(start, segment.end, segment.sweep if isinstance(segment, Arc) else 0.0).either_way()
        for start, segment in zip(starts, loop.segments, strict=False)
    )


def _require_nested(profiles: Sequence[Profile]) -> None:
    """Refuse loops that cross: they enclose what no nesting of them does."""
    polygons = [[_polygon(loop) for loop in (profile.outer, *profile.holes)] for profile in profiles]
    even_odd = manifold3d.CrossSection(
        [polygon_VC for polygons_ in polygons for polygon_VC in polygons_], manifold3d.FillRule.EvenOdd
    ).area()
    nested = sum(_polygon_area(outer_VC) - sum(map(_polygon_area, holes)) for outer_VC, *holes in polygons)
    if abs(even_odd - nested) > CROSSING * max(even_odd, nested):
        raise CadError("loops of one profile cross one another: it is not clear what they enclose")


def _polygon_area(polygon_VC: FloatArray) -> float:
    x_V, y_V = (polygon_VC - polygon_VC[0]).T
    return abs(float(x_V @ np.roll(y_V, -1) - np.roll(x_V, -1) @ y_V)) / 2


def _probes(loop: Loop) -> FloatArray:
    """Points along the loop, (_PROBES, 2)."""
    polygon_VC = _polygon(loop)
    middles_VC = (polygon_VC + np.roll(polygon_VC, -1, axis=0)) / 2
    return middles_VC[np.arange(_PROBES) * len(middles_VC) // _PROBES]


def _polygon(loop: Loop) -> FloatArray:
    """Corners of a polygon close to the loop, (V, 2)."""
    if isinstance(loop, Circle):
        turn_V = np.linspace(0.0, 2 * math.pi, _SEGMENTS_PER_TURN, endpoint=False)
        return np.asarray(loop.center) + loop.radius * np.stack([np.cos(turn_V), np.sin(turn_V)], axis=1)
    corners: list[Vec2] = []
    here = loop.start
    for segment in loop.segments:
        corners.append(here)
        if isinstance(segment, Arc):
            corners.extend(_arc_points(here, segment))
        here = segment.end
    return np.array(corners, dtype=np.float64)


def _arc_points(start: Vec2, arc: Arc) -> list[Vec2]:
    """Points within the arc, by halving: two for a short one, more for a long one."""
    middle = arc_middle(start, arc)
    if abs(arc.sweep) < 2 * 2 * math.pi / _SEGMENTS_PER_TURN:
        return [middle]
    half = arc.sweep / 2
    return [*_arc_points(start, Arc(middle, half)), middle, *_arc_points(middle, Arc(arc.end, half))]


def _contains(loop: Loop, points_PC: FloatArray) -> NDArray[np.bool_]:
    """Which points lie inside the loop, (P,) bool: the even-odd rule along a ray to the right."""
    if isinstance(loop, Circle):
        offset_PC = points_PC - np.asarray(loop.center)
        within_P: NDArray[np.bool_] = np.hypot(offset_PC[:, 0], offset_PC[:, 1]) < loop.radius
        return within_P
    a_VC = _polygon(loop)
    b_VC = np.roll(a_VC, -1, axis=0)
    rise_V = b_VC[:, 1] - a_VC[:, 1]
    # A side that all but lies along the ray rises by a rounding: none of the probes is within that.
    level_V = np.abs(rise_V) <= POINT_TOLERANCE * np.ptp(a_VC[:, 1])
    slope_V = np.divide(b_VC[:, 0] - a_VC[:, 0], rise_V, out=np.zeros_like(rise_V), where=~level_V)
    inside_P = np.zeros(len(points_PC), dtype=np.bool_)
    step = max(1, _CHUNK // len(a_VC))
    for begin in range(0, len(points_PC), step):
        x_P1, y_P1 = points_PC[begin : begin + step, :1], points_PC[begin : begin + step, 1:]
        crossed_PV = (a_VC[:, 1] > y_P1) != (b_VC[:, 1] > y_P1)
        right_PV = x_P1 < a_VC[:, 0] + (y_P1 - a_VC[:, 1]) * slope_V
        inside_P[begin : begin + step] = (crossed_PV & right_PV).sum(axis=1) % 2 == 1
    return inside_P
