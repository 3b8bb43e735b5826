"""Programs to solids: known volumes, outward normals, STEP, and CadError alone for what cannot be built."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import trimesh
from OCP.Standard import Standard_ConstructionError, Standard_NullObject, Standard_OutOfRange
from OCP.StdFail import StdFail_NotDone
from OCP.STEPControl import STEPControl_Reader

from cad_mllm.cad import omnicad, solid
from cad_mllm.cad.brep import kernel_errors, total
from cad_mllm.cad.codec import decode
from cad_mllm.cad.mesh import mesh_by_manifold, volume_by_manifold
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import (
    Arc,
    CadProgram,
    Circle,
    Extent,
    ExtentType,
    Extrude,
    Line,
    Operation,
    Path,
    Plane,
    Profile,
)
from cad_mllm.errors import CadError
from tests.cad.shapes import CUBE, DRILLED, XY, feature, polygon, program, square

NEW, JOIN, CUT, INTERSECT = Operation.NEW, Operation.JOIN, Operation.CUT, Operation.INTERSECT
ROUND = Circle((1.0, 1.0), 0.5)
OBLIQUE = Plane((1.0, 2.0, 3.0), (0.8, 0.0, 0.6), (-0.6, 0.0, 0.8))
HALF_DISC = Path((1.0, 0.0), (Arc((-1.0, 0.0), math.pi), Line((1.0, 0.0))))
MOON = Path((1.0, 0.0), (Arc((-1.0, 0.0), math.pi), Arc((1.0, 0.0), -math.pi / 2)))
PAC_MAN = Path((0.0, 1.0), (Arc((1.0, 0.0), 1.5 * math.pi), Line((0.0, 0.0)), Line((0.0, 1.0))))

# name -> program, volume, smallest and largest corner
KNOWN = {
    "unit cube": (CUBE, 1.0, (0, 0, 0), (1, 1, 1)),
    "cylinder, downwards": (
        program(feature(Circle((0, 0), 2.0), -3.0)),
        12 * math.pi,
        (-2, -2, -3),
        (2, 2, 0),
    ),
    "two sides": (
        program(feature(square(), 2.0, sides=ExtentType.TWO_SIDES, back=3.0)),
        5.0,
        (0, 0, -3),
        (1, 1, 2),
    ),
    "symmetric": (program(feature(square(), 2.0, sides=ExtentType.SYMMETRIC)), 4.0, (0, 0, -2), (1, 1, 2)),
    "plate with a hole": (
        program(feature(square(2.0), holes=[ROUND])),
        4 - math.pi / 4,
        (0, 0, 0),
        (2, 2, 1),
    ),
    "hole cut": (DRILLED, 4 - math.pi / 4, (0, 0, 0), (2, 2, 1)),
    "join": (
        program(feature(square()), feature(square(1.0, 0.5), operation=JOIN)),
        1.5,
        (0, 0, 0),
        (1.5, 1, 1),
    ),
    "new over what stands is not counted twice": (
        program(feature(square()), feature(square(1.0, 0.5))),
        1.5,
        (0, 0, 0),
        (1.5, 1, 1),
    ),
    "join with nothing": (program(feature(square(), operation=JOIN)), 1.0, (0, 0, 0), (1, 1, 1)),
    "intersect": (
        program(feature(square(2.0)), feature(square(2.0, 1.5, 1.0), operation=INTERSECT)),
        0.5,
        (1.5, 1, 0),
        (2, 2, 1),
    ),
    "cut through two bodies": (
        program(
            feature(square()),
            feature(square(1.0, 3.0)),
            feature(polygon((-1, 0), (5, 0), (5, 0.5), (-1, 0.5)), 0.5, CUT),
        ),
        1.5,
        (0, 0, 0),
        (4, 1, 1),
    ),
    "all cut away, then new": (
        program(feature(square()), feature(square(3.0, -1.0, -1.0), 2.0, CUT), feature(square(2.0, 5.0))),
        4.0,
        (5, 0, 0),
        (7, 2, 1),
    ),
    "nothing in common, then new": (
        program(feature(square()), feature(square(1.0, 3.0), operation=INTERSECT), feature(square(2.0, 5.0))),
        4.0,
        (5, 0, 0),
        (7, 2, 1),
    ),
    "half disc": (program(feature(HALF_DISC)), math.pi / 2, (-1, 0, 0), (1, 1, 1)),
    "arc of 270 degrees": (program(feature(PAC_MAN)), 0.75 * math.pi, (-1, -1, 0), (1, 1, 1)),
    "clockwise arc": (program(feature(MOON)), math.pi / 2 - (math.pi / 2 - 1), (-1, 0, 0), (1, 1, 1)),
    "oblique plane": (
        program(feature(square(), plane=OBLIQUE)),
        1.0,
        (1 - 0.6, 2, 3),
        (1 + 0.8, 3, 3 + 0.6 + 0.8),
    ),
    "several profiles, touching and apart": (
        program(
            Extrude(
                XY,
                tuple(Profile(square(1.0, x)) for x in (0.0, 1.0, 5.0)),
                Extent(ExtentType.ONE_SIDE, 1.0),
                NEW,
            )
        ),
        3.0,
        (0, 0, 0),
        (6, 1, 1),
    ),
    "hole over the outline": (
        program(feature(square(2.0), holes=[square(2.0, 1.0, 1.0)])),
        3.0,
        (0, 0, 0),
        (2, 2, 1),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_volume_and_box(name: str) -> None:
    model, volume, low, high = KNOWN[name]
    built = solid.build(model)
    assert built.volume == pytest.approx(volume, rel=1e-9)
    assert built.is_valid
    np.testing.assert_allclose(built.box, (low, high), atol=1e-6)
    # The mesh is closed, wound outward, and within its deflection of the solid; so is the polygon model.
    for mesh, tolerance in ((built.mesh(), 1e-2), (mesh_by_manifold(model), 2e-3)):
        assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight
        assert mesh.volume == pytest.approx(volume, rel=tolerance)
        np.testing.assert_allclose(mesh.box, (low, high), atol=5e-3)
    assert volume_by_manifold(model) == pytest.approx(volume, rel=1e-4)


def test_bodies_that_touch_are_one_and_faces_in_one_plane_are_merged() -> None:
    bar = solid.build(program(feature(square()), feature(square(1.0, 1.0), operation=JOIN)))
    assert bar.num_bodies == 1
    assert len(bar.mesh().vertices) == 8
    assert solid.build(program(feature(square()), feature(square(1.0, 3.0)))).num_bodies == 2


@pytest.mark.parametrize(
    "up, down, z", [(0.085, 0.076, -0.159), (0.073, 0.09, 0.368), (0.048, 0.011, -0.132)]
)
def test_bodies_that_touch_but_for_the_rounding_of_a_sum_are_one(up: float, down: float, z: float) -> None:
    # One up and one down from a plane: where the lower one ends is a sum that need not give the plane again.
    plane = replace(XY, origin=(0.0, 0.0, z))
    both = program(feature(square(0.05), up, plane=plane), feature(square(0.05), -down, JOIN, plane=plane))
    built = solid.build(normalise(both).program)
    assert built.num_bodies == 1
    assert len(built.mesh().vertices) == 8


def test_bodies_that_touch_in_an_edge_are_each_watertight() -> None:
    corner_to_corner = Extrude(
        XY, (Profile(square()), Profile(square(1.0, 1.0, 1.0))), Extent(ExtentType.ONE_SIDE, 1.0), NEW
    )
    mesh = solid.build(program(corner_to_corner)).mesh()
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


def test_finer_mesh_on_request() -> None:
    model = solid.build(program(feature(Circle((0.0, 0.0), 1.0))))
    coarse, fine = model.mesh(deflection=1e-2, angle=0.8), model.mesh(deflection=1e-4, angle=0.05)
    assert len(coarse.faces) < len(model.mesh().faces) < len(fine.faces)
    assert fine.volume == pytest.approx(math.pi, rel=1e-3)


def test_points_lie_on_the_surface_and_normals_point_outward() -> None:
    points = solid.build(CUBE).sample(4000, seed=1)
    assert points.shape == (4000, 6) and points.dtype == np.float32
    positions, normals = points[:, :3], points[:, 3:]
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    # On the face that the normal names: x = 1 has normal +x, x = 0 has -x.
    axis = np.abs(normals).argmax(axis=1)
    rows = np.arange(len(points))
    np.testing.assert_allclose(positions[rows, axis], normals[rows, axis] > 0, atol=1e-6)
    # Uniform by area: each of the six faces has its sixth.
    counts = np.unique(np.round(normals).astype(int), axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 4000 / 6 * 0.95


def test_points_on_round_faces_are_exact_inside_and_outside() -> None:
    points = solid.build(DRILLED).sample(4000, seed=2).astype(np.float64)
    in_bore = np.abs(points[:, 5]) < 0.5
    from_axis = points[:, :2] - 1.0
    radius = np.linalg.norm(from_axis, axis=1)
    in_bore &= radius < 0.9
    assert in_bore.sum() > 300
    np.testing.assert_allclose(radius[in_bore], 0.5, atol=1e-6)
    # Out of the material is towards the axis of the bore.
    np.testing.assert_allclose(points[in_bore, 3:5], -from_axis[in_bore] / 0.5, atol=1e-5)


def test_sampling_is_deterministic_and_each_seed_its_own() -> None:
    model = solid.build(DRILLED)
    np.testing.assert_array_equal(model.sample(100, seed=3), solid.build(DRILLED).sample(100, seed=3))
    assert not np.array_equal(model.sample(100, seed=3), model.sample(100, seed=4))


def test_step_is_read_back_with_the_same_volume(
    tmp_path: FilePath, capfd: pytest.CaptureFixture[str]
) -> None:
    model = solid.build(DRILLED)
    path = tmp_path / "part.step"
    model.write_step(path)
    assert [p.name for p in tmp_path.iterdir()] == ["part.step"]
    assert capfd.readouterr() == ("", "")
    reader = STEPControl_Reader()
    reader.ReadFile(str(path))
    reader.TransferRoots()
    # STEP is in millimetres, as the reader's default is.
    assert total([reader.OneShape()]) == pytest.approx(model.volume, rel=1e-9)


def test_a_step_file_that_cannot_be_written_is_an_error(tmp_path: FilePath) -> None:
    with pytest.raises(FileNotFoundError):
        solid.build(CUBE).write_step(tmp_path / "missing" / "part.step")


BOW_TIE = polygon((0, 0), (4, 4), (4, 0), (0, 2))
UNBUILDABLE: dict[str, tuple[CadProgram, str]] = {
    "outline crosses itself": (program(feature(BOW_TIE)), "crosses itself"),
    # Two lenses on a line: the kernel takes them for one sound face, and triangulates it wrongly.
    "no width between two parts": (
        decode("NZ0,303,607,0,416F192P0,157A64,0,180H958A1022,157,180V865A958,1022,180H64A0,865,180", 10),
        "crosses itself",
    ),
    "no area": (program(feature(polygon((0, 0), (1, 0), (2, 0)))), "no"),
    "two points": (program(feature(polygon((0, 0), (1, 0)))), "no"),
    "no segments": (program(feature(Path((0.0, 0.0), ()))), "no"),
    "no length": (program(feature(square(), 0.0)), "length 0"),
    "endless": (program(feature(square(), math.inf)), "length inf"),
    "hole larger than the outline": (program(feature(square(), holes=[square(3.0, -1.0, -1.0)])), "no"),
    "hole is the outline": (program(feature(square(), holes=[square()])), "no"),
    "circle without radius": (program(feature(Circle((0.0, 0.0), 0.0))), "no"),
    "negative radius": (program(feature(Circle((0.0, 0.0), -1.0))), "radius"),
    "plane without a frame": (program(feature(square(), plane=replace(XY, normal=(1.0, 0.0, 0.0)))), "plane"),
    "plane nowhere": (program(feature(square(), plane=replace(XY, origin=(math.nan, 0.0, 0.0)))), "plane"),
    "nowhere": (program(feature(polygon((0, 0), (1, 0), (math.nan, 1)))), "not a number"),
    "too far away": (program(feature(polygon((0, 0), (1, 0), (1e300, 1)))), "not a number"),
    "too long": (program(feature(square(), 1e300)), "further"),
    "no turn": (program(feature(Path((0.0, 0.0), (Arc((1.0, 0.0), 0.0), Line((0.0, 0.0)))))), "turn by"),
    "nan turn": (
        program(feature(Path((0.0, 0.0), (Arc((1.0, 0.0), math.nan), Line((0.0, 0.0)))))),
        "turn by",
    ),
    "all cut away": (program(feature(square()), feature(square(3.0, -1.0, -1.0), 2.0, CUT)), "no"),
    "cut from nothing": (program(feature(square(), operation=CUT)), "no"),
    "nothing in common": (program(feature(square()), feature(square(1.0, 5.0), operation=INTERSECT)), "no"),
    "no profiles": (program(Extrude(XY, (), Extent(ExtentType.ONE_SIDE, 1.0), NEW)), "no"),
    "thinner than the kernel's points": (program(feature(square(), 1e-9)), "kernel failed"),
    "smaller than the kernel's points": (program(feature(square(4e-7), 1e-7)), "kernel failed"),
}


@pytest.mark.parametrize("name", UNBUILDABLE)
def test_what_cannot_be_built_is_a_cad_error(name: str) -> None:
    model, message = UNBUILDABLE[name]
    with pytest.raises(CadError, match=message):
        solid.build(model)


@pytest.mark.parametrize(
    "thrown", [Standard_ConstructionError, StdFail_NotDone, Standard_NullObject, Standard_OutOfRange]
)
def test_whatever_the_kernel_throws_is_a_cad_error(thrown: type[Exception]) -> None:
    with pytest.raises(CadError, match="kernel failed while drilling"), kernel_errors("drilling"):
        raise thrown("no")
    with pytest.raises(ZeroDivisionError), kernel_errors("drilling"):
        raise ZeroDivisionError


def test_an_arc_that_grazes_a_line_loses_its_sliver_only() -> None:
    # A rounded sweep makes the arc dip by a hair under the line that it should touch (a real case).
    grazing = Path(
        (-0.34375, 0.140625),
        (
            Arc((-0.3671875, 0.0703125), 0.19634954084936207),
            Line((-0.125, 0.0703125)),
            Arc((0.0, 0.140625), -1.055378782065321),
            Line((-0.34375, 0.140625)),
        ),
    )
    built = solid.build(program(feature(grazing)))
    assert built.is_valid
    assert built.volume == pytest.approx(0.0188104, rel=1e-4)


def test_a_wrong_result_of_the_kernel_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solid, "volume_by_manifold", lambda *_: 1.1)
    with pytest.raises(CadError, match=r"1\.1"):
        solid.build(CUBE)


def test_wrong_triangles_of_the_kernel_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def swollen(face: object, of_face: Callable[..., Any] = solid._face_triangles) -> tuple[Any, Any]:
        vertices, triangles = of_face(face)
        return 1.1 * vertices, triangles

    built = solid.build(CUBE)
    monkeypatch.setattr(solid, "_face_triangles", swollen)
    with pytest.raises(CadError, match="triangles enclose"):
        built.sample(10, seed=0)


REAL_FILES = sorted((FilePath(__file__).parents[1] / "data" / "omnicad" / "json").rglob("*.json"))


def test_there_are_twelve_real_files() -> None:
    assert len(REAL_FILES) == 12


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("unit", ["file", "normalised"])
def test_real_files_build_and_agree_with_the_independent_construction(path: FilePath, unit: str) -> None:
    model = omnicad.read(path)
    if unit == "normalised":
        model = normalise(model).program
    built = solid.build(model)
    assert built.volume == pytest.approx(volume_by_manifold(model), rel=1e-3)
    assert built.is_valid
    assert built.mesh().volume == pytest.approx(built.volume, rel=2e-2)
