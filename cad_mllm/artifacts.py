"""From programs to STEP, pictures and points of their solids. Free of torch: workers start fast.

Without OpenCASCADE solids are polygon models, and there is no STEP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.cad import omnicad, render
from cad_mllm.cad.program import CadProgram
from cad_mllm.cad.surface import Kernel, installed_kernel, surface_of
from cad_mllm.cad.worker import run_limited
from cad_mllm.data.atomic import atomic_path
from cad_mllm.data.files import FloatArray
from cad_mllm.errors import CadError

_PICTURE_SIZE = 448


@dataclass(frozen=True)
class Artifact:
    """One program and where its files go: `stem` plus .step and .png."""

    stem: Path
    program: CadProgram


def sample_surface(program: CadProgram, num_points: int) -> FloatArray:
    """Points on the solid of a program, (P, 6), in its own unit. CadError: there is no solid."""
    return surface_of(_as_written(program), installed_kernel()).sample(num_points, seed=0)


def _as_written(program: CadProgram) -> CadProgram:
    """The program as its JSON says it, which is what others read. CadError: a reader would refuse it.

    Loops that cross enclose something by command text. JSON does not say how loops are nested: there it is
    not clear what they enclose.
    """
    return omnicad.parse(omnicad.to_json(program))


def write_artifacts(artifacts: Sequence[Artifact], *, workers: int, seconds: float) -> list[str | None]:
    """Write PNG and, with OpenCASCADE, STEP of each program in workers; for each None, or why there are none.

    A program that takes longer than `seconds` fails alone; no half-written file is left.
    """
    if not artifacts:
        return []
    outcomes: list[str | None] = [None] * len(artifacts)
    for index, outcome in run_limited(
        write_artifact, artifacts, workers=min(workers, len(artifacts)), seconds=seconds
    ):
        outcomes[index] = str(outcome) if isinstance(outcome, CadError) else None
    return outcomes


def write_artifact(artifact: Artifact) -> None:
    """Build the solid, write `<stem>.png` and, with OpenCASCADE, `<stem>.step`. CadError: it is none."""
    kernel = installed_kernel()
    built = surface_of(_as_written(artifact.program), kernel)
    picture = render.render_views(built.mesh(), size=_PICTURE_SIZE, views=1)[0]
    if kernel is Kernel.OPENCASCADE:
        from cad_mllm.cad.solid import Solid  # imports OpenCASCADE

        assert isinstance(built, Solid)
        with atomic_path(Path(f"{artifact.stem}.step")) as path:
            built.write_step(path)
    with atomic_path(Path(f"{artifact.stem}.png")) as path:
        picture.save(path)
