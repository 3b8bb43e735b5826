"""How close a mesh is to the true one, and how sound it is by itself.

Closeness (each mesh first moved and scaled by itself so that its box is centred and its longest side is 1, as
Fan et al. 2017 and most CAD papers do; place and size do not count):

- chamfer distance, F-score and normal consistency, between `SAMPLES` points drawn from each surface;
- volumetric intersection over union.

Soundness, by the definitions of CAD-MLLM (arXiv 2411.04954, supplement) as its official C++ code has them
(github.com/DavidXu-JJ/CAD-MLLM-metrics): segment error, dangling edge length, self-intersection ratio, flux
enclosure error. All four work on vertices that are shared by their neighbours: `weld` first.

Shape suffixes: V vertices, F faces (triangles), E half-edges, N points, C coordinates.
"""

from dataclasses import dataclass

import manifold3d
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from cad_mllm.cad.intersections import self_intersecting_faces
from cad_mllm.cad.mesh import Mesh
from cad_mllm.errors import CadError

SAMPLES = 8192
"""Points drawn from each surface."""
F_SCORE_DISTANCE = 0.05
"""Points that are this close count as found, in longest sides of the box."""


# --- closeness ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SurfaceDistance:
    """Between two surfaces in the unit box. P and T: the points of the prediction and of the truth."""

    chamfer_squared: float
    """mean over P of the squared distance to the nearest of T, plus the same from T to P.

    As DeepCAD, CAD-Recode and cadrille do; they report it times 1000.
    """
    chamfer: float
    """Mean of the two directed mean distances, not squared."""
    f_score: float
    """Harmonic mean of the shares of P and of T that have the other within `F_SCORE_DISTANCE`; 0 to 1."""
    normal_consistency: float
    """Mean of |n . n'| over each point and its nearest one, mean of both directions; 0 to 1."""


def unit_box(mesh: Mesh) -> Mesh:
    """Centre the mesh's box on the origin and give its longest side the length 1: into [-.5, .5]^3.

    Raises CadError for a mesh without size.
    """
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    size = float((high - low).max())
    if not (size > 0 and np.isfinite(size)):
        raise CadError("the mesh has no size: all its vertices are in one place, or too far apart")
    return Mesh((mesh.vertices - (low + high) / 2) / size, mesh.faces)


def surface_distance(predicted: Mesh, true: Mesh, *, seed: int, samples: int = SAMPLES) -> SurfaceDistance:
    """Compare two surfaces, both in the unit box (`unit_box`), by `samples` points drawn from each.

    The points of the two are independent draws: equal surfaces are apart by what `samples` points leave
    between them (8,192 points on a cube: squared distance about 5e-4), however they are triangulated.
    Raises CadError for a surface without area.
    """
    if not (predicted.area > 0 and true.area > 0):
        raise CadError("the mesh has no area to draw points from")
    (points_P, faces_P), (points_T, faces_T) = (
        predicted.sample_faces(samples, seed=2 * seed),
        true.sample_faces(samples, seed=2 * seed + 1),
    )
    normals_P, normals_T = predicted.face_normals[faces_P], true.face_normals[faces_T]
    to_true_P, nearest_P = cKDTree(points_T).query(points_P)
    to_predicted_T, nearest_T = cKDTree(points_P).query(points_T)
    precision = float(np.mean(to_true_P <= F_SCORE_DISTANCE))
    recall = float(np.mean(to_predicted_T <= F_SCORE_DISTANCE))
    agree_P = np.abs(np.einsum("nc,nc->n", normals_P, normals_T[nearest_P]))
    agree_T = np.abs(np.einsum("nc,nc->n", normals_T, normals_P[nearest_T]))
    return SurfaceDistance(
        chamfer_squared=float(np.mean(np.square(to_true_P)) + np.mean(np.square(to_predicted_T))),
        chamfer=float((np.mean(to_true_P) + np.mean(to_predicted_T)) / 2),
        f_score=2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0,
        normal_consistency=float((agree_P.mean() + agree_T.mean()) / 2),
    )


def volumetric_iou(predicted: Mesh, true: Mesh) -> float:
    """Volume of the intersection over that of the union, 0 to 1, exact for the meshes as given.

    Raises CadError for a mesh that encloses no volume: one with a border, or flat.
    """
    one, other = _enclosed(predicted, "the prediction"), _enclosed(true, "the true model")
    common = max((one ^ other).volume(), 0.0)
    return float(min(common / (one.volume() + other.volume() - common), 1.0))


def _enclosed(mesh: Mesh, whose: str) -> manifold3d.Manifold:
    """What the mesh encloses; parts that overlap count once, a mesh that is inside out is turned."""
    turned = mesh.faces if mesh.volume >= 0 else mesh.faces[:, ::-1]
    corners = np.ascontiguousarray(turned, dtype=np.uint64)
    body = manifold3d.Manifold(manifold3d.Mesh64(np.ascontiguousarray(mesh.vertices), corners))
    if body.status() != manifold3d.Error.NoError:
        raise CadError(f"{whose} encloses no volume: its surface is not closed")
    shells = body.decompose()
    if len(shells) > 1 and all(shell.volume() > 0 for shell in shells):  # else some are cavities of others
        body = manifold3d.Manifold.batch_boolean(shells, manifold3d.OpType.Add)
    if not body.volume() > 0:
        raise CadError(f"{whose} encloses no volume")
    return body


# --- soundness ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Soundness:
    """Of one mesh, by itself."""

    components: int
    dangling_edge_length: float
    self_intersection_ratio: float
    flux_enclosure_error: float


def soundness(mesh: Mesh) -> Soundness:
    """All figures that need no truth, of a mesh whose vertices are welded."""
    return Soundness(
        components=num_components(mesh),
        dangling_edge_length=dangling_edge_length(mesh),
        self_intersection_ratio=self_intersection_ratio(mesh),
        flux_enclosure_error=flux_enclosure_error(mesh),
    )


def weld(mesh: Mesh) -> Mesh:
    """Give vertices at exactly the same place one index, and drop those of no face.

    STL has no shared vertices, and PLY files are often written with split ones: the official code merges
    equal vertices of STL files, and strips unused ones of all. Nothing is merged within a distance.
    """
    used = np.unique(mesh.faces)
    vertices, places = np.unique(mesh.vertices[used] + 0.0, axis=0, return_inverse=True)  # -0.0 is 0.0
    index_V = np.zeros(len(mesh.vertices), dtype=np.int64)
    index_V[used] = places.ravel()
    return Mesh(vertices, index_V[mesh.faces])


def num_components(mesh: Mesh) -> int:
    """Number S of parts of the surface: faces belong together if they share a vertex."""
    starts_E, ends_E = mesh.faces.ravel(), mesh.faces[:, [1, 2, 0]].ravel()
    size = len(mesh.vertices)
    graph = coo_array((np.ones(len(starts_E), dtype=np.int8), (starts_E, ends_E)), shape=(size, size))
    _, label_V = connected_components(graph, directed=False)
    return len(np.unique(label_V[mesh.faces[:, 0]])) if len(mesh.faces) else 0


def segment_error(predicted: int, true: int) -> tuple[float, int]:
    """SegE from the numbers of parts S^ and S: (|S^ - S| / S as in the paper, |S^ - S| as in its code)."""
    assert true >= 1, true
    return abs(predicted - true) / true, abs(predicted - true)


def dangling_edge_length(mesh: Mesh) -> float:
    """DangEL: the length of all edges of exactly one face, over half the longest side of the mesh's box.

    0 for a closed surface; independent of the scale. The official code grows the box until it holds the
    origin: its figure is the same for every mesh whose box holds it, such as one that is centred.
    """
    edges = np.sort(np.stack([mesh.faces, mesh.faces[:, [1, 2, 0]]], axis=2).reshape(-1, 2), axis=1)
    unique, counts = np.unique(edges, axis=0, return_counts=True)
    single = mesh.vertices[unique[counts == 1]]
    if not len(single):
        return 0.0
    half = float((mesh.vertices.max(axis=0) - mesh.vertices.min(axis=0)).max()) / 2
    return float(np.linalg.norm(single[:, 0] - single[:, 1], axis=1).sum()) / half if half > 0 else 0.0


def self_intersection_ratio(mesh: Mesh) -> float:
    """SIR: the share of the faces that take part in any intersection, 0 to 1, of the `repaired` mesh.

    `cad_mllm.cad.intersections` says which contacts count.
    """
    whole = repaired(mesh)
    return float(self_intersecting_faces(whole).mean()) if len(whole.faces) else 0.0


def repaired(mesh: Mesh) -> Mesh:
    """Without faces of fewer than three vertices, and with faces of the same three vertices once.

    The official code does so when it reads a mesh (CGAL's `repair_polygon_soup`).
    """
    corners = np.sort(mesh.faces, axis=1)
    whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])
    _, first = np.unique(corners[whole], axis=0, return_index=True)
    return Mesh(mesh.vertices, mesh.faces[whole][np.sort(first)])


def flux_enclosure_error(mesh: Mesh) -> float:
    """FluxEE: |sum over the faces of area n . (1, 1, 1)|: the flux of a constant field, 0 if closed.

    In the unit of the mesh, squared: the official code does not normalise either.
    """
    return abs(float(mesh.face_cross.sum(axis=0).sum()) / 2)
