"""Programs compared command by command."""

import pytest

from cad_mllm.cad import codec
from cad_mllm.cad.program import Circle, Operation
from cad_mllm.cad.program_metrics import canonical, commands, compare, fingerprint
from cad_mllm.errors import CadError
from tests.cad.shapes import CUBE, DRILLED, feature, polygon, program, square

PLATE = "NZ0,0,127,254,254E60P0,0H254V254H0"


def test_a_text_is_its_commands_with_their_parameters() -> None:
    assert commands(PLATE + ";C2Z127,127,187,0,0F40R0,0,50") == [
        ("N", ()),
        ("Z", (0, 0, 127, 254, 254)),
        ("E", (60,)),
        ("P", (0, 0)),
        ("H", (254,)),
        ("V", (254,)),
        ("H", (0,)),
        ("C", (2,)),
        ("Z", (127, 127, 187, 0, 0)),
        ("F", (40,)),
        ("R", (0, 0, 50)),
    ]


def test_the_same_program_is_right_in_all() -> None:
    match = compare(PLATE, PLATE)
    assert (match.command_accuracy, match.parameter_accuracy) == (1.0, 1.0)


def test_a_parameter_is_right_within_less_than_three_steps() -> None:
    for length, right in ((62, 11), (58, 11), (63, 10), (57, 10)):
        match = compare(PLATE.replace("E60", f"E{length}"), PLATE)
        assert match.command_accuracy == 1.0
        assert match.parameter_accuracy == pytest.approx(right / 11)


def test_parameters_of_wrong_commands_do_not_count() -> None:
    match = compare("NZ0,0,127,254,254F0P0,0H254V254H0", PLATE)
    assert match.command_accuracy == pytest.approx(6 / 7)
    assert match.parameter_accuracy == 1.0


def test_commands_are_compared_place_by_place_over_the_length_of_the_truth() -> None:
    longer = PLATE + ";CZ127,127,187,0,0F40R0,0,50"
    assert compare(longer, PLATE).command_accuracy == 1.0
    assert compare(PLATE, longer).command_accuracy == pytest.approx(7 / 11)
    nothing = compare("J", PLATE)
    assert (nothing.command_accuracy, nothing.parameter_accuracy) == (0.0, None)


def test_programs_of_one_solid_with_another_start_and_direction_are_the_same() -> None:
    turned = program(feature(polygon((1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0))))
    assert canonical(turned) == canonical(CUBE)
    assert fingerprint(canonical(turned)) == fingerprint(canonical(CUBE)) != fingerprint(canonical(DRILLED))


def test_size_and_place_do_not_count() -> None:
    assert canonical(program(feature(square(5.0, 3.0, 1.0), 5.0))) == canonical(CUBE)


def test_a_canonical_text_reads_back_as_itself() -> None:
    text = canonical(DRILLED)
    assert canonical(codec.decode(text)) == text


def test_a_program_without_size_has_no_text() -> None:
    flat = program(feature(Circle((0.0, 0.0), 1e-14), 1e-14, Operation.NEW))
    with pytest.raises(CadError):
        canonical(flat)
