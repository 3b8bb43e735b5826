"""Points, normals and views with and without OpenCASCADE: two ways to the same surface."""

import math

import numpy as np
import pytest
from scipy.spatial import cKDTree

from cad_mllm.cad import solid
from cad_mllm.cad.mesh import Mesh
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import Arc, CadProgram, Line, Path
from cad_mllm.cad.render import render_views
from cad_mllm.cad.surface import Kernel, Surface, surface_of
from cad_mllm.cad.synth import Complexity, make_program
from cad_mllm.errors import CadError
from tests.cad.shapes import feature, polygon, program, square

PARTS = [(seed, Complexity.SIMPLE) for seed in range(5)] + [(seed, Complexity.REAL) for seed in (3, 5, 6, 7)]


@pytest.fixture(scope="module", params=PARTS, ids=lambda part: f"{part[1].value}-{part[0]}")
def model(request: pytest.FixtureRequest) -> CadProgram:
    return normalise(make_program(*request.param)[0]).program


@pytest.fixture(scope="module")
def both(model: CadProgram) -> tuple[Surface, Surface]:
    return surface_of(model, Kernel.OPENCASCADE), surface_of(model, Kernel.POLYGONS)


def test_volume_area_and_box_agree(both: tuple[Surface, Surface]) -> None:
    exact, polygons = (surface.mesh() for surface in both)
    assert polygons.volume == pytest.approx(exact.volume, rel=3e-3)
    assert polygons.area == pytest.approx(exact.area, rel=3e-3)
    np.testing.assert_allclose(polygons.box, exact.box, atol=2e-3)


def test_points_and_normals_lie_on_the_other_surface(
    model: CadProgram, both: tuple[Surface, Surface]
) -> None:
    exact, polygons = both
    fine = solid.build(model).mesh(deflection=2e-5, angle=0.02)
    for here, there in ((exact, polygons.mesh()), (polygons, fine)):
        cloud_NC = here.sample(2000, seed=1)
        assert cloud_NC.shape == (2000, 6) and cloud_NC.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(cloud_NC[:, 3:], axis=1), 1.0, atol=1e-5)
        distance_N, degrees_N = off(cloud_NC, there)
        # A facet's middle is 7.5e-5 of its radius off the circle, its ends are turned by .7 degrees. The last
        # few points lie so near an edge that `off` compares them with the face beside theirs.
        assert np.percentile(distance_N, 97) < 2e-4
        assert np.percentile(degrees_N, 97) < 1.5


def test_the_pictures_are_nearly_the_same(both: tuple[Surface, Surface]) -> None:
    exact, polygons = (render_views(surface.mesh(), size=96, views=4) for surface in both)
    for one, other in zip(exact, polygons, strict=True):
        difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max(axis=2)
        assert difference.mean() < 1.5
        assert (difference > 32).mean() < 0.012


def test_points_without_opencascade_are_even_and_always_the_same() -> None:
    cube = surface_of(normalise(program(feature(square()))).program, Kernel.POLYGONS)
    cloud_NC = cube.sample(6000, seed=3)
    assert np.array_equal(cloud_NC, cube.sample(6000, seed=3))
    sides, counts = np.unique(cloud_NC[:, 3:].round(), axis=0, return_counts=True)
    assert len(sides) == 6 and (np.abs(counts - 1000) < 10).all()
    assert np.abs((cloud_NC[:, :3] * cloud_NC[:, 3:]).sum(axis=1) - 1).max() < 1e-6  # outward


@pytest.mark.parametrize("kernel", Kernel)
def test_a_program_that_leaves_nothing_is_refused_by_both(kernel: Kernel) -> None:
    with pytest.raises(CadError):
        surface_of(program(feature(square(), 0.0)), kernel)


def off(cloud_NC: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each point from the mesh and angle of its normal in degrees; the best of 8 faces nearby."""
    dense_MC, face_M = mesh.sample_faces(40_000, seed=0)
    _, near_NK = cKDTree(dense_MC).query(cloud_NC[:, :3], k=8)
    face_NK = face_M[near_NK]
    normals_NKC = mesh.face_normals[face_NK]
    to_plane_NKC = cloud_NC[:, None, :3] - mesh.vertices[mesh.faces[face_NK, 0]]
    distance_NK = np.abs(np.einsum("nkc,nkc->nk", to_plane_NKC, normals_NKC))
    cosine_NK = np.einsum("nc,nkc->nk", cloud_NC[:, 3:], normals_NKC)
    return distance_NK.min(axis=1), np.degrees(np.arccos(np.clip(cosine_NK.max(axis=1), -1, 1)))


# Each winds around a part of the plane twice, not at all, or the other way; or touches itself.
DIVIDED = {
    "a bow tie": polygon((0, 0), (4, 4), (4, 0), (0, 2)),
    "twice around the middle": polygon((0, 0), (6, 0), (6, 6), (1, 6), (1, 2), (4, 2), (4, 4), (0, 4)),
    "two squares that touch in a corner": polygon(
        (0, 0), (2, 0), (2, 2), (4, 2), (4, 4), (2, 4), (2, 2), (0, 2)
    ),
    "an arc through the opposite side": Path(
        (0.0, 0.0), (Line((4.0, 0.0)), Line((4.0, 1.0)), Arc((0.0, 1.0), -math.pi), Line((0.0, 0.0)))
    ),
}


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("name", DIVIDED)
def test_a_loop_that_divides_itself_is_refused_by_either(name: str, kernel: Kernel) -> None:
    for profile in (feature(DIVIDED[name]), feature(square(20.0, -10.0, -10.0), holes=[DIVIDED[name]])):
        with pytest.raises(CadError, match="crosses itself"):
            surface_of(program(profile), kernel)


@pytest.mark.parametrize("kernel", Kernel)
def test_a_notch_to_the_very_edge_and_a_sliver_are_no_crossing(kernel: Kernel) -> None:
    notched = polygon((0, 0), (4, 0), (4, 4), (2.01, 4), (2, 0.01), (1.99, 4), (0, 4))
    sliver = polygon((0, 0), (4, 0), (4, 4), (0, 4), (0, 2), (-0.02, 1.98), (0, 1.99))
    for loop, area in ((notched, 16 - 0.02 * 3.99 / 2), (sliver, 16)):
        mesh = surface_of(program(feature(loop)), kernel).mesh()
        assert mesh.volume == pytest.approx(area, rel=1e-3)
