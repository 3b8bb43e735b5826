"""Programs whose numbers are nearly right, brought onto points."""

import re

import numpy as np
import pytest

from cad_mllm.cad import codec
from cad_mllm.cad.surface import Kernel, surface_of
from cad_mllm.data.clouds import normalise_points, squared_chamfer
from cad_mllm.fit import Unfitted, fit

TRUE = "NZ0,0,127,254,254E60P0,0H254V150H0;CZ0,0,187,254,254E60R60,70,30"
ROUGH = "NZ0,0,127,254,254E80P0,0H254V120H0;CZ0,0,187,254,254E60R70,60,22"


def cloud(text: str, seed: int = 4) -> np.ndarray:
    """As a scan has it: anywhere, of any size."""
    points_NC = surface_of(codec.decode(text), Kernel.POLYGONS).sample(4000, seed=seed)
    points_NC[:, :3] = points_NC[:, :3] * 30 + np.float32(7)
    return points_NC


def distance(text: str, other: str) -> float:
    """Of different points; so of a solid from itself, too."""
    return squared_chamfer(*(normalise_points(cloud(t, seed))[:, :3] for t, seed in ((text, 4), (other, 5))))


def commands(text: str) -> str:
    return re.sub(r"\d+", "#", text)


def test_numbers_that_are_off_come_near_and_commands_stay() -> None:
    (fitted,) = fit([Unfitted(ROUGH, cloud(TRUE), 8)], trials=150, workers=1)
    assert commands(fitted) == commands(ROUGH)
    assert distance(fitted, TRUE) < distance(ROUGH, TRUE) / 2


def test_what_fits_best_already_is_left_alone_and_so_is_what_was_written_by_hand() -> None:
    start = ROUGH[: ROUGH.index(";C") + 8]
    assert start[-1].isdigit()
    again = [Unfitted(TRUE, cloud(TRUE), 8), Unfitted(ROUGH, cloud(TRUE), 8, start)]
    same, continued = fit(again, trials=40, workers=2)
    assert distance(same, TRUE) < 1.2 * distance(TRUE, TRUE)  # as near as other points of the same solid
    assert continued.startswith(ROUGH[: ROUGH.index(";C") + 9])  # the number that was begun is whole


def test_a_fit_follows_from_text_and_points() -> None:
    one = Unfitted(ROUGH, cloud(TRUE), 8)
    assert fit([one], trials=20, workers=1) == fit([one, one], trials=20, workers=2)[:1]


def test_one_that_takes_too_long_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cad_mllm.fit._SECONDS", 1e-3)
    monkeypatch.setattr("cad_mllm.fit._SECONDS_A_TRIAL", 0.0)
    assert fit([Unfitted(ROUGH, cloud(TRUE), 8)], trials=10, workers=1) == [ROUGH]


def test_nothing_to_fit_takes_no_worker() -> None:
    assert fit([], trials=10, workers=4) == []
