"""Omni-CAD JSON (the layout of DeepCAD and of the Fusion 360 Gallery) to `CadProgram` and back.

What the files really hold, as measured on real ones, and what is made of it here:

- `is_outer` is true on every loop. Which loop is a hole follows from containment, even-odd: a loop inside a
  loop is a hole, a loop inside a hole is a profile of its own.
- The curves of a loop are neither in order nor in one direction: they are chained by their end points.
- An arc's points are `center + radius * (cos t * r + sin t * r')` with t from `start_angle` to `end_angle`,
  r = `reference_vector` and r' = r turned counter-clockwise *in the sketch*. `normal` has no say (it is given
  in space, and where it opposes the sketch's normal the points still turn counter-clockwise), and
  `start_point` and `end_point` are swapped in half of the arcs.
- `SymmetricFeatureExtentType` reaches `extent_one` to *both* sides (twice that in all): this is what the
  bounding boxes in the files agree with. `extent_two` counts for `TwoSidesFeatureExtentType` alone.
- Sketches that no feature uses, features without profiles and profiles named twice change nothing: they are
  skipped. So are cuts and intersections before anything stands. A first Join is a New.
- Profiles of one feature that lie in different planes become one extrude per plane, with the same operation.
- `properties.bounding_box` is often wrong and is not read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from cad_mllm.cad.geometry import along, arc_center, cross, dot, extent_range, program_box, unit, y_axis
from cad_mllm.cad.jsonfile import as_mapping, choice, elements, load, mapping, number, shown, text, vector
from cad_mllm.cad.loops import OpenCurve, chain, nest
from cad_mllm.cad.program import (
    Arc,
    CadProgram,
    Circle,
    Extent,
    ExtentType,
    Extrude,
    Line,
    Loop,
    Operation,
    Plane,
    Profile,
    Vec2,
    Vec3,
)
from cad_mllm.errors import CadError

MAX_FEATURES = 1_000
"""Most extrude features of a model."""
MAX_CURVES = 10_000
"""Most curves that the features of a model use, counted once per use."""
MAX_LOOPS = 512
"""Most loops of one profile."""

_OPERATIONS = {
    "NewBodyFeatureOperation": Operation.NEW,
    "JoinFeatureOperation": Operation.JOIN,
    "CutFeatureOperation": Operation.CUT,
    "IntersectFeatureOperation": Operation.INTERSECT,
}
_EXTENT_TYPES = {
    "OneSideFeatureExtentType": ExtentType.ONE_SIDE,
    "TwoSidesFeatureExtentType": ExtentType.TWO_SIDES,
    "SymmetricFeatureExtentType": ExtentType.SYMMETRIC,
}
_SKETCH, _EXTRUDE = "Sketch", "ExtrudeFeature"
_START_AT_PLANE = "ProfilePlaneStartDefinition"
_DISTANCE = "DistanceExtentDefinition"
_UNIT_TOLERANCE = 1e-2
"""How far the length of an axis or a reference vector may be off 1."""
_PLANAR_TOLERANCE = 1e-3
"""How far a point may leave its sketch plane, relative to its distance from the origin."""
_RADIUS_TOLERANCE = 1e-2
"""How far an arc's ends may be off its radius, relative to it."""
_ANGLE_TOLERANCE = 0.1
"""How far an arc's ends may be off its angles, radians."""
_FULL_TURN = 1e-6
"""Closer than this to a full turn, an arc is a circle, radians."""
_SAME_ANGLE = 1e-3
"""Closer than this, the sweep is the file's own figure: exact for a quarter, a half."""


def read(path: FilePath) -> CadProgram:
    """Parse the Omni-CAD JSON file at `path`. Raises CadError, naming the file, for whatever is wrong."""
    try:
        return parse(load(path))
    except CadError as error:
        raise CadError(f"{path}: {error}") from error


def parse(data: Mapping[str, object]) -> CadProgram:
    """The program that an Omni-CAD JSON object describes (see the head of this module for the reading).

    Raises CadError, and nothing else, for whatever is not such an object: the message names the feature.
    """
    entities = mapping(as_mapping(data, "the model"), "entities", "the model")
    sequence = elements(data, "sequence", "the model")
    reader = _Reader(entities)
    extrudes: list[Extrude] = []
    features = 0
    for place, item in enumerate(sequence):
        where = f"step {place} of the sequence"
        step = as_mapping(item, where)
        kind, entity = text(step, "type", where), text(step, "entity", where)
        if kind == _SKETCH:
            _entity(entities, entity, kind, where)  # what is in it counts where a feature uses it
            continue
        if kind != _EXTRUDE:
            raise CadError(f"{where} is a {shown(kind)}: only sketches and extrudes are supported")
        features += 1
        if features > MAX_FEATURES:
            raise CadError(f"the model has more than {MAX_FEATURES} extrude features")
        extrudes += reader.feature(entity)
    return CadProgram(_standing(extrudes))


def _entity(entities: Mapping[str, object], name: str, kind: str, where: str) -> Mapping[str, object]:
    if name not in entities:
        raise CadError(f"{where}: the model has no entity {shown(name)}")
    entity = mapping(entities, name, where)
    if text(entity, "type", where) != kind:
        raise CadError(f"{where}: {shown(name)} is not of the type {kind}")
    return entity


def _standing(extrudes: list[Extrude]) -> tuple[Extrude, ...]:
    """Begin with the first feature that adds a body, as New."""
    for place, extrude in enumerate(extrudes):
        if extrude.operation in (Operation.NEW, Operation.JOIN):
            first = Extrude(extrude.plane, extrude.profiles, extrude.extent, Operation.NEW)
            return (first, *extrudes[place + 1 :])
    raise CadError("the model builds nothing: it needs an extrude feature (New or Join) with a profile")


@dataclass
class _Reader:
    """Reads features, and counts the curves that they use."""

    entities: Mapping[str, object]
    curves: int = 0

    def feature(self, entity: str) -> list[Extrude]:
        """The extrudes of one feature: none without profiles, several if it uses several planes."""
        where = f"feature {shown(entity)}"
        feature = _entity(self.entities, entity, _EXTRUDE, where)
        name = feature.get("name")
        if isinstance(name, str):
            where = f"feature {shown(name)} ({shown(entity)})"
        operation = choice(feature, "operation", _OPERATIONS, where)
        by_plane: dict[Plane, list[Profile]] = {}
        for sketch, profile in self._profile_names(feature, where):
            plane, profiles = self._profile(sketch, profile, where)
            by_plane.setdefault(plane, []).extend(profiles)
        by_plane = {plane: profiles for plane, profiles in by_plane.items() if profiles}
        if not by_plane:
            return []
        if operation is Operation.INTERSECT and len(by_plane) > 1:
            raise CadError(f"{where} intersects with profiles of several planes: that is not supported")
        extent = _extent(feature, where)
        return [Extrude(plane, tuple(profiles), extent, operation) for plane, profiles in by_plane.items()]

    def _profile_names(self, feature: Mapping[str, object], where: str) -> list[tuple[str, str]]:
        named: dict[tuple[str, str], None] = {}
        for item in elements(feature, "profiles", where):
            reference = as_mapping(item, f"a profile of {where}")
            named[text(reference, "sketch", where), text(reference, "profile", where)] = None
        return list(named)

    def _profile(self, sketch_name: str, profile_name: str, where: str) -> tuple[Plane, list[Profile]]:
        where = f"{where}, sketch {shown(sketch_name)}"
        sketch = _entity(self.entities, sketch_name, _SKETCH, where)
        plane = _plane(mapping(sketch, "transform", where), where)
        where = f"{where}, profile {shown(profile_name)}"
        profiles = mapping(sketch, "profiles", where)
        loops = elements(mapping(profiles, profile_name, where), "loops", where)
        if not loops:
            raise CadError(f"{where} has no loops")
        if len(loops) > MAX_LOOPS:
            raise CadError(f"{where} has {len(loops)} loops: at most {MAX_LOOPS} are supported")
        found: list[Loop] = []
        for loop in loops:
            found += self._loops(elements(as_mapping(loop, where), "profile_curves", where), where)
        try:
            return plane, nest(found)
        except CadError as error:
            raise CadError(f"{where}: {error}") from error

    def _loops(self, curves: list[object], where: str) -> list[Loop]:
        if not curves:
            raise CadError(f"{where} has a loop without curves")
        self.curves += len(curves)
        if self.curves > MAX_CURVES:
            raise CadError(f"{where}: the model uses more than {MAX_CURVES} curves")
        read_curves = [_curve(as_mapping(curve, where), where) for curve in curves]
        circles: list[Loop] = [curve for curve in read_curves if isinstance(curve, Circle)]
        try:
            return circles + chain([curve for curve in read_curves if isinstance(curve, OpenCurve)])
        except CadError as error:
            raise CadError(f"{where}: {error}") from error


def _curve(curve: Mapping[str, object], where: str) -> Circle | OpenCurve:
    match text(curve, "type", where):
        case "Line3D":
            return OpenCurve(_point(curve, "start_point", where), _point(curve, "end_point", where))
        case "Circle3D":
            return Circle(_point(curve, "center_point", where), _radius(curve, where))
        case "Arc3D":
            return _arc(curve, where)
        case other:
            raise CadError(
                f"{where} has a curve of the type {shown(other)}: only lines, arcs and circles are supported"
            )


def _arc(curve: Mapping[str, object], where: str) -> Circle | OpenCurve:
    start, end = _point(curve, "start_point", where), _point(curve, "end_point", where)
    center, radius = _point(curve, "center_point", where), _radius(curve, where)
    first, last = number(curve, "start_angle", where), number(curve, "end_angle", where)
    reference = _point(curve, "reference_vector", where)
    turn = abs(last - first)
    if abs(math.hypot(*reference) - 1) > _UNIT_TOLERANCE:
        raise CadError(f"{where} has an arc whose reference vector is no unit vector in the sketch")
    if max(abs(math.dist(p, center) - radius) for p in (start, end)) > _RADIUS_TOLERANCE * radius:
        raise CadError(
            f"{where} has an arc whose end points are not at its radius {radius:g} from its centre"
        )
    if abs(turn - 2 * math.pi) < _FULL_TURN and math.dist(start, end) < _RADIUS_TOLERANCE * radius:
        return Circle(center, radius)
    at_start = _angle(center, start)
    to_end = (_angle(center, end) - at_start) % (2 * math.pi)
    to_middle = (math.atan2(reference[1], reference[0]) + (first + last) / 2 - at_start) % (2 * math.pi)
    # The end points may be swapped: the middle of the arc tells on which side of the chord it runs.
    sweep = to_end if to_middle < to_end else to_end - 2 * math.pi
    if abs(abs(sweep) - turn) > _ANGLE_TOLERANCE:
        raise CadError(
            f"{where} has an arc of {turn:.4g} radians whose end points are {abs(sweep):.4g} apart"
        )
    if abs(to_middle - sweep / 2 % (2 * math.pi)) > _ANGLE_TOLERANCE:
        raise CadError(f"{where} has an arc whose end points are not where its angles put them")
    if abs(abs(sweep) - turn) < _SAME_ANGLE:
        sweep = math.copysign(turn, sweep)
    return OpenCurve(start, end, sweep)


def _angle(center: Vec2, point: Vec2) -> float:
    return math.atan2(point[1] - center[1], point[0] - center[0])


def _radius(curve: Mapping[str, object], where: str) -> float:
    radius = number(curve, "radius", where)
    if radius <= 0:
        raise CadError(f"{where} has a curve of radius {radius:g}: it must be above 0")
    return radius


def _plane(transform: Mapping[str, object], where: str) -> Plane:
    origin = vector(transform, "origin", where)
    try:
        given = [vector(transform, axis, where) for axis in ("x_axis", "y_axis", "z_axis")]
        x, y, normal = (unit(axis) for axis in given)
        if abs(dot(x, normal)) > 1e-12:
            x = unit(along(x, (normal, -dot(x, normal))))
    except CadError as error:
        raise CadError(f"{where}: {error}") from error
    if any(abs(math.hypot(*axis) - 1) > _UNIT_TOLERANCE for axis in given):
        raise CadError(f"{where} has axes that are not of length 1: scaled sketches are not supported")
    if abs(dot(x, y)) > 1e-2 or dot(cross(normal, x), y) < 0.99:
        raise CadError(f"{where} has axes that are no right-handed frame: y must be z x x")
    return Plane(origin, x, normal)


def _extent(feature: Mapping[str, object], where: str) -> Extent:
    if "start_extent" in feature:
        start = text(mapping(feature, "start_extent", where), "type", where)
        if start != _START_AT_PLANE:
            raise CadError(f"{where} starts at {shown(start)}: only a start at the sketch plane is supported")
    kind = choice(feature, "extent_type", _EXTENT_TYPES, where)
    one = _distance(feature, "extent_one", where)
    two = _distance(feature, "extent_two", where) if kind is ExtentType.TWO_SIDES else 0.0
    extent = Extent(kind, one, two)
    try:
        extent_range(extent)
    except CadError as error:
        raise CadError(f"{where}: {error}") from error
    return extent


def _distance(feature: Mapping[str, object], key: str, where: str) -> float:
    extent = mapping(feature, key, where)
    if "type" in extent and (kind := text(extent, "type", where)) != _DISTANCE:
        raise CadError(f"{where} has an {key} of the type {shown(kind)}: only distances are supported")
    if "taper_angle" in extent:
        taper = number(mapping(extent, "taper_angle", where), "value", where)
        if abs(taper) > 1e-9:
            raise CadError(f"{where} is tapered by {taper:g} radians: tapered extrudes are not supported")
    return number(mapping(extent, "distance", where), "value", where)


def _point(data: Mapping[str, object], key: str, where: str) -> Vec2:
    """A point in the sketch's frame: its z is 0 but for rounding, and not used."""
    x, y, z = vector(data, key, where)
    if abs(z) > _PLANAR_TOLERANCE * max(abs(x), abs(y), abs(z)) and abs(z) > 1e-5:
        raise CadError(f"{shown(key)} of {where} is {z:g} off its sketch plane: sketches must be planar")
    return x, y


def to_json(program: CadProgram) -> dict[str, object]:
    """The program as an Omni-CAD JSON object, in the layout of real files: a sketch and a feature per
    extrude.

    `parse` takes it back to the same solid. Raises CadError for an extrude without volume.
    """
    entities: dict[str, object] = {}
    sequence: list[dict[str, object]] = []
    for place, extrude in enumerate(program.extrudes, start=1):
        sketch, feature = f"Sketch_{place}", f"Extrude_{place}"
        entities[sketch] = _sketch_json(extrude, f"Sketch {place}")
        entities[feature] = _feature_json(extrude, f"Extrude {place}", sketch)
        sequence.append({"index": len(sequence), "type": _SKETCH, "entity": sketch})
        sequence.append({"index": len(sequence), "type": _EXTRUDE, "entity": feature})
    low, high = program_box(program)
    box = {"type": "BoundingBox3D", "min_point": _xyz(low), "max_point": _xyz(high)}
    return {"entities": entities, "properties": {"bounding_box": box}, "sequence": sequence}


def _xyz(vector: Vec3) -> dict[str, object]:
    return {"x": vector[0], "y": vector[1], "z": vector[2]}


def _xy0(point: Vec2) -> dict[str, object]:
    return _xyz((point[0], point[1], 0.0))


def _sketch_json(extrude: Extrude, name: str) -> dict[str, object]:
    plane = extrude.plane
    axes = {
        "origin": _xyz(plane.origin),
        "x_axis": _xyz(plane.x_axis),
        "y_axis": _xyz(y_axis(plane)),
        "z_axis": _xyz(plane.normal),
    }
    profiles = {
        f"Profile_{place}": {
            "loops": [
                {"is_outer": loop is profile.outer, "profile_curves": _curves_json(loop, plane.normal)}
                for loop in (profile.outer, *profile.holes)
            ],
            "properties": {},
        }
        for place, profile in enumerate(extrude.profiles, start=1)
    }
    return {"type": _SKETCH, "name": name, "profiles": profiles, "transform": axes, "reference_plane": {}}


def _curves_json(loop: Loop, normal: Vec3) -> list[dict[str, object]]:
    if isinstance(loop, Circle):
        circle = {"center_point": _xy0(loop.center), "radius": loop.radius, "normal": _xyz(normal)}
        return [{"type": "Circle3D", "curve": "Curve_1", **circle}]
    curves: list[dict[str, object]] = []
    here = loop.start
    for place, segment in enumerate(loop.segments, start=1):
        ends = {"curve": f"Curve_{place}", "start_point": _xy0(here), "end_point": _xy0(segment.end)}
        match segment:
            case Line():
                curves.append({"type": "Line3D", **ends})
            case Arc():
                curves.append({"type": "Arc3D", **ends, **_arc_json(here, segment, normal)})
        here = segment.end
    return curves


def _arc_json(start: Vec2, arc: Arc, normal: Vec3) -> dict[str, object]:
    """Angles count counter-clockwise from the end where a counter-clockwise run would begin."""
    center = arc_center(start, arc)
    begin = start if arc.sweep > 0 else arc.end
    radius = math.dist(center, begin)
    return {
        "center_point": _xy0(center),
        "radius": radius,
        "normal": _xyz(normal),
        "start_angle": 0.0,
        "end_angle": abs(arc.sweep),
        "reference_vector": _xy0(((begin[0] - center[0]) / radius, (begin[1] - center[1]) / radius)),
    }


def _feature_json(extrude: Extrude, name: str, sketch: str) -> dict[str, object]:
    extent_range(extrude.extent)
    operations = {operation: text for text, operation in _OPERATIONS.items()}
    extent_types = {kind: text for text, kind in _EXTENT_TYPES.items()}
    profiles = [{"profile": f"Profile_{i}", "sketch": sketch} for i in range(1, len(extrude.profiles) + 1)]
    return {
        "type": _EXTRUDE,
        "name": name,
        "profiles": profiles,
        "operation": operations[extrude.operation],
        "start_extent": {"type": _START_AT_PLANE},
        "extent_type": extent_types[extrude.extent.type],
        "extent_one": _distance_json(extrude.extent.one, "AlongDistance", "TaperAngle"),
        "extent_two": _distance_json(extrude.extent.two, "AgainstDistance", "Side2TaperAngle"),
    }


def _distance_json(distance: float, role: str, taper_role: str) -> dict[str, object]:
    def parameter(value: float, role: str) -> dict[str, object]:
        return {"type": "ModelParameter", "name": "none", "role": role, "value": value}

    return {
        "type": _DISTANCE,
        "distance": parameter(distance, role),
        "taper_angle": parameter(0.0, taper_role),
    }
