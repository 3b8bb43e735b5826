"""Which faces of a mesh cut through, touch or cover others: exact, by a tree of boxes and exact predicates.

Two faces intersect if their triangles have a point in common that is no vertex and on no edge that both have.
So neighbours do not intersect, unless they are folded onto one another; a corner that pokes into, or only
touches, the middle of another face counts. What "both have" means is settled as in CGAL's
`Polygon_mesh_processing::self_intersections`, which the official metrics use: where the surface is not a
manifold (three or more faces at an edge, or two solids that meet in one vertex), its sheets are taken apart
first, and then touch. A face without area intersects itself, and is not compared with others.

Shape suffixes: F faces, E edges (half-edges), P pairs of faces, S segments, N any, C coordinates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cad_mllm.cad.mesh import Mesh
from cad_mllm.cad.predicates import FloatArray, SignArray, collinear, orient2d, orient3d, prepared

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_MAX_FRONTIER = 1 << 19
"""Pairs that are looked at together: bounds the memory, whatever the mesh."""

_NEXT = [1, 2, 0]


def self_intersecting_faces(mesh: Mesh) -> BoolArray:
    """Whether each face takes part in an intersection, (F,). Vertices must be finite.

    Faces are neighbours by the indices of their vertices: merge equal vertices first.
    """
    faces = mesh.faces
    if not len(faces):
        return np.zeros(0, dtype=bool)
    triangles = prepared(mesh.vertices)[faces]  # (F, 3 corners, C)
    hit_F = collinear(*(triangles[:, corner] for corner in range(3)))
    (solid_F,) = np.nonzero(~hit_F)
    if len(solid_F):
        faces_of = _Faces(triangles[solid_F], _sheet_vertices(faces)[solid_F])  # flat faces connect, too
        for first_P, second_P in _overlapping_boxes(faces_of.triangles):
            meets_P = faces_of.intersect(first_P, second_P)
            hit_F[solid_F[first_P[meets_P]]] = True
            hit_F[solid_F[second_P[meets_P]]] = True
    return hit_F


def _sheet_vertices(faces: IntArray) -> IntArray:
    """Number the vertices per sheet, (F, 3): across edges of two faces, faces stay together."""
    num_corners = 3 * len(faces)
    corner_FK = np.arange(num_corners).reshape(-1, 3)
    starts_E, ends_E = faces.ravel(), faces[:, _NEXT].ravel()
    turned_E = starts_E > ends_E
    low_E, high_E = np.where(turned_E, ends_E, starts_E), np.where(turned_E, starts_E, ends_E)
    here_E, there_E = corner_FK.ravel(), corner_FK[:, _NEXT].ravel()
    at_low_E, at_high_E = np.where(turned_E, there_E, here_E), np.where(turned_E, here_E, there_E)
    order = np.lexsort((high_E, low_E))
    edge_E = np.stack([low_E[order], high_E[order]])
    new_E = np.r_[True, (edge_E[:, 1:] != edge_E[:, :-1]).any(axis=0)]
    begins = np.flatnonzero(new_E)
    pairs = begins[np.diff(np.r_[begins, len(order)]) == 2]
    one, other = order[pairs], order[pairs + 1]
    rows = np.concatenate([at_low_E[one], at_high_E[one]])
    columns = np.concatenate([at_low_E[other], at_high_E[other]])
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(num_corners, num_corners))
    _, labels = connected_components(graph, directed=False)
    return labels.reshape(-1, 3).astype(np.int64)


# --- broad phase -------------------------------------------------------------------------------------------


def _overlapping_boxes(triangles: FloatArray) -> Iterator[tuple[IntArray, IntArray]]:
    """All pairs of faces whose boxes meet, each pair once, in chunks of (P,) and (P,) indices."""
    low, high, order = _box_tree(triangles)
    root = np.zeros(1, dtype=np.int64)
    waiting = [(0, root, root)]
    while waiting:
        level, first, second = waiting.pop()
        if level + 1 == len(low):
            apart = first != second
            yield order[first[apart]], order[second[apart]]
            continue
        # Children of node i are 2i and 2i + 1. A node meets itself: its children in three pairs, not four.
        same = first == second
        one, other = first[~same], second[~same]
        own = first[same]
        children = (
            np.concatenate([2 * own, 2 * own, 2 * own + 1, 2 * one, 2 * one, 2 * one + 1, 2 * one + 1]),
            np.concatenate(
                [2 * own, 2 * own + 1, 2 * own + 1, 2 * other, 2 * other + 1, 2 * other, 2 * other + 1]
            ),
        )
        level += 1
        a, b = children
        meet = ((low[level][a] <= high[level][b]) & (low[level][b] <= high[level][a])).all(axis=1)
        a, b = a[meet], b[meet]
        for start in range(0, len(a), _MAX_FRONTIER):
            waiting.append((level, a[start : start + _MAX_FRONTIER], b[start : start + _MAX_FRONTIER]))


def _box_tree(triangles: FloatArray) -> tuple[list[FloatArray], list[FloatArray], IntArray]:
    """A balanced binary tree: per level the corners of 2^level boxes (.., 3), and the face of each leaf.

    Each node is halved across its longest side. The places that are left over hold boxes that nothing meets.
    """
    num_faces = len(triangles)
    depth = max(num_faces - 1, 0).bit_length()
    size = 1 << depth
    low = np.full((size, 3), np.inf)
    high = np.full((size, 3), -np.inf)
    low[:num_faces], high[:num_faces] = triangles.min(axis=1), triangles.max(axis=1)
    center = np.full((size, 3), np.inf)
    center[:num_faces] = (low[:num_faces] + high[:num_faces]) / 2
    order = np.arange(size)
    for level in range(depth):
        blocks = order.reshape(1 << level, -1)
        in_blocks = center[blocks]  # (nodes, faces, 3)
        lowest = in_blocks.min(axis=1)
        highest = np.where(np.isfinite(in_blocks), in_blocks, -np.inf).max(axis=1)
        with np.errstate(invalid="ignore"):  # empty nodes
            axis = np.nan_to_num(highest - lowest, nan=0.0, neginf=0.0).argmax(axis=1)
        keys = np.take_along_axis(in_blocks, axis[:, None, None], axis=2)[:, :, 0]
        order = np.take_along_axis(blocks, np.argsort(keys, axis=1, kind="stable"), axis=1).ravel()
    lows, highs = [low[order]], [high[order]]
    for _ in range(depth):
        lows.append(lows[-1].reshape(-1, 2, 3).min(axis=1))
        highs.append(highs[-1].reshape(-1, 2, 3).max(axis=1))
    return lows[::-1], highs[::-1], order


# --- narrow phase ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Faces:
    """Triangles (F, 3, C) with area, and the vertex of each corner (F, 3)."""

    triangles: FloatArray
    vertex_FK: IntArray

    def intersect(self, first_P: IntArray, second_P: IntArray) -> BoolArray:
        """Whether the faces of each pair intersect, (P,)."""
        meets_P = np.zeros(len(first_P), dtype=bool)
        shared_PKK = self.vertex_FK[first_P][:, :, None] == self.vertex_FK[second_P][:, None, :]
        number_P = shared_PKK.sum(axis=(1, 2))
        for number, test in ((0, _strangers), (1, _meeting_in_a_vertex), (2, _meeting_in_an_edge)):
            (chosen,) = np.nonzero(number_P == number)
            if len(chosen):
                pair = self.triangles[first_P[chosen]], self.triangles[second_P[chosen]]
                meets_P[chosen] = test(*pair, shared_PKK[chosen])
        meets_P[number_P == 3] = True
        return meets_P


def _strangers(f: FloatArray, g: FloatArray, _: BoolArray) -> BoolArray:
    """Triangles (P, 3, C) without a common vertex: some edge of one must meet the other."""
    meets_P = np.zeros(len(f), dtype=bool)
    alive = np.arange(len(f))
    sides: list[SignArray] = []
    for plane, corners in ((f, g), (g, f)):
        side = np.stack([_side(plane[alive], corners[alive, k]) for k in range(3)], axis=1)
        keep = ~((side > 0).all(axis=1) | (side < 0).all(axis=1))
        alive = alive[keep]
        sides = [earlier[keep] for earlier in sides] + [side[keep]]
    if not len(alive):
        return meets_P
    side_of_g, side_of_f = sides
    tests = [(f, g, side_of_f, k) for k in range(3)] + [(g, f, side_of_g, k) for k in range(3)]
    left = np.arange(len(alive))
    for edges, triangle, side, k in tests:
        chosen, after = alive[left], _NEXT[k]
        met = _segment_meets(
            edges[chosen, k], edges[chosen, after], triangle[chosen], side[left, k], side[left, after]
        )
        meets_P[chosen[met]] = True
        left = left[~met]
        if not len(left):
            break
    return meets_P


def _meeting_in_a_vertex(f: FloatArray, g: FloatArray, shared_PKK: BoolArray) -> BoolArray:
    """Triangles with one common vertex: the opposite edge of one must meet the other.

    What two triangles have in common is convex: if it is more than the vertex, it runs from there until it
    leaves one of them, through the opposite edge.
    """
    rows = np.arange(len(f))
    at_f, at_g = shared_PKK.any(axis=2).argmax(axis=1), shared_PKK.any(axis=1).argmax(axis=1)

    def opposite(triangle: FloatArray, at: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
        return triangle[rows, (at + 1) % 3], triangle[rows, (at + 2) % 3]

    meets_P = np.zeros(len(f), dtype=bool)
    for edge_owner, at, triangle in ((f, at_f, g), (g, at_g, f)):
        p, q = opposite(edge_owner, at)
        side_p, side_q = _side(triangle, p), _side(triangle, q)
        meets_P |= _segment_meets(p, q, triangle, side_p, side_q)
    return meets_P


def _meeting_in_an_edge(f: FloatArray, g: FloatArray, shared_PKK: BoolArray) -> BoolArray:
    """Triangles with a common edge: they must lie in one plane and on one side of it."""
    rows = np.arange(len(f))
    at_f, at_g = (~shared_PKK.any(axis=2)).argmax(axis=1), (~shared_PKK.any(axis=1)).argmax(axis=1)
    tip_f, tip_g = f[rows, at_f], g[rows, at_g]
    u, v = f[rows, (at_f + 1) % 3], f[rows, (at_f + 2) % 3]
    meets_P: BoolArray = _side(f, tip_g) == 0
    (flat,) = np.nonzero(meets_P)
    if len(flat):
        axes, turn = _projection(np.stack([u[flat], v[flat], tip_f[flat]], axis=1))
        projected = (np.take_along_axis(points[flat], axes, axis=1) for points in (u, v, tip_g))
        meets_P[flat] = orient2d(*projected) == turn
    return meets_P


def _side(triangle: FloatArray, point: FloatArray) -> SignArray:
    return orient3d(triangle[:, 0], triangle[:, 1], triangle[:, 2], point)


def _segment_meets(
    p: FloatArray, q: FloatArray, triangle: FloatArray, side_p: SignArray, side_q: SignArray
) -> BoolArray:
    """Whether the segments p q (S, C) have a point with the triangles (S, 3, C) in common, borders included.

    `side_p` and `side_q` say where the ends lie in regard to the planes of the triangles.
    """
    meets_S = np.zeros(len(p), dtype=bool)
    flat_S = (side_p == 0) & (side_q == 0)
    (through,) = np.nonzero((side_p * side_q <= 0) & ~flat_S)
    if len(through):
        a, b, c = (triangle[through, k] for k in range(3))
        from_p, to_q = p[through], q[through]
        turns = np.stack([orient3d(from_p, to_q, *edge) for edge in ((a, b), (b, c), (c, a))])
        meets_S[through] = (turns >= 0).all(axis=0) | (turns <= 0).all(axis=0)
    (flat,) = np.nonzero(flat_S)
    if len(flat):
        meets_S[flat] = _segment_meets_in_plane(p[flat], q[flat], triangle[flat])
    return meets_S


def _segment_meets_in_plane(p: FloatArray, q: FloatArray, triangle: FloatArray) -> BoolArray:
    """The same for segments in the planes of their triangles.

    Convex figures are apart exactly if a line along a side of one of them separates them.
    """
    axes, turn = _projection(triangle)
    p2, q2 = (np.take_along_axis(point, axes, axis=1) for point in (p, q))
    corners = [np.take_along_axis(triangle[:, k], axes, axis=1) for k in range(3)]
    apart = np.zeros(len(p), dtype=bool)
    for a, b in zip(corners, [corners[k] for k in _NEXT], strict=True):
        apart |= (orient2d(a, b, p2) == -turn) & (orient2d(a, b, q2) == -turn)
    around = np.stack([orient2d(p2, q2, corner) for corner in corners])
    meets_S: BoolArray = ~(apart | (around > 0).all(axis=0) | (around < 0).all(axis=0))
    return meets_S


def _projection(triangle: FloatArray) -> tuple[IntArray, SignArray]:
    """The two axes (N, 2) that keep most of each triangle's area, and which way it turns there, (N,)."""
    normal = np.abs(np.cross(triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0]))
    ranked = np.argsort(-normal, axis=1)
    axes = np.zeros((len(triangle), 2), dtype=np.int64)
    turn = np.zeros(len(triangle), dtype=np.int8)
    for choice in range(3):  # the first one nearly always: but the areas above are rounded
        (left,) = np.nonzero(turn == 0)
        if not len(left):
            break
        dropped = ranked[left, choice]
        axes[left] = np.stack([(dropped + 1) % 3, (dropped + 2) % 3], axis=1)
        corners = (np.take_along_axis(triangle[left, k], axes[left], axis=1) for k in range(3))
        turn[left] = orient2d(*corners)
    assert turn.all(), "a triangle with area has one on some plane"
    return axes, turn
