"""Triangle meshes, and a second way from a program to a mesh that needs no CAD kernel.

`mesh_by_manifold` builds the model from polygons with manifold3d: milliseconds, always watertight,
independent of OpenCASCADE, and therefore the check on `cad_mllm.cad.solid`, which nothing here imports.

Shape suffixes: V vertices, F faces (triangles), N points, C coordinates.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import manifold3d
import numpy as np
from numpy.typing import NDArray

from cad_mllm.cad.geometry import Box, arc_center, extent_range
from cad_mllm.cad.program import Arc, CadProgram, Circle, Extrude, Loop, Operation, Path, Plane, Profile
from cad_mllm.errors import CadError

FloatArray = NDArray[np.float64]

SEGMENTS_PER_TURN = 128
"""Straight segments that stand for a full circle: the area is short by 4e-4 of itself."""

SLIVER = 1e-2
"""A region of a self-crossing loop that is smaller than this share of the largest is rounding."""
SELF_CROSSING = "a sketch loop crosses itself: it divides the plane into several regions"
_ROUNDED_TO = 1e-8
"""manifold3d rounds the corners of a polygon to this."""

LARGEST = 1e9
"""Largest coordinate and length, in the program's unit."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles with shared vertices, wound counter-clockwise seen from outside.

    `vertices` is (V, 3) float64, `faces` (F, 3) int64.
    """

    vertices: FloatArray
    faces: NDArray[np.int64]

    @cached_property
    def box(self) -> Box:
        """Smallest and largest corner."""
        low, high = self.vertices.min(axis=0), self.vertices.max(axis=0)
        return (float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2]))

    @cached_property
    def face_cross(self) -> FloatArray:
        """(F, 3) outward face normals, as long as twice the face's area."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        return cross(b - a, c - a)

    @cached_property
    def face_normals(self) -> FloatArray:
        """(F, 3) outward unit normals; zero for a face without area."""
        lengths = np.linalg.norm(self.face_cross, axis=1, keepdims=True)
        return self.face_cross / np.where(lengths > 0, lengths, 1.0)

    @property
    def volume(self) -> float:
        """Signed volume by the divergence theorem: exact for a closed mesh."""
        corners = self.vertices[self.faces[:, 0]]
        return float(np.einsum("fc,fc->", corners, self.face_cross) / 6.0)

    @property
    def area(self) -> float:
        """Area of the surface."""
        return float(np.linalg.norm(self.face_cross, axis=1).sum() / 2)

    def sample_faces(self, n: int, seed: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """Draw `n` points uniformly over the surface: (N, 3) positions and the (N,) faces they lie on.

        Area-stratified: each point has its own n-th of the total area, so that the cover is even. The order
        is random, so that any prefix is a sample too. The same seed gives the same points.
        """
        rng = np.random.default_rng(seed)
        cumulative_F = np.cumsum(np.linalg.norm(self.face_cross, axis=1))
        strata_N = (np.arange(n) + rng.random(n)) / n * cumulative_F[-1]
        face_N = np.minimum(np.searchsorted(cumulative_F, strata_N, side="right"), len(self.faces) - 1)
        face_N = rng.permutation(face_N)
        root_N, along_N = np.sqrt(rng.random(n)), rng.random(n)
        weights = np.stack([1 - root_N, root_N * (1 - along_N), root_N * along_N], axis=1)
        points_NC: FloatArray = np.einsum("nk,nkc->nc", weights, self.vertices[self.faces[face_N]])
        return points_NC, face_N

    def sample(self, n: int, seed: int) -> NDArray[np.float32]:
        """Draw `n` points with their faces' unit normals: (N, 6) float32 xyz + normal, deterministic."""
        points_NC, face_N = self.sample_faces(n, seed)
        return np.concatenate([points_NC, self.face_normals[face_N]], axis=1).astype(np.float32)


def cross(a: FloatArray, b: FloatArray) -> FloatArray:
    """`np.cross` along the last axis, of three: a few times as fast for the small arrays here."""
    ax, ay, az = a[..., 0], a[..., 1], a[..., 2]
    bx, by, bz = b[..., 0], b[..., 1], b[..., 2]
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=-1)


def plane_frame(plane: Plane) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Origin and orthonormal x, y, normal, each (3,). Raises CadError if the axes span no frame."""
    origin, x, normal = (np.asarray(v, dtype=np.float64) for v in (plane.origin, plane.x_axis, plane.normal))
    y = cross(normal, x)
    x = cross(y, normal)  # x may be given a little off the plane
    lengths = [float(np.linalg.norm(v)) for v in (x, y, normal)]
    if not (np.isfinite(origin).all() and all(math.isfinite(length) and length > 1e-9 for length in lengths)):
        raise CadError(f"a sketch plane needs a finite origin and two independent axes, not {plane}")
    return origin, x / lengths[0], y / lengths[1], normal / lengths[2]


def loop_polygon(loop: Loop, segments_per_turn: int = SEGMENTS_PER_TURN) -> FloatArray:
    """Corners of the polygon that stands for the loop, (N, 2), without repeating the first one.

    Raises CadError for coordinates that are not numbers or beyond `LARGEST`: the kernels hang on them.
    """
    if isinstance(loop, Circle):
        angles = np.linspace(0.0, 2 * math.pi, segments_per_turn, endpoint=False)
        corners = np.asarray(loop.center) + loop.radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        corners = _path_polygon(loop, segments_per_turn)
    if not (np.abs(corners) <= LARGEST).all():
        raise CadError(f"a sketch has a coordinate that is not a number between -{LARGEST:g} and {LARGEST:g}")
    return corners


def _path_polygon(path: Path, segments_per_turn: int) -> FloatArray:
    corners: list[FloatArray] = []
    here = path.start
    for segment in path.segments:
        corners.append(np.asarray([here]))
        if isinstance(segment, Arc) and here != segment.end:
            if not 0 < abs(segment.sweep) < 2 * math.pi:
                raise CadError(
                    f"an arc must turn by more than 0 and less than 2 pi, not by {segment.sweep:g}"
                )
            center = np.asarray(arc_center(here, segment))
            # A lens between two flat arcs loses 1 / steps^2 of its area: short arcs need steps of their own.
            steps = math.ceil(max(abs(segment.sweep) / (2 * math.pi), 1 / 8) * segments_per_turn)
            turn = segment.sweep * np.arange(1, steps) / steps
            dx, dy = np.asarray(here) - center
            cos, sin = np.cos(turn), np.sin(turn)
            corners.append(center + np.stack([dx * cos - dy * sin, dx * sin + dy * cos], axis=1))
        here = segment.end
    return np.concatenate(corners) if corners else np.zeros((0, 2))


def _cross_section(profiles: tuple[Profile, ...], segments_per_turn: int) -> manifold3d.CrossSection:
    """Union of the profiles, each without its holes, in the sketch plane."""

    def inside(loop: Loop) -> manifold3d.CrossSection:
        return _inside(loop_polygon(loop, segments_per_turn))

    union = manifold3d.OpType.Add
    regions = [
        inside(profile.outer)
        - manifold3d.CrossSection.batch_boolean([inside(hole) for hole in profile.holes], union)
        if profile.holes
        else inside(profile.outer)
        for profile in profiles
    ]
    return manifold3d.CrossSection.batch_boolean(regions, union)


def _inside(corners_N2: FloatArray) -> manifold3d.CrossSection:
    """What a polygon encloses. CadError: it divides itself into regions worth the name.

    One that crosses itself encloses some of its area twice, or one part in the other direction; parts that
    only touch have outlines of their own.
    """
    section = manifold3d.CrossSection([corners_N2], manifold3d.FillRule.NonZero)
    outlines = [abs(_area(outline)) for outline in section.to_polygons()]
    *_, second, largest = [0.0, 0.0, *sorted(outlines)]
    wound_twice = abs(abs(_area(corners_N2)) - section.area())
    doubtful = max(second, wound_twice) - SLIVER * largest
    if doubtful > 0 and doubtful > _ROUNDED_TO * _perimeter(corners_N2):
        raise CadError(SELF_CROSSING)
    return section


def _perimeter(corners_N2: FloatArray) -> float:
    return float(np.linalg.norm(corners_N2 - np.roll(corners_N2, 1, axis=0), axis=1).sum())


def _area(corners_N2: FloatArray) -> float:
    """Of a polygon, positive if it runs counter-clockwise; parts count as often as they are wound about."""
    if len(corners_N2) == 0:
        return 0.0
    x, y = (corners_N2 - corners_N2[0]).T  # far from the origin the products would drown the area
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _extruded(extrude: Extrude, segments_per_turn: int) -> manifold3d.Manifold:
    low, high = extent_range(extrude.extent)
    origin, x, y, normal = plane_frame(extrude.plane)
    if max(-low, high, *np.abs(origin)) > LARGEST:
        raise CadError(f"an extrude reaches further than {LARGEST:g}")
    body = manifold3d.Manifold.extrude(_cross_section(extrude.profiles, segments_per_turn), high - low)
    return body.transform(np.stack([x, y, normal, origin + low * normal], axis=1))


def manifold_of(program: CadProgram, segments_per_turn: int = SEGMENTS_PER_TURN) -> manifold3d.Manifold:
    """Build the program from polygons. Raises CadError if nothing with a volume is left."""
    standing = manifold3d.Manifold()
    for extrude in program.extrudes:
        body = _extruded(extrude, segments_per_turn)
        match extrude.operation:
            case Operation.NEW | Operation.JOIN:
                standing = standing + body
            case Operation.CUT:
                standing = standing - body
            case Operation.INTERSECT:
                standing = standing ^ body
    if standing.status() != manifold3d.Error.NoError or not standing.volume() > 0:
        raise CadError(
            "the program leaves no solid: its extrudes enclose no volume, or all of it is cut away"
        )
    return standing


def volume_by_manifold(program: CadProgram, segments_per_turn: int = 512) -> float:
    """Volume of the polygon model (circles fall short by 2.5e-5). Raises CadError if there is none."""
    return float(manifold_of(program, segments_per_turn).volume())


def mesh_by_manifold(program: CadProgram, segments_per_turn: int = SEGMENTS_PER_TURN) -> Mesh:
    """Watertight mesh of the program's polygon model. Raises CadError if nothing with a volume is left."""
    mesh = manifold_of(program, segments_per_turn).to_mesh64()
    return Mesh(
        vertices=np.asarray(mesh.vert_properties, dtype=np.float64)[:, :3],
        faces=np.asarray(mesh.tri_verts, dtype=np.int64),
    )
