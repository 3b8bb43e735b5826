"""Omni-CAD JSON: what its files mean, that both ways agree, and that bad ones raise CadError alone."""

import copy
import gc
import json
import math
import random
import time
from pathlib import Path as FilePath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cad_mllm.cad import jsonfile, omnicad
from cad_mllm.cad.geometry import area, extrude_box, program_box
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import Arc, CadProgram, Circle, Extent, ExtentType, Extrude, Line, Operation, Path
from cad_mllm.errors import CadError
from tests.cad.strategies import programs

REAL = FilePath(__file__).parents[1] / "data" / "omnicad" / "json"
REAL_FILES = sorted(REAL.glob("*/*.json"))


def xyz(x: float, y: float, z: float = 0.0) -> dict[str, float]:
    return {"x": x, "y": y, "z": z}


def line(a: tuple[float, float], b: tuple[float, float]) -> dict[str, Any]:
    return {"type": "Line3D", "start_point": xyz(*a), "end_point": xyz(*b)}


def circle(x: float, y: float, radius: float) -> dict[str, Any]:
    return {"type": "Circle3D", "center_point": xyz(x, y), "radius": radius, "normal": xyz(0, 0, 1)}


def arc(
    a: tuple[float, float],
    b: tuple[float, float],
    center: tuple[float, float],
    reference: tuple[float, float],
    turn: float,
    normal_z: float = 1.0,
) -> dict[str, Any]:
    return {
        "type": "Arc3D",
        "start_point": xyz(*a),
        "end_point": xyz(*b),
        "center_point": xyz(*center),
        "radius": math.dist(a, center),
        "normal": xyz(0, 0, normal_z),
        "start_angle": 0.0,
        "end_angle": turn,
        "reference_vector": xyz(*reference),
    }


SQUARE = [line((0, 0), (4, 0)), line((4, 0), (4, 4)), line((4, 4), (0, 4)), line((0, 4), (0, 0))]


def model(*loops: list[dict[str, Any]], **feature: Any) -> dict[str, Any]:
    """One feature that extrudes one profile of these loops by 1."""
    profile = {"loops": [{"is_outer": True, "profile_curves": curves} for curves in loops], "properties": {}}
    transform = {
        "origin": xyz(0, 0),
        "x_axis": xyz(1, 0),
        "y_axis": xyz(0, 1),
        "z_axis": xyz(0, 0, 1),
    }
    extrude = {
        "type": "ExtrudeFeature",
        "name": "Extrude 1",
        "profiles": [{"profile": "p", "sketch": "s"}],
        "operation": "NewBodyFeatureOperation",
        "start_extent": {"type": "ProfilePlaneStartDefinition"},
        "extent_type": "OneSideFeatureExtentType",
        "extent_one": distance(1.0),
        "extent_two": distance(0.0),
    }
    return {
        "entities": {
            "s": {"type": "Sketch", "name": "Sketch 1", "profiles": {"p": profile}, "transform": transform},
            "e": extrude | feature,
        },
        "properties": {},
        "sequence": [
            {"index": 0, "type": "Sketch", "entity": "s"},
            {"index": 1, "type": "ExtrudeFeature", "entity": "e"},
        ],
    }


def distance(value: float, taper: float = 0.0) -> dict[str, Any]:
    return {"type": "DistanceExtentDefinition", "distance": {"value": value}, "taper_angle": {"value": taper}}


def only_extrude(data: dict[str, Any]) -> Extrude:
    (extrude,) = omnicad.parse(data).extrudes
    return extrude


def areas(program: CadProgram) -> list[float]:
    return [
        sum(abs(area(p.outer)) - sum(abs(area(hole)) for hole in p.holes) for p in extrude.profiles)
        for extrude in program.extrudes
    ]


# --- loops ------------------------------------------------------------------------------------------------


def test_curves_in_any_order_and_direction_make_one_closed_path():
    a, _, c, d = SQUARE
    backwards = line((4, 4), (4, 0))
    (profile,) = only_extrude(model([a, c, backwards, d])).profiles
    assert isinstance(profile.outer, Path)
    assert profile.outer.segments[-1].end == profile.outer.start
    assert abs(area(profile.outer)) == pytest.approx(16)


def test_small_gaps_are_closed_exactly_and_large_ones_are_an_error():
    almost = [line((0, 0), (4, 0)), line((4.001, 0), (4, 4)), line((4, 4), (0, 4.001)), line((0, 4), (0, 0))]
    (profile,) = only_extrude(model(almost)).profiles
    assert isinstance(profile.outer, Path)
    assert profile.outer.segments[-1].end == profile.outer.start
    with pytest.raises(CadError, match=r"'Extrude 1'.*open.*gap"):
        omnicad.parse(model(SQUARE[:3]))


def test_loops_that_touch_in_a_point_are_two_loops():
    second = [line((4, 4), (8, 4)), line((8, 4), (8, 8)), line((8, 8), (4, 8)), line((4, 8), (4, 4))]
    profiles = only_extrude(model(second + SQUARE)).profiles
    assert [abs(area(p.outer)) for p in profiles] == [pytest.approx(16)] * 2


def test_which_loop_is_a_hole_follows_from_containment_not_from_is_outer():
    disc, island = [circle(2, 2, 1.5)], [circle(2, 2, 0.5)]
    profiles = only_extrude(model(disc, island, SQUARE)).profiles
    by_area = {round(abs(area(p.outer)), 3): p.holes for p in profiles}
    assert set(by_area) == {16.0, round(math.pi / 4, 3)}  # a loop in a hole is a profile of its own
    assert by_area[16.0] == (Circle((2.0, 2.0), 1.5),)
    assert by_area[round(math.pi / 4, 3)] == ()


def test_a_hole_may_touch_the_outer_loop():
    (profile,) = only_extrude(model([circle(1, 2, 1)], SQUARE)).profiles
    assert abs(area(profile.outer)) == pytest.approx(16)
    assert profile.holes == (Circle((1.0, 2.0), 1.0),)


def test_a_curve_that_is_given_twice_counts_once():
    again = [SQUARE[1], line((4, 4), (4, 0)), SQUARE[0]]
    for curves in (SQUARE + again, again + SQUARE, SQUARE + SQUARE):
        (profile,) = only_extrude(model(curves)).profiles
        assert abs(area(profile.outer)) == pytest.approx(16)
    (profile,) = only_extrude(model([circle(2, 2, 1), circle(2, 2, 1)])).profiles
    assert profile.outer == Circle((2.0, 2.0), 1.0)


def test_a_line_out_to_nowhere_and_back_bounds_nothing():
    spike = [line((4, 4), (5, 5)), line((5, 5), (6, 6)), line((6, 6), (5, 5)), line((5, 5), (4, 4))]
    assert only_extrude(model(SQUARE + spike)) == only_extrude(model(SQUARE))
    with pytest.raises(CadError, match="open"):
        omnicad.parse(model(SQUARE + spike[:2]))


def test_a_loop_that_is_given_twice_counts_once():
    disc = [circle(2, 2, 1)]
    turned = [*SQUARE[2:], line((4, 0), (0, 0)), SQUARE[1]]
    assert only_extrude(model(SQUARE, disc, turned, disc)) == only_extrude(model(SQUARE, disc))


@pytest.mark.filterwarnings("error")
def test_a_side_that_rises_by_next_to_nothing_is_level():
    tilted = [line((0, 0), (4, 5e-324)), line((4, 5e-324), (4, 4)), *SQUARE[2:]]
    (profile,) = only_extrude(model(tilted, [circle(2, 2, 1)])).profiles
    assert len(profile.holes) == 1


def test_loops_that_cross_are_an_error():
    shifted = [line((2, 2), (6, 2)), line((6, 2), (6, 6)), line((6, 6), (2, 6)), line((2, 6), (2, 2))]
    for loops in ((SQUARE, shifted), (SQUARE, [circle(4, 2, 1)]), ([circle(0, 0, 1)], [circle(1, 0, 1)])):
        with pytest.raises(CadError, match=r"'Extrude 1'.*cross"):
            omnicad.parse(model(*loops))


def test_ten_times_as_many_curves_with_gaps_take_about_ten_times_as_long_to_chain():
    rng = random.Random(0)

    def seconds_to_chain(count: int) -> float:
        """Of this process, without the collector's walks through what other tests left."""

        def corner(i: int) -> tuple[float, float]:
            turn = i % count / count * 2 * math.pi
            return math.cos(turn) + rng.random() * 1e-9, math.sin(turn) + rng.random() * 1e-9

        curves = [line(corner(i), corner(i + 1)) for i in range(count)]
        rng.shuffle(curves)
        gc.disable()
        begin = time.process_time()
        (profile,) = only_extrude(model(curves)).profiles
        taken = time.process_time() - begin
        gc.enable()
        assert abs(area(profile.outer)) == pytest.approx(math.pi, rel=1e-4)
        return taken

    # Each compared with each other would be a hundred times as long.
    assert seconds_to_chain(9000) < 30 * seconds_to_chain(900)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("normal_z", [1.0, -1.0])
def test_an_arc_turns_counter_clockwise_from_its_reference_whatever_its_normal_and_end_points(
    swapped: bool, normal_z: float
):
    ends = [(4.0, 0.0), (0.0, 4.0)]
    quarter = arc(*(reversed(ends) if swapped else ends), (0, 0), (1, 0), math.pi / 2, normal_z)  # type: ignore[arg-type]
    (profile,) = only_extrude(model([line((0, 0), (4, 0)), line((0, 4), (0, 0)), quarter])).profiles
    assert abs(area(profile.outer)) == pytest.approx(4 * math.pi)


def test_the_reference_vector_tells_one_half_circle_from_the_other():
    chord = line((1, 0), (-1, 0))
    upper = only_extrude(model([chord, arc((-1, 0), (1, 0), (0, 0), (1, 0), math.pi)]))
    lower = only_extrude(model([chord, arc((-1, 0), (1, 0), (0, 0), (-1, 0), math.pi)]))
    assert extrude_box(upper)[1][1] == pytest.approx(1)
    assert extrude_box(lower)[0][1] == pytest.approx(-1)


def test_a_long_arc_goes_the_long_way_round():
    long = arc((1, 0), (0, 1), (0, 0), (0, 1), 1.5 * math.pi)
    (profile,) = only_extrude(model([long, line((1, 0), (0, 1))])).profiles
    assert abs(area(profile.outer)) == pytest.approx(0.75 * math.pi + 0.5)


def test_arcs_that_make_up_a_circle_are_a_circle():
    halves = [arc((1, 0), (-1, 0), (0, 0), (1, 0), math.pi), arc((-1, 0), (1, 0), (0, 0), (-1, 0), math.pi)]
    whole = [arc((1, 0), (1, 0), (0, 0), (1, 0), 2 * math.pi)]
    for curves in (halves, whole):
        (profile,) = only_extrude(model(curves)).profiles
        assert isinstance(profile.outer, Circle)
        assert profile.outer.radius == pytest.approx(1)


@pytest.mark.parametrize(
    "curve, message",
    [
        ({"type": "NurbsCurve3D"}, "NurbsCurve3D"),
        (circle(0, 0, 0), "radius"),
        (arc((1, 0), (0, 1), (0, 0), (1, 0), math.pi), "radians"),
        (arc((1, 0), (0, 2), (0, 0), (1, 0), math.pi / 2), "not at its radius"),
        (arc((1, 0), (0, 1), (0, 0), (1, 0), 2 * math.pi), "radians"),
        (arc((1, 0), (1, 0), (0, 0), (1, 0), 4 * math.pi), "radians"),
        (arc((1, 0), (0, 1), (0, 0), (0, 0), math.pi / 2), "reference vector"),
        (arc((1, 0), (0, 1), (0, 0), (0.8, 0.6), math.pi / 2), "angles"),
        (arc((1, 0), (0, 1), (0, 0), (9, 0), math.pi / 2), "reference vector"),
        (line((0, 0), (1, float("nan"))), "number"),
        (line((0, 0), (1, True)), "bool"),
        (line((0, 0), (1, 10**400)), "number"),
        ({**line((0, 0), (1, 1)), "end_point": xyz(1, 1, 1)}, "off its sketch plane"),
    ],
)
def test_a_curve_that_cannot_be_read_is_named(curve: dict[str, Any], message: str):
    with pytest.raises(CadError, match=f"'Extrude 1'.*profile 'p'.*{message}"):
        omnicad.parse(model([curve]))


# --- features ---------------------------------------------------------------------------------------------


def test_extents():
    one = only_extrude(model(SQUARE, extent_one=distance(-2.0)))
    assert one.extent == Extent(ExtentType.ONE_SIDE, -2.0)
    two = {"extent_type": "TwoSidesFeatureExtentType", "extent_two": distance(3.0)}
    assert only_extrude(model(SQUARE, **two)).extent == Extent(ExtentType.TWO_SIDES, 1.0, 3.0)
    symmetric = only_extrude(model(SQUARE, extent_type="SymmetricFeatureExtentType"))
    assert symmetric.extent == Extent(ExtentType.SYMMETRIC, 1.0)
    assert [corner[2] for corner in extrude_box(symmetric)] == [-1, 1]  # extent_one to both sides


def test_symmetric_extents_agree_with_the_bounding_box_of_a_real_file():
    path = REAL / "0001" / "00015023_00002.json"
    box = json.loads(path.read_text())["properties"]["bounding_box"]
    low, high = program_box(omnicad.read(path))
    assert low[0] == pytest.approx(box["min_point"]["x"])
    assert high[0] == pytest.approx(box["max_point"]["x"])


@pytest.mark.parametrize(
    "feature, message",
    [
        ({"extent_one": distance(0.0)}, "no volume"),
        ({"extent_one": distance(1.0, taper=0.1)}, "taper"),
        ({"extent_one": {"type": "ToEntityExtentDefinition"}}, "ToEntityExtentDefinition"),
        ({"start_extent": {"type": "OffsetStartDefinition"}}, "OffsetStartDefinition"),
        ({"operation": "NewComponentFeatureOperation"}, "NewComponentFeatureOperation"),
        ({"extent_type": "AllExtentType"}, "AllExtentType"),
        ({"profiles": [{"profile": "p", "sketch": "t"}]}, "'t'"),
    ],
)
def test_what_is_not_supported_is_an_error_that_names_the_feature(feature: dict[str, Any], message: str):
    with pytest.raises(CadError, match=f"'Extrude 1'.*{message}"):
        omnicad.parse(model(SQUARE, **feature))


def with_second_feature(data: dict[str, Any], **feature: Any) -> dict[str, Any]:
    data["entities"]["f"] = copy.deepcopy(data["entities"]["e"]) | {"name": "Extrude 2"} | feature
    data["sequence"].append({"index": 2, "type": "ExtrudeFeature", "entity": "f"})
    return data


def test_a_step_that_is_neither_sketch_nor_extrude_is_an_error():
    data = model(SQUARE)
    data["sequence"].append({"index": 2, "type": "FilletFeature", "entity": "s"})
    with pytest.raises(CadError, match=r"step 2.*'FilletFeature'"):
        omnicad.parse(data)


@pytest.mark.parametrize(
    "kind, entity, message",
    [
        ("Sketch", "none", "no entity 'none'"),
        ("ExtrudeFeature", "none", "no entity 'none'"),
        ("Sketch", "e", "not of the type Sketch"),
        ("ExtrudeFeature", "s", "not of the type ExtrudeFeature"),
    ],
)
def test_a_step_must_name_an_entity_of_its_type(kind: str, entity: str, message: str):
    data = model(SQUARE)
    data["sequence"].append({"index": 2, "type": kind, "entity": entity})
    with pytest.raises(CadError, match=message):
        omnicad.parse(data)


def test_a_profile_must_have_loops_and_a_loop_curves():
    with pytest.raises(CadError, match="'p' has no loops"):
        omnicad.parse(model())
    with pytest.raises(CadError, match="loop without curves"):
        omnicad.parse(model([], [circle(0, 0, 1)]))


def test_features_without_profiles_are_skipped_but_something_must_be_left():
    data = with_second_feature(model(SQUARE), profiles=[])
    assert len(omnicad.parse(data).extrudes) == 1
    with pytest.raises(CadError, match="builds nothing"):
        omnicad.parse(model(SQUARE, profiles=[]))


def test_the_first_feature_is_new_and_cutting_from_nothing_is_skipped():
    joined = model(SQUARE, operation="JoinFeatureOperation")
    assert only_extrude(joined).operation is Operation.NEW
    cut_first = with_second_feature(
        model(SQUARE, operation="CutFeatureOperation"), operation="JoinFeatureOperation"
    )
    assert only_extrude(cut_first).operation is Operation.NEW
    with pytest.raises(CadError, match="builds nothing"):
        omnicad.parse(model(SQUARE, operation="CutFeatureOperation"))


def test_profiles_named_twice_count_once_and_unused_sketches_not_at_all():
    data = model(SQUARE, profiles=[{"profile": "p", "sketch": "s"}] * 2)
    data["entities"]["unused"] = {"type": "Sketch", "profiles": "not even read"}
    assert len(only_extrude(data).profiles) == 1


def test_profiles_in_several_planes_become_extrudes_of_the_same_operation():
    data = model(SQUARE, profiles=[{"profile": "p", "sketch": "s"}, {"profile": "p", "sketch": "t"}])
    data["entities"]["t"] = copy.deepcopy(data["entities"]["s"])
    assert len(omnicad.parse(data).extrudes[0].profiles) == 2  # the same plane twice is one extrude
    data["entities"]["t"]["transform"]["origin"] = xyz(0, 0, 5)
    first, second = omnicad.parse(data).extrudes
    assert (first.operation, second.operation) == (Operation.NEW, Operation.NEW)
    assert second.plane.origin == (0, 0, 5)
    both = data["entities"]["e"] | {"operation": "IntersectFeatureOperation"}
    data["entities"]["f"] = both
    data["sequence"].append({"index": 2, "type": "ExtrudeFeature", "entity": "f"})
    with pytest.raises(CadError, match="intersects with profiles of several planes"):
        omnicad.parse(data)


@pytest.mark.parametrize(
    "axes",
    [
        {"x_axis": xyz(0, 0)},
        {"z_axis": xyz(1, 0)},
        {"y_axis": xyz(0, -1)},
        {"z_axis": {"x": 1.0}},
        {"x_axis": xyz(2, 0), "y_axis": xyz(0, 2)},
        {"z_axis": xyz(0, 0, 0.5)},
    ],
)
def test_axes_must_be_a_right_handed_frame_of_unit_vectors(axes: dict[str, Any]):
    data = model(SQUARE)
    data["entities"]["s"]["transform"] |= axes
    with pytest.raises(CadError, match="sketch 's'"):
        omnicad.parse(data)


def test_caps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(omnicad, "MAX_CURVES", 3)
    with pytest.raises(CadError, match="more than 3 curves"):
        omnicad.parse(model(SQUARE))
    monkeypatch.setattr(omnicad, "MAX_LOOPS", 1)
    with pytest.raises(CadError, match="at most 1"):
        omnicad.parse(model([circle(0, 0, 1)], [circle(3, 3, 1)]))


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b"[1]", "list"),
        (b"\xff{}", "UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"entities": {}, "entities": {}}', "twice"),
        (b'{"entities": NaN}', "NaN"),
        (b'{"entities": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"entities": {}, "sequence": []}', "builds nothing"),
    ],
)
def test_a_file_that_is_no_model_is_one_clear_error(tmp_path: FilePath, content: bytes, message: str):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(CadError, match=rf"model\.json: .*{message}"):
        omnicad.read(path)


def test_a_missing_or_huge_file_is_one_clear_error(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CadError, match=r"none\.json: cannot be read"):
        omnicad.read(tmp_path / "none.json")
    monkeypatch.setattr(jsonfile, "MAX_FILE_BYTES", 10)
    with pytest.raises(CadError, match="bytes"):
        omnicad.read(REAL_FILES[0])


def test_the_twelve_real_files_are_there():
    assert len(REAL_FILES) == 12


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files_go_to_json_and_back(path: FilePath):
    program = omnicad.read(path)
    again = omnicad.parse(json.loads(json.dumps(omnicad.to_json(program))))
    assert areas(again) == pytest.approx(areas(program), rel=1e-9)
    for ours, theirs in zip(again.extrudes, program.extrudes, strict=True):
        assert (ours.operation, ours.extent) == (theirs.operation, theirs.extent)
        for a, b in zip(extrude_box(ours), extrude_box(theirs), strict=True):
            assert a == pytest.approx(b, abs=1e-9)


@settings(max_examples=50)
@given(programs())
def test_programs_go_to_json_and_back(program: CadProgram):
    again = omnicad.parse(json.loads(json.dumps(omnicad.to_json(program))))
    assert len(again.extrudes) == len(program.extrudes)
    assert areas(again) == pytest.approx(areas(program), rel=1e-6)
    for ours, theirs in zip(again.extrudes, program.extrudes, strict=True):
        for a, b in zip(extrude_box(ours), extrude_box(theirs), strict=True):
            assert a == pytest.approx(b, abs=1e-6)


def backwards(curve: dict[str, Any]) -> dict[str, Any]:
    if "end_point" not in curve:
        return curve
    return {**curve, "start_point": curve["end_point"], "end_point": curve["start_point"]}


@settings(max_examples=25)
@given(programs(), st.randoms(use_true_random=False))
def test_the_order_the_direction_and_the_repetition_of_curves_and_loops_say_nothing(
    program: CadProgram, rng: random.Random
):
    data = json.loads(json.dumps(omnicad.to_json(program)))
    for entity in data["entities"].values():
        for profile in entity.get("profiles", {}).values() if entity["type"] == "Sketch" else ():
            for loop in profile["loops"]:
                curves = loop["profile_curves"]
                curves += rng.choices(curves, k=rng.randint(0, 3))
                rng.shuffle(curves)
                curves[:] = [backwards(curve) if rng.random() < 0.5 else curve for curve in curves]
            profile["loops"] += copy.deepcopy(rng.choices(profile["loops"], k=rng.randint(0, 1)))
            rng.shuffle(profile["loops"])
    assert areas(omnicad.parse(data)) == pytest.approx(areas(program), rel=1e-6)


def test_is_outer_is_written_as_it_is_meant():
    text = json.dumps(omnicad.to_json(omnicad.parse(model(SQUARE, [circle(2, 2, 1)]))))
    assert text.count('"is_outer": true') == 1
    assert text.count('"is_outer": false') == 1


# --- normalise --------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(programs())
def test_normalise_fits_what_is_added_into_the_cube_and_remembers_the_way_back(program: CadProgram):
    normalised = normalise(program)
    low, high = program_box(normalised.program)
    assert max(b - a for a, b in zip(low, high, strict=True)) == pytest.approx(2)
    assert [a + b for a, b in zip(low, high, strict=True)] == pytest.approx([0, 0, 0], abs=1e-9)
    old_low, _ = program_box(program)
    back = [c + normalised.scale * a for c, a in zip(normalised.center, low, strict=True)]
    assert back == pytest.approx(old_low, abs=1e-9)


def test_the_box_of_an_arc_is_the_arcs_not_its_corners():
    data = model([line((1, 0), (-1, 0)), arc((1, 0), (-1, 0), (0, 0), (1, 0), math.pi)])
    low, high = program_box(omnicad.parse(data))
    assert (low, high) == (pytest.approx((-1, 0, 0)), pytest.approx((1, 1, 1)))


# --- bad input --------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(found for key in keys for found in places(value[key], (*path, key)))]


SMALL = json.loads((REAL / "0001" / "00017337_00003.json").read_text())
SMALL_PLACES = [place for place in places(SMALL) if place]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_real_file_changed_anywhere_parses_or_raises_cad_error(data: st.DataObject):
    changed = copy.deepcopy(SMALL)
    for *way, last in data.draw(st.lists(st.sampled_from(SMALL_PLACES), min_size=1, max_size=3)):
        parent = changed
        try:
            for key in way:
                parent = parent[key]
            parent[last]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took this place away
        if data.draw(st.booleans()):
            parent[last] = data.draw(json_values)
        elif data.draw(st.booleans()):
            del parent[last]
        elif isinstance(parent[last], float):
            parent[last] *= data.draw(st.floats(-1e12, 1e12))
    try:
        program = omnicad.parse(changed)
    except CadError:
        return
    omnicad.to_json(program)


@settings(max_examples=200)
@given(json_values | st.fixed_dictionaries({"entities": json_values, "sequence": json_values}))
def test_any_json_raises_cad_error(data: Any):
    with pytest.raises(CadError):
        omnicad.parse(data)


def test_lines_keep_their_ends_and_arcs_their_sweep():
    quarter = arc((4, 0), (0, 4), (0, 0), (1, 0), math.pi / 2)
    (profile,) = only_extrude(model([line((0, 0), (4, 0)), quarter, line((0, 4), (0, 0))])).profiles
    assert profile.outer == Path(
        (0.0, 0.0), (Line((4.0, 0.0)), Arc((0.0, 4.0), math.pi / 2), Line((0.0, 0.0)))
    )
