"""Pictures of a mesh: white background, soft light on a neutral material, dark edges. CPU only, no OpenGL.

Each picture casts parallel rays (embree) on a grid finer than the picture, shades what they hit, draws a line
where neighbouring rays hit surfaces that meet in a sharp edge or lie behind one another, and averages down.

Shape suffixes: F faces (triangles), K corners of a face, R rays, H and W rows and columns of rays,
C coordinates or colour channels.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore import EmbreeDevice
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cad_mllm.cad.mesh import FloatArray, Mesh, cross

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

_BASE_COLOR = np.array([0.75, 0.79, 0.85], dtype=np.float32)
_EDGE_COLOR = np.array([0.13, 0.15, 0.18], dtype=np.float32)
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
    patch_F: NDArray[np.int32]
    """With one more place, -1: the patch of face -1, which is none."""
    normals_FN: NDArray[np.float32]
    """The nine numbers of the three normals of each triangle."""

    @staticmethod
    def of(mesh: Mesh) -> "_Surface":
        scene = EmbreeScene(_device())
        TriangleMesh(scene, mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))
        patch_F = _smooth_patches(mesh)
        normals_FN = _corner_normals(mesh, patch_F)
        return _Surface(scene, mesh.vertices, np.append(patch_F, np.int32(-1)), normals_FN)


@cache
def _device() -> EmbreeDevice:
    """What all scenes of this process share."""
    return EmbreeDevice()


def _smooth_patches(mesh: Mesh) -> NDArray[np.int32]:
    """Number the groups of faces that are connected without crossing a sharp edge, (F,)."""
    num_faces = len(mesh.faces)
    starts, ends = mesh.faces.ravel(), mesh.faces[:, [1, 2, 0]].ravel()
    # One number per edge, whichever way it is run through: sorted ten times as fast as pairs.
    edges = np.minimum(starts, ends) * len(mesh.vertices) + np.maximum(starts, ends)
    order = np.argsort(edges, kind="stable")
    edges, owners = edges[order], order // 3
    shared = np.flatnonzero(edges[1:] == edges[:-1])
    a, b = owners[shared], owners[shared + 1]
    cosines = np.einsum("fc,fc->f", mesh.face_normals[a], mesh.face_normals[b])
    smooth = cosines > math.cos(math.radians(CREASE_DEGREES))
    graph = coo_array((np.ones(int(smooth.sum())), (a[smooth], b[smooth])), shape=(num_faces, num_faces))
    _, patch_F = connected_components(graph, directed=False)
    return patch_F.astype(np.int32)


def _corner_normals(mesh: Mesh, patch_F: NDArray[np.int32]) -> NDArray[np.float32]:
    """Unit normals at the corners (F, 3 * 3), averaged over the faces of the same smooth patch around each.

    Weighted by area and by the angle at the corner: a large flat face keeps its normal beside a small fillet.
    """
    corners_FKC = mesh.vertices[mesh.faces]
    to_next = corners_FKC[:, [1, 2, 0]] - corners_FKC
    to_last = -to_next[:, [2, 0, 1]]
    cosines = np.einsum("fkc,fkc->fk", to_next, to_last)
    sines = np.linalg.norm(cross(to_next, to_last), axis=2)
    weights_FK = np.arctan2(sines, cosines)
    key = patch_F[:, None].astype(np.int64) * len(mesh.vertices) + mesh.faces
    _, place = np.unique(key.ravel(), return_inverse=True)
    sums = np.stack(
        [np.bincount(place, (weights_FK * mesh.face_cross[:, c, None]).ravel()) for c in range(3)], axis=1
    )
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    unit = (sums / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return unit[place].reshape(len(mesh.faces), 9)


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
    along_WC = steps_HS[columns].reshape(-1, 1) * camera[0]
    down_HC = -steps_HS[rows].reshape(-1, 1) * camera[1] + _CAMERA_DISTANCE * camera[2]
    origins_HWC = np.empty((height, width, 3), dtype=np.float32)
    for axis in range(3):
        np.add(along_WC[:, axis], down_HC[:, axis, None], out=origins_HWC[:, :, axis], casting="same_kind")
    direction_1C = (-camera[2:]).astype(np.float32)  # one for all rays
    hit = surface.scene.run(origins_HWC.reshape(-1, 3), direction_1C, output=True)

    face_R = hit["primID"]
    seen = np.flatnonzero(face_R >= 0)
    light_R = np.full(height * width, np.inf, dtype=np.float32)  # the background is white
    light_R[seen] = _light(surface, camera, face_R[seen], hit["u"][seen], hit["v"][seen])
    depth_HW = np.minimum(hit["tfar"], 2 * _CAMERA_DISTANCE).reshape(height, width)
    edge_HW = _edges(surface.patch_F[face_R].reshape(height, width), depth_HW)
    light_HW = light_R.reshape(height, width)
    for channel in range(3):
        shade_HW = np.minimum(light_HW * _BASE_COLOR[channel], np.float32(1))
        np.copyto(shade_HW, _EDGE_COLOR[channel], where=edge_HW)
        image[rows, columns, channel] = np.rint(_averaged(shade_HW) * np.float32(255))
    return image


def _averaged(fine_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of each block of SUPERSAMPLING x SUPERSAMPLING rays."""
    # By whole arrays: numpy's own reduction over two axes of three elements each takes four times as long.
    height, width = fine_HW.shape
    sum_HW = np.zeros((height // SUPERSAMPLING, width // SUPERSAMPLING), dtype=np.float32)
    for row, column in itertools.product(range(SUPERSAMPLING), repeat=2):
        sum_HW += fine_HW[row::SUPERSAMPLING, column::SUPERSAMPLING]
    sum_HW /= SUPERSAMPLING**2
    return sum_HW


def _covered(surface: _Surface, camera: FloatArray, size: int) -> tuple[slice, slice]:
    """Rows and columns of pixels that the surface and its edges can be on; all others are background."""

    def span(position_V: FloatArray) -> slice:
        pixels = (position_V / HALF_WIDTH + 1) / 2 * size
        low, high = math.floor(pixels.min()) - 1, math.ceil(pixels.max()) + 1
        start = min(max(low, 0), size)
        return slice(start, max(start, min(high, size)))

    return span(-surface.vertices @ camera[1]), span(surface.vertices @ camera[0])


def _light(
    surface: _Surface,
    camera: FloatArray,
    face_R: NDArray[np.int32],
    u_R: NDArray[np.float32],
    v_R: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Light (R,) on the hits, from the normals interpolated between the corners of their triangles."""
    corners_NR = surface.normals_FN.take(face_R, axis=0).T
    # Number by number, not ray by ray: arithmetic on rows of three takes numpy several times as long.
    weights_KR = (1 - u_R - v_R, u_R, v_R)
    components = [_weighted(corners_NR[axis::3], weights_KR) for axis in range(3)]
    x_R, y_R, z_R = components
    lengths_R = np.maximum(np.sqrt(x_R * x_R + y_R * y_R + z_R * z_R), np.float32(1e-9))
    normals_RC = np.empty((len(face_R), 3), dtype=np.float32)
    for axis, component_R in enumerate(components):
        np.divide(component_R, lengths_R, out=normals_RC[:, axis])
    light_R = np.full(len(face_R), _AMBIENT, dtype=np.float32)
    for direction, strength in _LIGHTS:
        world = (direction / np.linalg.norm(direction)) @ camera
        # Wrapped around the shape and squared: no kink where a round face turns away from the light.
        light_R += strength * ((1 + normals_RC @ world.astype(np.float32)) / 2) ** 2
    return light_R


def _weighted(values: NDArray[np.float32], weights: tuple[NDArray[np.float32], ...]) -> NDArray[np.float32]:
    """The sum of values times weights."""
    total: NDArray[np.float32] = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += value * weight
    return total


def _edges(patch_HW: NDArray[np.int32], depth_HW: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rays on a line: beside another smooth patch or the background, or where the depth bends by a step."""
    edge_HW = np.zeros(patch_HW.shape, dtype=bool)
    for patch, depth, edge in ((patch_HW, depth_HW, edge_HW), (patch_HW.T, depth_HW.T, edge_HW.T)):
        border = patch[1:] != patch[:-1]
        edge[1:] |= border
        edge[:-1] |= border
        bend = np.abs(depth[2:] - 2 * depth[1:-1] + depth[:-2]) > DEPTH_STEP
        edge[1:-1] |= bend & (patch[1:-1] >= 0)
    return edge_HW
