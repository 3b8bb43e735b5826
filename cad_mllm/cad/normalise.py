"""Bring a program to a standard place and size, and remember both."""

from dataclasses import dataclass, replace

from cad_mllm.cad.geometry import program_box, transform_loop
from cad_mllm.cad.program import CadProgram, Extent, Extrude, Loop, Profile, Vec3
from cad_mllm.errors import CadError

_IDENTITY = ((1.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class Normalised:
    """`program` in [-1, 1]^3; a point p of it was `center + scale * p` in the original."""

    program: CadProgram
    scale: float
    center: Vec3


def normalise(program: CadProgram) -> Normalised:
    """Centre the box of the added bodies on the origin and give its longest side the length 2.

    The box is computed from the profiles (exact for arcs and oblique planes) and holds everything that New
    and Join add; what Cut and Intersect take away does not shrink it. Raises CadError for a box without size.
    """
    low, high = program_box(program)
    scale = max(b - a for a, b in zip(low, high, strict=True)) / 2
    center = ((low[0] + high[0]) / 2, (low[1] + high[1]) / 2, (low[2] + high[2]) / 2)
    if not 1e-12 < scale < 1e12:
        raise CadError(f"the model's longest half side is {scale:g}: it must lie between 1e-12 and 1e12")
    extrudes = tuple(_scaled(extrude, 1 / scale, center) for extrude in program.extrudes)
    return Normalised(CadProgram(extrudes), scale, center)


def _scaled(extrude: Extrude, factor: float, center: Vec3) -> Extrude:
    def scaled(loop: Loop) -> Loop:
        return transform_loop(loop, _IDENTITY, (0.0, 0.0), factor)

    ox, oy, oz = (factor * (o - c) for o, c in zip(extrude.plane.origin, center, strict=True))
    return replace(
        extrude,
        plane=replace(extrude.plane, origin=(ox, oy, oz)),
        profiles=tuple(
            Profile(scaled(p.outer), tuple(scaled(hole) for hole in p.holes)) for p in extrude.profiles
        ),
        extent=Extent(extrude.extent.type, extrude.extent.one * factor, extrude.extent.two * factor),
    )
