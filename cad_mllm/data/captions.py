"""A caption made from a program, for models that nobody described. Always labelled as such."""

from collections import Counter
from collections.abc import Iterator

from cad_mllm.cad.program import Arc, CadProgram, Circle, Line, Loop, Operation
from cad_mllm.data.files import FloatArray

SOURCE_KEY = "caption_source"
"""Extra field of a caption entry."""
GIVEN, TEMPLATE, PROCEDURAL = "given", "template", "procedural"
"""Its values: written by somebody, made by this module, made with a procedural model."""

_OPERATIONS = {
    Operation.NEW: "new",
    Operation.JOIN: "joined",
    Operation.CUT: "cut away",
    Operation.INTERSECT: "intersected",
}
_CURVES = {Line: "line", Arc: "arc", Circle: "circle"}


def template_caption(program: CadProgram, points_NC: FloatArray) -> str:
    """Features, curves, holes and proportions (of the box of `points_NC`) in one English sentence."""
    operations = Counter(extrude.operation for extrude in program.extrudes)
    by_operation = ", ".join(f"{operations[o]} {word}" for o, word in _OPERATIONS.items() if operations[o])
    kinds = count_curves(program)
    curves = ", ".join(_counted(kinds[word], word) for word in _CURVES.values() if kinds[word])
    holes = sum(len(profile.holes) for extrude in program.extrudes for profile in extrude.profiles)
    sides = points_NC[:, :3].max(axis=0) - points_NC[:, :3].min(axis=0)
    proportions = " : ".join(f"{side:.2g}" for side in sides / sides.max())
    with_holes = f" and {_counted(holes, 'hole')}" if holes else ""
    return (
        f"A part of {_counted(len(program.extrudes), 'extrusion')} ({by_operation}), sketched with {curves}"
        f"{with_holes}; length, width and height are as {proportions}."
    )


def count_curves(program: CadProgram) -> Counter[str]:
    """How many lines, arcs and circles the sketches have."""
    profiles = [profile for extrude in program.extrudes for profile in extrude.profiles]
    loops = [loop for profile in profiles for loop in (profile.outer, *profile.holes)]
    return Counter(_CURVES[curve] for loop in loops for curve in _curves(loop))


def _curves(loop: Loop) -> Iterator[type]:
    if isinstance(loop, Circle):
        yield Circle
    else:
        yield from (type(segment) for segment in loop.segments)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
