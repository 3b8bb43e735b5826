"""Surface points and meshes of a program, with or without OpenCASCADE.

With it a model is a B-rep (`cad_mllm.cad.solid`): points and normals of the exact surface, and every model
checked against the other way. Without it a model is a polygon mesh (`cad_mllm.cad.mesh`), on which round
faces are facets.
"""

import importlib.util
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cad_mllm.cad.mesh import Mesh, mesh_by_manifold
from cad_mllm.cad.program import CadProgram

POLYGON_SEGMENTS = 256
"""Facets of a full circle: normals are off by at most .7 degrees, points by 8e-5 of the radius."""


class Kernel(Enum):
    """What builds the surface."""

    OPENCASCADE = "opencascade"
    POLYGONS = "polygons"


class Surface(Protocol):
    """What data are made of."""

    def mesh(self) -> Mesh:
        """Watertight triangles, wound counter-clockwise seen from outside."""

    def sample(self, n: int, seed: int) -> NDArray[np.float32]:
        """`n` points evenly from the surface: (N, 6) float32 xyz + outward unit normal, deterministic."""


class _PolygonSurface:
    """The surface of the polygon model."""

    def __init__(self, program: CadProgram, segments: int) -> None:
        self._mesh = mesh_by_manifold(program, segments)

    def mesh(self) -> Mesh:
        return self._mesh

    def sample(self, n: int, seed: int) -> NDArray[np.float32]:
        return self._mesh.sample(n, seed)


def installed_kernel() -> Kernel:
    """OpenCASCADE where it is installed, else polygons."""
    found = importlib.util.find_spec("OCP") is not None
    return Kernel.OPENCASCADE if found else Kernel.POLYGONS


def surface_of(program: CadProgram, kernel: Kernel, polygon_segments: int = POLYGON_SEGMENTS) -> Surface:
    """Build the program's surface. Raises CadError where nothing with a volume is left."""
    if kernel is Kernel.POLYGONS:
        return _PolygonSurface(program, polygon_segments)
    from cad_mllm.cad import solid  # imports OpenCASCADE

    return solid.build(program)
