"""Point clouds in one place and size, and how far apart they are. Free of torch, for workers.

Suffixes: N, P points; C coordinates (xyz and normal); 3 xyz.
"""

import numpy as np
from scipy.spatial import cKDTree

from cad_mllm.data.files import FloatArray
from cad_mllm.data.order import IntArray


def normalise_points(points_NC: FloatArray, rows_P: IntArray | None = None) -> FloatArray:
    """The cloud with its box centred at the origin and the longest half-extent 1; normals as they are.

    `rows_P`: which of its points are wanted, of the cloud normalised as a whole; None: all.
    """
    along_3N = np.ascontiguousarray(points_NC[:, :3].T)  # a reduction over rows of six is many times slower
    low, high = along_3N.min(axis=1), along_3N.max(axis=1)
    half_extent = float((high - low).max()) / 2
    wanted_PC = points_NC if rows_P is None else points_NC.take(rows_P, axis=0)
    centred = wanted_PC[:, :3] - (low + high) / 2
    xyz = centred / half_extent if half_extent > 0 else centred  # a single point has no extent
    return np.concatenate([xyz, wanted_PC[:, 3:]], axis=1, dtype=np.float32)


def squared_chamfer(one_N3: FloatArray, other_P3: FloatArray) -> float:
    """Chamfer distance: mean squared distance to the nearest point, both ways, added up."""
    there, _ = cKDTree(other_P3).query(one_N3)
    back, _ = cKDTree(one_N3).query(other_P3)
    return float(np.square(there).mean() + np.square(back).mean())
