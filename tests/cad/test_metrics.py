"""The figures of meshes: known answers, hand counts, and what must not change them."""

import math

import numpy as np
import pytest
import trimesh

from cad_mllm.cad.mesh import Mesh
from cad_mllm.cad.metrics import (
    dangling_edge_length,
    flux_enclosure_error,
    num_components,
    segment_error,
    self_intersection_ratio,
    soundness,
    surface_distance,
    unit_box,
    volumetric_iou,
    weld,
)
from cad_mllm.errors import CadError
from tests.cad.meshes import (
    crossed_prism,
    cube,
    joined,
    moved,
    of_trimesh,
    open_box,
    rotation,
    shuffled,
    split,
)

SPHERE = of_trimesh(trimesh.creation.icosphere(4, radius=0.5))
CENTRED = unit_box(cube())
NOTHING = Mesh(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))


def square(height: float) -> Mesh:
    """A unit square, parallel to the xy plane."""
    corners = np.array([(0, 0, height), (1, 0, height), (1, 1, height), (0, 1, height)], dtype=np.float64)
    return Mesh(corners, np.array([(0, 1, 2), (0, 2, 3)]))


# --- closeness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "found"), [(0.2, 0.0), (0.06, 0.0), (0.04, 1.0)])
def test_parallel_squares_are_apart_by_their_gap(gap: float, found: float) -> None:
    distance = surface_distance(square(0.0), square(gap), seed=0)
    assert distance.chamfer == pytest.approx(gap, rel=0.02)
    assert distance.chamfer_squared == pytest.approx(2 * gap**2, rel=0.03)  # the sum of both directions
    assert distance.f_score == pytest.approx(found, abs=0.002)
    assert distance.normal_consistency == pytest.approx(1.0)


def test_a_half_of_the_truth_has_all_precision_and_half_the_recall() -> None:
    half = Mesh(square(0.0).vertices * [0.5, 1.0, 1.0], square(0.0).faces)
    f_score = surface_distance(half, square(0.0), seed=0).f_score
    recall = 0.5 + 0.05  # the strip beside the border is within the distance too
    assert f_score == pytest.approx(2 * recall / (1 + recall), abs=0.01)


def test_a_sphere_in_a_cube() -> None:
    """Distances by integration: from the cube |p| - 1/2, from the sphere (1 - max |n_i|) / 2."""
    grid = (np.arange(1000) + 0.5) / 1000 - 0.5
    radius = np.sqrt(grid[:, None] ** 2 + grid[None, :] ** 2 + 0.25)
    normals = np.random.default_rng(0).normal(size=(400_000, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    inward = (1 - np.abs(normals).max(axis=1)) / 2
    distance = surface_distance(SPHERE, CENTRED, seed=0)
    assert distance.chamfer == pytest.approx((np.mean(radius - 0.5) + inward.mean()) / 2, rel=0.03)
    expected = np.mean((radius - 0.5) ** 2) + (inward**2).mean()
    assert distance.chamfer_squared == pytest.approx(expected, rel=0.03)


def test_perpendicular_normals_agree_in_nothing() -> None:
    wall = Mesh(square(0.0).vertices[:, [2, 0, 1]], square(0.0).faces)
    assert surface_distance(square(0.0), wall, seed=0).normal_consistency == pytest.approx(0.0)


def test_equal_surfaces_are_at_the_floor_of_the_sampling_however_triangulated() -> None:
    finer = of_trimesh(trimesh.creation.box().subdivide().subdivide())
    floors = [surface_distance(mesh, CENTRED, seed=1) for mesh in (CENTRED, finer)]
    for floor in floors:
        # Expected squared distance to the nearest of n points on an area A: A / (pi n), both ways.
        assert floor.chamfer_squared == pytest.approx(2 * 6 / (math.pi * 8192), rel=0.06)
        assert floor.f_score == pytest.approx(1.0, abs=1e-3)
        assert floor.normal_consistency > 0.97


def test_closeness_does_not_depend_on_place_size_and_direction_of_both() -> None:
    bar = Mesh(cube().vertices * [3.0, 1.0, 0.5], cube().faces)
    before = surface_distance(unit_box(bar), CENTRED, seed=0)
    turn = np.eye(3)[[2, 0, 1]]
    after = surface_distance(
        unit_box(moved(bar, 20 * turn, np.array([5.0, 0.0, -1.0]))),
        unit_box(moved(cube(), turn, np.ones(3))),
        seed=0,
    )
    assert after.chamfer == pytest.approx(before.chamfer, rel=0.02)
    assert after.f_score == pytest.approx(before.f_score, abs=0.02)


def test_the_same_seed_gives_the_same_figures() -> None:
    first, again, other = (surface_distance(SPHERE, CENTRED, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_cubes_that_overlap_by_half_have_a_third_in_common() -> None:
    assert volumetric_iou(cube(), cube((0.5, 0.0, 0.0))) == pytest.approx(1 / 3)
    assert volumetric_iou(cube(), cube()) == pytest.approx(1.0)
    assert volumetric_iou(cube(), cube((2.0, 0.0, 0.0))) == 0.0
    assert volumetric_iou(SPHERE, CENTRED) == pytest.approx(math.pi / 6, rel=5e-3)


def test_overlapping_parts_count_once_and_cavities_not_at_all() -> None:
    doubled = joined(cube(), cube((0.5, 0.0, 0.0)))  # 1.5 in all
    assert volumetric_iou(doubled, cube()) == pytest.approx(1 / 1.5)
    inner = cube((0.25, 0.25, 0.25), side=0.5)
    hollow = joined(cube(), Mesh(inner.vertices, inner.faces[:, ::-1]))
    assert volumetric_iou(hollow, cube()) == pytest.approx(7 / 8)


def test_a_mesh_that_is_inside_out_encloses_the_same() -> None:
    assert volumetric_iou(Mesh(cube().vertices, cube().faces[:, ::-1]), cube()) == pytest.approx(1.0)


def test_bodies_that_share_an_edge_enclose_what_they_enclose() -> None:
    pair = weld(joined(cube(), cube((1.0, 1.0, 0.0))))
    assert volumetric_iou(pair, cube()) == pytest.approx(0.5)


@pytest.mark.parametrize("mesh", [open_box(), square(0.0), NOTHING], ids=["open", "flat", "nothing"])
def test_what_encloses_nothing_has_no_volume_to_compare(mesh: Mesh) -> None:
    with pytest.raises(CadError, match="the prediction encloses no volume"):
        volumetric_iou(mesh, cube())


def test_a_mesh_without_size_or_area_is_refused() -> None:
    with pytest.raises(CadError, match="no size"):
        unit_box(Mesh(np.ones((3, 3)), np.array([(0, 1, 2)])))
    line = Mesh(np.array([(0.0, 0, 0), (1, 0, 0), (0.5, 0, 0)]), np.array([(0, 1, 2)]))
    with pytest.raises(CadError, match="no area"):
        surface_distance(line, cube(), seed=0)


# --- soundness ----------------------------------------------------------------------------------------------


def test_parts_are_counted_by_shared_vertices() -> None:
    assert num_components(cube()) == 1
    assert num_components(joined(cube(), cube((0.5, 0.5, 0.5)), open_box())) == 3
    assert num_components(NOTHING) == 0


def test_segment_error_in_both_definitions() -> None:
    assert segment_error(5, 2) == (1.5, 3)
    assert segment_error(1, 4) == (0.75, 3)
    assert segment_error(2, 2) == (0.0, 0)


def test_split_vertices_are_welded_where_they_are_equal_and_only_there() -> None:
    assert num_components(split(cube())) == 12
    welded = weld(split(cube()))
    assert len(welded.vertices) == 8
    assert (num_components(welded), dangling_edge_length(welded)) == (1, 0.0)
    nearly = split(cube())
    nearly.vertices[0] += 1e-12
    assert len(weld(nearly).vertices) == 9


def test_welding_drops_what_no_face_uses_and_takes_minus_zero_for_zero() -> None:
    loose = Mesh(np.concatenate([cube().vertices, [(9.0, 9.0, 9.0)]]), cube().faces)
    assert len(weld(loose).vertices) == 8
    vertices = split(cube()).vertices
    vertices[::2] = np.where(vertices[::2] == 0, -0.0, vertices[::2])
    assert len(weld(Mesh(vertices, split(cube()).faces)).vertices) == 8


def test_dangling_edges_by_hand() -> None:
    assert dangling_edge_length(cube()) == 0.0
    assert dangling_edge_length(open_box()) == pytest.approx(4 / 0.5)  # four edges of 1, half the box is .5
    one_face_less = Mesh(cube().vertices, cube().faces[1:])
    assert dangling_edge_length(one_face_less) == pytest.approx((2 + math.sqrt(2)) / 0.5)
    assert dangling_edge_length(square(0.0)) == pytest.approx(4 / 0.5)
    assert dangling_edge_length(NOTHING) == 0.0


def test_an_edge_of_three_faces_does_not_dangle() -> None:
    fan = np.array([(0, 0, 0), (0, 0, 2), (1, 0, 0), (-1, 0, 0), (0, 1, 0)], dtype=np.float64)
    mesh = Mesh(fan, np.array([(0, 1, 2), (0, 1, 3), (0, 1, 4)]))
    assert dangling_edge_length(mesh) == pytest.approx(3 * (1 + math.sqrt(5)) / 1.0)


def test_flux_by_hand() -> None:
    assert flux_enclosure_error(cube()) == pytest.approx(0.0)
    assert flux_enclosure_error(open_box()) == pytest.approx(1.0)
    doubled = Mesh(open_box().vertices * 2, open_box().faces)
    assert flux_enclosure_error(doubled) == pytest.approx(
        4.0
    )  # an area: the official code does not normalise
    assert flux_enclosure_error(SPHERE) == pytest.approx(0.0, abs=1e-12)


def test_self_intersections_by_hand() -> None:
    assert self_intersection_ratio(cube()) == 0.0
    assert self_intersection_ratio(open_box()) == 0.0
    # Two of the four walls cross, each of two triangles, all of which reach the line of the crossing.
    assert self_intersection_ratio(crossed_prism()) == 0.5
    assert self_intersection_ratio(joined(cube(), cube((2.0, 0.0, 0.0)))) == 0.0
    assert self_intersection_ratio(NOTHING) == 0.0


def test_doubled_and_collapsed_faces_are_left_out_as_in_the_official_reader() -> None:
    faces = np.concatenate([cube().faces, cube().faces[:, ::-1], [(0, 0, 1)]])
    assert self_intersection_ratio(Mesh(cube().vertices, faces)) == 0.0


@pytest.mark.parametrize(
    "mesh",
    [open_box(), crossed_prism(), joined(cube(), cube((0.6, 0.3, 0.2))), SPHERE],
    ids=["open box", "crossed prism", "two cubes", "sphere"],
)
def test_soundness_does_not_depend_on_place_direction_size_and_order(mesh: Mesh) -> None:
    before = soundness(mesh)
    for seed in range(2):
        size = 0.5 + seed
        after = soundness(shuffled(moved(mesh, rotation(seed) * size, np.array([0.3, -0.2, 0.7])), seed))
        assert after.components == before.components
        assert after.dangling_edge_length == pytest.approx(
            before.dangling_edge_length
            * longest(mesh)
            * size
            / longest(moved(mesh, rotation(seed) * size, np.zeros(3)))
        )
        assert after.self_intersection_ratio == before.self_intersection_ratio
    axes = np.eye(3)[[1, 2, 0]]
    turned = soundness(shuffled(moved(mesh, axes * 4.0, np.array([1.0, 2.0, 0.5]))))
    assert turned.dangling_edge_length == pytest.approx(before.dangling_edge_length)
    assert turned.self_intersection_ratio == before.self_intersection_ratio
    assert turned.flux_enclosure_error == pytest.approx(before.flux_enclosure_error * 16, abs=1e-9)


def longest(mesh: Mesh) -> float:
    return float((mesh.vertices.max(axis=0) - mesh.vertices.min(axis=0)).max())
