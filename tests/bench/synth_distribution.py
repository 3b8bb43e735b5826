"""How procedural parts compare with real models: a table of quantiles and distances, and a picture of both.

    python tests/bench/synth_distribution.py --out distribution.png [--samples 1000] [--json FOLDER]

Without --json the real models are the 100 that `cad_mllm.cad.synth.real` holds; with it, those of a folder of
Omni-CAD JSON, measured anew. The distance is the mean distance (Wasserstein) of the natural logarithms.
"""

import argparse
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from scipy.stats import wasserstein_distance

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import Arc, CadProgram, Circle, Line, Path
from cad_mllm.cad.synth import Complexity, make_program
from cad_mllm.cad.synth.real import REAL_MODELS, Measured
from cad_mllm.data.progress import SlowProgress

QUANTITIES = ("length", "extrudes", "profiles", "loops", "curves")
QUANTILES = (5, 25, 50, 75, 95, 100)
COLORS = {"real": (20, 20, 20), "composed": (30, 110, 220), "simple": (225, 130, 40)}


def measured(program: CadProgram) -> Measured:
    """What `real` keeps of a model."""
    loops = [loop for e in program.extrudes for p in e.profiles for loop in (p.outer, *p.holes)]
    kinds = Counter(type(s) for loop in loops if isinstance(loop, Path) for s in loop.segments)
    return Measured(
        length=len(codec.encode(normalise(program).program)),
        operations="".join(extrude.operation.name[0] for extrude in program.extrudes),
        profiles=sum(len(extrude.profiles) for extrude in program.extrudes),
        loops=len(loops),
        lines=kinds[Line],
        arcs=kinds[Arc],
        circles=sum(isinstance(loop, Circle) for loop in loops),
    )


def values(models: Sequence[Measured], quantity: str) -> list[float]:
    """One quantity of every model, sorted."""
    of = {
        "length": lambda m: m.length,
        "extrudes": lambda m: len(m.operations),
        "profiles": lambda m: m.profiles,
        "loops": lambda m: m.loops,
        "curves": lambda m: m.lines + m.arcs + m.circles,
    }[quantity]
    return sorted(float(of(model)) for model in models)


def compared(sets: dict[str, Sequence[Measured]]) -> tuple[Table, Table]:
    """Quantiles of each quantity, and how far off the real ones; shares of operations and curves."""
    table = Table("quantity", "models", *(f"{q} %" for q in QUANTILES), "distance")
    for quantity in QUANTITIES:
        true = np.log(values(sets["real"], quantity))
        for name, models in sets.items():
            found = values(models, quantity)
            off = "" if name == "real" else f"{wasserstein_distance(np.log(found), true):.3f}"
            table.add_row(quantity, name, *(f"{np.percentile(found, q):.0f}" for q in QUANTILES), off)
    shares = Table("models", "operations", "curves")
    for name, models in sets.items():
        letters, curves = Counter("".join(m.operations for m in models)), Counter[str]()
        for model in models:
            curves += Counter(line=model.lines, arc=model.arcs, circle=model.circles)
        shares.add_row(name, _shares(letters, "NJCI"), _shares(curves, ("line", "arc", "circle")))
    return table, shares


def _shares(counts: "Counter[str]", keys: Iterable[str]) -> str:
    return " ".join(f"{key} {counts[key] / counts.total():.2f}" for key in keys)


def drawn(sets: dict[str, Sequence[Measured]]) -> Image.Image:
    """One panel for each quantity: the share of models (up) with at most so many (right, logarithmic)."""
    width, height, margin = 400, 250, 44
    picture = Image.new("RGB", (3 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for number, quantity in enumerate(QUANTITIES):
        left, top = number % 3 * width + margin, number // 3 * height + 28
        right, bottom = left + width - margin - 14, top + height - 70
        most = max(values(models, quantity)[-1] for models in sets.values())
        least = min(values(models, quantity)[0] for models in sets.values())
        span = math.log(most / least)
        draw.rectangle((left, top, right, bottom), outline=(160, 160, 160))
        title = {"length": "characters of command text"}.get(quantity, quantity)
        draw.text((left, top - 20), title, fill="black", font=font)
        tick = 1
        while tick <= most:
            for factor in (1, 3):
                if least <= tick * factor <= most:
                    x = left + (right - left) * math.log(tick * factor / least) / span
                    draw.line((x, top, x, bottom), fill=(230, 230, 230))
                    draw.text((x - 4, bottom + 4), str(tick * factor), fill=(90, 90, 90), font=font)
            tick *= 10
        for share in (0, 50, 100):
            y = bottom - (bottom - top) * share / 100
            draw.text((left - 34, y - 8), f"{share} %", fill=(90, 90, 90), font=font)
        for name in reversed(sets):
            found = values(sets[name], quantity)
            points = [(left, bottom)]
            for rank, value in enumerate(found, start=1):
                x = left + (right - left) * math.log(value / least) / span
                points += [(x, points[-1][1]), (x, bottom - (bottom - top) * rank / len(found))]
            draw.line([*points, (right, top)], fill=COLORS[name], width=2)
    for row, (name, models) in enumerate(sets.items()):
        x, y = 2 * width + margin, height + 40 + 50 * row
        draw.line((x, y + 8, x + 30, y + 8), fill=COLORS[name], width=3)
        operations = Counter("".join(model.operations for model in models))
        draw.text((x + 40, y), f"{name}: {len(models)} models", fill="black", font=font)
        draw.text((x + 40, y + 18), _shares(operations, "NJCI"), fill=(90, 90, 90), font=font)
    return picture


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    real: Sequence[Measured] = REAL_MODELS
    if given.json:
        real = [measured(omnicad.read(path)) for path in sorted(given.json.rglob("*.json"))]
    sets: dict[str, Sequence[Measured]] = {"real": real}
    with SlowProgress("parts", 2 * given.samples) as progress:
        for name, complexity in (("composed", Complexity.REAL), ("simple", Complexity.SIMPLE)):
            parts = []
            for seed in range(given.samples):
                parts.append(measured(make_program(seed, complexity)[0]))
                progress.advance()
            sets[name] = parts
    Console(width=130).print(*compared(sets))
    drawn(sets).quantize(32).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
