"""Views: white background, something on it, each from its own side, all to one scale."""

import numpy as np
import pytest

from cad_mllm.cad import solid
from cad_mllm.cad.mesh import mesh_by_manifold
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import CadProgram, Circle, Operation
from cad_mllm.cad.render import render_views
from tests.cad.shapes import feature, polygon, program, square

BOX = polygon((-1.0, -0.5), (1.0, -0.5), (1.0, 0.5), (-1.0, 0.5))
PART = program(
    feature(BOX, 0.4),
    feature(square(0.5, -1.0, -0.5), 1.0, Operation.JOIN),
    feature(Circle((0.5, 0.0), 0.25), 0.4, Operation.CUT),
)


def pictures(model: CadProgram, size: int = 96, views: int = 8) -> np.ndarray:
    mesh = solid.build(normalise(model).program).mesh()
    return np.stack([np.asarray(view) for view in render_views(mesh, size=size, views=views)])


def test_eight_pictures_on_white_that_differ() -> None:
    views = pictures(PART)
    assert views.shape == (8, 96, 96, 3) and views.dtype == np.uint8
    assert (views[:, 0, :] == 255).all() and (views[:, :, 0] == 255).all()  # nothing is cut off
    covered = (views < 250).all(axis=3).mean(axis=(1, 2))
    assert (covered > 0.1).all() and (covered < 0.6).all()
    differences = [np.abs(a.astype(int) - b).mean() for i, a in enumerate(views) for b in views[:i]]
    assert min(differences) > 2


def test_faces_are_shaded_and_edges_are_dark() -> None:
    view = pictures(program(feature(BOX, 0.4)), size=224, views=1)[0].max(axis=2)
    tones, counts = np.unique(view[view < 250], return_counts=True)
    flat_tones = tones[counts > 0.05 * counts.sum()]
    assert len(flat_tones) >= 3  # top, front and side
    assert flat_tones.max() - flat_tones.min() > 50
    assert 0.002 < (view < flat_tones.min() - 5).mean() < 0.05  # lines, not areas


def test_the_same_mesh_gives_the_same_pictures() -> None:
    np.testing.assert_array_equal(pictures(PART, views=3), pictures(PART)[:3])


def test_a_smooth_surface_has_no_lines_between_its_facets() -> None:
    view = pictures(program(feature(Circle((0.0, 0.0), 1.0), 2.0)), size=224, views=1)[0]
    row = view[112, 50:174].max(axis=1).astype(int)  # across the barrel of the cylinder
    assert np.abs(np.diff(row)).max() < 12


def test_the_polygon_model_looks_like_the_solid() -> None:
    mesh = mesh_by_manifold(normalise(PART).program)
    view = np.asarray(render_views(mesh, size=96, views=1)[0]).astype(int)
    assert np.abs(view - pictures(PART, views=1)[0]).mean() < 1.5


@pytest.mark.parametrize("corner", range(8))
def test_the_whole_unit_box_is_in_every_picture(corner: int) -> None:
    cube = program(feature(polygon((-1, -1), (1, -1), (1, 1), (-1, 1)), 2.0))
    view = pictures(cube)[corner]
    assert (view[[0, -1]] == 255).all() and (view[:, [0, -1]] == 255).all()
