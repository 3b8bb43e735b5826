"""Procedural models a second on one core: composing, points and views, with and without OpenCASCADE.

    python tests/bench/synth_speed.py [--samples 60] [--points 4096] [--views 8] [--size 224]

Ten thousand models on 16 cores then take 10,000 / 16 times what one takes.
"""

import argparse
import io
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from cad_mllm.cad import render
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.surface import Kernel, installed_kernel, surface_of
from cad_mllm.cad.synth import Complexity, make_program
from cad_mllm.data.progress import SlowProgress

STEPS = ("compose", "build", "points", "mesh", "views", "write")

_Result = TypeVar("_Result")


class Clock:
    """Processor time by step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)

    def timed(self, step: str, what: Callable[[], _Result]) -> _Result:
        """The result of `what`, whose time counts for `step`."""
        began = time.process_time()
        result = what()
        self.seconds[step] += time.process_time() - began
        return result


def make(seed: int, complexity: Complexity, kernel: Kernel, given: argparse.Namespace, clock: Clock) -> None:
    """One model, as `make-dummy` makes it."""
    program, _ = clock.timed("compose", lambda: make_program(seed, complexity))
    body = clock.timed("build", lambda: surface_of(normalise(program).program, kernel))
    cloud = clock.timed("points", lambda: body.sample(given.points, seed=0))
    mesh = clock.timed("mesh", body.mesh)
    views = clock.timed("views", lambda: render.render_views(mesh, size=given.size, views=given.views))

    def write() -> None:
        np.savez(io.BytesIO(), points=cloud.astype(np.float16))
        for view in views:
            view.save(io.BytesIO(), "PNG")

    clock.timed("write", write)


def main() -> None:
    """Measure and print milliseconds of processor time per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--points", type=int, default=4096)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    given = parser.parse_args()
    kernels = [Kernel.POLYGONS]
    if installed_kernel() is Kernel.OPENCASCADE:
        kernels.append(Kernel.OPENCASCADE)
    table = Table(
        "parts", "kernel", *(f"{step}, ms" for step in STEPS), "models/s per core", "10k on 16 cores"
    )
    with SlowProgress("models", len(Complexity) * len(kernels) * given.samples) as progress:
        for complexity, kernel in itertools.product(Complexity, kernels):
            clock = Clock()
            for seed in range(given.samples):
                make(seed, complexity, kernel, given, clock)
                progress.advance()
            each = sum(clock.seconds.values()) / given.samples
            table.add_row(
                complexity.value,
                kernel.value,
                *(f"{1e3 * clock.seconds[step] / given.samples:.0f}" for step in STEPS),
                f"{1 / each:.1f}",
                f"{10_000 * each / 16 / 60:.1f} min",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
