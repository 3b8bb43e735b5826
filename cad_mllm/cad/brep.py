"""OpenCASCADE's shapes: sketches to faces, faces to prisms, prisms to bodies by boolean operations.

Everything here may raise what the kernel throws; callers wrap it in `kernel_errors`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from OCP.Bnd import Bnd_Box
from OCP.BOPAlgo import BOPAlgo_Tools
from OCP.BRep import BRep_Builder
from OCP.BRepAlgoAPI import (
    BRepAlgoAPI_BooleanOperation,
    BRepAlgoAPI_Common,
    BRepAlgoAPI_Cut,
    BRepAlgoAPI_Fuse,
)
from OCP.BRepBndLib import BRepBndLib
from OCP.BRepBuilderAPI import BRepBuilderAPI_MakeEdge, BRepBuilderAPI_MakeFace, BRepBuilderAPI_MakeVertex
from OCP.BRepCheck import BRepCheck_Analyzer
from OCP.BRepGProp import BRepGProp
from OCP.BRepPrimAPI import BRepPrimAPI_MakePrism
from OCP.collections import List_TopoDS_Shape
from OCP.gp import gp_Ax2, gp_Ax3, gp_Circ, gp_Dir, gp_Pln, gp_Pnt, gp_Vec
from OCP.GProp import GProp_GProps
from OCP.ShapeFix import ShapeFix_Face
from OCP.ShapeUpgrade import ShapeUpgrade_UnifySameDomain
from OCP.Standard import Standard_OutOfMemory
from OCP.TopAbs import TopAbs_ShapeEnum
from OCP.TopExp import TopExp_Explorer
from OCP.TopoDS import TopoDS_Compound, TopoDS_Edge, TopoDS_Face, TopoDS_Shape, TopoDS_Wire
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cad_mllm.cad.geometry import Box, arc_center, area, extent_range
from cad_mllm.cad.mesh import SELF_CROSSING, SLIVER, FloatArray, plane_frame
from cad_mllm.cad.program import Arc, Circle, Extrude, Loop, Profile, Vec2
from cad_mllm.errors import CadError

FLAT_SWEEP = 1e-5
"""An arc that turns by less is a line: its circle would be too large for the kernel's tolerances."""

CONFUSION = 1e-6
"""Shapes that are closer may touch: ten times what the kernel takes for one point."""

SOLID, FACE = TopAbs_ShapeEnum.TopAbs_SOLID, TopAbs_ShapeEnum.TopAbs_FACE


@contextmanager
def kernel_errors(doing: str) -> Iterator[None]:
    """Turn what OpenCASCADE throws into a CadError that says what was being done."""
    try:
        yield
    except Standard_OutOfMemory as error:
        raise MemoryError(f"out of memory while {doing}") from error
    except Exception as error:
        # In C++ they are all Standard_Failure; the Python classes have no base in common but where they live.
        if type(error).__module__.partition(".")[0] != "OCP":
            raise
        raise CadError(
            f"the CAD kernel failed while {doing}: {type(error).__name__} {error}".rstrip()
        ) from error


# --- booleans ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Booleans:
    """Boolean operations that take points closer than `fuzziness` (a length) for one point."""

    fuzziness: float

    @property
    def _reach(self) -> float:
        """How far apart boxes may be whose shapes touch: by the rounding of their sums, at the least."""
        return self.fuzziness + CONFUSION

    def united(self, shapes: Sequence[TopoDS_Shape], kind: TopAbs_ShapeEnum) -> list[TopoDS_Shape]:
        """The union of solids, or of faces in one plane; the kernel sees together only what may touch."""
        result: list[TopoDS_Shape] = []
        for cluster in _clusters(shapes, self._reach):
            several = len(cluster) > 1
            result += self._run(BRepAlgoAPI_Fuse(), cluster[:1], cluster[1:], kind) if several else cluster
        return result

    def cut(
        self, shapes: Sequence[TopoDS_Shape], tools: Sequence[TopoDS_Shape], kind: TopAbs_ShapeEnum
    ) -> list[TopoDS_Shape]:
        """What the tools leave of the shapes."""
        tool_boxes = [box_of(tool) for tool in tools]
        result: list[TopoDS_Shape] = []
        for shape in shapes:
            box = box_of(shape)
            near = [
                tool
                for tool, tool_box in zip(tools, tool_boxes, strict=True)
                if _meet(box, tool_box, self._reach)
            ]
            result += self._run(BRepAlgoAPI_Cut(), [shape], near, kind) if near else [shape]
        return result

    def common(
        self, shapes: Sequence[TopoDS_Shape], tools: Sequence[TopoDS_Shape], kind: TopAbs_ShapeEnum
    ) -> list[TopoDS_Shape]:
        """What the shapes share with the tools."""
        return self._run(BRepAlgoAPI_Common(), shapes, tools, kind) if shapes else []

    def _run(
        self,
        operation: BRepAlgoAPI_BooleanOperation,
        arguments: Sequence[TopoDS_Shape],
        tools: Sequence[TopoDS_Shape],
        kind: TopAbs_ShapeEnum,
    ) -> list[TopoDS_Shape]:
        """Run one operation over all arguments and tools at once: far cheaper than a chain of pairs."""
        operation.SetArguments(_list(arguments))
        operation.SetTools(_list(tools))
        operation.SetRunParallel(False)
        operation.SetFuzzyValue(self.fuzziness)
        operation.Build()
        if not operation.IsDone():
            raise CadError("a boolean operation of the CAD kernel failed")
        return _simplified(operation.Shape(), kind)


def _simplified(shape: TopoDS_Shape, kind: TopAbs_ShapeEnum) -> list[TopoDS_Shape]:
    """The parts, neighbours on one surface merged; as they were, should that have changed their measure."""
    unify = ShapeUpgrade_UnifySameDomain(shape, True, True, False)
    unify.Build()
    before, after = pieces(shape, kind), pieces(unify.Shape(), kind)
    return after if math.isclose(total(before), total(after), rel_tol=1e-6) else before


def _clusters(bodies: Sequence[TopoDS_Shape], reach: float) -> list[list[TopoDS_Shape]]:
    """Group shapes that are connected through boxes that meet; order is kept."""
    boxes = [box_of(body) for body in bodies]
    pairs = [(i, j) for i in range(len(bodies)) for j in range(i) if _meet(boxes[i], boxes[j], reach)]
    rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(bodies), len(bodies)))
    count, labels = connected_components(graph, directed=False)
    return [
        [body for body, label in zip(bodies, labels, strict=True) if label == group] for group in range(count)
    ]


def _meet(a: Box, b: Box, reach: float) -> bool:
    return all(a[0][i] <= b[1][i] + reach and b[0][i] <= a[1][i] + reach for i in range(3))


# --- sketches -> prisms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """The sketch plane, moved along its normal to where the extrusion begins."""

    origin: FloatArray
    x: FloatArray
    y: FloatArray
    normal: FloatArray

    def point(self, p: Vec2) -> gp_Pnt:
        return gp_Pnt(*(self.origin + p[0] * self.x + p[1] * self.y).tolist())

    def axes(self, center: Vec2 = (0.0, 0.0), *, flipped: bool = False) -> gp_Ax2:
        normal = -self.normal if flipped else self.normal
        return gp_Ax2(self.point(center), gp_Dir(*normal.tolist()), gp_Dir(*self.x.tolist()))


def extruded(extrude: Extrude, booleans: Booleans) -> list[TopoDS_Shape]:
    """The bodies of one feature: the union of its profiles in the sketch plane, as prisms."""
    low, high = extent_range(extrude.extent)
    origin, x, y, normal = plane_frame(extrude.plane)
    frame = _Frame(origin + low * normal, x, y, normal)
    along = gp_Vec(*((high - low) * normal).tolist())
    faces = booleans.united(
        [face for profile in extrude.profiles for face in _region(profile, frame, booleans)], FACE
    )
    if not faces:
        raise CadError("the extrude's sketch encloses no area")
    return [body for face in faces for body in pieces(BRepPrimAPI_MakePrism(face, along).Shape(), SOLID)]


def _region(profile: Profile, frame: _Frame, booleans: Booleans) -> list[TopoDS_Shape]:
    """The faces of a profile: one as a rule, none if it encloses no area, several if its holes divide it."""
    face = _face((profile.outer, *profile.holes), frame)
    if _is_sound(face, abs(area(profile.outer)) - sum(abs(area(hole)) for hole in profile.holes)):
        return [face]
    outer = _inside(profile.outer, frame)
    holes = [face for hole in profile.holes for face in _inside(hole, frame)]
    return booleans.cut(outer, holes, FACE) if outer and holes else outer


def _inside(loop: Loop, frame: _Frame) -> list[TopoDS_Shape]:
    """The face inside one loop, or none if it encloses no area.

    Rounded coordinates make arcs graze the lines that they should touch: the slivers which that cuts off are
    dropped. Raises CadError for a loop that divides itself into regions worth the name.
    """
    face = _face((loop,), frame)
    if _is_sound(face, abs(area(loop))):
        return [face]
    wires, faces = TopoDS_Compound(), TopoDS_Compound()
    BOPAlgo_Tools.EdgesToWires_s(compound_of(_edges(loop, frame)), wires)
    BOPAlgo_Tools.WiresToFaces_s(wires, faces)
    regions = sorted(pieces(faces, FACE), key=_measure, reverse=True) if not faces.IsNull() else []
    if len(regions) > 1 and _measure(regions[1]) > SLIVER * _measure(regions[0]):
        raise CadError(SELF_CROSSING)
    return regions[:1]


def _is_sound(face: TopoDS_Face, expected_area: float) -> bool:
    return (
        expected_area > 0
        and math.isclose(_measure(face), expected_area, rel_tol=1e-4)
        and bool(BRepCheck_Analyzer(face).IsValid())
    )


def _face(loops: Sequence[Loop], frame: _Frame) -> TopoDS_Face:
    """The face inside the first loop and outside the others, if they nest as they should."""
    maker = BRepBuilderAPI_MakeFace(gp_Pln(gp_Ax3(frame.axes())), _wire(loops[0], frame), True)
    for hole in loops[1:]:
        maker.Add(_wire(hole, frame))
    fixer = ShapeFix_Face(maker.Face())
    fixer.FixOrientation()
    return fixer.Face()


def _wire(loop: Loop, frame: _Frame) -> TopoDS_Wire:
    """The loop's edges in their order, one after the other: nothing is left for the kernel to guess."""
    builder, wire = BRep_Builder(), TopoDS_Wire()
    builder.MakeWire(wire)
    for edge in _edges(loop, frame):
        builder.Add(wire, edge)
    wire.Closed(True)
    return wire


def _edges(loop: Loop, frame: _Frame) -> list[TopoDS_Edge]:
    """Edges that share their vertices, so that the loop is closed by construction."""
    if isinstance(loop, Circle):
        if not loop.radius > 0:
            raise CadError(f"a circle needs a radius above 0, not {loop.radius:g}")
        return [BRepBuilderAPI_MakeEdge(gp_Circ(frame.axes(loop.center), loop.radius)).Edge()]
    segments = []
    start = loop.start
    for segment in loop.segments:
        if segment.end != start:  # a segment without length bounds nothing
            segments.append((start, segment))
        start = segment.end
    vertices = [BRepBuilderAPI_MakeVertex(frame.point(start)).Vertex() for start, _ in segments]
    edges = []
    for index, (start, segment) in enumerate(segments):
        ends = vertices[index], vertices[(index + 1) % len(segments)]
        if isinstance(segment, Arc) and abs(segment.sweep) > FLAT_SWEEP:
            center = arc_center(start, segment)
            axes = frame.axes(center, flipped=segment.sweep < 0)
            maker = BRepBuilderAPI_MakeEdge(gp_Circ(axes, math.dist(center, start)), *ends)
        else:
            maker = BRepBuilderAPI_MakeEdge(*ends)
        edges.append(maker.Edge())
    return edges


# --- shapes ------------------------------------------------------------------------------------------------


def _list(shapes: Sequence[TopoDS_Shape]) -> List_TopoDS_Shape:
    result = List_TopoDS_Shape()
    for shape in shapes:
        result.Append(shape)
    return result


def compound_of(shapes: Sequence[TopoDS_Shape]) -> TopoDS_Compound:
    """The shapes side by side in one."""
    builder, compound = BRep_Builder(), TopoDS_Compound()
    builder.MakeCompound(compound)
    for shape in shapes:
        builder.Add(compound, shape)
    return compound


def parts(shape: TopoDS_Shape, kind: TopAbs_ShapeEnum) -> Iterator[TopoDS_Shape]:
    """Everything of that kind in a shape."""
    explorer = TopExp_Explorer(shape, kind)
    while explorer.More():
        yield explorer.Current()
        explorer.Next()


def pieces(shape: TopoDS_Shape, kind: TopAbs_ShapeEnum) -> list[TopoDS_Shape]:
    """The solids (turned so that normals point outward) or faces in a shape, those of measure 0 left out."""
    measured = ((part, _measure(part)) for part in parts(shape, kind))
    return [part if measure > 0 else part.Reversed() for part, measure in measured if measure != 0]


def _measure(shape: TopoDS_Shape) -> float:
    """Volume of a solid (negative if it is inside out), area of a face."""
    properties = GProp_GProps()
    if shape.ShapeType() == FACE:
        BRepGProp.SurfaceProperties_s(shape, properties)
    else:
        BRepGProp.VolumeProperties_s(shape, properties)
    return float(properties.Mass())


def total(shapes: Sequence[TopoDS_Shape]) -> float:
    """Sum of the shapes' volumes or areas."""
    return sum(_measure(shape) for shape in shapes)


def box_of(shape: TopoDS_Shape) -> Box:
    """Smallest and largest corner of the exact geometry."""
    box = Bnd_Box()
    BRepBndLib.AddOptimal_s(shape, box, False, False)
    low, high = box.CornerMin(), box.CornerMax()
    return (low.X(), low.Y(), low.Z()), (high.X(), high.Y(), high.Z())
