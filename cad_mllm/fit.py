"""The numbers of a program moved until its surface lies on the given points: what a model read, measured.

The commands stay as they are, and so does what a person wrote. All is done in worker processes without torch.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cad_mllm.artifacts import sample_surface
from cad_mllm.cad import codec
from cad_mllm.cad.surface import Kernel, surface_of
from cad_mllm.cad.worker import run_limited
from cad_mllm.data.clouds import normalise_points, squared_chamfer
from cad_mllm.data.files import FloatArray
from cad_mllm.data.order import stable_hash
from cad_mllm.data.progress import SlowProgress
from cad_mllm.errors import CadError

_SAMPLES = 1024
"""Points of a surface that are compared."""
_SEGMENTS = 32
"""Of a full circle: a trial is built roughly."""
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_SMALL_STEPS = (1, 1, 2, 2, 3, 4, 6, 8)
"""Levels by which a number is moved."""
_ROUGH = 0.6
"""Share of the trials that take any step; the others take small ones."""
_SECONDS_A_TRIAL, _SECONDS = 0.2, 20.0
"""A program that takes longer, by so much a trial and so much in all, stays as it was."""


@dataclass(frozen=True, eq=False)
class Unfitted:
    """Command text, and the points (P, 6) that its solid should have."""

    text: str
    points_PC: FloatArray
    bits: int
    start: str = ""
    """What a person wrote of it."""


def fit(programs: Sequence[Unfitted], *, trials: int, workers: int) -> list[str]:
    """The command texts with their numbers moved, in their order; each as it was if nothing is nearer.

    In each trial one number is moved by some levels of its grid, and the text kept if the chamfer distance of
    surface and points, both normalised to the unit cube, is less. What the grammar or the geometry does not
    allow is not kept, nor what becomes no solid in the end. The same for the same text and points, always.
    """
    fitted = [program.text for program in programs]
    jobs = [(program, trials) for program in programs]
    seconds = _SECONDS + trials * _SECONDS_A_TRIAL
    with SlowProgress("fitting to the points", len(jobs)) as progress:
        for number, outcome in run_limited(
            _fit, jobs, workers=min(workers, max(1, len(jobs))), seconds=seconds
        ):
            progress.advance()
            if not isinstance(outcome, CadError):
                fitted[number] = outcome
    return fitted


def _fit(job: tuple[Unfitted, int]) -> str:
    """One text. CadError: what comes out is no solid."""
    given, trials = job
    rng = np.random.default_rng(stable_hash("fit", given.text) % 2**63)
    target_P3 = normalise_points(given.points_PC)[:: -(-len(given.points_PC) // _SAMPLES), :3]
    text, least = given.text, _distance(given.text, given.bits, target_P3)
    for trial in range(trials):
        moved = _moved(text, given, rng, _STEPS if trial < _ROUGH * trials else _SMALL_STEPS)
        distance = _distance(moved, given.bits, target_P3)
        if distance < least:
            text, least = moved, distance
    if text != given.text:
        sample_surface(codec.decode(text, given.bits), 1)
    return text


def _moved(text: str, given: Unfitted, rng: np.random.Generator, steps: Sequence[int]) -> str:
    """The text with one of its own numbers moved; as it is if that leaves the grid."""
    numbers = [found for found in re.finditer(r"\d+", text) if found.start() >= len(given.start)]
    if given.start and given.start[-1].isdigit():  # the first of them may be the rest of a given one
        numbers = [found for found in numbers if found.start() > len(given.start)]
    if not numbers:
        return text
    number = numbers[rng.integers(len(numbers))]
    value = int(number[0]) + int(rng.choice((-1, 1))) * int(rng.choice(steps))
    if not 0 <= value < 2**given.bits:
        return text
    return f"{text[: number.start()]}{value}{text[number.end() :]}"


def _distance(text: str, bits: int, target_P3: FloatArray) -> float:
    """Squared chamfer distance of the text's surface from the points; infinite if it has none."""
    try:
        surface = surface_of(codec.decode(text, bits), Kernel.POLYGONS, _SEGMENTS)
        surface_P3 = normalise_points(surface.sample(_SAMPLES, seed=0))[:, :3]
    except CadError:
        return math.inf
    return squared_chamfer(surface_P3, target_P3)
