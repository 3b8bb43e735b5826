"""Command text: what it says, that it loses nothing but precision, and that it never surprises."""

import math
from pathlib import Path as FilePath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.geometry import area, extrude_box, program_box
from cad_mllm.cad.grammar import CommandGrammar, levels
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
from cad_mllm.errors import CadError, ConfigError
from tests.cad.strategies import command_texts, planes, programs

REAL_FILES = sorted((FilePath(__file__).parents[1] / "data" / "omnicad" / "json").glob("*/*.json"))
BITS = [8, 10]
GRAMMARS = {bits: CommandGrammar(bits) for bits in BITS}

FLAT = Plane((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
UP = Extent(ExtentType.ONE_SIDE, 1.0)


def real(path: FilePath) -> CadProgram:
    return normalise(omnicad.read(path)).program


def polygon(*corners: tuple[float, float]) -> Path:
    return Path(corners[0], tuple(Line(corner) for corner in (*corners[1:], corners[0])))


def single(*profiles: Profile, plane: Plane = FLAT, extent: Extent = UP) -> CadProgram:
    return CadProgram((Extrude(plane, profiles, extent, Operation.NEW),))


SQUARE = polygon((-1, -1), (1, -1), (1, 1), (-1, 1))


# --- what the words mean ----------------------------------------------------------------------------------


def test_the_example_of_the_documentation():
    text = "NZ0,0,127,254,254E60P0,0H254V254H0Q64,64V190H190V64;CZ127,127,187,0,0F40R0,0,50"
    program = codec.decode(text)
    plate, cut = program.extrudes
    assert plate.plane == Plane((-1.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    assert plate.extent.one == pytest.approx(60 / 127)
    assert plate.profiles[0].outer == polygon((0, 0), (2, 0), (2, 2), (0, 2))
    assert abs(area(plate.profiles[0].holes[0])) == pytest.approx((126 / 127) ** 2)
    assert cut.operation is Operation.CUT
    assert cut.plane.origin == pytest.approx((0, 0, 60 / 127))
    assert cut.extent.one == pytest.approx(-40 / 127)
    assert cut.profiles == (Profile(Circle((0.0, 0.0), pytest.approx(50 / 254))),)


def test_the_text_of_a_real_file_stays_what_it_is():
    """The format is public: checkpoints and data sets depend on it."""
    (path,) = (path for path in REAL_FILES if path.stem == "00040960_00003")
    assert codec.encode(real(path)) == "NY127,152,127,0,0T13,13R0,0,254;JY127,139,127,0,0F50R0,0,251"


def test_a_path_is_written_counter_clockwise_from_its_lowest_corner_and_closed_by_a_line():
    same = [SQUARE, polygon((1, 1), (1, -1), (-1, -1), (-1, 1))]
    assert {codec.encode(single(Profile(loop))) for loop in same} == {"NZ0,0,127,254,254E127P0,0H254V254H0"}


def test_quarter_and_half_arcs_are_exact_and_longer_ones_are_two():
    half = Path((1, 0), (Arc((-1, 0), math.pi), Line((1, 0))))
    assert codec.encode(single(Profile(half))) == "NZ0,127,127,254,0E127P254,0A0,0,120"
    corner = Path((1, 0), (Arc((0, 1), math.pi / 2), Line((0, 0)), Line((1, 0))))
    assert codec.encode(single(Profile(corner))) == "NZ127,127,127,127,127E127P0,0H254A0,254,60"
    three_quarters = Path((1, 0), (Arc((0, -1), 1.5 * math.pi), Line((1, 0))))
    (extrude,) = codec.decode(codec.encode(single(Profile(three_quarters)))).extrudes
    (profile,) = extrude.profiles
    assert isinstance(profile.outer, Path)
    assert [s.sweep for s in profile.outer.segments if isinstance(s, Arc)] == [
        pytest.approx(0.75 * math.pi)
    ] * 2


def test_a_circle_is_its_centre_and_radius():
    ring = Profile(Circle((0, 0), 1.0), (Circle((0, 0), 0.5),))
    assert codec.encode(single(ring)) == "NZ127,127,127,0,0E127R0,0,254D0,0,127"


@pytest.mark.parametrize(
    "extent, written",
    [
        (Extent(ExtentType.ONE_SIDE, 0.51), "E65"),
        (Extent(ExtentType.ONE_SIDE, -0.51), "F65"),
        (Extent(ExtentType.SYMMETRIC, 0.51), "M65"),
        (Extent(ExtentType.TWO_SIDES, 0.25, 0.51), "T32,65"),
        (Extent(ExtentType.TWO_SIDES, 0.25, 0.0), "E32"),
        (Extent(ExtentType.ONE_SIDE, 1e-5), "E1"),  # a thin sheet keeps a thickness
    ],
)
def test_extents(extent: Extent, written: str):
    text = codec.encode(single(Profile(Circle((0, 0), 0.5)), extent=extent))
    assert text == f"NZ127,127,127,0,0{written}R0,0,127"


def test_flipped_and_turned_planes_are_written_alike():
    upside_down = Plane((0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
    down = Extent(ExtentType.ONE_SIDE, -1.0)
    bump = Path(
        (-1, -1), (Line((1, -1)), Line((1, 0.5)), Arc((0.5, 1), math.pi / 2), Line((-1, 1)), Line((-1, -1)))
    )
    seen_from_below = Path(
        (-1, -1), (Line((-1, 1)), Line((0.5, 1)), Arc((1, 0.5), -math.pi / 2), Line((1, -1)), Line((-1, -1)))
    )
    assert codec.encode(single(Profile(seen_from_below), plane=upside_down, extent=down)) == codec.encode(
        single(Profile(Path(*_mirrored(bump))))
    )


def _mirrored(path: Path) -> tuple[tuple[float, float], tuple[Line | Arc, ...]]:
    """The sketch of `upside_down` seen in the world: x and y swapped."""
    swapped = [(p[1], p[0]) for p in [path.start, *(s.end for s in path.segments)]]
    return swapped[0], tuple(
        Arc(end, -s.sweep) if isinstance(s, Arc) else Line(end)
        for s, end in zip(path.segments, swapped[1:], strict=True)
    )


def test_what_is_flush_stays_flush_to_the_last_bit():
    """A boss on a plate: its bottom and two of its sides lie in the plate's faces, at awkward places."""
    plate = Extrude(FLAT, (Profile(polygon((-1, -1), (0.37, -1), (0.37, 1), (-1, 1))),), UP, Operation.NEW)
    top = Plane((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    boss = Profile(polygon((-0.2, 0.3), (0.37, 0.3), (0.37, 1), (-0.2, 1)))
    program = CadProgram((plate, Extrude(top, (boss,), Extent(ExtentType.ONE_SIDE, -0.4), Operation.JOIN)))
    first, second = (extrude_box(e) for e in codec.decode(codec.encode(program)).extrudes)
    assert first[1] == second[1]


@pytest.mark.parametrize("bits", BITS)
@given(plane=planes())
def test_any_plane_is_met_within_half_a_step_of_angle(bits: int, plane: Plane):
    (extrude,) = codec.decode(
        codec.encode(single(Profile(Circle((0, 0), 0.3)), plane=_in_cube(plane)), bits), bits
    ).extrudes
    cosine = abs(sum(a * b for a, b in zip(extrude.plane.normal, plane.normal, strict=True)))
    assert math.acos(min(1.0, cosine)) <= 1.5 * math.pi / levels(bits).turn + 1e-6


def _in_cube(plane: Plane) -> Plane:
    x, y, z = plane.origin
    return Plane((x / 10, y / 10, z / 10), plane.x_axis, plane.normal)


# --- what rounding does -----------------------------------------------------------------------------------


def test_what_rounding_flattens_is_left_out():
    notch = [(0.2, -1), (0.2, -1 + 1e-4), (0.2 + 1e-4, -1 + 1e-4), (0.2 + 1e-4, -1)]
    tiny_hole = polygon((0, 0), (1e-4, 0), (1e-4, 1e-4))
    with_details = Profile(polygon((-1, -1), *notch, (1, -1), (1, 1), (-1, 1)), (tiny_hole,))
    assert codec.encode(single(with_details)) == codec.encode(single(Profile(SQUARE)))


def test_a_slit_that_closes_leaves_no_spike():
    slit = polygon((-1, -1), (0, -1), (0, 0.5), (1e-4, 0.5), (1e-4, -1), (1, -1), (1, 1), (-1, 1))
    assert codec.encode(single(Profile(slit))) == codec.encode(single(Profile(SQUARE)))


def test_the_wall_of_a_thin_tube_stays_open():
    tube = Profile(Circle((0, 0), 1.0), (Circle((0, 0), 0.9999),))
    assert codec.encode(single(tube)).endswith("R0,0,254D0,0,253")
    wire = Profile(Circle((0, 0), 0.004), (Circle((0, 0), 0.001),))
    assert codec.encode(single(wire)).endswith("R0,0,1")  # no room for a hole


def test_a_model_of_which_nothing_is_left_is_an_error():
    ring = Profile(SQUARE, (polygon((-1 + 1e-4, -1), (1, -1), (1, 1), (-1, 1)),))
    with pytest.raises(CadError, match="too small for 8 bits"):
        codec.encode(single(ring))


def test_a_program_that_is_not_normalised_is_an_error():
    with pytest.raises(CadError, match="normalise"):
        codec.encode(single(Profile(Circle((0, 0), 5.0))))


def test_a_cut_may_reach_out_of_the_cube():
    block = Extrude(FLAT, (Profile(SQUARE),), UP, Operation.NEW)
    high = Plane((0.0, 0.0, 7.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    half_space = Profile(polygon((0, -5), (5, -5), (5, 5), (0, 5)))
    cut = Extrude(high, (half_space,), Extent(ExtentType.ONE_SIDE, -100.0), Operation.CUT)
    decoded = codec.decode(codec.encode(CadProgram((block, cut)))).extrudes[1]
    low, up = extrude_box(decoded)
    assert low[0] == pytest.approx(0, abs=0.05)
    assert low[1] < -1 and up[0] > 1 and up[1] > 1
    assert low[2] <= -1 and up[2] == pytest.approx(1, abs=0.05)


def test_a_cut_that_misses_the_cube_is_left_out():
    block = Extrude(FLAT, (Profile(SQUARE),), UP, Operation.NEW)
    above = Extrude(Plane((0, 0, 2), (1, 0, 0), (0, 0, 1)), (Profile(SQUARE),), UP, Operation.CUT)
    assert codec.encode(CadProgram((block, above))) == codec.encode(CadProgram((block,)))


def test_a_cut_through_all_keeps_the_fine_grid():
    block = Extrude(FLAT, (Profile(SQUARE),), UP, Operation.NEW)
    through = Extrude(
        FLAT, (Profile(Circle((0.1, 0), 0.5)),), Extent(ExtentType.SYMMETRIC, 40.0), Operation.CUT
    )
    assert codec.encode(CadProgram((block, through))).endswith(";CZ140,127,127,0,0M254R0,0,127")


def test_an_intersection_that_misses_the_cube_is_an_error():
    block = Extrude(FLAT, (Profile(SQUARE),), UP, Operation.NEW)
    above = Extrude(Plane((0, 0, 2), (1, 0, 0), (0, 0, 1)), (Profile(SQUARE),), UP, Operation.INTERSECT)
    with pytest.raises(CadError, match="intersection leaves nothing"):
        codec.encode(CadProgram((block, above)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files_keep_their_shape_within_the_step(path: FilePath, bits: int):
    program = real(path)
    decoded = codec.decode(codec.encode(program, bits), bits)
    step = 2 / levels(bits).grid
    assert len(decoded.extrudes) == len(program.extrudes)
    for before, after in zip(program.extrudes, decoded.extrudes, strict=True):
        assert after.operation is before.operation
        assert len(after.profiles) == len(before.profiles)
        assert sum(len(p.holes) for p in after.profiles) == sum(len(p.holes) for p in before.profiles)
    for before_corner, after_corner in zip(program_box(program), program_box(decoded), strict=True):
        assert after_corner == pytest.approx(before_corner, abs=2 * step)


def test_real_files_are_short():
    texts = [codec.encode(real(path)) for path in REAL_FILES]
    assert sum(map(len, texts)) / len(texts) < 500
    assert sum(map(len, texts)) < 0.03 * sum(path.stat().st_size for path in REAL_FILES)


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files_go_to_text_and_back_without_loss(path: FilePath, bits: int):
    text = codec.encode(real(path), bits)
    quantised = codec.decode(text, bits)
    assert codec.encode(quantised, bits) == text
    assert codec.decode(codec.encode(quantised, bits), bits) == quantised


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=80)
@given(program=programs())
def test_programs_go_to_text_and_back_without_loss(bits: int, program: CadProgram):
    try:
        text = codec.encode(normalise(program).program, bits)
    except CadError as error:
        assert "intersection leaves nothing" in str(error)  # it was drawn beside the model
        return
    assert codec.encode(codec.decode(text, bits), bits) == text
    assert GRAMMARS[bits].is_complete(GRAMMARS[bits].advance(GRAMMARS[bits].start, text) or 0)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_text_of_the_grammar_is_a_program_or_a_cad_error(bits: int, data: st.DataObject):
    text = data.draw(command_texts(GRAMMARS[bits]))
    try:
        program = codec.decode(text, bits)
        canonical = codec.encode(normalise(program).program, bits)
    except CadError:
        return
    assert codec.encode(codec.decode(canonical, bits), bits) == canonical


@settings(max_examples=300)
@given(st.data())
def test_a_changed_text_is_a_program_or_a_cad_error(data: st.DataObject):
    text = data.draw(st.sampled_from(REAL_TEXTS))
    at = data.draw(st.integers(0, len(text)))
    new = data.draw(st.text(alphabet="0123456789,;NJCIXYZOEFMTPRQDHVLAB \n-.é", max_size=3))
    changed = text[:at] + new + text[at + data.draw(st.integers(0, 3)) :]
    try:
        codec.decode(changed)
    except CadError:
        assert changed != text


REAL_TEXTS = [text for path in REAL_FILES if len(text := codec.encode(real(path))) < 600]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "breaks off after 0"),
        ("NZ0,0,127,254,254E60", "breaks off"),
        ("NZ0,0,127,254,254E60P0,0H254", "breaks off"),
        ("JZ127,127,127,0,0E127R0,0,254", "character 0"),  # the first is New
        ("NZ127,127,127,0,0E0R0,0,254", "character 18"),  # no extent is 0
        ("NZ127,127,127,0,0E127R0,0,255", "expected one of"),  # above the grid
        ("NZ127,127,127,0,0E127R00,0,254", "character 23"),  # leading zero
        ("NZ127,127,127,0,0E127R0,0,254 ", "character 29"),
        ("NZ127,127,127,0,0E127R0,0,٣", "character 26"),  # a digit, but not one of ours
        ("NZ0,0,127,254,254E60P0,0H254V0H0", "no loop that encloses an area"),
    ],
)
def test_what_is_no_command_text_is_an_error_that_says_where(text: str, message: str):
    with pytest.raises(CadError, match=message):
        codec.decode(text)


def test_very_long_text_is_refused_at_once():
    with pytest.raises(CadError, match="characters"):
        codec.decode("N" * (codec.MAX_TEXT + 1))


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300])
def test_numbers_that_are_none_are_refused(number: float):
    for profile in (Profile(Circle((number, 0), 0.5)), Profile(Circle((0, 0), number))):
        with pytest.raises(CadError):
            codec.encode(single(profile))


def test_bits():
    with pytest.raises(ConfigError, match="quantization_bits"):
        codec.encode(single(Profile(SQUARE)), bits=9)
