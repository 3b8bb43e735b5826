"""What the readers of one value in a JSON file take, and what they refuse."""

import math

import pytest

from cad_mllm.cad.jsonfile import MAX_NUMBER, vector
from cad_mllm.errors import CadError


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * MAX_NUMBER, -2 * MAX_NUMBER])
def test_a_vector_has_numbers_within_bounds_in_every_place(axis: str, value: float) -> None:
    with pytest.raises(CadError, match=rf"'{axis}' of 'origin' of a plane is not a number between"):
        vector({"origin": {"x": 1.0, "y": -2.0, "z": 0.5} | {axis: value}}, "origin", "a plane")


def test_a_vector_may_have_whole_numbers_and_the_largest() -> None:
    place = {"x": 1, "y": MAX_NUMBER, "z": -MAX_NUMBER}
    assert vector({"origin": place}, "origin", "a plane") == (1.0, MAX_NUMBER, -MAX_NUMBER)
