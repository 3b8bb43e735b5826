"""The best of several programs, whatever becomes of some of them."""

import numpy as np
import pytest

from cad_mllm.cad import codec
from cad_mllm.cad.program import CadProgram
from cad_mllm.cad.surface import Kernel, surface_of
from cad_mllm.choose import choose


def plate(thickness: int) -> CadProgram:
    return codec.decode(f"NZ0,0,127,254,254E{thickness}P0,0H254V254H0", bits=8)


NOTHING = codec.decode(
    "NZ0,0,127,254,254E60P0,0H254V254H0;CZ0,0,127,254,254E254P0,0H254V254H0;"
    "CZ0,0,127,254,254F254P0,0H254V254H0",
    bits=8,
)
"""All of it is cut away again."""


CROSSING = codec.decode("NZ10,127,0,0,199F180P0,190H254V232A24,14,24D0,120,127R0,190,127", bits=8)
"""A circle leaves the path around it: its JSON is refused, and so it would be scored as invalid."""


def cloud(program: CadProgram) -> np.ndarray:
    """As a scan has it: anywhere, of any size."""
    points_NC = surface_of(program, Kernel.POLYGONS).sample(5000, seed=4)
    points_NC[:, :3] = points_NC[:, :3] * 30 + np.float32(7)
    return points_NC


def test_of_several_the_nearest_to_the_points_or_else_the_one_they_agree_on_is_chosen() -> None:
    candidates = [plate(20), plate(100), plate(60), None, NOTHING, CROSSING, plate(60), plate(64)]
    chosen = choose(
        [candidates, candidates, [None, NOTHING], [None, None], [CROSSING, plate(20)]],
        [cloud(plate(104)), None, None, cloud(plate(20)), cloud(CROSSING)],
        workers=2,
    )
    assert chosen == [1, 2, 1, 0, 1]


def test_one_that_takes_too_long_loses_to_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cad_mllm.choose._SECONDS", 1e-3)
    assert choose([[None, plate(60)]], [None], workers=1) == [1]
