"""One seed, one part: a program in millimetres, with captions at three levels of detail.

Every length is a whole number of grid steps (half steps for some centres) and the longest side of a part is
`LONGEST` steps, so that a normalised part falls on or near the levels of the quantised command text.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum

from cad_mllm.cad import codec
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import CadProgram, Circle, Extrude, Loop, Path, Plane, Profile, Vec2, Vec3
from cad_mllm.cad.synth.compose import compose
from cad_mllm.cad.synth.draw import Draw, Part, with_article
from cad_mllm.cad.synth.families import SIMPLE_FAMILIES
from cad_mllm.cad.synth.real import REAL_MODELS
from cad_mllm.cad.synth.varied import varied

_TRIES, _MANY_TRIES = 10, 200
_CLOSE, _FAR = 0.06, 0.3
"""How far a length may be off, in natural logarithms: at first, and after that many tries."""
_SIMPLE_LENGTHS = (60, 170)
"""Characters between which a real model may be followed by a simple part."""
_LEVEL_WEIGHTS = (0.2, 0.3, 0.5)


class Complexity(Enum):
    """What kind of parts to make."""

    SIMPLE = "simple"
    """A handful of features, at most 200 characters of command text."""
    REAL = "real"
    """Operations and lengths distributed as in real models: up to 14 extrudes and 2,000 characters."""
    VARIED = "varied"
    """An outline and up to three large features, all dimensions free; at most 250 characters."""


@dataclass(frozen=True)
class Model:
    """A part in millimetres, and what there is to say about it, from a word to everything."""

    program: CadProgram
    captions: tuple[str, str, str]
    """Its kind; with the main dimensions; with every feature, its dimensions and its place."""
    level: int
    """Which of them was drawn: an index into `captions`."""

    @property
    def caption(self) -> str:
        """The caption of the drawn level."""
        return self.captions[self.level]


def make_program(seed: int, complexity: Complexity = Complexity.SIMPLE) -> tuple[CadProgram, str]:
    """Make one part, in millimetres, with a caption of the level that the seed draws."""
    model = make_model(seed, complexity)
    return model.program, model.caption


def make_model(seed: int, complexity: Complexity = Complexity.SIMPLE) -> Model:
    """Make one part with all its captions; the same for the same arguments, always."""
    draw = Draw(seed)
    match complexity:
        case Complexity.SIMPLE:
            part = draw.pick(SIMPLE_FAMILIES)(draw)
        case Complexity.REAL:
            part = _like_real(draw)
        case Complexity.VARIED:
            part = varied(draw)
    axis, rotation = draw.pick(_MAIN_AXES)
    program = CadProgram(tuple(_placed(extrude, rotation, draw.step_mm) for extrude in part.extrudes))
    level = draw.weighted((0, 1, 2), _LEVEL_WEIGHTS)
    return Model(program, _captions(draw, part, axis), level)


def _like_real(draw: Draw) -> Part:
    """A part that follows a real model drawn at random: its operations, and about its length."""
    real = draw.pick(REAL_MODELS)
    wanted = draw.around(real.length, 0.1)
    low, high = _SIMPLE_LENGTHS
    best: Part | None = None
    closest, budget = math.inf, wanted
    for tries in range(_MANY_TRIES):
        if closest < (_CLOSE if tries < _TRIES else _FAR):
            break
        if low <= real.length <= high and draw.flip(0.4):
            part: Part | None = draw.pick(SIMPLE_FAMILIES)(draw)
        else:
            part = compose(draw, real.operations, budget)
        if part is None or _operations(part) != real.operations:
            continue
        length = len(codec.encode(normalise(CadProgram(part.extrudes)).program))
        off = abs(math.log(length / wanted))
        if off < closest:
            best, closest = part, off
        budget *= min(2.0, max(0.5, wanted / length))
    assert best is not None
    return best


def _operations(part: Part) -> str:
    return "".join(extrude.operation.name[0] for extrude in part.extrudes)


def _captions(draw: Draw, part: Part, axis: str) -> tuple[str, str, str]:
    opening = draw.say(
        ("{}.", "This is {}.", "Create {}.", "Model {}.", "Design {}.", "The part is {}.", "Make {}.")
    )
    kind = opening.format(with_article(part.kind))
    kind = kind[0].upper() + kind[1:]
    sized = f"{kind} {part.size}"
    along = draw.say(
        (f"Its main axis is {axis}.", f"It is built up along {axis}.", f"It points along {axis}.")
    )
    return kind, sized, " ".join([sized, *part.details, along])


_MAIN_AXES = (
    ("z", ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    ("z", ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    ("y", ((1, 0, 0), (0, 0, 1), (0, -1, 0))),
    ("x", ((0, 0, 1), (1, 0, 0), (0, 1, 0))),
)
"""Name of the axis, and the rotation (rows) that turns z into it."""


def _placed(extrude: Extrude, rotation: tuple[Vec3, ...], scale: float) -> Extrude:
    """The feature turned and scaled."""

    def turned(v: Vec3, factor: float = 1.0) -> Vec3:
        x, y, z = (factor * sum(r * c for r, c in zip(row, v, strict=True)) for row in rotation)
        return x, y, z

    def flat(p: Vec2) -> Vec2:
        return p[0] * scale, p[1] * scale

    def loop(it: Loop) -> Loop:
        if isinstance(it, Circle):
            return Circle(flat(it.center), it.radius * scale)
        return Path(flat(it.start), tuple(replace(segment, end=flat(segment.end)) for segment in it.segments))

    plane = extrude.plane
    return Extrude(
        Plane(turned(plane.origin, scale), turned(plane.x_axis), turned(plane.normal)),
        tuple(Profile(loop(p.outer), tuple(loop(hole) for hole in p.holes)) for p in extrude.profiles),
        replace(extrude.extent, one=extrude.extent.one * scale, two=extrude.extent.two * scale),
        extrude.operation,
    )
