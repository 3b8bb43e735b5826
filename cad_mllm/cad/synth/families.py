"""Simple parts, each of a family of its own: a handful of features with one caption each."""

import math
from collections.abc import Callable

from cad_mllm.cad.program import Arc, Circle, ExtentType, Extrude, Line, Loop, Operation, Path, Plane
from cad_mllm.cad.synth.draw import LONGEST, Draw, Part
from cad_mllm.cad.synth.sketches import (
    centered,
    chain,
    feature,
    flat,
    holes_through,
    on_circle,
    rectangle,
    rounded,
    slot,
    up,
)


def _plate(draw: Draw) -> Part:
    width, thickness, radius = draw.even(24, 56), draw.even(4, 12), draw.pick((0, 0, 4, 8))
    hole, inset = draw.whole(2, 4), draw.pick((8, 9, 10))
    x, y = LONGEST / 2 - inset, width / 2 - inset
    pattern, centers = draw.pick(
        (
            ("four holes near its corners", [(-x, -y), (x, -y), (x, y), (-x, y)]),
            ("two holes on its long centre line", [(-x, 0.0), (x, 0.0)]),
            ("a row of three holes", [(-20.0, 0.0), (0.0, 0.0), (20.0, 0.0)]),
            ("five holes, one of them in the centre", [(-x, -y), (x, -y), (x, y), (-x, y), (0.0, 0.0)]),
        )
    )
    if len(centers) > 3:
        hole = min(hole, int(y) - 1)  # the holes of a narrow plate would meet across it
    corners = f"rounded corners of radius {draw.mm(radius)}" if radius else "square corners"
    count = {2: "two", 3: "three", 4: "four", 5: "five"}[len(centers)]
    return Part(
        holes_through(draw, rounded(LONGEST, width, radius), thickness, [Circle(c, hole) for c in centers]),
        draw.say((f"plate with {count} holes", f"mounting plate with {count} holes")),
        f"It measures {draw.by(LONGEST, width, thickness)}.",
        (
            f"It has {corners} and {pattern}, each {draw.mm(2 * hole)} in diameter.",
            "Their centres are " + ", ".join(draw.at(*center) for center in centers) + " from its centre.",
        ),
    )


def _bracket(draw: Draw) -> Part:
    shape = draw.pick(("L", "T", "U"))
    height, wall, depth = draw.even(28, 56), draw.even(6, 12), draw.even(16, 48)
    half = LONGEST / 2
    match shape:
        case "L":
            outline = chain(
                (-half, 0),
                (half, 0),
                (half, wall),
                (-half + wall, wall),
                (-half + wall, height),
                (-half, height),
            )
            post = -half
        case "T":
            outline = chain(
                (-half, 0), (half, 0), (half, wall), (wall / 2, wall),
                (wall / 2, height), (-wall / 2, height), (-wall / 2, wall), (-half, wall),
            )  # fmt: skip
            post = -wall / 2
        case _:
            outline = chain(
                (-half, 0), (half, 0), (half, height), (half - wall, height),
                (half - wall, wall), (-half + wall, wall), (-half + wall, height), (-half, height),
            )  # fmt: skip
            post = -half
    extrudes = [up(draw, outline, depth)]
    size = f"Its base is {draw.mm(LONGEST)} long, its height {draw.mm(height)}, its depth {draw.mm(depth)}."
    details = [f"The walls are {draw.mm(wall)} thick."]
    radius = draw.whole(2, 4)
    if draw.flip():
        middle = Plane((post, (wall + height) / 2, depth / 2), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
        extrudes.append(feature(Circle((0.0, 0.0), radius), wall, Operation.CUT, plane=middle))
        where = "left upright" if shape == "U" else "upright"
        above = draw.mm((wall + height) / 2)
        details.append(f"A hole of {draw.mm(2 * radius)} goes through the {where}, {above} above the bottom.")
    return Part(
        tuple(extrudes),
        draw.say(
            (
                f"{shape} bracket",
                f"{shape}-shaped bracket",
                f"bracket with {'an' if shape == 'L' else 'a'} {shape} section",
            )
        ),
        size,
        tuple(details),
    )


def _flange(draw: Draw) -> Part:
    thickness, bore, count, bolt = (
        draw.even(6, 12),
        draw.whole(6, 10),
        draw.pick((3, 4, 6, 8)),
        draw.pick((2, 3)),
    )
    circle = 25
    holes: list[Loop] = [Circle(c, bolt) for c in on_circle(count, circle)]
    size = f"The disc is {draw.mm(LONGEST)} in diameter and {draw.mm(thickness)} thick."
    details = [f"Its bore is {draw.mm(2 * bore)}."]
    details.append(f"{count} bolt holes of {draw.mm(2 * bolt)} lie on a circle of {draw.mm(2 * circle)}.")
    disc = Circle((0.0, 0.0), LONGEST / 2)
    if draw.flip():
        hub, rise = bore + draw.whole(4, 8), draw.even(8, 24)
        extrudes = (
            *holes_through(draw, disc, thickness, holes),
            feature(Circle((0.0, 0.0), hub), rise, Operation.JOIN, plane=flat(thickness)),
            feature(Circle((0.0, 0.0), bore), thickness + rise, Operation.CUT),
        )
        details.append(f"A hub of {draw.mm(2 * hub)} rises {draw.mm(rise)} above it.")
        return Part(extrudes, draw.say(("flange with a hub", "hubbed round flange")), size, tuple(details))
    extrudes = holes_through(draw, disc, thickness, [Circle((0.0, 0.0), bore), *holes])
    return Part(extrudes, draw.say(("round flange", "flat circular flange")), size, tuple(details))


def _shaft(draw: Draw) -> Part:
    count = draw.whole(2, 4)
    cuts = sorted(draw.whole(1, 7) + 8 * i for i in range(1, 7))[:: 6 // (count - 1)][: count - 1]
    ends = [0, *cuts, LONGEST]
    radii = [draw.whole(5, 16)]
    while len(radii) < count:
        radii.append(draw.pick([r for r in range(4, 20, 2) if r != radii[-1]]))
    extrudes: list[Extrude] = []
    for low, high, radius in zip(ends, ends[1:], radii, strict=False):
        operation = Operation.JOIN if extrudes else Operation.NEW
        extrudes.append(feature(Circle((0.0, 0.0), radius), high - low, operation, plane=flat(low)))
    sections = ", ".join(
        f"{draw.mm(2 * r)} over {draw.mm(b - a)}" for a, b, r in zip(ends, ends[1:], radii, strict=False)
    )
    details = [f"The diameters from the start are {sections}."]
    if draw.flip():
        bore = draw.whole(2, min(radii) - 1)
        extrudes.append(feature(Circle((0.0, 0.0), bore), LONGEST, Operation.CUT))
        details.append(f"A bore of {draw.mm(2 * bore)} runs through its whole length.")
    return Part(
        tuple(extrudes),
        draw.say(("stepped shaft", "turned shaft with steps")),
        f"It is {draw.mm(LONGEST)} long in {count} sections, {draw.mm(2 * max(radii))} at its thickest.",
        tuple(details),
    )


def _link(draw: Draw) -> Part:
    width, thickness = draw.even(16, 32), draw.even(4, 12)
    eye = draw.whole(3, width // 2 - 4)
    x = (LONGEST - width) / 2
    if draw.flip():
        holes: list[Loop] = [Circle((-x, 0.0), eye), Circle((x, 0.0), eye)]
        details = f"Both ends are half round, with eyes of {draw.mm(2 * eye)}, {draw.mm(2 * x)} apart."
        kind = draw.say(("connecting link", "link plate with two eyes"))
    else:
        length = draw.even(24, LONGEST - width + 2 * eye)
        holes = [slot(length, 2 * eye)] if length > 2 * eye else [Circle((0.0, 0.0), eye)]
        details = f"Both ends are half round. A slot of {draw.by(length, 2 * eye)} runs along its middle."
        kind = draw.say(("slotted link", "slotted bar with round ends"))
    size = f"It measures {draw.by(LONGEST, width, thickness)}."
    return Part(holes_through(draw, slot(LONGEST, width), thickness, holes), kind, size, (details,))


def _pocket(draw: Draw) -> Part:
    width, height, wall = draw.even(28, LONGEST), draw.even(12, 40), draw.whole(3, 7)
    floor, radius = draw.whole(2, 6), draw.pick((0, 2, 4))
    inside = rounded(LONGEST - 2 * wall, width - 2 * wall, radius)
    extrudes = (
        up(draw, centered(LONGEST, width), height),
        feature(inside, floor - height, Operation.CUT, plane=flat(height)),
    )
    corners = f", its corners rounded with {draw.mm(radius)}" if radius else ""
    return Part(
        extrudes,
        draw.say(("box with a pocket", "open tray", "rectangular housing")),
        f"It measures {draw.by(LONGEST, width, height)}.",
        (f"The walls are {draw.mm(wall)} thick; the pocket is {draw.mm(height - floor)} deep{corners}.",),
    )


def _ribs(draw: Draw) -> Part:
    width, thickness = draw.even(32, 56), draw.even(4, 8)
    count, rib, rise = draw.whole(2, 4), draw.pick((2, 4)), draw.even(6, 24)
    pitch = (LONGEST - 16) // (count - 1) // 2 * 2
    lefts = [-pitch * (count - 1) / 2 + pitch * i - rib / 2 for i in range(count)]
    bars = [rectangle(x, -width / 2, rib, width) for x in lefts]
    return Part(
        (
            up(draw, centered(LONGEST, width), thickness),
            feature(bars, rise, Operation.JOIN, plane=flat(thickness)),
        ),
        draw.say((f"plate with {count} ribs", "ribbed plate", "ribbed base plate")),
        f"The plate measures {draw.by(LONGEST, width, thickness)}.",
        (
            f"{count} parallel ribs, {draw.mm(rib)} thick and {draw.mm(rise)} high, stand across it, "
            f"{draw.mm(pitch)} apart.",
        ),
    )


def _wedge(draw: Draw) -> Part:
    """A block whose top is cut off by a plane tilted about x or y."""
    about_y, degrees = draw.flip(), draw.pick((15, 20, 30, 40))
    width, low = draw.even(24, 48), draw.even(6, 16)
    run, across = (LONGEST, width) if about_y else (width, LONGEST)
    rise = math.tan(math.radians(degrees)) * run
    height = 2 * math.ceil((low + rise) / 2) if low + rise <= LONGEST else LONGEST
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    length = math.hypot(run, rise)
    if about_y:  # rises along x
        plane = Plane((-run / 2, 0.0, float(low)), (cos, 0.0, sin), (-sin, 0.0, cos))
        tool = rectangle(-4, -across / 2 - 1, length + 8, across + 2)
    else:  # rises along y
        plane = Plane((0.0, -run / 2, float(low)), (1.0, 0.0, 0.0), (0.0, -sin, cos))
        tool = rectangle(-across / 2 - 1, -4, across + 2, length + 8)
    reach = math.ceil((height - low) * cos) + 2
    extrudes = [
        up(draw, centered(LONGEST, width), height),
        feature(tool, reach, Operation.CUT, plane=plane),
    ]
    direction = "length" if about_y else "width"
    details = [f"The sloping top rises by {degrees} degrees along its {direction}."]
    if draw.flip():
        bore = draw.whole(3, 8)
        extrudes.append(feature(Circle((0.0, 0.0), bore), height, Operation.CUT))
        details.append(f"A vertical hole of {draw.mm(2 * bore)} goes through its centre.")
    return Part(
        tuple(extrudes),
        draw.say(("wedge", "block with a slanted top", "ramp")),
        f"Its base measures {draw.by(LONGEST, width)}; it is {draw.mm(low)} high at the low end.",
        tuple(details),
    )


def _ring(draw: Draw) -> Part:
    kind = draw.pick(("ring", "tube", "half ring"))
    if kind == "tube":
        outer, height = draw.whole(8, 20), LONGEST
    else:
        outer, height = LONGEST // 2, draw.even(6, 32)
    inner = draw.whole(outer // 3, outer - 2)
    if kind == "half ring":
        outline: Loop = Path(
            (float(outer), 0.0),
            (
                Arc((-float(outer), 0.0), math.pi),
                Line((-float(inner), 0.0)),
                Arc((float(inner), 0.0), -math.pi),
                Line((float(outer), 0.0)),
            ),
        )
        extrudes: tuple[Extrude, ...] = (up(draw, outline, height),)
    else:
        extrudes = holes_through(draw, Circle((0.0, 0.0), outer), height, [Circle((0.0, 0.0), inner)])
    names = {
        "ring": ("flat ring", "ring", "spacer ring"),
        "tube": ("tube", "hollow cylinder", "straight pipe"),
        "half ring": ("half ring", "semicircular ring segment"),
    }
    word = "long" if kind == "tube" else "thick"
    return Part(
        extrudes,
        draw.say(names[kind]),
        f"Its outer diameter is {draw.mm(2 * outer)}; it is {draw.mm(height)} {word}.",
        (f"The inner diameter is {draw.mm(2 * inner)}.",),
    )


def _nut(draw: Draw) -> Part:
    sides = draw.pick((6, 6, 6, 8))
    height, bore = draw.even(12, 40), draw.whole(8, 20)
    prefix = {6: "hexagonal", 8: "octagonal"}[sides]
    outline = chain(*on_circle(sides, LONGEST / 2))
    return Part(
        holes_through(draw, outline, height, [Circle((0.0, 0.0), bore)]),
        draw.say((f"{prefix} nut", f"{prefix} prism with a hole", f"nut with {sides} sides")),
        f"It is {draw.mm(LONGEST)} across opposite corners and {draw.mm(height)} high.",
        (f"Its central hole is {draw.mm(2 * bore)} in diameter.",),
    )


def _oblique_hole(draw: Draw) -> Part:
    """A block with a hole drilled at an angle from the centre of its top."""
    width, height, radius = draw.even(24, 48), draw.even(16, 32), draw.whole(3, 6)
    degrees = draw.pick((15, 20, 30))
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    about_y = draw.flip()
    direction = "length" if about_y else "width"
    if about_y:
        plane = Plane((0.0, 0.0, height / 2), (cos, 0.0, -sin), (sin, 0.0, cos))
    else:
        plane = Plane((0.0, 0.0, height / 2), (1.0, 0.0, 0.0), (0.0, -sin, cos))
    reach = math.ceil(height / 2 / cos + radius * math.tan(math.radians(degrees))) + 1
    drill = feature(Circle((0.0, 0.0), radius), reach, Operation.CUT, plane=plane, sides=ExtentType.SYMMETRIC)
    return Part(
        (up(draw, centered(LONGEST, width), height), drill),
        draw.say(("block with an oblique hole", "rectangular block drilled at an angle")),
        f"It measures {draw.by(LONGEST, width, height)}.",
        (f"The hole of {draw.mm(2 * radius)} is tilted by {degrees} degrees along its {direction}.",),
    )


def _rounded_block(draw: Draw) -> Part:
    """A disc with two flats (a disc and a bar, intersected) or with one (an arc and its chord)."""
    height, radius = draw.even(10, 32), LONGEST // 2
    if draw.flip():
        flats = draw.even(28, 48)
        extrudes: tuple[Extrude, ...] = (
            up(draw, Circle((0.0, 0.0), radius), height),
            feature(centered(LONGEST + 2, flats), height, Operation.INTERSECT),
        )
        kind = draw.say(("disc with two parallel flats", "round plate with two flats"))
        detail = f"The flats are {draw.mm(flats)} apart."
    else:
        off = draw.whole(8, 24)
        half_chord = math.sqrt(radius**2 - off**2)
        sweep = 2 * math.pi - 2 * math.atan2(half_chord, off)
        outline = Path(
            (half_chord, -float(off)),
            (Arc((-half_chord, -float(off)), sweep), Line((half_chord, -float(off)))),
        )
        extrudes = (up(draw, outline, height),)
        kind = draw.say(("D-shaped disc", "disc with one flat"))
        detail = f"The flat lies {draw.mm(off)} from the centre."
    size = f"It is {draw.mm(LONGEST)} in diameter and {draw.mm(height)} thick."
    return Part(extrudes, kind, size, (detail,))


SIMPLE_FAMILIES: tuple[Callable[[Draw], Part], ...] = (
    _plate,
    _bracket,
    _flange,
    _shaft,
    _link,
    _pocket,
    _ribs,
    _wedge,
    _ring,
    _nut,
    _oblique_hole,
    _rounded_block,
)
