"""From a CAD program to a B-rep solid, with OpenCASCADE: volume, mesh, STEP, surface points with normals.

The solid is the point set that the program describes. New and Join both add to what stands (bodies that touch
or overlap become one; apart, they stay apart); Cut and Intersect act on everything that stands.

OpenCASCADE can take minutes, a lot of memory or the whole process with it on a hard model: whoever builds
models that are not known to be good does so through `cad_mllm.cad.worker`.

Shape suffixes: V vertices, F faces (triangles), N points, C coordinates.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray
from OCP.BRep import BRep_Tool
from OCP.BRepAdaptor import BRepAdaptor_Surface
from OCP.BRepCheck import BRepCheck_Analyzer
from OCP.BRepMesh import BRepMesh_IncrementalMesh
from OCP.BRepTools import BRepTools
from OCP.GeomAbs import GeomAbs_SurfaceType
from OCP.IFSelect import IFSelect_ReturnStatus
from OCP.Message import Message, Message_PrinterOStream
from OCP.STEPControl import STEPControl_Reader, STEPControl_StepModelType, STEPControl_Writer
from OCP.TopAbs import TopAbs_Orientation
from OCP.TopLoc import TopLoc_Location
from OCP.TopoDS import TopoDS, TopoDS_Face, TopoDS_Shape
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from cad_mllm.cad.brep import (
    FACE,
    SOLID,
    Booleans,
    box_of,
    compound_of,
    extruded,
    kernel_errors,
    parts,
    pieces,
    total,
)
from cad_mllm.cad.geometry import Box, program_box
from cad_mllm.cad.mesh import FloatArray, Mesh, volume_by_manifold
from cad_mllm.cad.program import CadProgram, Operation
from cad_mllm.errors import CadError

RELATIVE_DEFLECTION = 1e-3
"""How far a mesh may be off the true surface, in longest sides of the model's box."""
ANGULAR_DEFLECTION = 0.2
"""Largest angle between neighbouring facets of a curved face, radians."""

FUZZINESS = (0.0, 5e-6, 5e-5)
"""Tolerances of the boolean operations, tried in this order, in longest sides of the model's box."""
AGREEMENT = 2e-3
"""A volume is right if it is this close to that of the polygon model (itself within 1e-3)."""
VERIFICATION_SEGMENTS = 256
"""Segments of a full circle in that polygon model."""
DISAGREEMENT = 2e-2
"""A volume that is further off for every tolerance means that the kernel got the model wrong."""

# The kernel reports each STEP transfer at length on stdout, where our own results go.
Message.DefaultMessenger_s().RemovePrinters(Message_PrinterOStream.get_type_descriptor_s())


@dataclass(frozen=True)
class _Cylinder:
    """An infinite cylinder: what a face of an extruded arc lies on."""

    point: FloatArray
    axis: FloatArray
    radius: float


@dataclass(frozen=True)
class _Triangulation:
    """A mesh, and for each triangle the cylinder on which it lies (index into `cylinders`, -1: a plane)."""

    mesh: Mesh
    cylinder_F: NDArray[np.int64]
    cylinders: tuple[_Cylinder, ...]


class Solid:
    """One or more solid bodies with a positive volume, as `build` leaves them."""

    def __init__(self, bodies: Sequence[TopoDS_Shape]) -> None:
        """Take over oriented bodies that do not overlap. Raises CadError if they enclose no volume."""
        self._bodies = tuple(bodies)
        self._shape = compound_of(self._bodies)
        self.volume: float = total(self._bodies)
        if not self.volume > 0:
            raise CadError(
                "the program leaves no solid: its extrudes enclose no volume, or all of it is cut away"
            )

    @property
    def num_bodies(self) -> int:
        """Bodies that do not touch one another."""
        return len(self._bodies)

    @cached_property
    def box(self) -> Box:
        """Smallest and largest corner of the exact geometry."""
        with kernel_errors("measuring the solid"):
            return box_of(self._shape)

    @property
    def is_valid(self) -> bool:
        """Whether OpenCASCADE's own checker finds nothing wrong with the B-rep."""
        with kernel_errors("checking the solid"):
            return bool(BRepCheck_Analyzer(self._shape).IsValid())

    @cached_property
    def _default_triangulation(self) -> _Triangulation:
        return _triangulate(self._bodies, RELATIVE_DEFLECTION, ANGULAR_DEFLECTION)

    def mesh(self, deflection: float = RELATIVE_DEFLECTION, angle: float = ANGULAR_DEFLECTION) -> Mesh:
        """Triangles within `deflection` (in longest sides of the box) and `angle` (radians) of the surface.

        Vertices are shared between faces; triangles wind counter-clockwise seen from outside.
        """
        if (deflection, angle) == (RELATIVE_DEFLECTION, ANGULAR_DEFLECTION):
            return self._default_triangulation.mesh
        return _triangulate(self._bodies, deflection, angle).mesh

    def sample(self, n: int, seed: int) -> NDArray[np.float32]:
        """Draw `n` points evenly from the surface: (N, 6) float32 xyz + outward unit normal, deterministic.

        Points and normals are those of the exact surface, not of the triangles that stand for it.
        """
        surface = self._default_triangulation
        points_NC, face_N = surface.mesh.sample_faces(n, seed)
        normals_NC = surface.mesh.face_normals[face_N]
        for index, cylinder in enumerate(surface.cylinders):
            on_it = surface.cylinder_F[face_N] == index
            from_point = points_NC[on_it] - cylinder.point
            along = (from_point @ cylinder.axis)[:, None] * cylinder.axis
            radial = (from_point - along) / np.linalg.norm(from_point - along, axis=1, keepdims=True)
            points_NC[on_it] = cylinder.point + along + cylinder.radius * radial
            outside = np.sign(np.einsum("nc,nc->n", radial, normals_NC[on_it]))
            normals_NC[on_it] = radial * outside[:, None]
        return np.concatenate([points_NC, normals_NC], axis=1).astype(np.float32)

    def write_step(self, path: FilePath) -> None:
        """Write a STEP file, which appears under its name when complete. Raises CadError if it cannot."""
        writer = STEPControl_Writer()
        with kernel_errors("writing STEP"):
            status = writer.Transfer(self._shape, STEPControl_StepModelType.STEPControl_AsIs)
            if status != IFSelect_ReturnStatus.IFSelect_RetDone:
                raise CadError(f"{path}: the solid cannot be expressed as STEP")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                unfinished = FilePath(folder) / path.name
                if writer.Write(str(unfinished)) != IFSelect_ReturnStatus.IFSelect_RetDone:
                    raise CadError(f"{path}: writing the STEP file failed; is the disk full?")
                os.replace(unfinished, path)


def read_step(path: FilePath) -> Solid:
    """The solid bodies of a STEP file. Raises CadError if it cannot be read or holds none."""
    reader = STEPControl_Reader()
    with kernel_errors("reading STEP"):
        if reader.ReadFile(str(path)) != IFSelect_ReturnStatus.IFSelect_RetDone:
            raise CadError("is not a STEP file that the CAD kernel can read")
        reader.TransferRoots()
        shape = reader.OneShape()
        bodies = [] if shape is None or shape.IsNull() else pieces(shape, SOLID)
        if not bodies:
            raise CadError("holds no solid body")
        return Solid(bodies)


def build(program: CadProgram) -> Solid:
    """Build the solid that the program describes, and make sure that it is the right one.

    Where faces almost coincide the kernel sometimes drops a body without a word. So the volume is compared
    with that of the polygon model (`cad_mllm.cad.mesh`), and the build repeated with coarser tolerances if it
    is off. Raises CadError, and nothing else, if a sketch encloses no region, an operation fails, nothing is
    left, or no tolerance gives the right volume.
    """
    expected = volume_by_manifold(program, VERIFICATION_SEGMENTS)
    size = max(high - low for low, high in zip(*program_box(program), strict=True))
    closest: Solid | None = None
    failure: CadError | None = None
    for fuzziness in FUZZINESS:
        try:
            solid = _built(program, Booleans(fuzziness * size))
        except CadError as error:
            failure = failure or error
            continue
        if closest is None or abs(solid.volume - expected) < abs(closest.volume - expected):
            closest = solid
        if abs(closest.volume - expected) <= AGREEMENT * expected:
            return closest
    if closest is None:
        assert failure is not None
        raise failure
    if abs(closest.volume - expected) > DISAGREEMENT * expected:
        raise CadError(
            f"the CAD kernel gives a volume of {closest.volume:g} where the sketches enclose {expected:g}: "
            "faces that almost coincide defeat it"
        )
    return closest


def _built(program: CadProgram, booleans: Booleans) -> Solid:
    bodies: list[TopoDS_Shape] = []
    for number, extrude in enumerate(program.extrudes, start=1):
        with kernel_errors(f"building extrude {number} ({extrude.operation.value})"):
            added = extruded(extrude, booleans)
            match extrude.operation:
                case Operation.NEW | Operation.JOIN:
                    bodies = booleans.united([*bodies, *added], SOLID)
                case Operation.CUT:
                    bodies = booleans.cut(bodies, added, SOLID)
                case Operation.INTERSECT:
                    bodies = booleans.common(bodies, added, SOLID)
    with kernel_errors("measuring the solid"):
        return Solid(bodies)


# --- triangles ---------------------------------------------------------------------------------------------


def _triangulate(bodies: Sequence[TopoDS_Shape], deflection: float, angle: float) -> _Triangulation:
    shape = compound_of(bodies)
    vertices: list[FloatArray] = []
    faces: list[NDArray[np.int64]] = []
    body_V: list[NDArray[np.int64]] = []
    cylinder_F: list[NDArray[np.int64]] = []
    cylinders: list[_Cylinder] = []
    num_vertices = 0
    with kernel_errors("triangulating the solid"):
        size, volume = max(b - a for a, b in zip(*box_of(shape), strict=True)), total(bodies)
        BRepTools.Clean_s(shape)  # a triangulation that is there already is kept if it is finer
        BRepMesh_IncrementalMesh(shape, deflection * size, False, angle, False)
        for number, part in (
            (number, part) for number, body in enumerate(bodies) for part in parts(body, FACE)
        ):
            face = TopoDS.Face(part)
            corners = _face_triangles(face)
            if corners is None:
                continue
            vertices.append(corners[0])
            faces.append(corners[1] + num_vertices)
            num_vertices += len(corners[0])
            body_V.append(np.full(len(corners[0]), number))
            cylinder = _cylinder(face)
            cylinder_F.append(np.full(len(corners[1]), -1 if cylinder is None else len(cylinders)))
            cylinders += [] if cylinder is None else [cylinder]
    if not faces:
        raise CadError("the CAD kernel found no surface to triangulate")
    all_vertices, all_faces = np.concatenate(vertices), np.concatenate(faces)
    mesh, kept_F = _merged(all_vertices, all_faces, np.concatenate(body_V), tolerance=1e-6 * size)
    if not len(mesh.faces):
        raise CadError("the solid is too thin to triangulate")
    # Triangles that stay within the deflection of the surface can miss no more volume than this.
    slack = deflection * size * mesh.area
    if abs(mesh.volume - volume) > slack:
        raise CadError(
            f"the CAD kernel's triangles enclose a volume of {mesh.volume:g} where the solid has {volume:g}"
        )
    return _Triangulation(mesh, np.concatenate(cylinder_F)[kept_F], tuple(cylinders))


def _face_triangles(face: TopoDS_Face) -> tuple[FloatArray, NDArray[np.int64]] | None:
    """Vertices (V, 3) and outward triangles (F, 3) of a face; None where the kernel found none (a sliver)."""
    location = TopLoc_Location()
    triangulation = BRep_Tool.Triangulation_s(face, location)
    if triangulation is None or triangulation.NbTriangles() == 0:
        return None
    moved = location.Transformation()
    nodes = (triangulation.Node(i).Transformed(moved) for i in range(1, triangulation.NbNodes() + 1))
    vertices = np.array([(node.X(), node.Y(), node.Z()) for node in nodes])
    triangles = (
        np.array([triangle.Get() for triangle in triangulation.InternalTriangles()], dtype=np.int64) - 1
    )
    if face.Orientation() == TopAbs_Orientation.TopAbs_REVERSED:
        triangles = triangles[:, ::-1]
    return vertices, triangles


def _cylinder(face: TopoDS_Face) -> _Cylinder | None:
    surface = BRepAdaptor_Surface(face)
    if surface.GetType() != GeomAbs_SurfaceType.GeomAbs_Cylinder:
        return None
    cylinder = surface.Cylinder()
    point, axis = cylinder.Location(), cylinder.Axis().Direction()
    return _Cylinder(
        point=np.array([point.X(), point.Y(), point.Z()]),
        axis=np.array([axis.X(), axis.Y(), axis.Z()]),
        radius=cylinder.Radius(),
    )


def _merged(
    vertices: FloatArray, faces: NDArray[np.int64], body_V: NDArray[np.int64], tolerance: float
) -> tuple[Mesh, NDArray[np.bool_]]:
    """Give faces that meet the same vertices; also say which triangles remain ones.

    Bodies that only touch share nothing: an edge of both would have four faces, and neither were watertight.
    """
    apart = 2 * tolerance * body_V[:, None]
    pairs = cKDTree(np.hstack([vertices, apart])).query_pairs(tolerance, output_type="ndarray")
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(vertices), len(vertices)))
    _, label_V = connected_components(graph, directed=False)
    _, first_V = np.unique(label_V, return_index=True)
    faces = label_V[faces].astype(np.int64)
    kept_F = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    return Mesh(vertices[first_V], faces[kept_F]), kept_F
