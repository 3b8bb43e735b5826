"""Self-intersections are exact: against fractions, on inputs where rounding would decide otherwise."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import trimesh

from cad_mllm.cad.intersections import self_intersecting_faces
from cad_mllm.cad.mesh import Mesh
from cad_mllm.cad.metrics import repaired, weld
from cad_mllm.cad.predicates import orient2d, orient3d, prepared
from tests.cad.meshes import cube, joined, moved, of_trimesh, rotation, shuffled

Point = tuple[Fraction, ...]
ZERO = (0, 0, 0)


# --- the reference: clip one triangle by the other, in fractions --------------------------------------------


def minus(a: Point, b: Point) -> Point:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def cross(a: Point, b: Point) -> Point:
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def dot(a: Point, b: Point) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def clipped(polygon: list[Point], normal: Point, least: Fraction) -> list[Point]:
    """What of a convex polygon, segment or point has `dot(normal, p) >= least`."""
    kept: list[Point] = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        here, there = dot(normal, p) - least, dot(normal, q) - least
        if here >= 0:
            kept.append(p)
        if here * there < 0:
            share = here / (here - there)
            kept.append(tuple(a + share * (b - a) for a, b in zip(p, q, strict=True)))
    return list(dict.fromkeys(kept))


def common(f: list[Point], g: list[Point]) -> list[Point]:
    normal = cross(minus(g[1], g[0]), minus(g[2], g[0]))
    polygon = clipped(f, normal, dot(normal, g[0]))
    polygon = clipped(polygon, minus(ZERO, normal), -dot(normal, g[0]))
    for corner, after in zip(g, g[1:] + g[:1], strict=True):
        inward = cross(normal, minus(after, corner))
        polygon = clipped(polygon, inward, dot(inward, corner))
    return polygon


def reference(mesh: Mesh) -> list[bool]:
    """For meshes in which every vertex is on one sheet."""
    corners: list[list[Point]] = [
        [tuple(map(Fraction, p)) for p in t] for t in mesh.vertices[mesh.faces].tolist()
    ]
    faces = [set(face) for face in mesh.faces.tolist()]
    flat = [cross(minus(t[1], t[0]), minus(t[2], t[0])) == ZERO for t in corners]
    hit = list(flat)
    for i, j in itertools.combinations(range(len(faces)), 2):
        if flat[i] or flat[j]:
            continue
        shared: list[Point] = [tuple(map(Fraction, mesh.vertices[v].tolist())) for v in faces[i] & faces[j]]
        points = common(corners[i], corners[j])
        if len(shared) == 2:
            along = minus(shared[1], shared[0])
            extra = any(cross(minus(p, shared[0]), along) != ZERO for p in points)
        else:
            extra = any(p not in shared for p in points)
        if extra:
            hit[i] = hit[j] = True
    return hit


def test_random_pairs_on_a_small_grid_agree_with_fractions() -> None:
    """On so small a grid most pairs touch, lie in one plane, or are flat."""
    rng = random.Random(1)
    outcomes = []
    for _ in range(1500):
        points = [tuple(rng.randint(0, 3) for _ in range(3)) for _ in range(6)]
        if len(set(points)) < 6:
            continue
        # With two faces alone a single common vertex would be on two sheets.
        second = rng.choice([[3, 4, 5], [1, 0, 5]])
        mesh = Mesh(np.array(points, dtype=np.float64), np.array([[0, 1, 2], second]))
        expected = reference(mesh)
        assert self_intersecting_faces(mesh).tolist() == expected, (points, second)
        outcomes.append(any(expected))
    assert 200 < sum(outcomes) < len(outcomes) - 200


@pytest.mark.parametrize("seed", range(4))
def test_crumpled_surfaces_agree_with_fractions(seed: int) -> None:
    """A closed surface with its vertices thrown onto a coarse grid: neighbours fold and poke through."""
    sphere = of_trimesh(trimesh.creation.icosphere(1))
    rng = np.random.default_rng(seed)
    jitter = rng.normal(scale=0.35, size=sphere.vertices.shape)
    grid = np.round((sphere.vertices + jitter) * 4)
    vertices = grid + np.arange(len(grid))[:, None] * 2.0**-40 * (rng.random((len(grid), 1)) < 0.5)
    mesh = Mesh(vertices, sphere.faces)
    expected = reference(mesh)
    assert self_intersecting_faces(mesh).tolist() == expected
    assert sum(expected) > 0


def crumpled(seed: int) -> Mesh:
    """A sphere of 320 faces whose vertices fall onto a coarse grid, and together."""
    rng = np.random.default_rng(seed)
    sphere = of_trimesh(trimesh.creation.icosphere(2))
    jitter = rng.normal(scale=0.1 + 0.05 * (seed % 12), size=sphere.vertices.shape)
    return weld(Mesh(np.round((sphere.vertices + jitter) * (3 + seed % 7)), sphere.faces))


@pytest.mark.parametrize(
    ("seed", "intersecting", "faces"),
    [
        (0, 126, 243),
        (1, 105, 289),
        (12, 44, 308),
        (24, 64, 308),
        (26, 165, 316),
        (36, 5, 282),
        (37, 122, 295),
    ],
)
def test_counts_are_those_of_cgal(seed: int, intersecting: int, faces: int) -> None:
    """What CGAL 6.0.1 counts in these meshes, read as the official code does: folded, flat, no manifolds."""
    mesh = repaired(crumpled(seed))
    assert (int(self_intersecting_faces(mesh).sum()), len(mesh.faces)) == (intersecting, faces)


# --- contacts that count, and those that do not -------------------------------------------------------------

TRIANGLE = [(0.0, 0.0, 0.0), (4.0, 0.0, 0.0), (0.0, 4.0, 0.0)]


@pytest.mark.parametrize(
    ("other", "meets"),
    [
        ([(1, 1, -1), (1, 1, 1), (5, 5, 1)], True),  # through the middle
        ([(1, 1, 0), (1, 1, 1), (5, 5, 1)], True),  # a corner touches the middle
        ([(2, 2, 0), (2, 2, 1), (5, 5, 1)], True),  # a corner touches a border
        ([(1, 0, 0), (2, 0, 0), (1, -1, 1)], True),  # borders lie on one another in part
        ([(1, 1, 0), (2, 1, 0), (1, 2, 0)], True),  # covered, in one plane
        ([(0, 0, 1), (4, 0, 1), (0, 4, 1)], False),  # parallel
        ([(3, 3, 0), (4, 3, 0), (3, 4, 0)], False),  # beside, in one plane
        ([(3, 3, -1), (3, 3, 1), (5, 5, 1)], False),  # passes the border
    ],
)
def test_two_faces_that_share_no_vertex(other: list[tuple[int, int, int]], meets: bool) -> None:
    mesh = Mesh(np.array([*TRIANGLE, *other], dtype=np.float64), np.arange(6).reshape(2, 3))
    for view in (mesh, shuffled(mesh), moved(mesh, np.eye(3)[[1, 2, 0]] * 2.0**-30, np.zeros(3))):
        assert self_intersecting_faces(view).tolist() == [meets, meets]


@pytest.mark.parametrize(
    ("tip", "meets"),
    [((2, -3, 0), False), ((2, 3, 1), False), ((1, 1, 0), True), ((0, 4, 0), True), ((4, 4, 0), True)],
)
def test_two_faces_with_a_common_edge_meet_only_where_one_is_folded_onto_the_other(
    tip: tuple[int, int, int], meets: bool
) -> None:
    points = np.array([*TRIANGLE, tip], dtype=np.float64)
    mesh = Mesh(points, np.array([(0, 1, 2), (1, 0, 3)]))
    assert self_intersecting_faces(mesh).tolist() == [meets, meets]


def test_a_face_without_area_counts_alone() -> None:
    mesh = cube()
    faces = np.concatenate([mesh.faces, [(0, 7, 8), (3, 3, 5)]])
    with_flat = Mesh(np.concatenate([mesh.vertices, [(0.5, 0.5, 0.5)]]), faces)
    assert self_intersecting_faces(with_flat).tolist() == [False] * 12 + [True, True]


def test_a_face_without_area_still_holds_a_sheet_together() -> None:
    """The first and the last face touch in vertex 0, which both have by way of the flat face between them."""
    points = np.array([(0, 0, 0), (1, 1, 0), (1, 0, 0), (-1, 0, 0), (0, 0, -1)], dtype=np.float64)
    mesh = Mesh(points, np.array([(0, 1, 2), (0, 2, 3), (0, 3, 4)]))
    assert self_intersecting_faces(mesh).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("common", "shift"), [(2, (1.0, 1.0, 0.0)), (1, (1.0, 1.0, 1.0))], ids=["an edge", "a vertex"]
)
def test_solids_that_touch_where_the_surface_is_no_manifold_intersect_there(
    common: int, shift: tuple[float, float, float]
) -> None:
    """As CGAL has it: it takes the sheets apart. The faces at the contact count, no other."""
    both = joined(cube(), cube(shift))
    places, index = np.unique(both.vertices, axis=0, return_inverse=True)
    assert len(places) == 16 - common
    merged = Mesh(places, index.ravel()[both.faces])
    hit = self_intersecting_faces(merged)
    at_contact = [
        bool({tuple(p) for p in merged.vertices[f]} & shared(cube(), cube(shift))) for f in merged.faces
    ]
    assert hit.tolist() == at_contact
    assert hit.tolist() == self_intersecting_faces(both).tolist()


def shared(one: Mesh, other: Mesh) -> set[tuple[float, ...]]:
    return {tuple(p) for p in one.vertices} & {tuple(p) for p in other.vertices}


def test_sound_solids_have_none() -> None:
    for solid in (cube(), joined(cube(), cube((3.0, 0.0, 0.0))), of_trimesh(trimesh.creation.torus(2, 0.5))):
        for seed in range(3):
            assert not self_intersecting_faces(moved(solid, rotation(seed), np.full(3, 0.1))).any()


def test_overlapping_solids_do_not_depend_on_place_size_and_order() -> None:
    """Rotated by any angle the two cubes still meet face against face, away from all edges and vertices."""
    mesh = joined(cube(), cube((0.6, 0.3, 0.2)))
    count = int(self_intersecting_faces(mesh).sum())
    assert 0 < count < 24
    assert count == sum(reference(mesh))
    for seed in range(3):
        view = shuffled(moved(mesh, rotation(seed) * 37.0, np.array([1e3, -5.0, 0.1])), seed)
        assert int(self_intersecting_faces(view).sum()) == count


def test_no_faces_no_intersections() -> None:
    assert self_intersecting_faces(Mesh(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))).shape == (0,)


# --- predicates ---------------------------------------------------------------------------------------------


def test_orientations_are_exact_where_rounding_is_not() -> None:
    """Points within a few roundings of one plane through three points far off the axes."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=(400, 3)) for _ in range(3))
    weights = rng.random((400, 2))
    d = a + weights[:, :1] * (b - a) + weights[:, 1:] * (c - a)
    d = np.nextafter(d, rng.choice([-1.0, 1.0], size=d.shape) * np.inf)
    rounded = np.sign(np.linalg.det(np.stack([b - a, c - a, d - a], axis=1)))
    exact = []
    for points in zip(*(array.tolist() for array in (a, b, c, d)), strict=True):
        pa, pb, pc, pd = (tuple(map(Fraction, p)) for p in points)
        value = dot(cross(minus(pb, pa), minus(pc, pa)), minus(pd, pa))
        exact.append((value > 0) - (value < 0))
    assert orient3d(a, b, c, d).tolist() == exact
    assert rounded.astype(int).tolist() != exact  # else this test shows nothing


def test_turns_in_the_plane_are_exact() -> None:
    steps = np.arange(-3, 4) * 2.0**-53
    c = np.array([(0.5 + x, 0.5 + y) for x in steps for y in steps])
    a, b = np.full_like(c, 12.0), np.full_like(c, 24.0)
    assert orient2d(a, b, c).tolist() == [int(np.sign(y - x)) for x in steps for y in steps]


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_sizes_at_the_ends_of_the_range_neither_overflow_nor_vanish(scale: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        points = prepared(cube().vertices * scale)
    a, b, c, d = (points[[k]] for k in (0, 1, 2, 4))
    assert np.abs(points).max() <= 1
    assert orient3d(a, b, c, d).tolist() == [-orient3d(a, c, b, d)[0]] != [0]
