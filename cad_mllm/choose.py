"""The best of several programs for one input: the nearest to its points, or the one they agree on most.

All that is costly (solids, distances) is done in worker processes, which need no torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np

from cad_mllm.artifacts import sample_surface
from cad_mllm.cad.program import CadProgram
from cad_mllm.cad.worker import run_limited
from cad_mllm.data.clouds import normalise_points, squared_chamfer
from cad_mllm.data.files import FloatArray
from cad_mllm.data.progress import SlowProgress
from cad_mllm.errors import CadError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_SAMPLES = 2048
"""Points of a surface that are compared."""
_SECONDS = 20.0
"""A candidate whose solid takes longer is not chosen while another is there."""


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A program, and the points (P, 3) that it is held against; without them its own are wanted."""

    program: CadProgram
    target_P3: FloatArray | None


@dataclass(frozen=True, eq=False)
class _Built:
    """A candidate's surface (P, 3), or how far it is from the target."""

    surface_P3: FloatArray
    """Empty where there is a distance."""
    distance: float


def choose(
    candidates: Sequence[Sequence[CadProgram | None]],
    points: Sequence[FloatArray | None],
    *,
    workers: int,
) -> list[int]:
    """For each input the number of its best candidate.

    Candidates that become no solid lose against those that do. With `points` (N, 6) the nearest in chamfer
    distance wins, both normalised to the unit cube; without, the one with the least mean distance to
    the others (the medoid, self-consistency). Ties go to the first. Solids are built in `workers` processes.
    """
    jobs: list[_Candidate] = []
    places: dict[tuple[int, CadProgram], int] = {}
    for number, (each, cloud) in enumerate(zip(candidates, points, strict=True)):
        target_P3 = None if cloud is None else _thinned(cloud)
        for program in each:
            if program is not None and (number, program) not in places:
                places[number, program] = len(jobs)
                jobs.append(_Candidate(program, target_P3))
    built = _in_workers("building candidates", _build, jobs, workers)
    each_built = [
        [None if one is None else built[places[number, one]] for one in each]
        for number, each in enumerate(candidates)
    ]
    costs: list[Sequence[float] | None] = [[b.distance for b in each if b] for each in each_built]
    alone = [number for number, cloud in enumerate(points) if cloud is None]
    surfaces = [[b.surface_P3 for b in each_built[number] if b] for number in alone]
    for number, sums in zip(
        alone, _in_workers("comparing candidates", _disagreement, surfaces, workers), strict=True
    ):
        costs[number] = sums
    return [
        _best(programs, each, values)
        for programs, each, values in zip(candidates, each_built, costs, strict=True)
    ]


def _best(
    programs: Sequence[CadProgram | None], built: Sequence[_Built | None], costs: Sequence[float] | None
) -> int:
    """The cheapest of those that were built, or the first if costs are unknown; else the first program."""
    solids = [number for number, one in enumerate(built) if one is not None]
    if solids and costs:
        return solids[int(np.argmin(costs))]
    return (solids or [number for number, one in enumerate(programs) if one is not None] or [0])[0]


def _in_workers(
    title: str, fn: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int
) -> list[_Result | None]:
    """Results in the order of the jobs, None for one that fails."""
    results: list[_Result | None] = [None] * len(jobs)
    if jobs:
        with SlowProgress(title, len(jobs)) as progress:
            for number, outcome in run_limited(fn, jobs, workers=min(workers, len(jobs)), seconds=_SECONDS):
                progress.advance()
                results[number] = None if isinstance(outcome, CadError) else outcome
    return results


def _thinned(cloud_NC: FloatArray) -> FloatArray:
    return normalise_points(cloud_NC)[:: -(-len(cloud_NC) // _SAMPLES), :3]


def _build(candidate: _Candidate) -> _Built:
    """Build one in a worker. CadError: it becomes no solid."""
    surface_P3 = normalise_points(sample_surface(candidate.program, _SAMPLES))[:, :3]
    if candidate.target_P3 is None:
        return _Built(surface_P3, math.nan)
    return _Built(surface_P3[:0], squared_chamfer(surface_P3, candidate.target_P3))


def _disagreement(surfaces: Sequence[FloatArray]) -> list[float]:
    """The sum of each surface's distances to all."""
    sums_N = np.zeros(len(surfaces))
    for row, column in combinations(range(len(surfaces)), 2):
        sums_N[[row, column]] += squared_chamfer(surfaces[row], surfaces[column])
    return list(map(float, sums_N))
