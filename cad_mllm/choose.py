"""The best of several programs for one input: the nearest to its points, or the one they agree on most."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from cad_mllm.artifacts import sample_surfaces
from cad_mllm.cad.program import CadProgram
from cad_mllm.data.collate import normalise_points
from cad_mllm.data.files import FloatArray

_SAMPLES = 2048
"""Points of a surface that are compared."""
_SECONDS = 20.0
"""A candidate whose solid takes longer is not chosen while another is there."""


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
    programs = list(dict.fromkeys(one for each in candidates for one in each if one is not None))
    clouds = sample_surfaces(programs, _SAMPLES, workers=workers, seconds=_SECONDS)
    surfaces = {
        program: normalise_points(cloud)
        for program, cloud in zip(programs, clouds, strict=True)
        if cloud is not None
    }
    return [
        _best([None if one is None else surfaces.get(one) for one in each], each, cloud)
        for each, cloud in zip(candidates, points, strict=True)
    ]


def _best(
    surfaces: Sequence[FloatArray | None], programs: Sequence[CadProgram | None], cloud: FloatArray | None
) -> int:
    built = [number for number, surface in enumerate(surfaces) if surface is not None]
    if not built:
        return next((number for number, program in enumerate(programs) if program is not None), 0)
    if cloud is not None:
        given = normalise_points(cloud)
        thinned = given[:: -(-len(given) // _SAMPLES)]
        costs = [_distance(surfaces[number], thinned) for number in built]
    else:
        costs = [sum(_distance(surfaces[number], surfaces[other]) for other in built) for number in built]
    return built[int(np.argmin(costs))]


def _distance(one_PC: FloatArray | None, other_PC: FloatArray | None) -> float:
    """Chamfer distance: mean squared distance to the nearest point, both ways, added up."""
    assert one_PC is not None and other_PC is not None
    one, other = one_PC[:, :3], other_PC[:, :3]
    there, _ = cKDTree(other).query(one)
    back, _ = cKDTree(one).query(other)
    return float(np.square(there).mean() + np.square(back).mean())
