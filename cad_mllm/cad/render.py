"""Pictures of a mesh: white background, soft light on a neutral material, dark edges. CPU only, no OpenGL.

Each picture casts parallel rays (embree) on a grid finer than the picture, shades what they hit, draws a line
where neighbouring rays hit surfaces that meet in a sharp edge or lie behind one another, and averages down.

Shape suffixes: F faces (triangles), K corners of a face, R rays, H and W rows and columns of rays,
C coordinates or colour channels.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cad_mllm.cad.mesh import FloatArray, Mesh

VIEW_DIRECTIONS = tuple((azimuth, 30.0) for azimuth in (-55.0, 35.0, 125.0, 215.0)) + tuple(
    (azimuth, -30.0) for azimuth in (-35.0, 55.0, 145.0, 235.0)
)
"""Where the camera stands, (azimuth from +x towards +y, elevation from the xy plane towards +z) in degrees.

Views 0-3 look down from four sides, beginning at the front (-y) right; views 4-7 look up from below, turned
by 20 degrees against those above. In this order, always.
"""

HALF_WIDTH = 1.62
"""Half of what a picture shows: the box [-1, 1]^3 fits into it from every view."""
SUPERSAMPLING = 3
CREASE_DEGREES = 25.0
"""Faces that meet at a larger angle meet in an edge; at a smaller one they are facets of a smooth surface."""
DEPTH_STEP = 0.02
"""A jump in depth that is drawn as an edge."""

_BASE_COLOR = np.array([0.75, 0.79, 0.85])
_EDGE_COLOR = np.array([0.13, 0.15, 0.18])
_AMBIENT = 0.27
# In camera coordinates (right, up, towards the viewer), so that every view is lit alike.
_LIGHTS = ((np.array([-0.65, 0.60, 0.50]), 0.76), (np.array([0.60, -0.60, 0.50]), 0.14))
_CAMERA_DISTANCE = 8.0


def render_views(mesh: Mesh, *, size: int = 224, views: int = 8) -> list[Image.Image]:
    """Render the first `views` (1 to 8) of `VIEW_DIRECTIONS`, each `size` pixels square, RGB.

    All pictures show the same cube around [-1, 1]^3 at the same scale: normalise the mesh into it first.
    """
    assert 1 <= views <= len(VIEW_DIRECTIONS), views
    surface = _Surface.of(mesh)
    return [Image.fromarray(_render(surface, _camera(*where), size)) for where in VIEW_DIRECTIONS[:views]]


@dataclass(frozen=True)
class _Surface:
    """What the rays hit: the scene, and per triangle its smooth patch and the unit normals at its corners."""

    scene: Any
    vertices: FloatArray
    patch_F: NDArray[np.int64]
    normals_FKC: NDArray[np.float32]

    @staticmethod
    def of(mesh: Mesh) -> "_Surface":
        scene = EmbreeScene()
        TriangleMesh(scene, mesh.vertices[mesh.faces].astype(np.float32))
        patch_F = _smooth_patches(mesh)
        return _Surface(scene, mesh.vertices, patch_F, _corner_normals(mesh, patch_F))


def _smooth_patches(mesh: Mesh) -> NDArray[np.int64]:
    """Number the groups of faces that are connected without crossing a sharp edge, (F,)."""
    num_faces = len(mesh.faces)
    edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    owners = np.repeat(np.arange(num_faces), 3)
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    edges, owners = edges[order], owners[order]
    shared = np.flatnonzero((edges[1:] == edges[:-1]).all(axis=1))
    a, b = owners[shared], owners[shared + 1]
    cosines = np.einsum("fc,fc->f", mesh.face_normals[a], mesh.face_normals[b])
    smooth = cosines > math.cos(math.radians(CREASE_DEGREES))
    graph = coo_array((np.ones(int(smooth.sum())), (a[smooth], b[smooth])), shape=(num_faces, num_faces))
    _, patch_F = connected_components(graph, directed=False)
    return patch_F.astype(np.int64)


def _corner_normals(mesh: Mesh, patch_F: NDArray[np.int64]) -> NDArray[np.float32]:
    """Unit normals (F, K, C) averaged over the faces of the same smooth patch around each vertex.

    Weighted by area and by the angle at the corner: a large flat face keeps its normal beside a small fillet.
    """
    corners_FKC = mesh.vertices[mesh.faces]
    to_next = np.roll(corners_FKC, -1, axis=1) - corners_FKC
    to_last = np.roll(corners_FKC, 1, axis=1) - corners_FKC
    cosines = np.einsum("fkc,fkc->fk", to_next, to_last)
    sines = np.linalg.norm(np.cross(to_next, to_last), axis=2)
    weighted_FKC = np.arctan2(sines, cosines)[:, :, None] * mesh.face_cross[:, None, :]
    key = patch_F[:, None] * len(mesh.vertices) + mesh.faces
    _, place = np.unique(key.ravel(), return_inverse=True)
    sums = np.stack([np.bincount(place, weighted_FKC[:, :, c].ravel()) for c in range(3)], axis=1)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    unit = sums / np.where(lengths > 0, lengths, 1.0)
    return unit[place].reshape(len(mesh.faces), 3, 3).astype(np.float32)


def _camera(azimuth: float, elevation: float) -> FloatArray:
    """Rows: the camera's right, up and backward (towards the viewer) directions, (3, 3)."""
    a, e = math.radians(azimuth), math.radians(elevation)
    backward = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    return np.stack([right, np.cross(backward, right), backward])


def _render(surface: _Surface, camera: FloatArray, size: int) -> NDArray[np.uint8]:
    image = np.full((size, size, 3), 255, dtype=np.uint8)
    rows, columns = _covered(surface, camera, size)
    height, width = (rows.stop - rows.start) * SUPERSAMPLING, (columns.stop - columns.start) * SUPERSAMPLING
    if not height or not width:
        return image
    steps = ((np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING) * 2 - 1) * HALF_WIDTH
    steps_HS = steps.reshape(size, SUPERSAMPLING)
    right_HW, up_HW = np.meshgrid(steps_HS[columns].ravel(), -steps_HS[rows].ravel())
    offsets_RC = np.stack(
        [right_HW.ravel(), up_HW.ravel(), np.full(height * width, _CAMERA_DISTANCE)], axis=1
    )
    origins_RC = (offsets_RC @ camera).astype(np.float32)
    directions_RC = np.broadcast_to((-camera[2]).astype(np.float32), origins_RC.shape)
    hit = surface.scene.run(origins_RC, np.ascontiguousarray(directions_RC), output=True)

    face_R = hit["primID"]
    (seen,) = np.nonzero(face_R >= 0)
    colors_RC = np.ones((height * width, 3), dtype=np.float32)
    colors_RC[seen] = _shade(surface, camera, face_R[seen], hit["u"][seen], hit["v"][seen])
    patch_R = np.full(height * width, -1)
    patch_R[seen] = surface.patch_F[face_R[seen]]
    depth_HW = np.minimum(hit["tfar"], 2 * _CAMERA_DISTANCE).reshape(height, width)
    edge_HW = _edges(patch_R.reshape(height, width), depth_HW)
    colors_HWC = colors_RC.reshape(height, width, 3)
    colors_HWC[edge_HW] = _EDGE_COLOR
    blocks = colors_HWC.reshape(-1, SUPERSAMPLING, width // SUPERSAMPLING, SUPERSAMPLING, 3)
    image[rows, columns] = np.rint(blocks.mean(axis=(1, 3)) * 255)
    return image


def _covered(surface: _Surface, camera: FloatArray, size: int) -> tuple[slice, slice]:
    """Rows and columns of pixels that the surface and its edges can be on; all others are background."""

    def span(position_V: FloatArray) -> slice:
        pixels = (position_V / HALF_WIDTH + 1) / 2 * size
        low, high = math.floor(pixels.min()) - 1, math.ceil(pixels.max()) + 1
        start = min(max(low, 0), size)
        return slice(start, max(start, min(high, size)))

    return span(-surface.vertices @ camera[1]), span(surface.vertices @ camera[0])


def _shade(
    surface: _Surface,
    camera: FloatArray,
    face_R: NDArray[np.int32],
    u_R: NDArray[np.float32],
    v_R: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Colour (R, C) of the hits, from the normals interpolated between the corners of their triangles."""
    weights_RK = np.stack([1 - u_R - v_R, u_R, v_R], axis=1)
    normals_RC = np.einsum("rk,rkc->rc", weights_RK, surface.normals_FKC[face_R])
    normals_RC /= np.maximum(np.linalg.norm(normals_RC, axis=1, keepdims=True), 1e-9)
    light_R = np.full(len(face_R), _AMBIENT, dtype=np.float32)
    for direction, strength in _LIGHTS:
        world = (direction / np.linalg.norm(direction)) @ camera
        # Wrapped around the shape and squared: no kink where a round face turns away from the light.
        light_R += strength * ((1 + normals_RC @ world.astype(np.float32)) / 2) ** 2
    shaded: NDArray[np.float32] = np.clip(light_R[:, None] * _BASE_COLOR.astype(np.float32), 0, 1)
    return shaded


def _edges(patch_HW: NDArray[np.int64], depth_HW: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rays on a line: beside another smooth patch or the background, or where the depth bends by a step."""
    edge_HW = np.zeros(patch_HW.shape, dtype=bool)
    for patch, depth, edge in ((patch_HW, depth_HW, edge_HW), (patch_HW.T, depth_HW.T, edge_HW.T)):
        border = patch[1:] != patch[:-1]
        edge[1:] |= border
        edge[:-1] |= border
        bend = np.abs(depth[2:] - 2 * depth[1:-1] + depth[:-2]) > DEPTH_STEP
        edge[1:-1] |= bend & (patch[1:-1] >= 0)
    return edge_HW
